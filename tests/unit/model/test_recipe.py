"""The recipe of a guest image: what is read from it, and what it is refused for."""

from pathlib import Path

import pytest

from katapod.model.recipe import Recipe, RecipeError, RecipeFile, guest_path, parse_recipe

WHERE = Path("/etc/kata-containers/image.toml")


def test_a_whole_recipe() -> None:
    text = b"""
packages = ["strace", "strace"]
kernel_modules = ["nf-tables"]
load_kernel_modules = ["dummy"]
hook = "finish.sh"
[[files]]
source = "motd"
target = "/bin/../motd"
""".replace(b"/bin/../motd", b"/lib/motd")
    assert parse_recipe(text, WHERE) == Recipe(
        packages=("strace",),
        kernel_modules=("nf_tables",),
        load_kernel_modules=("dummy",),
        hook="/etc/kata-containers/finish.sh",
        files=(RecipeFile("/etc/kata-containers/motd", "/usr/lib/motd"),),
    )


def test_an_empty_recipe_adds_nothing() -> None:
    assert parse_recipe(b"# nothing yet\n", WHERE) == Recipe()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("package = ['a']", "unknown key package; did you mean packages?"),
        ("zzz = 1", "unknown key zzz; known: packages"),
        ("packages = 'strace'", "Expected `array`, got `str` - at `packages`"),
        ("packages = ['Str ace']", "packages: 'Str ace' is not a Debian package name"),
        ("packages = ['--root=/x']", "is not a Debian package name"),
        ("kernel_modules = ['a/b']", "kernel_modules: 'a/b' is not a kernel module name"),
        ("[[files]]\nsource = 'a'", "missing required field `target`"),
        ("[[files]]\nsource = 'a'\ntarget = '/x'\nowner = 'me'", "unknown field `owner`"),
        ("[[files]]\nsource = 'a'\ntarget = 'x'", "files, entry 1: target 'x' is not an absolute path"),
        ("[[files]]\nsource = 'a'\ntarget = '/etc/../x'", "is not an absolute path"),
        ("[[files]]\nsource = ''\ntarget = '/x'", "source is empty"),
        ("[[files]]\nsource = 'a'\ntarget = '/init'", "belongs to the guest's own parts (/init)"),
        ("[[files]]\nsource = 'a'\ntarget = '/bin/crun'", "belongs to the guest's own parts (/usr/bin/crun)"),
        ("[[files]]\nsource = 'a'\ntarget = '/x'\nmode = 'rw'", "mode 'rw' is not octal"),
        ("packages = [", "not TOML: "),
    ],
)
def test_what_is_refused(text: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text.encode(), WHERE)
    assert f"cannot use the image recipe {WHERE}: " in str(caught.value)
    assert problem in str(caught.value)
    assert caught.value.hint


def test_paths_in_a_guest_of_merged_usr() -> None:
    assert guest_path("/lib64/ld.so") == "/usr/lib64/ld.so"
    assert guest_path("/library") == "/library"
    assert guest_path("/etc/bin") == "/etc/bin"
