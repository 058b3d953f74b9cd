"""What a command fails with, in runc's words: engines look for some of them, as containerd's go-runc and Podman do.

Source: runc's libcontainer/error.go; go-runc and shim-runc-v2 of containerd; libpod/oci_conmon_common.go of Podman.
"""

__all__ = ["NOT_RUNNING", "OciError", "does_not_exist", "exists", "not_saved", "not_stopped"]

NOT_RUNNING = "container not running"


class OciError(Exception):
    """The command cannot be carried out; the text is for the engine. `status`: the exit status."""

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


def does_not_exist(container_id: str) -> OciError:
    return OciError(f"container {container_id!r} does not exist: container does not exist")


def exists(container_id: str) -> OciError:
    return OciError(f"cannot create {container_id}: container with given ID already exists")


def not_stopped(container_id: str, status: str) -> OciError:
    return OciError(f"cannot delete container {container_id} that is not stopped: {status}")


def not_saved(verb: str) -> OciError:
    return OciError(f"{verb} is not supported: containers in virtual machines are not saved")
