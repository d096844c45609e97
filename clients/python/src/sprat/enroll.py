"""Becoming a member with a join link, and staying one.

Nothing is said before the pin of the link was met, and what comes back is used only if it certifies our own key under
the pinned authority.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from sprat.channel import JOIN_NAME, open_channel, target
from sprat.errors import LinkError, SpratError, Unavailable, Untrusted, translated
from sprat.identity import (
    DER,
    PEM,
    Folder,
    Identity,
    Link,
    Trust,
    base32,
    key_hash,
    read_certificate,
    signing_request,
    subject,
)
from sprat.v1 import enrollment_pb2 as enrollment
from sprat.v1 import enrollment_pb2_grpc as enrollment_rpc

_SECONDS = 10.0


def join(link: str, directory: str | os.PathLike[str]) -> Identity:
    """Redeems a join link for an identity in `directory`, which is made if need be.

    The secret goes out only to the tracker whose key the link names. A member of the same network keeps its
    certificate and learns the tracker's address from the link.

    Raises `LinkError` for a link that is none, `Untrusted` if another tracker answers, `Unavailable` if none does,
    `CallError` (PERMISSION_DENIED) if the tracker refuses the link, `SpratError` if `directory` belongs to another
    network.
    """
    token, folder = Link.parse(link), Folder(Path(directory))
    if not folder.own:
        raise SpratError(f"{folder.path} is the state directory of a sprat peer: choose another folder")
    before = folder.load()
    if before is not None and token.pin[0] == "a":
        if "a" + base32(key_hash(before.authority_certificate)) != token.pin:
            raise SpratError(f"{folder.path} belongs to another network: choose another folder")
        if before.left().total_seconds() > 0:
            folder.save_trackers([token.address, *folder.trackers()])
            return before
    key = folder.key()
    with _pinned(token) as channel, translated():
        request = enrollment.JoinRequest(token_id=token.token_id, secret=token.secret, csr=signing_request(key))
        answer = enrollment_rpc.EnrollmentServiceStub(channel).Join(request, timeout=_SECONDS)
    authority = read_certificate(answer.authority)
    if token.pin[0] == "a" and "a" + base32(key_hash(authority)) != token.pin:
        raise Untrusted("the tracker sent another authority than the link names")
    if before is not None and before.authority_certificate != authority:
        raise SpratError(f"{folder.path} belongs to another network: choose another folder")
    return _keep(folder, answer, key, authority, [token.address, *answer.tracker_addresses])


def renew(directory: str | os.PathLike[str]) -> Identity:
    """A new certificate for the same key; certificates live for seven days. Errors as `join`."""
    folder = Folder(Path(directory))
    before = folder.load()
    if before is None:
        raise SpratError(f"{folder.path} has not joined a network")
    if not folder.own:
        raise SpratError("the peer whose state directory this is renews its certificate itself")
    authority = before.authority_certificate
    trust = folder.trust(authority)
    csr, now = signing_request(before.private_key), int(time.time())
    signature = before.private_key.sign(b"sprat renew v1" + struct.pack(">Q", now) + csr, ec.ECDSA(hashes.SHA256()))
    request = enrollment.RenewRequest(csr=csr, signed_at=now, signature=signature)
    problem: SpratError = Unavailable("no tracker is known")
    for address in folder.trackers():
        try:
            with _known(address, before, trust) as channel, translated():
                answer = enrollment_rpc.EnrollmentServiceStub(channel).Renew(request, timeout=_SECONDS)
        except Unavailable as error:
            problem = error
            continue
        if answer.authority != authority.public_bytes(DER):
            raise Untrusted("the tracker now has another authority: join again")
        return _keep(folder, answer, before.private_key, authority, folder.trackers())
    raise problem


def _keep(
    folder: Folder,
    answer: enrollment.JoinResponse,
    key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    trackers: list[str],
) -> Identity:
    """Checks an answer before anything of it is used, and keeps it."""
    certificate = read_certificate(answer.certificate)
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        raise Untrusted("the tracker sent a certificate that its authority did not sign") from None
    if certificate.public_key() != key.public_key() or subject(certificate)[1] != "peer":
        raise Untrusted("the tracker sent a certificate of another kind")
    if answer.HasField("trust_list"):
        if Trust.read(answer.trust_list, authority).epoch >= folder.trust(authority).epoch:
            folder.save_trust(answer.trust_list)
    folder.save_trackers(trackers)
    folder.save(authority.public_bytes(PEM), certificate.public_bytes(PEM))
    kept = folder.load()
    assert kept is not None
    return kept


@contextmanager
def _pinned(link: Link) -> Iterator[grpc.Channel]:
    """A connection to the tracker that the link names, for joiners."""
    if link.pin[0] == "t":
        with _bridge(link.address, frozenset([link.pin[1:]])) as channel:
            yield channel
        return
    authority = _shown(link.address)[-1]
    if "a" + base32(key_hash(authority)) != link.pin:
        raise Untrusted(f"{link.address} is not the tracker that the link was made for")
    # Showing the right authority proves nothing. This connection is verified by gRPC: the tracker must hold a
    # certificate for JOIN_NAME from that very authority.
    with open_channel(link.address, JOIN_NAME, authority.public_bytes(PEM)) as channel:
        yield channel


@contextmanager
def _known(address: str, member: Identity, trust: Trust) -> Iterator[grpc.Channel]:
    """The same for a member, who knows the authority and the trackers whose own keys it vouches for."""
    pins = frozenset(base32(pin) for pin in trust.tracker_pins)
    if base32(key_hash(_shown(address)[0])) in pins:
        with _bridge(address, pins) as channel:
            yield channel
    else:
        with open_channel(address, JOIN_NAME, member.authority) as channel:
            yield channel


def _greet(address: str) -> ssl.SSLSocket:
    """A TLS connection to whoever answers; nothing is believed yet, and nothing may be sent."""
    target(address)
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        plain = socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS)
    except OSError as error:
        raise Unavailable(f"{address}: {error}; is the tracker running, and its port open?") from error
    try:
        return context.wrap_socket(plain, server_hostname=JOIN_NAME)
    except OSError as error:
        plain.close()
        raise Unavailable(f"{address}: {error}; is this the tracker's address and port?") from error


def _shown(address: str) -> list[x509.Certificate]:
    """The chain that a tracker shows to joiners, its own certificate first."""
    with _greet(address) as tls:
        # Public since Python 3.13; before, the same method of the object underneath.
        shown: Any = tls
        chain = (shown if hasattr(shown, "get_unverified_chain") else shown._sslobj).get_unverified_chain()
    der = [c if isinstance(c, bytes) else ssl.PEM_cert_to_DER_cert(c.public_bytes()) for c in chain or []]
    if not der:
        raise Untrusted(f"{address} shows no certificate")
    return [read_certificate(one) for one in der]


@contextmanager
def _bridge(address: str, pins: frozenset[str]) -> Iterator[grpc.Channel]:
    """A channel to a tracker that shows a certificate from elsewhere, known by the hash of its key alone.

    gRPC cannot be told to believe a key, so the TLS is done here: the key is checked on the very connection over which
    gRPC then speaks, through a socket in a folder of our own. TLS itself makes sure that the other end has the key.
    """
    tls = _greet(address)
    with contextlib.closing(tls), tempfile.TemporaryDirectory(prefix="sprat-") as folder:
        leaf = read_certificate(tls.getpeercert(binary_form=True) or b"")
        if base32(key_hash(leaf)) not in pins:
            raise Untrusted(f"{address} is not the tracker that the link was made for")
        if not leaf.not_valid_before_utc <= datetime.now(timezone.utc) <= leaf.not_valid_after_utc:
            raise Untrusted(f"the certificate of {address} is out of date")
        path = f"{folder}/s"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(1)
            pump = threading.Thread(target=_pump, args=(listener, tls), daemon=True)
            pump.start()
            options = [("grpc.default_authority", JOIN_NAME), ("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(f"unix:{path}", options) as channel:
                yield channel
            pump.join(_SECONDS)


def _pump(listener: socket.socket, tls: ssl.SSLSocket) -> None:
    """Carries bytes between the first to connect and the tracker until either goes."""
    listener.settimeout(_SECONDS)
    try:
        near, _ = listener.accept()
        with near:
            while True:
                ready = [tls] if tls.pending() else select.select([near, tls], [], [], 2 * _SECONDS)[0]
                if not ready:
                    return
                for end, other in ((near, tls), (tls, near)):
                    if end in ready:
                        data = end.recv(1 << 16)
                        if not data:
                            return
                        other.sendall(data)
    except OSError:
        pass
