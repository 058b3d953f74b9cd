"""Bad input and a host that lacks something: a clear error, a status other than zero, and nothing left."""

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import KATA, SHARED, Finished, fresh_name, kata, leftovers, write_config

from katapod.cli.program import VERBS
from kit.jail_probe import script_for_jail
from kit.kata import AS_OTHER_USER
from kit.templates import kata_command

IMAGES = Path("/var/cache/kata-containers")
KERNEL = IMAGES / "vmlinuz.container"
INITRD = IMAGES / "kata-containers-initrd.img"


@pytest.fixture
def name() -> Iterator[str]:
    chosen = fresh_name("bad")
    yield chosen
    assert leftovers(chosen) == []


@pytest.fixture(scope="module")
def no_vmm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration by which QEMU does not start."""
    return write_config(tmp_path_factory.mktemp("config"), qemu={"path": "/bin/false"})


def run(name: str, *args: str, config: Path | None = None, accel: str = "") -> Finished:
    before = ("--config", str(config)) if config else ()
    return kata(*before, "run", "--rm", "--name", name, *(["--accel", accel] if accel else []), *args)


def expect(done: Finished, *words: str, code: int = 125) -> Finished:
    done.assert_clean_error(code)
    for word in words:
        assert word in done.err, done.err
    return done


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["no-such-image", "true"], ["cannot find image no-such-image", "kata-runtime image pull"]),
        (["oci-archive:/no/such.tar", "true"], ["there is no /no/such.tar"]),
        (["-v", "/no/such:/x", "busybox", "true"], ["cannot mount /no/such at /x: no such file"]),
        (["-v", "/etc:relative", "busybox", "true"], ["'relative', is not absolute"]),
        (["-m", "1k", "busybox", "true"], ["-m '1k'", "for example"]),
        (["busybox", ""], ["no command"]),
        ([], ["no image given", "for example"]),
        (["-it", "busybox", "true"], ["standard input is not a terminal"]),
        (["-d", "-i", "busybox", "true"], ["-i with -d"]),
        (["--rootfs", "/etc", "--bundle", "/etc"], ["--rootfs and --bundle"]),
        (["--rootfs", "/no/such", "true"], ["/no/such", "not a directory"]),
        (["--rootfs", "/etc/hostname", "true"], ["/etc/hostname", "not a directory"]),
        (["--bundle", "/no/such"], ["cannot read /no/such/config.json"]),
        (["--accel", "fast", "busybox", "true"], ["it must be auto, kvm, uml or tcg"]),
        (["-u", "no:such:user", "busybox", "true"], ["no:such:user"]),
        (["-e", "=x", "busybox", "true"], ["=x"]),
        (["--cap-add", "FLY", "busybox", "true"], ["FLY"]),
        (["--tmpfs", "relative", "busybox", "true"], ["relative"]),
        # bytes that are not UTF-8: the flag is named, whichever it is
        (["busybox", "echo", "a\udcff"], ["cannot use COMMAND a\\xff: it is not valid UTF-8"]),
        (["-e", "X=\udcff", "busybox", "true"], ["cannot use -e X=\\xff"]),
        (["-l", "X=\udcff", "busybox", "true"], ["cannot use -l X=\\xff"]),
        (["-w", "/\udcff", "busybox", "true"], ["cannot use -w /\\xff"]),
        (["-u", "\udcff", "busybox", "true"], ["cannot use -u \\xff"]),
        (["-v", "/etc:/\udcff", "busybox", "true"], ["cannot use -v /\\xff"]),
        (["--entrypoint", "\udcff", "busybox"], ["cannot use --entrypoint \\xff"]),
        (["--tmpfs", "/\udcff", "busybox"], ["cannot use --tmpfs /\\xff"]),
    ],
    ids=lambda value: ascii("_".join(value))[1:40] if isinstance(value, list) else None,
)
def test_wrong_flags_and_arguments(name: str, args: list[str], words: list[str], no_vmm: Path) -> None:
    """No VM is started to find this out: none can be."""
    expect(run(name, *args, config=no_vmm, accel="tcg"), *words)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("with/slash", ["has a slash"]),
        ("..", ["cannot use '..'"]),
        ("x" * 300, ["300 characters, at most 64"]),
        ("-dash", []),
        ("name with blank", ["characters that are not allowed"]),
        ("line\nbreak", ["characters that are not allowed"]),
        ("ümlaut", ["characters that are not allowed"]),
    ],
)
@pytest.mark.parametrize("verb", ["run", "exec", "kill", "delete", "logs"])
def test_bad_names(bad: str, words: list[str], verb: str) -> None:
    done = {
        "run": lambda: kata("run", "--rm", "--name", bad, "busybox", "true"),
        "exec": lambda: kata("exec", "--", bad, "true"),
        "kill": lambda: kata("kill", "--", bad),
        "delete": lambda: kata("delete", "--", bad),
        "logs": lambda: kata("logs", "--", bad),
    }[verb]()
    expect(done, *words, code=125 if verb in ("run", "exec") else 1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("exec", "x1", "echo", "\udcff"), "cannot use COMMAND \\xff"),
        (("exec", "-e", "X=\udcff", "x1", "true"), "cannot use -e X=\\xff"),
        (("exec", "-w", "/\udcff", "x1", "true"), "cannot use -w /\\xff"),
        (("exec", "\udcff", "true"), "cannot use NAME \\xff"),
        (("image", "import", "dir:/no/\udcff"), "there is no /no/\\xff"),
        (("config", "check", "/no/\udcff"), "cannot read /no/\\xff"),
    ],
    ids=ascii,
)
def test_bytes_that_are_no_text(words: tuple[str, ...], told: str) -> None:
    expect(kata(*words), told, code=125 if words[0] == "exec" else 1)


@pytest.mark.parametrize("verb", ["exec", "kill", "pause", "resume", "delete", "logs", "stats"])
def test_verbs_on_a_container_that_is_not_there(verb: str) -> None:
    words = ["no-such-thing", *(["true"] if verb == "exec" else [])]
    expect(kata(verb, *words), "no-such-thing: no such container", code=125 if verb == "exec" else 1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("metrics", "no-such-thing"), "no-such-thing: no such container or sandbox"),
        (("network", "rm", "no-such-thing"), "cannot find network no-such-thing"),
        (("network", "inspect", "no-such-thing"), "cannot find network no-such-thing"),
    ],
)
def test_what_else_is_not_there(words: tuple[str, ...], told: str) -> None:
    expect(kata(*words), told, code=1)


@pytest.mark.parametrize("verb", ["run", "exec", "list", "kill", "delete", "logs"])
def test_needs_root(verb: str) -> None:
    words = {"run": ["busybox", "true"], "exec": ["x1", "true"], "list": []}.get(verb, ["x1"])
    done = subprocess.run(
        [*AS_OTHER_USER, KATA, verb, *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (125 if verb in ("run", "exec") else 1)
    assert f"cannot {verb}: this needs root" in done.stderr


ANYBODYS = {"check", "cluster", "kata-check", "config", "env", "info", "kata-env", "image guest", "version"}


def test_an_ordinary_user_is_sent_to_root() -> None:
    """By every verb that needs it: no other advice, such as to move a file of root's away, is right for him."""
    calls = [
        *([verb] for verb in ("list", "ps", "stats", "collect-data", "overhead", "image ls", "image build", "images")),
        *([verb] for verb in ("prune", "volume ls", "system df", "system prune", "container ls", "image prune")),
        *(
            [verb, "x1"]
            for verb in ("kill", "pause", "resume", "unpause", "delete", "rm", "logs", "inspect", "metrics")
        ),
        *(
            [verb, "x1"]
            for verb in ("wait", "stop", "attach", "export", "diff", "port", "top", "image rm", "rmi", "history")
        ),
        *([verb, "x1"] for verb in ("create", "start -a", "restart")),
        *([verb, "x1"] for verb in ("volume create", "volume rm", "volume inspect", "image inspect")),
        *([verb, "x1", "true"] for verb in ("run", "exec")),
        *([verb] for verb in ("factory init", "factory status", "factory destroy", "network ls", "image guest prune")),
        *([verb, "oci:/x"] for verb in ("image import", "image pull", "pull")),
        ["update", "-m", "64m", "x1"],
        ["events"],
        ["cp", "x1:/etc/hostname", "here"],
        ["tag", "x1", "x2"],
        ["rename", "x1", "x2"],
        ["commit", "x1", "x2"],
        ["save", "-o", "x1.tar", "x1"],
        ["load", "-i", "/etc/hostname"],
        ["import", "/etc/hostname", "x1"],
        ["import", "-", "x1"],
        ["import", "-c", "RUN x", "/etc/hostname", "x1"],
        *([f"network {verb}", "bridge"] for verb in ("inspect", "rm", "create")),
        ["network prune"],
        ["iptables get", "--sandbox-id", "x1"],
        ["iptables set", "--sandbox-id", "x1", "/etc/hostname"],
        ["direct-volume stats", "--volume-path", "/x"],
    ]
    assert {call[0].split()[0] for call in calls} | {name.split()[0] for name in ANYBODYS} >= set(VERBS)
    for verb, *words in calls:
        done = subprocess.run(
            [*AS_OTHER_USER, KATA, *verb.split(), *words],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == (125 if verb in ("run", "exec") else 1), (verb, done)
        assert "this needs root\n  hint: sudo kata-runtime " in done.stderr, (verb, done)


# -- images


def test_broken_archives(name: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.tar"
    broken.write_bytes(os.urandom(20_000))
    for transport in ("oci-archive", "docker-archive"):
        expect(run(name, f"{transport}:{broken}", "true"), f"cannot import {transport}:{broken}", "damaged")
    broken.write_bytes(b"")
    expect(run(name, f"oci-archive:{broken}", "true"), f"cannot import oci-archive:{broken}")


def test_image_of_another_architecture(name: str, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    for words in (
        ["init", "--layout", str(layout)],
        ["new", "--image", f"{layout}:x"],
        ["config", "--image", f"{layout}:x", "--architecture", "s390x", "--config.cmd", "true"],
    ):
        subprocess.run(["umoci", *words], check=True, capture_output=True)
    expect(run(name, f"oci:{layout}:x"), f"oci:{layout}:x", "s390x", "amd64")


def test_rootfs_without_the_command(name: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "plain").write_text("no program\n")
    expect(run(name, "--rootfs", str(tmp_path), "nothing-like-it"), '"nothing-like-it"', "not found in $PATH", code=127)


# -- bundles


def bundle(directory: Path, text: str) -> Path:
    (directory / "rootfs").mkdir()
    (directory / "config.json").write_text(text)
    return directory


PROCESS = {"args": ["true"], "cwd": "/"}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{nope", ["it is not JSON"]),
        ("[]", ["expected"]),
        ("", ["it is not JSON"]),
        (json.dumps({"ociVersion": "1.0.2", "root": {"path": "rootfs"}}), ["process: missing"]),
        (
            json.dumps({"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "process": {**PROCESS, "args": []}}),
            ["process.args"],
        ),
        (json.dumps({"ociVersion": "1.0.2", "root": {"path": "../../etc"}, "process": PROCESS}), ["'..'"]),
        (
            json.dumps(
                {
                    "ociVersion": "1.0.2",
                    "root": {"path": "rootfs"},
                    "process": PROCESS,
                    "mounts": [{"destination": "/a/../../b", "type": "bind", "source": "/etc"}],
                }
            ),
            ["mounts[0].destination", "'..'"],
        ),
        (
            json.dumps({"ociVersion": "1.0.2", "root": {"path": "nowhere"}, "process": PROCESS}),
            ["nowhere", "not a directory"],
        ),
        (
            json.dumps(
                {
                    "ociVersion": "1.0.2",
                    "root": {"path": "rootfs"},
                    "process": PROCESS,
                    "mounts": [{"destination": "/b", "type": "bind", "source": "/no/such", "options": ["bind"]}],
                }
            ),
            ["cannot mount /no/such at /b"],
        ),
    ],
)
def test_bad_bundles(name: str, tmp_path: Path, spec: str, words: list[str]) -> None:
    done = kata("run", "--rm", "--name", name, "--bundle", str(bundle(tmp_path, spec)))
    expect(done, *words)


def test_bundle_whose_config_is_a_directory(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    expect(kata("run", "--name", name, "--bundle", str(tmp_path)), "config.json", "directory")


# -- configuration


@pytest.mark.qemu("QEMU's settings")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[hypervisor.qemu]\ndefault_vcpus = "two"\n', ["default_vcpus", "got str 'two'"]),
        ("[hypervisor.qemu]\ndefault_vcpu = 2\n", ["unknown key; did you mean default_vcpus?"]),
        ("hello\n", ["it is not TOML", "line 1"]),
        ("[hypervisor.clh]\npath = '/x'\n", ["not supported"]),
        ('[hypervisor.qemu]\nkernel = "/no/kernel"\n', ["guest kernel /no/kernel: no such file", "image build"]),
        ('[hypervisor.qemu]\ninitrd = "/no/initrd"\n', ["guest initrd /no/initrd: no such file", "image build"]),
        ('[hypervisor.qemu]\npath = "/no/qemu"\n', ["cannot find QEMU", "/no/qemu", "qemu-system-x86"]),
        ('[hypervisor.qemu]\npath = "/etc"\n', ["cannot run /etc", "not an executable"]),
        ('[hypervisor.qemu]\npath = "/etc/passwd"\n', ["cannot run /etc/passwd", "not an executable"]),
        ('[hypervisor.qemu]\nvirtio_fs_daemon = "/no/fsd"\n', ["cannot find virtiofsd", "/no/fsd", "install"]),
        ('[hypervisor.qemu]\nvirtio_fs_daemon = "/etc/hostname"\n', ["cannot run /etc/hostname"]),
        ('[hypervisor.qemu]\npath = "/bin/false"\n', ["cannot start QEMU: exit status 1"]),
        ('[hypervisor.qemu]\npath = "/bin/true"\n', ["cannot start QEMU: exit status 0"]),
        ('[hypervisor.qemu]\nkernel = "/etc/hostname"\n', ["cannot start QEMU", "kernel /etc/hostname"]),
    ],
)
def test_bad_configuration(name: str, tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "configuration.toml"
    path.write_text(text)
    shared = SHARED if "virtio_fs_daemon" in text else ()  # where nothing is shared nobody runs it
    done = expect(run(name, *shared, "busybox", "true", config=path), *words)
    if "hypervisor.qemu" in text and "no such" not in done.err and "cannot" not in done.err:
        assert str(path) in done.err


def test_configuration_that_is_not_there(name: str) -> None:
    expect(run(name, "busybox", "true", config=Path("/no/such.toml")), "cannot read /no/such.toml")


def test_virtiofsd_that_fails(name: str, tmp_path: Path) -> None:
    program = tmp_path / "virtiofsd"
    program.write_text("#!/bin/sh\necho this machine is too old >&2\nexit 3\n")
    program.chmod(0o755)
    config = write_config(tmp_path, qemu={"virtio_fs_daemon": str(program)})
    done = run(name, *SHARED, "busybox", "true", config=config)
    expect(done, "virtiofsd ended", "exit status 3", "this machine is too old")


@pytest.mark.qemu("QEMU's settings")
def test_qemu_that_is_a_script(name: str, tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text('#!/bin/sh\nexec qemu-system-x86_64 "$@"\n')
    program.chmod(0o755)
    config = write_config(tmp_path, qemu={"path": str(program)}, factory={"enable_template": False})
    expect(run(name, "busybox", "true", config=config), f"cannot run {program} in its jail", "name QEMU itself")


@pytest.mark.qemu("QEMU's settings")
def test_qemu_that_does_not_speak(name: str, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    program = script_for_jail(odd, f"echo not today >&2\nexec {odd}/lib/busybox sleep 1000")
    config = write_config(tmp_path, qemu={"path": str(program)}, factory={"enable_template": False})
    expect(run(name, "busybox", "true", config=config), "not today")


@pytest.mark.qemu("QEMU's settings")
@pytest.mark.parametrize("accel", ["", "auto"])
def test_truncated_initrd(name: str, tmp_path: Path, accel: str) -> None:
    initrd = tmp_path / "short.img"
    initrd.write_bytes(INITRD.read_bytes()[:1_000_000])
    tables = {"qemu": {"initrd": str(initrd)}, "hypervisor.uml": {"image": str(tmp_path / "none")}}
    config = write_config(tmp_path, **tables, agent={"dial_timeout": 5})
    done = expect(run(name, "busybox", "true", config=config, accel=accel), "does not boot", str(initrd))
    assert "last lines of the guest's console" in done.err


@pytest.mark.qemu("QEMU's settings")
def test_initrd_that_is_none(name: str, tmp_path: Path) -> None:
    initrd = tmp_path / "empty.img"
    initrd.touch()
    config = write_config(tmp_path, qemu={"initrd": str(initrd)}, agent={"dial_timeout": 10})
    done = expect(run(name, "busybox", "true", config=config), "does not boot", str(initrd))
    assert "Kernel panic" in done.err


@pytest.mark.qemu("QEMU's settings")
def test_truncated_kernel(name: str, tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(KERNEL.read_bytes()[:3_000_000])
    config = write_config(tmp_path, qemu={"kernel": str(kernel)}, agent={"dial_timeout": 5})
    expect(run(name, "busybox", "true", config=config), str(kernel))


def test_forced_kvm_is_bounded(name: str, tmp_path: Path) -> None:
    """Where guests boot under KVM it works; where they hang or QEMU gives up, that is said in time."""
    config = write_config(tmp_path, agent={"dial_timeout": 5})
    done = run(name, "busybox", "echo", "fine", config=config, accel="kvm")  # which has a limit
    if done.code:
        expect(done, "kvm", "--accel tcg")
    else:
        assert done.out == "fine\n"


# -- a host that lacks something: a mount namespace of its own, in which it does


def lacking(name: str, preparation: str, *args: str, accel: str = "") -> Finished:
    """`run ARGS` after `preparation` (shell) in a private mount namespace; nothing may stay in there either."""
    if " /run" in preparation and "/var/lib/katapod" not in preparation:
        preparation += "; mkdir -p /var/lib/katapod/sandboxes; mount -t tmpfs none /var/lib/katapod/sandboxes"
    forced = f"--accel {accel}" if accel else ""
    command = f"{shlex.join(kata_command())} run --rm --name {name} {forced} {' '.join(args)}"
    places = "/run/vc/sbs /run/vc/vm /run/kata-containers/shared/sandboxes /var/lib/katapod/sandboxes"
    look = (
        f"find {places} /var/lib/katapod/images/refs -name '*{name}*' 2>/dev/null; grep -F {name} /proc/self/mountinfo"
    )
    script = f'{preparation}\n{command}\ncode=$?\nleft=$({look})\ntest -z "$left" || echo LEFT $left >&2\nexit $code'
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-ec",
            script.replace(f"\n{command}", f"\nset +e\n{command}"),
        ],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=180,
        check=False,
    )
    assert "LEFT" not in done.stderr, done.stderr
    return Finished(done.returncode, done.stdout, done.stderr, 0.0)


@pytest.mark.parametrize(
    ("preparation", "words"),
    [
        ("mount -t tmpfs -o size=4k,nr_inodes=2 none /run", ["/run/vc/sbs", "No space"]),
        ("mount -t tmpfs -o size=4k none /run; head -c 4096 /dev/zero > /run/full", ["/run/vc/sbs", "No space"]),
        ("mount -t tmpfs -o size=2m none /run", ["MiB are free", "free some space"]),
        ("mount -t tmpfs -o ro none /run", ["/run/vc", "Read-only"]),
        ("mount -t tmpfs none /run; touch /run/vc", ["/run/vc"]),
        ("mount -t tmpfs none /run; mkdir /run/vc; touch /run/vc/vm", ["/run/vc/vm"]),
        ("mount -t tmpfs none /run; touch /run/kata-containers", ["/run/kata-containers"]),
        ("mount -t tmpfs -o size=200k none /var/lib/katapod", ["/var/lib/katapod"]),
        ("mount -t tmpfs -o ro none /var/lib/katapod", ["/var/lib/katapod", "ead-only"]),
        ("mkdir -p /var/lib/katapod/sandboxes; mount -t tmpfs -o ro none /var/lib/katapod/sandboxes", ["sandboxes"]),
        (
            "mkdir -p /var/lib/katapod/sandboxes; mount -t tmpfs -o size=1m none /var/lib/katapod/sandboxes",
            ["/var/lib/katapod/sandboxes", "MiB are free"],
        ),
    ],
)
def test_no_room_or_no_right_to_write(name: str, preparation: str, words: list[str]) -> None:
    expect(lacking(name, preparation, "busybox", "true"), *words)


@pytest.mark.parametrize("socket", ["qmp.sock", "vhost-fs.sock"])
def test_socket_path_taken_by_a_directory(name: str, socket: str) -> None:
    done = lacking(name, f"mount -t tmpfs none /run; mkdir -p /run/vc/vm/{name}/{socket}/x", "busybox", "true")
    # what lies below our own directories under our name is a leftover, and is replaced
    assert (done.code, done.err) == (0, ""), done


def test_no_kvm_device(name: str) -> None:
    gone = "test -e /dev/kvm && mount --bind /dev/null /dev/kvm || true"
    expect(lacking(name, gone, "busybox", "true", accel="kvm"), "cannot use KVM", "--accel tcg")


@pytest.mark.skipif(not shutil.which("busybox"), reason="needs busybox-static")
def test_no_busybox_program(name: str) -> None:
    hidden = "mount -t tmpfs none /var/lib/katapod; mount --bind /dev/null $(readlink -f $(command -v busybox))"
    expect(lacking(name, hidden, "busybox", "true"), "busybox")
