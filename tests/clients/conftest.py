"""What all tests share: one network with two peers, and a count of the results as tests/all.sh reads it."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import sprat
from network import Processes

BIG = random.Random(7).randbytes(5 << 20)


@dataclass(frozen=True)
class World:
    """A tracker, and two peers that both hold big.bin."""

    processes: Processes
    left: str
    right: str


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    with Processes() as processes:
        left = processes.peer("left", {"big.bin": BIG, "notes/left.txt": b"left\n"})
        right = processes.peer("right", {"big.bin": BIG, "notes/right.txt": b"right\n", "empty": b""})
        yield World(processes, left, right)


@pytest.fixture
def network(world: World) -> Iterator[sprat.Network]:
    """A new member's connection."""
    with world.processes.member() as network:
        yield network


def pytest_configure() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what the tests started is ended


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = {kind: terminalreporter.stats.get(kind, []) for kind in ("passed", "failed", "error", "skipped")}
    for report in found["skipped"]:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        terminalreporter.write_line(f"SKIPPED: {report.nodeid}: {reason}")
    passed, failed = len(found["passed"]), len(found["failed"]) + len(found["error"])
    # As cargo says it, for tests/all.sh.
    terminalreporter.write_line(
        f"test result: {'FAILED' if failed else 'ok'}. {passed} passed; {failed} failed; 0 ignored"
    )
    terminalreporter.write_line(f"{passed} passed, {failed} failed")
