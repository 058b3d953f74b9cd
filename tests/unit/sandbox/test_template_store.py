"""Templates on disk: a sound one is found, a damaged one is refused, what is no template is left alone."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katapod.model.errors import KatapodError
from katapod.sandbox.template_store import (
    Template,
    TemplateBroken,
    destroy_templates,
    discard_template,
    find_template,
    list_templates,
    put_in_place,
    sweep_templates,
    template_lock,
)
from katapod.sandbox.vmms import DEFAULT_VMM
from katapod.vmm.template import FORMAT, TemplateLimits, TemplatePlan, plan_template
from kit.vm_values import SMALL_VM, changed_vm

SPEC = changed_vm(SMALL_VM, {"max_mem_mib": 1024, "max_vcpus": 2, "memory_slots": 2})
LIMITS = TemplateLimits(max_age_s=600.0, max_uses=3, unused_s=600.0)
MEMORY_MIB = 4
DATA = b"m" * 8192
STATE = b"device state"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "template"


@pytest.fixture
def plan(root: Path) -> TemplatePlan:
    return plan_template(DEFAULT_VMM, SPEC, ["kernel 1"], root, LIMITS, mem_mib=256)


def another(plan: TemplatePlan, number: int = 1) -> TemplatePlan:
    return plan_template(DEFAULT_VMM, SPEC, [f"another kernel {number}"], plan.root, plan.limits, mem_mib=256)


def write_template(plan: TemplatePlan, **meta: Any) -> Path:
    """A template as a builder leaves it, with a memory of MEMORY_MIB."""
    scratch = plan.root / f".{plan.key}.1234"
    scratch.mkdir(parents=True)
    with (scratch / "memory").open("wb") as memory:
        memory.truncate(MEMORY_MIB << 20)
        memory.seek(1 << 20)
        memory.write(DATA)
    (scratch / "state").write_bytes(STATE)
    (scratch / "uses").touch()
    content = {
        "format": FORMAT,
        "key": plan.key,
        "created_at": time.time(),
        "memory_bytes": MEMORY_MIB << 20,
        "data_bytes": len(DATA),
        "state_sha256": hashlib.sha256(STATE).hexdigest(),
        "description": "words",
        **meta,
    }
    (scratch / "meta.json").write_text(json.dumps(content))
    put_in_place(scratch, plan)
    return plan.directory


def found(plan: TemplatePlan) -> Template:
    template = find_template(plan)
    assert template is not None
    return template


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- finding


def test_there_is_none(plan: TemplatePlan) -> None:
    assert find_template(plan) is None
    plan.root.mkdir()
    assert find_template(plan) is None


def test_a_sound_one(plan: TemplatePlan) -> None:
    folder = write_template(plan)
    before = open_files()
    template = found(plan)
    assert (template.key, template.directory, template.memory_mib) == (plan.key, folder, MEMORY_MIB)
    assert os.pread(template.memory_fd, 4, 1 << 20) == DATA[:4]
    assert os.read(template.state_fd, 100) == STATE  # at its beginning: QEMU reads on from here
    assert not any(os.get_inheritable(fd) for fd in (template.memory_fd, template.state_fd, template.uses_fd))
    template.close()
    assert open_files() == before


def test_looking_is_no_use(plan: TemplatePlan) -> None:
    write_template(plan)
    found(plan).close()
    template = found(plan)
    assert template.uses == 0
    template.count_use()
    assert template.uses == 1
    template.close()


def test_uses_are_counted_by_all(plan: TemplatePlan) -> None:
    write_template(plan)
    first, second = found(plan), found(plan)
    for template in (first, second, first):
        template.count_use()
    assert first.uses == second.uses == 3
    assert first.is_worn(plan)
    for template in (first, second):
        template.close()


@pytest.mark.parametrize(("age_s", "worn"), [(0.0, False), (500.0, False), (700.0, True), (-100.0, True)])
def test_worn_by_age(plan: TemplatePlan, age_s: float, worn: bool) -> None:
    write_template(plan, created_at=time.time() - age_s)
    template = found(plan)
    assert template.is_worn(plan) is worn
    template.close()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def make_a_hole(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)


def become_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-meta": (lambda folder: (folder / "meta.json").unlink(), "it has no meta.json"),
    "no-memory": (lambda folder: (folder / "memory").unlink(), "it has no memory"),
    "no-state": (lambda folder: (folder / "state").unlink(), "it has no state"),
    "no-uses": (lambda folder: (folder / "uses").unlink(), "it has no uses"),
    "meta-is-empty": (lambda folder: os.truncate(folder / "meta.json", 0), "truncated"),
    "meta-is-cut": (lambda folder: shorten(folder / "meta.json"), "truncated|malformed"),
    "meta-is-binary": (lambda folder: (folder / "meta.json").write_bytes(b"\xff\x00"), "malformed"),
    "meta-is-a-list": (lambda folder: (folder / "meta.json").write_text("[]"), "Expected `object`"),
    "meta-is-a-directory": (lambda folder: become_a_directory(folder / "meta.json"), "s a directory"),
    "state-is-flipped": (lambda folder: flip(folder / "state"), "its device state is damaged"),
    "state-is-cut": (lambda folder: shorten(folder / "state"), "its device state is damaged"),
    "state-is-empty": (lambda folder: os.truncate(folder / "state", 0), "its device state is damaged"),
    "memory-is-cut": (lambda folder: shorten(folder / "memory"), "its memory file is cut short"),
    "memory-is-longer": (lambda folder: os.truncate(folder / "memory", 5 << 20), "its memory file is cut short"),
    "memory-is-a-hole": (lambda folder: make_a_hole(folder / "memory"), "its memory file is cut short"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_refused(plan: TemplatePlan, damage: str) -> None:
    before = open_files()
    harm, words = DAMAGES[damage]
    harm(write_template(plan))
    with pytest.raises(TemplateBroken, match=f"cannot use template .*{words}"):
        find_template(plan)
    assert open_files() == before


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"key": "0" * 24}, "it is of another machine"),
        ({"format": FORMAT + 1}, "it is of another machine"),
        ({"surprise": 1}, "unknown field"),
        ({"memory_bytes": "many"}, "Expected `int`"),
    ],
)
def test_another_ones_files_are_refused(plan: TemplatePlan, meta: dict[str, Any], words: str) -> None:
    write_template(plan, **meta)
    with pytest.raises(TemplateBroken, match=words):
        find_template(plan)


# -- changing


def test_a_new_generation_does_not_disturb_who_uses_the_old(plan: TemplatePlan) -> None:
    write_template(plan, created_at=1.0)
    old = found(plan)
    write_template(plan)
    new = found(plan)
    assert (old.created_at, os.pread(old.memory_fd, 4, 1 << 20)) == (1.0, DATA[:4])
    assert new.created_at > 1.0
    assert [path.name for path in plan.root.iterdir()] == [plan.key]
    for template in (old, new):
        template.close()


def test_only_the_generation_that_failed_is_discarded(plan: TemplatePlan) -> None:
    write_template(plan)
    old = found(plan)
    write_template(plan)
    discard_template(old)
    new = found(plan)
    discard_template(new)
    assert find_template(plan) is None
    discard_template(new)  # somebody was faster
    assert list(plan.root.iterdir()) == []
    for template in (old, new):
        template.close()


def test_one_builder_at_a_time(plan: TemplatePlan) -> None:
    with template_lock(plan.root, plan.key) as first, template_lock(plan.root, plan.key) as second:
        assert first.try_take()
        assert not second.try_take()
        assert first.try_take()
    with template_lock(plan.root, plan.key) as third:
        assert third.try_take()


def test_a_lock_whose_file_is_gone_is_none(plan: TemplatePlan) -> None:
    """Who removes a template removes its lock; who had opened that must not believe that it keeps others out."""
    with template_lock(plan.root, plan.key) as early:
        assert destroy_templates(plan.root) == 0
        assert list(plan.root.iterdir()) == []
        with template_lock(plan.root, plan.key) as late:
            assert early.try_take()
            assert not late.try_take()


def test_no_place_for_a_lock(plan: TemplatePlan) -> None:
    plan.root.write_text("a file")
    with pytest.raises(TemplateBroken, match="cannot keep templates in"), template_lock(plan.root, plan.key):
        pass


# -- listing and removing


def test_list(plan: TemplatePlan) -> None:
    assert list_templates(plan.root) == []
    write_template(plan, created_at=1000.0)
    template = found(plan)
    template.count_use()
    template.close()
    write_template(another(plan))
    infos = {info.key: info for info in list_templates(plan.root)}
    assert set(infos) == {plan.key, another(plan).key}
    info = infos[plan.key]
    assert (info.created_at, info.uses, info.memory_mib) == (1000.0, 1, MEMORY_MIB)
    assert len(DATA) <= info.size_bytes < MEMORY_MIB << 20
    assert abs(info.last_used_at - time.time()) < 60


def test_list_goes_on_behind_a_damaged_one(plan: TemplatePlan) -> None:
    (write_template(plan) / "meta.json").write_text("{")
    write_template(another(plan))
    assert [info.key for info in list_templates(plan.root)] == [another(plan).key]


def test_destroy(plan: TemplatePlan) -> None:
    assert destroy_templates(plan.root) == 0
    write_template(plan)
    (write_template(another(plan)) / "meta.json").unlink()  # a damaged one goes as well
    (plan.root / f".{plan.key}.99").mkdir()
    with template_lock(plan.root, plan.key):
        pass
    assert destroy_templates(plan.root) == 2
    assert list(plan.root.iterdir()) == []
    assert destroy_templates(plan.root) == 0


def test_one_that_is_built_does_not_keep_the_others(plan: TemplatePlan) -> None:
    for each in (plan, another(plan, 1), another(plan, 2)):
        write_template(each)
    with template_lock(plan.root, plan.key) as lock:
        assert lock.try_take()
        with pytest.raises(KatapodError, match=f"cannot remove template {plan.key}: it is being built") as caught:
            destroy_templates(plan.root)
    assert caught.value.context["removed"] == 2
    assert [info.key for info in list_templates(plan.root)] == [plan.key]


FOREIGN = (".ssh", ".cache", "lost+found", "notes.txt", "0" * 23, "0" * 25, ".0123.456", "A" * 24)


def test_what_is_not_ours_stays(plan: TemplatePlan) -> None:
    """template_path may name any directory, root's home as well."""
    write_template(plan)
    for name in FOREIGN:
        (plan.root / name).mkdir()
        (plan.root / name / "precious").touch()
    (plan.root / "meta.json").touch()
    gone = replace(plan, limits=replace(LIMITS, unused_s=-1.0))
    sweep_templates(another(gone))
    assert destroy_templates(plan.root) == 0
    assert {path.name for path in plan.root.iterdir()} == {*FOREIGN, "meta.json"}
    assert all((plan.root / name / "precious").exists() for name in FOREIGN)
    assert list_templates(plan.root) == []


def unused(plan: TemplatePlan, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(plan.directory / "uses", (then, then))


def test_sweep(plan: TemplatePlan) -> None:
    """The builder of one key tidies up behind builders that were killed, and removes what nobody uses any more."""
    old, busy, young = another(plan, 1), another(plan, 2), another(plan, 3)
    for each in (plan, old, busy, young):
        write_template(each)
        (each.root / f".{each.key}.99").mkdir()
        unused(each, 500.0 if each is young else 1000.0)
    with template_lock(busy.root, busy.key) as theirs, template_lock(plan.root, plan.key) as ours:
        assert theirs.try_take()
        assert ours.try_take()
        sweep_templates(plan)
        assert not any(
            path.name.startswith(f".{each.key}") for each in (plan, old, young) for path in plan.root.iterdir()
        )
        assert (plan.root / f".{busy.key}.99").exists()  # its builder is at work
    assert {info.key for info in list_templates(plan.root)} == {plan.key, busy.key, young.key}
    assert not (plan.root / f"{old.key}.lock").exists()


def test_sweep_where_there_is_nothing(plan: TemplatePlan) -> None:
    sweep_templates(plan)
    assert not plan.root.exists()


def test_only_the_few_used_last_are_kept_beside_a_new_one(plan: TemplatePlan) -> None:
    others = [another(plan, number) for number in range(4)]
    for number, other in enumerate(others):
        used_at = time.time() - (10 + 10 * (number ^ 2))  # 2, 3, 0, 1 from the last used on
        os.utime(write_template(other) / "uses", (used_at, used_at))
    write_template(plan)
    sweep_templates(replace(plan, limits=replace(plan.limits, others_kept=2)))
    assert [other.directory.exists() for other in others] == [False, False, True, True]
    assert plan.directory.exists()
