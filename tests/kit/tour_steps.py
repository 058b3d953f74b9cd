"""The walkthrough's commands, row by row, as they are typed on a node with Katapod.

The rows are numbered as in docs/walkthrough.md. Each command is the author's own, or stands for it; what it has to say
is in tests/e2e/test_walkthrough_rows.py.
"""

from dataclasses import dataclass
from enum import StrEnum

from kit.containerd import K8S

__all__ = ["CLUSTER", "ENABLE_CONSOLE", "OPENSHIFT", "REMOVAL", "STEPS", "Place", "Step"]


class Place(StrEnum):
    NODE = "node"
    CONTAINER = "container"  # through the CRI's exec, as `crictl exec` and `oc rsh` go
    PAGE = "page"  # on the node too, but only for docs/walkthrough.md: it needs an RPM, or takes long
    CLUSTER = "cluster"  # where an administrator of a Kubernetes is: kit.cluster_tour
    CLUSTER_NODE = "cluster node"  # on the node of that one
    OPENSHIFT = "openshift"  # where an administrator of an OpenShift is, whose machine-config operator is simulated


@dataclass(frozen=True, slots=True)
class Step:
    """One command. Its variables: SANDBOX and SYSTEMD, CONTAINER, QEMU (a process id), PACKAGE."""

    row: int
    name: str
    command: str
    place: Place = Place.NODE

    @property
    def key(self) -> str:
        return f"W{self.row} {self.name}"

    @property
    def shown(self) -> str:
        """As who follows the tour types it."""
        return f"crictl exec $CONTAINER {self.command}" if self.place is Place.CONTAINER else self.command


def _console(command: str, sandbox: str = "SANDBOX") -> str:
    return f"kata-runtime exec ${sandbox} {command}"


def _inside(command: str) -> str:
    return f"nsenter -t $QEMU -n {command}"


def _cluster(row: int, name: str, command: str) -> Step:
    return Step(row, name, command, Place.CLUSTER)


STEPS = (
    _cluster(1, "operator", "kubectl apply -k packaging/operator"),
    _cluster(1, "kataconfig", "cat kataconfig.yaml; kubectl apply -f kataconfig.yaml"),
    _cluster(1, "ready", "kubectl wait --for=condition=Ready kataconfig/example-kataconfig --timeout=60m"),
    _cluster(1, "get", "kubectl get kataconfig"),
    _cluster(1, "status", "kata-runtime cluster status"),
    _cluster(
        1,
        "events",
        "kubectl get events --field-selector involvedObject.kind=KataConfig"
        " -o custom-columns=REASON:.reason,MESSAGE:.message",
    ),
    _cluster(1, "delete", "kubectl delete kataconfig example-kataconfig --wait=false"),
    _cluster(
        1, "blocked", "kubectl wait --for=condition=Blocked kataconfig --all --timeout=10m; kubectl get kataconfig"
    ),
    _cluster(1, "gone", "kubectl delete deployment mypod; kubectl wait --for=delete kataconfig --all --timeout=60m"),
    _cluster(2, "class", "kubectl get runtimeclass/kata -o yaml"),
    Step(2, "overhead", "kata-runtime overhead", Place.PAGE),
    Step(3, "extension", "kubectl get machineconfig/50-enable-sandboxed-containers-extension -o yaml", Place.OPENSHIFT),
    Step(3, "configs", "kubectl get machineconfigs", Place.OPENSHIFT),
    _cluster(3, "nodes", "kubectl get nodes -L katapod.io/runtime,katapod.io/accelerator"),
    Step(3, "engine", "sed -n '/BEGIN katapod/,$p' /etc/containerd/config.toml", Place.CLUSTER_NODE),
    Step(
        4,
        "payload",
        "ls /opt/katapod /opt/katapod/*/bin; /opt/katapod/*/bin/kata-runtime --version",
        Place.CLUSTER_NODE,
    ),
    Step(5, "files", "rpm -qlp $PACKAGE | grep -v ^/usr/lib/katapod/", Place.PAGE),
    Step(6, "image", "ls -Rl /var/cache/kata-containers"),
    Step(7, "crio", "cat /etc/crio/crio.conf.d/50-kata"),
    Step(7, "containerd", "grep -v '^#' /usr/share/katapod/containerd/kata.toml"),
    Step(8, "unit", "cat /usr/lib/systemd/system/kata-osbuilder-generate.service"),
    Step(8, "recipe", "cat /usr/share/kata-containers/image.toml"),
    _cluster(9, "deployment", "cat deployment.yaml; kubectl create -f deployment.yaml"),
    _cluster(9, "available", "kubectl wait --for=condition=Available deployment/mypod --timeout=30m"),
    _cluster(9, "pods", "kubectl get pods -o wide"),
    Step(9, "containers", f"ctr --namespace {K8S} containers list"),
    Step(9, "tasks", f"ctr --namespace {K8S} tasks list"),
    Step(10, "qemu", r"ps ww -o args= -p $QEMU | sed 's/ -/\n  -/g'"),
    Step(11, "paths", "kata-runtime --show-default-config-paths"),
    Step(12, "config", "kata-runtime config show"),
    Step(13, "env", "kata-runtime env"),
    Step(14, "build", "/usr/libexec/kata-containers/osbuilder/kata-osbuilder.sh -c"),
    Step(15, "enabled", "grep debug_console_enabled /etc/kata-containers/configuration.toml"),
    Step(15, "shell", "echo 'cd /etc; echo *' | kata-runtime exec $SANDBOX"),
    Step(16, "ls", _console("ls /etc")),
    Step(16, "ip", _console("ip address")),
    Step(16, "fib", _console("cat /proc/net/fib_trie")),
    Step(17, "uname", _console("uname -a")),
    Step(17, "lsmod", _console("lsmod")),
    Step(17, "mount", _console("mount")),
    Step(18, "agent", _console("ps -o pid,ppid,args")),
    Step(18, "systemd", _console("ps -o pid,ppid,args", "SYSTEMD")),
    Step(19, "free", _console("free -h")),
    Step(19, "cmdline", _console("cat /proc/cmdline")),
    Step(20, "units", _console("systemctl --no-pager list-units", "SYSTEMD")),
    Step(20, "target", _console("systemctl cat kata-containers.target", "SYSTEMD")),
    Step(20, "service", _console("systemctl cat kata-agent.service", "SYSTEMD")),
    Step(20, "rootfs", _console("ls /run/kata-containers/$CONTAINER/rootfs")),
    _cluster(21, "uname", "kubectl exec deployment/mypod -- uname -r"),
    _cluster(21, "address", "kubectl exec deployment/mypod -- ip address show dev eth0"),
    _cluster(21, "processes", "kubectl exec deployment/mypod -- ps -o pid,tty,args"),
    Step(21, "ls", "ls", Place.CONTAINER),
    Step(21, "ip", "ip address", Place.CONTAINER),
    Step(21, "ps", "ps -o pid,tty,args", Place.CONTAINER),
    Step(22, "lsns", "lsns --type net --output NS,TYPE,PID,COMMAND | grep sandbox-$SANDBOX | cut -c 1-150"),
    Step(22, "inside", _inside("ip address")),
    Step(22, "outside", "ip link show type veth"),
    Step(23, "nft", _inside("nft list ruleset")),
    *(
        Step(24, f"{device}-{what}", _inside(f"tc -s -p {command}"))
        for device in ("eth0", "tap0_kata")
        for what, command in (
            ("qdisc", f"qdisc show dev {device}"),
            ("root", f"filter show dev {device} root"),
            ("ingress", f"filter show dev {device} ingress"),
            ("egress", f"filter show dev {device} egress"),
        )
    ),
    Step(25, "info", "rpm -qpi $PACKAGE", Place.PAGE),
    Step(25, "requires", "rpm -qp --requires $PACKAGE", Place.PAGE),
    Step(25, "check", "kata-runtime check"),
    Step(26, "inspect", "kata-runtime inspect $SANDBOX"),
    Step(26, "json", "kata-runtime inspect --json $SANDBOX | jq --compact-output keys"),
)
REMOVAL = ("W1 delete", "W1 blocked", "W1 gone")
CLUSTER = (
    *(step for step in STEPS if step.place in (Place.CLUSTER, Place.CLUSTER_NODE) and step.key not in REMOVAL),
    *(step for step in STEPS if step.key in REMOVAL),
)
"""Those on a Kubernetes, in the order in which they are typed."""
OPENSHIFT = tuple(step for step in STEPS if step.place is Place.OPENSHIFT)

ENABLE_CONSOLE = (
    "mkdir -p /etc/kata-containers/",
    "install -o root -g root -m 0640 /usr/share/kata-containers/defaults/configuration.toml /etc/kata-containers",
    r"sed -i -e 's/^# *\(debug_console_enabled\).*=.*$/\1 = true/g' /etc/kata-containers/configuration.toml",
)
"""The author's own commands, letter by letter: Katapod's file has to suit them."""
