"""The words of OCI commands: what callers write, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapod.oci.arguments import SYNTAX, Call, parse_call
from katapod.oci.errors import OciError


def parsed(*words: str) -> Call:
    call = Call()
    parse_call(list(words), call)
    return call


def test_what_conmon_writes() -> None:
    call = parsed(
        *("--systemd-cgroup", "--log=/run/oci-log", "--log-format=json", "create", "--bundle", "/b"),
        *("--pid-file", "/b/pidfile", "--no-new-keyring", "--console-socket", "/tmp/s", "c1"),
    )
    assert (call.verb, call.id) == ("create", "c1")
    assert (call.log, call.log_format) == ("/run/oci-log", "json")
    assert call.values == {"bundle": "/b", "pid-file": "/b/pidfile", "console-socket": "/tmp/s"}
    assert call.switches == {"no-new-keyring"}


def test_what_containerd_writes() -> None:
    call = parsed(
        *("--root", "/run/containerd/runc/default", "--log", "/b/log.json", "--log-format", "json"),
        *("exec", "--process", "/tmp/p", "--detach", "--pid-file", "/b/p.pid", "c1"),
    )
    assert (call.root, call.verb, call.id) == ("/run/containerd/runc/default", "exec", "c1")
    assert call.switches == {"detach"}
    assert parsed("kill", "--all", "c1", "9").operands == ["c1", "9"]
    assert parsed("update", "--resources=-", "c1").values == {"resources": "-"}


def test_a_single_dash_is_as_good_as_two() -> None:
    assert parsed("restore", "-no-subreaper", "-detach", "c1").switches == {"no-subreaper", "detach"}


def test_short_options_stand_for_the_long_ones() -> None:
    assert parsed("create", "-b", "/b", "c1").values == {"bundle": "/b"}
    assert parsed("exec", "-d", "-t", "-e", "A=1", "-e", "B=2", "c1", "ls").lists == {"env": ["A=1", "B=2"]}


def test_options_stand_before_and_behind_an_id() -> None:
    assert parsed("delete", "c1", "--force").switches == {"force"}
    assert parsed("delete", "--force=true", "c1").switches == {"force"}
    assert parsed("delete", "--force=false", "c1").switches == set()


def test_what_follows_the_id_of_exec_is_the_commands() -> None:
    assert parsed("exec", "c1", "ls", "-l", "--all").operands == ["c1", "ls", "-l", "--all"]
    assert parsed("exec", "c1", "--", "ls", "-l").operands == ["c1", "ls", "-l"]
    assert parsed("ps", "--format", "json", "c1", "-ef").operands == ["c1", "-ef"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("create",), "requires a minimum of 1 argument"),
        (("create", "a", "b"), "at most 1"),
        (("create", "--nosuch", "c1"), "flag provided but not defined: --nosuch"),
        (("--nosuch", "create", "c1"), "flag provided but not defined: --nosuch"),
        (("nosuch", "c1"), "unknown command 'nosuch'"),
        (("restore", "--lsm-mount-context"), "flag needs an argument"),  # Podman looks for these words
        (("--log-format", "xml", "state", "c1"), "invalid log format 'xml'"),
        (("delete", "--force=maybe", "c1"), "invalid value 'maybe'"),
        ((), "a command is missing"),
    ],
)
def test_what_is_wrong_is_named(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(OciError, match=said):
        parsed(*words)


def test_where_to_log_is_known_before_an_error() -> None:
    call = Call()
    with pytest.raises(OciError):
        parse_call(["--log", "/x", "--log-format", "json", "create"], call)
    assert (call.log, call.log_format) == ("/x", "json")


@given(st.lists(st.sampled_from([*SYNTAX, "--root", "--force", "-d", "--", "-", "c1", "--env=A", "9", ""]) | st.text()))
def test_any_words_are_a_call_or_an_error(words: list[str]) -> None:
    call = Call()
    try:
        parse_call(words, call)
    except OciError:
        return
    assert call.verb in SYNTAX or call.asks
