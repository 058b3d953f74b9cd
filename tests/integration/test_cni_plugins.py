"""Real CNI plugins in a network namespace of the test's own, which plays the host."""

import asyncio
import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from katapod.host.bridge import bridge_subnet, filters_forwarding, remove_bridge
from katapod.host.cni import CniFailed, check, load_networks
from katapod.host.loopback_guard import guard_loopback
from katapod.host.named_netns import make_netns, remove_netns
from katapod.host.netns import scan_netns
from katapod.host.state import StateStore
from katapod.kernel.process import CLONE_NEWNET, setns
from katapod.model.attachment import AttachmentRecord
from katapod.model.config import KatapodConfig
from katapod.model.errors import AlreadyExists, KatapodError, MissingProgram, NotFound, UsageError
from katapod.model.layout import Layout
from katapod.model.net_flags import NetworkRequest, parse_publish
from katapod.model.record import SandboxRecord
from katapod.plan.attachment import attachment_of, result_of
from katapod.plan.loopback_guard import guard_rules
from katapod.sandbox.attachment import attached, prepare_attachment, release_attachment
from katapod.sandbox.recovery import reap_dead, remove_sandbox
from kit.kata import RUN_PREFIX

_Result = TypeVar("_Result")
HOST = f"{RUN_PREFIX}cni"


class Host:
    """A namespace that stands for the host: what runs in it sees no other network."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = Path("/run/netns", name)

    def run(self, work: Callable[[], Coroutine[Any, Any, _Result]]) -> _Result:
        """Run a coroutine in a thread that has entered: programs that it starts are in there too."""
        outcome: list[_Result] = []
        failure: list[BaseException] = []

        def enter() -> None:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                setns(fd, CLONE_NEWNET)
                outcome.append(asyncio.run(work()))
            except BaseException as exc:
                failure.append(exc)
            finally:
                os.close(fd)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return outcome[0]

    def command(self, *words: str) -> str:
        done = subprocess.run(
            ["nsenter", f"--net={self.path}", "--", *words], capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, done
        return done.stdout

    def traces(self, sandbox_id: str) -> list[str]:
        """What is left of a sandbox: rules, interfaces, leases, its namespace."""
        rules = [
            line for table in ("nat", "filter") for line in self.command("iptables-save", "-t", table).splitlines()
        ]
        found = [line for line in rules if f'"{sandbox_id}"' in line]
        found += [link["ifname"] for link in json.loads(self.command("ip", "-j", "link")) if "veth" in link["ifname"]]
        leases = Path("/run/katapod/networks/bridge").glob("*.*.*.*")
        found += [str(path) for path in leases if path.read_text().split()[:1] == [sandbox_id]]
        found += [str(path) for path in Path("/run/netns").glob(f"kata-{sandbox_id}")]
        return found


@pytest.fixture
def host() -> Iterator[Host]:
    found = Host(HOST)
    asyncio.run(make_netns(found.path))
    yield found
    remove_netns(found.path)


@pytest.fixture
def settings(tmp_path: Path) -> KatapodConfig:
    return KatapodConfig(cni_conf_dir=str(tmp_path / "net.d"))


async def plan(request: NetworkRequest, settings: KatapodConfig, sandbox_id: str) -> AttachmentRecord:
    with contextlib.ExitStack() as held:
        record = await prepare_attachment(request, settings, sandbox_id, held)
    assert record is not None
    return record


async def attach_it(record: AttachmentRecord, sandbox_id: str) -> AttachmentRecord:
    async with attached(record, sandbox_id) as task:
        return await task


def test_the_built_in_bridge_is_made_used_and_undone(host: Host, settings: KatapodConfig) -> None:
    sandbox_id = f"{RUN_PREFIX}bridge"

    async def life() -> None:
        assert bridge_subnet() == ""
        request = NetworkRequest(name="bridge", ports=parse_publish("8080:80"))
        record = await attach_it(await plan(request, settings, sandbox_id), sandbox_id)
        assert bridge_subnet() == "10.186.0.0/16"
        assert record.gateway == "10.186.0.1"
        assert record.addresses[0].startswith("10.186.")
        rules = host.command("iptables-save", "-t", "nat")
        assert f"--to-destination {record.addresses[0]}:80" in rules
        assert "MASQUERADE" in rules
        inside = host.command("ip", "-n", f"kata-{sandbox_id}", "-j", "address", "show", "eth0")
        assert record.addresses[0] in inside
        assert await release_attachment(record, sandbox_id) == []
        assert host.traces(sandbox_id) == []
        assert await release_attachment(record, sandbox_id) == []  # once more does no harm
        assert await remove_bridge()
        assert not await remove_bridge()

    host.run(life)


def test_the_loopback_is_kept_from_bridges(host: Host, settings: KatapodConfig) -> None:
    """Whoever made them: twice is as once, and a rule goes with its bridge."""
    ids = [f"{RUN_PREFIX}loop{number}" for number in range(2)]

    def rules() -> list[str]:
        return sorted(line for line in host.command("iptables", "-t", "raw", "-S").splitlines() if line[:2] == "-A")

    async def life() -> None:
        records = [await plan(NetworkRequest(name="bridge"), settings, sandbox_id) for sandbox_id in ids]
        pairs = list(zip(records, ids, strict=True))
        for pair in pairs:
            await attach_it(*pair)
        interfaces = [
            interface for record in records for interface in (await scan_netns(Path(record.netns))).interfaces
        ]
        await asyncio.gather(*(guard_loopback([interface]) for interface in interfaces))
        await guard_loopback(interfaces)
        assert rules() == sorted(guard_rules("kata0"))
        host.command("iptables", "-t", "raw", "-A", "PREROUTING", *guard_rules("gone0")[0].split()[2:])
        host.command("iptables", "-t", "raw", "-A", "PREROUTING", "-i", "gone0", "-j", "DROP")
        await guard_loopback(())
        assert rules() == sorted([*guard_rules("kata0"), "-A PREROUTING -i gone0 -j DROP"])
        for pair in pairs:
            assert await release_attachment(*pair) == []
        assert await remove_bridge()
        assert rules() == ["-A PREROUTING -i gone0 -j DROP"]  # another's

    host.run(life)


def test_many_at_once(host: Host, settings: KatapodConfig) -> None:
    ids = [f"{RUN_PREFIX}many{number}" for number in range(8)]

    async def one(sandbox_id: str) -> AttachmentRecord:
        request = NetworkRequest(name="bridge", ports=parse_publish("80"))
        return await attach_it(await plan(request, settings, sandbox_id), sandbox_id)

    async def life() -> None:
        records = await asyncio.gather(*(one(sandbox_id) for sandbox_id in ids))
        assert len({record.addresses for record in records}) == len(ids)
        left = await asyncio.gather(
            *(release_attachment(record, name) for record, name in zip(records, ids, strict=True))
        )
        assert [item for items in left for item in items] == []
        assert [trace for sandbox_id in ids for trace in host.traces(sandbox_id)] == []

    host.run(life)


SLOW_IPTABLES = """#!/bin/sh
case "$*" in *"-N CNI-HOSTPORT-DNAT"*) echo >> {made}; sleep 0.5 ;; esac
exec /usr/sbin/iptables "$@"
"""


def test_the_first_published_ports_of_a_host_at_once(
    host: Host, settings: KatapodConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """portmap looks for its chain of the firewall and then makes it. Two that make it in one moment fail: only the
    first may have seen none."""
    made = tmp_path / "made"
    (tmp_path / "iptables").write_text(SLOW_IPTABLES.format(made=made))
    (tmp_path / "iptables").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    ids = [f"{RUN_PREFIX}first{number}" for number in range(3)]

    async def life() -> None:
        request = NetworkRequest(name="bridge", ports=parse_publish("80"))
        records = [await plan(request, settings, sandbox_id) for sandbox_id in ids]
        pairs = list(zip(records, ids, strict=True))
        outcomes = await asyncio.gather(*(attach_it(*pair) for pair in pairs), return_exceptions=True)
        assert [await release_attachment(*pair) for pair in pairs] == [[], [], []]
        assert [outcome for outcome in outcomes if isinstance(outcome, BaseException)] == []
        assert made.read_text() == "\n"
        assert [trace for sandbox_id in ids for trace in host.traces(sandbox_id)] == []

    host.run(life)


def test_a_namespace_whose_making_was_cut_short(host: Host, settings: KatapodConfig) -> None:
    """`ip netns add` that is killed leaves a plain file of that name."""
    sandbox_id = f"{RUN_PREFIX}short"

    async def life() -> None:
        record = await plan(NetworkRequest(name="bridge", ports=parse_publish("80")), settings, sandbox_id)
        Path(record.netns).touch()
        assert await release_attachment(record, sandbox_id) == []
        assert host.traces(sandbox_id) == []

    host.run(life)


def test_an_address_and_a_mac_of_ones_own(host: Host, settings: KatapodConfig) -> None:
    sandbox_id = f"{RUN_PREFIX}own"

    async def life() -> None:
        request = NetworkRequest(name="bridge", ip="10.186.77.7", mac="02:00:5e:00:53:01")
        record = await attach_it(await plan(request, settings, sandbox_id), sandbox_id)
        assert record.addresses == ("10.186.77.7",)
        result = result_of(record)
        assert result is not None
        await check(attachment_of(record, sandbox_id), result)
        inside = host.command("ip", "-n", f"kata-{sandbox_id}", "-j", "link", "show", "eth0")
        assert json.loads(inside)[0]["address"] == "02:00:5e:00:53:01"
        assert await release_attachment(record, sandbox_id) == []
        assert host.traces(sandbox_id) == []

    host.run(life)


def test_a_firewall_of_the_host_is_told(host: Host, settings: KatapodConfig) -> None:
    host.command("iptables", "-P", "FORWARD", "DROP")
    sandbox_id = f"{RUN_PREFIX}fw"

    async def life() -> None:
        assert await filters_forwarding()
        record = await attach_it(await plan(NetworkRequest(name="bridge"), settings, sandbox_id), sandbox_id)
        assert f"-s {record.addresses[0]}/32 -j ACCEPT" in host.command("iptables", "-S", "CNI-FORWARD")
        assert await release_attachment(record, sandbox_id) == []
        assert record.addresses[0] not in host.command("iptables", "-S", "CNI-FORWARD")

    host.run(life)


def test_networks_of_files(host: Host, settings: KatapodConfig) -> None:
    folder = Path(settings.cni_conf_dir)
    folder.mkdir()
    plain = {"type": "bridge", "bridge": "own0", "ipam": {"type": "static", "addresses": [{"address": "10.99.0.7/24"}]}}
    (folder / "10-own.conflist").write_text(json.dumps({"cniVersion": "0.4.0", "name": "own", "plugins": [plain]}))
    (folder / "20-bad.conflist").write_text("{")
    sandbox_id = f"{RUN_PREFIX}file"

    async def life() -> None:
        networks, problems = load_networks(folder)
        assert [network.name for network in networks] == ["own"]
        assert "20-bad.conflist" in str(problems[0])
        record = await attach_it(await plan(NetworkRequest(name="own"), settings, sandbox_id), sandbox_id)
        assert record.addresses == ("10.99.0.7",)
        (folder / "10-own.conflist").unlink()  # what is attached is undone by what it was attached with
        assert await release_attachment(record, sandbox_id) == []
        assert host.traces(sandbox_id) == []
        with pytest.raises(NotFound, match=r"cannot find network own.*20-bad"):
            await plan(NetworkRequest(name="own"), settings, sandbox_id)

    host.run(life)


def test_a_failed_plugin_says_why_and_nothing_stays(host: Host, settings: KatapodConfig) -> None:
    folder = Path(settings.cni_conf_dir)
    folder.mkdir()
    bridge = {
        "type": "bridge",
        "bridge": "own0",
        "ipam": {"type": "host-local", "dataDir": str(folder), "ranges": [[{"subnet": "10.99.0.0/24"}]]},
    }
    broken = {"type": "portmap", "capabilities": {"portMappings": True}, "markMasqBit": 77}
    chain = {"cniVersion": "1.0.0", "name": "own", "plugins": [bridge, broken]}
    (folder / "10-own.conflist").write_text(json.dumps(chain))
    sandbox_id = f"{RUN_PREFIX}broken"

    async def life() -> None:
        record = await plan(NetworkRequest(name="own", ports=parse_publish("80")), settings, sandbox_id)
        with pytest.raises(
            CniFailed, match=r"cannot attach to network own: the CNI plugin portmap failed: .*code"
        ) as got:
            await attach_it(record, sandbox_id)
        assert "10-own.conflist" in got.value.hint
        # portmap refuses DEL as well: reported, and the rest is undone all the same
        left = await release_attachment(record, sandbox_id)
        assert "detach from network own: the CNI plugin portmap failed" in str(left[0])
        assert len(left) == 1
        assert [path.name for path in (folder / "own").glob("*.*.*.*")] == []
        assert host.traces(sandbox_id) == []

    host.run(life)


def test_what_the_host_lacks_is_named(host: Host, settings: KatapodConfig, tmp_path: Path) -> None:
    bare = msgspec.structs.replace(settings, cni_plugin_dirs=(str(tmp_path),))

    async def life() -> None:
        with pytest.raises(MissingProgram, match="CNI plugin bridge") as caught:
            await plan(NetworkRequest(name="bridge"), bare, "x")
        assert "containernetworking-plugins" in caught.value.hint
        with contextlib.ExitStack() as held:
            for request in (NetworkRequest(name="none"), NetworkRequest()):
                assert await prepare_attachment(request, bare, "x", held) is None
            with pytest.raises(MissingProgram):  # who wants a port wants a network
                await prepare_attachment(NetworkRequest(ports=parse_publish("80")), bare, "x", held)
            with pytest.raises(UsageError, match="cannot publish ports"):
                await prepare_attachment(NetworkRequest(name="none", ports=parse_publish("80")), bare, "x", held)

    host.run(life)


def test_a_taken_port_is_refused_before_anything_is_made(host: Host, settings: KatapodConfig) -> None:
    async def life() -> None:
        with contextlib.ExitStack() as held:
            request = NetworkRequest(name="bridge", ports=parse_publish("8080:80"))
            await prepare_attachment(request, settings, "x", held)
            with pytest.raises(AlreadyExists, match="port 8080/tcp"):
                await prepare_attachment(request, settings, "y", held)

    host.run(life)


def test_recovery_from_the_record_alone(host: Host, settings: KatapodConfig, tmp_path: Path) -> None:
    sandbox_id = f"{RUN_PREFIX}dead"
    store = StateStore(
        Layout(tmp_path / "sbs", tmp_path / "vm", tmp_path / "share", tmp_path / "data", tmp_path / "images")
    )

    def dead(record: AttachmentRecord) -> None:
        """A supervisor that was killed before it could record the result."""
        os.close(store.create(SandboxRecord(sandbox_id, 0.0, 1, "boot", auto_remove=True, attachment=record)))

    async def life() -> None:
        record = await plan(NetworkRequest(name="bridge", ports=parse_publish("80")), settings, sandbox_id)
        dead(record)
        await attach_it(record, sandbox_id)
        assert host.traces(sandbox_id) != []
        assert await reap_dead(store) == [sandbox_id]
        assert host.traces(sandbox_id) == []
        # made from elsewhere: this network namespace has nothing to undo it with
        dead(msgspec.structs.replace(record, host_netns="0:0"))
        assert await reap_dead(store) == []
        await remove_sandbox(store, sandbox_id, force=True)
        # a plugin that is missing by now: kept for the next try, unless somebody insists
        dead(msgspec.structs.replace(record, plugin_dirs=(str(tmp_path),)))
        with pytest.raises(KatapodError, match=r"cannot remove all of .*CNI plugin"):
            await remove_sandbox(store, sandbox_id)
        assert store.ids() == [sandbox_id]
        await remove_sandbox(store, sandbox_id, force=True)
        assert store.ids() == []

    host.run(life)
