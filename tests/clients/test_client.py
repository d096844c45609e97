"""The Python client against real processes: join, list, announce, download, and what must be refused."""

from __future__ import annotations

import hashlib
import random
import socket
import ssl
import tempfile
import threading
import unittest
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import grpc
from blake3 import blake3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc import StatusCode
from network import Network
from sprat.v1 import chunk_pb2, tracker_pb2
from sprat.v1.tracker_pb2 import FileRow, HeartbeatResponse
from sprat.v1.types_pb2 import FileEntry, FileKey, Source
from sprat_client import (
    JOIN_NAME,
    PEM,
    TRACKER_NAME,
    Client,
    Link,
    Member,
    Untrusted,
    base32,
    join,
    open_channel,
    renew,
)
from sprat_share import SmallFiles

BIG = random.Random(7).randbytes(5 << 20)
SERVICES = [s for module in (tracker_pb2, chunk_pb2) for s in module.DESCRIPTOR.services_by_name.values()]
METHODS = [f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods] + [
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]
network: Network
left: str
right: str


def setUpModule() -> None:
    global network, left, right
    network = Network()
    unittest.addModuleCleanup(network.stop)
    left = network.peer("left", {"big.bin": BIG, "notes/left.txt": b"left\n"})
    right = network.peer("right", {"big.bin": BIG, "notes/right.txt": b"right\n", "empty": b""})


def entry(name: str, data: bytes) -> FileEntry:
    return FileEntry(name=name, size=len(data), content_id=blake3(data).hexdigest())


def with_pin(link: Link, pin: str) -> str:
    """The link with another pin and a check that fits it."""
    body = f"{link.address}/{pin}.{link.token_id}.{link.secret}"
    return f"sprat://{body}.{base32(hashlib.sha256(body.encode()).digest())[:6]}"


def self_signed(key: ec.EllipticCurvePrivateKey, *names: str) -> bytes:
    """A certificate that nobody vouches for."""
    now, hour, name = datetime.now(timezone.utc), timedelta(hours=1), x509.Name([])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - hour, now + hour)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


class ClientTest(unittest.TestCase):
    def setUp(self) -> None:
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def client(self) -> Client:
        return self.enterContext(Client(network.member()))

    def row(self, client: Client, name: str) -> FileRow:
        (row,) = client.list_files(name=name)
        return row

    def refused(self, code: StatusCode, call: Callable[..., object], *args: object, **kwargs: object) -> None:
        with self.assertRaises(grpc.RpcError) as caught:
            call(*args, **kwargs)
        self.assertEqual(caught.exception.code(), code, caught.exception)

    def refused_everywhere(self, channel: grpc.Channel, code: StatusCode) -> None:
        with channel:
            for method in METHODS:
                with self.subTest(method):
                    call = channel.stream_stream(method)
                    self.refused(code, lambda call=call: list(call(iter([b""]), timeout=20)))


class Joining(ClientTest):
    def test_a_token_lets_in_one_key_and_no_second(self) -> None:
        link = Link.parse(network.link(uses=1))
        member = join(link)
        self.assertEqual(len(member.peer_id), 52)
        self.refused(StatusCode.PERMISSION_DENIED, join, link)
        self.assertTrue(list(self.enterContext(Client(member)).list_files()))

    def test_a_typo_is_found_before_anything_is_dialled(self) -> None:
        link = network.link()
        with self.assertRaises(ValueError):
            Link.parse(link[:-10] + ("b" if link[-10] == "a" else "a") + link[-9:])

    def test_a_wrong_secret_is_refused(self) -> None:
        self.refused(StatusCode.PERMISSION_DENIED, join, replace(Link.parse(network.link()), secret="a" * 26))

    def test_a_wrong_pin_stops_before_the_secret_is_sent(self) -> None:
        link = Link.parse(network.link(uses=1))
        with self.assertRaises(Untrusted):
            join(Link.parse(with_pin(link, "a" + base32(bytes(32)))))
        join(link)  # had the secret gone out, the token would be used up

    def test_an_impostor_who_shows_the_right_authority_gets_no_secret(self) -> None:
        link, key = Link.parse(network.link(uses=1)), ec.generate_private_key(ec.SECP256R1())
        authority = network.member().authority
        (self.folder / "chain").write_bytes(self_signed(key, JOIN_NAME) + authority)
        (self.folder / "key").write_bytes(key_pem(key))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "chain", self.folder / "key")
        context.set_alpn_protocols(["h2"])
        listener = self.enterContext(socket.create_server(("127.0.0.1", 0)))
        heard: list[bytes] = []

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
        self.refused(StatusCode.UNAVAILABLE, join, replace(link, address=f"127.0.0.1:{listener.getsockname()[1]}"))
        self.assertEqual(b"".join(heard), b"")
        join(link)

    def test_a_certificate_is_renewed_for_the_same_key_and_no_other(self) -> None:
        member = network.member()
        renewed = renew(member)
        self.assertNotEqual(renewed.certificate, member.certificate)
        self.assertTrue(list(self.enterContext(Client(renewed)).list_files()))
        stranger = replace(member, key=key_pem(ec.generate_private_key(ec.SECP256R1())))
        self.refused(StatusCode.PERMISSION_DENIED, renew, stranger)


class Listing(ClientTest):
    def test_pages_of_one_row_hold_every_row_once(self) -> None:
        client = self.client()
        query = {"glob": "**", "peer_id": left}
        self.assertEqual([row.name for row in client.list_files(page_size=1, **query)], ["big.bin", "notes/left.txt"])
        everything = [(row.name, row.content_id) for row in client.list_files(page_size=1)]
        self.assertEqual(everything, sorted(set(everything)))

    def test_rows_carry_what_b3sum_prints_and_who_holds_it(self) -> None:
        row = self.row(self.client(), "big.bin")
        self.assertEqual((row.size, row.content_id), (len(BIG), blake3(BIG).hexdigest()))
        self.assertEqual({source.peer_id for source in row.sources}, {left, right})

    def test_a_bad_page_token_is_refused(self) -> None:
        self.refused(StatusCode.INVALID_ARGUMENT, lambda: list(self.client().list_files(page_token="nonsense")))


class Announcing(ClientTest):
    def test_a_library_appears_changes_and_goes(self) -> None:
        client, other = self.client(), self.client()
        own = client.member.peer_id
        files = [entry(f"python/{i:04}.txt", str(i).encode()) for i in range(1000)]

        def listed() -> list[str]:
            return [row.name for row in other.list_files(peer_id=own)]

        unknown, renewed = HeartbeatResponse.STATE_UNKNOWN, HeartbeatResponse.STATE_RENEWED
        self.assertEqual(client.heartbeat(generation=0).state, unknown)
        told = client.register(files, generation=1)
        self.assertGreater(told.lease_ms, told.heartbeat_interval_ms)
        self.assertEqual(listed(), [file.name for file in files])
        self.assertEqual(client.heartbeat(generation=1).state, renewed)
        gone = [FileKey(name=file.name, content_id=file.content_id) for file in files[1:]]
        client.register([entry("python/new.txt", b"new")], gone, base_generation=1, generation=2)
        self.assertEqual(listed(), ["python/0000.txt", "python/new.txt"])
        self.assertEqual(client.heartbeat(generation=1).state, HeartbeatResponse.STATE_STALE)
        self.assertEqual(client.heartbeat(generation=2).state, renewed)
        self.refused(StatusCode.FAILED_PRECONDITION, client.register, [], base_generation=1, generation=3)
        self.assertEqual(client.heartbeat(generation=2, leaving=True).state, HeartbeatResponse.STATE_LEFT)
        self.assertEqual(listed(), [])

    def test_nobody_speaks_for_another(self) -> None:
        client = self.client()
        for call in (lambda: client.register([], generation=1, peer_id=left), lambda: client.heartbeat(peer_id=left)):
            self.refused(StatusCode.PERMISSION_DENIED, call)

    def test_an_operator_looks_and_does_not_touch(self) -> None:
        folder = self.folder / "operator"
        network.sprat("tracker", "operator", "cert", "--out", str(folder))
        files = [(folder / name).read_bytes() for name in ("ca.crt", "operator.crt", "operator.key")]
        client = self.enterContext(Client(Member("", network.tracker, *files)))
        self.assertTrue(list(client.list_files()))
        for call in (lambda: client.register([], generation=1), client.heartbeat):
            self.refused(StatusCode.PERMISSION_DENIED, call)

    def test_names_that_leave_a_folder_are_refused(self) -> None:
        client = self.client()
        for name in ("../up", "/etc/passwd", "a//b", "a/./b", "", "nul\0"):
            self.refused(StatusCode.INVALID_ARGUMENT, client.register, [entry(name, b"x")], generation=1)

    def test_sprat_fetches_what_this_client_offers(self) -> None:
        client, data = self.client(), b"from Python\n" * 9
        with SmallFiles(client.member, [data]) as share:
            client.register([entry("from-python.txt", data)], generation=1, addresses=[f"127.0.0.1:{share.port}"])
            out = self.folder / "fetched"
            network.sprat("visitor", "join", network.link())
            network.sprat("visitor", "get", "from-python.txt", "-o", str(out))
            self.assertEqual(out.read_bytes(), data)


class Downloading(ClientTest):
    def test_two_peers_give_a_share_each(self) -> None:
        client, target = self.client(), self.folder / "big.bin"
        given = client.download(self.row(client, "big.bin"), target)
        self.assertEqual(target.read_bytes(), BIG)
        self.assertEqual(given, {left: len(BIG) // 2, right: len(BIG) // 2})
        self.assertEqual(list(self.folder.iterdir()), [target])

    def test_a_file_without_bytes(self) -> None:
        client = self.client()
        client.download(self.row(client, "empty"), self.folder / "empty")
        self.assertEqual((self.folder / "empty").read_bytes(), b"")

    def test_a_dead_source_is_made_up_for(self) -> None:
        client, row = self.client(), self.row(self.client(), "big.bin")
        row.sources.append(Source(peer_id=client.member.peer_id, addresses=["127.0.0.1:9"]))
        client.download(row, self.folder / "big.bin")
        self.assertEqual((self.folder / "big.bin").read_bytes(), BIG)

    def test_bytes_that_are_not_what_was_asked_for_get_no_name(self) -> None:
        client = self.client()
        liar = self.enterContext(SmallFiles(client.member, [b"good"], answer=b"evil"))
        row = FileRow(name="good", size=4, content_id=blake3(b"good").hexdigest())
        row.sources.append(Source(peer_id=client.member.peer_id, addresses=[f"127.0.0.1:{liar.port}"]))
        with self.assertRaises(Untrusted):
            client.download(row, self.folder / "good")
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_a_file_that_exists_is_left_alone(self) -> None:
        client, target = self.client(), self.folder / "left.txt"
        target.write_bytes(b"mine")
        with self.assertRaises(FileExistsError):
            client.download(self.row(client, "notes/left.txt"), target)
        self.assertEqual((target.read_bytes(), list(self.folder.iterdir())), (b"mine", [target]))

    def test_a_peer_is_only_itself(self) -> None:
        client = self.client()
        addresses = next(s.addresses for s in self.row(client, "big.bin").sources if s.peer_id == left)
        with self.assertRaises(Untrusted):
            client.dial(Source(peer_id=right, addresses=addresses))


class Refusing(ClientTest):
    """Who is not a member gets no answer from any call, on the tracker as on a peer."""

    def places(self) -> dict[str, tuple[str, str]]:
        (source,) = (s for s in self.row(self.client(), "big.bin").sources if s.peer_id == left)
        peer = (source.addresses[0], f"{left}.peer.sprat.internal")
        return {"tracker": (network.tracker, TRACKER_NAME), "peer": peer}

    def test_without_a_certificate(self) -> None:
        for place, (address, name) in self.places().items():
            with self.subTest(place):
                self.refused_everywhere(open_channel(address, name, network.member().authority), StatusCode.UNAVAILABLE)

    def test_with_a_certificate_of_nobody(self) -> None:
        member, key = network.member(), ec.generate_private_key(ec.SECP256R1())
        name = f"{member.peer_id}.peer.sprat.internal"
        foreign = replace(member, key=key_pem(key), certificate=self_signed(key, name))
        for place, (address, name) in self.places().items():
            with self.subTest(place):
                self.refused_everywhere(open_channel(address, name, member.authority, foreign), StatusCode.UNAVAILABLE)

    def test_joiners_find_enrollment_alone(self) -> None:
        channel = open_channel(network.tracker, JOIN_NAME, network.member().authority)
        self.refused_everywhere(channel, StatusCode.UNIMPLEMENTED)

    def test_members_find_no_enrollment_and_no_administration(self) -> None:
        with open_channel(network.tracker, TRACKER_NAME, network.member().authority, network.member()) as channel:
            for method in ("EnrollmentService/Join", "AdminService/CreateToken", "ControlService/Status"):
                call = channel.unary_unary(f"/sprat.v1.{method}")
                self.refused(StatusCode.UNIMPLEMENTED, call, b"", timeout=10)
