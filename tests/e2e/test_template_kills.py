"""kill -9 while a template is built or cloned: the next start works, and nothing is left after it."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
AFTER_THE_BOOT = ("agent", "state", "memory", "meta", "in-place")


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


@dataclass(frozen=True)
class Build:
    """What is seen of a template that a process builds, and of no other that has left something."""

    templates: TemplateDir
    pid: int

    def has(self, name: str = "") -> bool:
        return any(self.templates.root.glob(f".*.{self.pid}/{name}".removesuffix("/")))

    def console_says(self, words: str) -> bool:
        consoles = self.templates.root.glob(f".*.{self.pid}/vm/console.log")
        return any(words in file.read_text(errors="replace") for file in consoles)

    def memory_grows(self) -> bool:
        return any(file.stat().st_blocks for file in self.templates.root.glob(f".*.{self.pid}/memory"))


MOMENTS: dict[str, Callable[[Build], object]] = {
    "locked": lambda build: list(build.templates.root.glob("*.lock")),
    "scratch": lambda build: build.has(),
    "qemu": lambda build: build.templates.builders(),
    "agent": lambda build: build.console_says("kata-agent"),
    "state": lambda build: build.has("state"),
    "memory": lambda build: build.memory_grows(),
    "meta": lambda build: build.has("meta.json"),
    "in-place": lambda build: build.templates.keys(),
}
"""The steps of a build, as they are seen from outside."""


def wait_for_moment(moment: str, templates: TemplateDir, pid: int) -> None:
    build = Build(templates, pid)

    def seen(moment: str = moment) -> bool:
        try:
            return bool(MOMENTS[moment](build) or templates.keys())  # a step may pass between two looks
        except FileNotFoundError:
            return False

    if moment in AFTER_THE_BOOT:  # which takes seconds, and the CPU
        wait_until("the agent", lambda: seen("agent"))
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


@pytest.mark.timeout(3600)
def test_builders_that_are_killed(templates_here: TemplateDir, config: Path) -> None:
    """One after the other, each a step later: that each gets there shows that a start works after the one before. The
    last one finds what they all have left. `factory init` is one of them."""
    for moment in MOMENTS:
        if moment == "state":
            kill_init(moment, templates_here, config)
        else:
            kill_run(moment, templates_here, config)
        if moment != "in-place":  # it may have got farther than it was to
            for path in map(templates_here.root.joinpath, templates_here.keys()):
                shutil.rmtree(path)
    expect_a_clone(templates_here, config)


def kill_run(moment: str, templates: TemplateDir, config: Path) -> None:
    name = fresh_name("tplkill")
    with start("--rm", "busybox", "sleep", "1000", name=name, config=config) as running:
        wait_for_moment(moment, templates, running.pid)
        die_hard(running.pid)
        assert "template" not in running.end().err, moment
    expect_its_own(moment, templates, running.pid)
    assert delete(name).code == 0, moment
    assert leftovers(name) == [], moment


def kill_init(moment: str, templates: TemplateDir, config: Path) -> None:
    with Kata("init").spawn("--config", str(config), "factory", "init") as running:
        wait_for_moment(moment, templates, running.pid)
        die_hard(running.pid)
        running.wait(180)
    expect_its_own(moment, templates, running.pid)
    there = templates.keys()
    told = json.loads(kata("--config", str(config), "factory", "status", "--json").out)["templates"]
    assert {row["key"] for row in told} == there


def expect_its_own(moment: str, templates: TemplateDir, pid: int) -> None:
    """Its QEMU goes with it; what those before it have left, it has removed."""
    wait_until(f"its QEMU has gone: {moment}", lambda: not templates.builders())
    assert {folder.suffix for folder in templates.scratch()} <= {f".{pid}"}, moment


@pytest.mark.parametrize("moment", ["qemu", "memory"])
def test_builder_that_is_interrupted(moment: str, name: str, templates_here: TemplateDir, config: Path) -> None:
    """By SIGTERM: it cleans up itself."""
    with start("--rm", "busybox", "sleep", "1000", name=name, config=config) as running:
        wait_for_moment(moment, templates_here, running.pid)
        running.signal(signal.SIGTERM)
        done = running.end()
    assert (done.code, done.out, done.err) == (143, "", "")
    assert templates_here.scratch() == []
    assert templates_here.builders() == set()


def test_qemu_of_the_builder_is_killed(name: str, templates_here: TemplateDir, config: Path) -> None:
    with start("--rm", "busybox", "echo", "fine", name=name, config=config) as running:
        wait_for_moment("qemu", templates_here, running.pid)
        die_hard(templates_here.builders().pop())
        done = running.end()
    assert (done.code, done.out) == (0, "fine\n"), done
    assert done.err.count("WARNING") == 1, done
    assert "this sandbox boots without a template: " in done.err
    assert templates_here.entries() == set()


def test_first_users_build_one_template(templates_here: TemplateDir, config: Path) -> None:
    """Three of them. The one that builds is killed: of the two that have waited one builds, and both are its clones."""
    names = [fresh_name("tplkill") for _ in range(3)]
    seen: set[int] = set()
    with start("--rm", "busybox", "echo", "first", name=names[0], config=config) as builder:
        wait_for_moment("qemu", templates_here, builder.pid)
        first = templates_here.builders()
        with (
            start("busybox", "echo", "second", name=names[1], config=config) as second,
            start("busybox", "echo", "third", name=names[2], config=config) as third,
        ):
            wait_until("the others are there", lambda: record_of(names[1]) and record_of(names[2]))
            assert templates_here.builders() == first
            die_hard(builder.pid)
            builder.end()

            def both_ended() -> bool:
                seen.update(templates_here.builders())
                return all(each.process.poll() is not None for each in (second, third))

            wait_until("both ended", both_ended, period_s=0.02)
            for each, word in ((second, "second"), (third, "third")):
                done = each.end()
                assert (done.code, done.out) == (0, f"{word}\n"), done
                assert "template" not in done.err, done
            keys = {record_of(name)["template"] for name in names[1:]}
    assert len(seen - first) == 1, "both have built"
    assert keys == templates_here.entries()
    assert templates_here.uses() == 2
    assert delete(names[0]).code == 0
    assert leftovers(names[0]) == []


CLONING: dict[str, Callable[[Started], object]] = {
    "claimed": lambda running: record_of(running.name),
    "virtiofsd": lambda running: virtiofsd_of(running.name),
    "qemu": lambda running: vmm_of(running.name),
    "loading": lambda running: record_of(running.name).get("vmm_pid"),
    "awake": lambda running: record_of(running.name).get("state") == "running",
}


def test_cloners_that_are_killed(good_template: TemplateDir, config: Path) -> None:
    """One after the other, each a step later. Their template is none the worse for it."""
    generation = good_template.generation()
    for moment in CLONING:
        kill_cloner(moment, config)
        assert good_template.generation() == generation, moment
    expect_a_clone(good_template, config)
    assert good_template.generation() == generation


def kill_cloner(moment: str, config: Path) -> None:
    name = fresh_name("tplkill")
    with start("--rm", *SHARED, "busybox", "sleep", "1000", name=name, config=config) as running:
        wait_until(moment, lambda: CLONING[moment](running), period_s=QUICK_S)
        die_hard(running.pid)
        running.end()
    wait_until(f"its VM has gone: {moment}", lambda: not processes_of(name))
    assert delete(name).code == 0, moment
    assert leftovers(name) == [], moment
