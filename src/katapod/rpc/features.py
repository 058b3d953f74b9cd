"""What an agent can do beyond upstream's protocol, by the names that it gives in AgentDetails.extra_features: a prefix
of our own, and the place in the OCI spec that it honours."""

__all__ = ["FEATURES", "PREFIX", "SECCOMP_DEFAULT_ERRNO", "UMASK"]

PREFIX = "katapod."
SECCOMP_DEFAULT_ERRNO = f"{PREFIX}linux.seccomp.defaultErrnoRet"
UMASK = f"{PREFIX}process.user.umask"
FEATURES = (SECCOMP_DEFAULT_ERRNO, UMASK)
