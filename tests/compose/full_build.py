"""Builds deploy/Dockerfile in full: every crate is compiled inside the container, twice, to see that the layer with the
crates is kept. Not part of tests/all.sh, because it takes a quarter of an hour on two cores.

    python3 tests/compose/full_build.py [FLAGS OF docker build]

Needs root, a docker engine, debootstrap, crates.io, and the Rust toolchain of this machine, of which it makes the image
that deploy/Dockerfile begins with, unless there is one.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from engine import DEBIAN, ROOT, RUST, Failed, Images, docker, image_id, run, why_not

IMAGE = "sprat-full-build"
WITH_COMPILER = "sprat-full-build-compiler"
TOOLS = ["gcc", "libc6-dev", "ca-certificates"]
BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")


def toolchain(images):
    """The image of the toolchain: Debian with a compiler, and this machine's own Rust."""
    if image_id(RUST):
        return
    images.take(RUST)
    images.take(WITH_COMPILER)
    archive = images.work / "compiler.tar"
    if not archive.exists():
        images.bootstrap(archive, TOOLS)
    docker("import", archive, WITH_COMPILER)
    root = Path(run("rustc", "--print", "sysroot").strip())
    with tempfile.TemporaryDirectory(dir=images.work) as folder:
        folder = Path(folder)
        (folder / "rust/bin").mkdir(parents=True)
        for name in ("cargo", "rustc"):
            shutil.copy(root / "bin" / name, folder / "rust/bin")
        shutil.copytree(root / "lib", folder / "rust/lib", symlinks=True)
        shutil.copy(BUNDLE, folder / BUNDLE.name)
        lines = [f"FROM {WITH_COMPILER}", "COPY rust /usr/local", f"COPY {BUNDLE.name} {BUNDLE}"]
        (folder / "Dockerfile").write_text("\n".join(lines))
        docker("build", "--quiet", "--tag", RUST, folder, timeout=600)


def build(folder):
    """Seconds that it took, and which steps came out of the cache."""
    begun = time.monotonic()
    words = ["docker", "build", "--file", folder / "deploy/Dockerfile", "--tag", IMAGE, *sys.argv[1:], folder]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            lines = [line for line in process.stdout if not print(line, end="", flush=True)]
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise Failed(f"exit code {process.returncode}")
    return time.monotonic() - begun, sum("Using cache" in line or "CACHED" in line for line in lines)


def main():
    lacking = why_not()
    if lacking:
        print(f"SKIPPED: the full build of the image: {lacking}")
        return 0
    work = ROOT / "target/compose"
    work.mkdir(parents=True, exist_ok=True)
    images = Images(work)
    images.take(IMAGE)
    folder = Path(tempfile.mkdtemp(dir=work))
    try:
        images.debian()
        toolchain(images)
        names = run("git", "-C", ROOT, "ls-files", "-z").split("\0")
        for name in filter(None, names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        first, _ = build(folder)
        with open(folder / "src/lib.rs", "a") as source:
            source.write("// A change.\n")
        again, kept = build(folder)
        print(run("docker", "images", "--format", "{{.Repository}}:{{.Tag}} {{.Size}}"), end="")
        print(docker("run", "--rm", "--read-only", IMAGE, "version"), end="")
        print(f"built in {first:.0f} s; after a change of a source in {again:.0f} s, {kept} steps kept; from {DEBIAN}")
    finally:
        images.restore()
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
