"""Who somebody is: join links, keys and certificates, and the list of those who are no longer members.

An identity lies in a folder as plain files: `ca.crt`, `peer.crt` and `peer.key` (PEM), `network.json` with the
tracker's addresses, `trust.bin` with the newest list that the authority signed. They are the files that sprat itself
keeps, so the state directory of a sprat peer can be opened too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import DecodeError

from sprat.errors import LinkError, SpratError, Untrusted
from sprat.v1 import types_pb2 as types

PEM = serialization.Encoding.PEM
DER = serialization.Encoding.DER
DOMAIN = "sprat.internal"


def base32(data: bytes) -> str:
    """Lower-case RFC 4648 base32 without padding, as all ids and link parts are written."""
    return base64.b32encode(data).decode().lower().rstrip("=")


def read_certificate(der: bytes) -> x509.Certificate:
    """A certificate from the wire; raises `Untrusted` if it is none."""
    try:
        return x509.load_der_x509_certificate(der)
    except ValueError:
        raise Untrusted("what should be a certificate is none") from None


def key_hash(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the public key: what a pin and a peer id are made of."""
    spki = certificate.public_key().public_bytes(DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()


def subject(certificate: x509.Certificate) -> tuple[str, str]:
    """The peer id and the role ("peer", "operator", "tracker") of a certificate, if its key is that of the id."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise Untrusted("a certificate without a name") from None
    suffix = f".{DOMAIN}"
    names = [name.removesuffix(suffix) for name in extension.get_values_for_type(x509.DNSName) if name.endswith(suffix)]
    identities = [name.split(".") for name in names if name.count(".") == 1]
    if len(identities) != 1 or identities[0][0] != base32(key_hash(certificate)):
        raise Untrusted("a certificate whose name does not belong to its key")
    return identities[0][0], identities[0][1]


@dataclass(frozen=True)
class Link:
    """A join link: sprat://HOST:PORT/PIN.ID.SECRET.CHECK"""

    address: str
    pin: str
    token_id: str
    secret: str = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Link:
        """Reads a link; white space in it, as a wrapped mail has, does not count."""
        text = "".join(text.split())
        if not text.startswith("sprat://"):
            raise LinkError("a join link begins with sprat://HOST:PORT/")
        body, _, check = text.removeprefix("sprat://").rpartition(".")
        found = re.fullmatch(r"([^/]+:\d+)/([at][a-z2-7]{52})\.([a-z2-7]{8})\.([a-z2-7]{26})", body)
        if not found:
            raise LinkError("the join link is cut: it needs four parts after the address, PIN.ID.SECRET.CHECK")
        if base32(hashlib.sha256(body.encode()).digest())[:6] != check:
            raise LinkError("the join link has a typo: its last six characters do not match the rest; copy it again")
        return cls(*found.groups())


@dataclass(frozen=True)
class Trust:
    """The newest list that the authority signed: a later one replaces it, an earlier one never does."""

    epoch: int = 0
    denied: frozenset[str] = frozenset()
    tracker_pins: frozenset[bytes] = frozenset()

    @classmethod
    def read(cls, signed: types.SignedTrustList, authority: x509.Certificate) -> Trust:
        """Raises `Untrusted` if the authority did not sign it."""
        key = authority.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise Untrusted("the authority's key is of another kind")
        try:
            key.verify(signed.signature, signed.body, ec.ECDSA(hashes.SHA256()))
            found = types.TrustList.FromString(signed.body)
        except (InvalidSignature, DecodeError):
            raise Untrusted("a trust list that the authority did not sign") from None
        return cls(found.epoch, frozenset(found.denied_peer_ids), frozenset(found.tracker_pins))


@dataclass(frozen=True)
class Identity:
    """A member of one network; certificates and key are PEM."""

    authority: bytes
    certificate: bytes
    key: bytes = field(repr=False)

    @property
    def peer_id(self) -> str:
        return subject(self.leaf)[0]

    @property
    def leaf(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.certificate)

    @property
    def authority_certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.authority)

    @property
    def private_key(self) -> ec.EllipticCurvePrivateKey:
        return load_key(self.key)

    def left(self) -> timedelta:
        """How long the certificate is still good."""
        return self.leaf.not_valid_after_utc - datetime.now(timezone.utc)

    def life(self) -> timedelta:
        return self.leaf.not_valid_after_utc - self.leaf.not_valid_before_utc


def load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SpratError("the key is not an ECDSA key")
    return key


def signing_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A PKCS #10 request that names nobody; the tracker decides the name."""
    return x509.CertificateSigningRequestBuilder(x509.Name([])).sign(key, hashes.SHA256()).public_bytes(DER)


class Folder:
    """Where an identity is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        inner = path / "identity"
        self.own = not inner.is_dir()
        """False in the state directory of a sprat peer, which renews its certificate itself."""
        self.files = path if self.own else inner

    def key(self) -> ec.EllipticCurvePrivateKey:
        """The key that an earlier, unfinished join left, or a new one, kept before it is used."""
        self.files.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.files / "peer.key"
        if path.exists():
            return load_key(path.read_bytes())
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        write_private(path, pem)
        return key

    def load(self) -> Identity | None:
        """What joining left; `None` if it did not happen here."""
        try:
            return Identity(*((self.files / name).read_bytes() for name in ("ca.crt", "peer.crt", "peer.key")))
        except FileNotFoundError:
            return None

    def save(self, authority: bytes, certificate: bytes) -> None:
        """Keeps certificates (PEM), that of the member last: with it the identity is complete."""
        write_private(self.files / "ca.crt", authority)
        write_private(self.files / "peer.crt", certificate)

    def trackers(self) -> list[str]:
        try:
            known = json.loads((self.path / "network.json").read_text())["trackers"]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError):
            raise SpratError(f"{self.path / 'network.json'} is damaged") from None
        return [str(address) for address in known]

    def save_trackers(self, addresses: list[str]) -> None:
        text = json.dumps({"trackers": list(dict.fromkeys(addresses))}, indent=2)
        write_private(self.path / "network.json", text.encode())

    def trust(self, authority: x509.Certificate) -> Trust:
        """The list last kept; an empty one if there is none that can be read."""
        try:
            signed = types.SignedTrustList.FromString((self.path / "trust.bin").read_bytes())
            return Trust.read(signed, authority)
        except (OSError, DecodeError, Untrusted):
            return Trust()

    def save_trust(self, signed: types.SignedTrustList) -> None:
        write_private(self.path / "trust.bin", signed.SerializeToString())


def write_private(path: Path, data: bytes) -> None:
    """Writes a file that only its owner may read; after a crash it holds the old bytes or the new."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    fresh.unlink(missing_ok=True)
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
