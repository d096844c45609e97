"""The compose file on a real engine: tracker and peers come up, move files, and survive what an operator may meet.

    python3 tests/compose/run.py [--program PATH] [--keep]

Starts deploy/docker-compose.yml as it is, but for shorter intervals and one small disk, from a copy of the tree
with its own deploy/data, as a project of its own. The image is built by deploy/Dockerfile, for which a stand-in hands
out PROGRAM (target/release/sprat) where the toolchain would build it; full_build.py does without the stand-in. Needs
root, a docker engine and Debian's packages; says SKIPPED and why where these are not. Takes everything down again.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
import traceback
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from engine import ROOT, Failed, Images, compose_command, docker, inspect, run, why_not

OWNER = 1234
PATIENCE = 90
SOURCES = ["Cargo.toml", "Cargo.lock", "build.rs", "proto", "src", "benches", "tests/it", "deploy", ".dockerignore"]
HEALTH = {"interval": "1s", "timeout": "10s", "retries": 1, "start_period": "1s"}
QUICK = {"SPRAT_TRACKER_HEARTBEAT_SECONDS": 2, "SPRAT_TRACKER_LEASE_SECONDS": 6}
SMALL = {"driver_opts": {"type": "tmpfs", "device": "tmpfs", "o": f"size=8m,mode=700,uid={OWNER},gid={OWNER}"}}
HARD = ["--read-only", "--cap-drop=ALL", f"--user={OWNER}:{OWNER}"]
TAKES_7700 = 'use IO::Socket::INET; my $s = IO::Socket::INET->new(LocalPort => 7700, Listen => 1) or die; sleep 600'


def until(what, probe, within=PATIENCE):
    """Asks again and again until there is an answer."""
    end = time.monotonic() + within
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > end:
            raise Failed(f"not within {within} s: {what}")
        time.sleep(0.2)


def must(condition, what):
    if not condition:
        raise Failed(what)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Stage:
    """The running compose file, and containers beside it."""

    def __init__(self, work, program):
        self.project = f"sprat-test-{os.getpid()}"
        self.image = f"{self.project}-image"
        self.folder = work / self.project
        self.images = Images(work)
        self.program = program
        self.alone = []

    def prepare(self):
        for name in SOURCES:
            source, target = ROOT / name, self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("data"))
            else:
                shutil.copy(source, target)
        services = {name: {"image": self.image, "healthcheck": HEALTH} for name in ("tracker", "peer1", "peer2", "peer3")}
        services["init"] = {"image": self.image}
        services["tracker"]["environment"] = QUICK
        override = {"services": services, "volumes": {"peer3-state": SMALL}}
        (self.folder / "override.json").write_text(json.dumps(override))
        self.images.debian()
        self.images.rust_with(self.program)

    def compose(self, *words, **options):
        files = ["--file", self.folder / "deploy/docker-compose.yml", "--file", self.folder / "override.json"]
        environment = {**os.environ, "PUID": str(OWNER), "PGID": str(OWNER), "DOCKER_BUILDKIT": "0", "PROMETHEUS_PORT": "0"}
        command = [*compose_command(), "--project-name", self.project, *files]
        return run(*command, *words, env=environment, **options)

    def container(self, service):
        labels = {"project": self.project, "service": service}
        filters = [f"--filter=label=com.docker.compose.{key}={value}" for key, value in labels.items()]
        return docker("ps", "--all", "--quiet", *filters).strip()

    def exec(self, service, *words, **options):
        return docker("exec", self.container(service), *words, **options)

    def drop(self, peer, name, size):
        """Puts a file into a peer's folder as its owner would; its bytes follow from its name."""
        block = hashlib.sha256(name.encode()).digest() * 2048
        path = self.folder / "deploy/data" / peer / name
        with open(path.with_name(f".{name}"), "wb") as file:
            for i in range(0, size, len(block)):
                file.write((i.to_bytes(8, "big") + block[8:])[: size - i])
        path.with_name(f".{name}").rename(path)
        os.chown(path, OWNER, OWNER)
        return path

    def listed(self, peer, name, sources=1):
        def probe():
            rows = self.exec(peer, "sprat", "ls", "--json", name, check=False).stdout.splitlines()
            return any(row["sources"] >= sources for row in map(json.loads, rows))

        until(f"{peer} sees {sources} sources of {name}", probe)

    def get(self, peer, name):
        self.exec(peer, "sprat", "get", name)
        return self.folder / "deploy/data" / peer / name

    def start(self, name, *words, options=()):
        """A container beside the compose file, hardened alike."""
        name = f"{self.project}-{name}"
        self.alone.append(name)
        health = ["--health-interval=1s", "--health-retries=1", "--health-start-period=1s"]
        network = [] if any(option.startswith("--network") for option in options) else [f"--network={self.project}_swarm"]
        docker("run", "--detach", f"--name={name}", *HARD, *health, *network, *options, self.image, *words)
        return name

    def becomes(self, name, status, *words):
        """Waits until the engine calls a container healthy or unhealthy, and its last check says these words."""

        def probe():
            health = inspect(name)["State"].get("Health") or {}
            said = (health.get("Log") or [{"Output": ""}])[-1]["Output"]
            seen[0] = f"{health.get('Status')}, {said.strip()}"
            return health.get("Status") == status and all(word in said for word in words)

        seen = [""]
        try:
            until(f"{name} is {status} and says {words}", probe)
        except Failed as failed:
            raise Failed(f"{failed}, but: {seen[0]}\n{self.log(name)}") from None

    def log(self, name):
        done = docker("logs", name, check=False)
        return done.stdout + done.stderr

    def said_once(self, name, words, before=""):
        lines = [line for line in self.log(name)[len(before) :].splitlines() if words in line]
        must(len(lines) == 1, f"{name} says {words!r} {len(lines)} times:\n{self.log(name)}")

    @contextmanager
    def gone(self, name):
        docker("kill", name)
        try:
            yield
        finally:
            docker("start", name)

    def down(self):
        for name in self.alone:
            docker("rm", "--force", "--volumes", name, check=False)
        if self.folder.exists():
            self.compose("--profile", "monitoring", "down", "--volumes", "--timeout", "1", check=False)
        docker("rmi", "--force", self.image, check=False)
        self.images.restore()
        shutil.rmtree(self.folder, ignore_errors=True)


def comes_up(stage):
    """Comes up unedited, from nothing, and all of it is healthy"""
    stage.compose("up", "--build", "--detach", timeout=600)
    for service in ("tracker", "peer1", "peer2", "peer3"):
        stage.becomes(stage.container(service), "healthy")
    must("sprat://" not in stage.log(stage.container("tracker")), "the join link is in the log")


def is_closed(stage):
    """Runs as nobody much: read-only, no capabilities, limited, and stops with 0"""
    must(inspect(stage.image)["Config"]["User"] == "1000:1000", "the image does not run as 1000:1000")
    for service in ("tracker", "peer1"):
        all_of_it = inspect(stage.container(service))
        host, config = all_of_it["HostConfig"], all_of_it["Config"]
        must(config["User"] == f"{OWNER}:{OWNER}", f"{service} runs as {config['User']}")
        must(host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["CapAdd"], f"{service} may do too much")
        must("no-new-privileges:true" in host["SecurityOpt"], f"{service} may gain privileges")
        must(host["Memory"] and host["NanoCpus"] and host["PidsLimit"], f"{service} has no limits")
        must(host["LogConfig"]["Config"]["max-size"] == "10m", f"the log of {service} has no end")
        must(host["RestartPolicy"]["Name"] == "unless-stopped", f"{service} does not come back")
        must(not host["PortBindings"] and host["NetworkMode"] != "host", f"{service} opens ports")
    must(stage.exec("peer1", "touch", "/x", check=False).returncode != 0, "the root file system is not read-only")
    stage.compose("stop", "peer2")
    must(inspect(stage.container("peer2"))["State"]["ExitCode"] == 0, "a stop is no clean end")
    stage.compose("start", "peer2")
    stage.becomes(stage.container("peer2"), "healthy")


def moves_files(stage):
    """A file dropped into one peer's folder is fetched by the others, byte for byte"""
    film = stage.drop("peer1", "film.mkv", 9_000_001)
    for peer in ("peer2", "peer3"):
        stage.listed(peer, "film.mkv")
        got = stage.get(peer, "film.mkv")
        must(digest(got) == digest(film), f"{peer} has other bytes")
        must(got.stat().st_uid == OWNER, f"what {peer} fetched belongs to {got.stat().st_uid}")


def survives(stage):
    """A download goes on while the tracker and then a source are killed, and both come back"""
    big = stage.drop("peer1", "big.bin", 48 << 20)
    stage.listed("peer2", "big.bin")
    stage.get("peer2", "big.bin")
    stage.listed("peer3", "big.bin", sources=2)
    # Slow until both are gone.
    stage.exec("peer3", "sprat", "limit", "--download", "500KB")
    got = stage.folder / "deploy/data/peer3/big.bin"
    tracker, source = stage.container("tracker"), stage.container("peer1")
    docker("exec", "--detach", stage.container("peer3"), "sprat", "get", "big.bin")
    until("the download began", got.with_name("big.bin.part").exists)
    with stage.gone(tracker):
        # Its main process alone, as a crash would: the engine starts it again by itself.
        os.kill(inspect(source)["State"]["Pid"], 9)
        must(not got.exists(), "the download was over before both were gone")
        stage.exec("peer3", "sprat", "limit", "--download", "none")
        until("the download is complete", got.exists)
        must(digest(got) == digest(big), "the download has other bytes")
        stage.becomes(stage.container("peer2"), "unhealthy", "cannot reach tracker:7700")
    until("the source was started again", lambda: inspect(source)["RestartCount"] >= 1)
    for service in ("tracker", "peer1", "peer2", "peer3"):
        stage.becomes(stage.container(service), "healthy")
    stage.drop("peer1", "later.bin", 100_000)
    stage.listed("peer3", "later.bin")
    must(digest(stage.get("peer3", "later.bin")) == digest(stage.folder / "deploy/data/peer1/later.bin"), "other bytes")


def waits_for_a_link(stage):
    """Without a link, or with one that is used up, a peer waits, says so once, and joins when there is a good one"""
    folder, state = stage.folder / "link", stage.folder / "state"
    for made in (folder, state):
        made.mkdir()
        os.chown(made, OWNER, OWNER)
    options = [f"--volume={folder}:/run/sprat-join:ro", f"--volume={state}:/var/lib/sprat"]
    peer = stage.start("joiner", "peer", "--join-token-file=/run/sprat-join/link", "--keep-trying", options=options)
    stage.becomes(peer, "unhealthy", "no join link in /run/sprat-join/link")

    def put(link):
        file = folder / "new"
        file.write_text(link)
        os.chown(file, OWNER, OWNER)
        file.rename(folder / "link")

    def link():
        return stage.exec("tracker", "sprat", "tracker", "token", "create")

    used = link()
    words = ["sprat", "join", used.strip(), "--identity-only", "/tmp/me"]
    other = ["--rm", f"--network={stage.project}_swarm", "--tmpfs=/tmp:mode=1777", "--entrypoint="]
    docker("run", *HARD, *other, stage.image, *words)
    put(used)
    stage.becomes(peer, "unhealthy", "used up")
    put(link())
    stage.becomes(peer, "healthy")
    stage.said_once(peer, "no join link in /run/sprat-join/link")
    stage.said_once(peer, "used up")
    docker("kill", peer)
    (folder / "link").unlink()
    docker("start", peer)
    stage.becomes(peer, "healthy")


def minds_the_owner(stage):
    """A data folder of somebody else is told, running and starting, and is taken up when it is given back"""
    peer, data = stage.container("peer3"), stage.folder / "deploy/data/peer3"
    before = stage.log(peer)
    os.chown(data, 0, 0)
    data.chmod(0o700)
    stage.becomes(peer, "unhealthy", "/data: Permission denied")
    until("the log says so", lambda: "unattended: /data: Perm" in stage.log(peer)[len(before) :])
    stage.said_once(peer, "unattended: /data: Permission denied", before)
    docker("restart", peer)
    stage.becomes(peer, "unhealthy", "not started yet", "/data")
    os.chown(data, OWNER, OWNER)
    stage.becomes(peer, "healthy")
    stage.said_once(peer, "cannot start yet", before)


def minds_the_port(stage):
    """A port that is taken is told, and taken when it is free"""
    script = f"perl -e '{TAKES_7700}' & wait; exec sleep 600"
    squatter = stage.start("squatter", "-c", script, options=["--entrypoint=/bin/sh"])
    options = [f"--network=container:{squatter}", f"--tmpfs=/var/lib/sprat:mode=700,uid={OWNER}"]
    tracker = stage.start("second", "tracker", "run", "--keep-trying", options=options)
    stage.becomes(tracker, "unhealthy", "the port is in use")
    last = docker("top", squatter, "-o", "pid").split()[-1]
    os.kill(int(last), 15)
    stage.becomes(tracker, "healthy")
    stage.said_once(tracker, "the port is in use")


def minds_the_volume(stage):
    """Without its volume a service says that it has no place for its state"""
    services = {"bare-tracker": ["tracker", "run"], "bare-peer": ["peer", "--join-token-file=/run/sprat-join/link"]}
    for name, words in services.items():
        bare = stage.start(name, *words, "--keep-trying", options=["--user=1000:1000"])
        stage.becomes(bare, "unhealthy", "/var/lib/sprat: Read-only file system")
        lines = stage.log(bare).splitlines()
        must(len(lines) == 1, f"{name} says more than one line: {lines}")


def minds_the_disk(stage):
    """A full disk is told, running and starting, and forgotten when there is room"""
    peer = stage.container("peer3")
    before = stage.log(peer)
    # The small disk is in memory, and lasts as long as somebody uses it.
    volume = f"--volume={stage.project}_peer3-state:/var/lib/sprat"
    stage.start("holder", "600", options=["--entrypoint=/bin/sleep", volume])
    stage.exec("peer3", "sh", "-c", "dd if=/dev/zero of=/var/lib/sprat/fill bs=64k; true", check=False)
    stage.becomes(peer, "unhealthy", "/var/lib/sprat: no room left")
    until("the log says so", lambda: "no room left" in stage.log(peer)[len(before) :])
    stage.said_once(peer, "no room left", before)
    # A change while nothing can be remembered of it.
    stage.drop("peer3", "meanwhile.bin", 300_000)
    stage.listed("peer2", "meanwhile.bin")
    docker("restart", peer)
    stage.becomes(peer, "unhealthy", "/var/lib/sprat: no room left")
    stage.exec("peer3", "rm", "/var/lib/sprat/fill")
    stage.becomes(peer, "healthy")
    stage.listed("peer2", "meanwhile.bin")


def keeps_files(stage):
    """The kept link and certificate are there for those they are for, and come again when they are lost"""
    operator = stage.exec("tracker", "ls", "-l", "/run/sprat-operator", "/run/sprat-join/link")
    must(operator.count("-rw-------") == 4, f"not private: {operator}")
    must(stage.exec("peer1", "ls", "/run/sprat-operator", check=False).returncode != 0, "a peer sees the operator's key")
    stage.exec("tracker", "rm", "/run/sprat-join/link", "/run/sprat-operator/operator.crt")

    def both():
        link = stage.exec("peer1", "cat", "/run/sprat-join/link", check=False).stdout
        return link.startswith("sprat://") and stage.exec(*certificate, check=False).returncode == 0

    certificate = ["tracker", "test", "-s", "/run/sprat-operator/operator.crt"]
    until("both are there again", both)


def monitors(stage):
    """The monitoring profile is sound, and its Prometheus reaches tracker and peers by the kept certificate"""
    wanted = stage.compose("--profile", "monitoring", "config")
    image = next(word for word in wanted.split() if word.startswith("prom/prometheus:"))
    if not stage.images.prometheus(image):
        print("SKIPPED: Prometheus in a container: Debian's prometheus is not installed")
        return
    stage.compose("--profile", "monitoring", "up", "--detach", "prometheus")
    address = docker("port", stage.container("prometheus"), "9090").split()[0]

    def targets():
        try:
            with urllib.request.urlopen(f"http://{address}/api/v1/targets", timeout=5) as answer:
                found = json.load(answer)["data"]["activeTargets"]
        except OSError:
            return None
        seen[:] = [f"{target['scrapeUrl']} {target['health']} {target['lastError']}" for target in found]
        return len(found) == 4 and all(target["health"] == "up" for target in found)

    seen = []
    try:
        until("Prometheus reaches all four", targets)
    except Failed as failed:
        raise Failed(f"{failed}: {seen}\n{stage.log(stage.container('prometheus'))}") from None


STORY = [
    comes_up, is_closed, moves_files, survives, keeps_files, waits_for_a_link, minds_the_owner, minds_the_port,
    minds_the_volume, minds_the_disk, monitors,
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/sprat")
    parser.add_argument("--keep", action="store_true", help="leave everything running after a failure")
    args = parser.parse_args()
    lacking = why_not() or (os.geteuid() != 0 and "needs root, to make images and to change owners")
    if lacking:
        print(f"SKIPPED: containers: {lacking}")
        return 0
    work = ROOT / "target/compose"
    work.mkdir(parents=True, exist_ok=True)
    stage, passed, failed = Stage(work, args.program), 0, 0
    begun = time.monotonic()
    try:
        stage.prepare()
        print(f"images made ({time.monotonic() - begun:.0f} s)", flush=True)
        for part in STORY:
            begun = time.monotonic()
            part(stage)
            passed += 1
            print(f"ok: {part.__doc__} ({time.monotonic() - begun:.0f} s)", flush=True)
    except (Exception, KeyboardInterrupt):
        failed = 1
        traceback.print_exc()
    finally:
        if not (failed and args.keep):
            begun = time.monotonic()
            stage.down()
            print(f"taken down ({time.monotonic() - begun:.0f} s)", flush=True)
    print(f"test result: {'FAILED' if failed else 'ok'}. {passed} passed; {failed} failed;")
    return failed


if __name__ == "__main__":
    sys.exit(main())
