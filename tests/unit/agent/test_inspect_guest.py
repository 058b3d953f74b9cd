"""/proc as the agent reads it."""

from katapod.agent.inspection import Limits, parse_modules, parse_mounts, parse_stat, parse_units


def test_modules() -> None:
    text = "virtiofs 32768 1 - Live 0x0000000000000000\nfuse 176128 1 virtiofs, Live 0x0000000000000000\nodd\n"
    assert parse_modules(text) == [("virtiofs", 32768, 1), ("fuse", 176128, 1)]


def test_mounts() -> None:
    text = "kataShared /run/a\\040b virtiofs rw,relatime 0 0\nproc /proc\n"
    assert parse_mounts(text) == [("kataShared", "/run/a b", "virtiofs", "rw,relatime")]


def test_stat_of_a_process_that_calls_itself_so() -> None:
    rest = " ".join(["0"] * 19 + ["2", "0"])
    assert parse_stat(f"7 (a) R 1 (b) S 3 {rest}") == ("a) R 1 (b", "S", 3, 2 * 4096)
    assert parse_stat("") is None


def test_units() -> None:
    text = "kata-agent.service loaded active running Kata Containers Agent\nx.target loaded inactive dead\n"
    assert parse_units(text) == [
        ("kata-agent.service", "loaded", "active", "running", "Kata Containers Agent"),
        ("x.target", "loaded", "inactive", "dead", ""),
    ]


def test_limits() -> None:
    limits = Limits(2, 3)
    assert (limits.list([1, 2]), limits.text("abc"), limits.cut) == ([1, 2], "abc", False)
    assert (limits.list([1, 2, 3]), limits.text("abcd"), limits.cut) == ([1, 2], "abc", True)
    assert Limits(10**9, 10**9).entries < 1000
