#!/usr/bin/env python3
"""What a tracker and a peer take: memory and processor time for so many peers and files, as a table.

The tracker and one peer are real processes. The many members of the tracker are played by this script with the Python
client: each has its own key, certificate and connection, registers a library and sends its heartbeats in time. Needs the
packages of clients/python/requirements-dev.txt, no root; a whole run takes some four minutes and half a gibibyte.
"""
import argparse
import concurrent.futures
import hashlib
import pathlib
import sys
import tempfile
import time

from lab import MIB, Failed, clean_up_when_told_to_stop, wait_until
from programs import Network

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "clients/python/src"))

from sprat import enroll  # noqa: E402
from sprat.channel import TRACKER_NAME, open_channel  # noqa: E402
from sprat.identity import Identity, Link, load_key, signing_request  # noqa: E402
from sprat.v1 import enrollment_pb2, enrollment_pb2_grpc, tracker_pb2, tracker_pb2_grpc, types_pb2  # noqa: E402
from cryptography import x509  # noqa: E402
from cryptography.hazmat.primitives import serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402

BATCH = 1000  # files in a message, well below its limit
HEARTBEAT = 10.0


def rss(proc):
    """Resident bytes now."""
    for line in open(f"/proc/{proc.pid}/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise Failed(proc.said())


def load(proc, seconds):
    """Percent of one core over so many seconds."""
    before, began = proc.cpu(), time.monotonic()
    time.sleep(seconds)
    return 100 * (proc.cpu() - before) / (time.monotonic() - began)


def members(link, count):
    """So many new members; their connections stay open as long as they are kept."""
    token = Link.parse(link)
    pem = serialization.Encoding.PEM
    found = []
    with enroll._pinned(token) as channel:
        stub = enrollment_pb2_grpc.EnrollmentServiceStub(channel)
        for _ in range(count):
            key = ec.generate_private_key(ec.SECP256R1())
            request = enrollment_pb2.JoinRequest(
                token_id=token.token_id, secret=token.secret, csr=signing_request(key))
            answer = stub.Join(request, timeout=30)
            text = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
            certificate, authority = (
                x509.load_der_x509_certificate(der).public_bytes(pem) for der in (answer.certificate, answer.authority))
            identity = Identity(key=text, certificate=certificate, authority=authority)
            load_key(identity.key)
            connection = open_channel(token.address, TRACKER_NAME, identity.authority, identity)
            found.append(tracker_pb2_grpc.TrackerServiceStub(connection))
    return found


def register(member, number, files):
    """One library of so many files with names of some forty bytes, each with a content of its own."""
    def parts():
        header = tracker_pb2.RegisterHeader(generation=1, addresses=["192.0.2.9:7701"], port=7701)
        yield tracker_pb2.RegisterRequest(header=header)
        for start in range(0, files, BATCH):
            names = (f"models/peer-{number:05}/part-{i:09}.safetensors" for i in range(start, min(start + BATCH, files)))
            added = [
                types_pb2.FileEntry(name=name, size=1 << 20, content_id=hashlib.sha256(name.encode()).hexdigest())
                for name in names]
            yield tracker_pb2.RegisterRequest(batch=tracker_pb2.RegisterBatch(added=added))

    return member.Register(parts(), timeout=300)


class Crowd:
    """Members that are online: heartbeats in time, until the block ends."""

    def __init__(self, stubs):
        self.stubs, self.pool = stubs, concurrent.futures.ThreadPoolExecutor(9)
        self.running = True

    def beat(self):
        while self.running:
            began = time.monotonic()
            for i, stub in enumerate(self.stubs):
                if not self.running:
                    return
                time.sleep(max(0, began + HEARTBEAT * i / len(self.stubs) - time.monotonic()))
                stub.Heartbeat(tracker_pb2.HeartbeatRequest(generation=1), timeout=30)
            time.sleep(max(0, began + HEARTBEAT - time.monotonic()))

    def __enter__(self):
        self.task = self.pool.submit(self.beat)
        return self

    def __exit__(self, *_):
        self.running = False
        self.task.result()
        self.pool.shutdown()


def row(what, proc, percent, took=None):
    took = f"{took:.1f} s" if took else ""
    print(f"| {what} | {rss(proc) / MIB:.0f} MiB | {percent:.1f} % | {took} |", flush=True)


def tracker_rows(program, work, peers, files, seconds):
    for count in peers:
        with Network(program, work) as network:
            tracker = network.procs[0]
            began = time.monotonic()
            stubs = members(network.link.splitlines()[-1], count)
            for number, stub in enumerate(stubs):
                register(stub, number, 10)
            took = time.monotonic() - began
            with Crowd(stubs):
                row(f"tracker, {count:,} peers with 10 files each", tracker, load(tracker, seconds), took)
    for count in files:
        with Network(program, work) as network:
            tracker = network.procs[0]
            stubs = members(network.link.splitlines()[-1], 10)
            began = time.monotonic()
            for number, stub in enumerate(stubs):
                register(stub, number, count // 10)
            took = time.monotonic() - began
            with Crowd(stubs):
                row(f"tracker, 10 peers with {count:,} files in all", tracker, load(tracker, seconds), took)


def peer_rows(program, work, files, seconds):
    with Network(program, work) as network:
        peer = network.peer("idle")
        time.sleep(2)
        row("peer, idle", peer, load(peer, seconds))
        folder = pathlib.Path(work, "shared")
        for i in range(files):
            path = folder / f"{i // 1000:03}/{i:06}.txt"
            if i % 1000 == 0:
                path.parent.mkdir(parents=True)
            path.write_text(f"file {i}\n")
        began = time.monotonic()
        sharing = network.peer("sharing", None, "--share", folder)
        network.join("observer")

        def hashed():
            status = network.run("sharing", None, "status", "--json")
            return f'"files":{files},' in status and '"files_to_hash":0' in status and '"online"' in status

        wait_until("all files are hashed and listed", 600, hashed, 0.5)
        took = time.monotonic() - began
        row(f"peer, sharing {files:,} small files", sharing, load(sharing, seconds), took)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default=ROOT / "target/release/sprat")
    parser.add_argument("--peers", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--files", type=int, nargs="*", default=[1000, 100_000, 1_000_000])
    parser.add_argument("--shared", type=int, default=100_000, help="files that a peer shares; 0: no peer")
    parser.add_argument("--seconds", type=float, default=20, help="how long processor time is watched")
    args = parser.parse_args()
    clean_up_when_told_to_stop()
    print("| what | resident | of one core | until it was so |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="sprat-capacity-") as work:
        tracker_rows(args.binary, work, args.peers, args.files, args.seconds)
        if args.shared:
            peer_rows(args.binary, work, args.shared, args.seconds)


if __name__ == "__main__":
    main()
