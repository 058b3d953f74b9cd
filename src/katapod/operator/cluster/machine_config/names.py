"""Names that OpenShift's machine-config operator and the one for sandboxed containers have given."""

API_GROUP = "machineconfiguration.openshift.io"
ROLE = f"{API_GROUP}/role"
"""The label of a MachineConfig by which pools select it."""
STATE = f"{API_GROUP}/state"
CURRENT = f"{API_GROUP}/currentConfig"
DESIRED = f"{API_GROUP}/desiredConfig"
REASON = f"{API_GROUP}/reason"
"""Annotations of a node, of its machine-config daemon: Done, Working or Degraded; what it has; what it is told to have,
just before that begins; why it fails."""

EXTENSION_CONFIG = "50-enable-sandboxed-containers-extension"
IMAGE_CONFIG = "50-enable-sandboxed-containers-image"
POOL, WORKER, MASTER = "kata-oc", "worker", "master"
NODE_ROLE = "node-role.kubernetes.io/"
POOL_LABEL = "pools.operator.machineconfiguration.openshift.io/"
LOG_CONFIG = "kata-crio-config"
MONITOR = "openshift-sandboxed-containers-monitor"

POOL_ROLE = NODE_ROLE + POOL
"""The label that makes a node a member of our pool."""
HELD = "katapod.io/held"
"""The annotation of our pool, `true`, that says that we have paused it, and nobody else."""
CONTENT = "katapod.io/content"
"""The annotation of an object with a digest of what we have asked for."""
