"""Getting a file from several peers at once.

Invariants: bytes are written only if they are proven pieces of the content; a source that sent any others is asked for
nothing more; the final name appears only on a complete file and replaces nothing.
"""

from __future__ import annotations

import errno
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from blake3 import blake3

from sprat.board import Board
from sprat.errors import SpratError, Unavailable, Untrusted, translated
from sprat.names import safe_name
from sprat.network import File, Network, Source
from sprat.tree import HASH, Layout, Manifest
from sprat.v1 import chunk_pb2 as chunk
from sprat.v1 import chunk_pb2_grpc as chunk_rpc

MAX_SOURCES = 16
"""Peers asked at once."""
CLAIM = 4 << 20
"""Most bytes asked of one peer in one call, but at least a piece."""
CALL_SECONDS = 120.0
ATTEMPTS = 3
"""Rounds over all sources that may bring nothing before a download fails."""
PARTIAL_SECONDS = 60.0
"""How long peers that are still fetching the content themselves may have nothing new."""


@dataclass(frozen=True)
class Progress:
    """How far a download is; bytes count when they are verified."""

    bytes_done: int
    bytes_total: int
    bytes_from: dict[str, int]


@dataclass(frozen=True)
class Downloaded:
    """A finished download."""

    path: Path
    size: int
    content_id: str
    bytes_from: dict[str, int]
    """Verified bytes by peer id."""
    bytes_wasted: int
    """Bytes received that were of no use: they came twice, or did not verify."""
    banned: dict[str, str]
    """Peers that sent something else than what was asked for, and what."""


def download(
    network: Network, file: File, to: Path, progress: Callable[[Progress], None] | None = None
) -> Downloaded:
    """See `Network.download`."""
    target = to / safe_name(file.name).rsplit("/", 1)[-1] if to.is_dir() else to
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists")
    with _part_beside(target) as (part, descriptor):
        swarm = _Swarm(network, file, descriptor, progress)
        swarm.run()
        os.fsync(descriptor)
        # Each piece was proven before it was written. This also reads back what the disk made of it, and asks BLAKE3's
        # own authors instead of this package.
        if blake3().update_mmap(part).hexdigest() != file.content_id:
            raise OSError(f"{part} does not hold what was written to it")
        os.link(part, target)  # unlike a rename, this never replaces a file
    size = swarm.manifest.layout.size if swarm.manifest else 0
    return Downloaded(target, size, file.content_id, swarm.given, swarm.wasted, swarm.banned)


@contextmanager
def _part_beside(target: Path) -> Iterator[tuple[Path, int]]:
    """A new file in the target's folder, gone at the end; what was linked to its final name stays."""
    part = target.with_name(f".sprat-{secrets.token_hex(8)}.part")
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        yield part, descriptor
    finally:
        os.close(descriptor)
        part.unlink()
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@dataclass
class _Work:
    """One source in one round."""

    source: Source
    peer: chunk_rpc.ChunkServiceStub
    lacks: set[int] = field(default_factory=set)


class _Swarm:
    """The download of one content: rounds over its sources until all pieces are there."""

    def __init__(
        self, network: Network, file: File, descriptor: int, progress: Callable[[Progress], None] | None
    ) -> None:
        self.network, self.file, self.descriptor = network, file, descriptor
        if not re.fullmatch("[0-9a-f]{64}", file.content_id):
            raise Untrusted(f"{file.content_id!r} is no content id")
        self.content = bytes.fromhex(file.content_id)
        self.manifest: Manifest | None = None
        self.board: Board | None = None
        self.given: dict[str, int] = {}
        self.wasted = 0
        self.banned: dict[str, str] = {}
        self.problems: dict[str, str] = {}
        self.workers = 1
        self._lock = threading.Lock()
        self._calls: set[grpc.Call] = set()
        self._stopped = False
        self._disk: OSError | None = None
        self._progress = progress

    def run(self) -> None:
        """Returns when every piece is written; raises if that cannot be."""
        if self.content == blake3(b"").digest():
            return
        sources, empty, last = self.file.sources, 0, time.monotonic()
        while True:
            before = sum(self.given.values())
            self._round([s for s in sources if s.peer_id not in self.banned])
            if self._disk:
                raise self._disk
            if self.board and self.board.complete:
                return
            if sum(self.given.values()) > before:
                empty, last = 0, time.monotonic()
            else:
                empty += 1
            sources = self._sources(sources)
            left = [s for s in sources if s.peer_id not in self.banned]
            patience = PARTIAL_SECONDS if any(s.partial for s in left) else 0
            if not left or (empty >= ATTEMPTS and time.monotonic() - last >= patience):
                raise self._failure()
            if empty:
                time.sleep(1)

    def _sources(self, known: tuple[Source, ...]) -> tuple[Source, ...]:
        """Who holds the content now; without a tracker, who held it before."""
        try:
            rows = self.network.list(content_id=self.file.content_id)
            return next((row.sources for row in rows if row.content_id == self.file.content_id), known)
        except SpratError:
            return known

    def _failure(self) -> SpratError:
        said = "; ".join(f"{peer[:8]}: {why}" for peer, why in {**self.problems, **self.banned}.items())
        kind = Untrusted if self.banned and not self.problems else Unavailable
        return kind(f"{self.file.name!r} cannot be completed: {said or 'it has no sources'}")

    def _round(self, sources: Sequence[Source]) -> None:
        """Asks all sources until they have nothing more to give."""
        chosen = random.sample(sources, min(len(sources), MAX_SOURCES))
        self.workers = max(1, len(chosen))
        self.problems = {}
        threads = [threading.Thread(target=self._ask, args=(source,), daemon=True) for source in chosen]
        for thread in threads:
            thread.start()
        try:
            while alive := [thread for thread in threads if thread.is_alive()]:
                alive[0].join(0.25)
                self._report()
                if self.board and self.board.complete:
                    break
        finally:
            # Who is still at work has been overtaken, or the caller goes away.
            self._stop()
            for thread in threads:
                thread.join()
            self._stopped = False
            if self.board:
                self.board.stopped = False
        self._report()

    def _report(self) -> None:
        if self._progress and self.manifest:
            with self._lock:
                given = dict(self.given)
            self._progress(Progress(sum(given.values()), self.manifest.layout.size, given))

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            calls = list(self._calls)
        if self.board:
            self.board.stop()
        for call in calls:
            call.cancel()

    @contextmanager
    def _cancellable(self, call: grpc.Call) -> Iterator[None]:
        with self._lock:
            self._calls.add(call)
            stopped = self._stopped
        try:
            if stopped:
                call.cancel()
            with translated():
                yield
        finally:
            call.cancel()
            with self._lock:
                self._calls.discard(call)

    def _ask(self, source: Source) -> None:
        """What one source's thread does in a round."""
        try:
            with self.network.dial(source, lambda: self._stopped) as channel:
                work = _Work(source, chunk_rpc.ChunkServiceStub(channel))
                manifest, board = self._prepare(work)
                most = max(1, CLAIM // manifest.layout.piece)
                while claim := board.take(most, self.workers, work.lacks):
                    try:
                        self._fetch(work, manifest, board, claim)
                    finally:
                        board.back(claim)
        except Untrusted as error:
            self.banned[source.peer_id] = str(error)
        except SpratError as error:
            self.problems[source.peer_id] = str(error)
        except OSError as error:
            self._disk = error
            self._stop()

    def _prepare(self, work: _Work) -> tuple[Manifest, Board]:
        """The proven manifest, from this source unless another was first, and the board that it makes possible."""
        mine = None if self.manifest else self._ask_manifest(work)
        with self._lock:
            if self.manifest is None and mine is not None:
                _reserve(self.descriptor, mine.layout.size)
                self.manifest, self.board = mine, Board(mine.layout.pieces)
            assert self.manifest is not None and self.board is not None
            return self.manifest, self.board

    def _ask_manifest(self, work: _Work) -> Manifest:
        call = work.peer.GetManifest(chunk.GetManifestRequest(content_ids=[self.content]), timeout=CALL_SECONDS)
        header: chunk.ManifestHeader | None = None
        hashes = bytearray()
        with self._cancellable(call):
            for part in call:
                kind = part.WhichOneof("part")
                if kind == "error":
                    raise Unavailable(_words(part.error))
                if kind == "header" and header is None:
                    header = part.header
                    most = HASH * Layout(header.size).pieces
                elif kind == "piece_hashes" and header is not None:
                    hashes += part.piece_hashes
                    if len(hashes) > most:
                        raise Untrusted("the manifest is malformed")
        if header is None:
            raise Unavailable("no manifest")
        values, edge = _cut(bytes(hashes)), _cut(header.right_edge)
        return Manifest.accept(self.content, header.size, values, header.last_chunk, edge)

    def _fetch(self, work: _Work, manifest: Manifest, board: Board, claim: Sequence[int]) -> None:
        """Gets pieces from a source, and writes those that are what they should be."""
        layout = manifest.layout
        ranges = [
            chunk.PieceRange(content_id=self.content, size=layout.size, first_piece=piece, piece_count=1)
            for piece in claim
        ]
        request = chunk.GetChunksRequest(ranges=ranges, chunk_length=min(layout.piece, 1 << 20))
        call = work.peer.GetChunks(request, timeout=CALL_SECONDS)
        came = _Arrivals(layout, claim)
        problem: SpratError | None = None
        try:
            with self._cancellable(call):
                for answer in call:
                    came.take(answer)
        except SpratError as error:
            problem = error
        self._settle(work, manifest, board, came)
        if problem or came.problem:
            raise problem or Unavailable(came.problem)
        work.lacks |= came.lacking
        if not came.complete:
            raise Unavailable("it broke off")

    def _settle(self, work: _Work, manifest: Manifest, board: Board, came: _Arrivals) -> None:
        pieces, peer_id = came.pieces, work.source.peer_id
        bad = manifest.wrong(pieces)
        for piece, data in pieces:
            if piece in bad:
                continue
            _write(self.descriptor, data, manifest.layout.offset(piece))
            first = board.arrived(piece)
            with self._lock:
                if first:
                    self.given[peer_id] = self.given.get(peer_id, 0) + len(data)
                else:
                    self.wasted += len(data)
        if bad:
            with self._lock:
                self.wasted += sum(len(data) for piece, data in pieces if piece in bad)
            raise Untrusted(f"it sent wrong bytes for piece {min(bad)}")


class _Arrivals:
    """The chunks of one call, as they become pieces."""

    def __init__(self, layout: Layout, claim: Sequence[int]) -> None:
        self.layout, self.claim = layout, claim
        self.parts: list[list[bytes]] = [[] for _ in claim]
        self.lengths = [0] * len(claim)
        self.lacking: set[int] = set()
        self.problem = ""

    def take(self, answer: chunk.GetChunksResponse) -> None:
        """Raises `Untrusted` on anything that was not asked for."""
        match answer.WhichOneof("part"):
            case "chunk":
                at, data = answer.chunk.range, answer.chunk.data
                if at >= len(self.claim):
                    raise Untrusted("it sent a chunk that was not asked for")
                piece = self.claim[at]
                start = self.layout.offset(piece) + self.lengths[at]
                if answer.chunk.offset != start or self.lengths[at] + len(data) > self.layout.length(piece):
                    raise Untrusted("it sent a chunk out of place")
                self.parts[at].append(data)
                self.lengths[at] += len(data)
            case "error":
                if answer.error.range >= len(self.claim):
                    raise Untrusted("it sent an error for what was not asked for")
                error = answer.error.error
                if error.code in (chunk.ContentError.CODE_NOT_FOUND, chunk.ContentError.CODE_PROMISED):
                    self.lacking.add(self.claim[answer.error.range])
                else:
                    self.problem = _words(error)

    @property
    def pieces(self) -> list[tuple[int, bytes]]:
        """(number, bytes) of those that are complete."""
        whole = [i for i, piece in enumerate(self.claim) if self.lengths[i] == self.layout.length(piece)]
        return [(self.claim[i], b"".join(self.parts[i])) for i in whole]

    @property
    def complete(self) -> bool:
        """Whether everything came; errors count as answers."""
        return all(
            piece in self.lacking or length == self.layout.length(piece)
            for piece, length in zip(self.claim, self.lengths)
        )


def _words(error: chunk.ContentError) -> str:
    return f"{chunk.ContentError.Code.Name(error.code)} {error.message}"


def _cut(values: bytes) -> list[bytes]:
    return [values[i : i + HASH] for i in range(0, len(values), HASH)]


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _reserve(descriptor: int, size: int) -> None:
    """Makes sure there is room, where the file system can tell."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
