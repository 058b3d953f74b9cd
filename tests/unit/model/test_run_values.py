"""Values of the flags of `run` that are around a container."""

import pytest

from katapod.model import run_flags as flags
from katapod.model.errors import UsageError


def test_when_a_registry_is_asked() -> None:
    assert [flags.parse_pull(text) for text in ("missing", "always", "never", "newer")] == [
        "missing",
        "always",
        "never",
        "always",
    ]
    with pytest.raises(UsageError, match="it is none of missing"):
        flags.parse_pull("sometimes")


@pytest.mark.parametrize("text", ["linux/amd64", "linux", "LINUX/x86_64"])
def test_this_machine_s_platform(text: str) -> None:
    flags.check_platform(text, machine="x86_64")


@pytest.mark.parametrize("text", ["linux/arm64", "windows/amd64", "", "windows"])
def test_other_platforms(text: str) -> None:
    with pytest.raises(UsageError, match="only linux/amd64 can run"):
        flags.check_platform(text, machine="x86_64")


def test_streams() -> None:
    assert flags.parse_attach(()) == ("stdin", "stdout", "stderr")
    assert flags.parse_attach(("STDERR", "stdin")) == ("stdin", "stderr")
    with pytest.raises(UsageError, match="none of stdin, stdout, stderr"):
        flags.parse_attach(("log",))


def test_cpu_lists() -> None:
    assert flags.parse_cpu_list("0-2,5") == {0, 1, 2, 5}
    for text in ("", "a", "3-1", "1-2-3", "-1"):
        with pytest.raises(UsageError, match="--cpuset-cpus"):
            flags.parse_cpu_list(text)


def test_quotas() -> None:
    assert flags.parse_cpu_quota("50000", "", 100_000) == (0.5, 100_000)
    assert flags.parse_cpu_quota("50000", "25000", 100_000) == (2.0, 25_000)
    assert flags.parse_cpu_quota("-1", "0", 100_000) == (None, 100_000)
    for quota, period in (("10", ""), ("x", ""), ("5000", "10"), ("5000", "x")):
        with pytest.raises(UsageError, match="microseconds"):
            flags.parse_cpu_quota(quota, period, 100_000)


def test_masks_and_scores() -> None:
    assert (flags.parse_umask("0027"), flags.parse_umask("0")) == (0o27, 0)
    assert flags.parse_oom_score_adj("-1000") == -1000
    for text in ("8", "1777", "x"):
        with pytest.raises(UsageError, match="octal"):
            flags.parse_umask(text)
    for text in ("1001", "x", "--1"):
        with pytest.raises(UsageError, match="within -1000 and 1000"):
            flags.parse_oom_score_adj(text)


def test_logs() -> None:
    assert flags.parse_log("", ()) == flags.LogChoice(keep=True, size_bytes=64 << 20)
    assert flags.parse_log("none", ()).keep is False
    assert flags.parse_log("json-file", ("max-size=10m", "max-file=2")).size_bytes == 10 << 20
    with pytest.raises(UsageError, match="a container's log is a file") as caught:
        flags.parse_log("syslog", ())
    assert "systemd-cat" in caught.value.hint
    for option in ("max-file=7", "tag=x", "max-size=lots"):
        with pytest.raises(UsageError, match="--log-opt"):
            flags.parse_log("", (option,))


def test_truth() -> None:
    assert [flags.parse_truth("--rm", text) for text in ("1", "True", "f", "FALSE")] == [True, True, False, False]
    with pytest.raises(UsageError, match="cannot use --rm=yes"):
        flags.parse_truth("--rm", "yes")


def test_restart_policies() -> None:
    assert str(flags.parse_restart("on-failure:5")) == "on-failure:5"
    assert [str(flags.parse_restart(text)) for text in ("no", "always", "unless-stopped", "on-failure")] == [
        "no",
        "always",
        "unless-stopped",
        "on-failure",
    ]
    for text in ("", "never", "always:3", "on-failure:", "on-failure:x", "on-failure:-1", "on-failure:9999999999"):
        with pytest.raises(UsageError, match="cannot use --restart"):
            flags.parse_restart(text)


@pytest.mark.parametrize(
    ("policy", "code", "restarts", "wanted"),
    [
        ("no", 1, 0, False),
        ("always", 0, 99, True),
        ("unless-stopped", 0, 0, True),
        ("on-failure", 0, 0, False),
        ("on-failure", 1, 99, True),
        ("on-failure:2", 1, 1, True),
        ("on-failure:2", 1, 2, False),
    ],
)
def test_what_a_policy_wants(policy: str, code: int, restarts: int, wanted: bool) -> None:
    assert flags.parse_restart(policy).wants(code, restarts) is wanted
