"""A crowd of members that speak to the tracker as peers do, with certificates of their own, but serve nothing: what the
page makes of a large network does not need a thousand processes."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from sprat.channel import JOIN_NAME, TRACKER_NAME, open_channel
from sprat.enroll import _shown
from sprat.identity import PEM, Identity, Link, read_certificate, signing_request
from sprat.v1 import enrollment_pb2 as enrollment
from sprat.v1 import enrollment_pb2_grpc as enrollment_rpc
from sprat.v1 import tracker_pb2 as tracker
from sprat.v1 import tracker_pb2_grpc as tracker_rpc
from sprat.v1 import types_pb2 as types

WORKERS = 16
MIB = 1 << 20


def content_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Member:
    """One of the crowd."""

    number: int
    identity: Identity
    stub: tracker_rpc.TrackerServiceStub
    files: list[types.FileEntry] = field(default_factory=list)
    activity: tracker.Activity = field(default_factory=tracker.Activity)

    def register(self) -> None:
        header = tracker.RegisterHeader(generation=1, port=7701, addresses=[f"10.{self.number >> 8}.{self.number & 255}.7:7701"])
        parts = [tracker.RegisterRequest(header=header)]
        for at in range(0, len(self.files), 500):
            batch = tracker.RegisterBatch(added=self.files[at : at + 500])
            parts.append(tracker.RegisterRequest(batch=batch))
        self.stub.Register(iter(parts), timeout=60)

    def heartbeat(self) -> None:
        self.stub.Heartbeat(tracker.HeartbeatRequest(generation=1, activity=self.activity), timeout=30)


class Crowd:
    """`n` members that heartbeat until the end; `moving` of them say that they download."""

    def __init__(self, link: str, n: int, files: int, moving: int = 0, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.stack = ExitStack()
        self.pool = self.stack.enter_context(ThreadPoolExecutor(WORKERS))
        self.stopped = threading.Event()
        try:
            self.members = self._join(Link.parse(link), n)
            names = [self._file(at) for at in range(files)]
            for at, entry in enumerate(names):
                for copy in range(self._copies()):
                    self.members[(at + copy * 37) % n].files.append(entry)
            list(self.pool.map(Member.register, self.members))
            self.moving = self.members[:moving]
            self._begin(names)
            list(self.pool.map(Member.heartbeat, self.members))
            self.thread = threading.Thread(target=self._live)
            self.thread.start()
        except BaseException:
            self.stack.close()
            raise

    def _join(self, link: Link, n: int) -> list[Member]:
        authority = _shown(link.address)[-1].public_bytes(PEM)
        keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(n)]
        with open_channel(link.address, JOIN_NAME, authority) as channel:
            join = enrollment_rpc.EnrollmentServiceStub(channel).Join
            requests = [
                enrollment.JoinRequest(token_id=link.token_id, secret=link.secret, csr=signing_request(key)) for key in keys
            ]
            answers = [join(request, timeout=60) for request in requests]
        members = []
        for number, (key, answer) in enumerate(zip(keys, answers)):
            identity = Identity(
                key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
                certificate=read_certificate(answer.certificate).public_bytes(PEM),
                authority=authority,
            )
            channel = open_channel(link.address, TRACKER_NAME, authority, identity)
            self.stack.callback(channel.close)
            members.append(Member(number, identity, tracker_rpc.TrackerServiceStub(channel)))
        return members

    def _file(self, at: int) -> types.FileEntry:
        kinds = [("render/shot-{:03}/frame-{:05}.exr", 24, 64), ("models/run-{:03}/shard-{:05}.safetensors", 512, 4096),
                 ("builds/{:03}/object-{:05}.tar.zst", 1, 200)]
        name, least, most = kinds[at % 3]
        size = self.random.randint(least * MIB, most * MIB)
        return types.FileEntry(name=name.format(at // 300, at), size=size, content_id=content_id(str(at)))

    def _copies(self) -> int:
        return self.random.choices([1, 2, 3, 4, 6], [1, 6, 8, 3, 2])[0]

    def _begin(self, names: list[types.FileEntry]) -> None:
        """Every moving member fetches a file from some others, the first few of which send most."""
        for member in self.moving:
            entry = self.random.choice(names)
            senders = self.random.sample(self.members[: max(8, len(self.moving) // 4)], 6)
            rates = [int(self.random.paretovariate(1.1) * 3 * MIB) for _ in senders]
            sources = [
                tracker.TransferSource(peer_id=other.identity.peer_id, bytes_per_second=min(rate, 300 * MIB))
                for other, rate in zip(senders, rates)
                if other is not member
            ]
            total = sum(source.bytes_per_second for source in sources)
            transfer = tracker.Transfer(
                content_id=entry.content_id, bytes_total=entry.size, bytes_done=self.random.randint(0, entry.size),
                files_total=1, bytes_per_second=total, sources=sources,
            )
            member.activity = tracker.Activity(receive_rate=total, transfers=[transfer], bytes_received=transfer.bytes_done)

    def _move(self, member: Member, seconds: float) -> None:
        transfer = member.activity.transfers[0]
        for source in transfer.sources:
            source.bytes_per_second = max(MIB, int(source.bytes_per_second * self.random.uniform(0.85, 1.16)))
        transfer.bytes_per_second = sum(source.bytes_per_second for source in transfer.sources)
        came = int(transfer.bytes_per_second * seconds)
        transfer.bytes_done = (transfer.bytes_done + came) % transfer.bytes_total
        member.activity.bytes_received += came
        member.activity.receive_rate = transfer.bytes_per_second

    def _live(self) -> None:
        last, quiet = time.monotonic(), 0.0
        while not self.stopped.wait(1):
            now = time.monotonic()
            everybody = now > quiet
            quiet = now + 10 if everybody else quiet
            for member in self.moving:
                self._move(member, now - last)
            last = now
            try:
                list(self.pool.map(Member.heartbeat, self.members if everybody else self.moving))
            except grpc.RpcError:
                return  # the tracker has gone

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()
        self.stack.close()

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
