"""The command line of a User-mode Linux kernel, piece by piece, each with what it is for."""

from collections.abc import Mapping, Sequence

from katapod.model.inspection import UNKNOWN_PART, OptionPart

__all__ = ["explain_command_line", "kernel_parameters_in"]

WORDS: Mapping[str, str] = {
    "mem": "memory of the guest, a file in a tmpfs of the kernel's own",
    "ubd0r": "the first disk, read-only: the guest's root file system",
    "con": "no other consoles",
    "con0": "the console, on a descriptor that the supervisor keeps the log of",
    "ssl": "no serial lines",
    "umid": "the name of the machine, below uml_dir",
    "uml_dir": "where the kernel has its management console",
}
VIRTIO: Mapping[str, str] = {  # by the device id of the virtio specification
    "2": "a disk, or a place for one that comes later, by vhost-user; a qemu-storage-daemon serves it",
    "3": "a console, by vhost-user: channels to the agent, served by the supervisor",
    "5": "a balloon, by vhost-user: memory that the guest frees goes back to the host",
    "26": "the shared directory, by vhost-user; virtiofsd serves it",
}
GUESTS_FROM = "lpj"  # where what is the guest's own begins


def explain_command_line(command: Sequence[str]) -> tuple[OptionPart, ...]:
    """The program, then its words until those that are parameters of any kernel."""
    if not command:
        return ()
    parts = [OptionPart(command[0], "the guest's kernel, a program of this host, and the directory of its machine")]
    for word in command[1 : _first_of_guest(command)]:
        key = word.partition("=")[0]
        meaning = VIRTIO.get(word.rpartition(":")[2], "") if key == "virtio_uml.device" else WORDS.get(key, "")
        if not meaning and key[:3] == "vec" and key[3:].partition(":")[0].isdigit():
            meaning = "a network interface, by a tap of the pod's network namespace that the kernel opens by name"
        parts.append(OptionPart(word, meaning or UNKNOWN_PART, known=bool(meaning)))
    return tuple(parts)


def kernel_parameters_in(command: Sequence[str]) -> str:
    return " ".join(command[_first_of_guest(command) :])


def _first_of_guest(command: Sequence[str]) -> int:
    return next((at for at, word in enumerate(command) if word.partition("=")[0] == GUESTS_FROM), len(command))
