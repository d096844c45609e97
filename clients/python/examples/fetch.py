#!/usr/bin/env python3
"""Fetches files from a sprat network: joins once with a link, then gets what matches a glob.

python3 fetch.py --link sprat://… --identity me 'models/**' --to downloads/
python3 fetch.py --identity me                                # only lists
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import sprat


def show(progress: sprat.Progress) -> None:
    """One line that is written over; nothing where nobody looks."""
    if sys.stderr.isatty():
        done = 100 * progress.bytes_done / max(1, progress.bytes_total)
        print(f"\r{done:5.1f} % from {len(progress.bytes_from)} peers", end="", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("glob", nargs="?", help="what to get, such as 'models/**'; without it, all files are listed")
    parser.add_argument("--identity", default="me", help="folder of the identity (default: %(default)s)")
    parser.add_argument("--link", help="a join link; needed the first time")
    parser.add_argument("--to", type=Path, default=Path(), help="folder for the files (default: the current one)")
    given = parser.parse_args()
    try:
        if given.link:
            sprat.join(given.link, given.identity)
        with sprat.Network.open(given.identity) as network:
            files = list(network.list(given.glob or ""))
            for file in files:
                if given.glob is None:
                    print(f"{file.size:>14} {file.content_id[:16]} {file.name!r}")
                    continue
                done = network.download(file, given.to, progress=show)
                print(f"{done.path}: {done.size} bytes from {len(done.bytes_from)} peers")
            return 0 if files else 3
    except (sprat.SpratError, OSError) as error:
        print(f"fetch.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
