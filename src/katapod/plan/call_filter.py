"""A list of allowed system calls, or of refused ones, and the seccomp filter of it: a program of classic BPF. Pure.

Sources: seccomp(2), linux/seccomp.h (struct seccomp_data), linux/filter.h, linux/audit.h.
"""

import struct
from collections.abc import Iterable

from msgspec import Struct, field

__all__ = ["ALLOW", "ENOSYS", "KILL_PROCESS", "CallFilter", "CallRule", "assemble"]

ALLOW, KILL_PROCESS, ERRNO, USER_NOTIFY = 0x7FFF0000, 0x80000000, 0x00050000, 0x7FC00000
ENOSYS = 38
AUDIT_ARCH_X86_64 = 0xC000003E
X32_BIT = 0x40000000  # numbers of the x32 ABI, which x86_64 kernels may serve too

NR_AT, ARCH_AT, ARGUMENTS_AT = 0, 4, 16  # in struct seccomp_data
LOAD, AND = 0x20, 0x54  # BPF_LD|BPF_W|BPF_ABS, BPF_ALU|BPF_AND|BPF_K
EQUAL, AT_LEAST = 0x15, 0x35  # BPF_JMP|BPF_JEQ|BPF_K, BPF_JMP|BPF_JGE|BPF_K
RETURN = 0x06  # BPF_RET|BPF_K


class CallRule(Struct, frozen=True, order=True):
    """A system call that is allowed if an argument, of which `mask` bits count, has one of `values`; without values,
    with any arguments. Only the lower 32 bits of the argument are looked at: it has to be one of which the kernel looks
    at no more."""

    name: str
    number: int
    argument: int = 0
    values: tuple[int, ...] = ()
    mask: int = 0xFFFFFFFF


class CallFilter(Struct, frozen=True):
    """All other calls fail with ENOSYS, as on a kernel without them; those of another architecture end the program.

    With `refused` it is the other way round: these fail, and those of a rule unless it allows them; all others are
    allowed.
    """

    rules: tuple[CallRule, ...]
    watched: bool = field(default=False)  # what is not allowed is told to a listener: for tools that make lists
    refused: tuple[tuple[str, int], ...] = ()  # name, number

    def describe(self) -> str:
        allowed = ", ".join(_describe(rule) for rule in sorted(self.rules))
        if not self.refused:
            return allowed
        names = ", ".join(sorted(name for name, _ in self.refused))
        return f"all but {names}" + (f"; only {allowed}" if allowed else "")


def _describe(rule: CallRule) -> str:
    if not rule.values:
        return rule.name
    mask = f" & {rule.mask:#x}" if rule.mask != 0xFFFFFFFF else ""
    return f"{rule.name}(argument {rule.argument}{mask}: {' '.join(f'{value:#x}' for value in rule.values)})"


def assemble(calls: CallFilter) -> bytes:
    """The program: an array of struct sock_filter, for x86_64."""
    code = [
        (LOAD, 0, 0, ARCH_AT),
        (EQUAL, 1, 0, AUDIT_ARCH_X86_64),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, NR_AT),
        (AT_LEAST, 0, 1, X32_BIT),
        (RETURN, 0, 0, KILL_PROCESS),
    ]
    # those with arguments first: of the others the kernel keeps the verdicts, and does not run the program for them
    for rule in sorted(calls.rules, key=lambda rule: not rule.values):
        body = [(RETURN, 0, 0, ALLOW)] if not rule.values else list(_compare(rule))
        code += [(EQUAL, 0, len(body), rule.number), *body]
    refusal = (RETURN, 0, 0, USER_NOTIFY if calls.watched else ERRNO | ENOSYS)
    if calls.refused:
        for number in sorted({*(number for _, number in calls.refused), *(rule.number for rule in calls.rules)}):
            code += [(EQUAL, 0, 1, number), refusal]
        code.append((RETURN, 0, 0, ALLOW))
    else:
        code.append(refusal)
    return b"".join(struct.pack("=HBBI", *each) for each in code)


def _compare(rule: CallRule) -> Iterable[tuple[int, int, int, int]]:
    """Allow by the argument, else go on with the number: a call may have several rules."""
    yield (LOAD, 0, 0, ARGUMENTS_AT + 8 * rule.argument)  # little-endian: the lower half comes first
    if rule.mask != 0xFFFFFFFF:
        yield (AND, 0, 0, rule.mask)
    for value in rule.values:
        yield (EQUAL, 0, 1, value)
        yield (RETURN, 0, 0, ALLOW)
    yield (LOAD, 0, 0, NR_AT)
