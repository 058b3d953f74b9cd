"""The filter of system calls, run by an interpreter of classic BPF."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from katapod.plan.call_filter import ALLOW, ENOSYS, ERRNO, KILL_PROCESS, USER_NOTIFY, CallFilter, CallRule, assemble

X86_64, I386 = 0xC000003E, 0x40000003
FILTER = CallFilter(
    (
        CallRule("read", 0),
        CallRule("socket", 41, 0, (1, 2)),
        CallRule("clone", 56, 0, (0,), 0x7C020000),
        CallRule("ptrace", 101, 0, (0, 12)),
        CallRule("ptrace", 101, 0, (0x4200,)),
        CallRule("exit_group", 231),
    )
)


def verdict(calls: CallFilter, number: int, *arguments: int, arch: int = X86_64) -> int:
    """What the kernel would do. Source: linux/filter.h, bpf_common.h."""
    data = struct.pack(
        "<iIQ6Q", number - (1 << 32 if number >= 1 << 31 else 0), arch, 0, *arguments, *[0] * (6 - len(arguments))
    )
    code = list(struct.iter_unpack("=HBBI", assemble(calls)))
    at = accumulator = 0
    while True:
        operation, when_true, when_false, k = code[at]
        at += 1
        match operation:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, k)
            case 0x54:
                accumulator &= k
            case 0x15:
                at += when_true if accumulator == k else when_false
            case 0x35:
                at += when_true if accumulator >= k else when_false
            case 0x06:
                return int(k)
            case _:
                raise AssertionError(f"no instruction of a filter: {operation:#x}")


def test_what_is_listed_is_allowed() -> None:
    assert verdict(FILTER, 0) == ALLOW
    assert verdict(FILTER, 231) == ALLOW


def test_what_is_not_listed_is_not_there() -> None:
    assert verdict(FILTER, 1) == ERRNO | ENOSYS
    assert verdict(CallFilter(FILTER.rules, watched=True), 1) == USER_NOTIFY


def test_arguments() -> None:
    assert [verdict(FILTER, 41, domain) for domain in (1, 2, 16)] == [ALLOW, ALLOW, ERRNO | ENOSYS]
    assert [verdict(FILTER, 101, request) for request in (0, 12, 16, 0x4200)] == [
        ALLOW, ALLOW, ERRNO | ENOSYS, ALLOW,
    ]  # fmt: skip
    assert verdict(FILTER, 56, 0x11) == ALLOW
    assert verdict(FILTER, 56, 0x11 | 0x10000000) == ERRNO | ENOSYS
    assert verdict(FILTER, 41, 1 << 32 | 16) == ERRNO | ENOSYS  # the kernel sees an int: 16


def test_other_architectures_end_the_program() -> None:
    assert verdict(FILTER, 0, arch=I386) == KILL_PROCESS
    assert verdict(FILTER, 0x40000000) == KILL_PROCESS  # x32
    assert verdict(FILTER, 0xFFFFFFFF) == KILL_PROCESS


@given(st.integers(0, 0x3FFFFFFF), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_nothing_else_is_allowed(number: int, first: int, second: int) -> None:
    low = first & 0xFFFFFFFF
    expected = (
        number in (0, 231)
        or (number == 41 and low in (1, 2))
        or (number == 56 and low & 0x7C020000 == 0)
        or (number == 101 and low in (0, 12, 0x4200))
    )
    assert verdict(FILTER, number, first, second) == (ALLOW if expected else ERRNO | ENOSYS)


BUT_SOME = CallFilter((CallRule("clone", 56, 0, (0,), 0x7C020000),), refused=(("ptrace", 101), ("unshare", 272)))


@given(st.integers(0, 0x3FFFFFFF) | st.sampled_from((56, 101, 272)), st.integers(0, (1 << 64) - 1))
def test_all_but_some(number: int, first: int) -> None:
    refused = number in (101, 272) or (number == 56 and first & 0x7C020000)
    assert verdict(BUT_SOME, number, first) == (ERRNO | ENOSYS if refused else ALLOW)
    assert verdict(BUT_SOME, number, first, arch=I386) == KILL_PROCESS


def test_all_but_some_in_words() -> None:
    assert BUT_SOME.describe() == "all but ptrace, unshare; only clone(argument 0 & 0x7c020000: 0x0)"
