"""The token for what kata-monitor shows to root only. It is in a file that only root can read.

/run/vc/sbs, the source of that data, has mode 0700, whereas every user of the host can connect to a loopback address.
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
    """The token of this host, made at the first call and kept until the host reboots.

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
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(fresh, path)
    finally:
        os.unlink(fresh)
    return _content(path)


def _content(path: Path) -> str:
    """Raises OSError, also for a file that others can read or have written."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd) as handle:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise PermissionError(1, "others can read it: remove it", str(path))
        return handle.read(TOKEN_MAX).strip()


def is_given(token: str, authorization: str) -> bool:
    """Whether the Authorization header has the token, which is not empty. Source: RFC 6750, section 2.1."""
    given = authorization.removeprefix(BEARER).strip()
    return bool(token) and authorization.startswith(BEARER) and hmac.compare_digest(given.encode(), token.encode())


def link_of(address: str, token: str) -> str:
    """The page's address with the token, as the fragment (#...), which browsers do not send."""
    return f"http://{address}/#token={token}"
