"""Network interfaces of User-mode Linux, as text: options of its command line, requests to its mconsole.

How they are used: the taps are made by the same code as for any VMM, with NetworkSettings.tap_owner set to the user
that the kernel process will run as. That process is started in the taps' network namespace, with /dev/net/tun in its
root (a character device, 10:200, that this user may open for reading and writing), and nic_option() of each Nic on its
command line. The guest
finds the interface by its MAC address; there is no path (attach returns an empty one). While the guest runs the
mconsole would add a NIC by plug_request(), and take it out by unplug_request() once the guest has brought the interface
down: Capabilities do not offer that yet.

The kernel opens the tap when the guest brings the interface up, and closes it when it takes it down. It reads and
writes frames with virtio-net headers, so checksums and segmentation are left to the host. Of the other transports,
`fd` takes a descriptor, but no such headers, and loses it for good when the interface goes down; `hybrid` and `raw`
want CAP_NET_RAW.

Source: the kernel's virt/uml/user_mode_linux_howto_v2, arch/um/drivers/vector_kern.c and vector_user.c.
"""

import re

from katapod.vmm.devices import Nic
from katapod.vmm.errors import VmmRefused

__all__ = ["NICS_MAX", "nic_option", "plug_request", "unplug_request"]

NICS_MAX = 8  # of a pod. The kernel knows more, but each has 64 KiB of buffers for each frame of its queue
_PLAIN = re.compile(r"[A-Za-z0-9_.@-]+")  # what cannot be taken for more of an option
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")


def nic_option(nic: Nic) -> str:
    """Of the command line: `vec0:transport=tap,...`. Raises VmmRefused for a tap or a MAC address that it cannot
    name."""
    if not _PLAIN.fullmatch(nic.tap):
        raise VmmRefused(
            f"cannot attach the tap {nic.tap}: User-mode Linux takes letters, digits and . _ @ - in its name only"
        )
    if not _MAC.fullmatch(nic.mac):
        raise VmmRefused(f"cannot attach the tap {nic.tap}: {nic.mac} is no MAC address")
    # gro: buffers of 64 KiB, without which what the host leaves unsegmented does not fit.
    # mtu: also the largest that the guest may set, if it is above 1500
    return f"vec{nic.number}:transport=tap,ifname={nic.tap},mac={nic.mac},mtu={nic.mtu},gro=1"


def plug_request(nic: Nic) -> str:
    """To the mconsole, while the guest runs; the answer is empty. Raises as nic_option."""
    return f"config {nic_option(nic)}"


def unplug_request(nic: Nic) -> str:
    """To the mconsole. It is refused (EBUSY) while the guest has the interface up."""
    return f"remove vec{nic.number}"
