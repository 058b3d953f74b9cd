"""/proc/cpuinfo as programs know it: the kernel of User-mode Linux leaves out the empty line at its end, without which
procps fails (vmstat, ps -ef)."""

from __future__ import annotations

import os

from katapod.agent.paths import SANDBOX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.rpc.pb import oci_pb2

__all__ = ["mend_cpuinfo"]

CPUINFO = "/proc/cpuinfo"


def mend_cpuinfo(spec: oci_pb2.Spec, source: str = CPUINFO, directory: str = SANDBOX) -> None:
    """Have a container find a whole one, a file that all of a sandbox share, if the kernel's is not and the container
    has a /proc of its own, of which something is masked anyway.

    Where nothing is (privileged containers, Kubernetes' procMount: Unmasked), a process in a user namespace may mount
    a /proc of its own; a mount on ours would take it that: EPERM. Source: the kernel's mount_too_revealing().
    """
    destinations = [mount.destination.rstrip("/") for mount in spec.Mounts]
    if "/proc" not in destinations or CPUINFO in destinations or not spec.Linux.MaskedPaths:
        return
    with open(source, "rb") as handle:
        said = handle.read()
    if not said or said.endswith(b"\n\n"):
        return
    path = f"{directory}/cpuinfo"
    if not os.path.exists(path):
        with open(f"{path}.new", "wb") as handle:
            handle.write(said + b"\n")
        os.rename(f"{path}.new", path)
    spec.Mounts.add(destination=CPUINFO, type="bind", source=path, options=["bind", "ro", "nosuid", "nodev", "noexec"])
