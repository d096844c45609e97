"""A small sprat peer in Python: joins with a link, lists, announces, downloads.

It is an example as much as a test: everything a program in another language needs to call sprat, and nothing of
sprat's own code. The calls are described in proto/sprat/v1/*.proto; make the stubs that this file imports with

    python3 -m grpc_tools.protoc -I proto --python_out=OUT --grpc_python_out=OUT proto/sprat/v1/*.proto

Packages: grpcio, grpcio-tools, blake3, cryptography. Python 3.10 or later.
"""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import ssl
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
from blake3 import blake3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sprat.v1 import chunk_pb2 as chunk
from sprat.v1 import chunk_pb2_grpc as chunk_rpc
from sprat.v1 import enrollment_pb2 as enrollment
from sprat.v1 import enrollment_pb2_grpc as enrollment_rpc
from sprat.v1 import tracker_pb2 as tracker
from sprat.v1 import tracker_pb2_grpc as tracker_rpc
from sprat.v1 import types_pb2 as types

JOIN_NAME = "join.sprat.internal"
TRACKER_NAME = "tracker.sprat.internal"
PEM = serialization.Encoding.PEM
DER = serialization.Encoding.DER


class Untrusted(Exception):
    """Somebody is not who they should be, or did not give what was asked for."""


def base32(data: bytes) -> str:
    """Lower-case RFC 4648 base32 without padding, as all ids and link parts are written."""
    return base64.b32encode(data).decode().lower().rstrip("=")


def key_hash(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the public key: what a pin and a peer id are made of."""
    spki = certificate.public_key().public_bytes(DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()


@dataclass(frozen=True)
class Link:
    """A join link: sprat://HOST:PORT/PIN.ID.SECRET.CHECK"""

    address: str
    pin: str
    token_id: str
    secret: str

    @classmethod
    def parse(cls, text: str) -> Link:
        body, _, check = "".join(text.split()).removeprefix("sprat://").rpartition(".")
        if base32(hashlib.sha256(body.encode()).digest())[:6] != check:
            raise ValueError("the join link has a typo")
        address, _, parts = body.partition("/")
        return cls(address, *parts.split("."))


@dataclass(frozen=True)
class Member:
    """An identity in one network, all PEM; the same three files that sprat keeps in identity/."""

    peer_id: str
    tracker: str
    authority: bytes
    certificate: bytes
    key: bytes


def join(link: Link) -> Member:
    """Redeems a link for a new key. The secret goes out only to a tracker whose authority is the pinned one."""
    if not link.pin.startswith("a"):
        raise ValueError("the tracker has a certificate from elsewhere; use `sprat join LINK --identity-only DIR`")
    authority = shown_authority(link.address)
    if "a" + base32(key_hash(authority)) != link.pin:
        raise Untrusted(f"{link.address} is not the tracker that the link was made for")
    key = ec.generate_private_key(ec.SECP256R1())
    # This connection is verified: the tracker must hold a certificate for JOIN_NAME from that very authority.
    with open_channel(link.address, JOIN_NAME, authority.public_bytes(PEM)) as channel:
        request = enrollment.JoinRequest(token_id=link.token_id, secret=link.secret, csr=signing_request(key))
        answer = enrollment_rpc.EnrollmentServiceStub(channel).Join(request, timeout=10)
    if answer.authority != authority.public_bytes(DER):
        raise Untrusted("the tracker answered with another authority")
    secret = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    certificate = x509.load_der_x509_certificate(answer.certificate)
    peer_id = base32(key_hash(certificate))
    return Member(peer_id, link.address, authority.public_bytes(PEM), certificate.public_bytes(PEM), secret)


def renew(member: Member) -> Member:
    """A new certificate for the same key; certificates live for seven days."""
    key = serialization.load_pem_private_key(member.key, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    csr, now = signing_request(key), int(time.time())
    signature = key.sign(b"sprat renew v1" + struct.pack(">Q", now) + csr, ec.ECDSA(hashes.SHA256()))
    with open_channel(member.tracker, JOIN_NAME, member.authority) as channel:
        request = enrollment.RenewRequest(csr=csr, signed_at=now, signature=signature)
        answer = enrollment_rpc.EnrollmentServiceStub(channel).Renew(request, timeout=10)
    return replace(member, certificate=x509.load_der_x509_certificate(answer.certificate).public_bytes(PEM))


def signing_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A PKCS #10 request that names nobody; the tracker decides the name."""
    return x509.CertificateSigningRequestBuilder(x509.Name([])).sign(key, hashes.SHA256()).public_bytes(DER)


def shown_authority(address: str) -> x509.Certificate:
    """The last certificate of the chain that a tracker shows to joiners. Nothing is believed or sent here."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    plain = socket.create_connection((host.strip("[]"), int(port)), timeout=10)
    with context.wrap_socket(plain, server_hostname=JOIN_NAME) as tls:
        # Public since Python 3.13; before, the same method of the object underneath.
        shown: Any = tls
        last = (shown if hasattr(shown, "get_unverified_chain") else shown._sslobj).get_unverified_chain()[-1]
    pem: str = ssl.DER_cert_to_PEM_cert(last) if isinstance(last, bytes) else last.public_bytes()
    return x509.load_pem_x509_certificate(pem.encode())


def open_channel(address: str, name: str, authority: bytes, member: Member | None = None) -> grpc.Channel:
    """TLS to whoever holds the certificate `name` from `authority`, wherever it is; mutual if `member` is given."""
    own = (member.key, member.certificate) if member else (None, None)
    options = [("grpc.ssl_target_name_override", name), ("grpc.enable_http_proxy", 0)]
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, *own), options)


class Client:
    """What a member does. Use it as a context manager, or close it."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.channel = open_channel(member.tracker, TRACKER_NAME, member.authority, member)
        self.tracker = tracker_rpc.TrackerServiceStub(self.channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def list_files(self, **query: Any) -> Iterator[tracker.FileRow]:
        """All rows that match, over as many pages as there are; `query` holds fields of ListFilesRequest."""
        request = tracker.ListFilesRequest(**query)
        while True:
            page = self.tracker.ListFiles(request, timeout=10)
            yield from page.files
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def register(
        self, added: Sequence[types.FileEntry], removed: Sequence[types.FileKey] = (), batch: int = 200, **header: Any
    ) -> tracker.RegisterResponse:
        """Announces a library, or a change to it; `header` holds fields of RegisterHeader."""

        def messages() -> Iterator[tracker.RegisterRequest]:
            yield tracker.RegisterRequest(header=tracker.RegisterHeader(**header))
            for start in range(0, max(len(added), len(removed)), batch):
                part = slice(start, start + batch)
                yield tracker.RegisterRequest(batch=tracker.RegisterBatch(added=added[part], removed=removed[part]))

        return self.tracker.Register(messages(), timeout=60)

    def heartbeat(self, **fields: Any) -> tracker.HeartbeatResponse:
        """To be called every `heartbeat_interval_ms`; `leaving=True` says goodbye."""
        return self.tracker.Heartbeat(tracker.HeartbeatRequest(**fields), timeout=10)

    def dial(self, source: types.Source) -> grpc.Channel:
        """A connection to a peer, at the first of its addresses where its certificate is found."""
        for address in source.addresses:
            channel = open_channel(address, f"{source.peer_id}.peer.sprat.internal", self.member.authority, self.member)
            try:
                grpc.channel_ready_future(channel).result(timeout=5)
                return channel
            except grpc.FutureTimeoutError:
                channel.close()
        raise Untrusted(f"{source.peer_id[:8]} is at none of its addresses")

    def download(self, row: tracker.FileRow, target: Path) -> dict[str, int]:
        """Fetches a file from all its sources at once, each giving every n-th piece; returns the bytes each gave.

        The bytes get the name `target` only if the whole is what was asked for, and never replace a file. (A client
        that wants to know which source lied checks each piece against the manifest, as src/content.rs does.)
        """
        if not row.sources:
            raise Untrusted(f"nobody offers {row.name!r}")
        part = target.with_name(target.name + ".part")
        pieces = range(-(-row.size // piece_length(row.size)))
        given = dict.fromkeys((source.peer_id for source in row.sources), 0)
        with part.open("x+b") as file, ThreadPoolExecutor(len(row.sources)) as pool:
            try:
                shares = [pieces[i :: len(row.sources)] for i in range(len(row.sources))]
                jobs = [pool.submit(self.fetch, row, *job, file.fileno(), given) for job in zip(row.sources, shares)]
                missing = [piece for job in jobs for piece in job.result()]
                for source in row.sources:  # what one did not give, another may
                    missing = self.fetch(row, source, missing, file.fileno(), given) if missing else []
                if missing:
                    raise Untrusted(f"nobody gave {len(missing)} of {len(pieces)} pieces")
                if blake3().update_mmap(part).hexdigest() != row.content_id:
                    raise Untrusted("the bytes are not what was asked for")
                os.fsync(file.fileno())
                os.link(part, target)  # unlike a rename, this never replaces a file
            finally:
                part.unlink()
        return given

    def fetch(
        self, row: tracker.FileRow, source: types.Source, pieces: Sequence[int], file: int, given: dict[str, int]
    ) -> list[int]:
        """Writes pieces from one source to `file` as they come, and returns those that did not."""
        length, missing = piece_length(row.size), list(pieces)
        try:
            with self.dial(source) as channel:
                peer = chunk_rpc.ChunkServiceStub(channel)
                if manifest_size(peer, row.content_id) != row.size:
                    return missing
                for claim in (pieces[i : i + 16] for i in range(0, len(pieces), 16)):
                    for piece, data in get_pieces(peer, row, claim):
                        os.pwrite(file, data, piece * length)
                        missing.remove(piece)
                        given[source.peer_id] += len(data)
        except (grpc.RpcError, Untrusted):
            pass  # a source that fails is no failure while there are others
        return missing


def piece_length(size: int) -> int:
    """256 KiB, doubled until 65,536 pieces are enough."""
    length = 256 << 10
    while size > length << 16:
        length *= 2
    return length


def manifest_size(peer: chunk_rpc.ChunkServiceStub, content_id: str) -> int | None:
    """The size that a peer's manifest states; None: it does not hold the content."""
    request = chunk.GetManifestRequest(content_ids=[bytes.fromhex(content_id)])
    sizes = [part.header.size for part in peer.GetManifest(request, timeout=30) if part.HasField("header")]
    return sizes[0] if sizes else None


def get_pieces(
    peer: chunk_rpc.ChunkServiceStub, row: tracker.FileRow, claim: Sequence[int]
) -> Iterator[tuple[int, bytes]]:
    """Pieces of `claim` as they become complete; those that the peer answers with an error are left out."""
    length, content = piece_length(row.size), bytes.fromhex(row.content_id)
    ranges = [chunk.PieceRange(content_id=content, size=row.size, first_piece=p, piece_count=1) for p in claim]
    buffers = {piece: bytearray() for piece in claim}
    for answer in peer.GetChunks(chunk.GetChunksRequest(ranges=ranges, chunk_length=256 << 10), timeout=60):
        if not answer.HasField("chunk"):
            continue
        if answer.chunk.range >= len(claim):
            raise Untrusted("a chunk that was not asked for")
        piece = claim[answer.chunk.range]
        start, end = piece * length, min((piece + 1) * length, row.size)
        buffer = buffers[piece]
        if answer.chunk.offset != start + len(buffer) or start + len(buffer) + len(answer.chunk.data) > end:
            raise Untrusted("a chunk out of place")
        buffer += answer.chunk.data
        if answer.chunk.data and start + len(buffer) == end:
            yield piece, bytes(buffer)
