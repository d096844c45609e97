"""Holds what is in deploy/monitoring against a real Prometheus and a real network: promtool reads configuration, rules
and their tests, and the metrics themselves; every metric that a rule or the dashboard names exists; Prometheus scrapes
tracker and peers over TLS with an operator's certificate.

    python3 tests/monitoring/check.py target/release/sprat
"""

import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).parents[2]
MONITORING = ROOT / "deploy/monitoring"
PATIENCE = 90


def free_port():
    """None of those that the kernel gives to outgoing connections meanwhile."""
    while True:
        port = random.randrange(20_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def wait_for(what, probe):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if found := probe():
                return found
        time.sleep(0.1)
    sys.exit(f"not within {PATIENCE} s: {what}")


def get(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def tool(*words, stdin=None):
    ran = subprocess.run(list(map(str, words)), input=stdin, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        sys.exit(f"{' '.join(map(str, words))}\n{ran.stdout}{ran.stderr}")
    print("ok", *words[:3], pathlib.Path(str(words[-1])).name)


class Network:
    """A tracker and a peer that shares a file, which a second one has fetched."""

    def __init__(self, sprat, folder):
        self.sprat, self.folder, self.processes = sprat, folder, []
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPRAT_", "XDG_"))}
        self.env = {**kept, "HOME": str(folder)}
        self.pages, self.ports = {}, {}

    def start(self, argv, log):
        with (self.folder / log).open("wb") as out:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.env, cwd=self.folder)
        self.processes.append(process)

    def run(self, member, *words):
        argv = [self.sprat, "--state-dir", self.folder / member, *words]
        return subprocess.run(argv, env=self.env, cwd=self.folder, capture_output=True, text=True, check=True).stdout

    def serve(self, member, *words):
        any_port = ["--listen", "127.0.0.1:0", "--operator", "127.0.0.1:0"]
        self.start([self.sprat, "-q", "--state-dir", self.folder / member, *words, "--json", *any_port], f"{member}.log")
        log = self.folder / f"{member}.log"
        line = wait_for(f"{member} starts", lambda: "\n" in log.read_text() and log.read_text().splitlines()[0])
        started = json.loads(line)
        self.pages[member] = started["operator"]
        address = started.get("address") or started["addresses"][0]
        self.ports[member] = int(address.rsplit(":", 1)[1])

    def build(self):
        self.serve("tracker", "tracker", "run")
        for member in ("peer1", "peer2"):
            (self.folder / f"{member}-files").mkdir()
            link = self.run("tracker", "tracker", "token", "create").strip()
            self.run(member, "join", link)
        (self.folder / "peer1-files/film").write_bytes(os.urandom(1 << 20))
        self.serve("peer1", "peer", "--share", "peer1-files")
        self.serve("peer2", "peer", "--downloads", "peer2-files")
        wait_for("the file is listed", lambda: "film" in self.run("peer2", "ls"))
        self.run("peer2", "get", "film")
        self.run("tracker", "operator", "cert", "--out", self.folder / "operator")

    def stop(self):
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def named_metrics():
    """Every metric that a rule or the dashboard speaks of, with where."""
    texts = {"alerts.yml": re.findall(r"expr: (?:>-\n)?((?:.+\n)(?:\s{10,}.+\n)*)", (MONITORING / "alerts.yml").read_text())}
    dashboard = json.loads((MONITORING / "grafana/dashboards/sprat.json").read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    texts["sprat.json"] = panels + [variable["query"]["query"] for variable in dashboard["templating"]["list"]]
    assert len(texts["alerts.yml"]) > 10 and len(panels) > 30, "the expressions are not found any more"
    for place, expressions in texts.items():
        for expression in expressions:
            for name in re.findall(r"\bsprat_\w+", expression):
                yield place, name


def check_metrics(network):
    known = set()
    for member, page in network.pages.items():
        text = get(f"http://{page}/metrics")
        tool("promtool", "check", "metrics", stdin=text)
        known |= {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
        print("ok", member, len(text.splitlines()), "lines")
    unknown = sorted({f"{place}: {name}" for place, name in named_metrics() if name not in known})
    if unknown:
        sys.exit("no such metric: " + ", ".join(unknown))
    print("ok", len({name for _, name in named_metrics()}), "metrics are named, and exist")


def check_scrape(network):
    config = (MONITORING / "prometheus.yml").read_text().replace("/run/sprat-operator", str(network.folder / "operator"))
    config = config.replace("tracker:7700", f"127.0.0.1:{network.ports['tracker']}").replace("15s", "1s")
    for n in (1, 2):
        config = config.replace(f"peer{n}:7701", f"127.0.0.1:{network.ports[f'peer{n}']}")
    # The third of the compose file is not there, and must be told as such.
    config = config.replace("peer3:7701", f"127.0.0.1:{free_port()}")
    (network.folder / "prometheus.yml").write_text(config)
    shutil.copy(MONITORING / "alerts.yml", network.folder)
    tool("promtool", "check", "config", network.folder / "prometheus.yml")
    address = f"127.0.0.1:{free_port()}"
    flags = [f"--config.file={network.folder / 'prometheus.yml'}", f"--storage.tsdb.path={network.folder / 'tsdb'}"]
    network.start(["prometheus", *flags, f"--web.listen-address={address}", "--log.level=warn"], "prometheus.log")

    def up():
        found = json.loads(get(f"http://{address}/api/v1/query?query=up"))["data"]["result"]
        states = {sample["metric"]["instance"]: sample["value"][1] for sample in found}
        return states if len(states) == 4 and list(states.values()).count("1") == 3 else None

    states = wait_for("Prometheus scrapes all that is there", up)
    print("ok scraped over TLS:", states)
    found = json.loads(get(f"http://{address}/api/v1/query?query=sprat_ready"))["data"]["result"]
    assert [sample["value"][1] for sample in found] == ["1"] * 3, found


def main():
    if not (shutil.which("promtool") and shutil.which("prometheus")):
        print("SKIPPED: what Prometheus makes of deploy/monitoring: no promtool or prometheus here")
        return
    tool("promtool", "check", "config", "--syntax-only", MONITORING / "prometheus.yml")
    tool("promtool", "check", "rules", MONITORING / "alerts.yml")
    tool("promtool", "test", "rules", MONITORING / "alerts_test.yml")
    with tempfile.TemporaryDirectory(prefix="sprat-monitoring-") as folder:
        network = Network(pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(folder))
        try:
            network.build()
            check_metrics(network)
            check_scrape(network)
        except BaseException:
            for log in network.folder.glob("*.log"):
                print(f"--- {log.name}\n{log.read_text()}", file=sys.stderr)
            raise
        finally:
            network.stop()


if __name__ == "__main__":
    main()
