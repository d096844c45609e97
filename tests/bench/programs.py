"""The programs that are compared: a sprat network, and what it is measured beside.

Invariant: every program a block started has ended when the block ends.
"""
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess

from lab import Failed, Proc, wait_until

SECONDS = 900  # longer than any one step may take


def clean_environment(home):
    """Ours, without the settings of whoever runs the benchmark."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPRAT_", "XDG_"))}
    return {**kept, "HOME": str(home), "SPRAT_TRACKER_OPERATOR": "none", "SPRAT_PEER_OPERATOR": "none"}


class Network:
    """A tracker and peers of one run of `sprat`, in a folder of their own."""

    def __init__(self, program, work, tracker_place=None):
        self.program, self.place = pathlib.Path(program).resolve(), tracker_place
        self.work = pathlib.Path(work, "network")
        self.env = clean_environment(self.work)
        self.procs, self.count = [], 0

    def __enter__(self):
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        ip = self.place.ip if self.place else "127.0.0.1"
        tracker = self.spawn("tracker", self.place, "tracker", "run", "--json", "--listen", f"{ip}:0")
        self.first_line(tracker)
        self.link = self.run("tracker", self.place, "tracker", "token", "create", "--uses", "1000", "--ttl", "24h")
        return self

    def __exit__(self, *_):
        for proc in self.procs:
            proc.signal(signal.SIGTERM)
        for proc in self.procs:
            proc.stop()
        shutil.rmtree(self.work, ignore_errors=True)

    def command(self, member, *args):
        return [self.program, "--no-input", "--state-dir", self.work / member, *args]

    def spawn(self, member, place, *args, stdin=subprocess.DEVNULL, held=False):
        """Starts a command of a member; `held`: it waits until its standard input ends."""
        self.count += 1
        argv = self.command(member, *args)
        if held:
            argv = ["sh", "-c", 'read -r go; exec "$@"', "sh", *argv]
        proc = Proc(argv, self.work / f"{self.count}-{member}", place, self.env, self.work, stdin)
        self.procs.append(proc)
        return proc

    def run(self, member, place, *args):
        """Runs a command of a member to its end and gives what it printed."""
        proc = self.spawn(member, place, *args)
        proc.succeed(60)
        self.procs.remove(proc)
        return proc.out.read_text().strip()

    def kill(self, proc):
        """Ends a program of this network as a power cut would."""
        proc.kill()
        self.procs.remove(proc)

    @staticmethod
    def first_line(proc):
        def probe():
            found = proc.events()
            if not found and proc.poll() is not None:
                raise Failed(proc.said())
            return found

        return wait_until(proc.said, 60, probe, 0.005)[0]

    def join(self, member, place=None):
        self.run(member, place, "join", self.link.splitlines()[-1])

    def peer(self, member, place=None, *flags):
        """Joins (once) and starts a peer; returns when it listens."""
        if not (self.work / member).exists():
            self.join(member, place)
        downloads = self.work / f"{member}-downloads"
        downloads.mkdir(exist_ok=True)
        if "--listen" not in flags:
            flags += ("--listen", f"{place.ip if place else '127.0.0.1'}:0")
        proc = self.spawn(member, place, "peer", "--json", "--downloads", downloads, *flags)
        self.first_line(proc)
        return proc

    def source(self, place, folder, files, *flags):
        """A peer that shares this folder; returns when all its files are listed."""
        proc = self.peer("source", place, "--share", folder, *flags)
        self.wait_listed(place, files)
        return proc

    def wait_listed(self, place, files, pattern=None):
        """Waits until so many files (that match) are listed."""
        words = ["search" if pattern else "ls", *([pattern] if pattern else []), "--json"]
        if not (self.work / "observer").exists():
            self.join("observer", place)

        def probe():
            proc = self.spawn("observer", place, *words)
            proc.wait(60)
            self.procs.remove(proc)
            return len(proc.out.read_text().splitlines()) >= files

        wait_until(f"{files} files are listed", SECONDS, probe, 0.2)

    def get(self, member, place, what, output, **more):
        """Starts `sprat get`; the member has joined before."""
        return self.spawn(member, place, "get", what, "-o", output, "--json", **more)


def last_event(proc):
    """The summary that ends `get --json`."""
    found = [event for event in proc.events() if event["event"] in ("done", "failed")]
    if not found:
        raise Failed(f"no summary from {proc.said()}")
    return found[-1]


NGINX = """
daemon off; master_process off; pid {work}/nginx.pid; error_log stderr warn;
events {{ worker_connections 512; }}
http {{
  access_log off; sendfile on; tcp_nopush on;
  client_body_temp_path {work}/t1; proxy_temp_path {work}/t2; fastcgi_temp_path {work}/t3;
  uwsgi_temp_path {work}/t4; scgi_temp_path {work}/t5;
  server {{
    listen {ip}:8443 ssl; root {folder};
    ssl_certificate {work}/tls.crt; ssl_certificate_key {work}/tls.key;
    ssl_protocols TLSv1.3; ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
  }}
}}
"""

RSYNCD = """
use chroot = no
uid = root
gid = root
[data]
path = {folder}
read only = yes
"""


@contextlib.contextmanager
def server(argv, port, log, place):
    """A server that listens on this port."""
    proc = Proc(argv, log, place)
    try:
        wait_until(proc.said, 20, lambda: proc.listens(port))
        yield proc
    finally:
        proc.stop()


@contextlib.contextmanager
def nginx(place, folder, work):
    """HTTPS: TLS 1.3, AES-128-GCM, a P-256 certificate. None if it is not installed. Yields it and a function that
    gives the command to fetch a file."""
    if not (shutil.which("nginx") and shutil.which("curl")):
        yield None, None
        return
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=bench", "-addext", f"subjectAltName=IP:{place.ip}", "-keyout", work / "tls.key",
         "-out", work / "tls.crt"], check=True, capture_output=True)
    conf = work / "nginx.conf"
    conf.write_text(NGINX.format(work=work, ip=place.ip, folder=folder))

    def fetch(name, target):
        return ["curl", "-sS", "--fail", "--http1.1", "--cacert", work / "tls.crt", "-o", target,
                f"https://{place.ip}:8443/{name}"]

    with server(["nginx", "-e", "stderr", "-c", conf], 8443, work / "nginx", place) as proc:
        yield proc, fetch


@contextlib.contextmanager
def rsync_daemon(place, folder, work):
    """An rsync daemon (no encryption). None if it is not installed. Yields it and a function as `nginx` does."""
    if not shutil.which("rsync"):
        yield None, None
        return
    conf = work / "rsyncd.conf"
    conf.write_text(RSYNCD.format(folder=folder))
    argv = ["rsync", "--daemon", "--no-detach", f"--config={conf}", f"--address={place.ip}", "--port=8730"]

    def fetch(name, target):
        return ["rsync", "-r", "-W", f"rsync://{place.ip}:8730/data/{name}", f"{target}/"]

    with server(argv, 8730, work / "rsyncd", place) as proc:
        yield proc, fetch
