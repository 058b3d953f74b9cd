"""Regular expressions over text that a guest, an image or a network may have written take linear time.

Every expression of the sources is in one of the lists below. Whoever adds one says who writes the text that it sees.
"""

import ast
import re
from pathlib import Path

import pytest

import katapod
from kit.expressions import ambiguities, is_searchable

ROOT = Path(katapod.__file__).parent
OURS = {  # text that root of this host wrote, or a program that root installed; of a few bytes, in most cases
    "cli": "flags",
    "observe/check_host.py": "what installed programs say of themselves",
    "observe/collect.py": "logs, line by line; alternatives of words",
    "observe/memory_use.py": "smaps(5) of our own processes",
    "host/forbidden_calls.py": "records of the host's kernel, of 1 KiB at most",
    "host/guest_kernel.py": "what ldd of this host says",
    "model/cni.py": "the administrator's network configuration",
    "model/config.py": "configuration.toml",
    "model/config_keys.py": "configuration.toml",
    "model/config_annotations.py": "annotations, which have a length limit, against the administrator's patterns",
    "model/direct_volume.py": "mountInfo.json of root",
    "model/flags.py": "flags",
    "model/go_template.py": "the value of --format, of 64 KiB at most",
    "model/ids.py": "names, which have a length limit",
    "model/image.py": "names, of 255 characters at most",
    "model/log_flags.py": "flags",
    "model/mount_flags.py": "flags",
    "model/net_flags.py": "flags",
    "model/network.py": "names of interfaces",
    "model/oci.py": "messages of msgspec",
    "model/oci_json.py": "messages of msgspec",
    "model/recipe.py": "image.toml of root",
    "model/run_flags.py": "flags",
    "model/seccomp_profile.py": "releases of kernels that a profile of root names",
    "oci/records.py": "names that an engine of root gives, as one argument",
    "operator/cluster/quantities.py": "amounts in a RuntimeClass, which the API server has parsed",
    "operator/cluster/validation.py": "keys of labels in a KataConfig, of the cluster's administrator",
    "operator/node/main.py": "flags",
    "operator/node/engine.py": "the configuration of an engine of the host",
    "osbuilder": "packages and kernels of this host",
    "observe/check_software.py": "what installed programs say of themselves",
    "model/uid_range.py": "a value of configuration.toml",
    "vmm/uml/nics.py": "names of taps and addresses of interfaces of the host",
    "vmm/uml/judge.py": "what User-mode Linux of this host says, in a bounded tail",
    "vmm/qemu/release.py": "what QEMU of this host says of its version",
    "vmm/qemu/judge.py": "what QEMU of this host says, and lines of a console's bounded tail",
    "plan/left_out.py": "places in the config.json of an engine",
    "plan/guest_image.py": "names of the host's kernel modules",
    "sandbox/container.py": "names of our own directories",
    "sandbox/lookup.py": "ids",
    "sandbox/raw_console.py": "an address that the supervisor of a sandbox gives",
    "sandbox/template_store.py": "names of our own directories",
    "shim/service.py": "names of methods",
}
LINE_BY_LINE = {"observe/redact.py": "lines are cut to 8 KiB; its own test has the worst texts"}
THEIRS = {"model/plain.py", "images/failures.py", "model/guest_metrics.py", "monitor/exposition.py"}
THEIRS |= {"monitor/service.py", "vmm/uml/disk_errors.py"}
ONLY_MATCHED = {  # tried at one place of a text, or where it is known to match
    ("images/failures.py", "_QUOTED"),
    ("model/guest_metrics.py", "_FOREIGN"),
    ("model/guest_metrics.py", "_HEAD"),
    ("model/guest_metrics.py", "_LABEL_NAME"),
    ("model/guest_metrics.py", "_SAMPLE"),
    ("model/guest_metrics.py", "_SUMMARY_LINE"),
}


def room_of(path: str) -> str:
    """The entry of OURS that covers a file."""
    return next((name for name in OURS if path == name or path.startswith(f"{name}/")), "")


def calls_of_re(path: str) -> list[ast.Call]:
    text = (ROOT / path).read_text()
    if "re." not in text:  # most files: parsing takes long
        return []
    return [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "re"
        and node.func.attr not in ("escape",)
    ]


FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))


def test_every_expression_is_known() -> None:
    using = {path for path in FILES if calls_of_re(path)}
    unknown = {path for path in using if not room_of(path)} - THEIRS - set(LINE_BY_LINE)
    assert not unknown, "say in this file who writes what the expressions there see"


def patterns(path: str) -> dict[str, re.Pattern[str]]:
    """Those with a name, and those that stand where they are used."""
    module = __import__(f"katapod.{path.removesuffix('.py').replace('/', '.')}", fromlist=["_"])
    found = {name: value for name, value in vars(module).items() if isinstance(value, re.Pattern)}
    for call in calls_of_re(path):
        assert isinstance(call.func, ast.Attribute)
        if call.func.attr == "compile" or not isinstance(call.args[0], ast.Constant):
            continue
        text = call.args[0].value
        found[f"line {call.lineno}"] = re.compile(text)
    return found


@pytest.mark.parametrize("path", sorted(THEIRS & set(FILES)))
def test_no_text_makes_one_slow(path: str) -> None:
    found = patterns(path)
    assert found
    for name, pattern in found.items():
        assert ambiguities(pattern) == [], f"{name} of {path}: {pattern.pattern}"
        assert is_searchable(pattern) or (path, name) in ONLY_MATCHED, f"{name} of {path}: {pattern.pattern}"


@pytest.mark.parametrize(
    ("pattern", "certain"),
    [
        ("[0-9]+x?[0-9]*y", False),
        (r"(?:[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|NaN)", False),  # froze an event loop once
        ("(a+)+b", False),
        ("(?:[ab]|a[cd])*e", False),
        (".*a", False),
        (r"\s*x?\s*y", False),
        ("(?i)[a-z]*Q", False),
        ("(a+)+", False),
        ("[0-9]++x?[0-9]*+y", True),
        (r"[0-9]+\.[0-9]+", True),
        (r'"(?:[^"\\]|\\.)*"', True),
        ("a{1,20}a{1,20}b", True),
        (r"(?:[a-z]+,)*;", True),
    ],
)
def test_the_judge(pattern: str, certain: bool) -> None:
    assert (ambiguities(re.compile(pattern)) == []) is certain


@pytest.mark.parametrize(
    ("pattern", "linear"),
    [('"[^"]*"x', True), ("a[a-z]*1", False), ("^a[a-z]*1", True), (r"(?<!\w)a\w*1", True), ("a[a-z]{0,9}1", True)],
)
def test_the_judge_of_searches(pattern: str, linear: bool) -> None:
    assert is_searchable(re.compile(pattern)) is linear
