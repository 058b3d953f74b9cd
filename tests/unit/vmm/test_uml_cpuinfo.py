"""Which features of the processor a guest's /proc/cpuinfo names."""

import pytest

from katapod.vmm.uml.cpuinfo import features_for_guest

HOST = "processor\t: 0\nflags\t\t: {}\nvmx flags\t: ept\nbugs\t\t: x\n\nprocessor\t: 1\nflags\t\t: none\n"


@pytest.mark.parametrize(
    ("has", "told"),
    [
        ("fpu sse2 avx avx2", "fpu sse2 avx avx2"),
        ("fpu vmx amx_tile amx_bf16 avx512_fp16 pku ospke sgx sgx_lc ibt", "fpu avx512_fp16"),
        ("svm svm_lock user_shstk smap", "smap"),
        ("abm 3dnowprefetch", "abm"),
        ("3dnow 3dnowprefetch", "3dnow 3dnowprefetch"),
        ("", ""),
    ],
)
def test_what_programs_can_use_is_told(has: str, told: str) -> None:
    assert features_for_guest(HOST.format(has).splitlines(keepends=True)) == f"flags\t\t: {told}\n"


def test_a_host_that_says_nothing() -> None:
    assert features_for_guest(["processor\t: 0\n", "vmx flags\t: ept\n"]) == ""
