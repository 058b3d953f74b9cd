"""A real distribution in a container: package tools, Python, a compiler."""

from pathlib import Path

import pytest

from kit.debian import PACKAGES, debian_archive
from kit.kata import RUN_PREFIX, Kata
from kit.oci_archive import write_layout

PROGRAM = r"""
#include <stdio.h>
#include <sys/utsname.h>
int main(int argc, char **argv) {
    struct utsname u;
    uname(&u);
    printf("%s %s %d\n", u.sysname, argv[1], argc);
    return 42;
}
"""


@pytest.fixture(scope="module")
def box(module_kata: Kata, debian_rootfs: Path) -> str:
    return module_kata.start("--rootfs", str(debian_rootfs), "sleep", "1000")


def test_package_tools(kata: Kata, box: str) -> None:
    result = kata("exec", box, "apt", "list", "--installed")
    assert result.code == 0
    installed = {line.partition("/")[0] for line in result.stdout.splitlines() if "[installed" in line}
    assert {*PACKAGES, "apt", "dpkg", "libc6"} <= installed
    assert "Status: install ok installed" in kata.ok("exec", box, "dpkg", "--status", "gcc")


def test_python(kata: Kata, box: str) -> None:
    assert kata.ok("exec", box, "python3", "-c", "import os; print(6 * 7, os.getpid() > 1)") == "42 True\n"


def test_compiler(kata: Kata, box: str) -> None:
    kata.ok("exec", "-i", box, "sh", "-c", "cat > /root/small.c", input=PROGRAM)
    kata.ok("exec", "-w", "/root", box, "gcc", "-Wall", "-Werror", "-O2", "-o", "small", "small.c")
    assert kata("exec", box, "/root/small", "works") == (42, "Linux works 2\n", "")


def test_users_by_name(kata: Kata, box: str) -> None:
    assert kata.ok("exec", "-u", "games", box, "id") == "uid=5(games) gid=60(games) groups=60(games)\n"


def test_a_set_group_id_program_cannot_give_up_the_primary_group(kata: Kata, box: str) -> None:
    """Of a file with mode 0604 the group is denied what all others may."""
    script = (
        "cp /bin/cat /usr/local/bin/cat-as-video && chgrp video /usr/local/bin/cat-as-video &&"
        "chmod 2755 /usr/local/bin/cat-as-video && echo others > /srv/file &&"
        "chgrp games /srv/file && chmod 604 /srv/file"
    )
    kata.ok("exec", box, "sh", "-c", script)
    assert kata.ok("exec", "-u", "nobody", box, "cat-as-video", "/srv/file") == "others\n"
    code, out, err = kata("exec", "-u", "games", box, "cat-as-video", "/srv/file")
    assert (code, out) == (1, "")
    assert "Permission denied" in err


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same root file system as an OCI image layout."""
    image = tmp_path_factory.mktemp("oci") / "image"
    environment = ["FROM_IMAGE=yes", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
    config = {"Env": environment, "Cmd": ["python3", "--version"], "WorkingDir": "/usr/lib"}
    write_layout(image, debian_archive(), config)
    return f"oci:{image}:latest"


def test_imported_image(kata: Kata, layout: str) -> None:
    """Imported under a name, run with its own environment and directory."""
    name = f"{RUN_PREFIX}debian"
    imported = kata("image", "import", layout, name, timeout=180)
    assert imported.code == 0, imported
    try:
        script = (
            "echo $FROM_IMAGE; pwd; stat -c '%u:%g %a' /etc/shadow /usr/bin/passwd; apt list --installed 2>&1 | wc -l"
        )
        code, out, err = kata.run(name, "sh", "-c", script)  # instead of its own command
        assert (code, err) == (0, "")
        assert out.splitlines()[:4] == ["yes", "/usr/lib", "0:42 640", "0:0 4755"]
        assert int(out.splitlines()[4]) > 80
    finally:
        assert kata("image", "rm", name).code == 0
