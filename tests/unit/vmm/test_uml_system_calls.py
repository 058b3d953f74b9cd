"""The lists of system calls are what their tool would write, and that of User-mode Linux stays narrow."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from katapod.plan.call_filter import CallRule
from katapod.vmm.uml.system_calls import CALLS

TOOL = Path(__file__).resolve().parents[3] / "tools/record_system_calls.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    found = importlib.util.spec_from_file_location("record_system_calls", TOOL)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["uml", "qemu"])
def test_the_file_is_as_the_tool_writes_it(tool: ModuleType, kind: str) -> None:
    of = tool.KINDS[kind]
    assert of.file.read_text() == tool.render(tool.merged(of.calls, []), of.head)


def test_what_was_seen_is_added(tool: ModuleType) -> None:
    old = (CallRule("read", 0), CallRule("socket", 41, 0, (1,)))
    socket = tool.rules_of("socket", 41, {(16, 3, 0, 0), (1, 1, 0, 0)})
    dup = tool.rules_of("dup", 32, {(7, 0, 0, 0)})
    assert tool.merged(old, [socket, dup]) == [
        CallRule("dup", 32),
        CallRule("read", 0),
        CallRule("socket", 41, 0, (1, 16)),
    ]


def test_a_clone_that_makes_namespaces_is_not_added(tool: ModuleType) -> None:
    assert tool.rules_of("clone", 56, {(0x1200011, 0, 0, 0)}) == CallRule("clone", 56, 0, (0,), 0x7E020000)
    with pytest.raises(SystemExit, match="namespaces"):
        tool.rules_of("clone", 56, {(0x10000011, 0, 0, 0)})


def test_a_kernel_has_no_call_that_changes_the_host() -> None:
    names = {rule.name for rule in CALLS}
    for name in ("mount", "unshare", "setns", "chroot", "setuid", "capset", "mknod", "chown", "init_module"):
        assert name not in names
    for name in ("bpf", "keyctl", "process_vm_readv", "io_uring_setup", "userfaultfd", "open_by_handle_at", "prctl"):
        assert name not in names
    by_name = {rule.name: rule for rule in CALLS}
    assert by_name["socket"].values == by_name["socketpair"].values == (1,)  # AF_UNIX
    assert not {16, 0x4206} & set(by_name["ptrace"].values)  # PTRACE_ATTACH, PTRACE_SEIZE
    assert 6 not in by_name["kill"].values  # SIGABRT
