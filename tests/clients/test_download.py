"""Downloading and sharing against real peers, and against peers in Python that do what none should."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
import sprat
from blake3 import blake3
from conftest import BIG, World
from cryptography.hazmat.primitives.asymmetric import ec
from sprat import CallError, File, Network, Source, SpratError, Unavailable, Untrusted, board, download, share
from sprat.channel import open_channel, peer_name
from sprat.identity import DER, Identity
from sprat.share import ChunkServer
from sprat.v1 import chunk_pb2 as chunk
from sprat.v1 import chunk_pb2_grpc as chunk_rpc
from test_network import key_pem, self_signed

Answers = Iterator[chunk.GetChunksResponse]


class Liar(ChunkServer):
    """Sends other bytes for the last piece asked for."""

    def GetChunks(self, request: chunk.GetChunksRequest, context: grpc.ServicerContext) -> Answers:
        for answer in super().GetChunks(request, context):
            if answer.HasField("chunk") and answer.chunk.range == len(request.ranges) - 1:
                answer.chunk.data = bytes(len(answer.chunk.data))
            yield answer


class LiarAboutTheSize(ChunkServer):
    """States half the size of a file, with the hashes that would fit."""

    def GetManifest(
        self, request: chunk.GetManifestRequest, context: grpc.ServicerContext
    ) -> Iterator[chunk.GetManifestResponse]:
        for answer in super().GetManifest(request, context):
            if answer.HasField("header"):
                answer.header.size //= 2
            elif answer.HasField("piece_hashes"):
                answer.piece_hashes = answer.piece_hashes[: len(answer.piece_hashes) // 2]
            yield answer


class TooMuch(ChunkServer):
    """Does not stop at the end of a piece."""

    def GetChunks(self, request: chunk.GetChunksRequest, context: grpc.ServicerContext) -> Answers:
        for answer in super().GetChunks(request, context):
            yield answer
            answer.chunk.offset += len(answer.chunk.data)
            yield answer


class Quitter(ChunkServer):
    """Ends each call after two messages."""

    def GetChunks(self, request: chunk.GetChunksRequest, context: grpc.ServicerContext) -> Answers:
        answers = super().GetChunks(request, context)
        yield from (next(answers), next(answers))
        context.abort(grpc.StatusCode.INTERNAL, "enough")


class EverySecond(ChunkServer):
    """Has every second piece only."""

    def GetChunks(self, request: chunk.GetChunksRequest, context: grpc.ServicerContext) -> Answers:
        for index, wanted in enumerate(request.ranges):
            if wanted.first_piece % 2:
                error = chunk.ContentError(code=chunk.ContentError.CODE_NOT_FOUND)
                yield chunk.GetChunksResponse(error=chunk.RangeError(range=index, error=error))
                continue
            one = chunk.GetChunksRequest(ranges=[wanted], chunk_length=request.chunk_length)
            for answer in super().GetChunks(one, context):
                answer.chunk.range = index
                yield answer


class Sleeper(ChunkServer):
    """Takes calls and sends nothing until the caller goes away."""

    def GetChunks(self, request: chunk.GetChunksRequest, context: grpc.ServicerContext) -> Answers:
        left = threading.Event()
        context.add_callback(left.set)
        left.wait(60)
        yield from ()


@pytest.fixture
def offered(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., sprat.Share]]:
    """Shares files from Python, by a new member, with a service of one's choice."""
    open_now: list[sprat.Share | Network] = []

    def offer(files: dict[str, bytes], service: type[ChunkServer] = ChunkServer) -> sprat.Share:
        network = world.processes.member()
        open_now.append(network)
        folder = tmp_path / f"offered-{len(open_now)}"
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        with monkeypatch.context() as patched:
            patched.setattr(share, "ChunkServer", service)
            open_now.append(network.share(folder, listen="127.0.0.1:0"))
        return open_now[-1]

    yield offer
    for one in reversed(open_now):
        one.close()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def together(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Lets nobody ask for anything before `count` sources are dialled."""
    barrier, dial = threading.Barrier(count), Network.dial

    def wait(self: Network, *words: object) -> grpc.Channel:
        channel = dial(self, *words)
        barrier.wait(20)
        return channel

    monkeypatch.setattr(Network, "dial", wait)


def only(file: File, *peer_ids: str) -> File:
    return replace(file, sources=tuple(source for source in file.sources if source.peer_id in peer_ids))


class TestDownloading:
    def test_two_peers_give_a_share_each(
        self, world: World, network: Network, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        together(monkeypatch, 2)
        seen: list[sprat.Progress] = []
        done = network.download("big.bin", out, progress=seen.append)
        assert (out / "big.bin").read_bytes() == BIG
        assert done.path == out / "big.bin" and done.size == len(BIG)
        assert done.content_id == blake3(BIG).hexdigest()
        assert set(done.bytes_from) == {world.left, world.right}
        assert sum(done.bytes_from.values()) == len(BIG) and min(done.bytes_from.values()) > 0
        assert (done.bytes_wasted, done.banned) == (0, {})
        assert seen[-1].bytes_done == seen[-1].bytes_total == len(BIG)
        assert list(out.iterdir()) == [out / "big.bin"]

    def test_by_content_id_to_a_name_of_ones_own(self, network: Network, out: Path) -> None:
        network.download(blake3(BIG).hexdigest(), out / "mine")
        assert (out / "mine").read_bytes() == BIG

    def test_small_files_and_none(self, network: Network, out: Path) -> None:
        network.download("notes/left.txt", out)
        assert (out / "left.txt").read_bytes() == b"left\n"
        network.download("empty", out)
        assert (out / "empty").read_bytes() == b""

    @pytest.mark.parametrize("kind", ["file", "link"])
    def test_what_exists_is_left_alone(self, network: Network, out: Path, kind: str) -> None:
        target = out / "left.txt"
        if kind == "file":
            target.write_bytes(b"mine")
        else:
            target.symlink_to("nowhere")
        with pytest.raises(FileExistsError):
            network.download("notes/left.txt", out)
        assert list(out.iterdir()) == [target]
        assert target.is_symlink() or target.read_bytes() == b"mine"

    def test_a_name_that_is_taken_meanwhile_is_left_alone(
        self, network: Network, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = download._Swarm.run

        def slow(self: download._Swarm) -> None:
            run(self)
            (out / "left.txt").write_bytes(b"mine")

        monkeypatch.setattr(download._Swarm, "run", slow)
        with pytest.raises(FileExistsError):
            network.download("notes/left.txt", out)
        assert [path.read_bytes() for path in out.iterdir()] == [b"mine"]

    def test_two_contents_of_one_name(self, network: Network, offered: Callable[..., sprat.Share], out: Path) -> None:
        ids = sorted(offered({"twice": data}).files[0].content_id for data in (b"one", b"two"))
        with pytest.raises(sprat.Ambiguous) as caught:
            network.download("twice", out)
        assert caught.value.content_ids == ids
        network.download(blake3(b"two").hexdigest(), out)
        assert (out / "twice").read_bytes() == b"two"

    def test_a_name_is_never_taken_for_a_content(
        self, network: Network, offered: Callable[..., sprat.Share], out: Path
    ) -> None:
        wanted = blake3(b"left\n").hexdigest()
        offered({wanted: b"not what the id says"})
        network.download(wanted, out)
        assert (out / "left.txt").read_bytes() == b"left\n"

    def test_a_name_that_leaves_the_folder_is_refused(self, network: Network, out: Path) -> None:
        for name in ("..", "a/..", "a\\b", "../up"):
            with pytest.raises(Untrusted):
                network.download(replace(network.find("empty"), name=name), out)
        assert list(out.iterdir()) == []

    def test_a_dead_source_is_made_up_for(self, network: Network, out: Path) -> None:
        file = network.find("big.bin")
        nobody = Source(network.peer_id, ("127.0.0.1:9", "unix:/nowhere"))
        network.download(replace(file, sources=(*file.sources, nobody)), out)
        assert (out / "big.bin").read_bytes() == BIG

    def test_no_source_that_answers(self, network: Network, out: Path) -> None:
        file = File("gone", 4, blake3(b"gone").hexdigest(), (Source(network.peer_id, ("127.0.0.1:9",)),))
        with pytest.raises(Unavailable):
            network.download(file, out)
        assert list(out.iterdir()) == []

    def test_a_peer_is_only_itself(self, world: World, network: Network) -> None:
        addresses = next(s.addresses for s in network.find("big.bin").sources if s.peer_id == world.left)
        with pytest.raises(Unavailable):
            network.dial(Source(world.right, addresses))

    def test_an_interrupt_leaves_nothing(
        self, network: Network, offered: Callable[..., sprat.Share], out: Path
    ) -> None:
        offered({"stuck": BIG[: 1 << 20]}, Sleeper)

        def interrupt(progress: sprat.Progress) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            network.download("stuck", out, progress=interrupt)
        assert list(out.iterdir()) == []


class TestBadSources:
    """Each shares big.bin too and is asked first, alone; the real peers make up for it."""

    @pytest.mark.parametrize("service", [Liar, LiarAboutTheSize, TooMuch])
    def test_a_liar_is_found_out_and_asked_no_more(
        self,
        world: World,
        network: Network,
        offered: Callable[..., sprat.Share],
        out: Path,
        service: type[ChunkServer],
    ) -> None:
        liar = offered({"big.bin": BIG}, service).network.peer_id
        file = network.find("big.bin")
        assert {source.peer_id for source in file.sources} == {world.left, world.right, liar}
        done = network.download(only(file, liar), out)
        assert (out / "big.bin").read_bytes() == BIG
        assert set(done.banned) == {liar}
        assert sum(done.bytes_from.values()) == len(BIG)
        assert done.bytes_from.get(liar, 0) < len(BIG) // 2

    def test_lies_alone_get_no_name(self, network: Network, offered: Callable[..., sprat.Share], out: Path) -> None:
        for data in (b"small", BIG[: 3 << 20]):
            offered({"lie": data}, Liar)
            with pytest.raises(Untrusted, match="wrong bytes"):
                network.download(blake3(data).hexdigest(), out)
            assert list(out.iterdir()) == []

    def test_a_size_that_the_tracker_was_told_wrongly_does_not_matter(self, network: Network, out: Path) -> None:
        done = network.download(replace(network.find("big.bin"), size=7), out)
        assert done.size == len(BIG)

    def test_what_a_quitter_held_goes_to_others(
        self, world: World, network: Network, offered: Callable[..., sprat.Share], out: Path
    ) -> None:
        quitter = offered({"big.bin": BIG}, Quitter).network.peer_id
        done = network.download(only(network.find("big.bin"), quitter), out)
        assert (out / "big.bin").read_bytes() == BIG
        assert done.banned == {}
        assert 0 < done.bytes_from[quitter] < len(BIG)
        assert set(done.bytes_from) > {quitter}

    def test_what_one_lacks_another_gives(
        self, world: World, network: Network, offered: Callable[..., sprat.Share], out: Path
    ) -> None:
        half = offered({"big.bin": BIG}, EverySecond).network.peer_id
        done = network.download(only(network.find("big.bin"), half), out)
        assert (out / "big.bin").read_bytes() == BIG
        assert done.bytes_from[half] == len(BIG) // 2
        assert (done.banned, done.bytes_wasted) == ({}, 0)

    def test_a_sleeper_is_overtaken(
        self,
        world: World,
        network: Network,
        offered: Callable[..., sprat.Share],
        out: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        sleeper = offered({"big.bin": BIG}, Sleeper).network.peer_id
        monkeypatch.setattr(board, "HEDGE_SECONDS", 0.1)
        together(monkeypatch, 2)
        done = network.download(only(network.find("big.bin"), sleeper, world.left), out)
        assert (out / "big.bin").read_bytes() == BIG
        assert done.bytes_from == {world.left: len(BIG)}


class TestSharing:
    def test_sprat_fetches_what_python_offers(self, world: World, offered: Callable[..., sprat.Share], out: Path) -> None:
        files = {"py/large.bin": BIG[:3_000_001], "py/small.txt": b"from Python\n", "py/piece": BIG[: 1 << 18]}
        offering = offered(files)
        assert [file.name for file in offering.files] == sorted(files)
        assert {file.content_id for file in offering.files} == {blake3(data).hexdigest() for data in files.values()}
        if not (world.processes.folder / "visitor").exists():
            world.processes.sprat("visitor", "join", world.processes.link())
        world.processes.sprat("visitor", "get", "py/", "-o", f"{out}/")
        assert {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()} == files

    def test_python_fetches_what_python_offers(
        self, network: Network, offered: Callable[..., sprat.Share], out: Path
    ) -> None:
        offered({"again.bin": BIG[: (1 << 20) + 1]})
        network.download("again.bin", out)
        assert (out / "again.bin").read_bytes() == BIG[: (1 << 20) + 1]

    def test_what_is_closed_is_gone(self, network: Network, offered: Callable[..., sprat.Share]) -> None:
        offering = offered({"brief": b"brief"})
        assert network.find("brief")
        offering.close()
        with pytest.raises(sprat.NotFound):
            network.find("brief")

    def test_a_changed_file_is_not_served(
        self, network: Network, offered: Callable[..., sprat.Share], out: Path, tmp_path: Path
    ) -> None:
        offered({"restless": b"one way"})
        (tmp_path / "offered-1" / "restless").write_bytes(b"or other")
        with pytest.raises(Unavailable, match="CODE_CHANGED"):
            network.download("restless", out)

    def test_links_pipes_and_odd_names_are_left_out(self, network: Network, tmp_path: Path) -> None:
        folder = tmp_path / "odd"
        folder.mkdir()
        (folder / "plain").write_bytes(b"plain")
        (folder / "link").symlink_to("plain")
        (folder / "loop").symlink_to(".")
        (folder / "half.part").write_bytes(b"")
        (folder / "back\\slash").write_bytes(b"")
        with network.share(folder, listen="127.0.0.1:0") as offering:
            assert [file.name for file in offering.files] == ["plain"]
            assert len(offering.skipped) == 3

    def test_the_tracker_that_forgot_is_told_again(self, network: Network, offered: Callable[..., sprat.Share]) -> None:
        offering = offered({"remembered": b"remembered"})
        with Network.open(offering.network._folder.path) as same:
            from sprat.v1.tracker_pb2 import HeartbeatRequest

            same.tracker.Heartbeat(HeartbeatRequest(generation=1, leaving=True))
        with pytest.raises(sprat.NotFound):
            network.find("remembered")
        offering._beat()
        assert network.find("remembered")

    def test_who_was_thrown_out_gets_nothing_and_gives_nothing(
        self, world: World, network: Network, offered: Callable[..., sprat.Share], out: Path
    ) -> None:
        offering = offered({"members only": b"members only"})
        wanted = network.find("members only")
        with network.dial(wanted.sources[0]) as channel:
            peer = chunk_rpc.ChunkServiceStub(channel)
            request = chunk.GetManifestRequest(content_ids=[bytes.fromhex(wanted.content_id)])
            assert [answer.header.size for answer in peer.GetManifest(request)] == [len(b"members only")]
            world.processes.sprat("tracker", "tracker", "revoke", network.peer_id)
            offering._beat()
            with pytest.raises(grpc.RpcError) as caught:
                list(peer.GetManifest(request))
            assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(Untrusted):
            offering.network.dial(Source(network.peer_id, ("127.0.0.1:9",)))
        with pytest.raises(SpratError):
            list(network.list())

    def test_strangers_get_no_answer(self, network: Network, offered: Callable[..., sprat.Share]) -> None:
        offering = offered({"closed": b"closed"})
        address, name = f"127.0.0.1:{offering.port}", peer_name(offering.network.peer_id)
        key = ec.generate_private_key(ec.SECP256R1())
        own = self_signed(key, peer_name(network.peer_id))
        foreign = Identity(network.identity.authority, own, key_pem(key))
        for stranger in (None, foreign):
            with open_channel(address, name, network.identity.authority, stranger) as channel:
                with pytest.raises(grpc.RpcError) as caught:
                    list(chunk_rpc.ChunkServiceStub(channel).GetManifest(chunk.GetManifestRequest(), timeout=20))
                assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        with open_channel(address, name, network.identity.authority, network.identity) as channel:
            assert list(chunk_rpc.ChunkServiceStub(channel).GetManifest(chunk.GetManifestRequest(), timeout=20)) == []

    def test_a_share_renews_its_certificate(
        self, network: Network, offered: Callable[..., sprat.Share], out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        offering = offered({"lasting": b"lasting"})

        def shown() -> bytes | None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.load_cert_chain(network._folder.path / "peer.crt", network._folder.path / "peer.key")
            with socket.create_connection(("127.0.0.1", offering.port)) as plain, context.wrap_socket(plain) as tls:
                return tls.getpeercert(binary_form=True)

        def leaf() -> bytes:
            return offering.network.identity.leaf.public_bytes(DER)

        before = leaf()
        assert shown() == before
        monkeypatch.setattr(Identity, "life", lambda self: timedelta(days=365))
        offering._beat()
        assert shown() == leaf() != before
        network.download("lasting", out)

    def test_malformed_requests_are_refused(self, network: Network, offered: Callable[..., sprat.Share]) -> None:
        offered({"asked": b"asked"})
        wanted = network.find("asked")
        content = bytes.fromhex(wanted.content_id)
        with network.dial(wanted.sources[0]) as channel:
            peer = chunk_rpc.ChunkServiceStub(channel)

            def answered(content_id: bytes, size: int, first: int, count: int) -> int:
                one = chunk.PieceRange(content_id=content_id, size=size, first_piece=first, piece_count=count)
                (answer,) = peer.GetChunks(chunk.GetChunksRequest(ranges=[one]))
                return answer.error.error.code

            codes = chunk.ContentError
            assert answered(content, 5, 0, 1) == codes.CODE_UNSPECIFIED
            assert answered(b"nothing", 5, 0, 1) == codes.CODE_NOT_FOUND
            for size, first, count in ((6, 0, 1), (5, 1, 1), (5, 0, 2), (5, 0, 0), (5, 2**32 - 1, 2**32 - 1)):
                assert answered(content, size, first, count) == codes.CODE_OUT_OF_RANGE
            for request in (chunk.GetChunksRequest(), chunk.GetChunksRequest(ranges=[chunk.PieceRange()] * 1025)):
                with pytest.raises(grpc.RpcError) as caught:
                    list(peer.GetChunks(request))
                assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT

    def test_an_operator_may_not_share(self, world: World, tmp_path: Path) -> None:
        world.processes.sprat("tracker", "operator", "cert", "--out", str(tmp_path / "me"))
        for name in ("crt", "key"):
            (tmp_path / f"me/operator.{name}").rename(tmp_path / f"me/peer.{name}")
        (tmp_path / "files").mkdir()
        with Network.open(tmp_path / "me", world.processes.tracker) as operator:
            with pytest.raises(CallError) as caught:
                operator.share(tmp_path / "files", listen="127.0.0.1:0")
            assert caught.value.code == grpc.StatusCode.PERMISSION_DENIED
