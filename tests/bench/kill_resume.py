#!/usr/bin/env python3
"""Kills downloads with SIGKILL at random moments, starts them again, and compares every byte when they complete.

A cycle is one kill and one restart: of the `get`, of the peer that runs it, or of the only source. Everything runs on
loopback, without root; a relay between source and receiver is slow enough for kills to land half-way. Ends with exit
code 1 at the first wrong byte, or if a download does not come to its end. The same --seed makes the same choices.
"""
import argparse
import asyncio
import collections
import contextlib
import os
import pathlib
import random
import shutil
import socket
import sys
import tempfile
import threading
import time

import payload
from lab import MIB, Failed, clean_up_when_told_to_stop
from programs import Network, last_event

ROOT = pathlib.Path(__file__).resolve().parents[2]
WHOLE = 3.0  # seconds that an undisturbed download takes
LONGEST = 1.2  # seconds until a kill
MOST_KILLS = 100  # of one download; its end is overdue then
PATIENCE = 120  # seconds, for a download that nobody disturbs


class SlowLink:
    """Relays connections to `target`, a port of this machine; so many bytes a second come back, over all together."""

    def __init__(self, bytes_per_second):
        self.speed, self.target, self.moved, self.free_at = bytes_per_second, None, 0, 0.0
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self.accept, "127.0.0.1", 0))
        self.port = self.server.sockets[0].getsockname()[1]
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    async def accept(self, near_in, near_out):
        try:
            far_in, far_out = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            near_out.close()
            return
        ways = [asyncio.create_task(self.relay(near_in, far_out, False)),
                asyncio.create_task(self.relay(far_in, near_out, True))]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for task in ways:
            task.cancel()
        near_out.close()
        far_out.close()

    async def relay(self, source, sink, slow):
        try:
            while block := await source.read(64 << 10):
                if slow:
                    self.moved += len(block)
                    self.free_at = max(self.free_at, time.monotonic()) + len(block) / self.speed
                    await asyncio.sleep(self.free_at - time.monotonic())
                sink.write(block)
                await sink.drain()
        except OSError:
            pass  # one end was killed


def free_port():
    """None of those that the kernel gives to outgoing connections meanwhile."""
    while True:
        port = random.randrange(20_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


class Story:
    """One source, one receiver, and who was killed."""

    def __init__(self, network, link, rng, mib, work):
        self.network, self.link, self.rng, self.size = network, link, rng, mib * MIB
        self.shared, self.copies = work / "shared", work / "copies"
        self.kills, self.files, self.bytes = collections.Counter(), 0, 0
        self.source = self.peer = self.get = None
        self.shared.mkdir()
        self.copies.mkdir()
        for member in ("alone", "attached"):
            network.join(member)
        self.next_file()
        self.start_source()

    def next_file(self):
        """Makes the file after the current one, so that it is listed when its turn comes."""
        size = self.size - self.rng.randrange(300_000)
        payload.write(self.shared / f"file{self.files}", size, self.rng.randrange(1 << 60))

    def start_source(self):
        self.link.target = free_port()
        self.source = self.network.peer(
            "source", None, "--share", self.shared, "--listen", f"127.0.0.1:{self.link.target}",
            "--advertise", f"127.0.0.1:{self.link.port}")

    def kill(self, victim):
        """One cycle."""
        self.kills[victim] += 1
        if victim == "source":
            self.network.kill(self.source)
            self.start_source()
            return
        if victim == "peer":
            self.network.kill(self.peer)
            self.peer = None
        self.network.kill(self.get)
        self.get = None

    def start_receiver(self, member, name):
        if member == "attached" and not self.peer:
            self.peer = self.network.peer("attached")
        self.get = self.network.get(member, None, name, self.copies / name)

    def download(self, cycles):
        """One file; kills until it is complete, or until no cycles are left. Gives how many are left."""
        name = f"file{self.files}"
        self.network.wait_listed(None, 1, name)
        self.files += 1
        self.next_file()
        member = self.rng.choice(["alone", "attached"])
        victims = ["get", "source"] + ["peer"] * (member == "attached")
        kills, source_died, overdue = 0, False, None
        while True:
            if not self.get:
                self.start_receiver(member, name)
            delay = self.rng.uniform(0, LONGEST) if cycles else PATIENCE
            code = self.wait(delay)
            if code == 0:
                break
            if code is not None:
                # Without its only source a download may give up. Otherwise this is a failure.
                overdue = overdue or time.monotonic() + PATIENCE
                if not source_died or time.monotonic() > overdue:
                    raise Failed(f"exit code {code} of {self.get.said()}")
                self.network.procs.remove(self.get)
                self.get = None
                self.network.wait_listed(None, 1, name)
                continue
            if not cycles or kills == MOST_KILLS:
                raise Failed(f"no end after {kills} kills: {self.get.said()}")
            victim = self.rng.choice(victims)
            source_died |= victim == "source"
            self.kill(victim)
            kills, cycles = kills + 1, cycles - 1
        self.compare(name, kills, member)
        return cycles

    def wait(self, seconds):
        """The exit code of the `get`, or None if it still runs after so many seconds."""
        end = time.monotonic() + seconds
        while self.get.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        return self.get.poll()

    def compare(self, name, kills, member):
        summary = last_event(self.get)
        self.network.procs.remove(self.get)
        self.get = None
        source, copy = self.shared / name, self.copies / name
        payload.same_file(source, copy)
        if (left := os.listdir(self.copies)) != [name]:
            raise Failed(f"left behind beside {name}: {left}")
        self.bytes += copy.stat().st_size
        print(f"{name}: {copy.stat().st_size} bytes identical after {kills} kills ({member}; "
              f"resumed {summary['bytes_resumed'] >> 20} MiB in its last life)", flush=True)
        copy.unlink()
        source.unlink()


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprat", default=ROOT / "target/release/sprat", help="the program to kill")
    parser.add_argument("--cycles", type=int, default=200, help="kills (200)")
    parser.add_argument("--mib", type=int, default=256, help="size of each file (256)")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)), help="of the random choices")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where to work (%(default)s)")
    return parser.parse_args()


def main():
    chosen = options()
    clean_up_when_told_to_stop()
    print(f"seed {chosen.seed}", flush=True)
    work = pathlib.Path(tempfile.mkdtemp(prefix="sprat-kill-", dir=chosen.dir))
    start, left = time.monotonic(), chosen.cycles
    try:
        with Network(chosen.sprat, work) as network:
            link = SlowLink(chosen.mib * MIB / WHOLE)
            story = Story(network, link, random.Random(chosen.seed), chosen.mib, work)
            while left:
                left = story.download(left)
            again = (link.moved - story.bytes) / MIB / chosen.cycles
    except (Failed, KeyboardInterrupt) as error:
        sys.exit(f"kill_resume.py: seed {chosen.seed}, cycle {chosen.cycles - left}: {error or 'interrupted'}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    killed = ", ".join(f"{who} {n}" for who, n in sorted(story.kills.items()))
    print(f"killed: {killed}; {again:.1f} MiB a kill crossed the wire again; {time.monotonic() - start:.0f} s")
    print(f"{chosen.cycles} cycles, {story.files} files, all identical")


if __name__ == "__main__":
    main()
