"""configuration.toml: upstream's format, read once into frozen values.

Nothing is dropped in silence. A wrong type, an unknown key or a value that cannot be honoured is an
error; a known key that this version does not act upon is a Problem for the caller to print. Parsing is
pure; `load_config` at the end is the one function that reads files.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec import Struct

from katapod.model.config_keys import (
    Accelerator,
    AgentConfig,
    Config,
    FactoryConfig,
    KatapodConfig,
    QemuConfig,
    RuntimeConfig,
)
from katapod.model.config_unused import OBSOLETE_KEYS, OBSOLETE_TABLES, RUST_NAMES, UNUSED_KEYS
from katapod.model.errors import ConfigError, KatapodError, MissingProgram

__all__ = [
    "BUILT_IN",
    "CONFIG_PATHS",
    "VIRTIOFSD_PATHS",
    "Accelerator",
    "AgentConfig",
    "Config",
    "FactoryConfig",
    "KatapodConfig",
    "ParsedConfig",
    "Problem",
    "QemuConfig",
    "RuntimeConfig",
    "check_paths",
    "load_config",
    "parse_config",
]

CONFIG_PATHS = (
    "/etc/kata-containers/configuration.toml",
    "/usr/share/kata-containers/defaults/configuration.toml",
)
"""Where the file is looked for. The first that exists is used; they are not merged."""

VIRTIOFSD_PATHS = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/bin/virtiofsd")
"""Rust virtiofsd (RHEL, Fedora, Debian 13), QEMU's C one (Debian 12), other distributions."""

BUILT_IN = "built-in defaults"
"""Stands for the file's name where no file exists."""

MIN_MEMORY_MIB = 256
"""Smaller values of default_memory are replaced by its default, as upstream does; here with a warning."""


class Problem(Struct, frozen=True):
    """Something in a file that its owner should know of. `key` reads "[table] name"."""

    severity: Literal["warning", "unsupported", "error"]
    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.message}"


class ParsedConfig(Struct, frozen=True):
    """`source` is the file's name or BUILT_IN. No problem in here is of severity "error"."""

    config: Config
    problems: tuple[Problem, ...] = ()
    source: str = BUILT_IN


class _Setting(Struct, frozen=True):
    """One key of one file."""

    where: str
    table: str
    key: str
    value: Any

    def problem(self, severity: Literal["warning", "unsupported", "error"], message: str) -> Problem:
        return Problem(severity, self.where, f"[{self.table}] {self.key}".rstrip(), message)


_SECTIONS: dict[str, type[Struct]] = {
    "hypervisor.qemu": QemuConfig,
    "agent.kata": AgentConfig,
    "runtime": RuntimeConfig,
    "factory": FactoryConfig,
    "katapod": KatapodConfig,
}
_KNOWN_TABLES = frozenset({*_SECTIONS, *UNUSED_KEYS})
_NESTED = ("hypervisor", "agent", "proxy", "shim")
"""Tables whose keys are tables again: [hypervisor.qemu]."""

_REASONS = {
    "image": "images are not supported yet, use initrd",
    "machine_type": "only q35 is supported",
    "shared_fs": "only virtio-fs is supported",
    "virtio_fs_cache_size": "DAX is not supported, only 0 is",
}
_ABSOLUTE = frozenset(
    {"path", "kernel", "initrd", "virtio_fs_daemon", "entropy_source", "template_path", "vm_cache_endpoint"}
    | {"cni_conf_dir", "cni_plugin_dirs"}
)
_EMPTY_IS_DEFAULT = frozenset(
    {*_ABSOLUTE, "network", "virtio_fs_cache", "machine_type", "shared_fs", "internetworking_model"}
)
_ZERO_IS_DEFAULT = frozenset(
    {"default_vcpus", "default_memory", "memory_slots", "virtio_fs_queue_size", "dial_timeout"}
    | {"create_container_timeout"}
)


def parse_config(
    data: bytes, where: str = "configuration.toml", drop_ins: Iterable[tuple[str, bytes]] = ()
) -> ParsedConfig:
    """Parse a file and its drop-in files, each (name, content), which replace single keys.

    Raises ConfigError that lists all errors of all files; what is known but not supported comes back
    as problems.
    """
    problems: list[Problem] = []
    settings: dict[tuple[str, str], _Setting] = {}
    for name, content in [(where, data), *drop_ins]:
        for setting in _flatten(_read_toml(content, name), name):
            settings[setting.table, setting.key] = setting
    values: dict[str, dict[str, Any]] = {table: {} for table in _SECTIONS}
    for setting in settings.values():
        section = _SECTIONS.get(setting.table)
        if section is not None and setting.key in section.__struct_fields__:
            found = _take(setting, section, values[setting.table])
        else:
            found = _judge_unused(setting)
        if found is not None:
            problems.append(found)
    errors = [str(problem) for problem in problems if problem.severity == "error"]
    if errors:
        raise ConfigError("\n".join(errors), hint="correct the file and try again", path=where)
    config = Config(
        qemu=QemuConfig(**values["hypervisor.qemu"]),
        agent=AgentConfig(**values["agent.kata"]),
        runtime=RuntimeConfig(**values["runtime"]),
        factory=FactoryConfig(**values["factory"]),
        katapod=KatapodConfig(**values["katapod"]),
    )
    return ParsedConfig(config, tuple(problems), where)


def _read_toml(data: bytes, where: str) -> dict[str, Any]:
    import tomllib  # 5 ms that a start without a file need not pay

    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot parse {where}: it is not UTF-8 text: {error}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"cannot parse {where}: it is not TOML: {error}") from error


def _flatten(document: Mapping[str, Any], where: str) -> Iterator[_Setting]:
    """The keys of the known tables; an unknown table, or a key outside of tables, comes as one setting."""
    for name, content in document.items():
        if not isinstance(content, dict):
            yield _Setting(where, "", name, content)
        elif name not in _NESTED:
            yield from _table(where, name, content)
        else:
            for inner, keys in content.items():
                if isinstance(keys, dict):
                    yield from _table(where, f"{name}.{inner}", keys)
                else:
                    yield _Setting(where, name, inner, keys)


def _table(where: str, table: str, content: Mapping[str, Any]) -> Iterator[_Setting]:
    if table not in _KNOWN_TABLES:
        yield _Setting(where, table, "", content)
        return
    for key, value in content.items():
        yield _Setting(where, table, key, value)


def _take(setting: _Setting, section: type[Struct], values: dict[str, Any]) -> Problem | None:
    """Check a setting that is acted upon and add it to `values`, unless it stands for the default."""
    key, value = setting.key, setting.value
    if (value == "" and key in _EMPTY_IS_DEFAULT) or (
        key in _ZERO_IS_DEFAULT and value == 0 and not isinstance(value, bool)
    ):
        return None
    wanted = section.__annotations__[key]
    try:
        checked = msgspec.convert(value, type=wanted)
    except msgspec.ValidationError as error:
        return setting.problem("error", _REASONS.get(key) or _explain(error, wanted, value))
    if cause := _check_text(key, checked):
        return setting.problem("error", cause)
    if key == "virtio_fs_queue_size" and checked & (checked - 1):
        return setting.problem("error", f"{checked} is not a power of two")
    if key == "default_memory" and checked < MIN_MEMORY_MIB:
        default = QemuConfig().default_memory
        return setting.problem(
            "warning", f"{checked} MiB is less than a guest needs ({MIN_MEMORY_MIB} MiB), {default} is used"
        )
    values[key] = checked
    return None


def _check_text(key: str, value: object) -> str:
    texts = (
        [value]
        if isinstance(value, str)
        else [v for v in value if isinstance(v, str)]
        if isinstance(value, tuple)
        else []
    )
    for text in texts:
        if any(ord(character) < 32 for character in text):
            return f"{text!r} has a control character"
    if key in _ABSOLUTE and isinstance(value, str) and not value.startswith("/"):
        return f"{value!r} is not an absolute path"
    return ""


def _explain(error: msgspec.ValidationError, wanted: Any, value: object) -> str:
    """ "expected int, got str 'two'"."""
    if get_origin(wanted) is Literal and isinstance(value, type(get_args(wanted)[0])):
        return f"{value!r} is not one of {', '.join(str(choice) for choice in get_args(wanted))}"
    cause = str(error).replace("`", "").replace(" - at $", ", at ")
    cause = cause.removesuffix(f", got {type(value).__name__}")
    return f"{cause[:1].lower()}{cause[1:]}, got {type(value).__name__} {value!r}"


def _judge_unused(setting: _Setting) -> Problem | None:
    """A key that is not acted upon: neutral, not supported, obsolete or unknown."""
    table, key, value = setting.table, setting.key, setting.value
    if not key:
        return _judge_table(setting)
    if key in OBSOLETE_KEYS.get(table, ()):
        return setting.problem("unsupported", "obsolete, has had no effect for years; remove it")
    known = UNUSED_KEYS.get(table, {}).get(key)
    if known is None:
        return setting.problem("error", _unknown_key(table, key))
    try:
        msgspec.convert(value, type=known.kind)
    except msgspec.ValidationError as error:
        return setting.problem("error", _explain(error, known.kind, value))
    if not known.neutral or any(value == neutral for neutral in known.neutral):
        return None
    advice = " or ".join(_toml(neutral) for neutral in known.neutral)
    return setting.problem("unsupported", f"not supported by this version; remove it or set it to {advice}")


def _judge_table(setting: _Setting) -> Problem:
    table = setting.table
    if table in OBSOLETE_TABLES:
        return setting.problem("unsupported", "obsolete table of Kata 1.x; remove it")
    if table.startswith("hypervisor."):
        return setting.problem("error", "this hypervisor is not supported, only [hypervisor.qemu] is")
    known = ", ".join(f"[{name}]" for name in sorted(_KNOWN_TABLES))
    return setting.problem("error", f"unknown table; the tables are {known}")


def _unknown_key(table: str, key: str) -> str:
    if not table:
        return "unknown key outside of a table"
    if key in RUST_NAMES:
        return f"this is the Rust runtime's name of {RUST_NAMES[key]}"
    import difflib  # 3 ms that only a file with a mistake pays

    names = [*UNUSED_KEYS.get(table, ()), *(_SECTIONS[table].__struct_fields__ if table in _SECTIONS else ())]
    close = difflib.get_close_matches(key, names, n=1)
    return f"unknown key; did you mean {close[0]}?" if close else "unknown key"


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')


def check_paths(parsed: ParsedConfig, exists: Callable[[str], bool]) -> Config:
    """Return the configuration with virtiofsd chosen, once all its files exist.

    Raises MissingProgram for QEMU and virtiofsd, ConfigError for kernel and initrd.
    """
    config, source = parsed.config, parsed.source
    qemu = config.qemu
    missing: list[KatapodError] = []
    if not exists(qemu.path):
        missing.append(_no_program("QEMU", "path", qemu.path, "install qemu-system-x86", source))
    daemon = qemu.virtio_fs_daemon or next((path for path in VIRTIOFSD_PATHS if exists(path)), "")
    if not daemon or not exists(daemon):
        tried = daemon or " or ".join(VIRTIOFSD_PATHS)
        install = "install virtiofsd (Debian 12: qemu-system-common has it)"
        missing.append(_no_program("virtiofsd", "virtio_fs_daemon", tried, install, source))
    for key, path in (("kernel", qemu.kernel), ("initrd", qemu.initrd)):
        if not exists(path):
            missing.append(
                ConfigError(
                    f"cannot use the guest {key} {path}: no such file ([hypervisor.qemu] {key}, {source})",
                    hint="build kernel and initrd with: kata-runtime image build",
                )
            )
    if missing:
        raise missing[0]
    return msgspec.structs.replace(config, qemu=msgspec.structs.replace(qemu, virtio_fs_daemon=daemon))


def _no_program(name: str, key: str, path: str, install: str, source: str) -> MissingProgram:
    return MissingProgram(
        f"cannot find {name}: no file {path} ([hypervisor.qemu] {key}, {source})",
        hint=f"{install}, or correct the path",
    )


def load_config(explicit: Path | None = None, environ: Mapping[str, str] = os.environ) -> ParsedConfig:
    """Read the configuration: `explicit`, else KATA_CONF_FILE, else the first of CONFIG_PATHS, else the
    built-in defaults. Drop-in files come from config.d beside the file, symbolic links resolved first.

    Raises ConfigError.
    """
    path = explicit or _from_environment(environ) or next((Path(p) for p in CONFIG_PATHS if Path(p).exists()), None)
    if path is None:
        return ParsedConfig(Config())
    try:
        path.stat()  # before resolve, whose error names the first missing directory
        drop_in_dir = path.resolve(strict=True).parent / "config.d"
        drop_ins = sorted(drop_in_dir.iterdir()) if drop_in_dir.is_dir() else []
        return parse_config(
            path.read_bytes(), str(path), [(str(drop_in), drop_in.read_bytes()) for drop_in in drop_ins]
        )
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename or path}: {error.strerror}") from error


def _from_environment(environ: Mapping[str, str]) -> Path | None:
    """KATA_CONF_FILE, which since Kata 4 may only name one of the default files: whoever can set a
    variable of a shim shall not choose which programs run as root."""
    value = environ.get("KATA_CONF_FILE", "")
    if not value:
        return None
    if os.path.realpath(value) not in {os.path.realpath(path) for path in CONFIG_PATHS}:
        raise ConfigError(
            f"cannot use KATA_CONF_FILE={value}: it is none of {' and '.join(CONFIG_PATHS)}",
            hint="use kata-runtime --config FILE",
        )
    return Path(value)
