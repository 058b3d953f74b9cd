"""kill -9 while a template is built or cloned: the next start works, and nothing is left after it."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import (
    SHARED,
    Started,
    delete,
    die_hard,
    fresh_name,
    kata,
    leftovers,
    processes_of,
    record_of,
    start,
    virtiofsd_of,
    vmm_of,
    wait_until,
    write_config,
)

from kit.kata import Kata
from kit.template_dirs import TemplateDir
from kit.templates import with_templates

pytestmark = pytest.mark.qemu("templates")

QUICK_S = 0.0005  # between two looks: the last steps of a build take milliseconds


@pytest.fixture(autouse=True, scope="module")
def _on() -> Iterator[None]:
    with with_templates(True):
        yield


@pytest.fixture
def name() -> Iterator[str]:
    chosen = fresh_name("tplkill")
    yield chosen
    assert leftovers(chosen) == []


@pytest.fixture
def config(templates_here: TemplateDir, tmp_path: Path) -> Path:
    return write_config(tmp_path, factory={"template_path": str(templates_here.root)})


def in_scratch(templates: TemplateDir, name: str) -> bool:
    return any((folder / name).exists() for folder in templates.scratch())


def console_says(templates: TemplateDir, words: str) -> bool:
    return any(words in file.read_text(errors="replace") for file in templates.root.glob(".*/vm/console.log"))


def memory_grows(templates: TemplateDir) -> bool:
    return any(file.stat().st_blocks for file in templates.root.glob(".*/memory"))


MOMENTS: dict[str, Callable[[TemplateDir], object]] = {
    "locked": lambda templates: list(templates.root.glob("*.lock")),
    "scratch": lambda templates: templates.scratch(),
    "qemu": lambda templates: templates.builders(),
    "agent": lambda templates: console_says(templates, "kata-agent"),
    "state": lambda templates: in_scratch(templates, "state"),
    "memory": memory_grows,
    "meta": lambda templates: in_scratch(templates, "meta.json"),
    "in-place": lambda templates: templates.keys(),
}
"""The steps of a build, as they are seen from outside."""


def wait_for_moment(moment: str, templates: TemplateDir) -> None:
    def seen() -> bool:
        try:
            return bool(MOMENTS[moment](templates) or templates.keys())  # a step may pass between two looks
        except FileNotFoundError:
            return False

    wait_until(moment, seen, period_s=QUICK_S)


def expect_a_clone(templates: TemplateDir, config: Path) -> None:
    """The next start works, says nothing about templates, and leaves one template and nothing else."""
    name = fresh_name("tplkill")
    with start("busybox", "echo", "next", name=name, config=config) as running:
        done = running.end()
        assert (done.code, done.out) == (0, "next\n"), done
        assert "template" not in done.err, done  # that it tidies up behind the other it may say
        key = record_of(name)["template"]
    assert templates.entries() == {key}
    assert templates.builders() == set()


@pytest.mark.parametrize("moment", MOMENTS)
def test_builder_that_is_killed(moment: str, name: str, templates_here: TemplateDir, config: Path) -> None:
    with start("--rm", "busybox", "sleep", "1000", name=name, config=config) as running:
        wait_for_moment(moment, templates_here)
        die_hard(running.pid)
        running.end()
    wait_until("its QEMU has gone", lambda: not templates_here.builders())
    assert delete(name).code == 0
    expect_a_clone(templates_here, config)


@pytest.mark.parametrize("moment", ["qemu", "memory"])
def test_builder_that_is_interrupted(moment: str, name: str, templates_here: TemplateDir, config: Path) -> None:
    """By SIGTERM: it cleans up itself."""
    with start("--rm", "busybox", "sleep", "1000", name=name, config=config) as running:
        wait_for_moment(moment, templates_here)
        running.signal(signal.SIGTERM)
        done = running.end()
    assert (done.code, done.out, done.err) == (143, "", "")
    assert templates_here.scratch() == []
    assert templates_here.builders() == set()


def test_qemu_of_the_builder_is_killed(name: str, templates_here: TemplateDir, config: Path) -> None:
    with start("--rm", "busybox", "echo", "fine", name=name, config=config) as running:
        wait_for_moment("qemu", templates_here)
        die_hard(templates_here.builders().pop())
        done = running.end()
    assert (done.code, done.out) == (0, "fine\n"), done
    assert done.err.count("WARNING") == 1, done
    assert "this sandbox boots without a template: " in done.err
    assert templates_here.entries() == set()


def test_who_waits_for_a_builder_that_is_killed_builds(templates_here: TemplateDir, config: Path) -> None:
    names = [fresh_name("tplkill") for _ in range(2)]
    with start("--rm", "busybox", "echo", "first", name=names[0], config=config) as builder:
        wait_for_moment("qemu", templates_here)
        with start("--rm", "busybox", "echo", "second", name=names[1], config=config) as waiting:
            wait_until("the second is there", lambda: record_of(names[1]))
            die_hard(builder.pid)
            builder.end()
            done = waiting.end()
    assert (done.code, done.out) == (0, "second\n"), done
    assert "template" not in done.err, done
    assert delete(names[0]).code == 0
    assert len(templates_here.keys()) == 1
    assert templates_here.scratch() == []


def test_two_first_users_build_one_template(templates_here: TemplateDir, config: Path) -> None:
    names = [fresh_name("tplkill") for _ in range(2)]
    seen: set[int] = set()
    with (
        start("busybox", "echo", "fine", name=names[0], config=config) as first,
        start("busybox", "echo", "fine", name=names[1], config=config) as second,
    ):

        def both_ended() -> bool:
            seen.update(templates_here.builders())
            return all(each.process.poll() is not None for each in (first, second))

        wait_until("both ended", both_ended, period_s=0.02)
        for each in (first, second):
            done = each.end()
            assert (done.code, done.out, done.err) == (0, "fine\n", ""), done
        keys = {record_of(name)["template"] for name in names}
    assert len(seen) == 1, "both have built"
    assert keys == templates_here.entries()
    assert templates_here.uses() == 2


CLONING: dict[str, Callable[[Started], object]] = {
    "claimed": lambda running: record_of(running.name),
    "virtiofsd": lambda running: virtiofsd_of(running.name),
    "qemu": lambda running: vmm_of(running.name),
    "loading": lambda running: record_of(running.name).get("vmm_pid"),
    "awake": lambda running: record_of(running.name).get("state") == "running",
}


@pytest.mark.parametrize("moment", CLONING)
def test_cloner_that_is_killed(moment: str, name: str, good_template: TemplateDir, config: Path) -> None:
    """Its template is none the worse for it."""
    generation = good_template.generation()
    with start("--rm", *SHARED, "busybox", "sleep", "1000", name=name, config=config) as running:
        wait_until(moment, lambda: CLONING[moment](running), period_s=QUICK_S)
        die_hard(running.pid)
        running.end()
    wait_until("its VM has gone", lambda: not processes_of(name))
    assert delete(name).code == 0
    assert leftovers(name) == []
    expect_a_clone(good_template, config)
    assert good_template.generation() == generation


def test_killed_init(templates_here: TemplateDir, config: Path) -> None:
    with Kata("init").spawn("--config", str(config), "factory", "init") as running:
        wait_for_moment("state", templates_here)
        die_hard(running.pid)
        running.wait(180)
    assert json.loads(kata("--config", str(config), "factory", "status", "--json").out)["templates"] == []
    expect_a_clone(templates_here, config)
