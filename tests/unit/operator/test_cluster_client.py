"""What the client makes of an API server's answers."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from lightkube.config.kubeconfig import KubeConfig
from lightkube.config.models import Cluster, User

from katapod.operator.cluster.client import ClusterClient
from katapod.operator.cluster.errors import ClusterFailed

NO_GROUP = (404, "text/plain; charset=utf-8", b"404 page not found\n")
NO_RESOURCE = (404, "application/json", b'{"kind": "Status", "code": 404, "reason": "NotFound", "message": "no"}')
EMPTY = (200, "application/json", b'{"kind": "MachineConfigPoolList", "metadata": {}, "items": []}')
REFUSED = (
    403,
    "application/json",
    b'{"kind": "Status", "code": 403, "reason": "Forbidden", "message": "it is forbidden"}',
)
BROKEN = (502, "text/html", b"<h1>Bad Gateway</h1>")


class Server(ThreadingHTTPServer):
    answer = EMPTY


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        status, kind, body = self.server.answer
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


async def has_machine_configs(server: Server, answer: tuple[int, str, bytes]) -> bool:
    server.answer = answer
    address = f"http://127.0.0.1:{server.server_port}"
    config = KubeConfig.from_one(user=User(token="-"), cluster=Cluster(server=address), context_name="test")
    client = ClusterClient(config, "katapod")
    try:
        return await client.has_machine_configs()
    finally:
        await client.close()


@pytest.mark.parametrize(("answer", "there"), [(NO_GROUP, False), (NO_RESOURCE, False), (EMPTY, True)])
async def test_whether_there_are_machine_configs(server: Server, answer: tuple[int, str, bytes], there: bool) -> None:
    """An API server says of a group that it does not know in plain text that there is no such page."""
    assert await has_machine_configs(server, answer) is there


@pytest.mark.parametrize(("answer", "why"), [(REFUSED, "it is forbidden"), (BROKEN, "502 Bad Gateway")])
async def test_no_answer_to_that_is_not_a_no(server: Server, answer: tuple[int, str, bytes], why: str) -> None:
    with pytest.raises(ClusterFailed, match=f"cannot list MachineConfigPools: .*{why}"):
        await has_machine_configs(server, answer)
