"""The proof that a node can run pods: a sandbox, started by its engine, whose kernel is another one than the node's."""

import json
import platform
import time
import uuid

import msgspec

from katapod.operator.node.engine import Engine
from katapod.operator.node.errors import NodeError
from katapod.operator.node.host import Host
from katapod.operator.node.payload import SHIM, payload_path
from katapod.operator.report import ACCELERATORS, Measured

__all__ = ["Proof", "accelerator_of", "measure", "prove"]

LIMIT_S = 300.0
K8S = "k8s.io"  # containerd's namespace of the kubelet's containers


class Proof(msgspec.Struct, frozen=True):
    kernel: str  # of the VM, as uname -r says it there
    seconds: float  # from `ctr run` to its end


def accelerator_of(host: Host, target: str) -> tuple[str, str]:
    """By which accelerator VMs run on this node, having tried those that there are: kvm, uml or tcg; and why."""
    said = host.run(
        f"{payload_path(target)}/bin/kata-runtime", "check", "--boot", "--json", limit_s=LIMIT_S, check=False
    )
    try:
        lines = json.loads(said.stdout)["lines"]
        found = next(line["found"] for line in lines if line["line_id"] == "accelerator")
    except (ValueError, KeyError, StopIteration) as exc:
        raise NodeError(
            f"kata-runtime check says nothing of an accelerator: {(said.stderr or said.stdout)[-500:]}"
        ) from exc
    name, _, why = found.partition(" ")
    if name not in ACCELERATORS:
        missing = [f"{line['title']}: {line['found']}" for line in lines if line["outcome"] == "missing"]
        raise NodeError(f"this node cannot run VMs: {'; '.join(missing) or found}")
    return name, why.strip()


def prove(host: Host, engine: Engine, target: str, config: str = "") -> Proof:
    """Start a sandbox by the engine and our shim, and ask its kernel's name. Raises NodeError.

    `config`: the handler's configuration.toml; empty for the node's.
    """
    home = payload_path(target)
    name = f"katapod-proof-{uuid.uuid4().hex[:8]}"
    ctr = [*engine.ctr, "--namespace", K8S]
    command = ["--runtime", f"{home}/bin/{SHIM}", *(["--runtime-config-path", config] if config else [])]
    command += ["--rootfs", f"{home}/proof", name, "/bin/busybox", "uname", "-r"]
    began = time.monotonic()
    try:
        said = host.run(*ctr, "run", "--rm", *command, limit_s=LIMIT_S)
    finally:
        host.run(*ctr, "tasks", "delete", "--force", name, check=False)
        host.run(*ctr, "containers", "delete", name, check=False)
    kernel = said.stdout.strip()
    if not kernel or kernel == platform.release():
        raise NodeError(f"the proof's sandbox has the node's own kernel: {kernel!r}")
    return Proof(kernel, time.monotonic() - began)


def measure(host: Host, target: str, config: str = "") -> Measured:
    """What a sandbox takes on this node beyond its containers' limits. Raises NodeError."""
    options = ["--config", config] if config else []
    said = host.run(f"{payload_path(target)}/bin/kata-runtime", *options, "overhead", "--json", limit_s=LIMIT_S).stdout
    try:
        return msgspec.json.decode(said, type=_Overhead).measured()
    except msgspec.MsgspecError as exc:
        raise NodeError(f"kata-runtime overhead says no measurement: {exc}: {said[-500:]!r}") from exc


class _Overhead(msgspec.Struct, frozen=True):
    """Of `kata-runtime overhead --json` what is used here."""

    memory_mib: int
    cpu_millis: int

    def measured(self) -> Measured:
        return Measured(self.memory_mib, self.cpu_millis)
