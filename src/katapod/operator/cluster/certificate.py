"""The webhook's certificate: made by openssl for itself, and kept in a Secret, so that all operators have the same.

The API server trusts what the webhook's configuration has in caBundle: the certificate and, while it is being
exchanged, the one before.
"""

import asyncio
import base64
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from katapod.model.errors import MissingProgram
from katapod.operator.names import MANAGED_BY, MANAGER

__all__ = ["Certificate", "ca_bundle", "is_due", "make_certificate", "parse_secret", "secret_body"]

SECRET = "katapod-webhook"  # noqa: S105 - its name
DAYS = 90
RENEW_BEFORE = timedelta(days=30)
LIMIT_S = 60.0


class Certificate(msgspec.Struct, frozen=True):
    certificate: str  # PEM
    key: str  # PEM
    until: datetime
    names: tuple[str, ...]
    before: str = ""  # PEM of the certificate before this one
    version: str = ""  # the Secret's resourceVersion


def ca_bundle(one: Certificate) -> str:
    """As caBundle has it."""
    return base64.b64encode((one.certificate + one.before).encode()).decode()


def is_due(one: Certificate | None, names: Sequence[str], now: datetime) -> bool:
    return one is None or one.until - now < RENEW_BEFORE or one.names != tuple(names)


async def make_certificate(names: Sequence[str], before: Certificate | None = None) -> Certificate:
    """Valid for DAYS. Raises MissingProgram, or OSError if openssl makes none."""
    with tempfile.TemporaryDirectory(prefix="katapod-") as directory:
        key, certificate = Path(directory, "tls.key"), Path(directory, "tls.crt")
        words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", str(DAYS)]
        words += [
            "-subj",
            f"/CN={names[0][:64]}",
            "-addext",
            f"subjectAltName={','.join(f'DNS:{one}' for one in names)}",
        ]
        words += ["-addext", "extendedKeyUsage=serverAuth", "-keyout", str(key), "-out", str(certificate)]
        until = datetime.now(UTC) + timedelta(days=DAYS)
        try:
            process = await asyncio.create_subprocess_exec(
                "openssl", *words, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
            )
        except FileNotFoundError as exc:
            raise MissingProgram("cannot find openssl", hint="install openssl, or run without --webhook") from exc
        async with asyncio.timeout(LIMIT_S):
            _, said = await process.communicate()
        if process.returncode:
            raise OSError(f"openssl ended with {process.returncode}: {said.decode(errors='replace')[-500:]}")
        old = before.certificate if before is not None else ""
        version = before.version if before is not None else ""
        return Certificate(certificate.read_text(), key.read_text(), until, tuple(names), old, version)


def secret_body(one: Certificate, namespace: str) -> dict[str, Any]:
    texts = {"tls.crt": one.certificate, "tls.key": one.key, "before.crt": one.before}
    texts |= {"until": one.until.isoformat(), "names": ",".join(one.names)}
    metadata = {"name": SECRET, "namespace": namespace, "labels": {MANAGED_BY: MANAGER}}
    return {
        "metadata": metadata | ({"resourceVersion": one.version} if one.version else {}),
        "type": "kubernetes.io/tls",
        "data": {name: base64.b64encode(text.encode()).decode() for name, text in texts.items()},
    }


def parse_secret(body: Mapping[str, Any]) -> Certificate | None:
    """None for one that makes no sense: another one takes its place."""
    try:
        texts = {name: base64.b64decode(text).decode() for name, text in (body.get("data") or {}).items()}
        return Certificate(
            texts["tls.crt"],
            texts["tls.key"],
            datetime.fromisoformat(texts["until"]),
            tuple(texts["names"].split(",")),
            texts.get("before.crt", ""),
            body["metadata"].get("resourceVersion", ""),
        )
    except (KeyError, ValueError):
        return None
