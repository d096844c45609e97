"""The suites. Each gives records, one a sample; `tables.py` prints them.

Invariant: a record exists only if every byte of its sample was compared.
"""
import contextlib
import json
import mmap
import os
import pathlib
import shutil
import signal
import sys
import time

import lab
import payload
from lab import MIB, Failed, Proc, watch_rss
from programs import SECONDS, Network, last_event, nginx, rsync_daemon

# Bytes of memory that are free beyond what a sample needs.
SPARED = 512 << 20


class Bench:
    """What the suites share: the flags, a folder to work in, where records go."""

    def __init__(self, options):
        self.options = options
        self.keep = pathlib.Path(options.dir)  # payloads, which the next run uses again
        self.work = self.keep / f"sprat-bench-work-{os.getpid()}"
        self.records = []
        self.count = 0

    def record(self, **values):
        """Keeps a sample, says so, and appends it to the file that was asked for."""
        record = {"suite": self.options.suite, "at": round(time.time()), "load": os.getloadavg()[0], **values}
        self.records.append(record)
        line = json.dumps(record)
        print(line, file=sys.stderr, flush=True)
        if self.options.out:
            with open(self.options.out, "a") as f:
                f.write(line + "\n")

    def network(self, place):
        return Network(self.options.sprat, self.work, place)

    def reps(self):
        """Numbers of the rounds; a round begins on a quiet machine, if that was asked for."""
        for rep in range(self.options.reps):
            lab.wait_quiet(self.options.quiet)
            yield rep

    def command(self, argv, place):
        """Starts a program that only takes part in the comparison."""
        self.count += 1
        return Proc(argv, self.work / f"other-{self.count}", place)

    def costs(self, sink, source=None):
        """Runs a sink to its end: seconds, CPU of both sides, peak memory of each."""
        before = source.cpu() if source else 0
        with watch_rss(*filter(None, (sink, source))):
            seconds = sink.succeed(SECONDS)
        costs = {"seconds": seconds, "sink_cpu": sink.cpu(), "sink_rss": sink.peak_rss}
        if source:
            costs |= {"source_cpu": source.cpu() - before, "source_rss": source.peak_rss}
        return costs

    def memory(self, size):
        """While a sample of so many bytes lasts. The rest of the machine's memory is only taken if that was asked for."""
        return warm_memory(size) if self.options.hold_memory else contextlib.nullcontext()

    def member(self, network, place):
        """A new member: nothing of an earlier sample is known to it."""
        self.count += 1
        network.join(f"sink{self.count}", place)
        return f"sink{self.count}"


def remove(*paths):
    """Takes a copy away, and lets the disk come to rest."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    os.sync()


def take_memory(size):
    """Memory that is in use until it is closed."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages; it only takes longer
        memory.madvise(mmap.MADV_HUGEPAGE)
    memory[::mmap.PAGESIZE] = bytes(-(-size // mmap.PAGESIZE))
    return memory


@contextlib.contextmanager
def warm_memory(size):
    """Leaves so much memory free, which was in use just before. A machine that gives freed memory back to its host pays for
    each page that is used again, several times what copying into it costs, and for giving back as well."""
    fields = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
    rest = (int(fields["MemFree"].split()[0]) << 10) - SPARED - size
    if rest <= 0:
        yield
        return
    given = take_memory(size)
    with take_memory(rest):
        given.close()
        yield


def in_turn(tools, rep):
    """All of them, each round another one first: what comes first may find a colder machine."""
    tools = list(tools.items())
    return tools[rep % len(tools):] + tools[:rep % len(tools)]


def single(bench):
    """One source, one sink, one machine: sprat, curl from nginx, cp with and without fsync, in turn."""
    size = bench.options.mib * MIB
    folder, copy = payload.single(bench.keep, size), bench.work / "copy"
    with (lab.loopback() as place, bench.network(place) as network,
          nginx(place, folder, bench.work) as (server, fetch)):
        source = network.source(place, folder, 1)

        def ours():
            return network.get(member, place, "payload", copy), source

        plain = ["cp", "--reflink=never", folder / "payload", copy]
        durable = ["sh", "-c", 'cp --reflink=never "$0" "$1" && sync "$1"', folder / "payload", copy]
        tools = {"sprat": ours, "cp": lambda: (bench.command(plain, place), None),
                 "cp and fsync": lambda: (bench.command(durable, place), None)}
        if server:
            tools["curl from nginx"] = lambda: (bench.command(fetch("payload", copy), place), server)
        for rep in bench.reps():
            for tool, start in in_turn(tools, rep):
                remove(copy)
                # Nothing comes between the memory and its use.
                member = bench.member(network, place)
                with bench.memory(2 * size):
                    costs = bench.costs(*start())
                payload.same_file(folder / "payload", copy)
                bench.record(tool=tool, rep=rep, bytes=size, **costs)
        remove(copy)


TREES = (("small", 10_000, 4 << 10), ("medium", 1_000, 100 << 10))


def small(bench):
    """Many small files, from tmpfs to tmpfs: sprat, an rsync daemon, cp, in turn."""
    memory = pathlib.Path(bench.options.tmpfs, f"sprat-bench-work-{os.getpid()}")
    folder, copy = memory / "trees", memory / "copy"
    groups = [(name, max(1, files // bench.options.divide), size) for name, files, size in TREES]
    settings = [(f"{files:,} x {size >> 10} KiB", name, files, files * size) for name, files, size in groups]
    settings.append(("both", "", sum(s[2] for s in settings), sum(s[3] for s in settings)))
    try:
        payload.trees(folder, groups)
        with (lab.loopback() as place, bench.network(place) as network,
              rsync_daemon(place, folder, bench.work) as (daemon, fetch)):
            source = network.source(place, folder, settings[-1][2])
            for rep in bench.reps():
                for setting, name, files, size in settings:
                    def ours():
                        member = bench.member(network, place)
                        return network.get(member, place, f"{name}/**".lstrip("/"), f"{copy}/"), source

                    target = copy / name
                    tools = {"sprat": ours, "cp -r": lambda: (
                        bench.command(["cp", "-r", "--reflink=never", f"{folder / name}/.", target], place), None)}
                    if daemon:
                        tools["rsync daemon"] = lambda: (
                            bench.command(fetch(f"{name}/".lstrip("/"), target), place), daemon)
                    for tool, start in in_turn(tools, rep):
                        (copy if tool == "sprat" else target).mkdir(parents=True)
                        costs = bench.costs(*start())
                        payload.same_tree(folder / name, target)
                        bench.record(tool=tool, setting=setting, rep=rep, files=files, bytes=size, **costs)
                        remove(copy)
    finally:
        shutil.rmtree(memory, ignore_errors=True)


WAN = {  # setting: round trip in ms, Mbit/s, loss in percent, KiB of queue, MiB
    "50 ms, 1 Gbit/s": (50, 1000, 0, 4096, 256),
    "20 ms, 1 Gbit/s, 1 % loss": (20, 1000, 1, 4096, 32),
    "50 ms, 100 Mbit/s": (50, 100, 0, 512, 64),
    "60 ms, 2 Mbit/s": (60, 2, 0, 64, 4),
}


def wan(bench):
    """Long and lossy links: sprat, curl from nginx."""
    for setting, (rtt_ms, mbit, loss, queue, mib) in WAN.items():
        size = (bench.options.mib or mib) * MIB
        folder, copy = payload.single(bench.keep, size), bench.work / "copy"
        with (lab.long_link(rtt_ms, mbit, loss, queue, bench.work) as (near, far), bench.network(near) as network,
              nginx(near, folder, bench.work) as (server, fetch)):
            source = network.source(near, folder, 1)

            def ours():
                return network.get(bench.member(network, far), far, "payload", copy), source

            tools = {"sprat": ours}
            if server:
                tools["curl from nginx"] = lambda: (bench.command(fetch("payload", copy), far), server)
            for rep in bench.reps():
                for tool, start in in_turn(tools, rep):
                    costs = bench.costs(*start())
                    payload.same_file(folder / "payload", copy)
                    bench.record(tool=tool, setting=setting, rep=rep, bytes=size, **costs)
                    remove(copy)


def swarm(bench):
    """One seed and N receivers on cables of the same speed; all start together and serve what they have."""
    options, size = bench.options, bench.options.mib * MIB
    folder, speed = payload.single(bench.keep, size), options.mbit * 1e6 / 8
    for n in options.peers:
        bound = max(size / speed, n * size / ((n + 1) * speed))
        for rep in bench.reps():
            with (lab.star(n + 1, 1, options.mbit) as (seed_place, *places, tracker),
                  bench.network(tracker) as network, bench.memory((n + 8) * 2 * size)):
                sample = one_swarm(bench, network, seed_place, places, folder)
            bench.record(rep=rep, peers=n, mbit=options.mbit, bytes=size, bound=bound, **sample)


def one_swarm(bench, network, seed_place, places, folder):
    seed = network.source(seed_place, folder, 1)
    peers, gets, copies = [], [], []
    gate, opener = os.pipe()
    for i, place in enumerate(places):
        peers.append(network.peer(f"peer{i}", place))
        copies.append(bench.work / f"copy{i}")
        gets.append(network.get(f"peer{i}", place, "payload", copies[i], stdin=gate, held=True))
    os.close(gate)
    time.sleep(0.5)  # all wait at the gate
    cpu = [proc.cpu() for proc in (seed, *peers)]
    sent, busy, start = seed.moved("eth0")[1], lab.busy_seconds(), time.monotonic()
    os.close(opener)
    # The deadline is far behind a server that sends N copies one after another.
    lab.wait_for_all(gets, 60 + 3 * len(places) * bench.options.mib * MIB * 8 / (bench.options.mbit * 1e6))
    sent = seed.moved("eth0")[1] - sent
    busy = (lab.busy_seconds() - busy) / os.cpu_count()
    for get in gets:
        get.succeed(1)
    seconds = sorted(get.ended - start for get in gets)
    cpu = [proc.cpu() - before for proc, before in zip((seed, *peers), cpu)]
    wasted = sum(last_event(get)["bytes_wasted"] for get in gets)
    for copy in copies:
        payload.same_file(folder / "payload", copy)
    remove(*copies)
    return {"seconds": seconds[-1], "first_seconds": seconds[0], "seed_sent": sent, "wasted": wasted,
            "busy": busy / seconds[-1], "seed_cpu": cpu[0], "peer_cpu": sum(cpu[1:]) / len(places)}


FIRST_BYTES = 2 * MIB  # on the wire: more than a handshake and the largest manifest


def resume(bench):
    """A download that ends half-way, by SIGKILL or by Ctrl-C, and is started again."""
    size = bench.options.mib * MIB
    folder, copy = payload.single(bench.keep, size), bench.work / "copy"
    with lab.star(0, 3) as (place, far, tracker), bench.network(tracker) as network:
        source = network.source(place, folder, 1)

        def sent():
            return source.moved("eth0")[1]

        for rep in bench.reps():
            base, get = sent(), network.get(bench.member(network, far), far, "payload", copy)
            whole = get.succeed(SECONDS)
            wire = sent() - base
            remove(copy)
            for end, number in (("SIGKILL", signal.SIGKILL), ("Ctrl-C", signal.SIGINT)):
                member = bench.member(network, far)
                base, get = sent(), network.get(member, far, "payload", copy)
                lab.wait_until("half of the file has left the source", SECONDS,
                               lambda: sent() - base >= wire / 2 or get.poll() is not None, 0.001)
                get.signal(number)
                ending = time.monotonic()
                if get.wait(60) == 0:
                    raise Failed(f"it ended before it could be stopped: {get.said()}")
                ending = time.monotonic() - ending
                time.sleep(0.2)  # what is in flight arrives nowhere
                before, get = sent(), network.get(member, far, "payload", copy)
                lab.wait_until("bytes leave the source again", SECONDS,
                               lambda: sent() - before >= FIRST_BYTES or get.poll() is not None, 0.001)
                first = time.monotonic() - get.started
                seconds = get.succeed(SECONDS)
                summary = last_event(get)
                payload.same_file(folder / "payload", copy)
                # Bytes of the file on the wire, framing taken off as it was in the download that nobody disturbed.
                again = (sent() - base) * size / wire - size
                bench.record(setting=end, rep=rep, bytes=size, whole_seconds=whole, stop_seconds=ending,
                             first_byte=first, seconds=seconds, again=again, resumed=summary["bytes_resumed"],
                             fetched=summary["bytes_fetched"], wasted=summary["bytes_wasted"])
                remove(copy)


WINDOW = 10  # seconds over which a limit must be true


def limits(bench):
    """Ten seconds of a limited transfer, and how two receivers share."""
    options = bench.options
    if "--upload-limit" not in lab.sh(options.sprat, "peer", "--help"):
        raise Failed("this sprat has no --upload-limit")
    rate = options.limit_mb * 1_000_000
    cases = (("--upload-limit", 1), ("--upload-limit", 2), ("--download-limit", 1))
    for rep in bench.reps():
        for flag, receivers in cases:
            with lab.star(0, receivers + 2) as (place, *places, tracker), bench.network(tracker) as network:
                sample = one_limit(bench, network, place, places, flag, rate)
            bench.record(setting=f"{flag} {options.limit_mb}MB", receivers=receivers, rep=rep, limit=rate, **sample)


def one_limit(bench, network, place, places, flag, rate):
    """Every receiver fetches a file of its own, so that none can give to another."""
    # Enough for the whole window; of two, also for one that gets more than its half.
    size = rate * (WINDOW + 3) // len(places) * (3 if len(places) > 1 else 2) // 2
    folder = bench.work / "limited"
    files = [payload.write(folder / f"payload{i}", size, i) for i in range(len(places))]
    limit = (flag, f"{rate // 1_000_000}MB")
    network.source(place, folder, len(files), *(limit if flag == "--upload-limit" else ()))
    peers, gets, copies = [], [], []
    for i, far in enumerate(places):
        peers.append(network.peer(f"peer{i}", far, *(limit if flag == "--download-limit" else ())))
        copies.append(bench.work / f"copy{i}")

    def received():
        return [peer.moved("eth0")[0] for peer in peers]

    base = received()
    for i, far in enumerate(places):
        gets.append(network.get(f"peer{i}", far, f"payload{i}", copies[i]))
    time.sleep(1)
    start, first = time.monotonic(), received()
    time.sleep(WINDOW)
    span, last = time.monotonic() - start, received()
    if any(get.poll() is not None for get in gets):
        raise Failed(f"a transfer was over before its time: {gets[0].said()}")
    for get in gets:
        get.succeed(60)
    whole = max(get.ended - get.started for get in gets)
    for file, copy in zip(files, copies):
        payload.same_file(file, copy)
    # A receiver's bytes of the file: what crossed the wire, framing taken off.
    moved = [(b - a) * size / (end - zero) for zero, a, b, end in zip(base, first, last, received())]
    remove(*copies, folder)
    return {"rate": sum(moved) / span, "shares": [one / sum(moved) for one in moved], "seconds": whole}


SUITES = {"single": single, "small": small, "resume": resume, "swarm": swarm, "wan": wan, "limits": limits}
