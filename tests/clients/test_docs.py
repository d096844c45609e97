"""The commands that README.md, docs/grpcurl.md and docs/api.md show, and the Python of docs/api.md, run as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from network import SPRAT, Processes

REPOSITORY = Path(__file__).resolve().parents[2]
Expected = list[tuple[str, str]]
# Part of a command, and what its answer must contain.
EXPECTED: Expected = [
    (r'\$TRACKER"? list\b', r"^sprat\.v1\.TrackerService$"),
    (r'\$TRACKER"? describe sprat\.v1\.TrackerService', r"rpc ListFiles"),
    (r"/ListFiles", r'"name": ?"notes/hello\.txt"'),
    (r'\$TRACKER"? grpc\.health\.v1\.Health/Check', r'"status": ?"SERVING"'),
    (r"/Heartbeat", r'"state": ?"STATE_UNKNOWN"'),
]
EXPECTED_OF_PEERS: Expected = [
    (r'\$PEER"? list\b', r"^sprat\.v1\.ChunkService$"),
    (r'\$PEER"? grpc\.health\.v1\.Health/Check', r'"status": ?"SERVING"'),
]
EXPECTED_OF_THE_API: Expected = [
    (r"/ListFiles", r'"name": ?"notes/hello\.txt"'),
    (r"/WatchFiles", r'"current": ?true'),
    (r"/Register", r'"leaseMs": ?\d+'),
    (r'"generation":1}.*/Heartbeat', r'"state": ?"STATE_RENEWED"'),
    (r'"leaving":true}.*/Heartbeat', r'"state": ?"STATE_LEFT"'),
    (r"/Join", r'"peerId": ?"[a-z2-7]{52}"'),
    (r"/Renew", r'"certificate": ?"'),
    (r"/GetManifest", r'"size": ?"6"'),
    (r"/GetChunks", r'"data": ?"aGVsbG8K"'),
    (r"/WatchHave", r'"complete": ?true'),
    (r"/ReportPiece", r"{"),
    (r"^admin CreateToken", r'"link": ?"sprat://'),
    (r"^admin ListTokens", r'"usesLeft": ?3'),
    (r"^admin ListMembers", r'"online": ?true'),
    (r"^admin (Revoke|Approve)", r"{"),
    (r"^admin IssueOperator", r'"certificate": ?"'),
    (r"^admin LogLevel .*debug", r'"level": ?"debug"'),
    (r"^control LogLevel .*warn", r'"level": ?"warn"'),
    (r"^control Status", r'"trackerState": ?"TRACKER_STATE_ONLINE"'),
    (r"^control Share", r'"path": ?".*/more"'),
    (r"^control Get", r'"bytesTotal": ?"6"'),
    (r'^control Limit .*"upload":50000000', r'"upload": ?"50000000"'),
    (r'^control Limit .*"upload":0', r"{"),
    (r'\$TRACKER"? list\b', r"^sprat\.v1\.TrackerService$"),
    (r"Health/Check", r'"status": ?"SERVING"'),
    (r"describe sprat\.v1\.ChunkService", r"rpc GetChunks"),
]


@pytest.fixture(scope="module")
def variables() -> Iterator[dict[str, str]]:
    """What the pages say that stands in their commands; the network behind it ends with the tests."""
    with Processes() as processes:
        peer_id = processes.peer("peer", {"notes/hello.txt": b"hello\n"})
        processes.peer("other", {"notes/other.txt": b"other\n"})
        with processes.member() as network:
            (row,) = network.list(peer_id=peer_id)
        (processes.folder / "bin").mkdir()
        (processes.folder / "bin" / "sprat").symlink_to(SPRAT.resolve())
        yield {
            "PATH": f"{processes.folder / 'bin'}:{os.environ['PATH']}",
            "STATE": str(processes.state),
            "SPRAT_STATE_DIR": str(processes.state),
            "TRACKER": processes.tracker,
            "LINK": processes.link(uses=20),
            "PEER": row.sources[0].addresses[0],
            "PEER_ID": peer_id,
            "PEER_STATE": str(processes.folder / "other"),
            "CONTENT_ID": row.content_id,
        }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "proto").symlink_to(REPOSITORY / "proto")
    return tmp_path


def commands(text: str) -> list[str]:
    """The commands in the sh blocks of a page, one each, continued lines joined."""
    found: list[str] = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        command = ""
        for line in block.splitlines():
            command += line + "\n"
            whole = not line.endswith(("\\", "|")) and command.count("'") % 2 == 0
            if whole and subprocess.run(["bash", "-nc", command], capture_output=True, check=False).returncode == 0:
                found.append(re.sub(r"\\\n\s*", "", command).strip())
                command = ""
        assert not command.strip(), f"no end: {command}"
    return [command for command in found if command and not command.startswith("#")]


def check(lines: list[str], expected: Expected, variables: dict[str, str], folder: Path) -> None:
    """Runs the commands in one shell; each must succeed, and say what is expected of it."""
    if not shutil.which("grpcurl"):
        pytest.skip("no grpcurl")
    marked = [f"printf '\\n@@\\n'\n{line}\n" for line in lines]
    ran = subprocess.run(
        ["bash", "-euc", "".join(marked)],
        cwd=folder,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    answers = ran.stdout.split("\n@@\n")[1:]
    assert ran.returncode == 0, f"{lines[len(answers) - 1]}\n{ran.stdout}\n{ran.stderr}"
    for command, answer in expected:
        found = [said for line, said in zip(lines, answers) if re.search(command, line, re.DOTALL)]
        assert found, f"no command like {command}"
        for said in found:
            assert re.search(answer, said, re.MULTILINE), f"{command} said {said}, without {answer}"


def test_the_page_about_grpcurl(variables: dict[str, str], folder: Path) -> None:
    lines = commands((REPOSITORY / "docs/grpcurl.md").read_text())
    check(lines, EXPECTED + EXPECTED_OF_PEERS, variables, folder)


def test_the_readme(variables: dict[str, str], folder: Path) -> None:
    _, marker, text = (REPOSITORY / "README.md").read_text().partition("<!-- tested: grpcurl -->")
    block = re.search(r"^```sh\n.*?^```", text, re.MULTILINE | re.DOTALL)
    assert marker and block, "README.md has no sh block marked as tested"
    check(commands(block[0] + "\n"), EXPECTED, variables, folder)


def test_the_page_about_the_api(variables: dict[str, str], folder: Path) -> None:
    check(commands((REPOSITORY / "docs/api.md").read_text()), EXPECTED_OF_THE_API, variables, folder)


def test_the_python_of_the_page_about_the_api(variables: dict[str, str], folder: Path) -> None:
    page = (REPOSITORY / "docs/api.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (folder / "fetched.txt").read_bytes() == b"hello\n"
    assert (folder / "got-too").exists()


def test_the_page_about_the_api_has_every_call() -> None:
    page = (REPOSITORY / "docs/api.md").read_text()
    headings = "\n".join(re.findall(r"^##.*", page, re.MULTILINE))
    for proto in (REPOSITORY / "proto/sprat/v1").glob("*.proto"):
        for kind, name in re.findall(r"^\s*(rpc|service) (\w+)", proto.read_text(), re.MULTILINE):
            assert re.search(rf"\b{name}\b", headings), f"{kind} {name} has no heading in docs/api.md"
