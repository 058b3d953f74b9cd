"""The public names are a promise: which there are, and how each is called. Who changes this list changes programs of
others."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import katapod
from kit import entry_point

NAMES = """
AgentFailed AlreadyExists CommandFailed CommandNotExecutable CommandNotFound Completed ConfigError Container
ContainerInfo ContainerOptions HostLacks Image ImageError ImageSource InvalidState KatapodError NoSpace NotFound Options
PIPE Process Sandbox SandboxInfo SandboxOptions State UsageError Volume __version__ leave_host_mounts run
"""

SIGNATURES = {
    "run": "image, *command, input=b'', check=False, name='', **options",
    "leave_host_mounts": "",
    "Container": {
        "attach": "name",
        "create": "image, *command, name='', **options",
        "exec": "self, *command, env=None, cwd='', user='', terminal=False, privileged=False, stdin=None, stdout=None, "
        "stderr=None",
        "id": "",
        "info": "self",
        "kill": "self, signal='KILL'",
        "pause": "self",
        "resume": "self",
        "run": "self, *command, input=b'', check=False, env=None, cwd='', user='', privileged=False",
        "sandbox_id": "",
        "start": "self, *, stdin=None, stdout=None, stderr=None",
        "wait": "self",
    },
    "Image": {
        "find": "name",
        "list": "",
        "pull": "reference, name=None, *, progress=None",
        "remove": "name",
        **dict.fromkeys(("command", "created", "digest", "env", "labels", "names", "size_bytes", "source"), ""),
    },
    "Process": {
        "communicate": "self, input=b''",
        "exit_code": "",
        "kill": "self, signal='KILL'",
        "resize": "self, rows, columns",
        "wait": "self",
    },
    "Sandbox": {
        "create": "self, image, *command, name='', **options",
        "delete": "name, *, force=False",
        "find": "name",
        "id": "",
        "info": "self",
        "list": "",
        "open": "*, name='', **options",
    },
}

FIELDS = {
    "Completed": "exit_code oom_killed stderr stdout text",
    "ContainerInfo": "command error exit_code finished_at id image oom_killed started_at state",
    "SandboxInfo": "accelerator addresses containers created_at error id labels lost memory_mib network pod ports "
    "state supervisor_pid vcpus vmm_pid",
    "State": "CREATED CREATING PAUSED RUNNING STOPPED",
    "Volume": "destination read_only source",
}

KEYS = {
    "ContainerOptions": "cap_add cap_drop cpus cwd entrypoint env memory pids_limit privileged read_only "
    "stop_signal terminal tmpfs user volumes",
    "SandboxOptions": "accelerator config_file dns hostname hosts labels network ports",
}


def shown(function: Callable[..., object]) -> str:
    """Its parameters, without types: those are the type checker's."""
    parameters = inspect.signature(function).parameters.values()
    return (
        str(inspect.Signature([each.replace(annotation=inspect.Parameter.empty) for each in parameters]))
        .removeprefix("(")
        .removesuffix(")")
    )


def public(kind: type) -> dict[str, str]:
    members = {name: getattr(kind, name) for name in vars(kind) if not name.startswith("_")}
    return {name: shown(member) if inspect.isroutine(member) else "" for name, member in members.items()}


def test_signatures() -> None:
    for name, wanted in SIGNATURES.items():
        found = getattr(katapod, name)
        assert (public(found) if inspect.isclass(found) else shown(found)) == wanted, name


def test_fields() -> None:
    for name, wanted in FIELDS.items():
        assert sorted(public(getattr(katapod, name))) == wanted.split(), name
    for name, wanted in KEYS.items():
        assert sorted(getattr(katapod, name).__annotations__) == wanted.split(), name
    assert set(katapod.Options.__annotations__) == {key for keys in KEYS.values() for key in keys.split()}


def test_names() -> None:
    assert sorted(katapod.__all__) == sorted(NAMES.split())
    for name in katapod.__all__:
        assert getattr(katapod, name) is not None
    assert set(katapod.__all__) <= set(dir(katapod))


def test_a_name_that_is_none() -> None:
    assert not hasattr(katapod, "Pod")


def test_what_type_checkers_read_is_what_there_is() -> None:
    stub = ast.parse(Path(katapod.__file__).with_suffix(".pyi").read_text())
    told = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == {name: f"katapod.{place}.{name}" for name, place in katapod._PLACES.items()}


def test_nothing_is_loaded_before_it_is_used() -> None:
    code = "import sys, katapod; print([name for name in sys.modules if name.startswith('katapod.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_entry_point_of_the_tests_has_public_names_only() -> None:
    tree = ast.parse(Path(entry_point.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"contextlib", "katapod", "typing"}
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "katapod"
    }
    assert used <= set(katapod.__all__)
    assert not [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_private(node)]


def _is_private(node: ast.Attribute) -> bool:
    return node.attr.startswith("_") and not (isinstance(node.value, ast.Name) and node.value.id == "self")
