"""The validating webhook: served by every operator, with one certificate among them, which the one that acts renews."""

import asyncio
import logging
import ssl
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from katapod.model.errors import KatapodError
from katapod.operator.cluster.admission import BadReview, answer
from katapod.operator.cluster.certificate import (
    SECRET,
    Certificate,
    ca_bundle,
    is_due,
    make_certificate,
    parse_secret,
    secret_body,
)
from katapod.operator.cluster.views import ConfigView

__all__ = ["SERVICE", "WEBHOOK", "Webhook"]

log = logging.getLogger(__name__)

SERVICE = "katapod-operator"
WEBHOOK = "katapod-kataconfig"  # the ValidatingWebhookConfiguration
LOOK_S = 30.0  # between two looks at the Secret
REVIEW_BYTES = 4 * 2**20  # an object and the one before: the API server takes 1.5 MiB each
Body = dict[str, Any]


class Store(Protocol):
    """All raise ClusterFailed."""

    namespace: str

    async def read_secret(self, name: str) -> Body | None: ...
    async def write_secret(self, body: Body) -> Body | None:
        """None if somebody else was faster."""
        ...

    async def set_ca_bundle(self, name: str, bundle: str) -> bool:
        """False if there is no such webhook."""
        ...


class Webhook:
    """`there` gives the KataConfigs that are known, `is_complete` whether those are all that there are, `leads` whether
    this operator acts; `port` 0 chooses one."""

    def __init__(
        self,
        store: Store,
        port: int,
        *,
        there: Callable[[], Sequence[ConfigView]],
        is_complete: Callable[[], bool],
        leads: Callable[[], bool],
    ) -> None:
        self.port = port
        self._store = store
        self._there = there
        self._is_complete = is_complete
        self._leads = leads
        self._names = (
            f"{SERVICE}.{store.namespace}.svc",
            f"{SERVICE}.{store.namespace}.svc.cluster.local",
            "localhost",
        )
        self._loaded = ""
        self._asked_by_nobody = False
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)

    async def run(self) -> None:
        app = web.Application(client_max_size=REVIEW_BYTES)
        app.router.add_post("/validate", self._validate)
        app.router.add_get("/readyz", self._readyz)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            while True:
                try:
                    if await self._keep() and not runner.sites:
                        site = web.TCPSite(runner, None, self.port, ssl_context=self._context)
                        await site.start()
                        log.info("the webhook is served at port %d", self.port)
                except (KatapodError, OSError, TimeoutError) as exc:
                    log.warning("cannot serve the webhook: %s", exc or "no answer")
                await asyncio.sleep(LOOK_S if self._loaded else 1.0)
        finally:
            await runner.cleanup()

    async def _keep(self) -> bool:
        """Whether there is a certificate. Raises KatapodError or OSError."""
        body = await self._store.read_secret(SECRET)
        found = parse_secret(body) if body is not None else None
        if self._leads() and is_due(found, self._names, datetime.now(UTC)):
            made = await make_certificate(self._names, found)
            wanted = secret_body(made, self._store.namespace)
            if body is not None:  # also of one that made no sense
                wanted["metadata"]["resourceVersion"] = body["metadata"]["resourceVersion"]
            written = await self._store.write_secret(wanted)
            if written is None:
                return bool(self._loaded)
            found = parse_secret(written)
        if found is None:
            return bool(self._loaded)
        if self._leads():
            nobody = not await self._store.set_ca_bundle(WEBHOOK, ca_bundle(found))
            if nobody and not self._asked_by_nobody:
                log.warning("there is no ValidatingWebhookConfiguration %s: nobody asks this webhook", WEBHOOK)
            self._asked_by_nobody = nobody
        if found.certificate != self._loaded:
            self._load(found)
        return True

    def _load(self, one: Certificate) -> None:
        """Connections from now on have it."""
        with tempfile.TemporaryDirectory(prefix="katapod-") as directory:
            chain, key = Path(directory, "tls.crt"), Path(directory, "tls.key")
            chain.write_text(one.certificate)
            key.write_text(one.key)
            self._context.load_cert_chain(chain, key)
        self._loaded = one.certificate

    async def _readyz(self, request: web.Request) -> web.Response:
        """What the readiness probe asks, by which the Service's endpoints are chosen."""
        if self._is_complete():
            return web.Response(text="ok")
        return web.Response(status=503, text="the objects of the cluster have not been listed yet")

    async def _validate(self, request: web.Request) -> web.Response:
        try:
            return web.json_response(answer(await request.read(), self._there()))
        except BadReview as exc:
            log.warning("%s", exc)
            return web.Response(status=400, text=str(exc))
