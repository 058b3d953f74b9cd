"""KVM of this host: how fast it runs a guest's instructions.

Source: linux/kvm.h and the kernel's Documentation/virt/kvm/api.rst; the instructions by the "Intel 64 and IA-32
Architectures Software Developer's Manual", volume 2.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
import time

__all__ = ["instructions_a_second"]

KVM_CREATE_VM, KVM_GET_VCPU_MMAP_SIZE, KVM_CREATE_VCPU, KVM_RUN = 0xAE01, 0xAE04, 0xAE41, 0xAE80
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_GET_SREGS, KVM_SET_SREGS, KVM_SET_REGS = 0x8138AE83, 0x4138AE84, 0x4090AE82
KVM_EXIT_HLT = 5
EXIT_REASON = 8  # offset in struct kvm_run

PAGE = 0x1000
CODE = bytes.fromhex("6649 75fc f4")  # of real mode: dec ecx; jnz, to the dec; hlt
STEP = 2  # instructions
SREGS = 0x138  # size of struct kvm_sregs, which begins with cs: base, u32 limit, u16 selector
REGS = struct.Struct("18Q")  # rax, rbx, rcx, ..., rip, rflags
RCX, RIP, RFLAGS = 2, 16, 17
RFLAGS_ALWAYS = 2

STEPS = 20_000
RUNS = 3  # the quickest counts: who was interrupted was slow by no fault of KVM's


def instructions_a_second(device: str = "/dev/kvm") -> float | None:
    """Of CPU time, of a loop that never leaves the guest: some 10^9 where the processor runs it, 10^6 where a program
    interprets it. None where that cannot be told: another architecture, or a KVM that refuses a step.

    Takes some tenths of a second on a host that interprets, and a millisecond on others.
    """
    if os.uname().machine != "x86_64":
        return None
    try:
        return max(_measure(device) for _ in range(RUNS))
    except (OSError, ValueError):
        return None


def _measure(device: str) -> float:
    """Raises OSError; ValueError if the guest ends in another way than meant."""
    memory = mmap.mmap(-1, PAGE)
    memory[: len(CODE)] = CODE
    with contextlib.ExitStack() as stack:

        def opened(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        kvm = opened(os.open(device, os.O_RDWR | os.O_CLOEXEC))
        vm = opened(fcntl.ioctl(kvm, KVM_CREATE_VM, 0))
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", 0, 0, PAGE, PAGE, address))
        vcpu = opened(fcntl.ioctl(vm, KVM_CREATE_VCPU, 0))
        run = stack.enter_context(mmap.mmap(vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE)))
        sregs = bytearray(SREGS)
        fcntl.ioctl(vcpu, KVM_GET_SREGS, sregs)
        struct.pack_into("=QIH", sregs, 0, 0, 0xFFFF, 0)
        fcntl.ioctl(vcpu, KVM_SET_SREGS, bytes(sregs))
        registers = [0] * 18
        registers[RCX], registers[RIP], registers[RFLAGS] = STEPS, PAGE, RFLAGS_ALWAYS
        fcntl.ioctl(vcpu, KVM_SET_REGS, REGS.pack(*registers))
        began = time.thread_time()
        fcntl.ioctl(vcpu, KVM_RUN, 0)
        took = time.thread_time() - began
        if struct.unpack_from("=I", run, EXIT_REASON)[0] != KVM_EXIT_HLT:
            raise ValueError("the guest did not halt")
    return STEPS * STEP / max(took, 1e-9)
