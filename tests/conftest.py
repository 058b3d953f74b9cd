"""Fixtures for tests on real VMs. Tests of tests/e2e get the leak probe and the guest image without asking."""

import gc
import json
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from katapod.model.flavour import initrd_link
from kit.accel import ACCELERATOR
from kit.containerd import Containerd
from kit.debian import unpack_debian
from kit.evidence import save_evidence
from kit.kata import KATA, Kata
from kit.kubernetes import Kubernetes
from kit.leaks import find_leaks, inventory
from kit.once import once_a_run
from kit.template_dirs import TemplateDir, template_dir
from kit.templates import with_templates

pytest_plugins = [
    "kit.accel_fixtures",
    "kit.kubernetes_fixtures",
    "kit.library",
    "kit.runtime_fixtures",
    "kit.whole_run",
]

TESTS = Path(__file__).parent
NEED_ROOT = (TESTS / "e2e", TESTS / "integration")
IMAGE_LINKS = Path("/var/cache/kata-containers")

# the network of this machine is not the tests' alone: those of tests/e2e/test_run_network.py have one of their own
os.environ.setdefault("KATAPOD_NETWORK", "none")
# A shell that runs us in the background has SIGINT ignored, nohup(1) SIGHUP, and so would have all that we start:
# whoever presses Ctrl-C or closes a terminal in a test would do it in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# timings decide no test: others use the machine too
hypothesis.settings.register_profile("katapod", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("katapod")


def pytest_collection_finish() -> None:
    """What is there by now stays: full garbage collections, which some tests ask for, need not go through it."""
    gc.collect()
    gc.freeze()


def _is_below(path: Path, *folders: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


@pytest.fixture(scope="session")
def guest_images(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The guest images are built, and guests run under the accelerator of this test run. One worker sees to it."""
    assert Path(KATA).exists(), f"{KATA} does not exist: run make setup"
    with once_a_run(tmp_path_factory, "guest-images") as is_first:
        if is_first:
            _make_guest_images()


def _make_guest_images() -> None:
    kata = Kata("guest-image")
    built = kata("image", "build", timeout=240)
    assert built.code == 0, f"cannot build the guest image:\n{built.stderr}"
    accel = ACCELERATOR.value
    there = [accel, *(["uml"] if accel != "uml" and (IMAGE_LINKS / initrd_link("agent", "uml")).exists() else [])]
    for each in there:  # what is proven once is said once, on standard error
        first = kata.run("--accel", each, "busybox", "true", timeout=180)
        assert first.code == 0, f"cannot run a first container under {each}:\n{first.stderr}"


@pytest.fixture(scope="module")
def guest_image(guest_images: None, accelerator: str) -> dict[str, Any]:
    """The manifest of the image that the test's guests boot."""
    link = initrd_link("agent", "uml" if accelerator == "uml" else "qemu")
    manifest = IMAGE_LINKS.joinpath(link).resolve().with_name("manifest.json")
    found: dict[str, Any] = json.loads(manifest.read_text())
    return found


@pytest.fixture(autouse=True, scope="module")
def _module_leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Around all of a module of tests/e2e: its module-wide containers have to go as well."""
    if _is_below(request.path, *NEED_ROOT) and os.geteuid() != 0:
        pytest.fail("the tests in tests/integration and tests/e2e need root: they start VMs and mount", pytrace=False)
    if not _is_below(request.path, TESTS / "e2e"):
        yield
        return
    request.getfixturevalue("guest_images")
    before = inventory()
    yield
    _expect_nothing_new(before, request.node.nodeid)


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest) -> None:
    if _is_below(request.path, TESTS / "e2e"):
        request.getfixturevalue("leaves_nothing")


@pytest.fixture
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """The leak probe: for tests elsewhere than in tests/e2e too."""
    before = inventory()
    yield
    _expect_nothing_new(before, request.node.nodeid)


def _expect_nothing_new(before: frozenset[str], test: str) -> None:
    if left := find_leaks(before, test):
        pytest.fail("the test left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture
def kata(request: pytest.FixtureRequest) -> Iterator[Kata]:
    """`kata-runtime`; containers made with its `start` are removed at the end of the test."""
    found = Kata(request.node.name)
    yield found
    found.remove_started()


@pytest.fixture(scope="module")
def module_kata(request: pytest.FixtureRequest, accelerator: str) -> Iterator[Kata]:
    """As `kata`, for containers that the tests of a module share; anew for each accelerator."""
    found = Kata(request.path.stem)
    yield found
    found.remove_started()


@pytest.fixture(scope="session")
def debian_rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Debian 12 root file system with Python and gcc, as a directory that no container changes."""
    return unpack_debian(tmp_path_factory.mktemp("debian") / "rootfs")


@pytest.fixture(scope="module", params=["template", "cold"])
def templates(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Runs tests twice, with templates on and off; returns whether they are on. See kit.templates."""
    on: bool = request.param == "template"
    with with_templates(on):
        yield on


@pytest.fixture(scope="session")
def pristine_templates(guest_images: None) -> Iterator[TemplateDir]:
    """A directory with the template of the built-in configuration, as if nobody had used it: to be copied."""
    with template_dir() as found:
        found.copy_of_the_usual()
        yield found


@pytest.fixture
def templates_here() -> Iterator[TemplateDir]:
    """A directory for templates, the test's own and empty."""
    with template_dir() as found:
        yield found


@pytest.fixture
def good_template(templates_here: TemplateDir, pristine_templates: TemplateDir) -> TemplateDir:
    """`templates_here` with one good template in it."""
    templates_here.copy_of(pristine_templates)
    return templates_here


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Save what there is of a failed test before its fixtures remove it."""
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        katas = [value for value in item.funcargs.values() if isinstance(value, Kata)]
        nodes = {id(value): value for value in item.funcargs.values() if isinstance(value, Containerd)}.values()
        clusters = [value for value in item.funcargs.values() if isinstance(value, Kubernetes)]
        if katas or nodes or clusters:
            folder = save_evidence(item.name, katas, list(nodes))
            for cluster in clusters:
                cluster.save_evidence(folder)
            report.sections.append(("evidence", f"saved in {folder}"))
    return report
