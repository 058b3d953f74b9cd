"""Users and groups as an image's /etc/passwd and /etc/group have them. Pure."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Identity", "UnknownUser", "find_home", "resolve_user"]

ID_MAX = 0xFFFFFFFE


class UnknownUser(ValueError):
    """The image does not have the user or group; the message names it and the file."""


class Identity:
    __slots__ = ("gid", "groups", "home", "uid")

    def __init__(self, uid: int, gid: int, groups: list[int], home: str) -> None:
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.home = home


def _rows(text: str, needed: int, columns: int) -> list[list[str]]:
    """Rows with a name and at least `needed` fields; missing further fields are empty, as engines read them. Only a
    newline ends a line: a name may have any other character."""
    rows = [line.strip().split(":") for line in text.split("\n")]
    return [row + [""] * (columns - len(row)) for row in rows if len(row) >= needed and row[0]]


def _number(text: str) -> int | None:
    if text.isascii() and text.isdigit() and int(text) <= ID_MAX:
        return int(text)
    return None


def _group_id(name: str, group: str) -> int:
    for row in _rows(group, 3, 4):
        gid = _number(row[2])
        if row[0] == name and gid is not None:
            return gid
    number = _number(name)
    if number is None:
        raise UnknownUser(f"no group {name[:64]} in the image's /etc/group")
    return number


def resolve_user(user: str, group_name: str, more: Sequence[str], passwd: str, group: str) -> Identity:
    """Resolve a name or number as `docker run -u` does.

    A number without an entry is used as it is, with group 0. A given group replaces the user's groups. The primary
    group is the first supplementary one, as login programs do it: otherwise a set-group-ID program would drop it, and
    with it what a file's mode denies to that group (CVE-2022-36109). Raises UnknownUser.
    """
    number = _number(user)
    name, uid, gid, home = "", number, 0, ""
    for row in _rows(passwd, 3, 7):
        row_uid, row_gid = _number(row[2]), _number(row[3] or "0")
        if row_uid is None or row_gid is None:
            continue
        if row[0] == user or row_uid == number:
            name, uid, gid, home = row[0], row_uid, row_gid, row[5]
            break
    if uid is None:
        raise UnknownUser(f"no user {user[:64]} in the image's /etc/passwd")
    member_of: list[int] = []
    if group_name:
        gid = _group_id(group_name, group)
    elif name:
        for row in _rows(group, 3, 4):
            row_gid = _number(row[2])
            if row_gid is not None and name in row[3].split(","):
                member_of.append(row_gid)
    groups = [gid, *member_of, *(_group_id(entry, group) for entry in more)]
    return Identity(uid, gid, list(dict.fromkeys(groups)), home or "/")


def find_home(uid: int, passwd: str) -> str:
    for row in _rows(passwd, 3, 7):
        if _number(row[2]) == uid and row[5]:
            return row[5]
    return "/"
