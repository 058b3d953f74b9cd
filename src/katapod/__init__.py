"""Katapod: a VM-isolated container runtime.

As a library: the names of __all__, whose documentation is docs/how-to/python.md. They are loaded when they are first
used, since every program of Katapod imports this module, the agent in the guest included.
"""

__version__ = "0.1.0"

_PLACES = {
    "AgentFailed": "sandbox.errors",
    "AlreadyExists": "model.errors",
    "CommandFailed": "api.process",
    "CommandNotExecutable": "sandbox.errors",
    "CommandNotFound": "sandbox.errors",
    "Completed": "api.process",
    "ConfigError": "model.errors",
    "Container": "api.container",
    "ContainerInfo": "api.info",
    "ContainerOptions": "api.options",
    "HostLacks": "model.errors",
    "Image": "api.image",
    "ImageError": "images.errors",
    "ImageSource": "api.options",
    "InvalidState": "model.errors",
    "KatapodError": "model.errors",
    "NoSpace": "model.errors",
    "NotFound": "model.errors",
    "Options": "api.options",
    "PIPE": "api.streams",
    "Process": "api.process",
    "Sandbox": "api.sandbox",
    "SandboxInfo": "api.info",
    "SandboxOptions": "api.options",
    "State": "model.record",
    "UsageError": "model.errors",
    "Volume": "model.mount_flags",
    "leave_host_mounts": "host.own_mounts",
    "run": "api.container",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> object:
    """Source: PEP 562."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = globals()[name] = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
