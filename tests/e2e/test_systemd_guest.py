"""The systemd flavour of the guest image, with a recipe that has one of everything: built, proven, and a container in
it. What the guest shows comes from a unit that the recipe adds: it writes to the guest's console."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from msgspec.structs import replace

from katapod.model.errors import KatapodError
from katapod.osbuilder import BuiltImage, ImageNotProven, ImageRequest, build_guest_image, current_image, read_recipe
from katapod.sandbox.proof import TCG_LIMIT_S, prove_boot
from katapod.vmm.spec import Accelerator
from kit.kata import Kata, wait_for
from kit.packed_modules import modules_packed_once

pytestmark = pytest.mark.qemu("its guest image is QEMU's")

QEMU = "/usr/bin/qemu-system-x86_64"
CONTAINER_SLEEP, KILLER_SLEEP = "7654", "8765"

RECIPE = """
packages = ["strace"]
kernel_modules = ["xfs"]
load_kernel_modules = ["dummy"]
hook = "hook"

[[files]]
source = "tree"
target = "/"

[[files]]
source = "tour"
target = "/usr/bin/tour"
mode = "0755"
""".replace('target = "/"', 'target = "/usr/lib/systemd/system"')

HOOK = """#!/bin/sh
set -eu
chroot . /usr/bin/strace -V > etc/hook-was-here
echo "$KATAPOD_KERNEL_VERSION" >> etc/hook-was-here
mkdir -p usr/lib/systemd/system/kata-containers.target.wants
ln -s ../tour.service usr/lib/systemd/system/kata-containers.target.wants/tour.service
"""

UNIT = """[Unit]
After=kata-agent.service
[Service]
ExecStart=/usr/bin/tour
StandardOutput=tty
Environment=SYSTEMD_COLORS=0 SYSTEMD_PAGER=cat COLUMNS=200
"""

TOUR = f"""#!/bin/sh
until ps | grep -q "[s]leep {CONTAINER_SLEEP}"; do sleep 1; done
systemctl list-units --plain --no-legend --full
echo == ps; ps
echo == modules; lsmod; modprobe xfs && grep xfs /proc/filesystems
echo == hook; cat /etc/hook-was-here
echo == id; cat /etc/machine-id
echo == strace; strace -f -e trace=execve true 2>&1
echo == init; readlink /proc/1/exe
echo tour is over
until ps | grep -q "[s]leep {KILLER_SLEEP}"; do sleep 1; done
systemctl kill --kill-whom=main --signal=KILL kata-agent.service
"""


class Guest(NamedTuple):
    request: ImageRequest
    image: BuiltImage
    config: Path


async def prove(kernel: Path, initrd: Path) -> None:
    await prove_boot(kernel, initrd, QEMU, Accelerator.TCG, limit_s=TCG_LIMIT_S)


@pytest.fixture(autouse=True, scope="module")
def _modules_packed_once() -> Iterator[None]:
    with modules_packed_once():
        yield


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Guest:
    root = tmp_path_factory.mktemp("systemd-guest")
    (root / "tree").mkdir()
    (root / "tree/tour.service").write_text(UNIT)
    (root / "tour").write_text(TOUR)
    (root / "hook").write_text(HOOK)
    (root / "hook").chmod(0o755)
    (root / "image.toml").write_text(RECIPE)
    recipe, name = read_recipe(root / "image.toml")
    request = ImageRequest(cache_dir=root / "cache", flavour="systemd", recipe=recipe, recipe_name=name)
    image = asyncio.run(build_guest_image(request, prove=prove))
    config = root / "configuration.toml"
    config.write_text(
        f"""[hypervisor.qemu]
kernel = "{root}/cache/vmlinuz-systemd.container"
initrd = "{root}/cache/kata-containers-initrd-systemd.img"
[factory]
enable_template = false
[agent.kata]
dial_timeout = 120
"""
    )
    return Guest(request, image, config)


def test_the_guest_shows_systemd_the_agent_and_what_the_recipe_adds(guest: Guest, kata: Kata) -> None:
    name = kata.name()
    started = kata("--config", str(guest.config), "run", "-d", "--name", name, "busybox", "sleep", CONTAINER_SLEEP,
                   timeout=180)  # fmt: skip
    try:
        assert started.code == 0, started
        log = Path(f"/run/vc/sbs/{name}/console.log")
        text = wait_for(
            lambda: (seen := log.read_text(errors="replace")).count("tour is over") and seen, "the tour ends"
        ).replace("\r", "")
        assert kata.ok("exec", name, "cat", "/proc/1/cmdline") == f"sleep\0{CONTAINER_SLEEP}\0"
        cut_off = kata("exec", name, "sleep", KILLER_SLEEP, timeout=180)  # has the tour kill the agent
        dead = kata.listed(name)
    finally:
        ended = kata("delete", "--force", name)
    assert ended.code == 0, ended
    assert cut_off.code == 125
    assert f"the command in {name} was cut off: QEMU ended" in cut_off.stderr
    assert (dead["state"], dead["exit_code"]) == ("stopped", 137)
    for unit, states in (
        ("kata-agent.service", "loaded active running Kata Containers Agent"),
        ("kata-containers.target", "loaded active active +Kata Containers Agent Target"),
        ("systemd-journald.service", "loaded active running"),
        ("systemd-udevd.service", "loaded active running"),
        ("systemd-modules-load.service", "loaded active exited"),
        ("tmp.mount", "loaded active mounted"),
        (r"run-sandbox\\x2dns-ipc.mount", "loaded active mounted"),
    ):
        assert re.search(rf"^{unit} +{states}", text, re.MULTILINE), f"{unit}\n{text}"
    assert " failed " not in text
    processes = text.partition("== ps")[2].partition("== modules")[0]
    for command in ("/init", "systemd-journald", "systemd-udevd", "/usr/bin/kata-agent", f"sleep {CONTAINER_SLEEP}"):
        assert command in processes
    assert re.search(r"^ +1 root +\{systemd\} /init", processes, re.MULTILINE)
    assert re.search(r"^dummy ", text, re.MULTILINE)
    assert "\txfs\n" in text
    assert "strace -- version" in text
    assert guest.image.kernel_version in text.partition("== hook")[2]
    assert re.search(r"== id\n[0-9a-f]{32}\n", text)
    assert 'execve("/usr/bin/true"' in text or 'execve("/bin/true"' in text
    assert "== init\n/usr/lib/systemd/systemd" in text


def test_a_recipe_that_breaks_the_build_or_the_guest_leaves_the_former_image(guest: Guest, tmp_path: Path) -> None:
    cache = guest.request.cache_dir

    async def refused(kernel: Path, initrd: Path) -> None:
        raise KatapodError("the agent says nothing")

    other = msgspec.structs.replace(guest.request.recipe, load_kernel_modules=())
    with pytest.raises(ImageNotProven, match="the agent says nothing"):
        asyncio.run(build_guest_image(replace(guest.request, recipe=other), prove=refused))
    hook = tmp_path / "hook"
    hook.write_text("#!/bin/sh\necho the oven is cold >&2\nexit 3\n")
    hook.chmod(0o755)
    other = msgspec.structs.replace(guest.request.recipe, hook=str(hook))
    with pytest.raises(KatapodError, match=r"(?s)hook .*/hook failed: the oven is cold.*exit status 3"):
        asyncio.run(build_guest_image(replace(guest.request, recipe=other), prove=prove))
    assert current_image(cache, "systemd") == replace(guest.image, fresh=False)
    assert sorted(path.name for path in (cache / "osbuilder-images").iterdir()) == [
        ".lock",
        f"{guest.image.kernel_version}+systemd",
        "current-systemd",
    ]


def test_nothing_is_built_while_the_recipe_and_its_files_stay(guest: Guest) -> None:
    again = asyncio.run(build_guest_image(guest.request, prove=prove))
    assert (again.fresh, again.key) == (False, guest.image.key)
    unused = msgspec.structs.replace(guest.request.recipe, packages=("no-such-package-here",))
    with pytest.raises(KatapodError, match="not installed on this node: no-such-package-here"):
        asyncio.run(build_guest_image(replace(guest.request, recipe=unused), prove=prove))
