"""How to recognize the process of a VM from /proc alone. Light: recovery imports it."""

from pathlib import Path

__all__ = ["is_vm"]

MARKS = (("qemu", "\0{vm_dir}/pid\0"),)  # in the program's name, in its command line


def is_vm(command_line: str, vm_dir: Path) -> bool:
    """Whether a process, of whose command line each argument ends with a NUL, is the VM whose files lie in `vm_dir`."""
    program = command_line.partition("\0")[0]
    return any(name in program and mark.format(vm_dir=vm_dir) in command_line for name, mark in MARKS)
