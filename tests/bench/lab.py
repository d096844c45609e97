"""Places and programs: network namespaces with limited links, started processes, what they cost and what they moved.

Invariant: what is made here is gone when its `with` block ends, also after Ctrl-C or SIGTERM. If the script itself is
killed, its processes die with it, and the next run removes its namespaces.
"""
import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import threading
import time

PREFIX = "sprat-bench-"
GIB = 1 << 30
MIB = 1 << 20
HEADERS = 14 + 20 + 32  # Ethernet, IPv4, TCP with timestamps; the device counts a segmented packet once
TICK = os.sysconf("SC_CLK_TCK")
# dies with this script; by a program, as code between fork and exec would be run beside the threads of gRPC, which abort
LEASH = ["setpriv", "--pdeathsig", "KILL", "--"]


class Failed(Exception):
    """A sample that must not count; the text says why."""


def clean_up_when_told_to_stop():
    """Lets the first signal to stop unwind every `with` block; further ones are ignored meanwhile."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(*_):
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, stop)


def sh(*argv):
    """Runs a command to its end and gives its standard output."""
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{' '.join(map(str, argv))}: {done.stderr.strip()[-400:]}")
    return done.stdout


def wait_until(what, within, probe, every=0.02):
    """Asks until there is an answer."""
    end = time.monotonic() + within
    while not (found := probe()):
        if time.monotonic() > end:
            raise Failed(f"not within {within:.0f} s: {what() if callable(what) else what}")
        time.sleep(every)
    return found


class Place:
    """Where a program runs: a namespace (or none) and an address in it."""

    def __init__(self, netns, ip):
        self.netns, self.ip = netns, ip


def wait_for_all(procs, within):
    """Waits for the end of each. Asleep meanwhile: one that looked every few milliseconds took a twentieth of the machine
    that it measures."""
    ends, limit = {}, time.monotonic() + within
    try:
        for proc in procs:
            if proc.poll() is None:
                ends[os.pidfd_open(proc.pid)] = proc
        while running := [end for end, proc in ends.items() if proc.code is None]:
            ended, _, _ = select.select(running, [], [], max(0, limit - time.monotonic()))
            if not ended:
                raise Failed(f"not within {within:.0f} s: the end of {ends[running[0]].said()} ({len(running)} running)")
            for end in ended:
                ends[end].poll()
    finally:
        for end in ends:
            os.close(end)


class Proc:
    """A started program; a session of its own, killed by its id only. Its output goes to LOG.out and LOG.err."""

    def __init__(self, argv, log, place=None, env=None, cwd=None, stdin=subprocess.DEVNULL):
        self.argv = [str(word) for word in argv]
        self.out, self.err = pathlib.Path(f"{log}.out"), pathlib.Path(f"{log}.err")
        wrapper = ["ip", "netns", "exec", place.netns] if place and place.netns else []
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.started = time.monotonic()
            self.popen = subprocess.Popen(
                LEASH + wrapper + self.argv, stdin=stdin, stdout=out, stderr=err, env=env, cwd=cwd,
                start_new_session=True)
        self.pid = self.popen.pid
        self.code = self.usage = self.ended = None
        self.peak_rss = 0
        self.read = 0

    def poll(self):
        """The exit code, or None while it runs."""
        if self.code is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.ended, self.usage = time.monotonic(), usage
                self.code = self.popen.returncode = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, within):
        """Waits for the end; the exit code."""
        wait_for_all([self], within)
        return self.code

    def succeed(self, within):
        """Waits for the end, which must be a good one; the seconds since the start."""
        if self.wait(within) != 0:
            raise Failed(f"exit code {self.code} of {self.said()}")
        return self.ended - self.started

    def signal(self, number):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def stop(self):
        """Ends it: TERM, after five seconds KILL."""
        self.signal(signal.SIGTERM)
        try:
            self.wait(5)
        except Failed:
            self.signal(signal.SIGKILL)
            self.wait(5)

    def kill(self):
        """Ends it as a power cut would."""
        self.signal(signal.SIGKILL)
        self.wait(5)

    def said(self):
        """The command and the end of what it printed, for a person."""
        text = self.out.read_text(errors="replace") + self.err.read_text(errors="replace")
        return f"`{' '.join(self.argv)}`: {text[-600:].strip()}"

    def events(self):
        """The JSON lines printed since the last call."""
        with open(self.out, "rb") as f:
            f.seek(self.read)
            whole, _, _rest = f.read().rpartition(b"\n")
        self.read += len(whole) + 1 if whole else 0
        return [json.loads(line) for line in whole.splitlines()]

    def cpu(self):
        """CPU seconds so far, those of ended children included."""
        if self.usage:
            return self.usage.ru_utime + self.usage.ru_stime
        fields = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return sum(int(field) for field in fields[11:15]) / TICK

    def note_rss(self):
        """Takes note of the largest resident set so far (VmHWM), in bytes."""
        with contextlib.suppress(OSError):
            for line in open(f"/proc/{self.pid}/status"):
                if line.startswith("VmHWM:"):
                    self.peak_rss = max(self.peak_rss, int(line.split()[1]) * 1024)

    def moved(self, device):
        """(received, sent) bytes of TCP payload that this device of the program's namespace counted."""
        for line in open(f"/proc/{self.pid}/net/dev"):
            name, _, counts = line.partition(":")
            if name.strip() == device:
                fields = [int(count) for count in counts.split()]
                return fields[0] - HEADERS * fields[1], fields[8] - HEADERS * fields[9]
        raise Failed(f"no device {device} where {self.argv[0]} runs")

    def listens(self, port):
        """Whether somebody in its namespace listens on this port."""
        for table in ("tcp", "tcp6"):
            for line in open(f"/proc/{self.pid}/net/{table}"):
                fields = line.split()
                if fields[3] == "0A" and fields[1].endswith(f":{port:04X}"):
                    return True
        if self.poll() is not None:
            raise Failed(self.said())
        return False


@contextlib.contextmanager
def watch_rss(*procs):
    """Samples the peak memory of programs meanwhile."""
    stop = threading.Event()

    def sample():
        while not stop.wait(0.02):
            for proc in procs:
                proc.note_rss()

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def busy_seconds():
    """CPU seconds of the whole machine so far."""
    user, nice, system, _idle, _wait, irq, softirq = map(int, open("/proc/stat").readline().split()[1:8])
    return (user + nice + system + irq + softirq) / TICK


def wait_quiet(at_most):
    """Waits until the machine is 90 % idle, not longer than this many seconds."""
    end = time.monotonic() + at_most
    while time.monotonic() < end:
        before, at = busy_seconds(), time.monotonic()
        time.sleep(0.5)
        if (busy_seconds() - before) / (time.monotonic() - at) / os.cpu_count() < 0.1:
            return


def remove_namespaces(owner=None):
    """Removes the namespaces of this run, or those of runs that are no more."""
    for line in sh("ip", "netns", "list").splitlines():
        name = line.split()[0]
        if not name.startswith(PREFIX):
            continue
        pid = int(name.removeprefix(PREFIX).split("-")[0])
        if pid == owner or (owner is None and not os.path.exists(f"/proc/{pid}")):
            with contextlib.suppress(Failed):
                sh("ip", "netns", "del", name)


class Namespaces:
    """Makes the namespaces of one topology. Connections in them use cubic, which a stock Linux has, whatever this
    machine prefers: it is a property of their routes, so nothing outside is changed."""

    def __enter__(self):
        remove_namespaces()
        return self

    def __exit__(self, *_):
        remove_namespaces(os.getpid())

    def add(self, name):
        netns = f"{PREFIX}{os.getpid()}-{name}"
        sh("ip", "netns", "add", netns)
        sh("ip", "-n", netns, "link", "set", "lo", "up")
        return netns

    @staticmethod
    def cubic(netns, ip, device):
        sh("ip", "-n", netns, "route", "replace", "local", ip, "dev", device, "table", "local", "proto", "kernel",
           "scope", "host", "src", ip, "congctl", "cubic")
        if device != "lo":
            sh("ip", "-n", netns, "route", "replace", f"{ip.rpartition('.')[0]}.0/24", "dev", device, "src", ip,
               "congctl", "cubic")


@contextlib.contextmanager
def loopback():
    """One place with a loopback device of its own."""
    with Namespaces() as namespaces:
        netns, ip = namespaces.add("lo"), "10.77.0.1"
        sh("ip", "-n", netns, "addr", "add", f"{ip}/32", "dev", "lo")
        namespaces.cubic(netns, ip, "lo")
        yield Place(netns, ip)


@contextlib.contextmanager
def star(limited, unlimited, mbit=100):
    """Places on one bridge; the cables of the first ones let through so many Mbit/s each way (tbf at both ends)."""
    with Namespaces() as namespaces:
        hub = namespaces.add("hub")
        sh("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
        sh("ip", "-n", hub, "link", "set", "bridge", "up")
        places = []
        for i in range(1, limited + unlimited + 1):
            netns, ip, port = namespaces.add(i), f"10.78.0.{i}", f"port{i}"
            sh("ip", "-n", hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", netns)
            sh("ip", "-n", hub, "link", "set", port, "master", "bridge", "up")
            sh("ip", "-n", netns, "addr", "add", f"{ip}/24", "dev", "eth0")
            sh("ip", "-n", netns, "link", "set", "eth0", "up")
            namespaces.cubic(netns, ip, "eth0")
            for where, device in ((netns, "eth0"), (hub, port)) if i <= limited else ():
                sh("tc", "-n", where, "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{mbit}mbit",
                   "burst", "128kb", "latency", "50ms")
            places.append(Place(netns, ip))
        time.sleep(0.3)  # the bridge's ports begin to forward
        yield places


@contextlib.contextmanager
def long_link(rtt_ms, mbit, loss_percent, queue_kib, work):
    """Two places joined by a link with delay, loss and a queue (wanlink.c: works on kernels without netem)."""
    program = pathlib.Path(work, "wanlink")
    sh("cc", "-O2", "-o", program, pathlib.Path(__file__).with_name("wanlink.c"))
    with Namespaces() as namespaces:
        names = [namespaces.add("a"), namespaces.add("b")]
        for netns in names:  # windows that can cover bandwidth x round trip
            sh("ip", "netns", "exec", netns, "sysctl", "-qw", "net.ipv4.tcp_rmem=4096 131072 33554432",
               "net.ipv4.tcp_wmem=4096 16384 33554432")
        link = Proc([program, *names, rtt_ms * 500, mbit, loss_percent, queue_kib], pathlib.Path(work, "wanlink-log"))
        try:
            wait_until(link.said, 5, lambda: all("tw0" in sh("ip", "-n", netns, "-br", "link") for netns in names))
            places = []
            for i, netns in enumerate(names, 1):
                ip = f"10.79.0.{i}"
                sh("ip", "-n", netns, "addr", "add", f"{ip}/24", "dev", "tw0")
                sh("ip", "-n", netns, "link", "set", "tw0", "mtu", "1500", "txqueuelen", "5000", "up")
                Namespaces.cubic(netns, ip, "tw0")
                places.append(Place(netns, ip))
            yield places
        finally:
            link.stop()
