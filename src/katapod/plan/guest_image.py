"""What goes into the guest image, as data.

Pure: the facts (kmod's index files, the Python modules that the agent imports, the programs found on this
node) are collected by the image builder and passed in. Nothing here opens a file.
"""

import re
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import PurePosixPath

from msgspec import Struct
from msgspec.structs import replace

from katapod.model.errors import HostLacks
from katapod.model.flavour import Flavour, GuestVmm
from katapod.plan.guest_modules import GUEST_MODULES, ON_DEMAND_DIRECTORIES, ON_DEMAND_MODULES, GuestModules
from katapod.plan.guest_systemd import INIT, groups_text, systemd_links, systemd_texts

__all__ = [
    "FileKind",
    "GuestExtras",
    "GuestFile",
    "GuestImageFacts",
    "GuestImagePlan",
    "GuestProgram",
    "KernelModule",
    "ModuleIndex",
    "ModuleMissing",
    "ModulePlan",
    "PythonFile",
    "PythonFileKind",
    "TextFile",
    "parse_module_index",
    "plan_guest_image",
    "plan_image_modules",
    "plan_modules",
]

PYTHON_ROOT = "/usr/lib/katapod"  # packages that are not of the standard library, in the guest
AGENT_PATH = "/usr/bin/kata-agent"

_COMPRESSION = re.compile(r"\.ko(\.(gz|xz|zst))?$")


class ModuleMissing(HostLacks):
    """The kernel has a module that Katapod cannot do without neither as a file nor built in."""


class KernelModule(Struct, frozen=True):
    """One module file. `source` is relative to /lib/modules/VERSION, as modules.dep has it."""

    name: str  # as lsmod shows it: underscores only
    source: str
    packed: bool = False  # in the guest: what is loaded at each start is not, which would cost time each time

    @property
    def target(self) -> str:
        """The same path in the guest's module directory."""
        return _COMPRESSION.sub(".ko.xz" if self.packed else ".ko", self.source)


class ModuleIndex(Struct, frozen=True):
    """kmod's index files, parsed. Source: modules.dep(5), depmod(8), modprobe.d(5) for softdep."""

    files: Mapping[str, KernelModule]
    needs: Mapping[str, tuple[str, ...]]
    builtin: frozenset[str]
    soft_before: Mapping[str, tuple[str, ...]]
    soft_after: Mapping[str, tuple[str, ...]]


class ModulePlan(Struct, frozen=True):
    """Module files in the order in which they load. No module is in two of the lists."""

    early: tuple[KernelModule, ...]
    late: tuple[KernelModule, ...]
    on_demand: tuple[KernelModule, ...]
    builtin: tuple[str, ...]  # asked for, and part of the kernel already
    warnings: tuple[str, ...]

    @property
    def all(self) -> tuple[KernelModule, ...]:
        return self.early + self.late + self.on_demand


class PythonFileKind(Enum):
    COMPILE = "compile"  # source that becomes a .pyc
    LIBRARY = "library"  # extension module; its shared libraries come along
    DATA = "data"


class PythonFile(Struct, frozen=True):
    source: str  # absolute, on this node
    target: str  # absolute, in the guest
    kind: PythonFileKind


class GuestProgram(Struct, frozen=True):
    """An ELF program that is put into the guest with its shared libraries, except those of `without`."""

    source: str
    target: str
    without: tuple[str, ...] = ()  # sonames of libraries for functions that the guest does not use


class TextFile(Struct, frozen=True):
    path: str
    content: str
    mode: int = 0o644


class FileKind(Enum):
    PROGRAM = "program"  # an ELF file; its shared libraries come along
    DATA = "data"
    LINK = "link"
    DIRECTORY = "directory"


class GuestFile(Struct, frozen=True):
    """A file of the node that goes into the guest as it is, of a package or by its name."""

    target: str  # absolute, in the guest
    kind: FileKind
    source: str = ""  # absolute, on this node; of a link: what it points to
    mode: int = 0o644


class GuestExtras(Struct, frozen=True):
    """What a flavour or a recipe adds to the image. Of files with one target the last counts."""

    flavour: Flavour = "agent"
    files: tuple[GuestFile, ...] = ()
    load_modules: tuple[str, ...] = ()  # at boot
    more_modules: tuple[str, ...] = ()  # in the image, for modprobe
    hook: str = ""  # a program of this node, run over the finished tree


class GuestImageFacts(Struct, frozen=True):
    """What was found on this node."""

    kernel_version: str
    module_index: ModuleIndex
    python_interpreter: str
    python_path: tuple[str, ...]  # directories of the standard library, in the order of sys.path
    python_files: tuple[PythonFile, ...]
    programs: tuple[GuestProgram, ...]
    busybox_applets: tuple[str, ...]
    huge_pages: str = ""  # "always" or "madvise": what the kernel does by itself, if that is known
    extras: GuestExtras = GuestExtras()
    vmm: GuestVmm = "qemu"


class GuestImagePlan(Struct, frozen=True):
    kernel_version: str
    modules: ModulePlan
    module_root: str
    python_files: tuple[PythonFile, ...]
    programs: tuple[GuestProgram, ...]
    applet_links: tuple[str, ...]  # absolute paths, each another name of /usr/bin/busybox
    texts: tuple[TextFile, ...]
    symlinks: tuple[tuple[str, str], ...]  # (path, what it points to)
    directories: tuple[str, ...]
    files: tuple[GuestFile, ...] = ()
    hook: str = ""

    def describe(self) -> str:
        """One line an item, in the order in which the image is put together."""
        lines = [f"guest image for kernel {self.kernel_version}"]
        lines += [
            f"program {program.target} from {program.source}"
            + (f" without {', '.join(program.without)}" if program.without else "")
            for program in self.programs
        ]
        lines += [f"python {file.kind.value} {file.target} from {file.source}" for file in self.python_files]
        for when, modules in (
            ("early", self.modules.early),
            ("late", self.modules.late),
            ("on demand", self.modules.on_demand),
        ):
            lines += [f"module {when} {module.name} from {module.source}" for module in modules]
        lines += [f"module built in {name}" for name in self.modules.builtin]
        lines += [f"applet {path}" for path in self.applet_links]
        lines += [f"text {text.path} mode {text.mode:04o}, {len(text.content)} characters" for text in self.texts]
        lines += [f"link {path} to {target}" for path, target in self.symlinks]
        lines += [f"directory {path}" for path in self.directories]
        lines += [
            f"file {file.kind.value} {file.target} mode {file.mode:04o} from {file.source}" for file in self.files
        ]
        lines += [f"hook {self.hook}"] if self.hook else []
        lines += [f"warning: {warning}" for warning in self.modules.warnings]
        return "\n".join(lines)


def module_name(path: str) -> str:
    """The name of a module from its file's path: no directory, no suffix, underscores for dashes."""
    return _COMPRESSION.sub("", PurePosixPath(path).name).replace("-", "_")


def parse_module_index(modules_dep: str, modules_builtin: str = "", modules_softdep: str = "") -> ModuleIndex:
    """Parse the content of modules.dep, modules.builtin and modules.softdep."""
    files: dict[str, KernelModule] = {}
    needs: dict[str, tuple[str, ...]] = {}
    for line in modules_dep.splitlines():
        path, colon, rest = line.partition(":")
        if not colon or line.startswith("#"):
            continue
        name = module_name(path)
        files[name] = KernelModule(name, path)
        needs[name] = tuple(module_name(needed) for needed in rest.split())
    builtin = frozenset(module_name(line) for line in modules_builtin.splitlines() if line.strip())
    before: dict[str, tuple[str, ...]] = {}
    after: dict[str, tuple[str, ...]] = {}
    for line in modules_softdep.splitlines():
        words = line.split()
        if len(words) < 3 or words[0] != "softdep":
            continue
        name, where = words[1].replace("-", "_"), before
        for word in words[2:]:
            if word in ("pre:", "post:"):
                where = before if word == "pre:" else after
            else:
                where[name] = (*where.get(name, ()), word.replace("-", "_"))
    return ModuleIndex(files, needs, builtin, before, after)


def plan_modules(
    index: ModuleIndex, wanted: GuestModules = GUEST_MODULES["qemu"], on_demand: Iterable[str] = ON_DEMAND_MODULES
) -> ModulePlan:
    """Put the wanted modules and all that they need in load order.

    Raises ModuleMissing for a required module that the kernel does not have; an optional one is a warning.
    """
    placed: set[str] = set()
    builtin: list[str] = []
    missing: list[str] = []

    def visit(name: str, order: list[KernelModule], path: tuple[str, ...]) -> None:
        if name in placed or name in path:
            return
        module = index.files.get(name)
        if module is None:
            return  # built in; or a soft dependency on an alias, which the kernel asks modprobe for
        inner = (*path, name)
        for needed in (*index.soft_before.get(name, ()), *index.needs[name]):
            visit(needed, order, inner)
        if name not in placed:
            placed.add(name)
            order.append(module)
        for follower in index.soft_after.get(name, ()):
            visit(follower, order, inner)

    def collect(names: Iterable[str]) -> tuple[KernelModule, ...]:
        order: list[KernelModule] = []
        for name in names:
            if name in index.files:
                visit(name, order, ())
            elif name in index.builtin:
                builtin.append(name)
            else:
                missing.append(name)
        return tuple(order)

    first, second = collect(wanted.early), collect(wanted.late)
    packed = tuple(replace(module, packed=True) for module in collect(on_demand))
    plan = ModulePlan(first, second, packed, tuple(builtin), ())
    if lost := [name for name in missing if name in wanted.required]:
        raise ModuleMissing(
            f"cannot use this kernel for guests: it has no {', '.join(lost)}, neither as module nor built in",
            hint=wanted.hint,
        )
    warnings = tuple(f"this kernel has no {name}: the guest goes without it" for name in missing)
    return ModulePlan(plan.early, plan.late, plan.on_demand, plan.builtin, warnings)


def plan_image_modules(index: ModuleIndex, extras: GuestExtras, vmm: GuestVmm = "qemu") -> ModulePlan:
    """The modules of an image: those that every guest has, and those of `extras`, which must be there."""
    asked = (*extras.load_modules, *extras.more_modules)
    builtin = index.builtin - GUEST_MODULES[vmm].left_out
    if lost := [name for name in asked if name not in index.files and name not in builtin]:
        raise ModuleMissing(
            f"cannot put {', '.join(lost)} into the guest image: this kernel has no such module, neither as a file "
            "nor built in",
            hint="correct kernel_modules and load_kernel_modules in the recipe, or choose another --kernel",
        )
    wanted = GUEST_MODULES[vmm]
    return plan_modules(
        index,
        replace(wanted, late=(*wanted.late, *extras.load_modules)),
        (*ON_DEMAND_MODULES, *_in_directories(index), *extras.more_modules),
    )


def _in_directories(index: ModuleIndex) -> Iterable[str]:
    directories = tuple(f"kernel/{directory}" for directory in ON_DEMAND_DIRECTORIES)
    return sorted(name for name, module in index.files.items() if module.source.startswith(directories))


def plan_guest_image(facts: GuestImageFacts, *, entry_point: str) -> GuestImagePlan:
    """Plan the image. `entry_point` ("package.module:function") is what the agent's program runs."""
    extras = facts.extras
    modules = plan_image_modules(facts.module_index, extras, facts.vmm)
    module_root = f"/usr/lib/modules/{facts.kernel_version}"
    files = {file.target: file for file in extras.files}
    symlinks: tuple[tuple[str, str], ...] = (("/init", AGENT_PATH.lstrip("/")),)
    texts = [
        TextFile(AGENT_PATH, _agent_script(facts, entry_point), 0o755),
        TextFile("/etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
        TextFile("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
        TextFile("/etc/katapod/modules-early", _module_list(module_root, modules.early)),
        TextFile("/etc/katapod/modules-late", _module_list(module_root, modules.late)),
        TextFile("/etc/katapod/transparent-hugepages", f"{facts.huge_pages}\n"),
        TextFile("/etc/os-release", f'ID=katapod\nNAME="Katapod guest"\nVERSION_ID="{facts.kernel_version}"\n'),
        TextFile(
            "/etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
        ),
    ]
    if extras.flavour == "systemd":
        loaded = [module.name for module in (*modules.early, *modules.late)]
        texts = [text if text.path != "/etc/group" else _with_groups(text) for text in texts]
        texts += [TextFile(path, content) for path, content in systemd_texts(files, loaded)]
        texts.append(TextFile("/init", INIT, 0o755))
        symlinks = systemd_links(files)
    taken = {PurePosixPath(program.target).name for program in facts.programs}
    taken |= {PurePosixPath(path).name for path in (*files, *(link for link, _ in symlinks)) if _is_command(path)}
    applets = tuple(
        f"/usr/{applet}" if not applet.startswith("usr/") else f"/{applet}"
        for applet in sorted(facts.busybox_applets)
        if PurePosixPath(applet).name not in taken and PurePosixPath(applet).name not in ("init", "linuxrc")
    )
    return GuestImagePlan(
        kernel_version=facts.kernel_version,
        modules=modules,
        module_root=module_root,
        python_files=tuple(sorted(facts.python_files, key=lambda file: file.target)),
        programs=tuple(sorted(facts.programs, key=lambda program: program.target)),
        applet_links=applets,
        texts=tuple(sorted((text for text in texts if text.path not in files), key=lambda text: text.path)),
        symlinks=tuple(link for link in symlinks if link[0] not in files),
        directories=("/dev", "/etc", "/proc", "/root", "/run", "/sys", "/tmp", "/var"),  # noqa: S108 - the guest's
        files=tuple(files[target] for target in sorted(files)),
        hook=extras.hook,
    )


def _with_groups(text: TextFile) -> TextFile:
    return TextFile(text.path, text.content + groups_text(), text.mode)


def _is_command(path: str) -> bool:
    return str(PurePosixPath(path).parent) in ("/usr/bin", "/usr/sbin")


def _module_list(module_root: str, modules: Iterable[KernelModule]) -> str:
    return "".join(f"{module_root}/{module.target}\n" for module in modules)


def _agent_script(facts: GuestImageFacts, entry_point: str) -> str:
    """The guest's init. -I, -B, -S: no environment, no writing of .pyc, no site module (each costs time);
    sys.path is set so that no directory is searched in vain."""
    module, _, function = entry_point.partition(":")
    path = ", ".join(repr(directory) for directory in (*facts.python_path, PYTHON_ROOT))
    return (
        f"#!{facts.python_interpreter} -IBS\n"
        "import sys\n"
        f"sys.path[:] = [{path}]\n"
        f"from {module} import {function}\n"
        f"sys.exit({function}())\n"
    )
