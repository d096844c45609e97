"""Joining, listing, watching and sharing against real processes, and what must be refused."""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import sprat
from blake3 import blake3
from conftest import BIG, World
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc import StatusCode
from network import Processes
from sprat import CallError, LinkError, Network, NotWhole, SpratError, Unavailable, Untrusted
from sprat.channel import JOIN_NAME, TRACKER_NAME, open_channel, peer_name
from sprat.identity import PEM, Folder, Identity, Link, base32
from sprat.v1 import chunk_pb2, tracker_pb2
from sprat.v1.tracker_pb2 import HeartbeatRequest, HeartbeatResponse, RegisterBatch, RegisterHeader, RegisterRequest
from sprat.v1.types_pb2 import FileEntry, FileKey

SERVICES = [s for module in (tracker_pb2, chunk_pb2) for s in module.DESCRIPTOR.services_by_name.values()]
METHODS = [f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods] + [
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]


def entry(name: str, data: bytes) -> FileEntry:
    return FileEntry(name=name, size=len(data), content_id=blake3(data).hexdigest())


def written(link: Link) -> str:
    """A link as text, with a check that fits it."""
    body = f"{link.address}/{link.pin}.{link.token_id}.{link.secret}"
    return f"sprat://{body}.{base32(hashlib.sha256(body.encode()).digest())[:6]}"


def self_signed(key: ec.EllipticCurvePrivateKey, *names: str) -> bytes:
    """A certificate that nobody vouches for."""
    now, hour, name = datetime.now(timezone.utc), timedelta(hours=1), x509.Name([])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - hour, now + hour)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def refused(code: StatusCode, call: Callable[..., object], *args: object, **kwargs: object) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(*args, **kwargs)
    assert caught.value.code() == code, caught.value


def refused_everywhere(channel: grpc.Channel, code: StatusCode) -> None:
    with channel:
        for method in METHODS:
            call = channel.stream_stream(method)
            refused(code, lambda call=call: list(call(iter([b""]), timeout=20)))



def denied(call: Callable[[], object]) -> None:
    with pytest.raises(CallError) as caught:
        call()
    assert caught.value.code == StatusCode.PERMISSION_DENIED


class TestNotWhole:
    @staticmethod
    def told(network: Network, *answers: bool) -> None:
        """Lets the tracker say of its next listings that they are, or are not, whole; each has one row."""
        left = iter(answers)

        def list_files(request: tracker_pb2.ListFilesRequest, timeout: float) -> tracker_pb2.ListFilesResponse:
            told = tracker_pb2.Completeness(is_whole=next(left), peers_missing=1, whole_within_ms=9_000)
            return tracker_pb2.ListFilesResponse(files=[tracker_pb2.FileRow(name="a")], completeness=told)

        network.tracker = SimpleNamespace(ListFiles=list_files)  # type: ignore[assignment]

    def test_rows_come_and_then_the_word_that_there_may_be_more(self, world: World) -> None:
        with world.processes.member() as network:
            self.told(network, False)
            files = network.list()
            assert next(files).name == "a"
            with pytest.raises(NotWhole, match="1 peer is not back") as caught:
                next(files)
            assert (caught.value.missing, caught.value.seconds) == (1, 9)

    def test_a_name_is_looked_for_in_a_whole_listing_only(self, world: World) -> None:
        with world.processes.member() as network:
            self.told(network, False, False, True)
            assert network.find("a").name == "a"


class TestJoining:
    def test_a_token_lets_in_one_key_and_no_second(self, world: World, tmp_path: Path) -> None:
        link = world.processes.link(uses=1)
        me = sprat.join(link, tmp_path / "me")
        assert len(me.peer_id) == 52
        denied(lambda: sprat.join(link, tmp_path / "other"))
        with Network.open(tmp_path / "me") as network:
            assert network.peer_id == me.peer_id
            assert list(network.list())
        for file in (tmp_path / "me").iterdir():
            assert file.stat().st_mode & 0o777 == 0o600

    def test_a_member_stays_who_it_is(self, world: World, tmp_path: Path) -> None:
        me = sprat.join(world.processes.link(), tmp_path)
        link = world.processes.link(uses=1)
        assert sprat.join(link, tmp_path) == me
        sprat.join(link, tmp_path / "other")  # so it was not redeemed

    def test_a_lost_answer_is_no_lost_token(self, world: World, tmp_path: Path) -> None:
        link = world.processes.link(uses=1)
        me = sprat.join(link, tmp_path)
        (tmp_path / "peer.crt").unlink()
        assert sprat.join(link, tmp_path).peer_id == me.peer_id

    def test_a_folder_belongs_to_one_network(self, world: World, tmp_path: Path) -> None:
        sprat.join(world.processes.link(), tmp_path)
        link = Link.parse(world.processes.link())
        with pytest.raises(SpratError, match="another network"):
            sprat.join(written(replace(link, pin="a" + base32(bytes(32)))), tmp_path)

    @pytest.mark.parametrize("text", ["", "sprat://", "http://a:1/b", "sprat://a:1/abc.def.ghi.jkl"])
    def test_what_is_no_link_is_refused(self, text: str) -> None:
        with pytest.raises(LinkError):
            Link.parse(text)

    def test_a_typo_is_found_before_anything_is_dialled(self, world: World) -> None:
        link = world.processes.link()
        assert Link.parse(f" {link[:30]}\n{link[30:]} ") == Link.parse(link)
        with pytest.raises(LinkError, match="typo"):
            Link.parse(link[:-10] + ("b" if link[-10] == "a" else "a") + link[-9:])

    def test_a_link_does_not_show_its_secret(self, world: World) -> None:
        link = Link.parse(world.processes.link())
        assert link.secret not in repr(link)

    def test_a_wrong_secret_is_refused(self, world: World, tmp_path: Path) -> None:
        link = replace(Link.parse(world.processes.link()), secret="a" * 26)
        denied(lambda: sprat.join(written(link), tmp_path))

    @pytest.mark.parametrize("kind", ["a", "t"])
    def test_a_wrong_pin_stops_before_the_secret_is_sent(self, world: World, tmp_path: Path, kind: str) -> None:
        link = world.processes.link(uses=1)
        with pytest.raises(Untrusted):
            sprat.join(written(replace(Link.parse(link), pin=kind + base32(bytes(32)))), tmp_path / "wrong")
        sprat.join(link, tmp_path / "right")  # had the secret gone out, the token would be used up

    @pytest.mark.parametrize("kind", ["alone", "with the right authority", "as its own tracker"])
    def test_an_impostor_hears_nothing(self, world: World, network: Network, tmp_path: Path, kind: str) -> None:
        link, key = Link.parse(world.processes.link(uses=1)), ec.generate_private_key(ec.SECP256R1())
        authority = network.identity.authority if kind == "with the right authority" else b""
        with listening(tmp_path, self_signed(key, JOIN_NAME) + authority, key) as (port, heard):
            pin = "t" + base32(bytes(32)) if kind == "as its own tracker" else link.pin
            impostor = replace(link, address=f"127.0.0.1:{port}", pin=pin)
            with pytest.raises((Untrusted, Unavailable)):
                sprat.join(written(impostor), tmp_path / "me")
        assert b"".join(heard) == b""
        sprat.join(written(link), tmp_path / "me")

    def test_nobody_there(self, world: World, tmp_path: Path) -> None:
        link = replace(Link.parse(world.processes.link()), address="127.0.0.1:9")
        with pytest.raises(Unavailable):
            sprat.join(written(link), tmp_path)

    def test_a_certificate_is_renewed_for_the_same_key_and_no_other(self, world: World) -> None:
        folder = world.processes.identity()
        before = Folder(folder).load()
        renewed = sprat.renew(folder)
        assert before and renewed.certificate != before.certificate and renewed.peer_id == before.peer_id
        with Network.open(folder) as network:
            assert list(network.list())
        (folder / "peer.key").write_bytes(key_pem(ec.generate_private_key(ec.SECP256R1())))
        denied(lambda: sprat.renew(folder))

    def test_a_tracker_with_a_certificate_of_its_own(self, tmp_path: Path) -> None:
        names = [str(tmp_path / name) for name in ("key.pem", "cert.pem")]
        words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", names[0], "-out", names[1]]
        subprocess.run([*words, "-subj", "/CN=any", "-days", "2"], check=True, capture_output=True)
        with Processes("--certificate", names[1], "--certificate-key", names[0]) as processes:
            assert Link.parse(processes.link()).pin.startswith("t")
            folder = processes.identity()
            with Network.open(folder) as network:
                assert list(network.list()) == []
            sprat.renew(folder)
            with Network.open(folder) as network:
                assert list(network.list()) == []


@contextmanager
def listening(folder: Path, chain: bytes, key: ec.EllipticCurvePrivateKey) -> Iterator[tuple[int, list[bytes]]]:
    """Somebody who shows `chain` to all who come, and writes down what they say."""
    (folder / "chain").write_bytes(chain)
    (folder / "key").write_bytes(key_pem(key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "chain", folder / "key")
    context.set_alpn_protocols(["h2"])
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen() -> None:
            while True:
                try:
                    stranger, _ = listener.accept()
                except OSError:
                    return
                try:
                    with stranger, context.wrap_socket(stranger, server_side=True) as tls:
                        heard.append(tls.recv(1))
                except OSError:
                    pass  # the client went away during the handshake, as it should

        threading.Thread(target=listen, daemon=True).start()
        yield listener.getsockname()[1], heard


class TestListing:
    def test_pages_of_one_row_hold_every_row_once(self, world: World, network: Network) -> None:
        rows = [row.name for row in network.list("**", peer_id=world.left, page_size=1)]
        assert rows == ["big.bin", "notes/left.txt"]
        everything = [(row.name, row.content_id) for row in network.list(page_size=1)]
        assert everything == sorted(set(everything))

    def test_rows_carry_what_b3sum_prints_and_who_holds_it(self, world: World, network: Network) -> None:
        row = network.find("big.bin")
        assert (row.size, row.content_id) == (len(BIG), blake3(BIG).hexdigest())
        assert {source.peer_id for source in row.sources} == {world.left, world.right}
        assert network.find(row.content_id) == network.find(row.content_id[:8]) == row

    def test_globs_and_text(self, network: Network) -> None:
        assert [row.name for row in network.list("notes/")] == ["notes/left.txt", "notes/right.txt"]
        assert [row.name for row in network.list("notes/l*")] == ["notes/left.txt"]
        assert [row.name for row in network.search("RIGHT")] == ["notes/right.txt"]
        assert [row.name for row in network.list(min_size=1 << 20)] == ["big.bin"]

    def test_what_is_not_there(self, network: Network) -> None:
        for what in ("nothing", "0" * 64, "00000000"):
            with pytest.raises(sprat.NotFound):
                network.find(what)

    def test_a_bad_question_is_refused(self, network: Network) -> None:
        with pytest.raises(CallError) as caught:
            list(network.list("["))
        assert caught.value.code == StatusCode.INVALID_ARGUMENT

    def test_a_state_directory_of_sprat_is_an_identity_too(self, world: World) -> None:
        with Network.open(world.processes.folder / "left") as network:
            assert network.peer_id == world.left
        with pytest.raises(SpratError, match="state directory"):
            sprat.join(world.processes.link(), world.processes.folder / "left")

    def test_what_identity_only_wrote_needs_the_trackers_address(self, world: World, tmp_path: Path) -> None:
        world.processes.sprat("unused", "join", world.processes.link(), "--identity-only", str(tmp_path))
        with pytest.raises(SpratError, match="where the tracker is"):
            Network.open(tmp_path)
        with Network.open(tmp_path, world.processes.tracker) as network:
            assert list(network.list())

    def test_an_old_certificate_is_renewed_when_it_is_opened(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = world.processes.identity()
        before = (folder / "peer.crt").read_bytes()
        Network.open(folder).close()
        assert (folder / "peer.crt").read_bytes() == before
        monkeypatch.setattr(Identity, "life", lambda self: timedelta(days=365))
        Network.open(folder).close()
        assert (folder / "peer.crt").read_bytes() != before


class TestWatching:
    def test_a_new_file_is_seen_and_its_end(self, world: World, network: Network) -> None:
        changes = network.watch()
        seen = set()
        for change in changes:
            if change.kind == "current":
                break
            seen.add(change.name)
        assert {"big.bin", "notes/left.txt", "notes/right.txt", "empty"} <= seen
        path = world.processes.folder / "left.share" / "fresh.txt"
        path.write_bytes(b"fresh\n")
        change = next(change for change in changes if change.name == "fresh.txt")
        assert change.kind == "changed" and change.file
        assert change.content_id == blake3(b"fresh\n").hexdigest()
        assert [source.peer_id for source in change.file.sources] == [world.left]
        path.unlink()
        gone = next(other for other in changes if other.name == "fresh.txt" and other.kind == "removed")
        assert gone.content_id == change.content_id
        changes.close()

    def test_one_content_alone(self, network: Network) -> None:
        wanted = network.find("big.bin")
        changes = network.watch([wanted.content_id])
        assert [next(changes), next(changes)] == [
            sprat.Change("changed", wanted.name, wanted.content_id, wanted),
            sprat.Change("current"),
        ]
        changes.close()


class TestAnnouncing:
    """The tracker's calls as they are, without `share`."""

    def register(
        self, network: Network, added: list[FileEntry], removed: list[FileKey] | None = None, **header: object
    ) -> tracker_pb2.RegisterResponse:
        def messages() -> Iterator[RegisterRequest]:
            yield RegisterRequest(header=RegisterHeader(**header))
            for start in range(0, len(added), 200):
                yield RegisterRequest(batch=RegisterBatch(added=added[start : start + 200]))
            yield RegisterRequest(batch=RegisterBatch(removed=removed or []))

        return network.tracker.Register(messages(), timeout=60)

    def beat(self, network: Network, **fields: object) -> HeartbeatResponse:
        return network.tracker.Heartbeat(HeartbeatRequest(**fields), timeout=10)

    def test_a_library_appears_changes_and_goes(self, world: World, network: Network) -> None:
        files = [entry(f"python/{i:04}.txt", str(i).encode()) for i in range(1000)]
        with world.processes.member() as other:

            def listed() -> list[str]:
                return [row.name for row in other.list(peer_id=network.peer_id)]

            unknown, renewed = HeartbeatResponse.STATE_UNKNOWN, HeartbeatResponse.STATE_RENEWED
            assert self.beat(network, generation=0).state == unknown
            told = self.register(network, files, generation=1)
            assert told.lease_ms > told.heartbeat_interval_ms
            assert listed() == [file.name for file in files]
            assert self.beat(network, generation=1).state == renewed
            gone = [FileKey(name=file.name, content_id=file.content_id) for file in files[1:]]
            self.register(network, [entry("python/new.txt", b"new")], gone, base_generation=1, generation=2)
            assert listed() == ["python/0000.txt", "python/new.txt"]
            assert self.beat(network, generation=1).state == HeartbeatResponse.STATE_STALE
            assert self.beat(network, generation=2).state == renewed
            refused(StatusCode.FAILED_PRECONDITION, self.register, network, [], base_generation=1, generation=3)
            assert self.beat(network, generation=2, leaving=True).state == HeartbeatResponse.STATE_LEFT
            assert listed() == []

    def test_nobody_speaks_for_another(self, world: World, network: Network) -> None:
        denied_code = StatusCode.PERMISSION_DENIED
        refused(denied_code, self.register, network, [], generation=1, peer_id=world.left)
        refused(denied_code, self.beat, network, peer_id=world.left)

    def test_an_operator_looks_and_does_not_touch(self, world: World, tmp_path: Path) -> None:
        world.processes.sprat("tracker", "operator", "cert", "--out", str(tmp_path))
        for name in ("crt", "key"):
            os.rename(tmp_path / f"operator.{name}", tmp_path / f"peer.{name}")
        with Network.open(tmp_path, world.processes.tracker) as operator:
            assert list(operator.list())
            refused(StatusCode.PERMISSION_DENIED, self.register, operator, [], generation=1)
            refused(StatusCode.PERMISSION_DENIED, self.beat, operator)

    def test_names_that_leave_a_folder_are_refused(self, network: Network) -> None:
        for name in ("../up", "/etc/passwd", "a//b", "a/./b", "", "nul\0"):
            refused(StatusCode.INVALID_ARGUMENT, self.register, network, [entry(name, b"x")], generation=1)


class TestRefusing:
    """Who is not a member gets no answer from any call, on the tracker as on a peer."""

    def places(self, world: World, network: Network) -> list[tuple[str, str]]:
        (source,) = (s for s in network.find("big.bin").sources if s.peer_id == world.left)
        return [(world.processes.tracker, TRACKER_NAME), (source.addresses[0], peer_name(world.left))]

    def test_without_a_certificate(self, world: World, network: Network) -> None:
        for address, name in self.places(world, network):
            refused_everywhere(open_channel(address, name, network.identity.authority), StatusCode.UNAVAILABLE)

    def test_with_a_certificate_of_nobody(self, world: World, network: Network) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        foreign = Identity(network.identity.authority, self_signed(key, peer_name(network.peer_id)), key_pem(key))
        for address, name in self.places(world, network):
            channel = open_channel(address, name, network.identity.authority, foreign)
            refused_everywhere(channel, StatusCode.UNAVAILABLE)

    def test_joiners_find_enrollment_alone(self, world: World, network: Network) -> None:
        channel = open_channel(world.processes.tracker, JOIN_NAME, network.identity.authority)
        refused_everywhere(channel, StatusCode.UNIMPLEMENTED)

    def test_members_find_no_enrollment_and_no_administration(self, world: World, network: Network) -> None:
        member = network.identity
        with open_channel(world.processes.tracker, TRACKER_NAME, member.authority, member) as channel:
            for method in ("EnrollmentService/Join", "AdminService/CreateToken", "ControlService/Status"):
                call = channel.unary_unary(f"/sprat.v1.{method}")
                refused(StatusCode.UNIMPLEMENTED, call, b"", timeout=10)

    @pytest.mark.parametrize("address", ["", "nothing", "unix:/tmp/x", "a/b:1", "dns://x/y:1", "127.0.0.1", "a b:1"])
    def test_what_is_no_address_is_not_dialled(self, address: str) -> None:
        with pytest.raises(Unavailable):
            open_channel(address, TRACKER_NAME, b"")
