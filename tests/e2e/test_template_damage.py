"""Templates that are damaged, worn, of another machine, or have no room: never a wrong clone, one warning at most."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import (
    SHARED,
    Started,
    die_hard,
    fresh_name,
    kata,
    leftovers,
    processes_of,
    record_of,
    start,
    wait_until,
    write_config,
)

from kit.kata import Kata
from kit.template_dirs import TemplateDir
from kit.templates import with_templates

pytestmark = pytest.mark.qemu("templates")

WARNING = re.compile(r"^kata-runtime: WARNING: .*$", re.MULTILINE)
BOOTS_INSTEAD = "this sandbox boots"
MADE_AGAIN = "it is made again"


@pytest.fixture(autouse=True, scope="module")
def _on() -> Iterator[None]:
    with with_templates(True):
        yield


@pytest.fixture
def name() -> Iterator[str]:
    chosen = fresh_name("tpl")
    yield chosen
    assert leftovers(chosen) == []


def config_for(templates: TemplateDir, tmp_path: Path, **tables: Any) -> Path:
    return write_config(tmp_path, factory={"template_path": str(templates.root)}, **tables)


def run(name: str, config: Path, *command: str, flags: tuple[str, ...] = ()) -> tuple[str, list[str], str]:
    """(output, warnings, the template's key or "" after a cold boot) of a run that has to succeed."""
    with start(*flags, "busybox", *(command or ("echo", "fine")), name=name, config=config) as running:
        done = running.end()
        assert done.code == 0, done
        assert WARNING.sub("", done.err).strip() == "", done
        key = str(record_of(name)["template"])
    return done.out, WARNING.findall(done.err), key


def test_damage_is_mended_and_what_nobody_uses_goes(name: str, good_template: TemplateDir, tmp_path: Path) -> None:
    """The template is made anew, and the sandbox is its clone. Who builds also removes a template of a former guest
    image, and what a killed builder has left. Damage of all kinds: tests/integration/test_templates.py."""
    (key,) = good_template.keys()
    memory = good_template.folder / "memory"
    old, then = "0" * 24, time.time() - 3600
    shutil.copytree(good_template.folder, good_template.root / old, ignore=shutil.ignore_patterns("memory"))
    os.utime(good_template.root / old / "uses", (then, then))
    for each in (key, old):
        (good_template.root / f".{each}.99").mkdir()
    os.truncate(memory, memory.stat().st_size // 2)
    out, warnings, cloned = run(name, config_for(good_template, tmp_path, katapod={"template_max_age": 30}))
    assert (out, cloned) == ("fine\n", key), warnings
    assert len(warnings) == 1, warnings
    assert f"cannot use template {good_template.root}/{key}: " in warnings[0]
    assert MADE_AGAIN in warnings[0]
    assert good_template.meta()["key"] == key
    assert {path.name for path in good_template.root.iterdir()} == {key, f"{key}.lock"}


def test_damaged_memory_boots_instead(name: str, good_template: TemplateDir, tmp_path: Path) -> None:
    """Its hash is not checked, since that would take longer than a clone does: its guest falls down when all its
    devices are plugged."""
    from_mib = 1
    memory = good_template.folder / "memory"
    place = [f"of={memory}", "bs=1M", f"seek={from_mib}", f"count={(memory.stat().st_size >> 20) - from_mib}"]
    subprocess.run(["dd", "if=/dev/urandom", *place, "conv=notrunc", "status=none"], check=True)
    (key,) = good_template.keys()
    config = config_for(good_template, tmp_path, agent={"dial_timeout": 20})
    out, warnings, cloned = run(name, config, "nproc", flags=("--cpus", "2"))
    assert (out, cloned) == ("2\n", ""), warnings
    assert len(warnings) == 1, warnings
    assert f"the template {key} does not work and is removed; {BOOTS_INSTEAD} instead: " in warnings[0]
    assert good_template.entries() == set()


@pytest.mark.parametrize("victim", ["qemu", "virtiofsd"])
def test_a_killed_clone_is_no_fault_of_its_template(
    victim: str, name: str, good_template: TemplateDir, tmp_path: Path
) -> None:
    generation = good_template.generation()
    with start(
        "--rm", *SHARED, "busybox", "sleep", "1000", name=name, config=config_for(good_template, tmp_path)
    ) as running:
        kill_first(running, victim)
        done = running.end().assert_clean_error()
    assert "WARNING" not in done.err
    assert good_template.generation() == generation


def kill_first(running: Started, program: str) -> None:
    wait_until(program, lambda: processes_of(running.name, program), period_s=0.001)
    die_hard(processes_of(running.name, program)[0])


# -- another machine


def state_of_the_only(config: Path) -> str:
    """What the only template is for this configuration: ready, or other."""
    (row,) = json.loads(kata("--config", str(config), "factory", "status", "--json").out)["templates"]
    return str(row["state"])


def test_another_machine(good_template: TemplateDir, tmp_path: Path) -> None:
    """Each has a template of its own: another configuration, another kernel, a QEMU at another path, another file at
    the same path. So each has the command line that it asks for, whichever came first."""
    program, kernel = tmp_path / "bin" / "qemu", tmp_path / "vmlinuz"
    program.parent.mkdir()
    for beside in ("share", "lib"):  # where QEMU looks for its firmware and modules
        (tmp_path / beside).symlink_to(f"/usr/{beside}")
    shutil.copy("/usr/bin/qemu-system-x86_64", program)
    shutil.copy("/var/cache/kata-containers/vmlinuz.container", kernel)
    usual = config_for(good_template, tmp_path)
    changes = {"path": str(program), "kernel": str(kernel), "kernel_params": "first=1"}
    assert state_of_the_only(usual) == "ready"
    for setting, value in changes.items():
        assert state_of_the_only(config_for(good_template, tmp_path, qemu={setting: value})) == "other", setting

    (usual_key,) = good_template.keys()
    changed = config_for(good_template, tmp_path, qemu=changes)
    keys = set()
    for config, words in ((usual, []), (changed, ["first=1"]), (usual, []), (changed, ["first=1"])):
        out, warnings, key = run(fresh_name("tpl"), config, "cat", "/proc/cmdline")
        assert warnings == []
        assert [word for word in out.split() if word.startswith("first=")] == words
        assert (key == usual_key) is (config == usual)
        keys.add(key)
    assert good_template.keys() == keys
    assert len(keys) == 2

    shutil.rmtree(good_template.root / usual_key)
    assert state_of_the_only(changed) == "ready"
    for path in (program, kernel):
        saved = tmp_path / "saved"
        path.rename(saved)
        shutil.copy(saved, path)
        assert state_of_the_only(changed) == "other", path
        saved.rename(path)
        assert state_of_the_only(changed) == "ready", path


# -- no room


@contextlib.contextmanager
def small_tmpfs(templates: TemplateDir, size: str) -> Iterator[None]:
    templates.root.mkdir(mode=0o700, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "none", templates.root], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", templates.root], check=True)


def fill(templates: TemplateDir) -> None:
    with contextlib.suppress(OSError), (templates.root / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(1 << 20)):
            pass


def test_no_room_for_a_template(name: str, templates_here: TemplateDir, tmp_path: Path) -> None:
    with small_tmpfs(templates_here, "32m"):
        out, warnings, key = run(name, config_for(templates_here, tmp_path))
        assert (out, key) == ("fine\n", "")
        assert len(warnings) == 1, warnings
        assert f"{BOOTS_INSTEAD} without a template: cannot make a template in {templates_here.root}: " in warnings[0]
        assert "MiB are free, 128 are needed" in warnings[0]
        assert templates_here.entries() == set()


def test_no_room_any_more_while_it_is_built(templates_here: TemplateDir, tmp_path: Path) -> None:
    """By `factory init`, which does not boot another guest in its place."""
    with small_tmpfs(templates_here, "140m"):
        with Kata("init").spawn(
            *("--config", str(config_for(templates_here, tmp_path)), "factory", "init"), stderr=subprocess.PIPE
        ) as running:
            wait_until("the builder", templates_here.builders, period_s=0.001)
            fill(templates_here)
            said = running.communicate(timeout=180)[1].decode()
        assert running.returncode == 1, said
        told = "".join(line for line in said.splitlines(keepends=True) if "cannot keep" not in line)  # the console
        assert told.startswith("kata-runtime: cannot "), said
        assert "No space left on device" in told, said
        assert templates_here.entries() == {"filler"}
        assert not templates_here.builders()


def test_a_full_file_system_does_not_spoil_the_template(
    name: str, templates_here: TemplateDir, pristine_templates: TemplateDir, tmp_path: Path
) -> None:
    with small_tmpfs(templates_here, "200m"):
        subprocess.run(
            f"cp -a --sparse=always {pristine_templates.root}/. {templates_here.root}", shell=True, check=True
        )
        fill(templates_here)
        (key,) = pristine_templates.keys()
        out, warnings, cloned = run(name, config_for(templates_here, tmp_path))
        assert (out, warnings, cloned) == ("fine\n", [], key)


@pytest.mark.parametrize("obstacle", ["file", "read-only"])
def test_no_place_for_templates(obstacle: str, name: str, templates_here: TemplateDir, tmp_path: Path) -> None:
    """That the sandbox boots instead is seen by what it says of a VMM that cannot start."""
    with contextlib.ExitStack() as stack:
        if obstacle == "file":
            templates_here.root.write_text("")
            stack.callback(templates_here.root.unlink)
        else:
            stack.enter_context(small_tmpfs(templates_here, "1m"))
            subprocess.run(["mount", "-o", "remount,ro", templates_here.root], check=True)
        config = config_for(templates_here, tmp_path, qemu={"path": "/bin/false"})
        with start("--rm", "--accel", "tcg", "busybox", "true", name=name, config=config) as running:
            done = running.end().assert_clean_error()
    (warning,) = WARNING.findall(done.err)
    assert f"{BOOTS_INSTEAD} without a template: cannot keep templates in {templates_here.root}: " in warning
    assert WARNING.sub("", done.err).strip().startswith("kata-runtime: cannot start QEMU: exit status 1")


# -- age


def test_worn_by_uses(good_template: TemplateDir, tmp_path: Path) -> None:
    config = config_for(good_template, tmp_path, katapod={"template_max_uses": 2})
    generation, began = good_template.generation(), time.time()
    for uses in (1, 2):
        assert state_of_the_only(config) == "ready"
        assert run(fresh_name("tpl"), config)[1] == []
        assert (good_template.generation(), good_template.uses()) == (generation, uses)
    assert state_of_the_only(config) == "worn"
    assert run(fresh_name("tpl"), config)[1] == []
    assert good_template.generation() != generation
    assert good_template.meta()["created_at"] >= began
    assert good_template.uses() == 1
    assert good_template.scratch() == []


def test_a_worn_one_is_used_while_somebody_else_builds(name: str, good_template: TemplateDir, tmp_path: Path) -> None:
    config = config_for(good_template, tmp_path, katapod={"template_max_age": 1})
    good_template.change_meta(created_at=time.time() - 61)
    generation, (key,) = good_template.generation(), good_template.keys()
    with (good_template.root / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(name, config) == ("fine\n", [], key)
    assert good_template.generation() == generation


def test_a_worn_one_is_used_when_there_is_no_room_for_another(
    name: str, templates_here: TemplateDir, pristine_templates: TemplateDir, tmp_path: Path
) -> None:
    """Worn by its age, which is why another is wanted."""
    config = config_for(templates_here, tmp_path, katapod={"template_max_age": 1})
    with small_tmpfs(templates_here, "150m"):
        subprocess.run(
            f"cp -a --sparse=always {pristine_templates.root}/. {templates_here.root}", shell=True, check=True
        )
        templates_here.change_meta(created_at=time.time() - 61)
        assert state_of_the_only(config) == "worn"
        (key,) = templates_here.keys()
        out, (warning,), cloned = run(name, config)
        assert (out, cloned) == ("fine\n", key)
        assert "MiB are free, 128 are needed; the old one is used" in warning
        assert templates_here.scratch() == []
