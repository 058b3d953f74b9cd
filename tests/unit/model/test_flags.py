"""Values of command line flags."""

import signal
from collections.abc import Callable

import pytest

from katapod.model import flags, oci
from katapod.model.errors import UsageError

MIB = 1 << 20


def refuses(parse: Callable[[str], object], text: str, cause: str) -> None:
    """`parse` must refuse `text`, quote it, say why, and give an example that it takes itself."""
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert cause in str(caught.value)
    assert repr(text)[1:20] in str(caught.value)
    example = caught.value.hint.removeprefix("for example: ").split(" ", 1)[1]
    parse(example)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("65536", 65536),
        ("10b", 10),
        ("4k", 4096),
        ("512m", 512 * MIB),
        ("512M", 512 * MIB),
        ("1g", 1024 * MIB),
        ("1.5GiB", 1536 * MIB),
        ("2 gb", 2048 * MIB),
        ("1t", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert flags.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "m", "-1", "1x", "1mm", "1e9", "0x10", "1,5g", "٣", "9" * 39])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="cannot use --shm-size"):
        flags.parse_size(text)


def test_memory() -> None:
    assert flags.parse_memory("0") is None
    assert flags.parse_memory("6m") == 6 * MIB
    refuses(flags.parse_memory, "5m", "the least that a container can start with is 6m")
    refuses(flags.parse_memory, "lots", "it is not a size")


def test_cpus() -> None:
    assert flags.parse_cpus("1.5") == 1.5
    assert flags.parse_cpus(".5") == 0.5
    assert flags.parse_cpus("0") is None
    for text in ("-1", "two", "1e3", "nan", "inf", "", "1.0000000001"):
        with pytest.raises(UsageError, match="it is not a number of CPUs"):
            flags.parse_cpus(text)
    refuses(flags.parse_cpus, "0.001", "least share")


def test_whole_numbers() -> None:
    assert flags.parse_pids_limit("100") == 100
    assert flags.parse_pids_limit("0") is None
    assert flags.parse_pids_limit("-1") is None
    refuses(flags.parse_pids_limit, "many", "it is not a whole number")
    refuses(flags.parse_pids_limit, "-2", "the least value is -1")
    assert flags.parse_stop_timeout("0") == 0
    assert flags.parse_stop_timeout("-1") is None
    refuses(flags.parse_stop_timeout, "1s", "it is not a whole number")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("KILL", 9),
        ("SIGKILL", 9),
        ("sigterm", 15),
        ("9", 9),
        ("64", 64),
        ("RTMIN", signal.SIGRTMIN),
        ("RTMIN+3", signal.SIGRTMIN + 3),
        ("SIGRTMAX-1", signal.SIGRTMAX - 1),
    ],
)
def test_signals(text: str, number: int) -> None:
    assert flags.parse_signal(text) == number


@pytest.mark.parametrize("text", ["", "0", "65", "SIG", "NOPE", "RTMIN+99", "-9", "_DFL"])
def test_bad_signals(text: str) -> None:
    with pytest.raises(UsageError, match="no such signal"):
        flags.parse_signal(text)


def test_workdir() -> None:
    assert flags.parse_workdir("/srv//a/") == "/srv/a"
    refuses(flags.parse_workdir, "srv", "must be an absolute path")


def test_env() -> None:
    caller = {"HOME": "/root", "EMPTY": ""}
    entries = ["A=1", "HOME", "EMPTY", "ABSENT", "B=x=y", "A=2", "C="]
    assert flags.parse_env(entries, caller) == ("A=2", "HOME=/root", "EMPTY=", "B=x=y", "C=")
    for entry in ("", "=1"):
        with pytest.raises(UsageError, match="it has no name before '='"):
            flags.parse_env([entry], caller)


def test_env_file() -> None:
    text = '\ufeffA=1\n# comment\n\n  B="2" \nHOME\nABSENT\n'
    assert flags.parse_env_file(text, {"HOME": "/r"}, "f.env") == ("A=1", 'B="2" ', "HOME=/r")
    with pytest.raises(UsageError, match=r"cannot use --env-file 'f\.env': line 2: 'A B' is not a name"):
        flags.parse_env_file("X=1\nA B=1\n", {}, "f.env")


def test_labels() -> None:
    assert flags.parse_label("a=b=c") == ("a", "b=c")
    assert flags.parse_label("a") == ("a", "")
    refuses(flags.parse_label, "=b", "no name")


@pytest.mark.parametrize(
    ("text", "user", "group"),
    [
        ("1000", "1000", None),
        ("1000:50", "1000", "50"),
        ("bob:", "bob", None),
        (":", "0", None),
        ("www-data:staff", "www-data", "staff"),
        ("", "0", None),
        ("٣", "٣", None),
        (":5", "0", "5"),
    ],
)
def test_users(text: str, user: str, group: str | None) -> None:
    assert flags.parse_user(text) == flags.UserName(user=user, group=group)


@pytest.mark.parametrize("text", ["a b", "a:b:c", "4294967295", "a/b"])
def test_bad_users(text: str) -> None:
    with pytest.raises(UsageError, match="cannot use -u"):
        flags.parse_user(text)


def test_groups() -> None:
    assert [flags.parse_group(text) for text in ("video", "44")] == ["video", "44"]
    for text in ("", "a:b", "a b", "4294967295"):
        with pytest.raises(UsageError, match="cannot use --group-add"):
            flags.parse_group(text)


def test_capabilities() -> None:
    assert flags.parse_cap("NET_ADMIN") == "CAP_NET_ADMIN"
    assert flags.parse_cap("cap_net_admin") == "CAP_NET_ADMIN"
    assert flags.parse_cap("all") == "ALL"
    refuses(flags.parse_cap, "FLY", "no such capability")
    assert len(flags.ALL_CAPABILITIES) == 41


def test_ulimits() -> None:
    unlimited = 2**64 - 1
    assert flags.parse_ulimit("nofile=1024:2048") == oci.Rlimit(type="RLIMIT_NOFILE", soft=1024, hard=2048)
    assert flags.parse_ulimit("core=0") == oci.Rlimit(type="RLIMIT_CORE", soft=0, hard=0)
    assert flags.parse_ulimit("memlock=-1") == oci.Rlimit(type="RLIMIT_MEMLOCK", soft=unlimited, hard=unlimited)
    assert flags.parse_ulimit("cpu=5:unlimited").hard == unlimited
    refuses(flags.parse_ulimit, "files=1", "there is no limit 'files'")
    refuses(flags.parse_ulimit, "nofile", "not NAME=SOFT[:HARD]")
    refuses(flags.parse_ulimit, "nofile=1:", "not NAME=SOFT[:HARD]")
    refuses(flags.parse_ulimit, "nofile=2:1", "the soft limit exceeds")


def test_sysctls() -> None:
    assert flags.parse_sysctl("net.core.somaxconn=1024") == ("net.core.somaxconn", "1024")
    assert flags.parse_sysctl("kernel.sem=1 2 3 4") == ("kernel.sem", "1 2 3 4")
    assert flags.parse_sysctl("net/ipv4/ip_forward=1") == ("net.ipv4.ip_forward", "1")
    refuses(flags.parse_sysctl, "kernel.panic=1", "does not belong to a namespace")
    refuses(flags.parse_sysctl, "net...kernel.panic=1", "does not belong to a namespace")
    refuses(flags.parse_sysctl, "net.x", "it is not NAME=VALUE")


@pytest.mark.parametrize("text", ["web-1", "a", "a.example.org", "x" * 63, "A_1"])
def test_hostnames(text: str) -> None:
    assert flags.parse_hostname(text) == text


@pytest.mark.parametrize("text", ["", "-a", "a-", "a..b", "a b", "ü", "x" * 64, "a/b", "a\n"])
def test_bad_hostnames(text: str) -> None:
    refuses(flags.parse_hostname, text, "it is not a host name")


def test_a_hostname_longer_than_the_kernel_takes() -> None:
    refuses(flags.parse_hostname, "a." * 40 + "b", "81 characters, Linux takes at most 64")


def test_a_huge_value_is_not_repeated_in_full() -> None:
    with pytest.raises(UsageError) as caught:
        flags.parse_cap("x" * 10_000)
    assert len(str(caught.value)) < 300
