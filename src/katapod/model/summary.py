"""What a sandbox says of itself in short, for kata-monitor's page: GET /summary of its management socket, as JSON."""

import msgspec

__all__ = ["GuestSummary", "SandboxSummary"]


class GuestSummary(msgspec.Struct, frozen=True):
    """What the guest tells, and may lie about. Bytes; `tasks`: processes and threads that exist."""

    memory_total: float = 0
    memory_available: float = 0
    load1: float = 0
    tasks: float = 0


class SandboxSummary(msgspec.Struct, frozen=True):
    """Counters grow as long as the sandbox lives; rates are the reader's to take, by `at`.

    The keys of `memory` and `cpu` are the parts of a sandbox on its host: guest (memory only), vmm (with
    its helpers and who serves its disks), virtiofsd, supervisor.
    """

    sandbox_id: str
    at: float  # seconds, of the host's monotonic clock
    vcpus: int
    guest_bytes: int  # the size of the guest's memory
    vmm_state: str  # one letter as in ps(1), T: stopped by a signal; empty: it has ended
    memory: dict[str, int]  # resident, bytes
    cpu: dict[str, float]  # seconds so far
    disk_read: int  # bytes, from disks by QEMU and virtiofsd
    disk_written: int
    net_received: int | None  # bytes, by the pod; None: it has no network
    net_sent: int | None
    guest: GuestSummary | None = None  # only if it was asked for, and the guest answers
