#!/usr/bin/env python3
"""Makes src/sprat/v1 from proto/sprat/v1: messages and services, with types. Run it after a change to the protocol.

    pip install -r requirements-dev.txt
    python3 generate.py

With a folder as its argument it writes there instead; a test compares the two.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
PROTO = HERE.parents[1] / "proto"


def generate(out: Path) -> None:
    """Writes the package `sprat/v1` beneath `out`."""
    package = out / "sprat" / "v1"
    package.mkdir(parents=True, exist_ok=True)
    for old in package.glob("*_pb2*.py*"):
        old.unlink()
    # The plugins of mypy-protobuf stand beside the interpreter, which need not be on the PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kinds = ("python", "grpc_python", "mypy", "mypy_grpc")
    words = ["protoc", f"-I{PROTO}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
    words += [f"--{kind}_out={out}" for kind in kinds]
    words += ["--mypy_opt=quiet", "--mypy_grpc_opt=quiet"]
    words += [str(path) for path in sorted((PROTO / "sprat" / "v1").glob("*.proto"))]
    if protoc.main(words):
        sys.exit("protoc failed")
    (package / "__init__.py").write_text('"""Generated from proto/sprat/v1 by generate.py."""\n')


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "src")
