"""Which features of the processor a guest's kernel tells its programs of in /proc/cpuinfo. Pure.

They find them out themselves by the instruction cpuid, whatever the kernel says; but some read that file. The kernel
looks for the names in its host's, at its start. Source: get_host_cpu_features() in the kernel's arch/um.
"""

from collections.abc import Iterable

__all__ = ["CPUINFO", "features_for_guest"]

CPUINFO = "/proc/cpuinfo"  # of the host, and in the jail
NEED_THE_KERNEL = ("amx_", "ibt", "ospke", "pku", "sgx", "svm", "user_shstk", "vmx")
"""Such begin with these. A program cannot use them: it has to ask a kernel, and this one does not know of them."""
# It looks for each name anywhere in the line, so that a longer one stands for a shorter one as well.
MISTAKEN = {"3dnowprefetch": "3dnow"}


def features_for_guest(host: Iterable[str]) -> str:
    """What the kernel may read in place of the lines of its host's /proc/cpuinfo: one of the first processor's."""
    for line in host:
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            words = value.split()
            kept = [word for word in words if not word.startswith(NEED_THE_KERNEL)]
            return f"flags\t\t: {' '.join(word for word in kept if MISTAKEN.get(word, word) in words)}\n"
    return ""
