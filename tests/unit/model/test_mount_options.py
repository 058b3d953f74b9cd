"""What may be written of a bind mount."""

import pytest

from katapod.model.mount_options import Access, is_recursive, parse_access


@pytest.mark.parametrize(
    ("options", "access"),
    [
        ("", Access.WRITABLE),
        ("rbind,ro", Access.TOP_READ_ONLY),
        ("ro,rw", Access.WRITABLE),
        ("rro", Access.READ_ONLY),
        ("ro,rro,nosuid", Access.READ_ONLY),
        ("rro,ro", Access.READ_ONLY),
        ("rro,rw", Access.READ_ONLY),
        ("ro,rrw", Access.WRITABLE),
        ("rro,rrw", Access.WRITABLE),
    ],
)
def test_access(options: str, access: Access) -> None:
    assert parse_access(options.split(",")) is access


@pytest.mark.parametrize(
    ("options", "recursive"), [("", True), ("ro", True), ("rbind", True), ("bind", False), ("bind,rbind", True)]
)
def test_recursion(options: str, recursive: bool) -> None:
    assert is_recursive(options.split(",")) is recursive
