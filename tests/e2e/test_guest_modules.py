"""What containers ask of a kernel and its modules bring: of the default guest image, loaded when it is asked for."""

import os
from pathlib import Path

import pytest

from kit.kata import Kata

CONTENTS = r"""
try() { "$@" > /tmp/out 2>&1 || { echo "FAILED: $*: $(cat /tmp/out)"; status=1; }; }
for kind in dummy veth bridge ifb wireguard bond; do try ip link add x$kind type $kind; done
try ip link add link xdummy name xvlan type vlan id 5
try ip link add link xdummy name xmacvlan type macvlan mode bridge
try ip link add link xveth name xipvlan type ipvlan
try ip link add xvxlan type vxlan id 42 dev xdummy dstport 4789
try ip link add xgre type gre remote 10.0.0.2 local 10.0.0.1
try ip tuntap add xtun mode tun
try iptables-legacy -A INPUT -p tcp -m conntrack --ctstate NEW -m string --string abc --algo bm -j DROP
try iptables-nft -t nat -A POSTROUTING -m comment --comment x -j MASQUERADE
try ip6tables-legacy -A INPUT -p tcp --dport 80 -j REJECT
try nft add table inet t
try nft add chain inet t c '{ type filter hook input priority 0 ; }'
try nft add rule inet t c ct state established limit rate 5/second counter accept
try tc qdisc add dev xdummy root htb
try tc qdisc add dev xdummy ingress
try tc filter add dev xdummy ingress protocol ip flower dst_ip 10.1.2.3 action mirred egress redirect dev xveth
try sh -c 'truncate -s 8M /tmp/img && mkfs.ext4 -q /tmp/img && mount -o loop /tmp/img /mnt && umount /mnt'
mount -t tmpfs t /run && cd /run && mkdir l u w
try mount -t overlay o -o lowerdir=l,upperdir=u,workdir=w /mnt
try sh -c ': <> /dev/fuse'
exit $status
"""


LACKED = (" wireguard", "try iptables-nft -t nat ", "try nft ")
"""What the kernel of User-mode Linux does not have: a kind of interface, and beginnings of lines."""


@pytest.mark.core
def test_modules_are_loaded_on_demand(kata: Kata, accelerator: str, tmp_path: Path) -> None:
    """With the host's tools, and without its modules: `modprobe` in the container must find none."""
    root, empty = tmp_path / "root", tmp_path / "empty"
    for folder in (empty, root, *(root / name for name in ("etc", "proc", "sys", "dev", "tmp", "run", "usr", "mnt"))):
        folder.mkdir()
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(os.readlink(f"/{name}"))
    (root / "etc/protocols").write_bytes(Path("/etc/protocols").read_bytes())
    script = CONTENTS
    if accelerator == "uml":
        lines = script.replace(LACKED[0], "").splitlines()
        script = "\n".join(line for line in lines if not line.startswith(LACKED))
    (root / "script").write_text(script)
    volumes = ("-v", "/usr:/usr:ro", "-v", "/etc/alternatives:/etc/alternatives:ro", "-v", f"{empty}:/usr/lib/modules")
    result = kata.run("--privileged", "--rootfs", str(root), *volumes, "sh", "/script", timeout=300)
    assert (result.code, result.stdout, result.stderr) == (0, "", "")
