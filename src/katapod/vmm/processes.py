"""How to recognize the process of a VM from /proc alone. Light: recovery imports it."""

from pathlib import Path

__all__ = ["is_vm"]

MARKS = (
    ("qemu", "\0{vm_dir}/pid\0"),
    ("linux.uml {vm_dir}\0", ""),
    ("qemu-storage-daemon {vm_dir}\0", ""),
)  # in the first argument, in the command line


def is_vm(command_line: str, vm_dir: Path) -> bool:
    """Whether a process, of whose command line each argument ends with a NUL, is the VM whose files lie in `vm_dir`,
    or what serves its disks."""
    first, end, _ = command_line.partition("\0")
    return any(
        name.format(vm_dir=vm_dir) in first + end and mark.format(vm_dir=vm_dir) in command_line for name, mark in MARKS
    )
