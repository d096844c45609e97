"""What is moved: bytes that do not compress and never repeat, made once and kept beside the benchmark.

Invariant: a payload is whole or has another name.
"""
import pathlib
import random
import shutil
import subprocess

from lab import Failed

BLOCK = 4 << 20


def write(path, size, seed):
    """A file of this size; the same bytes for the same seed. AES in counter mode if there is `openssl`."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as f:
        if size > BLOCK and shutil.which("openssl"):
            stream = subprocess.Popen(
                ["openssl", "enc", "-aes-128-ctr", "-K", f"{seed + 1:032x}", "-iv", "0" * 32, "-in", "/dev/zero"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            blocks = iter(lambda: stream.stdout.read(BLOCK), b"")
        else:
            stream, rng = None, random.Random(seed)
            blocks = iter(lambda: rng.randbytes(BLOCK if size > BLOCK else size), b"")
        try:
            while f.tell() < size and (block := next(blocks, None)):
                f.write(block[:size - f.tell()])
            if f.tell() < size:
                raise Failed(f"{path}: the payload ended early")
        finally:
            if stream:
                stream.kill()
                stream.stdout.close()
                stream.wait()
    part.rename(path)
    return path


def single(folder, size, seed=0):
    """A folder with one file, `payload`."""
    folder = pathlib.Path(folder, f"one-{size}-{seed}")
    path = folder / "payload"
    if not path.exists():
        write(path, size, seed)
    with open(path, "rb", buffering=0) as f:  # into the page cache
        while f.read(BLOCK):
            pass
    return folder


def trees(folder, groups):
    """A folder with a tree for each (name, files, bytes of a file), a hundred files to a directory."""
    for seed, (name, files, size) in enumerate(groups):
        rng = random.Random(seed)
        for i in range(files):
            path = pathlib.Path(folder, name, f"{i // 100:03}", f"{i:05}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(rng.randbytes(size))
    return folder


def same_file(a, b):
    """Demands that two files have the same bytes."""
    with open(a, "rb", buffering=0) as one, open(b, "rb", buffering=0) as other:
        at = 0
        while block := one.read(BLOCK):
            if other.read(len(block)) != block:
                raise Failed(f"WRONG BYTES: {b} is not {a}, within {BLOCK} bytes of {at}")
            at += len(block)
        if other.read(1):
            raise Failed(f"WRONG BYTES: {b} is longer than {a}")


def same_tree(a, b):
    """Demands that two folders hold the same files."""
    def files(folder):
        return {path.relative_to(folder): path for path in pathlib.Path(folder).rglob("*") if path.is_file()}

    one, other = files(a), files(b)
    if one.keys() != other.keys():
        raise Failed(f"WRONG FILES: {len(one)} in {a}, {len(other)} in {b}")
    for name, path in one.items():
        same_file(path, other[name])
