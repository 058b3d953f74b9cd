"""KataConfig, the object by which a cluster's users ask for Katapod on nodes: its spec, and the status we answer with.

Names of fields are those of `kataconfiguration.openshift.io/v1`; the schema in packaging/operator/kataconfig-crd.yaml
says the same to the API server, which refuses what does not fit, and fills in the defaults.
"""

from typing import Literal

from msgspec import Struct

__all__ = [
    "Accelerator",
    "Backend",
    "Condition",
    "KataNodes",
    "LogLevel",
    "NodeStatus",
    "Overhead",
    "Requirement",
    "Rollout",
    "RuntimeClassSpec",
    "Selector",
    "Spec",
    "Status",
]

Accelerator = Literal["kvm", "uml", "tcg"]
Backend = Literal["Auto", "MachineConfig", "NodeJobs"]
LogLevel = Literal["fatal", "panic", "error", "warn", "info", "debug", "trace"]
"""CRI-O's. Source: crio(8), --log-level."""


class _Value(Struct, frozen=True, rename="camel"):
    """Fields that we do not know are left to newer versions."""


class Requirement(_Value, frozen=True):
    """One of matchExpressions. Source: Kubernetes API, LabelSelectorRequirement."""

    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: tuple[str, ...] = ()


class Selector(_Value, frozen=True):
    match_labels: dict[str, str] = {}
    match_expressions: tuple[Requirement, ...] = ()


class Overhead(_Value, frozen=True):
    """What a pod costs beside its containers. Quantities of Kubernetes."""

    mode: Literal["fixed", "measured"] = "fixed"  # measured: the most that a node has, once one has measured it
    cpu: str = "250m"
    memory: str = "350Mi"


class RuntimeClassSpec(_Value, frozen=True):
    name: str
    handler: str = ""  # of the engine; empty: kata or, with a configuration, one of the class's name
    accelerator: Accelerator | None = None  # only nodes whose VMs run by it; None: all
    overhead: Overhead = Overhead()
    configuration: str = ""  # drop-in of configuration.toml for its handler


class Rollout(_Value, frozen=True):
    canary: bool = True  # the first node alone
    max_unavailable: int = 1  # nodes that are changed at once, those that failed included
    paused: bool = False
    drain: bool = False  # pods of ours are evicted before a node is installed anew


class Spec(_Value, frozen=True):
    kata_config_pool_selector: Selector | None = None  # None: all nodes that can be scheduled on
    check_node_eligibility: bool = False
    backend: Backend = "Auto"  # who puts the runtime on nodes
    log_level: LogLevel = "info"
    accelerators: tuple[Accelerator, ...] = ("kvm", "uml", "tcg")
    runtime_classes: tuple[RuntimeClassSpec, ...] = (
        RuntimeClassSpec("kata"),
        RuntimeClassSpec("kata-uml", accelerator="uml"),
        RuntimeClassSpec("kata-tcg", accelerator="tcg"),
    )
    configuration: str = ""  # drop-in of configuration.toml for all handlers
    rollout: Rollout = Rollout()


class Condition(_Value, frozen=True):
    """Source: Kubernetes API, metav1.Condition."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str
    last_transition_time: str  # when `status` became what it is
    observed_generation: int


class NodeStatus(_Value, frozen=True):
    """Where a node is, and why."""

    name: str
    phase: str
    message: str = ""
    target: str = ""  # the payload that is installed and proven
    accelerator: str = ""
    kernel: str = ""  # of the proof's sandbox
    proof_seconds: float = 0.0
    engine: str = ""


class KataNodes(_Value, frozen=True):
    """Upstream's lists. Counts are exact; of more than status.NAMES names a list has the first."""

    node_count: int = 0
    ready_node_count: int = 0
    installed: tuple[str, ...] = ()
    installing: tuple[str, ...] = ()
    waiting_to_install: tuple[str, ...] = ()
    failed_to_install: tuple[str, ...] = ()
    uninstalling: tuple[str, ...] = ()
    waiting_to_uninstall: tuple[str, ...] = ()
    failed_to_uninstall: tuple[str, ...] = ()


class Status(_Value, frozen=True):
    """All fields are always written: a patch would leave what it does not name."""

    observed_generation: int = 0
    summary: str = ""
    conditions: tuple[Condition, ...] = ()
    kata_nodes: KataNodes = KataNodes()
    nodes: tuple[NodeStatus, ...] = ()  # at most status.LINES: first those that are not ready
    nodes_omitted: int = 0
    runtime_classes: tuple[str, ...] = ()
    backend: str = ""  # the one that was chosen
    waiting_for_mco_to_start: bool = False  # the machine-config operator has not answered our last change yet
