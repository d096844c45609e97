"""Giving files: a ChunkService for the files of one folder, and a voice that tells the tracker about them.

Invariants: a request names contents, never paths; a file is served only as the very file that was hashed; only members
are answered, and those who were thrown out no more from the next heartbeat on.
"""

from __future__ import annotations

import os
import random
import stat
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509

from sprat.errors import SpratError, Untrusted, translated
from sprat.identity import Trust, subject
from sprat.names import safe_name
from sprat.network import Network
from sprat.tree import Layout, Manifest, subtrees
from sprat.v1 import chunk_pb2 as chunk
from sprat.v1 import chunk_pb2_grpc as chunk_rpc
from sprat.v1 import tracker_pb2 as tracker
from sprat.v1 import types_pb2 as types

STREAMS = 16
"""Calls answered at once; who comes later is told to come back."""
HASHES_A_MESSAGE = 4096
MAX_CONTENTS = 1024
MAX_RANGES = 1024
MAX_CLAIM = 256 << 20
_BATCH = 200
_READ = 4 << 20

_Error = chunk.ContentError


@dataclass(frozen=True)
class Held:
    """A file that is offered: where it was when it was hashed, and what it was."""

    name: str
    path: Path
    stamp: tuple[int, ...]
    manifest: Manifest

    def open(self) -> int:
        """A descriptor of the very file that was hashed; raises `OSError` if it is gone, `Untrusted` if it changed."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        if _stamp(os.fstat(descriptor)) != self.stamp:
            os.close(descriptor)
            raise Untrusted("the file changed")
        return descriptor


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def scan(folder: Path) -> tuple[list[Held], list[str]]:
    """Hashes the plain files of a folder; the second list says what was left out, and why."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")
    held: list[Held] = []
    skipped: list[str] = []
    for above, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            path = Path(above, file)
            try:
                name = safe_name(path.relative_to(folder).as_posix())
                held.append(_hash(name, path))
            except (OSError, SpratError) as error:
                skipped.append(f"{path}: {error}")
    return held, skipped


def _hash(name: str, path: Path) -> Held:
    # Not to wait for the other end of a pipe that looks like a file.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise Untrusted("not a plain file")
        layout = Layout(before.st_size)
        hashes: list[bytes] = []
        step = max(1, _READ // layout.piece)
        last = b""
        for first in range(0, layout.pieces, step):
            group = range(first, min(first + step, layout.pieces))
            pieces = [(layout.offset(piece), _read(descriptor, layout, piece)) for piece in group]
            last = pieces[-1][1]
            if layout.pieces > 1:
                # The last piece of a file may be shorter; the others go side by side.
                whole = [piece for piece in pieces if len(piece[1]) == layout.piece]
                hashes += subtrees(whole) + subtrees(pieces[len(whole) :])
        if _stamp(os.fstat(descriptor)) != _stamp(before):
            raise Untrusted("it changes while it is read")
    return Held(name, path, _stamp(before), Manifest.of(layout, hashes, last))


def _read(descriptor: int, layout: Layout, piece: int) -> bytes:
    return _read_exactly(descriptor, layout.offset(piece), layout.length(piece))


def _read_exactly(descriptor: int, offset: int, length: int) -> bytes:
    data = os.pread(descriptor, length, offset)
    while len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            raise Untrusted("the file changed")
        data += more
    return data


class Share:
    """Offers the files of a folder to all members until it is closed; made by `Network.share`."""

    def __init__(self, network: Network, folder: Path, listen: str, advertise: Sequence[str]) -> None:
        self.network = network
        held, self.skipped = scan(folder)
        self.files = [types.FileEntry(name=h.name, size=h.manifest.layout.size, content_id=_hex(h)) for h in held]
        """What is offered."""
        self._service = ChunkServer({h.manifest.content_id: h for h in held}, network)
        self._server = grpc.server(
            ThreadPoolExecutor(STREAMS, thread_name_prefix="sprat-share"),
            maximum_concurrent_rpcs=STREAMS,
            options=[("grpc.max_receive_message_length", 256 << 10), ("grpc.so_reuseport", 0)],
        )
        chunk_rpc.add_ChunkServiceServicer_to_server(self._service, self._server)
        # Asked for at every connection: the certificate is renewed while the share is open.
        credentials = grpc.dynamic_ssl_server_credentials(
            self._certificate(), self._certificate, require_client_authentication=True
        )
        self.port = self._server.add_secure_port(listen, credentials)
        self._advertise = list(advertise)
        self._closed = threading.Event()
        self.problem: SpratError | None = None
        """Why the tracker has not heard of this share lately, if it has not."""
        self._server.start()
        try:
            self._interval = self._register()
        except BaseException:
            self._server.stop(None).wait()
            raise
        self._voice = threading.Thread(target=self._keep_announced, name="sprat-heartbeat", daemon=True)
        self._voice.start()

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Says goodbye to the tracker, lets calls end for two seconds, and stops."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._voice.join()
        try:
            with translated():
                self.network.tracker.Heartbeat(tracker.HeartbeatRequest(generation=1, leaving=True), timeout=5)
        except SpratError as error:
            self.problem = error
        self._server.stop(2).wait()

    def _certificate(self) -> grpc.ServerCertificateConfiguration:
        own = self.network.identity
        return grpc.ssl_server_certificate_configuration([(own.key, own.certificate + own.authority)], own.authority)

    def _register(self) -> float:
        """Announces everything; the answer is the number of seconds between heartbeats."""

        def messages() -> Iterator[tracker.RegisterRequest]:
            header = tracker.RegisterHeader(generation=1, addresses=self._advertise, port=self.port)
            yield tracker.RegisterRequest(header=header)
            for start in range(0, len(self.files), _BATCH):
                batch = tracker.RegisterBatch(added=self.files[start : start + _BATCH])
                yield tracker.RegisterRequest(batch=batch)

        with translated():
            told = self.network.tracker.Register(messages(), timeout=60)
        self._hear(told.trust_list if told.HasField("trust_list") else None)
        return told.heartbeat_interval_ms / 1000

    def _keep_announced(self) -> None:
        while not self._closed.wait(max(1.0, self._interval * random.uniform(0.9, 1.1))):
            try:
                self._beat()
                self.problem = None
            except SpratError as error:
                self.problem = error

    def _beat(self) -> None:
        self.network.keep_renewed()
        request = tracker.HeartbeatRequest(generation=1, trust_epoch=self.network.trust.epoch)
        with translated():
            answer = self.network.tracker.Heartbeat(request, timeout=10)
        self._hear(answer.trust_list if answer.HasField("trust_list") else None)
        states = tracker.HeartbeatResponse
        if answer.state in (states.STATE_STALE, states.STATE_UNKNOWN):
            self._interval = self._register()

    def _hear(self, signed: types.SignedTrustList | None) -> None:
        if signed is not None:
            self.network.adopt(signed)


def _hex(held: Held) -> str:
    return held.manifest.content_id.hex()


class ChunkServer(chunk_rpc.ChunkServiceServicer):
    """Answers members. `WatchHave` is not served: what is here is complete, and the tracker says so. Nor is
    `ReportPiece`."""

    def __init__(self, held: dict[bytes, Held], network: Network) -> None:
        self.held, self.network = held, network

    def _member(self, context: grpc.ServicerContext) -> None:
        """TLS has checked that the network's authority signed; this checks who it is."""
        shown: Any = context.auth_context().get("x509_pem_cert")  # a list of one
        try:
            peer_id, role = subject(x509.load_pem_x509_certificate(shown[0] if shown else b""))
        except (ValueError, Untrusted):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "a client certificate of this network is required")
        trust: Trust = self.network.trust
        if role not in ("peer", "operator") or peer_id in trust.denied:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "not a member")

    def GetManifest(
        self, request: chunk.GetManifestRequest, context: grpc.ServicerContext
    ) -> Iterator[chunk.GetManifestResponse]:
        self._member(context)
        if len(request.content_ids) > MAX_CONTENTS:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"more than {MAX_CONTENTS} contents")
        for index, content in enumerate(request.content_ids):
            held = self.held.get(content)
            if held is None:
                yield chunk.GetManifestResponse(index=index, error=_Error(code=_Error.CODE_NOT_FOUND))
                continue
            found = held.manifest
            header = chunk.ManifestHeader(
                size=found.layout.size, last_chunk=found.last_chunk, right_edge=b"".join(found.right_edge)
            )
            yield chunk.GetManifestResponse(index=index, header=header)
            for start in range(0, len(found.hashes), HASHES_A_MESSAGE):
                run = b"".join(found.hashes[start : start + HASHES_A_MESSAGE])
                yield chunk.GetManifestResponse(index=index, piece_hashes=run)

    def WatchHave(
        self, request: chunk.WatchHaveRequest, context: grpc.ServicerContext
    ) -> Iterator[chunk.WatchHaveResponse]:
        self._member(context)
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "complete files only")

    def ReportPiece(
        self, request: chunk.ReportPieceRequest, context: grpc.ServicerContext
    ) -> chunk.ReportPieceResponse:
        self._member(context)
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "files are hashed once, when they are shared")

    def GetChunks(
        self, request: chunk.GetChunksRequest, context: grpc.ServicerContext
    ) -> Iterator[chunk.GetChunksResponse]:
        self._member(context)
        step = max(16 << 10, min(request.chunk_length, 1 << 20))
        if len(request.ranges) > MAX_RANGES or not request.ranges:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not 1 to {MAX_RANGES} ranges")
        left = MAX_CLAIM
        for index, wanted in enumerate(request.ranges):
            held = self.held.get(wanted.content_id)
            problem = _Error.CODE_NOT_FOUND
            if held is not None:
                layout = held.manifest.layout
                pieces = range(wanted.first_piece, wanted.first_piece + wanted.piece_count)
                problem = _Error.CODE_OUT_OF_RANGE
                if wanted.size == layout.size and pieces and pieces[-1] < layout.pieces:
                    left -= sum(layout.length(piece) for piece in pieces)
                    if left < 0:
                        context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"more than {MAX_CLAIM} bytes")
                    try:
                        yield from _chunks(held, index, pieces, step)
                        continue
                    except Untrusted:
                        problem = _Error.CODE_CHANGED
                    except OSError:
                        problem = _Error.CODE_IO
            error = chunk.RangeError(range=index, error=_Error(code=problem))
            yield chunk.GetChunksResponse(error=error)


def _chunks(held: Held, index: int, pieces: range, step: int) -> Iterator[chunk.GetChunksResponse]:
    descriptor = held.open()
    try:
        layout = held.manifest.layout
        for piece in pieces:
            data = _read(descriptor, layout, piece)
            if _stamp(os.fstat(descriptor)) != held.stamp:
                raise Untrusted("the file changed")
            for start in range(0, len(data), step):
                part = data[start : start + step]
                offset = layout.offset(piece) + start
                yield chunk.GetChunksResponse(chunk=chunk.Chunk(range=index, offset=offset, data=part))
    finally:
        os.close(descriptor)
