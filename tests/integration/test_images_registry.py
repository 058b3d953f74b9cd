"""Pulls from a real registry on loopback, with and without credentials, and its failures."""

import base64
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from images_helper import Layout, Registry, children_of, file, layer, registry

from katapod.images import (
    Access,
    ImageNotFound,
    ImageStore,
    RegistryDenied,
    RegistryUnreachable,
    WrongPlatform,
)
from katapod.model.ids import parse_container_name

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners, devices and capabilities need root")

C1 = parse_container_name("c1")
# someone:secret, bcrypt with 16 rounds
HTPASSWD = "someone:$2b$04$rVtIy2ctX67K1bU33J2HJuxdeLLgiNSUpGkD1eUM9OqlECfYB83Ca\n"


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store", stall_timeout_s=20)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Registry]:
    with registry(tmp_path) as running:
        yield running


def left_behind(store: ImageStore) -> list[str]:
    return [*os.listdir(store.root / "tmp"), *os.listdir(store.root / "images")]


async def test_pull_by_tag_and_by_digest(store: ImageStore, layout: Layout, server: Registry) -> None:
    layout.add("t", layer(file("a", os.urandom(1 << 20))), layer(file("b", b"2")), config={"Cmd": ["b"]})
    server.push(layout.ref("t"), "team/app:1.0")
    seen: list[tuple[str, int, int | None]] = []
    record = await store.pull(f"docker://{server.address}/team/app:1.0", progress=lambda *step: seen.append(step))
    assert record.names == (f"{server.address}/team/app:1.0",)
    assert record.source == f"docker://{server.address}/team/app:1.0"
    assert record.config.cmd == ("b",)
    assert sorted(os.listdir(store.rootfs_path(record.digest))) == ["a", "b"]
    assert [step for step in seen if step[0] == "copy"][-1][1] > 1 << 20

    digest = next(iter(json.loads((store.root / "names.json").read_text())["names"].values()))["source_digest"]
    pinned = await store.pull(f"docker://{server.address}/team/app@{digest}")
    assert pinned.digest == record.digest
    assert len(pinned.names) == 2

    server.stop()
    assert (await store.resolve(f"docker://{server.address}/team/app:1.0")).digest == record.digest
    assert (await store.resolve("team/app:1.0")).digest == record.digest


async def test_short_names(store: ImageStore, layout: Layout, server: Registry) -> None:
    """Of a name without a registry each of the list is asked, and none once it is stored; one with a registry is asked
    for there."""
    layout.add("t", layer(file("a")))
    server.push(layout.ref("t"), "team/app:1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        silent = f"127.0.0.1:{closed.getsockname()[1]}"
        access = Access(registries=(silent, f"{server.address}/other", f"{server.address}/team"))
        record = await store.resolve("app:1", access=access)
        assert record.names == (f"{server.address}/team/app:1",)
        with pytest.raises(ImageNotFound) as missing:
            await store.resolve("none:1", access=access)
        said = str(missing.value)
        assert said.startswith("cannot find image none:1: it is not in the store; ")
        assert all(each in said for each in (f"{silent}/none:1", "other/none:1", "team/none:1"))
        assert (await store.pull("app:1", "mine:2", access=access)).digest == record.digest
    await store.remove("mine:2")
    await store.remove("app:1")
    full = f"{server.address}/team/app:1"
    with pytest.raises(ImageNotFound, match=r"it is not in the store$"):
        await store.resolve(full)
    assert (await store.resolve(full, access=Access(registries=()))).names == (full,)
    server.stop()
    assert (await store.resolve("app:1", access=access)).digest == record.digest


async def test_same_manifest_is_not_transferred_again(store: ImageStore, layout: Layout, server: Registry) -> None:
    layout.add("t", layer(file("a")))
    server.push(layout.ref("t"), "app:1")
    first = await store.pull(f"docker://{server.address}/app:1")
    seen: list[object] = []
    again = await store.pull(
        f"docker://{server.address}/app:1", "mirror/app:2", progress=lambda *step: seen.append(step)
    )
    assert seen == []
    assert (again.digest, again.created) == (first.digest, first.created)
    assert again.names == (f"{server.address}/app:1", "mirror/app:2")


async def test_moved_tag(store: ImageStore, layout: Layout, server: Registry) -> None:
    reference = f"docker://{server.address}/app:latest"
    layout.add("old", layer(file("old")))
    layout.add("new", layer(file("new")))
    server.push(layout.ref("old"), "app:latest")
    old = await store.acquire(reference, C1)
    server.push(layout.ref("new"), "app:latest")
    assert (await store.resolve(reference)).digest == old.digest, "run uses what is stored"
    new = await store.pull(reference)
    assert os.listdir(store.rootfs_path(new.digest)) == ["new"]
    assert os.listdir(store.rootfs_path(old.digest)) == ["old"], "a container still uses it"
    await store.release(C1)
    assert [item.digest for item in await store.list_images()] == [new.digest]


async def test_index_is_resolved_to_this_platform(store: ImageStore, layout: Layout, server: Registry) -> None:
    mine = layout.add(None, layer(file("mine")))
    arm = layout.add(None, layer(file("arm")), architecture="arm64")
    layout.add_index("both", arm64=arm, amd64=mine)
    layout.add_index("none", arm64=arm)
    server.push(layout.ref("both"), "app:both", "--all")
    server.push(layout.ref("none"), "app:none", "--all")
    record = await store.pull(f"docker://{server.address}/app:both")
    assert os.listdir(store.rootfs_path(record.digest)) == ["mine"]
    with pytest.raises(WrongPlatform, match="is built for arm64/linux, this machine is amd64/linux"):
        await store.pull(f"docker://{server.address}/app:none")


async def test_what_is_not_there(store: ImageStore, layout: Layout, server: Registry) -> None:
    layout.add("t", layer(file("a")))
    server.push(layout.ref("t"), "app:1")
    for name in ("app:2", "nothing:1", "app@sha256:" + "0" * 64):
        with pytest.raises(ImageNotFound, match=f"cannot pull docker://{server.address}/{name}"):
            await store.pull(f"docker://{server.address}/{name}")
    with pytest.raises(RegistryUnreachable, match="uses plain HTTP") as caught:
        await store.pull(f"docker://{server.address}/app:1", access=Access(tls_verify=True))
    assert "--tls-verify=false" in caught.value.hint
    server.stop()
    with pytest.raises(RegistryUnreachable, match="connection refused"):
        await store.resolve(f"docker://{server.address}/app:1")
    assert left_behind(store) == []


async def test_credentials(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    layout.add("t", layer(file("a")))
    (tmp_path / "locked").mkdir()
    with registry(tmp_path / "locked", htpasswd=HTPASSWD) as server:
        server.push(layout.ref("t"), "app:1", "--dest-creds=someone:secret")
        reference = f"docker://{server.address}/app:1"
        wrong, right = (
            _authfile(tmp_path / name, server.address, f"someone:{name}") for name in ("mistaken", "secret")
        )
        for access in (Access(), Access(authfile=wrong)):
            with pytest.raises(RegistryDenied) as caught:
                await store.pull(reference, access=access)
            assert "skopeo login" in caught.value.hint
        assert left_behind(store) == []
        record = await store.pull(reference, access=Access(authfile=right))
    assert record.names == (f"{server.address}/app:1",)


def _authfile(path: Path, address: str, credentials: str) -> Path:
    encoded = base64.b64encode(credentials.encode()).decode()
    path.write_text(json.dumps({"auths": {address: {"auth": encoded}}}))
    return path


async def test_silent_registry_is_given_up(layout: Layout, tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store", stall_timeout_s=1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(RegistryUnreachable, match="no answer within 1 s"):
            await store.pull(f"docker://127.0.0.1:{port}/app:1")
    assert left_behind(store) == []


async def test_transfer_that_stops_moving_is_given_up(layout: Layout, server: Registry, tmp_path: Path) -> None:
    """A proxy lets a layer begin and then holds everything back."""
    layout.add("t", layer(file("a", os.urandom(8 << 20))))
    server.push(layout.ref("t"), "app:1")
    host, _, port = server.address.partition(":")
    store = ImageStore(tmp_path / "store", stall_timeout_s=2)
    with (
        _stalling_proxy((host, int(port)), after_bytes=1 << 20) as address,
        pytest.raises(RegistryUnreachable, match="no data for 2 s"),
    ):
        await store.pull(f"docker://{address}/app:1")
    assert left_behind(store) == []
    assert children_of(store.root) == []


class _stalling_proxy:  # noqa: N801 - used as a with statement
    def __init__(self, target: tuple[str, int], *, after_bytes: int) -> None:
        self._target, self._after_bytes = target, after_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> str:
        threading.Thread(target=self._accept, daemon=True).start()
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._sockets += [client, server]
            threading.Thread(target=self._pump, args=(client, server, None), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, self._after_bytes), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, limit_bytes: int | None) -> None:
        passed_bytes = 0
        try:
            while data := source.recv(65536):
                passed_bytes += len(data)
                if limit_bytes is not None and passed_bytes > limit_bytes:
                    return
                sink.sendall(data)
        except OSError:
            return

    def __exit__(self, *exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for item in (self._listener, *self._sockets):
            item.close()
