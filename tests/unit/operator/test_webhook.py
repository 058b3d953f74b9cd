"""The validating webhook: what it refuses, by which certificate it is served, and how that is exchanged."""

import asyncio
import base64
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import msgspec
import pytest

from katapod.operator.cluster.admission import BadReview, answer
from katapod.operator.cluster.certificate import is_due, make_certificate, parse_secret, secret_body
from katapod.operator.cluster.views import ConfigView, parse_config
from katapod.operator.cluster.webhook import Webhook
from kit.loop_time import until

META = {"name": "kata", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"}
BAD = {"configuration": "[runtime]\nno_such_key = 1\n"}


def review(operation: str = "CREATE", new: Any = None, old: Any = None) -> bytes:
    request = {"uid": "r", "operation": operation, "object": new, "oldObject": old}
    return json.dumps({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}).encode()


def config(name: str = "kata", spec: Any = None, **meta: Any) -> dict[str, Any]:
    return {"metadata": {**META, "name": name, **meta}, "spec": spec or {}}


def asked(text: bytes, *there: dict[str, Any]) -> str:
    """Why it is refused; empty if it is not."""
    views: list[ConfigView] = [parse_config(one) for one in there]
    response = answer(text, views)["response"]
    assert response["uid"] == "r"
    assert response["allowed"] == ("status" not in response)
    return str(response.get("status", {}).get("message", ""))


def test_what_makes_no_sense_is_refused_with_its_path() -> None:
    assert asked(review(new=config(spec={}))) == ""
    assert asked(review(new=config(spec=BAD))) == "spec.configuration:2: [runtime] no_such_key: unknown key"
    assert "spec.configuration:2" in asked(review("UPDATE", config(spec=BAD), config()), config())
    assert "runtimeClasses" in asked(review(new=config(spec={"runtimeClasses": 3})))


def test_a_second_one_is_refused() -> None:
    assert "there is one KataConfig already, kata," in asked(review(new=config("more")), config())
    assert asked(review(new=config("more")), config(deletionTimestamp="2026-01-01T00:00:00Z")) == ""
    assert asked(review("UPDATE", config("more", {"a": 1}), config("more")), config(), config("more")) == ""


def test_one_that_is_bad_can_be_deleted_and_annotated() -> None:
    old = config(spec=BAD, finalizers=["f"])
    assert asked(review("UPDATE", config(spec=BAD), old), old) == ""
    assert (
        asked(review("UPDATE", config(spec={**BAD, "a": 1}, deletionTimestamp="2026-01-01T00:00:00Z"), old), old) == ""
    )
    assert asked(review("DELETE", None, old), old) == ""


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b'{"apiVersion": "v1", "request": {"uid": 1}}', review(new={})])
def test_what_is_no_review_is_refused(text: bytes) -> None:
    with pytest.raises(BadReview):
        answer(text, [])


class Store:
    """A Secret and a webhook's caBundle, as the API server keeps them."""

    namespace = "katapod"

    def __init__(self) -> None:
        self.secret: dict[str, Any] | None = None
        self.versions = 0
        self.bundle: str | None = ""

    async def read_secret(self, name: str) -> dict[str, Any] | None:
        return self.secret

    async def write_secret(self, body: dict[str, Any]) -> dict[str, Any] | None:
        version = self.secret["metadata"]["resourceVersion"] if self.secret else ""
        if body["metadata"].get("resourceVersion", "") != version:
            return None
        self.versions += 1
        self.secret = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.versions)}}
        return self.secret

    async def set_ca_bundle(self, name: str, bundle: str) -> bool:
        self.bundle = bundle
        return True

    def trusted(self) -> ssl.SSLContext:
        assert self.bundle
        return ssl.create_default_context(cadata=base64.b64decode(self.bundle).decode())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def serving(
    store: Store, *, leads: bool = True, is_complete: Callable[[], bool] = lambda: True
) -> AsyncIterator[Webhook]:
    webhook = Webhook(
        store, free_port(), there=lambda: [parse_config(config())], is_complete=is_complete, leads=lambda: leads
    )
    task = asyncio.create_task(webhook.run())
    try:
        yield webhook
    finally:
        task.cancel()
        await asyncio.wait({task})


async def post(webhook: Webhook, text: bytes, trusted: ssl.SSLContext) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session:
        url = f"https://localhost:{webhook.port}/validate"
        async with session.post(url, data=text, ssl=trusted) as answered:
            found: dict[str, Any] = await answered.json() if answered.status == 200 else {"status": answered.status}
            return found


async def reachable(webhook: Webhook) -> None:
    def connects() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("localhost", webhook.port), 5):
            return True
        return False

    await until(connects)


async def test_it_is_served_by_a_certificate_that_the_api_server_trusts() -> None:
    store = Store()
    async with serving(store) as webhook:
        await reachable(webhook)
        found = await post(webhook, review(new=config("more")), store.trusted())
        assert "there is one KataConfig already" in found["response"]["status"]["message"]
        assert await post(webhook, b"what", store.trusted()) == {"status": 400}
        async with serving(store, leads=False) as other:
            await reachable(other)
            assert (await post(other, review(new=config()), store.trusted()))["response"]["allowed"]
        assert store.versions == 1, "all of them have one certificate"


async def test_it_is_ready_once_it_knows_all_kataconfigs() -> None:
    """Before that it would take a second one."""
    store, complete = Store(), False

    async def status() -> int:
        async with aiohttp.ClientSession() as session:
            url = f"https://localhost:{webhook.port}/readyz"
            async with session.get(url, ssl=store.trusted()) as answered:
                return answered.status

    async with serving(store, is_complete=lambda: complete) as webhook:
        await reachable(webhook)
        assert await status() == 503
        complete = True
        assert await status() == 200


async def test_a_certificate_is_exchanged_before_it_ends_and_the_old_one_is_trusted_meanwhile() -> None:
    store, now = Store(), datetime.now(UTC)
    names = ("katapod-operator.katapod.svc", "katapod-operator.katapod.svc.cluster.local", "localhost")
    old = await make_certificate(names)
    assert is_due(None, names, now)
    assert not is_due(old, names, now)
    assert is_due(old, ("other",), now)
    assert is_due(old, names, now + timedelta(days=61))
    await store.write_secret(secret_body(msgspec.structs.replace(old, until=now + timedelta(days=1)), "katapod"))
    async with serving(store) as webhook:
        await reachable(webhook)
        assert store.secret is not None
        new = parse_secret(store.secret)
        assert new is not None
        assert new.certificate != old.certificate
        assert new.before == old.certificate
        assert store.bundle == base64.b64encode((new.certificate + old.certificate).encode()).decode()
        assert (await post(webhook, review(new=config()), store.trusted()))["response"]["allowed"]


async def test_a_secret_that_makes_no_sense_is_replaced() -> None:
    store = Store()
    store.secret = {"metadata": {"resourceVersion": "0"}, "data": {"tls.crt": "!"}}
    async with serving(store) as webhook:
        await reachable(webhook)
        assert parse_secret(store.secret) is not None


async def test_one_that_does_not_act_makes_none() -> None:
    store = Store()
    async with serving(store, leads=False):
        for _ in range(10):
            await asyncio.sleep(0)
        assert store.secret is None
