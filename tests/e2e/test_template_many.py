"""Many clones of one template: each a machine of its own, and at the end everything is as it was before.

They are started in two groups, which the tests look at together: two at a time, and all at once.
"""

import contextlib
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from faults import fresh_name, kata, record_of, start, wait_until, write_config

from kit.kata import SHARED_HOST
from kit.leaks import find_leaks, inventory
from kit.template_dirs import TemplateDir, template_dir
from kit.templates import with_templates

pytestmark = [pytest.mark.alone, pytest.mark.qemu("templates"), pytest.mark.timeout(900)]

IN_A_ROW = 12
WITH_KEYS = 6
AT_ONCE = 40
ALL = IN_A_ROW + AT_ONCE
SLACK_MIB = 64  # of shared memory: less than a guest has, and far less than a tenth of them

RANDOM = (
    "od -An -N32 -tx1 /dev/urandom | tr -d ' \\n'; echo; cd /proc/sys/kernel; "
    "for one in random/uuid random/boot_id hostname; do read line < $one; echo $line; done"
)
KEYS = "ssh-keygen -q -t ed25519 -N '' -f /tmp/host_key; cut -d' ' -f2 /tmp/host_key.pub"


@pytest.fixture(autouse=True, scope="module")
def _on() -> Iterator[None]:
    with with_templates(True):
        yield


@pytest.fixture(scope="module")
def shared(pristine_templates: TemplateDir) -> Iterator[TemplateDir]:
    """The template of all of them."""
    with template_dir() as found:
        found.copy_of(pristine_templates)
        yield found


@pytest.fixture(scope="module")
def config(shared: TemplateDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    return write_config(folder, factory={"template_path": str(shared.root)})


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """busybox, and this host's ssh-keygen with the libraries that it needs."""
    root = tmp_path_factory.mktemp("rootfs")
    keygen = shutil.which("ssh-keygen")
    assert keygen, "ssh-keygen is not installed; packaging/debian-packages-test.txt names what the tests need"
    needed = subprocess.run(["ldd", keygen], check=True, capture_output=True, text=True).stdout
    for path in [keygen, *re.findall(r"(?<=[\s])/\S+", needed)]:
        target = root / path.removeprefix("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (root / "bin").mkdir(exist_ok=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", root / "bin" / "busybox")
    for name in ("sh", "od", "tr", "cat", "hostname", "cut"):
        (root / "bin" / name).symlink_to("busybox")
    for name in ("proc", "sys", "dev", "etc", "root"):
        (root / name).mkdir()
    (root / "tmp").mkdir(mode=0o1777)
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    return root


@dataclass
class Clones:
    """What the clones said, by what it is; and what was there before and after them."""

    random: list[str] = field(default_factory=list)
    uuids: list[str] = field(default_factory=list)
    boot_ids: list[str] = field(default_factory=list)
    hostnames: list[str] = field(default_factory=list)
    host_keys: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    grown_mib: float = 0.0
    template_before: str = ""
    template_after: str = ""
    uses: int = 0

    def learn(self, name: str, out: str) -> None:
        """What a clone has said."""
        random, uuid, boot_id, hostname, *key = out.splitlines()
        self.random.append(random)
        self.uuids.append(uuid)
        self.boot_ids.append(boot_id)
        self.hostnames.append(hostname)
        self.host_keys.extend(key)
        self.names.append(name)


def shared_memory_mib() -> float:
    """All that lies in tmpfs and memfds on this machine: guests' memory too."""
    (line,) = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("Shmem:")]
    return int(line.split()[1]) / 1024


def contents_of(templates: TemplateDir) -> str:
    """Tells whether the template is the same file with the same contents."""
    with (templates.folder / "memory").open("rb") as memory:
        return f"{templates.generation()} {hashlib.file_digest(memory, 'sha256').hexdigest()}"


@pytest.fixture(scope="module")
def clones(shared: TemplateDir, config: Path, rootfs: Path) -> Clones:
    """IN_A_ROW starts, two at a time, of which WITH_KEYS make a host key for ssh."""
    found = Clones(template_before=contents_of(shared))
    before, memory_before = inventory(), shared_memory_mib()

    def one(number: int) -> None:
        name = fresh_name("row")
        with_key = number < WITH_KEYS
        image = ["--rootfs", str(rootfs)] if with_key else ["busybox"]
        script = f"{RANDOM}; {KEYS}" if with_key else RANDOM
        done = kata("--config", str(config), "run", "--rm", "-m", "64m", "--name", name, *image, "sh", "-c", script)
        assert (done.code, done.err) == (0, ""), (number, done)
        found.learn(name, done.out)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(IN_A_ROW)))
    found.left = find_leaks(before)
    found.grown_mib = shared_memory_mib() - memory_before
    found.template_after = contents_of(shared)
    found.uses = shared.uses()
    return found


@pytest.fixture(scope="module")
def at_once(clones: Clones, shared: TemplateDir, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Clones:
    """AT_ONCE starts of which none ends before all are up. They end a few at a time, since a guest that may have
    something to write gets some seconds to end by itself, and that it did not is worth a warning."""
    found = Clones(template_before=contents_of(shared))
    before, memory_before, uses_before = inventory(), shared_memory_mib(), shared.uses()
    folder = tmp_path_factory.mktemp("once")
    with contextlib.ExitStack() as stack:
        group = []
        for number in range(AT_ONCE):
            # each sleep is a process, which an emulated guest does not have for nothing
            script = f"touch /v/up-{number}; until test -e /v/go-{number}; do sleep 2; done; {RANDOM}"
            args = ("--rm", "-m", "64m", "-v", f"{folder}:/v", "busybox", "sh", "-c", script)
            group.append(stack.enter_context(start(*args, name=fresh_name("once"), config=config)))
        wait_until("all are up", lambda: len(list(folder.glob("up-*"))) == AT_ONCE, limit_s=300, period_s=0.1)
        assert {record_of(each.name)["template"] for each in group} == shared.keys()
        ends = []
        for first in range(0, AT_ONCE, 5):
            wave = range(first, min(first + 5, AT_ONCE))
            for number in wave:
                (folder / f"go-{number}").touch()
            ends += [group[number].end() for number in wave]
    assert [(number, done) for number, done in enumerate(ends) if (done.code, done.err) != (0, "")] == []
    for each, done in zip(group, ends, strict=True):
        found.learn(each.name, done.out)
    found.left = find_leaks(before)
    found.grown_mib = shared_memory_mib() - memory_before
    found.template_after = contents_of(shared)
    found.uses = shared.uses() - uses_before
    return found


def test_many_starts_in_a_row(clones: Clones) -> None:
    assert len(clones.names) == IN_A_ROW
    assert clones.uses == IN_A_ROW, "not all of them were clones"


def test_40_at_once(at_once: Clones) -> None:
    assert len(at_once.names) == AT_ONCE
    assert at_once.uses == AT_ONCE, "not all of them were clones"


@pytest.mark.parametrize(
    ("what", "form", "count"),
    [
        ("random", r"[0-9a-f]{64}", ALL),
        ("uuids", r"[0-9a-f-]{36}", ALL),
        ("boot_ids", r"[0-9a-f-]{36}", ALL),
        ("host_keys", r"AAAA\S{64}", WITH_KEYS),
    ],
)
def test_no_two_clones_draw_the_same_random_numbers(
    clones: Clones, at_once: Clones, what: str, form: str, count: int
) -> None:
    values: list[str] = getattr(clones, what) + getattr(at_once, what)
    assert len(values) == count
    assert all(re.fullmatch(form, value) for value in values), values[0]
    assert len(set(values)) == count


def test_random_streams_share_no_part(clones: Clones, at_once: Clones) -> None:
    """Nor is one stream another's at an offset: no eight bytes come twice."""
    streams = clones.random + at_once.random
    parts = [stream[at : at + 16] for stream in streams for at in range(0, 64, 16)]
    assert len(set(parts)) == len(parts)


def test_each_has_its_own_name(clones: Clones, at_once: Clones) -> None:
    for group in (clones, at_once):
        assert sorted(group.hostnames) == sorted(group.names)


def test_everything_is_as_it_was_before_them(clones: Clones, at_once: Clones) -> None:
    for group in (clones, at_once):
        assert group.left == []
        assert group.template_after == group.template_before
        if not SHARED_HOST:
            assert group.grown_mib < SLACK_MIB
