"""virtiofsd's two command lines."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapod.plan.virtiofsd import (
    VirtiofsdImplementation,
    _escape_option,
    parse_implementation,
    plan_virtiofsd,
    render_virtiofsd,
)

SHARED = Path("/run/share/s1/shared")


@pytest.mark.parametrize(
    ("text", "implementation"),
    [
        ("virtiofsd version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nusing FUSE kernel interface 7.36", "c"),
        ("using FUSE kernel interface version 7.31\n", "c"),
        ("virtiofsd backend 1.8.0\n", "rust"),
        ("virtiofsd 1.13.0\n", "rust"),
        ("", "rust"),
    ],
)
def test_implementations(text: str, implementation: str) -> None:
    assert parse_implementation(text) is VirtiofsdImplementation(implementation)


def test_c() -> None:
    plan = plan_virtiofsd("/v", VirtiofsdImplementation.C, SHARED, cache="never", extra_args=("--x",))
    assert render_virtiofsd(plan, fd=5) == [
        *("/v", "-f", "--fd=5", "-o"),
        "source=/run/share/s1/shared,cache=none,sandbox=namespace,xattr,announce_submounts",
        *("--rlimit-nofile=0", "--thread-pool-size=1", "--x"),
    ]


def test_rust() -> None:
    plan = plan_virtiofsd("/v", VirtiofsdImplementation.RUST, SHARED, cache="metadata", extra_args=())
    assert plan.describe() == (
        "/v --fd=3 --shared-dir=/run/share/s1/shared --cache=metadata --sandbox=namespace --xattr "
        "--rlimit-nofile=0 --thread-pool-size=1 --announce-submounts"
    )


@pytest.mark.parametrize(
    ("cache", "said"), [("never", "none"), ("metadata", "auto"), ("auto", "auto"), ("always", "always")]
)
def test_cache_modes_of_the_c_program(cache: str, said: str) -> None:
    plan = plan_virtiofsd("/v", VirtiofsdImplementation.C, SHARED, cache=cache, extra_args=())
    assert f",cache={said}," in plan.describe()


@given(st.text(alphabet=st.sampled_from("a,\\="), max_size=20))
def test_an_escaped_option_is_read_back_as_one(value: str) -> None:
    """libfuse's rule (fuse_opt.c): a backslash keeps the next character, a comma ends the option."""
    read, rest = "", _escape_option(value)
    while rest:
        assert rest[0] != ","
        keep = rest[0] == "\\"
        read += rest[keep]
        rest = rest[1 + keep :]
    assert read == value
