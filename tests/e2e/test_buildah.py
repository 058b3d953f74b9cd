"""Buildah, and Podman's build, with `kata-runtime` for their runtime: each RUN in a VM of its own."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.kata import KATA, RUN_PREFIX
from kit.oci import make_rootfs
from kit.pod_network import in_netns, open_netns

pytestmark = pytest.mark.skipif(shutil.which("buildah") is None, reason="buildah is not installed")

LIMIT_S = 240.0  # only against hanging
FILE = """
FROM localhost/tools:1 AS first
WORKDIR /work
COPY given given
RUN cat given > copied && echo one > /one && dd if=/dev/zero of=/zeros bs=1000 count=1000 && kill -0 $$
FROM localhost/tools:1
COPY --from=first --chown=5:6 /one /zeros /work/copied /
USER 5:6
RUN echo kernel $(cat /proc/sys/kernel/osrelease) && id -u >> /one && cat /one
CMD ["cat", "/one"]
"""


class Buildah:
    """What it has is below `directory`."""

    def __init__(self, directory: Path, netns: str) -> None:
        self.directory = directory
        self._netns = netns

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        storage = (
            "--storage-driver",
            "vfs",
            "--root",
            f"{self.directory}/storage",
            "--runroot",
            f"{self.directory}/run",
        )
        environment = {**os.environ, "BUILDAH_ISOLATION": "oci"}
        return subprocess.run(
            in_netns(self._netns, ["buildah", *storage, *words]),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            env=environment,
        )

    def ok(self, *words: str) -> str:
        done = self(*words)
        assert done.returncode == 0, f"buildah {' '.join(words)}: {done}"
        return done.stdout


@pytest.fixture(scope="module")
def buildah() -> Iterator[Buildah]:
    name = f"{RUN_PREFIX}buildah"
    directory = Path("/var/lib") / name
    directory.mkdir()
    with open_netns(name):
        try:
            make_rootfs(directory / "rootfs")
            for file in ("hostname", "hosts", "resolv.conf"):  # to mount on: made for that they have another mode
                (directory / "rootfs/etc" / file).touch()
            found = Buildah(directory, name)
            found.ok("from", "--name", "tools", "scratch")
            found.ok("copy", "tools", f"{directory}/rootfs", "/")
            found.ok("config", "--env", "PATH=/bin", "tools")
            found.ok("commit", "-q", "tools", "localhost/tools:1")
            yield found
            found.ok("rm", "-a")
        finally:
            shutil.rmtree(directory)


def test_an_image_is_as_with_runc(buildah: Buildah, tmp_path: Path) -> None:
    """But for times, which are left out of both, the digests are the same."""
    (tmp_path / "given").write_text("given")
    (tmp_path / "Containerfile").write_text(FILE)
    words = ("bud", "--timestamp", "0", "--network", "none", "--no-cache", "--iidfile", f"{tmp_path}/id")
    images = []
    for runtime in ("runc", KATA):
        out = buildah.ok(*words, "--runtime", runtime, str(tmp_path))
        assert "\none\n5\n" in out
        assert (f"kernel {os.uname().release}\n" in out) == (runtime == "runc")
        images.append((tmp_path / "id").read_text())
    assert images[0] == images[1]


def test_run(buildah: Buildah) -> None:
    run = ("run", "--runtime", KATA, "--network", "none", "tools", "sh", "-c")
    done = buildah(*run, "echo written > /tmp/written; cat /proc/sys/kernel/osrelease; exit 4")
    assert done.returncode == 4
    assert done.stdout not in ("", f"{os.uname().release}\n")
    assert buildah.ok("run", "--runtime", "runc", "--network", "none", "tools", "cat", "/tmp/written") == "written\n"
    refused = buildah("run", "--runtime", KATA, "--network", "host", "tools", "true")
    assert refused.returncode != 0
    assert "cannot use the host's network" in refused.stderr
