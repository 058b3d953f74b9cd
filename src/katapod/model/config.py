"""configuration.toml: upstream's format, read once into frozen values.

Nothing is dropped in silence: a wrong type, an unknown key or a value that cannot be honoured is an error. What
goes on with less is a Problem for the caller to print: an obsolete key, a value that is replaced. Parsing is pure;
`load_config` at the end is the one function that reads files.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec import Struct

from katapod.model.config_declaration import Key
from katapod.model.config_keys import (
    SECTIONS,
    TABLES,
    Accelerator,
    AgentConfig,
    Config,
    FactoryConfig,
    KatapodConfig,
    QemuConfig,
    RuntimeConfig,
    bare,
    declaration,
)
from katapod.model.config_rust_runtime import as_go_setting, nested_factory
from katapod.model.errors import ConfigError, KatapodError, MissingProgram
from katapod.model.flavour import GUEST_IMAGE_ROOT, Flavour, GuestVmm, initrd_link, kernel_link

__all__ = [
    "BUILT_IN",
    "CONFIG_PATHS",
    "VIRTIOFSD_PATHS",
    "find_virtiofsd",
    "Accelerator",
    "AgentConfig",
    "Config",
    "FactoryConfig",
    "KatapodConfig",
    "ParsedConfig",
    "Problem",
    "QemuConfig",
    "RuntimeConfig",
    "SECTIONS",
    "Severity",
    "Setting",
    "below_minimum",
    "check_paths",
    "config_kernel_params",
    "config_of",
    "judge_config",
    "load_config",
    "parse_config",
    "read_config",
    "take_setting",
]

CONFIG_PATHS = (
    "/etc/kata-containers/configuration.toml",
    "/usr/share/kata-containers/defaults/configuration.toml",
)
"""Where the file is looked for. The first that exists is used; they are not merged."""

VIRTIOFSD_PATHS = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/bin/virtiofsd")
"""Rust virtiofsd (RHEL, Fedora, Debian 13), QEMU's C one (Debian 12), other distributions."""


def find_virtiofsd(configured: str, exists: Callable[[str], bool] = os.path.exists) -> str:
    """The configured program, else the first of VIRTIOFSD_PATHS that is there; empty if none is."""
    return configured or next((path for path in VIRTIOFSD_PATHS if exists(path)), "")


BUILT_IN = "built-in defaults"
"""Stands for the file's name where no file exists."""

Severity = Literal["warning", "obsolete", "refused", "error"]
"""obsolete: no release of today acts upon it. refused: right, but Katapod does not do it. The last two stop a start."""


class Problem(Struct, frozen=True):
    """Something in a file that its author should know. `where`: the file, with the line if it is known.
    `key` reads "[table] name"."""

    severity: Severity
    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.message}" if self.key else f"{self.where}: {self.message}"

    @property
    def stops(self) -> bool:
        return self.severity in ("refused", "error")


class ParsedConfig(Struct, frozen=True):
    """`source` is the file's name or BUILT_IN. `origins`: table and key to the file that has set it. No problem in
    here stops a start, except in judge_config's answer."""

    config: Config
    problems: tuple[Problem, ...] = ()
    source: str = BUILT_IN
    origins: dict[tuple[str, str], str] = {}


class Setting(Struct, frozen=True):
    """One key of one file, or what stands for it. `written`: table and key as the file has them, where they differ."""

    where: str
    table: str
    key: str
    value: Any
    written: tuple[str, str] | None = None

    def problem(self, severity: Severity, message: str) -> Problem:
        table, key = self.written or (self.table, self.key)
        shown = f"[{table}] {key}".rstrip() if table or key else ""
        return Problem(severity, self.where, shown, message)


_NESTED = ("hypervisor", "agent", "proxy", "shim")
"""Tables whose keys are tables again: [hypervisor.qemu]."""


def parse_config(
    data: bytes, where: str = "configuration.toml", drop_ins: Iterable[tuple[str, bytes]] = ()
) -> ParsedConfig:
    """Parse a file and its drop-in files, each (name, content), which replace single keys.

    Raises ConfigError that lists all errors of all files; what goes on with less comes back as problems.
    """
    parsed = judge_config(data, where, drop_ins)
    stopping = [str(problem) for problem in parsed.problems if problem.stops]
    if stopping:
        raise ConfigError("\n".join(stopping), hint="correct the file and try again", path=where)
    return parsed


def judge_config(
    data: bytes, where: str = "configuration.toml", drop_ins: Iterable[tuple[str, bytes]] = ()
) -> ParsedConfig:
    """parse_config, with what stops a start among the problems; the values there are the defaults.

    Raises ConfigError for what is not TOML.
    """
    files = [(where, data), *drop_ins]
    settings: dict[tuple[str, str], Setting] = {}
    for name, content in files:
        for setting in _flatten(_read_toml(content, name), name):
            settings[setting.table, setting.key] = setting
    values: dict[str, dict[str, Any]] = {table: {} for table in SECTIONS}
    problems: list[Problem] = []
    for setting in settings.values():
        if (found := take_setting(setting, values)) is not None:
            problems.append(found)
    config = config_of(values)
    problems += _contradictions(config, settings)
    if problems:
        problems = [_with_line(problem, dict(files)) for problem in problems]
    origins = {(s.table, s.key): s.where for s in settings.values() if s.key in values.get(s.table, ())}
    return ParsedConfig(config, tuple(problems), where, origins)


def config_of(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """Values by table and key, checked already; what is absent has its default."""
    flavour: Flavour = values["katapod"].get("guest_flavour", "agent")
    tables: dict[str, GuestVmm] = {"hypervisor.qemu": "qemu", "hypervisor.uml": "uml"}
    values = {**values, **{table: _flavoured(values[table], table, vmm, flavour) for table, vmm in tables.items()}}
    sections: dict[str, Any] = {field: SECTIONS[table](**values[table]) for table, field in TABLES.items()}
    return Config(**sections)


def config_kernel_params(config: Config, own: str) -> tuple[str, ...]:
    """The guest kernel's parameters that the file asks for by name, and `own`, those of the hypervisor's table; in the
    order in which Kata appends them."""
    agent = ["agent.log=debug"] if config.agent.enable_debug else []
    return (*agent, *own.split())


def _contradictions(config: Config, settings: Mapping[tuple[str, str], Setting]) -> list[Problem]:
    """What only several keys together say."""
    qemu, table = config.qemu, "hypervisor.qemu"
    found = []
    logical, physical = qemu.block_device_logical_sector_size, qemu.block_device_physical_sector_size
    if logical > physical > 0 and (setting := settings.get((table, "block_device_logical_sector_size"))):
        found.append(setting.problem("error", f"{logical} is more than block_device_physical_sector_size, {physical}"))
    monitor = settings.get((table, "extra_monitor_socket"))
    if monitor is not None and qemu.extra_monitor_socket and not qemu.enable_debug:
        found.append(monitor.problem("warning", "there is no such socket without enable_debug = true"))
    return found


def _with_line(problem: Problem, files: Mapping[str, bytes]) -> Problem:
    """tomllib keeps no line numbers: search for the key again, as people do. One in an inline table is not found."""
    import re

    match = re.match(r"\[(.*?)\] ?(.*)", problem.key)
    if match is None or problem.where not in files:
        return problem
    table, key = match.groups()
    now = ""
    for number, line in enumerate(files[problem.where].decode().splitlines(), 1):
        if heading := re.match(r"\s*\[\[?\s*([^\]]+?)\s*\]", line):
            now = heading[1].replace('"', "")
        of_table = heading is not None and now == f"{table}.{key}".rstrip(".")
        of_key = key and now == table and re.match(rf"""\s*["']?{re.escape(key)}["']?\s*[=.]""", line)
        if of_table or of_key:
            return msgspec.structs.replace(problem, where=f"{problem.where}:{number}")
    return problem


def _flavoured(values: Mapping[str, Any], table: str, vmm: GuestVmm, flavour: Flavour) -> dict[str, Any]:
    """The default files of the guest are those of the flavour, also where the file spells the default out."""
    moved, defaults = dict(values), SECTIONS[table]()
    for key, link in (("kernel", kernel_link), ("image" if vmm == "uml" else "initrd", initrd_link)):
        default = getattr(defaults, key)
        if moved.get(key, default) == default:
            moved[key] = f"{GUEST_IMAGE_ROOT}/{link(flavour, vmm)}"
    return moved


def _read_toml(data: bytes, where: str) -> dict[str, Any]:
    import tomllib  # 5 ms that a start without a file need not pay

    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot parse {where}: it is not UTF-8 text: {error}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"cannot parse {where}: it is not TOML: {error}") from error


def _flatten(document: Mapping[str, Any], where: str) -> Iterator[Setting]:
    """The keys of the known tables; an unknown table, or a key outside of tables, comes as one setting."""
    for name, content in document.items():
        if not isinstance(content, dict):
            yield Setting(where, "", name, content)
        elif name not in _NESTED:
            yield from _table(where, name, content)
        else:
            for inner, keys in content.items():
                if isinstance(keys, dict):
                    yield from _table(where, f"{name}.{inner}", keys)
                else:
                    yield Setting(where, name, inner, keys)


def _table(where: str, table: str, content: Mapping[str, Any]) -> Iterator[Setting]:
    if table not in SECTIONS:
        yield Setting(where, table, "", content)
        return
    for key, value in content.items():
        if table == "hypervisor.qemu" and key == "factory":
            for inner, inner_value in nested_factory(content).items():
                yield Setting(where, "factory", inner, inner_value, (f"{table}.factory", inner))
            continue
        name, key_here, value_here = as_go_setting(table, key, value)
        moved = (table, key) if (name, key_here) != (table, key) else None
        yield Setting(where, name, key_here, value_here, moved)


def take_setting(setting: Setting, tables: Mapping[str, dict[str, Any]]) -> Problem | None:
    """Check a setting and, if it is acted upon and does not stand for the default, add it to its table's values."""
    found = declaration(setting.table, setting.key)
    if found is None:
        return _judge_refused(setting)
    kind, key = found
    value = setting.value
    if key.unset is not None and value == key.unset and not isinstance(value, bool):
        return None
    try:
        checked = msgspec.convert(value, type=kind)
    except msgspec.ValidationError as error:
        if key.refusal and isinstance(value, type(get_args(bare(kind))[0])):
            return setting.problem("refused", key.refusal)
        return setting.problem("error", _explain(error, kind, value))
    if cause := _check_text(key, checked) or (key.check(checked) if key.check else ""):
        return setting.problem("error", cause)
    if key.minimum and checked < key.minimum:
        default = getattr(SECTIONS[setting.table](), setting.key)
        return setting.problem("warning", f"{below_minimum(key, checked)}, {default} is used")
    tables[setting.table][setting.key] = checked
    return None


def below_minimum(key: Key, value: int) -> str:
    return f"{value} {key.unit} is less than a guest needs ({key.minimum} {key.unit})"


def _check_text(key: Key, value: object) -> str:
    texts = value if isinstance(value, tuple) else (value,)
    for text in texts:
        if isinstance(text, str) and any(ord(character) < 32 for character in text):
            return f"{text!r} has a control character"
    if key.path and isinstance(value, str) and not value.startswith("/"):
        return f"{value!r} is not an absolute path"
    return ""


def _explain(error: msgspec.ValidationError, wanted: Any, value: object) -> str:
    """ "expected int, got str 'two'"."""
    choices = get_args(bare(wanted))
    if get_origin(bare(wanted)) is Literal and isinstance(value, type(choices[0])):
        return f"{value!r} is not one of {', '.join(str(choice) for choice in choices)}"
    cause = str(error).replace("`", "").replace(" - at $", ", at ")
    cause = cause.removesuffix(f", got {type(value).__name__}")
    return f"{cause[:1].lower()}{cause[1:]}, got {type(value).__name__} {value!r}"


def _judge_refused(setting: Setting) -> Problem | None:
    """A key that is not acted upon: neutral, refused, obsolete or unknown."""
    # 0.3 ms that only a key of no struct pays
    from katapod.model.config_refused import OBSOLETE_KEYS, REFUSED_KEYS

    table, key, value = setting.table, setting.key, setting.value
    if not key:
        return _judge_table(setting)
    if key in OBSOLETE_KEYS.get(table, ()):
        return setting.problem("obsolete", "obsolete, has had no effect for years; remove it")
    known = REFUSED_KEYS.get(table, {}).get(key)
    if known is None:
        return setting.problem("error", _unknown_key(table, key))
    try:
        msgspec.convert(value, type=known.kind)
    except msgspec.ValidationError as error:
        return setting.problem("error", _explain(error, known.kind, value))
    if not known.neutral or any(value == neutral for neutral in known.neutral):
        return None
    from katapod.model.toml_text import toml_value

    advice = " or ".join(toml_value(neutral) for neutral in known.neutral)
    return setting.problem("refused", f"not supported: {known.why}; remove it or set it to {advice}")


def _judge_table(setting: Setting) -> Problem:
    from katapod.model.config_refused import OBSOLETE_TABLES, REFUSED_HYPERVISORS

    table = setting.table
    if table in OBSOLETE_TABLES:
        return setting.problem("obsolete", "obsolete table of Kata 1.x; remove it")
    if table.removeprefix("hypervisor.") in REFUSED_HYPERVISORS and table.startswith("hypervisor."):
        return setting.problem("refused", "not supported: the hypervisor is QEMU; use [hypervisor.qemu]")
    if table.startswith("hypervisor."):
        return setting.problem("error", "no such hypervisor; use [hypervisor.qemu]")
    known = ", ".join(f"[{name}]" for name in sorted(SECTIONS))
    return setting.problem("error", f"unknown table; the tables are {known}")


def _unknown_key(table: str, key: str) -> str:
    if not table:
        return "unknown key outside of a table"
    import difflib  # 3 ms that only a file with a mistake pays

    from katapod.model.config_refused import REFUSED_KEYS

    names = [*REFUSED_KEYS.get(table, ()), *(SECTIONS[table].__struct_fields__ if table in SECTIONS else ())]
    close = difflib.get_close_matches(key, names, n=1)
    return f"unknown key; did you mean {close[0]}?" if close else "unknown key"


def check_paths(parsed: ParsedConfig, exists: Callable[[str], bool]) -> Config:
    """Return the configuration with virtiofsd chosen, once all its files exist.

    Raises MissingProgram for QEMU and virtiofsd, ConfigError for kernel and initrd.
    """
    config, source = parsed.config, parsed.source
    qemu = config.qemu
    missing: list[KatapodError] = []
    if not exists(qemu.path):
        missing.append(_no_program("QEMU", "path", qemu.path, "install qemu-system-x86", source))
    daemon = find_virtiofsd(qemu.virtio_fs_daemon, exists)
    if not daemon or not exists(daemon):
        tried = daemon or " or ".join(VIRTIOFSD_PATHS)
        install = "install virtiofsd (in Debian 12 it is a part of qemu-system-common)"
        missing.append(_no_program("virtiofsd", "virtio_fs_daemon", tried, install, source))
    if qemu.firmware and not exists(qemu.firmware):
        missing.append(_no_file("firmware", qemu.firmware, "hypervisor.qemu", "firmware", source))
    missing += [
        _no_file("sandbox mount", path, "runtime", "sandbox_bind_mounts", source)
        for path in config.runtime.sandbox_bind_mounts
        if not exists(path)
    ]
    for key, path in (("kernel", qemu.kernel), ("initrd", qemu.initrd)):
        if not exists(path):
            missing.append(
                ConfigError(
                    f"cannot use the guest {key} {path}: no such file ([hypervisor.qemu] {key}, {source})",
                    hint="build kernel and initrd with: kata-runtime image build"
                    if os.path.dirname(path) == os.path.dirname(getattr(QemuConfig(), key))
                    else f"correct the path, or leave {key} out: kata-runtime image build makes the default one",
                )
            )
    if missing:
        raise missing[0]
    return msgspec.structs.replace(config, qemu=msgspec.structs.replace(qemu, virtio_fs_daemon=daemon))


def _no_file(what: str, path: str, table: str, key: str, source: str) -> ConfigError:
    return ConfigError(
        f"cannot use the {what} {path}: no such file ([{table}] {key}, {source})", hint="correct the path, or remove it"
    )


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
    return parse_config(*read_config(path))


def read_config(path: Path) -> tuple[bytes, str, list[tuple[str, bytes]]]:
    """(content of the file, its name, drop-in files): the arguments of parse_config. Raises ConfigError."""
    try:
        path.stat()  # before resolve, whose error names the first missing directory
        drop_in_dir = path.resolve(strict=True).parent / "config.d"
        drop_ins = sorted(drop_in_dir.iterdir()) if drop_in_dir.is_dir() else []
        return path.read_bytes(), str(path), [(str(drop_in), drop_in.read_bytes()) for drop_in in drop_ins]
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
            f"cannot use KATA_CONF_FILE={value}: it is neither {' nor '.join(CONFIG_PATHS)}",
            hint="use kata-runtime --config FILE",
        )
    return Path(value)
