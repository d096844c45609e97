"""The network as a member sees it: what there is, what changes, and getting and giving files."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import grpc

from sprat.channel import TRACKER_NAME, dial, peer_name
from sprat.enroll import renew
from sprat.errors import Ambiguous, NotFound, NotWhole, SpratError, Unavailable, Untrusted, translated
from sprat.identity import Folder, Identity, Trust
from sprat.v1 import tracker_pb2 as tracker
from sprat.v1 import tracker_pb2_grpc as tracker_rpc
from sprat.v1 import types_pb2 as types

if TYPE_CHECKING:
    from sprat.download import Downloaded, Progress
    from sprat.share import Share

_SECONDS = 15.0
# How long `find` waits for a listing that is not whole, and how often it looks.
_PATIENCE, _PAUSE = 60.0, 0.5


@dataclass(frozen=True)
class Source:
    """A peer that holds a content; `partial` while it has only some pieces."""

    peer_id: str
    addresses: tuple[str, ...]
    partial: bool = False


@dataclass(frozen=True)
class File:
    """One row of the listing. `sources` are all who hold the content, whatever they call it; at most 64 of them."""

    name: str
    size: int
    content_id: str
    sources: tuple[Source, ...] = ()
    source_count: int = 0

    @classmethod
    def of(cls, row: tracker.FileRow) -> File:
        sources = (Source(s.peer_id, tuple(s.addresses), s.partial) for s in row.sources)
        return cls(row.name, row.size, row.content_id, tuple(sources), row.source_count)


@dataclass(frozen=True)
class Change:
    """What `Network.watch` tells.

    `kind` is "changed" (a row appeared or its sources changed: `file`), "removed" (`name` and `content_id`), "current"
    (the rows that were there at the start are complete) or "resync" (changes were lost: list again).
    """

    kind: Literal["changed", "removed", "current", "resync"]
    name: str = ""
    content_id: str = ""
    file: File | None = None


class Network:
    """A member's connection to its network. Use it as a context manager, or close it.

    It may be used by several threads.
    """

    def __init__(self, folder: Folder, identity: Identity, addresses: Sequence[str]) -> None:
        self._folder, self._addresses = folder, addresses
        self._trust = folder.trust(identity.authority_certificate)
        self._channels: list[grpc.Channel] = []
        self.peer_id = identity.peer_id
        self._connect(identity)

    def _connect(self, identity: Identity) -> None:
        channel = dial(self._addresses, TRACKER_NAME, identity)
        self._channels.append(channel)
        self.identity = identity
        self.tracker = tracker_rpc.TrackerServiceStub(channel)
        """The tracker's calls as generated, for what this class does not wrap."""

    @classmethod
    def open(cls, directory: str | os.PathLike[str], tracker: str | None = None) -> Network:
        """Connects as the member whose identity `join` left in `directory`.

        The state directory of a sprat peer will do too, and what `sprat join --identity-only` or `sprat operator cert`
        wrote; for these two give the tracker's "HOST:PORT". A certificate past half of its life is renewed first, if it
        is ours to renew.
        """
        folder = Folder(Path(directory))
        identity = folder.load()
        if identity is None:
            raise SpratError(f"{folder.path} has not joined a network")
        addresses = [tracker] if tracker else folder.trackers()
        if not addresses:
            raise SpratError(f"{folder.path} does not say where the tracker is")
        if _is_due(folder, identity):
            try:
                identity = renew(directory)
            except Unavailable:
                # Half of a life is left to try again; only a certificate that has ended is of no use.
                if identity.left() <= timedelta(0):
                    raise
        return cls(folder, identity, addresses)

    def keep_renewed(self) -> None:
        """Renews the certificate if half of its life is over. For programs that stay: call it now and then.

        A share does so by itself. Calls that run keep their connection until the old certificate ends.
        """
        if _is_due(self._folder, self.identity):
            self._connect(renew(self._folder.path))

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def list(
        self,
        glob: str = "",
        *,
        text: str = "",
        name: str = "",
        content_id: str = "",
        peer_id: str = "",
        min_size: int = 0,
        max_size: int = 0,
        page_size: int = 0,
    ) -> Iterator[File]:
        """All files that match, by name: each exactly once, over as many pages as there are.

        In `glob`, `*` and `?` stay within a folder and `**` crosses; "shots/" means "shots/**". `content_id` may be a
        prefix of at least 8 digits. Sizes are in bytes, 0 is no bound.

        Raises `NotWhole` after the last row if the tracker was restarted and some of those who were here may be absent.
        """
        request = tracker.ListFilesRequest(
            glob=glob,
            text=text,
            name=name,
            content_id=content_id,
            peer_id=peer_id,
            min_size=min_size,
            max_size=max_size,
            page_size=page_size,
        )
        told = None
        while True:
            with translated():
                page = self.tracker.ListFiles(request, timeout=_SECONDS)
            if not page.completeness.is_whole:
                told = page.completeness
            yield from map(File.of, page.files)
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        if told is not None:
            raise NotWhole(told.peers_missing, told.whole_within_ms / 1000)

    def search(self, text: str) -> Iterator[File]:
        """All files whose name contains `text`, in upper or lower case."""
        return self.list(text=text)

    def watch(self, content_ids: Sequence[str] = (), *, skip_current: bool = False) -> Iterator[Change]:
        """Changes of the listing as they happen, without end; first what is there now, unless `skip_current`.

        `content_ids`, at most 1,024, narrow it to changes of these. Closing the iterator, or the network, ends it.
        """
        request = tracker.WatchFilesRequest(content_ids=content_ids, skip_current=skip_current)
        call = self.tracker.WatchFiles(request)
        try:
            with translated():
                for answer in call:
                    match answer.WhichOneof("change"):
                        case "changed":
                            row = File.of(answer.changed)
                            yield Change("changed", row.name, row.content_id, row)
                        case "removed":
                            yield Change("removed", answer.removed.name, answer.removed.content_id)
                        case "current":
                            yield Change("current")
                        case "resync":
                            yield Change("resync")
        finally:
            call.cancel()

    def find(self, what: str) -> File:
        """The file of that name, or with that content id (8 digits of it will do).

        A listing that is not whole is waited for, a minute at most. Raises `NotWhole` then, `NotFound`, or `Ambiguous`
        if several contents answer to it.
        """
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                return self._find(what)
            except NotWhole:
                if time.monotonic() >= until:
                    raise
            time.sleep(_PAUSE)

    def _find(self, what: str) -> File:
        digits = re.fullmatch("[0-9a-f]{8,64}", what) is not None
        # A whole content id means that content, whatever files are called.
        rows = [*self.list(name=what)] if len(what) < 64 or not digits else []
        if digits:
            rows += [row for row in self.list(content_id=what) if row.content_id.startswith(what)]
        contents = sorted({row.content_id for row in rows})
        if not contents:
            raise NotFound(f"nobody offers {what!r}")
        if len(contents) > 1:
            raise Ambiguous(what, contents)
        return rows[0]

    def download(
        self,
        what: str | File,
        to: str | os.PathLike[str] = ".",
        *,
        progress: Callable[[Progress], None] | None = None,
    ) -> Downloaded:
        """Fetches a file, by name or content id, from all who hold it at once.

        `to` is the file to create, or a folder for it. Every piece is verified before it is written; the file has its
        name only when it is complete, and never replaces another (`FileExistsError`). `progress` is called about four
        times a second.

        Raises what `find` does, `Unavailable` if nobody who can be reached has what is missing, `Untrusted` if all who
        do sent wrong bytes, `OSError` as the disk answers. Nothing is left behind then.
        """
        from sprat.download import download

        return download(self, what if isinstance(what, File) else self.find(what), Path(to), progress)

    def share(
        self, folder: str | os.PathLike[str], *, listen: str = "[::]:0", advertise: Sequence[str] = ()
    ) -> Share:
        """Offers the files of a folder, as they are now, to all members until the answer is closed.

        Leave it open for as long as the files are to be had: it is a context manager. `advertise` names addresses
        ("HOST:PORT") under which this machine is reached, beside the one that the tracker sees.
        """
        from sprat.share import Share

        return Share(self, Path(folder), listen, advertise)

    def dial(self, source: Source, stopped: Callable[[], bool] = lambda: False) -> grpc.Channel:
        """A connection to a peer: to this one, wherever it is, and to nobody else. It carries `ChunkService`.

        It is given up after ten seconds, or when `stopped` says so.
        """
        if source.peer_id in self._trust.denied:
            raise Untrusted(f"{source.peer_id} is no longer a member")
        return dial(source.addresses, peer_name(source.peer_id), self.identity, stopped)

    @property
    def trust(self) -> Trust:
        """Who is no longer a member, as far as this process has heard."""
        return self._trust

    def adopt(self, signed: types.SignedTrustList) -> None:
        """Takes over a list from the tracker, if the authority signed it and it is newer than the one held."""
        found = Trust.read(signed, self.identity.authority_certificate)
        if found.epoch > self._trust.epoch:
            self._trust = found
            if self._folder.own:
                self._folder.save_trust(signed)


def _is_due(folder: Folder, identity: Identity) -> bool:
    """Whether the certificate is ours to renew, and past half of its life."""
    return folder.own and bool(folder.trackers()) and identity.left() < identity.life() / 2
