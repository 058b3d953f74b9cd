"""Which contestants take part, in which order, and how they are called."""

import re
from pathlib import Path

import pytest

from bench.contestants import Contestant, katapod_variants, peer_contestants
from bench.measure import BenchError
from bench.raw_boot import RawBoot
from bench.run import Options, selected
from bench.suites import Stage, all_suites
from bench.workload import Bundles


def chosen(pattern: str, *, full: bool = False) -> dict[str, list[str]]:
    options = Options(1, re.compile(pattern, re.IGNORECASE), full, "tcg")
    return {suite.group: names for suite in all_suites() if (names := selected(suite, options))}


def contestants(folder: Path) -> dict[str, Contestant]:
    everyone = [
        *peer_contestants(Bundles(folder, folder / "rootfs"), folder, ("nsenter",)),
        *katapod_variants(folder, folder / "own", "tcg"),
    ]
    return {one.name: one for one in everyone}


def test_all_but_what_takes_minutes() -> None:
    assert {"start", "idle", "disk", "share", "rate", "20 at once", "40 at once"} <= set(chosen(""))
    assert set(chosen("", full=True)) - set(chosen("")) == {"cold", "busy"}


def test_a_pattern_brings_what_its_ratios_need() -> None:
    """The raw boot of bzImage for starts, runsc for small files and as an aim, and nobody else."""
    assert chosen("exec until output, katapod cold") == {"boot": ["bzImage"], "idle": ["Katapod cold"]}
    assert chosen("small files created, katapod image")["disk"] == ["runsc", "Katapod image"]
    assert chosen("run until output, katapod template")["start"] == ["runsc", "Katapod template"]


def names_of_rows() -> list[str]:
    return [f"{metric.title}, {who}" for suite in all_suites() for metric in suite.metrics for who in suite.contestants]


def test_names_of_rows_are_unique() -> None:
    names = names_of_rows()
    assert len(names) == len(set(names))


def test_every_base_and_every_budget_is_of_somebody() -> None:
    """A misspelt contestant would be a ratio that never comes."""
    names = names_of_rows()
    everyone = {who for suite in all_suites() for who in suite.contestants}
    for suite in all_suites():
        for metric in suite.metrics:
            assert metric.base is None or metric.base_name() in names
            assert set(metric.budgets) | set(metric.against) <= everyone


def test_each_round_begins_with_another(tmp_path: Path) -> None:
    stage = Stage(RawBoot({}, tmp_path, "tcg"), contestants(tmp_path))
    names = ("crun", "nobody", "runc", "runsc")
    assert [[one.name for one in stage.each(names, turn)] for turn in range(3)] == [
        ["crun", "runc", "runsc"],
        ["runc", "runsc", "crun"],
        ["runsc", "crun", "runc"],
    ]
    assert list(stage.each(("nobody",), 1)) == []


def test_a_failure_is_noted_and_the_run_goes_on(tmp_path: Path) -> None:
    stage = Stage(RawBoot({}, tmp_path, "tcg"), {})

    def fail_with(error: BaseException) -> None:
        with stage.tolerating("runsc"):
            raise error

    fail_with(BenchError("no ptrace"))
    assert stage.failures == ["runsc: no ptrace"]
    with pytest.raises(KeyboardInterrupt):
        fail_with(KeyboardInterrupt())


def test_runsc_has_no_network_and_crun_is_called_where_it_works(tmp_path: Path) -> None:
    there = contestants(tmp_path)
    runsc = there["runsc"].run("c1", ("true",))
    assert runsc[:1] == ["runsc"]
    assert " --platform ptrace --network none " in " ".join(runsc)
    assert there["crun"].delete("c1")[:4] == ["nsenter", "crun", "--root", str(tmp_path / "crun")]


def test_a_peer_that_is_not_installed_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert contestants(tmp_path)["runsc"].missing() == "runsc is not installed"
    (tmp_path / "runsc").touch(mode=0o755)
    assert contestants(tmp_path)["runsc"].missing() == ""


def test_a_variant_that_this_version_does_not_know_is_told_by_its_key(tmp_path: Path) -> None:
    variants = {one.name: one for one in katapod_variants(tmp_path, tmp_path / "own", "tcg")}
    pool = variants["Katapod pool"]
    assert "vm_cache_number" in pool.refused(
        "x.toml: [factory] vm_cache_number: not supported by this version; remove it"
    )
    assert pool.refused("x.toml: [runtime] other: not supported by this version") == ""
    assert pool.refused("kata-runtime: warning: vm_cache_number is large") == ""


def test_configurations_are_what_the_variants_are(tmp_path: Path) -> None:
    variants = katapod_variants(tmp_path, tmp_path / "own", "tcg")
    for one in variants:
        one.write_config()
    cold, template, pool, uml, uml_pool, default = (one.config.read_text() for one in variants)
    assert len({one.config for one in variants}) == 6
    assert "enable_template = false" in cold
    assert "enable_template = true" in template
    assert "vm_cache_number" not in template
    assert "vm_cache_number = 1" in pool
    assert all('accelerator = "tcg"' in text for text in (cold, template, pool))
    assert all('accelerator = "uml"' in text for text in (uml, uml_pool))
    assert "vm_cache_number = 1" in uml_pool
    assert 'accelerator = "auto"' in default
    assert "enable_template" not in default


def test_the_default_is_what_a_user_types(tmp_path: Path) -> None:
    variants = {one.name: one for one in katapod_variants(tmp_path, tmp_path / "own", "tcg")}
    assert variants["Katapod default"].run("n", ["true"])[3:] == ["run", "--rm", "--name", "n", "busybox", "true"]
    words = variants["Katapod template"].run("n", ["true"])[3:]
    assert words == ["run", "--rm", "--name", "n", "-m", "64m", "--net", "none", "busybox", "true"]
