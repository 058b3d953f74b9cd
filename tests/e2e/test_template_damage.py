"""Templates that are damaged, worn, of another machine, or have no room: never a wrong clone, one warning at most."""

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import (
    SHARED,
    Started,
    die_hard,
    fresh_name,
    leftovers,
    processes_of,
    record_of,
    start,
    wait_until,
    write_config,
)

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


def run(name: str, config: Path, *command: str) -> tuple[str, list[str], str]:
    """(output, warnings, the template's key or "" after a cold boot) of a run that has to succeed."""
    with start("busybox", *(command or ("echo", "fine")), name=name, config=config) as running:
        done = running.end()
        assert done.code == 0, done
        assert WARNING.sub("", done.err).strip() == "", done
        key = str(record_of(name)["template"])
    return done.out, WARNING.findall(done.err), key


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path, source: str, from_mib: int) -> None:
    """The same size with other contents from there on."""
    count = (path.stat().st_size >> 20) - from_mib
    place = [f"if={source}", f"of={path}", "bs=1M", f"seek={from_mib}", f"count={count}"]
    subprocess.run(["dd", *place, "conv=notrunc", "status=none"], check=True)


def rename_key(templates: TemplateDir) -> None:
    """The files of another machine below this one's name."""
    templates.change_meta(key="0" * 24)


SEEN_AT_ONCE: dict[str, Callable[[TemplateDir], object]] = {
    "memory-cut": lambda templates: halve(templates.folder / "memory"),
    "state-flipped": lambda templates: flip(templates.folder / "state"),
    "meta-cut": lambda templates: halve(templates.folder / "meta.json"),
    "no-memory": lambda templates: (templates.folder / "memory").unlink(),
    "no-meta": lambda templates: (templates.folder / "meta.json").unlink(),
    "another-key": rename_key,
}


@pytest.mark.parametrize("damage", SEEN_AT_ONCE)
def test_damage_that_is_seen_is_mended(damage: str, name: str, good_template: TemplateDir, tmp_path: Path) -> None:
    """The template is made anew, and the sandbox is its clone."""
    SEEN_AT_ONCE[damage](good_template)
    (key,) = good_template.keys()
    out, warnings, cloned = run(name, config_for(good_template, tmp_path))
    assert (out, cloned) == ("fine\n", key), warnings
    assert len(warnings) == 1, warnings
    assert f"cannot use template {good_template.root}/{key}: " in warnings[0]
    assert MADE_AGAIN in warnings[0]
    assert good_template.scratch() == []
    assert good_template.meta()["key"] == key


@pytest.mark.parametrize(("source", "from_mib"), [("/dev/zero", 0), ("/dev/urandom", 1)], ids=["all", "kernel"])
def test_damaged_memory_boots_instead(
    source: str, from_mib: int, name: str, good_template: TemplateDir, tmp_path: Path
) -> None:
    """Its hash is not checked, since that would take longer than a clone does: QEMU does not load it, or its guest
    falls down when all its devices are plugged."""
    overwrite(good_template.folder / "memory", source, from_mib)
    (key,) = good_template.keys()
    out, warnings, cloned = run(name, config_for(good_template, tmp_path, agent={"dial_timeout": 20}))
    assert (out, cloned) == ("fine\n", ""), warnings
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


def test_another_qemu(name: str, good_template: TemplateDir, tmp_path: Path) -> None:
    """A copy at another path, and then another file at the same path: templates of their own."""
    program = tmp_path / "bin" / "qemu"
    program.parent.mkdir()
    for beside in ("share", "lib"):  # where QEMU looks for its firmware and modules
        (tmp_path / beside).symlink_to(f"/usr/{beside}")
    keys = good_template.keys()
    config = config_for(good_template, tmp_path, qemu={"path": str(program)})
    for _ in range(2):
        program.unlink(missing_ok=True)
        shutil.copy("/usr/bin/qemu-system-x86_64", program)
        out, warnings, key = run(fresh_name("tpl"), config)
        assert (out, warnings) == ("fine\n", [])
        assert key not in keys
        keys.add(key)
    assert good_template.keys() == keys


def test_another_configuration_and_another_kernel(name: str, good_template: TemplateDir, tmp_path: Path) -> None:
    """Each has the command line that it asks for, whichever came first."""
    kernel = tmp_path / "vmlinuz"
    shutil.copy("/var/cache/kata-containers/vmlinuz.container", kernel)
    seen = set()
    for word, qemu in (("", {}), ("first=1", {}), ("second=2", {"kernel": str(kernel)}), ("first=1", {})):
        config = config_for(good_template, tmp_path, qemu={**qemu, "kernel_params": word} if word else qemu)
        out, warnings, key = run(fresh_name("tpl"), config, "cat", "/proc/cmdline")
        assert warnings == []
        assert [part for part in out.split() if part in ("first=1", "second=2")] == ([word] if word else [])
        seen.add((word, key))
    assert len(seen) == len(good_template.keys()) == 3


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


def test_no_room_any_more_while_it_is_built(name: str, templates_here: TemplateDir, tmp_path: Path) -> None:
    config = config_for(templates_here, tmp_path)
    with small_tmpfs(templates_here, "140m"):
        with start("--rm", "busybox", "echo", "fine", name=name, config=config) as running:
            wait_until("the builder", templates_here.builders, period_s=0.001)
            fill(templates_here)
            done = running.end()
        assert (done.code, done.out) == (0, "fine\n"), done
        warnings = [line for line in WARNING.findall(done.err) if "cannot keep" not in line]  # the console, the same
        assert len(warnings) == 1, done
        (warning,) = warnings
        assert f"{BOOTS_INSTEAD} without a template: " in warning
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
    with contextlib.ExitStack() as stack:
        if obstacle == "file":
            templates_here.root.write_text("")
            stack.callback(templates_here.root.unlink)
        else:
            stack.enter_context(small_tmpfs(templates_here, "1m"))
            subprocess.run(["mount", "-o", "remount,ro", templates_here.root], check=True)
        out, warnings, key = run(name, config_for(templates_here, tmp_path))
    assert (out, key) == ("fine\n", "")
    (warning,) = warnings
    assert f"{BOOTS_INSTEAD} without a template: cannot keep templates in {templates_here.root}: " in warning


# -- age


def test_worn_by_uses(good_template: TemplateDir, tmp_path: Path) -> None:
    config = config_for(good_template, tmp_path, katapod={"template_max_uses": 2})
    generation = good_template.generation()
    for uses in (1, 2):
        assert run(fresh_name("tpl"), config)[1] == []
        assert (good_template.generation(), good_template.uses()) == (generation, uses)
    assert run(fresh_name("tpl"), config)[1] == []
    assert good_template.generation() != generation
    assert good_template.uses() == 1
    assert good_template.scratch() == []


def test_worn_by_age(name: str, good_template: TemplateDir, tmp_path: Path) -> None:
    config = config_for(good_template, tmp_path, katapod={"template_max_age": 1})
    good_template.change_meta(created_at=time.time() - 61)
    generation = good_template.generation()
    began = time.time()
    assert run(name, config)[:2] == ("fine\n", [])
    assert good_template.generation() != generation
    assert good_template.meta()["created_at"] >= began


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
    config = config_for(templates_here, tmp_path, katapod={"template_max_age": 1})
    with small_tmpfs(templates_here, "150m"):
        subprocess.run(
            f"cp -a --sparse=always {pristine_templates.root}/. {templates_here.root}", shell=True, check=True
        )
        templates_here.change_meta(created_at=time.time() - 61)
        (key,) = templates_here.keys()
        out, (warning,), cloned = run(name, config)
        assert (out, cloned) == ("fine\n", key)
        assert "MiB are free, 128 are needed; the old one is used" in warning
        assert templates_here.scratch() == []


def test_what_nobody_uses_goes(name: str, good_template: TemplateDir, tmp_path: Path) -> None:
    """When another is built: a template of a former guest image, and what a killed builder has left of it."""
    (old,) = good_template.keys()
    then = time.time() - 3600
    os.utime(good_template.folder / "uses", (then, then))
    (good_template.root / f".{old}.99").mkdir()
    changed = {"qemu": {"kernel_params": "another=1"}, "katapod": {"template_max_age": 30}}
    _, warnings, key = run(name, config_for(good_template, tmp_path, **changed))
    assert warnings == []
    assert key != old
    assert {path.name for path in good_template.root.iterdir()} == {key, f"{key}.lock"}
