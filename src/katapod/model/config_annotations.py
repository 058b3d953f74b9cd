"""Annotations of a pod, or of a single container, that change its configuration: io.katacontainers.config.*.

Those of the hypervisor must be allowed by enable_annotations, paths to programs also by the valid_* globs; those of
runtime and agent are always honoured, as upstream does. What Katapod does not act upon is refused, as in a file.
Source: Kata Containers, docs/how-to/how-to-set-sandbox-config-kata.md.
"""

import glob
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, get_args, get_origin

import msgspec
from msgspec import Struct

from katapod.model.config import MIN_MEMORY_MIB, SECTIONS, ParsedConfig, Problem, Setting, take_setting
from katapod.model.config_keys import Config
from katapod.model.config_refused import REFUSED_KEYS
from katapod.model.errors import ConfigError

__all__ = ["ANNOTATIONS", "AnnotatedConfig", "Annotation", "annotated", "apply_annotations", "check_hashes"]

PREFIX: Final = "io.katacontainers.config."
_TABLES: Final = {"hypervisor": "hypervisor.qemu", "runtime": "runtime", "agent": "agent.kata"}
_FIELDS: Final = {"hypervisor.qemu": "qemu", "runtime": "runtime", "agent.kata": "agent"}
_TRUE, _FALSE = ("1", "t", "T", "TRUE", "true", "True"), ("0", "f", "F", "FALSE", "false", "False")


class Annotation(Struct, frozen=True):
    """`key` of `table` in the file; empty: the annotation has none, and `why` refuses it."""

    table: str
    key: str
    why: str = ""
    globs: str = ""  # the key whose globs must match
    asset: bool = False  # a file of the guest: it is absolute
    positive: bool = False
    joined: str = ""  # of a list: what separates its items; empty: JSON
    added: bool = False  # to the file's, not instead of them
    quietly_empty: bool = False  # empty or 0 changes nothing


def _hypervisor() -> dict[str, Annotation]:
    table = "hypervisor.qemu"
    same = (
        *("kernel_verity_params", "enable_virtio_mem", "enable_mem_prealloc", "reclaim_guest_freed_memory"),
        *("enable_hugepages", "enable_iommu", "enable_iommu_platform", "enable_guest_swap", "rootless"),
        *("block_device_driver", "block_device_aio", "disable_block_device_use", "enable_iothreads"),
        *("block_device_cache_set", "block_device_cache_direct", "block_device_cache_noflush"),
        *("default_vcpus", "default_memory", "kernel_params", "shared_fs", "virtio_fs_cache"),
        *("virtio_fs_cache_size", "msize_9p", "disable_vhost_net", "rx_rate_limiter_max_rate"),
        *("tx_rate_limiter_max_rate", "enable_vhost_user_store", "vhost_user_store_path"),
        *("vhost_user_reconnect_timeout_sec", "guest_hook_path", "disable_image_nvdimm", "use_legacy_serial"),
        *("hot_plug_vfio", "cold_plug_vfio", "jailer_path", "firmware_volume"),
    )
    found = {name: Annotation(table, name) for name in same}
    for name in ("machine_type", "machine_accelerators", "cpu_features", "memory_slots", "memory_offset"):
        found[name] = Annotation(table, name, quietly_empty=True)
    for name in ("kernel", "initrd", "image", "firmware"):
        found[name] = Annotation(table, name, asset=True)
    for name in ("pcie_root_port", "pcie_switch_port", "indep_iothreads"):
        found[name] = Annotation(table, name, positive=True)
    found["default_max_vcpus"] = Annotation(table, "default_maxvcpus")
    found["blk_logical_sector_size"] = Annotation(table, "block_device_logical_sector_size")
    found["blk_physical_sector_size"] = Annotation(table, "block_device_physical_sector_size")
    found["numa_mapping"] = Annotation(table, "numa_mapping", joined=" ")
    found["virtio_fs_extra_args"] = Annotation(table, "virtio_fs_extra_args", added=True)
    found["path"] = Annotation(table, "path", globs="valid_hypervisor_paths")
    found["virtio_fs_daemon"] = Annotation(table, "virtio_fs_daemon", globs="valid_virtio_fs_daemon_paths")
    found["entropy_source"] = Annotation(table, "entropy_source", globs="valid_entropy_sources")
    for asset in _HASHED:
        found[f"{asset}_hash"] = Annotation(table, "")
    for asset in ("image", "jailer", "firmware_volume"):
        found[f"{asset}_hash"] = Annotation(table, "", why=f"there is no {asset}")
    found["cc_init_data"] = Annotation(table, "", why="confidential guests (SEV, SNP, TDX) are not supported")
    for name in ("default_gpus", "default_gpu_model"):
        found[name] = Annotation(table, "", why="it belongs to another hypervisor (remote)")
    return found


_HASHED: Final = {"hypervisor": "path", "kernel": "kernel", "initrd": "initrd", "firmware": "firmware"}
"""X of X_hash to the key whose file has it."""

_RUNTIME: Final = (
    *("disable_guest_seccomp", "sandbox_cgroup_only", "create_container_timeout", "experimental_force_guest_pull"),
    *("disable_new_netns", "internetworking_model", "vfio_mode", "enable_pprof", "guest_selinux_label"),
)

ANNOTATIONS: Final[dict[str, Annotation]] = {
    **{f"{PREFIX}hypervisor.{name}": found for name, found in _hypervisor().items()},
    **{f"{PREFIX}runtime.{name}": Annotation("runtime", name) for name in _RUNTIME},
    f"{PREFIX}runtime.experimental": Annotation("runtime", "experimental", joined=" "),
    "io.katacontainers.enable_vcpus_pinning": Annotation("runtime", "enable_vcpus_pinning"),
    f"{PREFIX}agent.kernel_modules": Annotation("agent.kata", "kernel_modules", joined=";"),
    f"{PREFIX}agent.enable_tracing": Annotation("agent.kata", "enable_tracing"),
    f"{PREFIX}agent.container_pipe_size": Annotation("agent.kata", "container_pipe_size"),
    f"{PREFIX}agent.policy": Annotation("agent.kata", "", why="policies (Rego) are not supported"),
    "io.katacontainers.container.resource.swappiness": Annotation("", "", why="a guest has no swap of its own"),
    "io.katacontainers.container.resource.swap_in_bytes": Annotation("", "", why="a guest has no swap of its own"),
}


class AnnotatedConfig(Struct, frozen=True):
    """`hashes`: file to the SHA-512, in hex, that the pod says it has."""

    config: Config
    hashes: dict[str, str] = {}


def annotated(parsed: ParsedConfig, annotations: Mapping[str, str], host_cpus: int) -> ParsedConfig:
    """apply_annotations, and the hashes checked. Raises ConfigError."""
    if not any(name.startswith("io.katacontainers.") for name in annotations):
        return parsed
    found = apply_annotations(parsed.config, annotations, host_cpus=host_cpus)
    check_hashes(found.hashes)
    return msgspec.structs.replace(parsed, config=found.config)


def apply_annotations(
    config: Config,
    annotations: Mapping[str, str],
    *,
    host_cpus: int,
    expand: Callable[[str], list[str]] = glob.glob,
) -> AnnotatedConfig:
    """The configuration of one sandbox. `expand`: the files that a glob stands for.

    Raises ConfigError that names every annotation that is not enabled, unknown, wrong or not supported.
    """
    values: dict[str, dict[str, Any]] = {table: {} for table in SECTIONS}
    errors: list[str] = []
    hashes: dict[str, str] = {}
    for name in sorted(annotations):
        if name not in ANNOTATIONS and not name.startswith(PREFIX):
            continue
        try:
            _apply(name, annotations[name], config, values, hashes, host_cpus, expand)
        except ValueError as error:
            errors.append(f"cannot use the annotation {name}: {error}")
    if errors:
        raise ConfigError("\n".join(errors), hint="correct the pod's annotations, or allow them in configuration.toml")
    changed = {
        field: msgspec.structs.replace(getattr(config, field), **values[table])
        for table, field in _FIELDS.items()
        if values[table]
    }
    config = msgspec.structs.replace(config, **changed) if changed else config
    files = {getattr(config.qemu, key): digest for key, digest in hashes.items()}
    return AnnotatedConfig(config, files)


def check_hashes(hashes: Mapping[str, str]) -> None:
    """Compare files with what the pod says of them. Raises ConfigError."""
    for path, wanted in hashes.items():
        try:
            with open(path, "rb") as handle:
                found = hashlib.file_digest(handle, "sha512").hexdigest()
        except OSError as error:
            raise ConfigError(f"cannot read {path}, whose hash an annotation gives: {error.strerror}") from error
        if found != wanted.lower():
            raise ConfigError(
                f"cannot use {path}: its SHA-512 is {found[:16]}..., the annotation says {wanted[:16]}..."
            )


def _apply(
    name: str,
    text: str,
    config: Config,
    values: dict[str, dict[str, Any]],
    hashes: dict[str, str],
    host_cpus: int,
    expand: Callable[[str], list[str]],
) -> None:
    """Raises ValueError with the reason."""
    known = ANNOTATIONS.get(name)
    if known is None:
        raise ValueError("there is no such annotation" + _nearest(name))
    base = name.removeprefix(f"{PREFIX}hypervisor.")
    if base != name and not any(re.search(pattern, base) for pattern in config.qemu.enable_annotations):
        raise ValueError(f"it is not enabled; enable_annotations in [hypervisor.qemu] would have to match {base!r}")
    if known.why:
        raise ValueError(f"not supported: {known.why}")
    if not known.key:
        if not re.fullmatch(r"[0-9a-fA-F]{128}", text):
            raise ValueError("a SHA-512 has 128 hexadecimal digits")
        hashes[_HASHED[base.removesuffix("_hash")]] = text
        return
    section = getattr(config, _FIELDS[known.table])
    value = _value(text, known)
    if known.quietly_empty and value in ("", 0):
        return
    _check(known, value, section, host_cpus, expand)
    if known.key == "kernel_params":
        value = _merged_params(section.kernel_params, value)
    elif known.added:
        value = [*getattr(section, known.key), *value]
    problem: Problem | None = take_setting(Setting(name, known.table, known.key, value), values)
    if problem is not None:
        raise ValueError(problem.message)


def _check(known: Annotation, value: Any, section: Any, host_cpus: int, expand: Callable[[str], list[str]]) -> None:
    """What holds for an annotation and not for the key in a file. Raises ValueError."""
    if known.globs:
        globs = getattr(section, known.globs)
        if not any(value in expand(pattern) or (value == "" and pattern == "") for pattern in globs):
            raise ValueError(f"{value!r} is none of the files that {known.globs} allows")
    if known.asset and not value.startswith("/"):
        raise ValueError(f"{value!r} is not an absolute path")
    if known.positive and value == 0:
        raise ValueError("0 is not more than 0")
    if known.key in ("default_vcpus", "default_maxvcpus") and value > host_cpus:
        raise ValueError(f"{value:g} is more than the {host_cpus} CPUs of this host")
    if known.key == "default_memory" and value < MIN_MEMORY_MIB:
        raise ValueError(f"{value} MiB is less than a guest needs ({MIN_MEMORY_MIB} MiB)")


def _value(text: str, known: Annotation) -> Any:
    """The text as the key's type. Raises ValueError."""
    section = SECTIONS[known.table]
    kind: Any = section.__annotations__.get(known.key)
    if kind is None:
        kind = REFUSED_KEYS[known.table][known.key].kind
    while get_origin(kind) not in (None, tuple, list) and hasattr(kind, "__metadata__"):
        kind = get_args(kind)[0]
    origin = get_origin(kind) or kind
    if kind is bool:
        if text not in _TRUE + _FALSE:
            raise ValueError(f"{text!r} is neither true nor false")
        return text in _TRUE
    if kind is float:
        if not re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
            raise ValueError(f"{text!r} is not a number")
        return float(text)
    if kind is int or (get_args(kind) and isinstance(get_args(kind)[0], int)):
        if not re.fullmatch(r"[0-9]{1,20}", text):
            raise ValueError(f"{text!r} is not a whole number")
        return int(text)
    if origin in (tuple, list):
        if known.joined:
            return [part.strip() for part in text.split(known.joined) if part.strip()]
        try:
            return msgspec.json.decode(text, type=list[str])
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise ValueError(f"{text!r} is not a JSON list of texts: {error}") from error
    return text


def _merged_params(before: str, more: str) -> str:
    """A parameter of the annotation takes the place of one with the same key."""
    keys = {word.partition("=")[0] for word in more.split()}
    kept = [word for word in before.split() if word.partition("=")[0] not in keys]
    return " ".join([*kept, *more.split()])


def _nearest(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, ANNOTATIONS, n=1)
    return f"; did you mean {close[0]}?" if close else ""
