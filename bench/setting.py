"""Prepares a run and clears away after it: root file systems, images, configurations, the servers of contestants.

All of it lies in a folder on disk, in one below /run, and in the image store; it goes at the end, however that comes.
"""

import compileall
import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import katapod
from bench.by_hand import SHARE, by_hand_initrd, run_by_hand
from bench.containerd import CTR_EMULATED, CTR_KATAPOD, CTR_RUNC, Ctr, running_containerd
from bench.contestants import DEFAULT, TEMPLATE, Contestant, Katapod, Peer, katapod_variants, peer_contestants
from bench.crun_view import without_unified_hierarchy
from bench.measure import BenchError, execute, quietly, run_one
from bench.network import BY_HAND_NET, by_hand_net_initrd, guest_by_hand
from bench.oci import OCI_CRUN, OCI_KATAPOD, OCI_RUNC, oci_engine
from bench.pods import CRI_EMULATED, CRI_KATAPOD, CRI_RUNC, pod_engine
from bench.pool import served
from bench.raw_boot import RawBoot
from bench.share import BY_HAND, CTR_ROOT, CTR_RUNC_SHARED, CTR_SHARED, CTR_SHARED_EMULATED, SHARE_SCRIPT, SHARED
from bench.suites import BUNDLE, EMULATED, IMAGE, Stage, with_python
from bench.workload import Bundles, make_rootfs, write_archive
from kit.debian import unpack_debian

__all__ = ["prepared"]

MEMORY = Path("/dev/shm")  # noqa: S108 - what is shared lies there: see share.py
SCRATCH = Path("/var/tmp")  # noqa: S108 - a disk, as /var/lib is: not the tmpfs that /tmp may be


@contextlib.contextmanager
def prepared(accelerator: str, wanted: set[str], missing: dict[str, str]) -> Iterator[Stage]:
    """The contestants that are wanted and work, each tried once. `missing` gets the others, and why."""
    # as the packages do once they are installed; where PYTHONDONTWRITEBYTECODE is set, each start of a checkout would
    # compile all that it loads
    compileall.compile_dir(Path(katapod.__file__).parent, quiet=1)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="katapod-bench-", dir=SCRATCH)))
        own = Path("/run") / scratch.name
        own.mkdir(mode=0o700)
        stack.callback(shutil.rmtree, own, ignore_errors=True)
        rootfs = make_rootfs(scratch / "rootfs")
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="katapod-bench-", dir=MEMORY)))
        variants = katapod_variants(scratch, own, accelerator)
        for variant in variants:
            variant.write_config()
        default, emulated = (next(one for one in variants if one.name == name) for name in (DEFAULT, TEMPLATE))
        stack.callback(quietly, emulated.call("factory", "destroy"))
        crun_prefix = stack.enter_context(without_unified_hierarchy())
        everyone: list[Contestant] = [*peer_contestants(Bundles(scratch, rootfs), scratch, crun_prefix), *variants]
        everyone += _others(default, emulated, rootfs, shared, scratch, stack)
        if any(with_python(contestant.name) in wanted for contestant in everyone):
            everyone += _with_python(everyone, default, scratch, missing, stack)
        if any(name.startswith("ctr, ") for name in wanted):
            everyone += _through_containerd(default, emulated, rootfs, shared, scratch, own, missing, stack)
        stage = Stage(RawBoot.prepare(scratch, accelerator), {}, scratch=scratch)
        if BY_HAND in wanted:
            version = stage.raw.kernels["bzImage"].name.partition("-")[2]
            initrd = by_hand_initrd(rootfs, scratch, version, SHARE_SCRIPT)
            stage.by_hand = partial(run_by_hand, stage.raw, initrd, shared)
        if BY_HAND_NET in wanted:
            initrd = by_hand_net_initrd(rootfs, scratch, stage.raw.kernels["bzImage"].name.partition("-")[2])
            stage.network_by_hand = partial(guest_by_hand, stage.raw, initrd)
        if wanted & {CRI_RUNC, CRI_KATAPOD, CRI_EMULATED}:
            stage.pods = stack.enter_context(pod_engine(default.config, emulated.config))
        if wanted & {OCI_RUNC, OCI_CRUN, OCI_KATAPOD}:
            stage.oci = stack.enter_context(oci_engine(Bundles(scratch, rootfs), scratch, crun_prefix))
        for contestant in everyone:
            if contestant.name not in wanted:
                continue
            if why := contestant.missing() or _try(contestant, stack):
                missing[contestant.name] = why
            else:
                stage.contestants[contestant.name] = contestant
        yield stage


def _imported(rootfs: Path, scratch: Path, kata: Katapod, stack: contextlib.ExitStack) -> str:
    """The name of an image of this root file system, in the store until the end."""
    name = f"{scratch.name.lower().replace('_', 'x')}-{rootfs.name}:latest"
    archive = scratch / "image.tar"
    write_archive(rootfs, archive)
    stack.callback(quietly, kata.call("image", "rm", name))
    execute(kata.call("image", "import", f"docker-archive:{archive}", name))
    archive.unlink()
    return name


def _through_containerd(
    default: Katapod,
    emulated: Katapod,
    rootfs: Path,
    shared: Path,
    scratch: Path,
    own: Path,
    missing: dict[str, str],
    stack: contextlib.ExitStack,
) -> list[Contestant]:
    """A containerd of our own and its two runtimes, also with a share; Katapod's by default, and emulated."""
    archive = scratch / "ctr-image.tar"
    write_archive(rootfs, archive)
    try:
        socket, image = stack.enter_context(running_containerd(scratch / "containerd", own / "c", archive))
    except BenchError as error:
        missing["containerd"] = str(error)
        return []
    runc = Ctr(CTR_RUNC, "io.containerd.runc.v2", socket, image)
    katapod = Ctr(CTR_KATAPOD, "io.containerd.kata.v2", socket, image, str(default.config))
    by_emulation = replace(katapod, name=CTR_EMULATED, config=str(emulated.config))
    volumes = (f"{shared}:{SHARE}",)
    return [
        runc,
        katapod,
        by_emulation,
        replace(runc, name=CTR_RUNC_SHARED, volumes=volumes),
        replace(katapod, name=CTR_SHARED, volumes=volumes),
        replace(by_emulation, name=CTR_SHARED_EMULATED, volumes=volumes),
        replace(katapod, name=CTR_ROOT),
    ]


def _others(
    default: Katapod, emulated: Katapod, rootfs: Path, shared: Path, scratch: Path, stack: contextlib.ExitStack
) -> list[Contestant]:
    """Katapod with the benchmark's root file system, as image and as bundle, and with a share. VMs of default size."""
    large = replace(default, network="none", image=_imported(rootfs, scratch, default, stack))
    others = [
        replace(large, name=IMAGE),
        replace(large, name=BUNDLE, bundles=Bundles(scratch, rootfs)),
        replace(large, name=EMULATED, sections=emulated.sections),
        replace(large, name=SHARED, volumes=(f"{shared}:{SHARE}",)),
    ]
    for other in others:
        other.write_config()
    return list(others)


def _with_python(
    everyone: list[Contestant], default: Katapod, scratch: Path, missing: dict[str, str], stack: contextlib.ExitStack
) -> list[Contestant]:
    """Peers, images and bundle once more, with a Debian that has Python, as the tests make theirs."""
    try:
        rootfs = unpack_debian(scratch / "debian", ("python3",))
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        missing["Debian with Python"] = str(error)
        return []
    bundles = Bundles(scratch / "debian-bundles", rootfs)
    found: list[Contestant] = []
    image = ""
    for one in everyone:
        if isinstance(one, Peer):
            found.append(replace(one, name=with_python(one.name), program=one.program, bundles=bundles))
        elif isinstance(one, Katapod) and one.name == BUNDLE:
            found.append(replace(one, name=with_python(one.name), bundles=bundles))
        elif isinstance(one, Katapod) and one.name in (IMAGE, EMULATED):
            image = image or _imported(rootfs, scratch, default, stack)
            found.append(replace(one, name=with_python(one.name), image=image))
    for contestant in found:
        if isinstance(contestant, Katapod):
            contestant.write_config()
    return found


def _try(contestant: Contestant, stack: contextlib.ExitStack) -> str:
    """One start outside the measurement, which also builds what later ones find. Says why it cannot take part.

    What serves the contestant is started here, and ended by `stack`.
    """
    try:
        outcome = run_one(contestant, ("echo", "hello"))
        if not isinstance(contestant, Katapod):
            return ""
        if not (refusal := contestant.refused(outcome.errors)):
            stack.enter_context(served(contestant))
    except BenchError as error:
        return str(error)
    return refusal
