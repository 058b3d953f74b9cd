"""Extensions of the agent protocol, by the names that an agent announces in AgentDetails.extra_features: our prefix,
and the field of the OCI spec, or of a message, that it honours."""

__all__ = [
    "BUNDLE_FILES",
    "CPU_BURST",
    "CPU_IDLE",
    "FEATURES",
    "PERSONALITY",
    "PREFIX",
    "SECCOMP_DEFAULT_ERRNO",
    "UMASK",
    "UNIFIED",
]

PREFIX = "katapod."
SECCOMP_DEFAULT_ERRNO = f"{PREFIX}linux.seccomp.defaultErrnoRet"
UMASK = f"{PREFIX}process.user.umask"
PERSONALITY = f"{PREFIX}linux.personality"
UNIFIED = f"{PREFIX}linux.resources.unified"
CPU_BURST = f"{PREFIX}linux.resources.cpu.burst"
CPU_IDLE = f"{PREFIX}linux.resources.cpu.idle"
BUNDLE_FILES = f"{PREFIX}files"  # of CreateContainerRequest
FEATURES = (SECCOMP_DEFAULT_ERRNO, UMASK, PERSONALITY, UNIFIED, CPU_BURST, CPU_IDLE, BUNDLE_FILES)
