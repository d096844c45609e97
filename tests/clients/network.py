"""A network of real sprat processes for the tests: a tracker and peers on loopback, in a folder of their own."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import sprat
from sprat.identity import Link

SPRAT = Path(os.environ["SPRAT"])
# Without operator pages, whose default ports all processes would fight for.
QUIET = os.environ | {"SPRAT_TRACKER_OPERATOR": "none", "SPRAT_PEER_OPERATOR": "none"}
T = TypeVar("T")


class Processes:
    """Starts a tracker; everything ends and disappears with `stop`."""

    def __init__(self, *tracker_words: str) -> None:
        self.temporary = tempfile.TemporaryDirectory(prefix="sprat-clients-")
        self.folder = Path(self.temporary.name)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.numbers = itertools.count()
        self.state = self.folder / "tracker"
        try:
            self.run("tracker", "tracker", "run", "--listen", "127.0.0.1:0", *tracker_words)
            printed = self.folder / "tracker.out"
            found = self.wait_for("the tracker's join link", lambda: re.search(r"sprat://\S+", printed.read_text()))
        except BaseException:
            self.stop()
            raise
        self.tracker = Link.parse(found[0]).address

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, name: str, *words: str) -> None:
        """Starts a process that runs until `stop`, with the state directory `name`."""
        command = [str(SPRAT), *words, "--state-dir", str(self.folder / name)]
        with (self.folder / f"{name}.out").open("wb") as out, (self.folder / f"{name}.err").open("wb") as err:
            self.processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=QUIET)

    def wait_for(self, what: str, probe: Callable[[], T | None], seconds: float = 60) -> T:
        """The first true answer of `probe`, which is asked again and again while all processes live."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if answer := probe():
                return answer
            for name, process in self.processes.items():
                if process.poll() is not None:
                    said = (self.folder / f"{name}.err").read_text()
                    raise RuntimeError(f"{name} ended with exit code {process.returncode}: {said}")
            time.sleep(0.05)
        raise TimeoutError(f"{what}: not within {seconds:.0f} s")

    def sprat(self, name: str, *words: str) -> str:
        """Runs a command to its end on the state directory `name`; the answer is its standard output."""
        command = [str(SPRAT), *words, "--state-dir", str(self.folder / name)]
        ran = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
        )
        if ran.returncode:
            raise RuntimeError(f"sprat {' '.join(words)}: exit code {ran.returncode}: {ran.stderr}")
        return ran.stdout

    def link(self, uses: int = 1) -> str:
        return self.sprat("tracker", "tracker", "token", "create", "--uses", str(uses)).strip()

    def peer(self, name: str, files: dict[str, bytes]) -> str:
        """Starts a peer that shares `files`; the answer is its id."""
        for file, data in files.items():
            path = self.folder / f"{name}.share" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self.sprat(name, "join", self.link())
        self.run(name, "peer", "--share", str(self.folder / f"{name}.share"), "--listen", "127.0.0.1:0")
        # A peer's state directory is an identity as good as another.
        with sprat.Network.open(self.folder / name) as network:
            peer_id = network.peer_id
            listed = lambda: {file.name for file in network.list(peer_id=peer_id)}
            self.wait_for(f"the files of {name}", lambda: listed() == {*files})
        return peer_id

    def identity(self) -> Path:
        """The folder of a new member, who joined as any program may."""
        folder = self.folder / f"member-{next(self.numbers)}"
        sprat.join(self.link(), folder)
        return folder

    def member(self) -> sprat.Network:
        """A new member's connection, to be closed by the caller."""
        return sprat.Network.open(self.identity())

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.temporary.cleanup()
