"""BLAKE3's tree and the manifests made of it, against the blake3 package and against liars."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from blake3 import blake3
from sprat import Untrusted
from sprat.names import safe_name
from sprat.tree import (
    CHUNK,
    COMMON_PIECE,
    MAX_PIECES,
    MAX_SINGLE,
    MAX_SIZE,
    MIN_PIECE,
    Layout,
    Manifest,
    fold,
    piece_length,
    subtree,
    subtrees,
)

SIZES = [0, 1, 63, 64, 65, 1023, 1024, 1025, 2048, 2049, 3 * 1024, 5000, MAX_SINGLE - 1, MAX_SINGLE, MAX_SINGLE + 1]
SIZES += [MIN_PIECE + 1, 5 * MIN_PIECE, 5 * MIN_PIECE + 1025, 7 * MIN_PIECE, 9 * MIN_PIECE + 17_777, 16 * MIN_PIECE]


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def cut(data: bytes) -> list[bytes]:
    layout = Layout(len(data))
    return [data[layout.offset(i) : layout.offset(i) + layout.length(i)] for i in range(layout.pieces)]


def manifest(data: bytes) -> Manifest:
    layout, pieces = Layout(len(data)), cut(data)
    hashes = [subtree(piece, layout.offset(i)) for i, piece in enumerate(pieces)] if len(pieces) > 1 else []
    return Manifest.of(layout, hashes, pieces[-1] if pieces else b"")


def accepted(honest: Manifest, size: int) -> Manifest:
    return Manifest.accept(honest.content_id, size, honest.hashes, honest.last_chunk, honest.right_edge)


def parents(hashes: Sequence[bytes]) -> list[bytes]:
    """The layer above, from two subtrees' values each; checked by the real thing in the test that uses it."""
    import numpy as np
    from sprat import tree

    words = np.frombuffer(b"".join(hashes), dtype="<u4").astype(np.uint32).reshape(-1, 8).T
    return tree._bytes(tree._parents(np.ascontiguousarray(words)))


@pytest.mark.parametrize("size", SIZES)
def test_any_size_is_plain_blake3_and_proves_itself(size: int) -> None:
    data = content(size)
    made = manifest(data)
    assert made.content_id == blake3(data).digest()
    assert accepted(made, size) == made
    assert made.wrong(list(enumerate(cut(data)))) == set()


@pytest.mark.parametrize("size", SIZES[1:])
def test_any_flipped_bit_is_found_in_its_piece(size: int) -> None:
    data, chance = content(size), random.Random(size)
    made = manifest(data)
    for _ in range(4):
        bit = chance.randrange(8 * size)
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert made.wrong(list(enumerate(cut(bytes(changed))))) == {bit // 8 // Layout(size).piece}


@pytest.mark.parametrize("size", [size for size in SIZES if size])
def test_any_other_size_is_refused(size: int) -> None:
    honest, chance = manifest(content(size)), random.Random(size)
    others = {size + n * MIN_PIECE for n in range(-4, 5)} | {size + chance.randrange(-3000, 3000) for _ in range(20)}
    for other in others | {size // 2, 2 * size, MAX_SIZE, MAX_SIZE + 1, 2**64 - 1}:
        if other not in (0, size) and other > 0:
            with pytest.raises(Untrusted):
                accepted(honest, other)


@pytest.mark.parametrize("size", [size for size in SIZES if size])
def test_any_changed_manifest_is_refused(size: int) -> None:
    honest, chance = manifest(content(size)), random.Random(size)

    def changed(value: bytes) -> bytes:
        at = chance.randrange(8 * len(value))
        return value[: at // 8] + bytes([value[at // 8] ^ 1 << at % 8]) + value[at // 8 + 1 :]

    def refused(hashes: Sequence[bytes], last_chunk: bytes, edge: Sequence[bytes]) -> None:
        with pytest.raises(Untrusted):
            Manifest.accept(honest.content_id, size, hashes, last_chunk, edge)

    hashes, chunk, edge = list(honest.hashes), honest.last_chunk, list(honest.right_edge)
    refused(hashes, changed(chunk), edge)
    refused(hashes, chunk[1:], edge)
    refused(hashes, chunk + b"x", edge)
    refused(hashes + [bytes(32)], chunk, edge)
    refused(hashes, chunk, edge + [bytes(32)])
    for values in (hashes, edge):
        if values:
            at = chance.randrange(len(values))
            kept, values[at] = values[at], changed(values[at])
            refused(hashes, chunk, edge)
            values[at] = kept[:31]
            refused(hashes, chunk, edge)
            values[at] = kept
    assert accepted(honest, size) == honest


def test_the_layers_above_and_below_are_refused_as_files_of_other_sizes() -> None:
    data = content(16 * MIN_PIECE)
    honest = manifest(data)
    above = parents(honest.hashes)
    assert fold(above) == honest.content_id  # which is why folding alone proves nothing
    below = [subtree(data[at : at + MIN_PIECE // 2], at) for at in range(0, len(data), MIN_PIECE // 2)]
    assert fold(below) == honest.content_id
    deeper = [honest.hashes[14], *honest.right_edge]
    for size, hashes, edges in (
        (8 * MIN_PIECE, above, (honest.right_edge, deeper, deeper[:6], deeper[1:])),
        (32 * MIN_PIECE, below, (honest.right_edge, honest.right_edge[1:])),
        (31 * MIN_PIECE + MIN_PIECE // 2, below, (honest.right_edge, honest.right_edge[1:])),
    ):
        for edge in edges:
            with pytest.raises(Untrusted):
                Manifest.accept(honest.content_id, size, hashes, honest.last_chunk, edge)


def test_a_piece_is_refused_elsewhere_and_at_another_length() -> None:
    data = bytes(4 * MIN_PIECE)
    honest = manifest(data + content(5000))
    piece = data[:MIN_PIECE]
    assert honest.wrong([(0, piece), (1, piece), (2, piece)]) == set()
    assert honest.wrong([(0, piece[1:]), (1, piece + b"x"), (2, b""), (4, piece)]) == {0, 1, 2, 4}
    # All chunks are alike but for their place.
    values = subtrees([(i * MIN_PIECE, piece) for i in range(3)])
    assert len({*values}) == 3
    assert values == [subtree(piece, i * MIN_PIECE) for i in range(3)]


def test_longer_pieces_and_far_offsets() -> None:
    piece = content(16 << 20)
    layout = Layout(MAX_SIZE)
    assert (layout.piece, layout.pieces) == (16 << 20, MAX_PIECES)
    # At the far end of the largest file the numbers of chunks are at their largest.
    for offset in (0, MAX_SIZE - len(piece)):
        halves = [subtree(piece[: 8 << 20], offset), subtree(piece[8 << 20 :], offset + (8 << 20))]
        assert parents(halves) == [subtree(piece, offset)]
    assert fold([subtree(piece[: 8 << 20], 0), subtree(piece[8 << 20 :], 8 << 20)]) == blake3(piece).digest()


def test_pieces_double_when_there_would_be_too_many() -> None:
    sizes = [(1, 256), (MAX_SINGLE, 256), (MAX_SINGLE + 1, 64), (64 << 20, 64), ((64 << 20) + 1, 128)]
    sizes += [(128 << 20, 128), ((128 << 20) + 1, 256)]
    assert [(size, piece_length(size) >> 10) for size, _ in sizes] == sizes
    for doubling in range(7):
        length = COMMON_PIECE << doubling
        assert piece_length(length * MAX_PIECES) == length
        if doubling < 6:
            assert piece_length(length * MAX_PIECES + 1) == 2 * length
    assert Layout(CHUNK).right_edge() == (0, CHUNK)


@pytest.mark.parametrize(
    "name",
    ["", "/a", "a/", "a//b", ".", "..", "a/../b", "./a", "a\\b", "a\0b", "a\nb", "a\x7fb", "a\u202eb", "a\u200bb"]
    + ["x" * 256, "a/" * 600 + "b", "/".join("a" * 33), ".sprat/a", "a.part", "a\ud800"],
)
def test_names_that_do_harm_are_refused(name: str) -> None:
    with pytest.raises(Untrusted):
        safe_name(name)


def test_other_names_are_taken_in_one_form() -> None:
    for name in ("a", "a/b c.txt", "…", "CON", "a:b", "x" * 255, "/".join("a" * 32)):
        assert safe_name(name) == name
    assert safe_name("e\u0301") == "\u00e9"
