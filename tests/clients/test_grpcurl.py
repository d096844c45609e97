"""The commands that docs/grpcurl.md and README.md show, run as they stand there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

from network import SPRAT, Network
from sprat_client import Client

REPOSITORY = Path(__file__).resolve().parents[2]
# Part of a command, and what its answer must contain.
EXPECTED = [
    (r'\$TRACKER"? list\b', r"^sprat\.v1\.TrackerService$"),
    (r'\$TRACKER"? describe sprat\.v1\.TrackerService', r"rpc ListFiles"),
    (r"/ListFiles", r'"name": ?"notes/hello\.txt"'),
    (r'\$TRACKER"? grpc\.health\.v1\.Health/Check', r'"status": ?"SERVING"'),
    (r"/Heartbeat", r'"state": ?"STATE_UNKNOWN"'),
]
EXPECTED_OF_PEERS = [
    (r'\$PEER"? list\b', r"^sprat\.v1\.ChunkService$"),
    (r'\$PEER"? grpc\.health\.v1\.Health/Check', r'"status": ?"SERVING"'),
]
network: Network
variables: dict[str, str]


def setUpModule() -> None:
    global network, variables
    if not shutil.which("grpcurl"):
        raise unittest.SkipTest("no grpcurl")
    network = Network()
    unittest.addModuleCleanup(network.stop)
    peer_id = network.peer("peer", {"notes/hello.txt": b"hello\n"})
    with Client(network.member()) as client:
        (row,) = client.list_files(peer_id=peer_id)
    folder = Path(tempfile.mkdtemp(dir=network.folder))
    (folder / "sprat").symlink_to(SPRAT.resolve())
    variables = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "STATE": str(network.state),
        "SPRAT_STATE_DIR": str(network.state),
        "TRACKER": network.tracker,
        "PEER": row.sources[0].addresses[0],
        "PEER_ID": peer_id,
    }


def commands(text: str) -> list[str]:
    """The commands in the sh blocks of a page, one each, continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = re.sub(r"\s*\\\n\s*", " ", "".join(blocks)).splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


class Documented(unittest.TestCase):
    def check(self, lines: list[str], expected: list[tuple[str, str]]) -> None:
        """Runs the commands in one shell, in an empty folder; each must succeed, and say what is expected of it."""
        marked = [f"printf '\\n@@\\n'\n{line}\n" for line in lines]
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | variables | {"LINK": network.link()}
            ran = subprocess.run(
                ["bash", "-euc", "".join(marked)],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
        answers = ran.stdout.split("\n@@\n")[1:]
        self.assertEqual(ran.returncode, 0, f"{lines[len(answers) - 1]}\n{ran.stdout}\n{ran.stderr}")
        for command, answer in expected:
            found = [said for line, said in zip(lines, answers) if re.search(command, line)]
            self.assertTrue(found, f"no command like {command}")
            for said in found:
                self.assertRegex(said, re.compile(answer, re.MULTILINE))

    def test_the_page_about_grpcurl(self) -> None:
        self.check(commands((REPOSITORY / "docs/grpcurl.md").read_text()), EXPECTED + EXPECTED_OF_PEERS)

    def test_the_readme(self) -> None:
        readme = REPOSITORY / "README.md"
        _, marker, text = readme.read_text().partition("<!-- tested: grpcurl -->") if readme.exists() else ("",) * 3
        if not marker:
            self.skipTest("README.md has no commands marked as tested")
        block = re.search(r"^```sh\n.*?^```", text, re.MULTILINE | re.DOTALL)
        assert block, "no sh block after the mark in README.md"
        self.check(commands(block[0] + "\n"), EXPECTED)
