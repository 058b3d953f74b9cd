"""User ids are held by one at a time, and free again when their holder ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from katapod.host.jail_uids import held_uid
from katapod.model.errors import HostLacks
from katapod.model.uid_range import UidRange

UNUSED = UidRange(0x70001000, 0x70001002)


def test_each_gets_its_own_until_there_are_no_more(tmp_path: Path) -> None:
    lock = tmp_path / "vc" / "uids"
    with held_uid(UNUSED, lock) as one, held_uid(UNUSED, lock) as two, held_uid(UNUSED, lock) as three:
        assert {one, two, three} == {0x70001000, 0x70001001, 0x70001002}
        with pytest.raises(HostLacks, match="are in use"), held_uid(UNUSED, lock):
            pass
    with held_uid(UNUSED, lock):
        pass


def test_the_id_of_a_killed_holder_is_free(tmp_path: Path) -> None:
    only = UidRange(0x70001003, 0x70001003)
    script = f"""
import sys
from pathlib import Path
from katapod.host.jail_uids import held_uid
from katapod.model.uid_range import UidRange
with held_uid(UidRange({only.first}, {only.last}), Path({str(tmp_path / "uids")!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdin is not None
    with holder.stdin, holder.stdout:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(HostLacks), held_uid(only, tmp_path / "uids"):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with held_uid(only, tmp_path / "uids") as uid:
        assert uid == only.first
