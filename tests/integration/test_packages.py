"""The Debian package in a Debian of its own, from its installation to its purge, and the RPM as rpm itself sees it.

The Debian has its own /run, mounts and host name by namespaces, so that nothing of this machine is taken for its own;
its guests boot the kernel of this machine.
"""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kit.accel import QEMU_ACCELERATOR, VARIABLE
from kit.debian import own_suite, unpack_debian
from kit.kata import RUN_PREFIX, Result, wait_for

ROOT = Path(__file__).parents[2]
CONTROL = ROOT / "packaging/deb/control.in"
LIBRARY = "/usr/lib/katapod"
# Walkthrough row W5. What took the place of kata-netmon, nsdax, rootfs-builder: packaging/README.osbuilder.md
KATA_PATHS = (
    "/etc/crio/crio.conf.d/50-kata",
    "/usr/bin/containerd-shim-kata-v2",
    "/usr/bin/kata-collect-data.sh",
    "/usr/bin/kata-monitor",
    "/usr/bin/kata-runtime",
    "/usr/lib/systemd/system/kata-osbuilder-generate.service",
    "/usr/libexec/kata-containers/VERSION",
    "/usr/libexec/kata-containers/agent/usr/bin/kata-agent",
    "/usr/libexec/kata-containers/agent/usr/lib/systemd/system/kata-agent.service",
    "/usr/libexec/kata-containers/agent/usr/lib/systemd/system/kata-containers.target",
    "/usr/libexec/kata-containers/osbuilder/dracut",
    "/usr/libexec/kata-containers/osbuilder/kata-osbuilder.sh",
    "/usr/share/bash-completion/completions/kata-runtime",
    "/usr/share/doc/kata-containers/README.md",
    "/usr/share/kata-containers/defaults/configuration.toml",
    "/usr/share/licenses/kata-containers/LICENSE",
    "/var/cache/kata-containers",
)

pytestmark = pytest.mark.timeout(600)


def call(*argv: str | Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(one) for one in argv], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both packages hold."""
    folder = tmp_path_factory.mktemp("stage")
    call(ROOT / "tools/stage-package", folder)
    return folder


@dataclass(frozen=True)
class Debian:
    """A Debian in namespaces, which `pid` holds open."""

    root: Path
    pid: int

    def __call__(self, *command: str, timeout: float = 240) -> Result:
        entered = ["nsenter", f"--target={self.pid}", "--mount", "--uts", "--ipc", "--"]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "KATAPOD_NETWORK": "none"}
        # what the package depends on has no User-mode Linux; that QEMU's KVM boots guests or not is found out elsewhere
        environment |= {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C", VARIABLE: QEMU_ACCELERATOR.value}
        done = subprocess.run(
            [*entered, *command], capture_output=True, text=True, env=environment, timeout=timeout, check=False
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def ok(self, *command: str, timeout: float = 240) -> str:
        result = self(*command, timeout=timeout)
        assert result.code == 0, f"{command}: {result}"
        return result.stdout

    def has(self, path: str) -> bool:
        return os.path.lexists(f"{self.root}{path}")


def depends() -> list[str]:
    """What the package depends on: each a package, or alternatives, with versions."""
    found = re.search(r"^Depends: (.*)$", CONTROL.read_text(), re.MULTILINE)
    assert found is not None
    return [part.strip() for part in found[1].split(",")]


def chosen(dependency: str) -> str:
    """The one of several alternatives that this machine has."""
    names = [alternative.split()[0] for alternative in dependency.split("|")]
    status = ["dpkg-query", "--show", "--showformat=${db:Status-Status}"]
    there = [name for name in names if subprocess.run([*status, name], capture_output=True).stdout == b"installed"]
    return (there or names)[0]


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Debian]:
    """This machine's release, with all that the package depends on, and nothing of Katapod's."""
    names = dict.fromkeys(chosen(part) for part in depends())
    root = unpack_debian(tmp_path_factory.mktemp("packages") / "debian", ["man-db", *names], own_suite())
    (root / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
    (root / "usr/sbin/policy-rc.d").chmod(0o755)
    script = f"""
        set -e
        mount --make-rprivate /
        mount --bind {root} {root} # / has to be a mount: virtiofsd changes its propagation
        for one in proc sys dev; do mount --rbind /$one {root}/$one; done
        mount -t tmpfs run {root}/run
        mkdir -p {root}/lib/modules {root}/boot
        mount --bind /boot {root}/boot; mount --bind /lib/modules {root}/lib/modules
        cd {root}; pivot_root . mnt; umount --lazy /mnt
        echo ready; exec sleep infinity
    """
    holder = subprocess.Popen(
        ["unshare", "--mount", "--uts", "--ipc", "sh", "-c", script], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"ready\n"
        yield Debian(root, holder.pid)
    finally:
        for pid in _inside(holder.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        holder.kill()
        holder.wait()
        holder.stdout.close()


def _inside(holder: int) -> list[int]:
    """Other processes of that Debian: all have the holder's UTS namespace."""
    wanted, found = os.readlink(f"/proc/{holder}/ns/uts"), []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and int(entry) != holder and os.readlink(f"/proc/{entry}/ns/uts") == wanted:
                found.append(int(entry))
    return found


def build_deb(stage: Path, target: Path, suffix: str) -> Path:
    call(ROOT / "tools/build-deb", suffix, env={"STAGE": str(stage), "DIST": str(target), "LEVEL": "0"})
    (built,) = target.glob(f"katapod_*{suffix}-1_amd64.deb")
    return built


def supervisors(debian: Debian) -> list[int]:
    """Each has a VM; what runs in a jail is no longer inside."""
    return [pid for pid in _inside(debian.pid) if b"kata-runtime" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_deb_from_installation_to_purge(stage: Path, debian: Debian) -> None:
    first = build_deb(stage, debian.root / "root", "+one")
    second = build_deb(stage, debian.root / "root", "+two")
    name = f"{RUN_PREFIX}packaged"

    debian.ok("dpkg", "--install", f"/root/{first.name}")
    assert [path for path in KATA_PATHS if not debian.has(path)] == []
    assert debian.ok("dpkg", "--verify", "katapod") == ""
    assert debian.ok("kata-runtime", "version").startswith("kata-runtime  : ")
    assert "kata-runtime-run.8" in debian.ok("man", "--where", "kata-runtime-run")
    debian.ok("kata-runtime", "image", "build")
    assert debian.ok("kata-runtime", "run", "--rm", "busybox", "echo", "hello") == "hello\n"

    # a sandbox goes on through an upgrade, and answers to the new program
    debian.ok("kata-runtime", "run", "-d", "--name", name, "busybox", "sleep", "1000")
    debian.ok("dpkg", "--install", f"/root/{second.name}")
    assert debian.ok("dpkg-query", "-W", "-f=${Version}", "katapod") == "0.1.0+two-1"
    assert debian.ok("kata-runtime", "exec", name, "echo", "still here") == "still here\n"

    # and through a removal, and a purge, which keeps what it uses
    removed = debian("dpkg", "--remove", "katapod")
    assert removed.code == 0, removed
    assert "1 sandboxes are on this host" in removed.stderr
    assert not debian.has("/usr/bin/kata-runtime")
    assert not debian.has(LIBRARY)
    assert len(supervisors(debian)) == 1
    purged = debian("dpkg", "--purge", "katapod")
    assert purged.code == 0, purged
    assert "stay" in purged.stderr
    assert debian.has(f"/var/lib/katapod/sandboxes/{name}")
    assert debian.has("/var/cache/kata-containers/kata-containers-initrd.img")
    debian.ok("dpkg", "--install", f"/root/{second.name}")
    assert debian.ok("kata-runtime", "exec", name, "echo", "still here") == "still here\n"
    debian.ok("kata-runtime", "delete", "--force", name)
    wait_for(lambda: supervisors(debian) == [], "the VM ends")

    debian.ok("dpkg", "--purge", "katapod")
    places = (LIBRARY, "/var/lib/katapod", "/var/cache/kata-containers", "/etc/crio", "/usr/libexec/kata-containers")
    assert [path for path in places if debian.has(path)] == []
    assert _inside(debian.pid) == []


def test_the_library_serves_every_python_that_the_package_allows(stage: Path) -> None:
    """Debian 12 has 3.11, Debian 13 has 3.13."""
    first, end = (int(version) for version in re.findall(r"python3 \([<>]+=? 3\.(\d+)\)", ", ".join(depends())))
    assert (first, end) == (11, 14)
    compiled: dict[str, set[int]] = {}
    for path in (stage / LIBRARY.lstrip("/")).rglob("*.cpython-*.so"):
        name, _, rest = path.name.partition(".cpython-3")
        compiled.setdefault(str(path.with_name(name)), set()).add(int(rest.partition("-")[0]))
    assert compiled
    assert set(map(frozenset, compiled.values())) == {frozenset(range(first, end))}


@pytest.fixture(scope="module")
def package(stage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The RPM."""
    folder = tmp_path_factory.mktemp("rpm")
    call(ROOT / "tools/build-rpm", env={"STAGE": str(stage), "DIST": str(folder), "LEVEL": "0"})
    (found,) = folder.glob("katapod-*.x86_64.rpm")
    return found


def test_w05_files_of_the_rpm(package: Path) -> None:
    files = call("rpm", "-qpl", package).splitlines()
    assert [path for path in KATA_PATHS if path not in files] == []
    assert not [path for path in files if "__pycache__" in path]
    assert "50-kata" in call("rpm", "-qp", "--configfiles", package)


def test_w25_where_the_vmm_comes_from(package: Path) -> None:
    """The fields that the walkthrough shows, with a value; and what is required, the VMM among it."""
    said = dict(re.findall(r"^(\w[\w ]*?) *: (.*)$", call("rpm", "-qpi", package), re.MULTILINE))
    fields = (
        "Name, Version, Release, Architecture, Install Date, Group, Size, License, Signature, Source RPM, Build Date"
    )
    assert [field for field in (*fields.split(", "), "URL", "Summary") if not said.get(field)] == []
    requires = call("rpm", "-qp", "--requires", package)
    for name in ("crun", "dracut", "kernel", "qemu-kiwi", "virtiofsd", "python3.11", "systemd"):
        assert name in requires
    assert "kata-containers = " in call("rpm", "-qp", "--provides", package)


def test_programs_of_the_rpm_name_the_python_that_it_requires(package: Path, tmp_path: Path) -> None:
    subprocess.run(f"rpm2cpio {package} | cpio --quiet -id -D {tmp_path}", shell=True, check=True)
    programs = ["usr/bin/kata-runtime", "usr/bin/containerd-shim-kata-v2", "usr/bin/kata-monitor"]
    programs.append("usr/libexec/kata-containers/agent/usr/bin/kata-agent")
    assert {(tmp_path / name).read_text().partition("\n")[0] for name in programs} == {"#!/usr/bin/python3.11 -I"}


def test_rpm_scripts(package: Path) -> None:
    scripts = call("rpm", "-qp", "--scripts", package)
    assert "postinstall scriptlet" in scripts
    for part in re.split(r"^\w+ scriptlet.*$", scripts, flags=re.MULTILINE)[1:]:
        subprocess.run(["sh", "-n"], input=part, text=True, check=True)
