"""A docker engine without a registry: commands, and base images made of Debian's packages.

Invariant: an image is made under the very name that deploy/Dockerfile gives it, and whatever had that name before has it
again afterwards.
"""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUITE = "bookworm"
DEBIAN = "debian:bookworm-slim"
RUST = "rust:1-bookworm"
# Stands where the toolchain would be, and hands out a program that was built before.
CARGO = "#!/bin/sh\nmkdir -p target/release && cp /prebuilt/sprat target/release/sprat\n"


class Failed(Exception):
    """A command or a check that did not do what it was to do."""


def run(*words, check=True, timeout=300, **options):
    """Runs a command to its end; gives its standard output, and on failure everything it said."""
    options.setdefault("stdin", subprocess.DEVNULL)
    try:
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=timeout, **options)
    except subprocess.TimeoutExpired as expired:
        raise Failed(f"{' '.join(map(str, words))}: not done after {timeout} s") from expired
    if check and done.returncode != 0:
        raise Failed(f"{' '.join(map(str, words))}: exit code {done.returncode}\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout if check else done


def docker(*words, **options):
    return run("docker", *words, **options)


def inspect(name):
    return json.loads(docker("inspect", name))[0]


def why_not():
    """What this machine lacks for these tests, if anything."""
    if not shutil.which("docker") or run("docker", "info", check=False, timeout=60).returncode != 0:
        return "no docker engine answers here"
    if not compose_command():
        return "neither docker-compose nor docker compose is here"
    if not image_id(DEBIAN) and not shutil.which("debootstrap"):
        return f"no image {DEBIAN}, and no debootstrap to make it"
    return None


def compose_command():
    for words in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(words[0]) and run(*words, "version", check=False).returncode == 0:
            return words
    return None


def image_id(name):
    found = run("docker", "image", "inspect", "--format", "{{.Id}}", name, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def remove_stages(base):
    """Removes what a build from this image left without a name: a stage that was only copied from."""
    for stage in docker("images", "--quiet", "--no-trunc", "--filter=dangling=true").split():
        parent = stage
        while parent and parent != base:
            parent = inspect(parent).get("Parent")
        if parent and stage != base:
            docker("rmi", stage, check=False)


class Images:
    """Base images, and what had their names before."""

    def __init__(self, work):
        self.work = work
        self.before = {}

    def take(self, name):
        self.before.setdefault(name, image_id(name))

    def debian(self):
        """Debian itself, unless it is here. The archive of it is kept for the next time."""
        if image_id(DEBIAN):
            return
        self.take(DEBIAN)
        archive = self.work / "debian.tar"
        if not archive.exists():
            self.bootstrap(archive, [])
        docker("import", archive, DEBIAN)

    def bootstrap(self, archive, packages):
        """In memory, because dpkg syncs every file it writes."""
        folder = Path(tempfile.mkdtemp(dir=self.work))
        run("mount", "-t", "tmpfs", "-o", "mode=755", "sprat-debian", folder)
        try:
            include = [f"--include={','.join(packages)}"] if packages else []
            run("debootstrap", "--variant=minbase", *include, SUITE, folder / "root", timeout=900)
            for lists in ("var/cache/apt/archives", "var/lib/apt/lists"):
                shutil.rmtree(folder / "root" / lists)
            made = archive.with_suffix(".part")
            run("tar", "-C", folder / "root", "-cf", made, ".")
            made.rename(archive)
        finally:
            run("umount", folder)
            folder.rmdir()

    def rust_with(self, program):
        """In place of the toolchain: something called cargo that gives `program`."""
        self.take(RUST)
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            folder = Path(folder)
            shutil.copy(program, folder / "sprat")
            (folder / "cargo").write_text(CARGO)
            (folder / "cargo").chmod(0o755)
            lines = [f"FROM {DEBIAN}", "COPY sprat /prebuilt/sprat", "COPY cargo /usr/local/bin/cargo"]
            (folder / "Dockerfile").write_text("\n".join(lines))
            docker("build", "--quiet", "--tag", RUST, folder)

    def prometheus(self, name):
        """Debian's, under the name of the image that the compose file wants. False if it is not on this machine."""
        program = shutil.which("prometheus")
        if not program:
            return False
        self.take(name)
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            folder = Path(folder)
            shutil.copy(program, folder / "prometheus")
            lines = [f"FROM {DEBIAN}", "COPY prometheus /bin/prometheus", "RUN install -d -o nobody /prometheus"]
            lines += ["WORKDIR /prometheus", "USER nobody", 'ENTRYPOINT ["/bin/prometheus"]']
            (folder / "Dockerfile").write_text("\n".join(lines))
            docker("build", "--quiet", "--tag", name, folder)
        return True

    def restore(self):
        for name, former in reversed(self.before.items()):
            remove_stages(image_id(name))
            docker("rmi", "--force", name, check=False)
            if former:
                docker("tag", former, name, check=False)
