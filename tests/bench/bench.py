#!/usr/bin/env python3
"""Measures sprat and prints Markdown tables; docs/performance.md says what the columns mean.

Needs root, Linux, the commands `ip` and `tc`, and Python 3.11 or newer. All traffic stays in network namespaces that
this script makes and removes. What is compared with runs if it is installed: nginx with curl, rsync.
"""
import argparse
import os
import pathlib
import shutil
import sys
import tempfile

import tables
from lab import Failed, clean_up_when_told_to_stop
from suites import SUITES, Bench

ROOT = pathlib.Path(__file__).resolve().parents[2]
MIB = {"single": 4096, "resume": 4096, "swarm": 64}


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--sprat", default=ROOT / "target/release/sprat", help="the program to measure")
    parser.add_argument("--reps", type=int, default=5, help="samples of each row (5)")
    parser.add_argument("--mib", type=int, help=f"size of the file ({MIB}; wan: 256, and 32 with loss)")
    parser.add_argument("--peers", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4, 8, 16],
                        help="swarm: receivers (1,2,4,8,16)")
    parser.add_argument("--mbit", type=int, default=100, help="swarm: speed of every cable, each way (100)")
    parser.add_argument("--limit-mb", type=int, default=20, help="limits: the limit, MB/s (20)")
    parser.add_argument("--divide", type=int, default=1, help="small: so many times fewer files (1)")
    parser.add_argument("--dir", default=os.path.join(tempfile.gettempdir(), "sprat-bench"),
                        help="a folder on the disk to measure; payloads stay there for the next run (%(default)s)")
    parser.add_argument("--tmpfs", default="/dev/shm", help="small: a folder in memory (/dev/shm)")
    parser.add_argument("--quiet", type=float, default=0, help="wait so many seconds at most for an idle machine (0)")
    parser.add_argument("--hold-memory", action="store_true",
                        help="single, swarm: take all free memory but what a sample needs meanwhile, on a virtual machine "
                             "that gives freed memory back to its host")
    parser.add_argument("--out", help="append the records to this file, a JSON object a line")
    chosen = parser.parse_args()
    chosen.mib = chosen.mib or MIB.get(chosen.suite)
    return chosen


def remove_left_over(folder):
    """Removes the working folders of runs that were killed."""
    for path in folder.glob("sprat-bench-work-*"):
        if not os.path.exists(f"/proc/{path.name.rpartition('-')[2]}"):
            shutil.rmtree(path, ignore_errors=True)


def main():
    chosen = options()
    if os.geteuid() != 0:
        sys.exit("bench.py: needs root, for network namespaces")
    clean_up_when_told_to_stop()
    bench = Bench(chosen)
    for folder in (bench.keep, pathlib.Path(chosen.tmpfs)):
        remove_left_over(folder)
    bench.work.mkdir(parents=True)
    failure = None
    try:
        SUITES[chosen.suite](bench)
    except (Failed, KeyboardInterrupt) as error:
        failure = str(error) or "interrupted"
    finally:
        shutil.rmtree(bench.work, ignore_errors=True)
    if bench.records:
        print(f"\n`tests/bench/bench.py {' '.join(sys.argv[1:])}` on {tables.machine(chosen.sprat)}:\n")
        tables.show(chosen.suite, bench.records)
    if failure:
        sys.exit(f"bench.py: {failure}")


if __name__ == "__main__":
    main()
