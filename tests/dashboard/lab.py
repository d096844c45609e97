"""A tracker whose operator page is open, with real peers."""

from __future__ import annotations

import os
import re
import subprocess

from network import Processes

OPERATOR = os.environ | {"SPRAT_TRACKER_OPERATOR": "127.0.0.1:0", "SPRAT_PEER_OPERATOR": "none"}


class Lab(Processes):
    """A network of real processes; the page is at `url`."""

    def run(self, name: str, *words: str) -> None:
        command = [os.environ["SPRAT"], *words, "--state-dir", str(self.folder / name)]
        with (self.folder / f"{name}.out").open("wb") as out, (self.folder / f"{name}.err").open("wb") as err:
            self.processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=OPERATOR
            )

    @property
    def url(self) -> str:
        printed = self.folder / "tracker.out"
        found = self.wait_for("the page's address", lambda: re.search(r"http://\S+", printed.read_text()))
        return found[0]

    def kill(self, name: str) -> None:
        """Ends a process as a power cut would."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def get(self, name: str, file: str) -> subprocess.Popen[bytes]:
        """Begins a download of a member whose peer runs."""
        command = [os.environ["SPRAT"], "get", file, "-o", f"{self.folder}/{name}.got/"]
        command += ["--state-dir", str(self.folder / name)]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=OPERATOR
        )
