"""tools/install-packages: what it asks apt for, and how it waits for others that use apt."""

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).parents[3]
PROGRAM = TOP / "tools/install-packages"
LISTS = [TOP / "packaging/debian-packages.txt", TOP / "packaging/debian-packages-test.txt"]
QUERY = r"""#!/bin/sh
for last; do :; done
sed -n "s/^$last /installed /p" "$INSTALLED" | grep .
"""
APT = """#!/bin/sh
echo "$@" >> "$ASKED"
"""


class Machine:
    """One on which dpkg says what it is told to say, and apt writes down what it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = folder / "var/lib/dpkg/lock-frontend"
        self.lock.parent.mkdir(parents=True)
        self.lock.touch()
        (folder / "bin").mkdir()
        (folder / "asked").touch()
        for name, text in (("dpkg-query", QUERY), ("apt-get", APT), ("id", "#!/bin/sh\necho 0\n")):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def start(self, wanted: str, installed: str = "", limit_s: int = 60) -> subprocess.Popen[str]:
        (self.folder / "list").write_text(wanted)
        (self.folder / "installed").write_text(installed)
        environment = {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "INSTALLED": str(self.folder / "installed"),
            "ASKED": str(self.folder / "asked"),
            "KATAPOD_APT_VAR": str(self.folder / "var"),
            "KATAPOD_APT_LOCK_LIMIT": str(limit_s),
        }
        argv = ["sh", str(PROGRAM), str(self.folder / "list")]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def asked_for(self, wanted: str, installed: str = "") -> str:
        """What apt is asked to install, but for a kernel, which this machine may have or not."""
        with self.start(wanted, installed) as program:
            _, error = program.communicate(timeout=60)
        assert (program.returncode, error) == (0, "")
        asked = [line for line in (self.folder / "asked").read_text().splitlines() if "satisfy" in line]
        said = asked[0].partition("--no-install-recommends ")[2] if asked else ""
        return said.removesuffix("linux-image-cloud-amd64").removesuffix(", ")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


VIRTIOFSD = "crun # a comment\n\nvirtiofsd | qemu-system-common (<< 1:8)\n"


@pytest.mark.parametrize(
    ("installed", "asked"),
    [
        ("", "crun, virtiofsd | qemu-system-common (<< 1:8)"),
        ("crun 1.8\nqemu-system-common 1:7.2+dfsg-7\n", ""),  # Debian 12
        ("crun 1.21\nqemu-system-common 1:10.0.2+ds-2\n", "virtiofsd | qemu-system-common (<< 1:8)"),  # Debian 13
        ("crun 1.21\nqemu-system-common 1:10.0.2+ds-2\nvirtiofsd 1.13.2-1\n", ""),
    ],
)
def test_an_alternative_counts_in_its_versions_only(machine: Machine, installed: str, asked: str) -> None:
    assert machine.asked_for(VIRTIOFSD, installed) == asked


def test_the_lists_name_packages_as_apt_takes_them(machine: Machine) -> None:
    for one in LISTS:
        wanted = [line.partition("#")[0].strip() for line in one.read_text().splitlines()]
        assert wanted == sorted(wanted)
        (machine.folder / "asked").write_text("")
        assert machine.asked_for(one.read_text()) == ", ".join(filter(None, wanted))


def test_it_waits_while_somebody_else_uses_apt_and_says_so(machine: Machine) -> None:
    with machine.lock.open("w") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        program = machine.start("none-such\n")
        assert program.stdout is not None
        assert program.stdout.readline().startswith("installing: none-such")
        said = program.stdout.readline()
        assert said.startswith(f"waiting for process {os.getpid()} (")
        assert said.endswith(f", which holds {machine.lock}, for at most 60 s\n")
        assert (machine.folder / "asked").read_text() == ""
    with program:
        rest, error = program.communicate(timeout=60)
    assert (program.returncode, rest, error) == (0, "", "")
    assert len((machine.folder / "asked").read_text().splitlines()) == 2  # update, satisfy


def test_it_does_not_wait_for_ever(machine: Machine) -> None:
    with machine.lock.open("w") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        with machine.start("none-such\n", limit_s=1) as program:
            _, error = program.communicate(timeout=60)
    assert program.returncode == 1
    assert f"still holds {machine.lock} after 1 s\n  hint: let it finish, or end it" in error
    assert (machine.folder / "asked").read_text() == ""


def test_who_was_faster_is_waited_for_and_apt_asked_again(machine: Machine) -> None:
    """The first call of apt fails, since another one has taken the lock just before."""
    taker = """#!/usr/bin/python3 -I
import os, subprocess, sys
asked, folder = os.environ["ASKED"], os.environ["KATAPOD_APT_VAR"]
with open(asked, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
if len(open(asked).readlines()) == 1:
    take = f"import fcntl, os, time; f = open('{folder}/lib/dpkg/lock-frontend', 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    wait = f"print(flush=True)\\nwhile not os.path.exists('{folder}/enough'): time.sleep(0.05)"
    subprocess.Popen([sys.executable, "-c", take + "\\n" + wait], stdout=subprocess.PIPE).stdout.read(1)
    sys.exit(100)
"""
    (machine.folder / "bin/apt-get").write_text(taker)
    with machine.start("none-such\n") as program:
        assert program.stdout is not None
        program.stdout.readline()
        assert program.stdout.readline().startswith("waiting for process")
        (machine.folder / "var/enough").touch()
        program.communicate(timeout=60)
    assert program.returncode == 0
    asked = (machine.folder / "asked").read_text().splitlines()
    assert ["update" in line for line in asked] == [True, True, False]
