"""Podman with `kata-runtime` for its runtime: storage, state and network namespace of the tests' own."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from kit.kata import KATA, RUN_PREFIX
from kit.leaks import claim
from kit.oci import make_rootfs

__all__ = ["Podman", "podman_here"]

LIMIT_S = 240.0  # only against hanging
IMAGE = "localhost/tools:1"
INFRA_IMAGE = "localhost/pause:1"  # of pods by `play kube`, which Debian's Podman would have catatonit for


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Podman:
    """IMAGE is there. Containers have no network unless a test asks for one."""

    def __init__(self, directory: Path, netns: str) -> None:
        self.directory = directory
        self.image = IMAGE
        self._words = (
            *(
                "nsenter",
                f"--net=/run/netns/{netns}",
                "podman",
                "--cgroup-manager",
                "cgroupfs",
                "--storage-driver",
                "vfs",
            ),
            *("--root", f"{directory}/storage", "--runroot", f"{directory}/run", "--tmpdir", f"{directory}/tmp"),
            *("--network-config-dir", f"{directory}/networks", "--events-backend", "file"),
        )

    @property
    def states(self) -> Path:
        """The --root of its runtime, which it does not give it."""
        return Path("/run/kata-runtime")

    def command(self, *words: str, runtime: str = KATA, before: Sequence[str] = ()) -> list[str]:
        """The whole command line, with the configuration of `podman_here`; `before`: what starts podman."""
        configuration = f"CONTAINERS_CONF={self.directory}/containers.conf"
        return ["env", configuration, *self._words[:2], *before, *self._words[2:], "--runtime", runtime, *words]

    def __call__(self, *words: str, input: str = "", environment: Mapping[str, str] | None = None) -> Done:
        done = subprocess.run(
            self.command(*words),
            input=input,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            env={**os.environ, **(environment or {})},
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def ok(self, *words: str, input: str = "") -> str:
        done = self(*words, input=input)
        assert done.code == 0, f"podman {' '.join(words)}: {done}"
        return done.out

    def start(self, *words: str) -> str:
        """`run -d WORDS`; returns the id, which is the test's from now on."""
        found = self.ok("run", "-d", *words).strip()
        claim(found)
        return found


@contextlib.contextmanager
def podman_here() -> Iterator[Podman]:
    """All that it has goes with the block."""
    netns = f"{RUN_PREFIX}podman"
    directory = Path(f"/var/lib/{RUN_PREFIX}podman")
    directory.mkdir()
    subprocess.run(["ip", "netns", "add", netns], check=True)
    try:
        subprocess.run(["ip", "-n", netns, "link", "set", "lo", "up"], check=True)
        podman = Podman(directory, netns)
        make_rootfs(directory / "rootfs")
        subprocess.run(["tar", "-C", directory / "rootfs", "-cf", directory / "image.tar", "."], check=True)
        # locks in files below --tmpdir: those of the default are in /dev/shm, for all Podmans of the machine
        (directory / "containers.conf").write_text(f'[engine]\ninfra_image = "{INFRA_IMAGE}"\nlock_type = "file"\n')
        podman.ok("import", "-q", str(directory / "image.tar"), IMAGE)
        pause = 'ENTRYPOINT ["/bin/sleep", "1000"]'
        podman.ok("import", "-q", "--change", pause, str(directory / "image.tar"), INFRA_IMAGE)
        try:
            yield podman
        finally:
            podman("pod", "rm", "-f", "-a", "-t", "0")
            podman("rm", "-f", "-a", "-t", "0")
    finally:
        subprocess.run(["ip", "netns", "del", netns], check=True)
        shutil.rmtree(directory)
