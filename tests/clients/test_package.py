"""The package as others get it: current stubs, types that hold, a wheel that installs, an example that runs."""

from __future__ import annotations

import filecmp
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BIG, World

CLIENT = Path(__file__).resolve().parents[2] / "clients" / "python"


def run(*words: str | Path, **variables: str) -> str:
    environment = os.environ | {"PYTHONPATH": ""} | variables
    ran = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_checked_in_stubs_are_current(tmp_path: Path) -> None:
    """If not, run clients/python/generate.py."""
    run(CLIENT / "generate.py", tmp_path)
    checked_in, fresh = CLIENT / "src/sprat/v1", tmp_path / "sprat/v1"
    names = {path.name for folder in (checked_in, fresh) for path in folder.glob("*.py*")}
    _, different, missing = filecmp.cmpfiles(checked_in, fresh, sorted(names), shallow=False)
    assert (different, missing) == ([], [])


def test_types(tmp_path: Path) -> None:
    words = ["--config-file", str(CLIENT / "pyproject.toml"), "--cache-dir", str(tmp_path)]
    run("-m", "mypy", *words, CLIENT / "src/sprat", CLIENT / "generate.py", CLIENT / "examples")


def test_a_wheel_installs_and_the_example_runs(world: World, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    quiet = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-index"]
    run("-m", "pip", "wheel", *quiet, "--wheel-dir", tmp_path, CLIENT)
    (wheel,) = tmp_path.glob("sprat-*.whl")
    run("-m", "pip", "install", *quiet, "--target", installed, wheel)
    assert (installed / "sprat" / "py.typed").exists() and (installed / "sprat/v1/chunk_pb2.pyi").exists()
    example, me = CLIENT / "examples" / "fetch.py", tmp_path / "me"
    path = {"PYTHONPATH": str(installed)}
    listed = run(example, "--identity", me, "--link", world.processes.link(), **path)
    assert "'notes/left.txt'" in listed
    (tmp_path / "got").mkdir()
    run(example, "--identity", me, "big.bin", "--to", tmp_path / "got", **path)
    assert (tmp_path / "got" / "big.bin").read_bytes() == BIG


@pytest.mark.parametrize("path", sorted([*CLIENT.glob("src/sprat/*.py"), *CLIENT.glob("*.py")]), ids=lambda p: p.name)
def test_files_say_what_they_own_and_are_of_moderate_length(path: Path) -> None:
    text = path.read_text()
    assert text.removeprefix("#!/usr/bin/env python3\n").startswith('"""')
    assert len(text.splitlines()) <= 400
    assert max(map(len, text.splitlines())) <= 120
