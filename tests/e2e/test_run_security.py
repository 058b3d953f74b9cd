"""What confines a process inside its VM, as the kernel shows it: /proc/self/status and what it refuses."""

import json
from pathlib import Path

import pytest

from kit.kata import Kata
from kit.seccomp import deny_by_default

NET_BIND_SERVICE, SYS_ADMIN, MKNOD, CHOWN = 10, 21, 27, 0  # linux/capability.h
DOCKERS_14 = 0x00000000A80425FB
NO_MKDIR = deny_by_default({"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28})
NATIVE = {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}
BY_CAPABILITY = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "archMap": [NATIVE, {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]}],
    "flags": ["SECCOMP_FILTER_FLAG_LOG"],
    "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["rmdir"], "action": "SCMP_ACT_ERRNO", "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["symlink", "symlinkat"], "action": "SCMP_ACT_ERRNO", "includes": {"minKernel": "99.0"}},
        {"names": ["link", "linkat"], "action": "SCMP_ACT_ERRNO", "errno": "EMLINK", "includes": {"minKernel": "4.8"}},
    ],
}
"""A profile as Docker's are, with conditions."""


def _status(text: str) -> dict[str, str]:
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


@pytest.fixture(scope="module")
def plain(module_kata: Kata) -> str:
    """With defaults, but for two capabilities."""
    return module_kata.start("--cap-add", "SYS_ADMIN", "--cap-drop", "MKNOD", "busybox", "sleep", "1000")


@pytest.fixture(scope="module")
def strict(module_kata: Kata, tmp_path_factory: pytest.TempPathFactory) -> str:
    """With as little as one may have."""
    profile = tmp_path_factory.mktemp("seccomp") / "no-mkdir.json"
    profile.write_text(json.dumps(NO_MKDIR))
    return module_kata.start(
        *("--cap-drop", "ALL", "--cap-add", "NET_BIND_SERVICE", "--security-opt", "no-new-privileges"),
        *("--security-opt", f"seccomp={profile}", "--read-only", "-u", "1000:1001", "--tmpfs", "/tmp:mode=1777"),
        *("busybox", "sleep", "1000"),
    )


@pytest.mark.parametrize("process", ["1", "self"])  # the container's own, and an exec's
def test_capabilities(kata: Kata, plain: str, process: str) -> None:
    status = _status(kata.ok("exec", plain, "cat", f"/proc/{process}/status"))
    expected = (DOCKERS_14 | 1 << SYS_ADMIN) & ~(1 << MKNOD)
    assert {key: int(status[key], 16) for key in ("CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb")} == {
        "CapBnd": expected,
        "CapPrm": expected,
        "CapEff": expected,
        "CapInh": 0,
        "CapAmb": 0,
    }
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("0", "0")


def test_capabilities_are_what_counts(kata: Kata, plain: str) -> None:
    assert "not permitted" in kata("exec", plain, "mknod", "/tmp/null", "c", "1", "3").stderr
    kata.ok("exec", plain, "sh", "-c", "mkdir /tmp/m && mount -t tmpfs none /tmp/m && umount /tmp/m")
    assert "not permitted" in kata("exec", plain, "date", "-s", "2000-01-01").stderr


@pytest.mark.parametrize("process", ["1", "self"])
def test_no_more_than_granted(kata: Kata, strict: str, process: str) -> None:
    status = _status(kata.ok("exec", strict, "cat", f"/proc/{process}/status"))
    assert status["Uid"].split() == ["1000"] * 4
    assert status["Gid"].split() == ["1001"] * 4
    assert set(status["Groups"].split()) <= {"1001"}
    assert int(status["CapBnd"], 16) == 1 << NET_BIND_SERVICE
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapAmb"], 16) == 0
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_seccomp_filter_decides(kata: Kata, strict: str) -> None:
    """Also for an exec. The filter's own error numbers come through: 28 (no space left) of a rule, and the default of
    engines' profiles, 38 (no such function), for what no rule names."""
    result = kata("exec", strict, "mkdir", "/tmp/x")
    assert result.code == 1
    assert "No space left on device" in result.stderr
    result = kata("exec", strict, "unshare", "-U", "true")
    assert (result.code, "Function not implemented" in result.stderr) == (1, True), result
    kata.ok("exec", strict, "touch", "/tmp/x")


@pytest.mark.parametrize("capabilities", ["usual", "all"])
def test_seccomp_rules_apply_on_their_conditions(kata: Kata, tmp_path: Path, capabilities: str) -> None:
    profile = tmp_path / "by-capability.json"
    profile.write_text(json.dumps(BY_CAPABILITY))
    script = "mkdir /tmp/a; rmdir /home; ln -s x /tmp/s; echo >/tmp/f; ln /tmp/f /tmp/g; cat /proc/self/status"
    more = ("--privileged",) if capabilities == "all" else ()
    done = kata.run(*more, "--security-opt", f"seccomp={profile}", "busybox", "sh", "-c", script)
    assert _status(done.stdout)["Seccomp"] == "2"
    refused = "mkdir: can't create directory '/tmp/a'" if more else "rmdir: '/home'"
    assert done.stderr.splitlines() == [f"{refused}: Operation not permitted", "ln: /tmp/g: Too many links"]


def test_read_only_root(kata: Kata, strict: str, plain: str) -> None:
    result = kata("exec", "-u", "0", strict, "touch", "/new")
    assert result.code == 1
    assert "Read-only file system" in result.stderr
    kata.ok("exec", plain, "touch", "/new")


def test_privileged_exec_has_all(kata: Kata, plain: str) -> None:
    status = _status(kata.ok("exec", "--privileged", plain, "cat", "/proc/self/status"))
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == (1 << 41) - 1


def test_masked_and_read_only_paths(kata: Kata, plain: str) -> None:
    assert kata("exec", plain, "cat", "/proc/keys", "/proc/interrupts", "/proc/timer_list") == (0, "", "")
    assert kata.ok("exec", plain, "ls", "/sys/firmware") == ""
    for path in ("/proc/sys/kernel/hostname", "/proc/sysrq-trigger", "/sys/kernel/profiling"):
        result = kata("exec", plain, "sh", "-c", f"echo x > {path}")
        assert result.code != 0, path
        assert "Read-only file system" in result.stderr, path


def test_mounts_are_made_as_usual(kata: Kata, plain: str) -> None:
    mounts = {}
    for line in kata.ok("exec", plain, "cat", "/proc/mounts").splitlines():
        _, point, kind, options, *_ = line.split()
        mounts[point] = (kind, set(options.split(",")))
    careful = {"nosuid", "nodev", "noexec"}
    for point, kind in (("/proc", "proc"), ("/sys", "sysfs"), ("/sys/fs/cgroup", "cgroup2"), ("/dev/mqueue", "mqueue")):
        assert mounts[point][0] == kind
        assert careful <= mounts[point][1], point
    assert mounts["/dev/shm"][0] == "tmpfs"
    assert careful <= mounts["/dev/shm"][1]
    assert "ro" in mounts["/sys"][1]
    assert "ro" in mounts["/sys/fs/cgroup"][1]


def test_devices(kata: Kata, plain: str) -> None:
    """The usual nodes are there; a node made by hand for another device does not open."""
    script = (
        "for d in null zero full random urandom tty; do test -c /dev/$d || echo no $d; done; ls -l /dev/fd /dev/ptmx"
    )
    assert "no " not in kata.ok("exec", plain, "sh", "-c", script)
    assert kata.ok("exec", plain, "sh", "-c", "head -c 3 /dev/zero | od -An -tx1").split() == ["00"] * 3
    for major, minor in ((1, 1), (10, 175), (4, 64)):  # mem, agpgart, the console's serial port
        script = f"mknod /tmp/node{major} c {major} {minor} && head -c 1 /tmp/node{major}"
        result = kata("exec", "--privileged", plain, "sh", "-c", script)
        assert result.code != 0
        assert "not permitted" in result.stderr


def test_processes_see_their_container_only(kata: Kata, strict: str) -> None:
    out = kata.ok("exec", strict, "ps", "-o", "pid,comm").splitlines()[1:]
    assert sorted(line.split()[1] for line in out) == ["ps", "sleep"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A handwritten bundle around busybox."""
    root = tmp_path / "rootfs"
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "data", "locked", "cgroup"):
        (root / name).mkdir(parents=True)
    busybox = root / "bin/busybox"
    busybox.write_bytes(Path("/bin/busybox").read_bytes())
    busybox.chmod(0o755)
    for applet in ("sh", "cat", "id", "hostname", "pwd", "touch", "mkdir", "ls", "uname"):
        (root / "bin" / applet).symlink_to("busybox")
    (root / "locked/secret").write_text("masked\n")
    (root / "etc/masked").write_text("masked\n")
    (tmp_path / "side").mkdir()
    (tmp_path / "side/file").write_text("beside\n")
    return tmp_path


def _config(script: str) -> dict[str, object]:
    bind = {"destination": "/data", "type": "bind", "source": "side", "options": ["rbind", "ro"]}
    caps = ["CAP_CHOWN", "CAP_NET_BIND_SERVICE"]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 1000, "gid": 1001, "additionalGids": [5, 50]},
            "args": ["/bin/sh", "-c", script],
            "env": ["PATH=/bin", "GIVEN=in the spec"],
            "cwd": "/data",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted", "inheritable", "ambient"), caps),
            "rlimits": [
                {"type": "RLIMIT_NOFILE", "soft": 64, "hard": 128},
                {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            ],
            "noNewPrivileges": True,
            "oomScoreAdj": 77,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "of-the-bundle",
        "domainname": "example",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777", "size=1m"]},
            {"destination": "/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
            bind,
        ],
        "annotations": {"org.example.key": "value"},
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
            "maskedPaths": ["/etc/masked", "/locked"],
            "readonlyPaths": ["/proc/sys"],
            "seccomp": {key: value for key, value in NO_MKDIR.items() if key != "defaultErrno"},  # files' own key
            "personality": {"domain": "LINUX32"},
            "resources": {
                "memory": {"limit": 64 << 20},
                "cpu": {"quota": 50000, "period": 100000},
                "pids": {"limit": 30},
                "unified": {"memory.oom.group": "1"},
            },
        },
    }


@pytest.mark.qemu("a 32-bit personality")
def test_bundle(kata: Kata, bundle: Path) -> None:
    """All of the specification's process at once, run as it is."""
    script = (
        "cat /proc/self/status; echo ===; id -G; echo $GIVEN; pwd; hostname; ulimit -Sn; ulimit -Hn; "
        "cat /proc/self/oom_score_adj file /proc/sys/kernel/domainname /cgroup/memory.oom.group; uname -m; "
        "cat /etc/masked; ls /locked; echo ===; "
        "touch /new /data/new /tmp/new; mkdir /tmp/x; echo x > /proc/sys/kernel/hostname"
    )
    (bundle / "config.json").write_text(json.dumps(_config(script)))
    result = kata("run", "--rm", "--name", kata.name(), "--bundle", str(bundle))
    text, said, _ = result.stdout.split("===\n")
    status = _status(text)
    granted = 1 << CHOWN | 1 << NET_BIND_SERVICE
    sets = {key: int(status[key], 16) for key in ("CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb")}
    assert sets == dict.fromkeys(sets, granted)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert (status["Uid"].split()[0], status["Gid"].split()[0]) == ("1000", "1001")
    groups, *lines = said.splitlines()
    assert set(groups.split()) == {"1001", "5", "50"}
    assert lines == ["in the spec", "/data", "of-the-bundle", "64", "128", "77", "beside", "example", "1", "i686"]
    for complaint in ("/new: Read-only", "/data/new: Read-only", "'/tmp/x': No space left", "hostname: Read-only"):
        assert complaint in result.stderr, result.stderr
    assert "/tmp/new" not in result.stderr
    assert not (bundle / "rootfs/new").exists()


def test_bundle_runs_as_it_is(kata: Kata, bundle: Path) -> None:
    """A writable root is the bundle's own; flags cannot change what the specification says."""
    config = json.loads(json.dumps(_config("echo kept > /kept; exit 3")))
    config["root"]["readonly"] = False
    config["process"]["user"] = {"uid": 0, "gid": 0}
    config["process"]["capabilities"] = {}
    del config["linux"]["personality"]  # not every VMM has 32-bit programs
    (bundle / "config.json").write_text(json.dumps(config))
    assert kata("run", "--rm", "--name", kata.name(), "--bundle", str(bundle)) == (3, "", "")
    assert (bundle / "rootfs/kept").read_text() == "kept\n"
    refused = kata("run", "--rm", "--name", kata.name(), "-e", "A=1", "--bundle", str(bundle))
    assert refused.code == 125
    assert "env" in refused.stderr


def test_privileged_has_the_guests_devices_and_none_of_the_host(kata: Kata, plain: str) -> None:
    """Those whose drivers are not loaded yet too; nodes that it makes itself can be opened."""
    script = (
        "for name in fuse kmsg loop-control loop0 hwrng vda; do : < /dev/$name || exit 1; done;"
        "mknod /tmp/kmsg c 1 11 && : < /tmp/kmsg && ls /dev"
    )
    found = kata.ok("run", "--rm", "--name", kata.name(), "--privileged", "busybox", "sh", "-c", script).split()
    hosts = {path.name for path in Path("/dev").iterdir() if path.is_block_device()} - {f"loop{n}" for n in range(8)}
    assert not hosts & set(found) - {"vda"}, "vda is the guest's own"
    assert kata("exec", plain, "ls", "/dev/kmsg", "/dev/fuse").code != 0


def test_open_files(kata: Kata, plain: str) -> None:
    assert kata.ok("exec", plain, "sh", "-c", "ulimit -Sn; ulimit -Hn") == "1048576\n1048576\n"
    out = kata.ok(
        *("run", "--rm", "--name", kata.name(), "--ulimit", "nofile=2000000:5000000", "busybox"),
        *("sh", "-c", "ulimit -Sn; ulimit -Hn"),
    )
    assert out == "2000000\n5000000\n"
    refused = kata.run("--ulimit", "nofile=unlimited", "busybox", "true")
    assert refused.code == 125
    assert "cannot set the limit of open files (nofile) to unlimited: the guest's kernel allows" in refused.stderr
    assert "agent" not in refused.stderr
