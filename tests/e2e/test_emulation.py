"""What an emulated guest is spared: programs of the agent's are translated once, however often they run."""

import asyncio
import re

import pytest

from katapod.model.layout import Layout
from katapod.vmm.qemu.control import connected_qemu
from kit.kata import Kata, wait_for

pytestmark = pytest.mark.qemu("emulation")

EXECS = 5
MIB = 1 << 20


@pytest.fixture(scope="module")
def box(module_kata: Kata) -> str:
    return module_kata.start("--accel", "tcg", "--network", "none", "-m", "64m", "busybox", "sleep", "1000")


async def _translated_bytes(name: str) -> int:
    async with connected_qemu(Layout().sandbox(name).vm, 30.0) as control:
        said = (await control.qmp.execute("x-query-jit"))["human-readable-text"]
    found = re.search(r"gen code size\s+(\d+)", said)
    assert found is not None, said
    return int(found[1])


def translated_bytes(name: str) -> int:
    """Of the guest's code, by QEMU."""
    return asyncio.run(_translated_bytes(name))


def test_an_exec_is_translated_once(kata: Kata, box: str) -> None:
    """crun alone has 3 MiB of translated code. Where its addresses were random, each exec would add as much."""

    def added_by_execs() -> int:
        before = translated_bytes(box)
        for _ in range(EXECS):
            kata.ok("exec", box, "true")
        return translated_bytes(box) - before

    # at first there is code of the guest's that runs for the first time, and a full cache is emptied
    wait_for(lambda: 0 <= added_by_execs() < EXECS * MIB, "execs add next to nothing")


def test_containers_keep_their_random_addresses(kata: Kata, box: str) -> None:
    look = ("sh", "-c", "cat /proc/self/personality /proc/1/personality; grep -F '[stack]' /proc/self/maps")
    first, second = (kata.ok("exec", box, *look).split("\n") for _ in range(2))
    assert first[:2] == second[:2] == ["00000000", "00000000"]
    assert first[2] != second[2]
