"""A sandbox is as the configuration says: size, kernel command line, machine, mounts and hooks. One VM."""

from pathlib import Path

import pytest

from kit.kata import Kata

CONFIGURATION = """
[hypervisor.qemu]
kernel_params = "katapod.test=1"
default_memory = 512
default_bridges = 3
pcie_root_port = 2
enable_iothreads = true
machine_accelerators = "hpet=off"
reclaim_guest_freed_memory = false
enable_debug = true
extra_monitor_socket = "hmp"
guest_hook_path = "/run/kata-containers/shared/containers/sandbox-mounts/hooks"
[agent.kata]
debug_console_enabled = true
[factory]
enable_template = false
[runtime]
sandbox_bind_mounts = ["HOOKS"]
"""
LOOK = "cat /proc/cmdline; grep MemTotal /proc/meminfo; cat /sys/bus/pci/devices/*/class"


@pytest.mark.qemu("QEMU's settings")
def test_machine_and_guest_follow_the_file(kata: Kata, tmp_path: Path) -> None:
    hooks = tmp_path / "hooks"
    (hooks / "prestart").mkdir(parents=True)
    hook = hooks / "prestart" / "10-say"
    hook.write_text("#!/bin/sh\necho the hook has run > /dev/kmsg\n")
    hook.chmod(0o755)
    file = tmp_path / "c.toml"
    file.write_text(CONFIGURATION.replace("HOOKS", str(hooks)))
    name = kata.name()
    assert (
        kata("--config", str(file), "run", "-d", "--name", name, "--net", "none", "busybox", "sleep", "1000").code == 0
    )
    try:
        cmdline, memory, *classes = kata.ok("exec", name, "sh", "-c", LOOK).splitlines()
        assert {"katapod.test=1", "agent.debug_console", "agent.debug_console_vport=1026"} <= set(cmdline.split())
        assert cmdline.endswith(" katapod.test=1")
        assert 420 << 10 < int(memory.split()[1]) < 512 << 10
        assert classes.count("0x060400") == 5  # three bridges and two root ports
        command = Path(f"/run/vc/vm/{name}/pid").read_text().strip()
        arguments = Path(f"/proc/{command}/cmdline").read_text().split("\0")
        assert "iothread,id=iothread0" in arguments
        assert not any("virtio-balloon" in argument for argument in arguments)
        assert Path(f"/run/vc/vm/{name}/extra-monitor.sock").is_socket()
        assert "the hook has run" in Path(f"/run/vc/sbs/{name}/console.log").read_text(errors="replace")
    finally:
        kata("delete", "--force", name)


@pytest.mark.parametrize("line", ["rootless = true", "enable_numa = true"])
def test_what_is_refused_starts_nothing(kata: Kata, tmp_path: Path, line: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f"[hypervisor.qemu]\n{line}\n")
    code, out, err = kata("--config", str(file), "run", "--rm", "busybox", "true")
    assert (code, out) == (125, "")
    assert f"{file}:2: [hypervisor.qemu] {line.partition(' ')[0]}: not supported: " in err
