"""What can go wrong, for callers to tell apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc


class SpratError(Exception):
    """Any failure of this package."""


class LinkError(SpratError, ValueError):
    """A join link that is none, is damaged, or needs another program."""


class Untrusted(SpratError):
    """Somebody is not who they should be, or sent something other than what was asked for."""


class NotFound(SpratError):
    """Nobody offers that."""


class NotWhole(SpratError):
    """The tracker was restarted and not everybody is back, so what it does not list may be there all the same.

    It is over in `seconds` at the latest. `missing` peers are not back; 0: the tracker cannot tell.
    """

    def __init__(self, missing: int, seconds: float) -> None:
        who = {0: "the tracker cannot tell who is", 1: "1 peer is"}.get(missing, f"{missing} peers are")
        super().__init__(f"the listing is not whole: {who} not back; in {seconds:.0f} s at the latest it is")
        self.missing, self.seconds = missing, seconds


class Ambiguous(SpratError):
    """Several contents have that name; ask for one of `content_ids`."""

    def __init__(self, name: str, content_ids: list[str]) -> None:
        super().__init__(f"{name!r} names several contents: {', '.join(content_ids)}")
        self.content_ids = content_ids


class Unavailable(SpratError):
    """Nobody who could have answered can be reached, or has what is missing."""


class CallError(SpratError):
    """A call was answered with an error; `code` says which."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code


@contextmanager
def translated() -> Iterator[None]:
    """Turns gRPC's errors into `CallError`, and those of a broken connection into `Unavailable`."""
    try:
        yield
    except grpc.RpcError as error:
        if not isinstance(error, grpc.Call):
            raise CallError(grpc.StatusCode.UNKNOWN, str(error)) from error
        details = error.details() or ""
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise Unavailable(details) from error
        raise CallError(error.code(), details) from error
