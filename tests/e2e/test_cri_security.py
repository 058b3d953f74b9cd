"""What a pod's security context asks for, seen from inside."""

import pytest

from kit.accel import current_accelerator
from kit.cri import Cri, Pod

SLEEP = ("sleep", "100000")


def capabilities(text: str) -> int:
    (line,) = (line for line in text.splitlines() if line.startswith("CapEff:"))
    return int(line.split()[1], 16)


@pytest.mark.reference
def test_privileged(cri: Cri) -> None:
    """All capabilities, a writable /sys, and mount(2) may be called; a plain container beside it may not."""
    security = {"privileged": True}
    pod = cri.run_pod(security=security)
    privileged = pod.start(*SLEEP, name="privileged", linux={"security_context": security})
    plain = pod.start(*SLEEP, name="plain")
    pod.sh(privileged, "mkdir /tmp/m && mount -t tmpfs tmpfs /tmp/m && umount /tmp/m")
    assert pod.exec(plain, "sh", "-c", "mkdir /tmp/m && mount -t tmpfs tmpfs /tmp/m").code != 0
    more, fewer = (capabilities(pod.sh(one, "cat /proc/self/status")) for one in (privileged, plain))
    assert fewer & more == fewer != more
    assert more & 1 << 21  # CAP_SYS_ADMIN
    assert not fewer & 1 << 21
    if cri.handler != "runc":  # which has the host's devices, whatever they are
        look = "mknod /tmp/fuse c 10 229 && : <> /tmp/fuse && : <> /dev/loop-control && head -c 4 /dev/hwrng | wc -c"
        sources = 0 if current_accelerator() == "uml" else 4  # its kernel would ask the host's files, which it cannot
        assert pod.sh(privileged, look) == f"{sources}\n"
        assert "not permitted" in pod.exec(plain, "sh", "-c", "mknod /tmp/fuse c 10 229 && : <> /tmp/fuse").stderr


def test_capabilities(pod: Pod) -> None:
    wanted = {"add_capabilities": ["NET_ADMIN"], "drop_capabilities": ["CHOWN"]}
    container = pod.start(*SLEEP, linux={"security_context": {"capabilities": wanted}})
    has = capabilities(pod.sh(container, "cat /proc/self/status"))
    assert has & 1 << 12  # CAP_NET_ADMIN
    assert not has & 1 << 0  # CAP_CHOWN
    assert pod.exec(container, "chown", "1000", "/tmp").code != 0


@pytest.mark.reference
def test_user_and_groups(pod: Pod) -> None:
    user = {"run_as_user": {"value": 1000}, "run_as_group": {"value": 1000}, "supplemental_groups": [44, 2000]}
    container = pod.start(*SLEEP, linux={"security_context": user})
    assert pod.sh(container, "id -u; id -g").split() == ["1000", "1000"]
    assert set(pod.sh(container, "id -G").split()) == {"1000", "44", "2000"}
    assert pod.exec(container, "touch", "/etc/new").code != 0


@pytest.mark.reference
def test_read_only_root(pod: Pod) -> None:
    container = pod.start(*SLEEP, linux={"security_context": {"readonly_rootfs": True}})
    result = pod.exec(container, "touch", "/new")
    assert result.code != 0
    assert "Read-only file system" in result.stderr
    assert pod.exec(container, "sh", "-c", "echo > /dev/shm/new").code == 0


@pytest.mark.reference
def test_sysctls(cri: Cri) -> None:
    pod = cri.run_pod(sysctls={"net.ipv4.ip_unprivileged_port_start": "80", "kernel.shm_rmid_forced": "1"})
    container = pod.start(*SLEEP)
    names = "/proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced"
    assert pod.sh(container, f"cat {names}").split() == ["80", "1"]


def test_no_new_privileges(pod: Pod) -> None:
    container = pod.start(*SLEEP, linux={"security_context": {"no_new_privs": True}})
    assert "NoNewPrivs:\t1" in pod.sh(container, "cat /proc/self/status")


def test_masked_and_read_only_paths(pod: Pod) -> None:
    paths = {"masked_paths": ["/proc/kcore", "/proc/timer_list"], "readonly_paths": ["/proc/sys"]}
    container = pod.start(*SLEEP, linux={"security_context": paths})
    assert pod.sh(container, "head -c 10 /proc/kcore | wc -c").strip() == "0"
    assert pod.exec(container, "sh", "-c", "echo x > /proc/sys/kernel/domainname").code != 0


def test_seccomp(pod: Pod) -> None:
    """RuntimeDefault filters system calls; Unconfined does not."""
    for profile_type, mode in ((0, "2"), (1, "0")):
        security = {"seccomp": {"profile_type": profile_type}}
        container = pod.start(*SLEEP, linux={"security_context": security})
        assert f"Seccomp:\t{mode}\n" in pod.sh(container, "cat /proc/self/status")
