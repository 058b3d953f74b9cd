"""What skopeo 1.9 and umoci 0.4 said, word for word, and what we make of it."""

import pytest

from katapod.images.errors import (
    BrokenImage,
    ImageError,
    ImageNotFound,
    RegistryDenied,
    RegistryUnreachable,
    StoreFull,
    WrongPlatform,
)
from katapod.images.failures import crash_of, explain_failure, last_words


def _fatal(message: str) -> str:
    return f'time="2024-01-01T00:00:00Z" level=fatal msg="{message}"\n'


SAID = [
    (
        (
            'initializing source docker://127.0.0.1:1/x:1: pinging container registry 127.0.0.1:1: Get \\"https://'
            '127.0.0.1:1/v2/\\": dial tcp 127.0.0.1:1: connect: connection refused'
        ),
        RegistryUnreachable,
    ),
    (
        "pinging container registry a.invalid: dial tcp: lookup a.invalid on 192.0.2.1:53: no such host",
        RegistryUnreachable,
    ),
    ('Get \\"https://h/v2/\\": http: server gave HTTP response to HTTPS client', RegistryUnreachable),
    ("x509: certificate signed by unknown authority", RegistryUnreachable),
    ("reading manifest 1 in 127.0.0.1:5/app: unauthorized: authentication required", RegistryDenied),
    ("reading manifest 2 in 127.0.0.1:5/app: manifest unknown: manifest unknown", ImageNotFound),
    ('initializing source oci-archive:oa.tar:none: no descriptor found for reference \\"none\\"', ImageNotFound),
    (
        (
            "determining manifest MIME type for docker-archive:d.tar:docker.io/library/none:1: "
            'Tag \\"docker.io/library/none:1\\" not found'
        ),
        ImageNotFound,
    ),
    ("initializing source oci:lay:: more than one image in oci, choose an image", ImageNotFound),
    (
        'no image found in image index for architecture amd64, variant \\"\\", OS linux',
        WrongPlatform,
    ),
    ("loading tar component manifest.json: unexpected EOF", BrokenImage),
    ("loading tar component manifest.json: archive/tar: invalid tar header", BrokenImage),
    ("loading tar component manifest.json: file does not exist", BrokenImage),
    ('loading tar component \\"manifest.json\\": file does not exist', BrokenImage),  # skopeo 1.18, Debian 13
    ("open /var/tmp/oci4088676864/index.json: no such file or directory", BrokenImage),
    ("happened during read: Digest did not match, expected sha256:22, got sha256:9d", BrokenImage),
    ("committing the finished image: write small/o/oci-layout: no space left on device", StoreFull),
    ("writing blob: unexpected EOF after write x: no space left on device", StoreFull),
]


@pytest.mark.parametrize(("message", "kind"), SAID)
def test_known_failures(message: str, kind: type[ImageError]) -> None:
    error = explain_failure("pull docker://x", _fatal(message), "exit status 1")
    assert type(error) is kind
    assert str(error).startswith("cannot pull docker://x: ")
    assert message.replace('\\"', '"') in str(error)


def test_umoci_failures() -> None:
    output = (
        "   \N{BULLET} unpacking rootfs ...\n   \N{VECTOR OR CROSS PRODUCT} create rootfs: unpack layer: "
        "unpack entry: .: malicious tar entry -- refusing to change type of root directory\n"
    )
    assert last_words(output).startswith("create rootfs: unpack layer")
    assert type(explain_failure("unpack x", output, "exit status 1")) is BrokenImage


CRASH = (
    "panic: d.nx != 0\n\ngoroutine 21 [running]:\ncrypto/sha256.(*digest).checkSum(0xc00004aa50)\n"
    "\tcrypto/sha256/sha256.go:243 +0x192\ncreated by github.com/klauspost/pgzip.(*Reader).doReadAhead\n"
    "\tgithub.com/klauspost/pgzip/gunzip.go:379 +0x2aa\n"
)


def test_a_crash_is_told_by_its_message_and_not_by_its_stack() -> None:
    assert crash_of(CRASH) == "panic: d.nx != 0"
    error = explain_failure("unpack x", CRASH, "exit status 2")
    assert (type(error), str(error)) == (ImageError, "cannot unpack x: it crashed: panic: d.nx != 0")
    for other in ("", "reading panic: a file of that name", "panic: at the disco\n"):
        assert crash_of(other) is None


def test_unknown_and_silent_failures_are_shown_whole() -> None:
    error = explain_failure("import x", "one\nsomething new went wrong\n", "exit status 1")
    assert (type(error), str(error)) == (ImageError, "cannot import x: something new went wrong")
    assert str(explain_failure("import x", "", "killed by SIGKILL")) == "cannot import x: killed by SIGKILL"
