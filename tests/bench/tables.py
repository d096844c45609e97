"""Markdown tables from records: medians, and the smallest and largest value beside them."""
import os
import platform
import re
import shutil
import statistics
import subprocess

from lab import GIB, MIB


def cell(values, digits=2):
    """`median [smallest-largest]`; one value alone if there is only one."""
    values = sorted(value for value in values if value is not None)
    if not values:
        return "-"
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} [{values[0]:.{digits}f}-{values[-1]:.{digits}f}]"


def transfer(key):
    """Columns of a comparison of programs: speed, CPU, memory."""
    def rate(record):
        return record["bytes"] / record["seconds"] / 1e6

    def per_gib(record, side):
        return record[f"{side}_cpu"] * GIB / record["bytes"] if f"{side}_cpu" in record else None

    def both(record):
        return sum(per_gib(record, side) or 0 for side in ("source", "sink"))

    def rss(side):
        return lambda record: record[f"{side}_rss"] / 1e6 if f"{side}_rss" in record else None

    return key, [
        ("s", lambda record: record["seconds"], 2), ("MB/s", rate, 1),
        ("source CPU-s/GiB", lambda record: per_gib(record, "source"), 2),
        ("sink CPU-s/GiB", lambda record: per_gib(record, "sink"), 2), ("both", both, 2),
        ("source peak MB", rss("source"), 0), ("sink peak MB", rss("sink"), 0)]


def field(name, scale=1):
    return lambda record: record[name] / scale


TABLES = {
    "single": transfer(["tool"]),
    "wan": transfer(["setting", "tool"]),
    "small": (["setting", "tool"], [
        ("s", field("seconds"), 2), ("files/s", lambda record: record["files"] / record["seconds"], 0),
        ("CPU s, both", lambda record: record["sink_cpu"] + record.get("source_cpu", 0), 2),
        ("sink peak MB", field("sink_rss", 1e6), 0)]),
    "swarm": (["peers", "mbit"], [
        ("last s", field("seconds"), 2), ("bound s", field("bound"), 2),
        ("ratio", lambda record: record["seconds"] / record["bound"], 2), ("first s", field("first_seconds"), 2),
        ("copies from the seed", lambda record: record["seed_sent"] / record["bytes"], 2),
        ("wasted %", lambda record: 100 * record["wasted"] / record["bytes"] / record["peers"], 1),
        ("seed CPU s", field("seed_cpu"), 2), ("CPU s a peer", field("peer_cpu"), 2),
        ("machine busy %", field("busy", 0.01), 0)]),
    "resume": (["setting"], [
        ("undisturbed s", field("whole_seconds"), 2), ("to stop s", field("stop_seconds"), 2),
        ("to the first new bytes s", field("first_byte"), 2), ("second life s", field("seconds"), 2),
        ("fetched again MiB", field("again", MIB), 1), ("resumed MiB", field("resumed", MIB), 0)]),
    "limits": (["setting", "receivers"], [
        ("MB/s", field("rate", 1e6), 2), ("error %", lambda record: 100 * (record["rate"] / record["limit"] - 1), 2),
        ("largest share %", lambda record: 100 * max(record["shares"]), 1), ("whole s", field("seconds"), 2)]),
}


def show(suite, records):
    """Prints the table of a suite."""
    keys, columns = TABLES[suite]
    groups = {}
    for record in records:
        groups.setdefault(tuple(str(record[key]) for key in keys), []).append(record)
    print("| " + " | ".join(keys + [name for name, _, _ in columns] + ["runs"]) + " |")
    print("|" + "---|" * len(keys) + "---:|" * (len(columns) + 1))
    for names, group in groups.items():
        cells = [cell([value(record) for record in group], digits) for _, value, digits in columns]
        print("| " + " | ".join([*names, *cells, str(len(group))]) + " |")


def machine(sprat):
    """What it was measured on, a line."""
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    words = [f"{os.cpu_count()} x {cpu}", f"{memory:.0f} GiB", f"Linux {platform.release()}"]
    for argv in ([sprat, "--version"], ["nginx", "-v"], ["curl", "--version"], ["rsync", "--version"]):
        if shutil.which(argv[0]):
            done = subprocess.run(argv, capture_output=True, text=True)
            version = re.search(r"\d+\.\d+[.\d]*", done.stdout + done.stderr)
            words.append(f"{os.path.basename(argv[0])} {version[0] if version else '?'}")
    return ", ".join(words)
