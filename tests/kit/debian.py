"""Real Debian root file systems, each made once on a machine and kept as an archive: with Python and a C compiler, or
others."""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["PACKAGES", "debian_archive", "own_suite", "unpack_debian"]

SUITE = "bookworm"  # of containers: any would do
PACKAGES = ("gcc", "libc6-dev", "python3-minimal")
CACHE = Path(os.environ.get("KATAPOD_TEST_ROOTS", "/var/cache/katapod-tests"))


def own_suite() -> str:
    """This machine's release, by its code name."""
    return platform.freedesktop_os_release().get("VERSION_CODENAME", SUITE)


def debian_archive(packages: Sequence[str] = PACKAGES, suite: str = SUITE) -> Path:
    """The archive, made with mmdebstrap if there is none for this list of packages.

    The mirror is KATAPOD_TEST_MIRROR, else deb.debian.org.
    """
    key = hashlib.sha256(" ".join([suite, *packages]).encode()).hexdigest()[:12]
    archive = CACHE / f"debian-{suite}-{key}.tar"
    CACHE.mkdir(parents=True, exist_ok=True)
    # all who run tests here make it once; who makes another goes on
    with archive.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not archive.exists():
            _make(archive, packages, suite)
    return archive


def _make(archive: Path, packages: Sequence[str], suite: str) -> None:
    mmdebstrap = shutil.which("mmdebstrap")
    assert mmdebstrap, "mmdebstrap is not installed; packaging/debian-packages-test.txt names what the tests need"
    half = archive.with_suffix(f".{os.getpid()}.tar")
    mirror = os.environ.get("KATAPOD_TEST_MIRROR", "http://deb.debian.org/debian")
    options = ["--variant=minbase", f"--include={','.join(packages)}", "--quiet"]
    options.append("--dpkgopt=force-unsafe-io")  # who loses power begins anew
    try:
        done = subprocess.run(
            [mmdebstrap, *options, suite, str(half), mirror], capture_output=True, text=True, timeout=800, check=False
        )
        assert done.returncode == 0, f"mmdebstrap failed: {done.stderr[-2000:]}"
        os.replace(half, archive)
    finally:
        half.unlink(missing_ok=True)


def unpack_debian(folder: Path, packages: Sequence[str] = PACKAGES, suite: str = SUITE) -> Path:
    """Unpack the archive into `folder`, owners and all; returns it."""
    folder.mkdir(parents=True)
    subprocess.run(
        [
            "tar",
            "--extract",
            "--numeric-owner",
            "--xattrs",
            "--file",
            debian_archive(packages, suite),
            "--directory",
            folder,
        ],
        check=True,
        timeout=180,
    )
    return folder
