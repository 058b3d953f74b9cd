"""The token with which kata-monitor shows what is for root alone. It lies in a file that only root can read.

/run/vc/sbs, where all of it comes from, has mode 0700; an address of the loopback has none, and all users of the host
reach it.
"""

import contextlib
import hmac
import os
import secrets
from pathlib import Path

__all__ = ["TOKEN_FILE", "is_given", "link_of", "read_token"]

TOKEN_FILE = Path("/run/kata-monitor/token")
TOKEN_MAX = 256  # bytes
BEARER = "Bearer "


def read_token(path: Path = TOKEN_FILE) -> str:
    """The token of this host, which is made when it is first asked for and stays until the host starts anew.

    Raises OSError.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        return _content(path)
    fresh = path.with_name(f".{path.name}-{os.getpid()}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w") as handle:
            handle.write(secrets.token_urlsafe(24) + "\n")
        with contextlib.suppress(FileExistsError):  # another was faster
            os.link(fresh, path)
    finally:
        os.unlink(fresh)
    return _content(path)


def _content(path: Path) -> str:
    """Raises OSError: also for a file that others could read, or have written."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd) as handle:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise PermissionError(1, "others can read it: remove it", str(path))
        return handle.read(TOKEN_MAX).strip()


def is_given(token: str, authorization: str) -> bool:
    """Whether the header Authorization has the token, which is not empty. Source: RFC 6750, section 2.1."""
    given = authorization.removeprefix(BEARER).strip()
    return bool(token) and authorization.startswith(BEARER) and hmac.compare_digest(given.encode(), token.encode())


def link_of(address: str, token: str) -> str:
    """The page's address with the token, which a browser keeps to itself: what stands behind # is not sent."""
    return f"http://{address}/#token={token}"
