"""`kata-runtime factory`: templates made, shown and removed by hand."""

import fcntl
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import container_state, fresh_name, kata, leftovers, record_of, start, start_exec, wait_until, write_config

from kit.accel import current_accelerator
from kit.kata import AS_OTHER_USER, KATA
from kit.template_dirs import TemplateDir
from kit.templates import with_templates
from kit.terminal import open_terminal

ON, OFF, DISABLED = "vm factory is on", "vm factory is off", "vm factory not enabled"


pytestmark = pytest.mark.qemu("templates")


@pytest.fixture(autouse=True, scope="module")
def _on() -> Iterator[None]:
    with with_templates(True):
        yield


@pytest.fixture
def config(templates_here: TemplateDir, tmp_path: Path) -> Path:
    return write_config(tmp_path, factory={"template_path": str(templates_here.root)})


def factory(config: Path, *words: str) -> str:
    """The output of a verb that has to succeed and to say nothing on standard error."""
    done = kata("--config", str(config), "factory", *words)
    assert (done.code, done.err) == (0, ""), done
    return done.out


@pytest.mark.smoke
def test_a_life(config: Path, templates_here: TemplateDir) -> None:
    began = time.time()
    assert factory(config, "status") == f"{OFF}\n"
    assert factory(config, "init") == "vm factory initialized\n"
    generation = templates_here.generation()
    assert factory(config, "init") == "vm factory initialized\n"
    assert templates_here.generation() == generation  # there was nothing to do
    (key,) = templates_here.keys()

    lines = factory(config, "status").splitlines()
    assert lines[:2] == [ON, "KEY                       STATE  AGE  USES  LAST USED  MEMORY   ON DISK"]
    assert re.fullmatch(rf"{key}  ready  \d+\w +0     never      256 MiB  \d+\.\d MiB", lines[2]), lines
    told = json.loads(factory(config, "status", "--json"))
    (row,) = told["templates"]
    assert (told["factory"], row["key"], row["state"], row["uses"], row["memory_mib"]) == ("on", key, "ready", 0, 256)
    assert 20 << 20 < row["size_bytes"] < 256 << 20
    assert began <= row["created"] <= time.time()

    name = fresh_name("factory")
    with start("busybox", "sleep", "1000", name=name, config=config) as running:
        wait_until("a clone runs its container", lambda: container_state(name) == "running")
        assert record_of(name)["template"] == key
        assert json.loads(factory(config, "status", "--json"))["templates"][0]["uses"] == 1
        assert factory(config, "destroy") == "vm factory destroyed\n1 template removed\n"
        assert templates_here.entries() == set()
        assert os.listdir(templates_here.root) == []
        with start_exec(name, "echo", "alive") as exec_process:  # a clone holds all that it needs
            assert exec_process.end().out == "alive\n"
        assert running.process.poll() is None
    assert leftovers(name) == []
    assert factory(config, "status") == f"{OFF}\n"
    assert factory(config, "destroy") == "vm factory destroyed\n0 templates removed\n"


def test_states_and_damage(config: Path, good_template: TemplateDir, tmp_path: Path) -> None:
    where = {"template_path": str(good_template.root)}
    other = write_config(tmp_path, factory=where, qemu={"kernel_params": "other=1"})
    assert factory(other, "status").splitlines()[0] == OFF  # there are templates, but none of this configuration
    assert json.loads(factory(other, "status", "--json"))["templates"][0]["state"] == "other"

    aged = write_config(tmp_path, factory=where, katapod={"template_max_age": 1})
    good_template.change_meta(created_at=time.time() - 61)
    generation = good_template.generation()
    assert json.loads(factory(aged, "status", "--json"))["templates"][0]["state"] == "worn"

    os.truncate(good_template.folder / "state", 0)
    done = kata("--config", str(config), "factory", "init")
    assert (done.code, done.out) == (0, "vm factory initialized\n")
    assert "its device state is damaged; it is made again" in done.err
    assert good_template.generation() != generation
    assert json.loads(factory(aged, "status", "--json"))["templates"][0]["state"] == "ready"
    (good_template.folder / "meta.json").write_text("{")
    assert factory(config, "status") == f"{OFF}\n"
    assert factory(config, "destroy") == "vm factory destroyed\n1 template removed\n"


def test_not_enabled(templates_here: TemplateDir, tmp_path: Path) -> None:
    where = {"template_path": str(templates_here.root), "enable_template": False}
    config = write_config(tmp_path, factory=where)
    assert factory(config, "init") == "vm factory or VMCache is not enabled\n"
    assert factory(config, "status") == f"{DISABLED}\n"
    told = json.loads(factory(config, "status", "--json"))
    assert (told["factory"], told["templates"]) == ("disabled", [])
    assert factory(config, "destroy") == "vm factory destroyed\n0 templates removed\n"
    assert not templates_here.root.exists()


def test_init_that_fails_says_why(templates_here: TemplateDir, tmp_path: Path) -> None:
    initrd = tmp_path / "empty.img"
    initrd.touch()
    tables = {"qemu": {"initrd": str(initrd)}, "katapod": {"accelerator": current_accelerator()}}
    config = write_config(tmp_path, factory={"template_path": str(templates_here.root)}, **tables)
    done = kata("--config", str(config), "factory", "init").assert_clean_error(1)
    if current_accelerator() == "tcg":  # under KVM the proof comes first, and says it
        assert f"cannot make a template in {templates_here.root}: " in done.err
    assert "Kernel panic" in done.err
    assert templates_here.entries() == set()


def test_init_while_another_builds(config: Path, templates_here: TemplateDir) -> None:
    """One builds, the other waits and finds it done. A terminal is told what takes so long."""
    command = [KATA, "--config", str(config), "factory", "init"]
    with (
        open_terminal(command) as terminal,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as beside,
    ):
        terminal.screen.expect("booting a guest and saving it as a template")
        assert beside.communicate(timeout=180) == (b"vm factory initialized\n", b"")
        terminal.screen.expect("vm factory initialized", timeout=180)
        assert terminal.wait() == 0
    assert len(templates_here.keys()) == 1
    assert templates_here.scratch() == []


def test_destroy_while_one_is_built(config: Path, good_template: TemplateDir) -> None:
    (key,) = good_template.keys()
    with (good_template.root / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = kata("--config", str(config), "factory", "destroy").assert_clean_error(1)
    assert f"cannot remove template {key}: it is being built\n  hint: try again in a moment\n" in done.err
    assert good_template.keys() == {key}


def test_interrupted_init(config: Path, templates_here: TemplateDir) -> None:
    with subprocess.Popen([KATA, "--config", config, "factory", "init"], stderr=subprocess.PIPE, text=True) as process:
        wait_until("the builder", templates_here.builders)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=180)
    assert (process.returncode, said) == (130, "kata-runtime: interrupted; nothing was changed\n")
    assert templates_here.entries() == set()
    assert templates_here.builders() == set()


def test_a_container_cannot_have_the_templates_name() -> None:
    done = kata("run", "--rm", "--name", "template", "busybox", "true").assert_clean_error()
    assert "cannot use 'template' as a container name: templates of virtual machines lie there" in done.err


def test_wrong_usage(config: Path) -> None:
    assert "it must be auto, kvm, uml or tcg" in kata("factory", "init", "--accel", "fast").assert_clean_error(1).err
    assert kata("factory", "frobnicate").code == 1
    for words in ([], ["init"], ["status"], ["destroy"]):
        assert "Usage: kata-runtime factory" in kata("factory", *words, "--help").out


@pytest.mark.parametrize("verb", ["init", "status", "destroy"])
def test_needs_root(verb: str) -> None:
    done = subprocess.run(
        [*AS_OTHER_USER, KATA, "factory", verb],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"kata-runtime: cannot factory {verb}: this needs root\n")
