"""The declarations of `run`'s options: what they become, and what they refuse."""

import importlib.util
import re
from pathlib import Path

import click
import msgspec
import pytest

from katapod.cli.command import near, without_values
from katapod.cli.declared import Declared
from katapod.cli.run import run
from katapod.cli.run_options import RUN_OPTIONS
from katapod.cli.run_request import RunFlags
from katapod.cli.settings import Globals
from katapod.model.errors import UsageError

TOOL = Path(__file__).parents[3] / "tools" / "generate_from_docker.py"
OPTIONS = [each for each in run.params if isinstance(each, click.Option)]


def test_each_option_that_works_has_a_field() -> None:
    parameters = {each.name for each in OPTIONS if each.expose_value}
    assert parameters | {"words"} == {field.name for field in msgspec.structs.fields(RunFlags)}


def test_no_two_options_have_one_name() -> None:
    names = [name for each in OPTIONS for name in each.opts]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("declared", [one for one in RUN_OPTIONS if one.cause], ids=lambda one: one.shown)
def test_what_is_refused_says_why_and_what_to_do(declared: Declared) -> None:
    name = next(name for name in reversed(declared.names) if name.startswith("-"))
    words = [name, "something"] if declared.metavar else [name]
    with pytest.raises(UsageError, match=re.escape(f"cannot use {' '.join(words)}: {declared.cause}")) as caught:
        run.make_context("run", [*words, "busybox"], obj=Globals())
    assert caught.value.hint == declared.way != ""
    for value in declared.meant if declared.metavar else ():
        run.make_context("run", [f"{name}={value}", "busybox"], obj=Globals())
    if not declared.metavar:
        run.make_context("run", [f"{name}=false", "busybox"], obj=Globals())


@pytest.mark.parametrize(
    ("words", "left", "off"),
    [
        ("--rm=true busybox", "--rm busybox", ""),
        ("--rm=false busybox", "busybox", "remove"),
        ("--rm --rm=0 busybox", "--rm busybox", "remove"),
        ("--rm=0 --rm busybox", "--rm busybox", ""),
        ("-it=false busybox", "-i busybox", "tty"),
        ("-t=false busybox", "busybox", "tty"),
        ("-it=true busybox", "-it busybox", ""),
        ("--name --rm=false busybox", "--name --rm=false busybox", ""),
        ("-e A=false busybox", "-e A=false busybox", ""),
        ("-eA=false busybox", "-eA=false busybox", ""),
        ("-ie A=false busybox --rm=false", "-ie A=false busybox --rm=false", ""),
        ("busybox ls --rm=false", "busybox ls --rm=false", ""),
        ("-- --rm=false", "-- --rm=false", ""),
        ("--name", "--name", ""),
        ("-x=false busybox", "-x=false busybox", ""),
        ("--tls-verify=false busybox", "busybox", "tls_verify"),
    ],
)
def test_switches_with_values(words: str, left: str, off: str) -> None:
    assert without_values(words.split(), OPTIONS, interspersed=False) == (left.split(), frozenset(filter(None, [off])))


def test_a_switch_is_true_or_false() -> None:
    with pytest.raises(UsageError, match="cannot use --rm=perhaps: it is neither true nor false"):
        without_values(["--rm=perhaps"], OPTIONS, interspersed=False)


def test_a_switch_that_is_off_is_not_given() -> None:
    context = run.make_context("run", ["--rm", "-it=false", "--rm=false", "busybox"], obj=Globals())
    assert [context.params[name] for name in ("remove", "interactive", "tty")] == [False, True, False]
    assert context.params["sig_proxy"] is True
    assert run.make_context("run", ["--sig-proxy=false", "busybox"], obj=Globals()).params["sig_proxy"] is False
    for words, verify in ((["--tls-verify"], True), (["--tls-verify=false"], False), ([], None)):
        assert run.make_context("run", [*words, "x"], obj=Globals()).params["tls_verify"] is verify


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("--volme", "--volume"),
        ("--memroy", "--memory"),
        ("--detatch", "--detach"),
        ("--prune", ""),
        ("--mout", "--mount"),
    ],
)
def test_only_what_is_near_is_suggested(typed: str, found: str) -> None:
    with pytest.raises(click.NoSuchOption) as caught:
        run.make_context("run", [typed, "busybox"], obj=Globals())
    assert (caught.value.possibilities or [""])[0] == found
    assert near("--mount", ["--net", "--tmpfs"]) == []


def test_the_page_is_what_the_declarations_say() -> None:
    spec = importlib.util.spec_from_file_location("generate_from_docker", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for path, tables in ((tool.PAGE, tool.command_tables()), (tool.LINES_PAGE, tool.line_tables())):
        assert tool.render(path, tables) == path.read_text(), "run: make configuration"
    page = tool.PAGE.read_text()
    for each in RUN_OPTIONS:
        assert all(f"`{name}`" in page for name in each.names if name.startswith("-"))
