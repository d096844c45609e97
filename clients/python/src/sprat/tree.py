"""What a file is: its pieces, their hashes, and the proof that bytes belong to a content id.

A content id is the BLAKE3 hash of the file's bytes. A piece hash is the chaining value of the subtree over the piece:
a value inside BLAKE3's tree, which the `blake3` package does not give out. So the tree is here, for whole arrays of
chunks at once: one NumPy operation works on the same step of all of them.

Nothing here does I/O, and nothing raises anything but `Untrusted` on what a stranger sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from blake3 import blake3

from sprat.errors import Untrusted

CHUNK = 1024
"""Length of BLAKE3's own chunk, a leaf of the tree, in bytes."""
MAX_SINGLE = 256 << 10
"""The longest file that is one piece and has no piece hashes."""
MIN_PIECE = 64 << 10
COMMON_PIECE = 256 << 10
ENOUGH_PIECES = 1024
MAX_PIECES = 65_536
MAX_SIZE = 1 << 40
HASH = 32

_Words: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.uint32]]"

_IV = np.array(
    [0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19], dtype=np.uint32
)
_PERMUTATION = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8]
_CHUNK_START, _CHUNK_END, _PARENT, _ROOT = 1, 2, 4, 8


def _schedule() -> list[list[list[int]]]:
    """For each round, which words of the block the four halves of it take: columns x, y and diagonals x, y."""
    order, rounds = list(range(16)), []
    for _ in range(7):
        rounds.append([order[0:8:2], order[1:8:2], order[8:16:2], order[9:16:2]])
        order = [order[i] for i in _PERMUTATION]
    return rounds


_SCHEDULE = _schedule()
_LEFT, _HALF, _RIGHT = [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]


def _rotate(words: _Words, bits: int, spare: _Words) -> None:
    np.left_shift(words, 32 - bits, out=spare)
    np.right_shift(words, bits, out=words)
    np.bitwise_or(words, spare, out=words)


def _mix(a: _Words, b: _Words, c: _Words, d: _Words, x: _Words, y: _Words, spare: _Words) -> None:
    """BLAKE3's quarter round on four columns of every lane."""
    for message, first, second in ((x, 16, 12), (y, 8, 7)):
        np.add(a, b, out=a)
        np.add(a, message, out=a)
        np.bitwise_xor(d, a, out=d)
        _rotate(d, first, spare)
        np.add(c, d, out=c)
        np.bitwise_xor(b, c, out=b)
        _rotate(b, second, spare)


def _compress(value: _Words, block: _Words, counter: _Words | int, length: int, flags: int) -> _Words:
    """BLAKE3's compression of one block in every lane: `value` has 8 rows, `block` 16, the answer 8."""
    lanes = block.shape[1]
    a, b = value[:4].copy(), value[4:].copy()
    c = np.repeat(_IV[:4, None], lanes, axis=1)
    d = np.zeros((4, lanes), dtype=np.uint32)
    # Of a file of at most 1 TiB the number of a chunk has 30 bits, so its upper word is 0.
    d[0], d[2], d[3] = counter, length, flags
    spare = np.empty((4, lanes), dtype=np.uint32)
    for columns_x, columns_y, diagonals_x, diagonals_y in _SCHEDULE:
        _mix(a, b, c, d, block[columns_x], block[columns_y], spare)
        b, c, d = b[_LEFT], c[_HALF], d[_RIGHT]
        _mix(a, b, c, d, block[diagonals_x], block[diagonals_y], spare)
        b, c, d = b[_RIGHT], c[_HALF], d[_LEFT]
    return np.concatenate([a ^ c, b ^ d])


def _counters(first: int, chunks: int) -> _Words:
    return np.arange(chunks, dtype=np.uint32) + np.uint32(first)


def _start(lanes: int) -> _Words:
    return np.repeat(_IV[:, None], lanes, axis=1)


def _whole_chunks(data: _Words, counters: _Words) -> _Words:
    """Values (8 rows) of complete chunks; `data` has a row of 256 words for each."""
    value = _start(len(data))
    for i in range(16):
        flags = _CHUNK_START * (i == 0) | _CHUNK_END * (i == 15)
        block = np.ascontiguousarray(data[:, 16 * i : 16 * i + 16].T)
        value = _compress(value, block, counters, 64, flags)
    return value


def _chunk(data: bytes, counter: int, root: bool = False) -> _Words:
    """Value of one chunk of 1 to 1,024 bytes."""
    value = _start(1)
    blocks = [data[i : i + 64] for i in range(0, len(data), 64)]
    for i, block in enumerate(blocks):
        flags = _CHUNK_START * (i == 0)
        if i == len(blocks) - 1:
            flags |= _CHUNK_END | _ROOT * root
        words = np.frombuffer(block.ljust(64, b"\0"), dtype="<u4").astype(np.uint32)[:, None]
        value = _compress(value, words, counter, len(block), flags)
    return value


def _parents(values: _Words, flags: int = 0) -> _Words:
    """Values of the parents of an even number of neighbours."""
    lanes = values.shape[1] // 2
    block = np.concatenate([values[:, 0::2], values[:, 1::2]])
    return _compress(_start(lanes), block, 0, 64, _PARENT | flags)


def _merge(values: _Words, root: bool = False) -> _Words:
    """Merges neighbours pair by pair, an odd one moving up, until one is left."""
    while (lanes := values.shape[1]) > 1:
        if lanes == 2:
            return _parents(values, _ROOT * root)
        merged = _parents(values[:, : lanes - lanes % 2])
        values = np.concatenate([merged, values[:, lanes - lanes % 2 :]], axis=1)
    return values


def _bytes(value: _Words) -> list[bytes]:
    """The values, 32 bytes each."""
    flat = np.ascontiguousarray(value.T).astype("<u4").tobytes()
    return [flat[i : i + HASH] for i in range(0, len(flat), HASH)]


def _values(hashes: Sequence[bytes]) -> _Words:
    words = np.frombuffer(b"".join(hashes), dtype="<u4").astype(np.uint32)
    return np.ascontiguousarray(words.reshape(-1, 8).T)


def subtree(data: bytes, offset: int) -> bytes:
    """Chaining value of the bytes at `offset`, which together are one subtree that is not the root."""
    whole = len(data) // CHUNK
    first = offset // CHUNK
    parts: list[_Words] = []
    if whole:
        words = np.frombuffer(data, dtype="<u4", count=whole * 256).astype(np.uint32, copy=False).reshape(whole, 256)
        parts.append(_whole_chunks(words, _counters(first, whole)))
    if len(data) % CHUNK:
        parts.append(_chunk(data[whole * CHUNK :], first + whole))
    return _bytes(_merge(np.concatenate(parts, axis=1)))[0]


def subtrees(pieces: Sequence[tuple[int, bytes]]) -> list[bytes]:
    """Chaining values of (offset, bytes): what `subtree` says of each, together in one go.

    Pieces of one length that is a power of two of chunks go through every step side by side, which is several times
    faster than one after the other.
    """
    lengths = {len(data) for _, data in pieces}
    chunks = max(lengths, default=0) // CHUNK
    if len(pieces) < 2 or len(lengths) > 1 or not chunks or chunks & (chunks - 1) or chunks * CHUNK not in lengths:
        return [subtree(data, offset) for offset, data in pieces]
    joined = b"".join(data for _, data in pieces)
    words = np.frombuffer(joined, dtype="<u4").astype(np.uint32, copy=False).reshape(-1, 256)
    counters = np.concatenate([_counters(offset // CHUNK, chunks) for offset, _ in pieces])
    values = _whole_chunks(words, counters)
    while values.shape[1] > len(pieces):
        values = _parents(values)
    return _bytes(values)


def fold(hashes: Sequence[bytes]) -> bytes:
    """The content id that piece hashes, two at least, belong to."""
    return _bytes(_merge(_values(hashes), root=True))[0]


def piece_length(size: int) -> int:
    """256 KiB for a file of at most that; else 64 KiB, doubled until 1,024 are enough for `size` bytes.

    Once it is 256 KiB, until 65,536 are.
    """
    length = MAX_SINGLE if size <= MAX_SINGLE else MIN_PIECE
    while size > length * (ENOUGH_PIECES if length < COMMON_PIECE else MAX_PIECES):
        length *= 2
    return length


@dataclass(frozen=True)
class Layout:
    """How a file of `size` bytes is divided into pieces: a plain function of the size."""

    size: int

    def __post_init__(self) -> None:
        if not 0 <= self.size <= MAX_SIZE:
            raise Untrusted(f"a file of {self.size} bytes is larger than the limit of 1 TiB")

    @property
    def piece(self) -> int:
        """Length of every piece but the last, in bytes."""
        return piece_length(self.size)

    @property
    def pieces(self) -> int:
        return -(-self.size // self.piece)

    def offset(self, piece: int) -> int:
        return piece * self.piece

    def length(self, piece: int) -> int:
        """Length of that piece in bytes."""
        return min(self.piece, self.size - self.offset(piece))

    def right_edge(self) -> tuple[int, int]:
        """How many bytes of the last piece lie before its last BLAKE3 chunk, and the length of that chunk."""
        last = self.length(self.pieces - 1)
        left = (last - 1) // CHUNK * CHUNK
        return left, last - left


@dataclass(frozen=True)
class Manifest:
    """The proven description of a content; `accept` and `of` make one.

    `hashes` is empty for a file of at most one piece, which is hashed whole.
    """

    content_id: bytes
    layout: Layout
    hashes: tuple[bytes, ...]
    last_chunk: bytes
    right_edge: tuple[bytes, ...]

    @classmethod
    def accept(
        cls, content_id: bytes, size: int, hashes: Sequence[bytes], last_chunk: bytes, right_edge: Sequence[bytes]
    ) -> Manifest:
        """Takes a manifest from a stranger.

        That hashes fold to the content id does not prove the size: other layers of the tree fold to it as well. So the
        file's last BLAKE3 chunk, hashed where the claimed size puts it, and merged with the subtrees to its left, must
        give the hash of the last piece.
        """
        layout = Layout(size)
        made = cls(content_id, layout, tuple(hashes), last_chunk, tuple(right_edge))
        if size == 0:
            if hashes or last_chunk or right_edge or content_id != blake3(b"").digest():
                raise Untrusted("the manifest is malformed")
            return made
        left, chunk = layout.right_edge()
        single = layout.pieces == 1
        claimed = (0 if single else layout.pieces, chunk, (left // CHUNK).bit_count())
        if (len(hashes), len(last_chunk), len(right_edge)) != claimed:
            raise Untrusted("the manifest is malformed")
        if any(len(value) != HASH for value in (content_id, *hashes, *right_edge)):
            raise Untrusted("the manifest is malformed")
        last = _merge_edge(right_edge, last_chunk, size - chunk, root=single)
        if last != (content_id if single else hashes[-1]):
            raise Untrusted("the manifest does not prove its size")
        if not single and fold(hashes) != content_id:
            raise Untrusted("the manifest does not belong to the content id")
        return made

    @classmethod
    def of(cls, layout: Layout, hashes: Sequence[bytes], last_piece: bytes) -> Manifest:
        """The manifest of a local file, from the hashes of its pieces (if several) and the bytes of the last."""
        if layout.size == 0:
            return cls(blake3(b"").digest(), layout, (), b"", ())
        left, _ = layout.right_edge()
        edge, at, start = [], 0, layout.offset(layout.pieces - 1)
        for length in _powers(left):
            edge.append(subtree(last_piece[at : at + length], start + at))
            at += length
        content_id = blake3(last_piece).digest() if layout.pieces == 1 else fold(hashes)
        return cls(content_id, layout, tuple(hashes), last_piece[left:], tuple(edge))

    def wrong(self, pieces: Sequence[tuple[int, bytes]]) -> set[int]:
        """Which of these (number, bytes) are not pieces of the content."""
        bad = {piece for piece, data in pieces if len(data) != self.layout.length(piece)}
        fit = [(piece, data) for piece, data in pieces if piece not in bad]
        if not self.hashes:
            return bad | {piece for piece, data in fit if blake3(data).digest() != self.content_id}
        # The last piece may be shorter; without it the others go side by side.
        last = self.layout.pieces - 1
        for group in ([p for p in fit if p[0] != last], [p for p in fit if p[0] == last]):
            values = subtrees([(self.layout.offset(piece), data) for piece, data in group])
            bad |= {piece for (piece, _), value in zip(group, values) if value != self.hashes[piece]}
        return bad


def _powers(left: int) -> list[int]:
    """The lengths of complete subtrees that make up `left` bytes, longest first."""
    return [1 << bit for bit in range(left.bit_length() - 1, -1, -1) if left >> bit & 1]


def _merge_edge(edge: Sequence[bytes], last_chunk: bytes, offset: int, root: bool) -> bytes:
    """The value of the last piece (with `root`, of the whole file) from the subtrees on its right edge."""
    value = _chunk(last_chunk, offset // CHUNK, root and not edge)
    for i, left in enumerate(reversed(edge)):
        pair = np.concatenate([_values([left]), value], axis=1)
        value = _parents(pair, _ROOT * (root and i == len(edge) - 1))
    return _bytes(value)[0]
