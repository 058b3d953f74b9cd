"""What a container may ask of this runtime, for engines that query it first. Pure.

Source: OCI runtime-spec, features.md and features-linux.md.
"""

from typing import Any

import katapod
from katapod.model.flags import ALL_CAPABILITIES
from katapod.model.oci_seccomp import SECCOMP_NOTIFY
from katapod.model.seccomp_profile import ACTIONS, OPERATORS

__all__ = ["oci_features"]

_SWITCHES = ("ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "atime", "noatime", "diratime")
_FLAGS = (*_SWITCHES, "nodiratime", "relatime", "norelatime", "strictatime")
_RECURSIVE = tuple(f"r{flag}" for flag in _FLAGS)
_PROPAGATION = ("private", "shared", "slave", "unbindable")
_OTHERS = (
    "bind",
    "rbind",
    *_PROPAGATION,
    *(f"r{word}" for word in _PROPAGATION),
    "sync",
    "async",
    "dirsync",
    "remount",
)
_SECCOMP_FLAGS = [f"SECCOMP_FILTER_FLAG_{name}" for name in ("TSYNC", "SPEC_ALLOW", "LOG")]


def oci_features() -> dict[str, Any]:
    """As `runc features` has it, of what crun does in every guest and the host has carried to it."""
    return {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "hooks": ["prestart", "createRuntime", "poststart", "poststop"],
        "mountOptions": sorted([*_FLAGS, *_RECURSIVE, *_OTHERS, "tmpcopyup"]),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "capabilities": list(ALL_CAPABILITIES),
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": False, "rdma": False},
            "seccomp": {
                "enabled": True,
                "actions": sorted(ACTIONS - {SECCOMP_NOTIFY}),
                "operators": sorted(OPERATORS),
                "archs": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM", "SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"],
                "knownFlags": _SECCOMP_FLAGS,
                "supportedFlags": _SECCOMP_FLAGS,
            },
            "apparmor": {"enabled": False},
            "selinux": {"enabled": False},
            "intelRdt": {"enabled": False},
            "mountExtensions": {"idmap": {"enabled": False}},
        },
        "annotations": {"org.katapod.version": katapod.__version__},
    }
