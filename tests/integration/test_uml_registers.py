"""What is preloaded into a kernel of User-mode Linux gives a traced program its registers back, on any processor.

The program here traces as such a kernel does, with the same functions and the same number of bytes.
"""

import os
import subprocess
import sys

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


def test_a_state_shorter_than_the_processors_is_taken() -> None:
    environment = os.environ | preload()
    done = subprocess.run([sys.executable, "-c", TRACER], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    status, whole, given = map(int, done.stdout.split())
    assert status == 3, "the traced program has ended as it should"
    assert given == min(whole, KNOWN_BYTES)


def test_it_is_made_from_its_source() -> None:
    subprocess.run([sys.executable, REGSET.parents[3] / "tools/build_native.py", "--check"], check=True)
