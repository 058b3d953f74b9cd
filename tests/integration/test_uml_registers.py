"""What is preloaded into a kernel of User-mode Linux gives a traced program its registers back, on any processor, and
calls handlers of signals as Linux does.

The program here traces as such a kernel does, with the same functions and the same number of bytes.
"""

import os
import subprocess
import sys

import pytest

from katapod.host.regset import REGSET, preload

KNOWN_BYTES = 2696  # what User-mode Linux 6.1 and 6.12 keep (HOST_FP_SIZE)
TRACER = f"""
import ctypes, mmap, os, signal, struct, sys
GETREGS, SETREGS, GETREGSET, SETREGSET, XSTATE = 12, 13, 0x4204, 0x4205, 0x202
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.restype = ctypes.c_long
class IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]
def ptrace(request, pid, address, data):
    if libc.ptrace(ctypes.c_long(request), ctypes.c_long(pid), ctypes.c_void_p(address), data) < 0:
        sys.exit(f"ptrace {{request:#x}}: {{os.strerror(ctypes.get_errno())}}")
def state(length):
    buffer = ctypes.create_string_buffer(length)
    vector = IoVec(ctypes.addressof(buffer), length)
    ptrace(GETREGSET, child, XSTATE, ctypes.byref(vector))
    return buffer, vector
if (child := os.fork()) == 0:
    libc.ptrace(0, 0, None, None)
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(3)
os.waitpid(child, 0)
registers = ctypes.create_string_buffer(512)
ptrace(GETREGS, child, 0, registers)
ptrace(SETREGS, child, 0, registers)
whole = state(65536)[1].len
known, vector = state({KNOWN_BYTES})
ctypes.memmove(ctypes.addressof(known) + 160, bytes(range(16)) * 2, 32)  # xmm0, xmm1
header = struct.unpack_from("<Q", known, 512)[0] | 0x2
if header & 0x4:
    ctypes.memmove(ctypes.addressof(known) + 576, bytes(range(16, 32)), 16)  # the upper half of ymm0
struct.pack_into("<Q", known, 512, header)
for _ in range(2):
    ptrace(SETREGSET, child, XSTATE, ctypes.byref(vector))
    given = state({KNOWN_BYTES})[0].raw
    assert given[:vector.len] == known.raw[:vector.len], "the state is another one"
libc.ptrace(17, child, None, None)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), whole, vector.len)
"""

# A handler of signal 10, whose frame is at the stack's end, as setup_signal_stack_si() of the kernel calls it.
ENTRY = """
import ctypes, os, signal, struct, sys
RAX, RDX, RSI, RDI, FLAGS, RSP = 10, 12, 13, 14, 18, 19
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
if (child := os.fork()) == 0:
    libc.ptrace(0, 0, None, None)
    os.kill(os.getpid(), signal.SIGSTOP)
os.waitpid(child, 0)
held = ctypes.create_string_buffer(27 * 8)
assert libc.ptrace(12, child, None, held) == 0
regs = list(struct.unpack("27Q", held.raw))
regs[RAX], regs[RDX], regs[RSI], regs[RDI] = 0, regs[RSP] + 8, regs[RSP] + 8 + 304, 10
regs[FLAGS] |= 0x500 | 0x1
for name, change in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    regs[globals()[name]] += change
assert libc.ptrace(13, child, None, struct.pack("27Q", *regs)) == 0
assert libc.ptrace(12, child, None, held) == 0
print(hex(struct.unpack("27Q", held.raw)[FLAGS] & 0x501))
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
"""


def test_a_state_shorter_than_the_processors_is_taken() -> None:
    environment = os.environ | preload()
    done = subprocess.run([sys.executable, "-c", TRACER], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    status, whole, given = map(int, done.stdout.split())
    assert status == 3, "the traced program has ended as it should"
    assert given == min(whole, KNOWN_BYTES)


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ((), "0x1"),
        (("RAX", "1"), "0x501"),
        (("RDX", "8"), "0x501"),
        (("RSI", "8"), "0x501"),
        (("RSP", "-8"), "0x501"),
        (("RDI", "-10"), "0x501"),
        (("RDI", "55"), "0x501"),
    ],
)
def test_a_handler_begins_without_direction_and_trap_flag(changes: tuple[str, ...], flags: str) -> None:
    """A copy that goes backwards, or a program that steps, keeps them."""
    environment = os.environ | preload()
    command = [sys.executable, "-c", ENTRY, *changes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{flags}\n")


def test_it_is_made_from_its_source() -> None:
    subprocess.run([sys.executable, REGSET.parents[3] / "tools/build_native.py", "--check"], check=True)
