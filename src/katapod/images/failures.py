"""Maps the error output of skopeo and umoci to our errors. Pure.

Both programs report every failure with exit status 1 and a message, so only the text tells a missing tag from a full
disk. The phrases are those of Go's standard library, of containers/image and of the registry protocol; a message that
matches none becomes a plain ImageError that shows it in full.
"""

import re

from katapod.images.errors import (
    BrokenImage,
    ImageError,
    ImageNotFound,
    RegistryDenied,
    RegistryUnreachable,
    StoreFull,
    WrongPlatform,
)

__all__ = ["NO_SPACE", "crash_of", "explain_failure", "last_words"]

TAIL_CHARS = 2000
OUTPUT_CHARS = 64 * 1024  # of the end of the output, which is searched; registries can influence it
NO_SPACE = "no space left on device"
_CRASH = re.compile(r"^(?:panic|fatal error): .*$", re.MULTILINE)
_LEVEL = re.compile(r"level=(?:fatal|error) msg=")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*+)"')

# The order matters: a copy that fails on a full disk also reports an unexpected EOF.
_CAUSES: tuple[tuple[str, type[ImageError], str, str], ...] = (
    (
        rf"{NO_SPACE}|disk quota exceeded",
        StoreFull,
        "no space left in the image store",
        "free some space on its file system, or remove images that are not needed: kata-runtime image rm NAME",
    ),
    (
        r"server gave HTTP response to HTTPS client",
        RegistryUnreachable,
        "the registry uses plain HTTP",
        "use --tls-verify=false if you trust the network to that registry",
    ),
    (
        r"x509: |tls: |certificate",
        RegistryUnreachable,
        "the registry's certificate is not trusted",
        "install its CA certificate on this host, or use --tls-verify=false if you trust the network",
    ),
    (
        (
            r"unauthorized|authentication required|access to the resource is denied|invalid username/password"
            r"|status code 40[13]|denied:"
        ),
        RegistryDenied,
        "the registry asks for other credentials",
        "log in with `skopeo login HOST`, or name a file of credentials with --authfile",
    ),
    (
        r"connection refused",
        RegistryUnreachable,
        "connection refused",
        "is the registry running, and are host and port right?",
    ),
    (
        r"no such host|server misbehaving|Temporary failure in name resolution",
        RegistryUnreachable,
        "its host name is not known",
        "check the host name and this host's DNS",
    ),
    (
        (
            r"i/o timeout|TLS handshake timeout|network is unreachable|no route to host|connection reset"
            r"|context deadline exceeded|dial tcp|status code 5\d\d|toomanyrequests"
        ),
        RegistryUnreachable,
        "the registry cannot be reached",
        "try again; check the network and proxy settings (HTTPS_PROXY)",
    ),
    (
        r"no image found in",
        WrongPlatform,
        "it has no variant for this machine",
        "",
    ),
    (
        r"more than one image in oci|expected 1 item, got \d+",
        ImageNotFound,
        "it holds several images and no tag was given",
        "add the tag: oci:PATH:TAG, docker-archive:FILE:NAME:TAG",
    ),
    (
        (
            r"manifest unknown|name unknown|no descriptor found for reference|[Tt]ag \"[^\"]*\" not found"
            r"|repository .* not found|status code 404"
        ),
        ImageNotFound,
        "there is no image with that name or tag",
        "",
    ),
    (
        (
            r'unexpected EOF|invalid tar header|invalid header|manifest\.json"?: file does not exist'
            r"|(index\.json|oci-layout|manifest\.json): no such file|digest mismatch|diffid mismatch"
            r"|did not match|does not match|invalid image detected|corrupt input|invalid checksum|unmarshal"
            r"|invalid character"
            r"|malicious tar entry|blobs/sha256/[0-9a-f]*: no such file|invalid JSON|unpack layer|unpack manifest"
        ),
        BrokenImage,
        "it is damaged or not a container image",
        "",
    ),
)


def crash_of(output: str) -> str | None:
    """The message with which a program in Go crashed, if `output` tells of a crash (package runtime of Go)."""
    crash = _CRASH.search(output[-OUTPUT_CHARS:])
    return crash[0][-TAIL_CHARS:] if crash and "\ngoroutine " in output else None


def last_words(output: str) -> str:
    """The final message of a failed skopeo or umoci, without time stamps and markers."""
    if crash := crash_of(output):
        return f"it crashed: {crash}"
    lines = [line.strip() for line in output[-OUTPUT_CHARS:].strip().splitlines() if line.strip()]
    for line in reversed(lines):
        level = _LEVEL.search(line)
        if level and (logged := _QUOTED.match(line, level.end())):
            return logged[1].replace('\\"', '"').replace("\\\\", "\\")[-TAIL_CHARS:]
        if line.startswith("\N{VECTOR OR CROSS PRODUCT}"):
            return line.lstrip("\N{VECTOR OR CROSS PRODUCT} ")[-TAIL_CHARS:]
    return lines[-1][-TAIL_CHARS:] if lines else ""


def explain_failure(doing: str, output: str, status: str) -> ImageError:
    """The error "cannot <doing>: ..." from a program's `output` or, if there is none, its status."""
    words = last_words(output)
    for pattern, kind, cause, hint in _CAUSES:
        if re.search(pattern, words):
            return kind(f"cannot {doing}: {cause} ({words})", hint=hint)
    return ImageError(f"cannot {doing}: {words or status}")
