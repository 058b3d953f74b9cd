"""The whole flow of a pod, over and over, several at a time: all succeed and nothing is left."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from kit.cri import RUNNING, Cri
from kit.cri_stream import open_stream

pytestmark = pytest.mark.alone

PODS = {"runc": 6, "kata": 30}
AT_ONCE = 3


def one_pod(cri: Cri, number: int) -> str:
    """A pod with two workloads, exec with a terminal, logs, stop, remove; returns what went wrong, or nothing."""
    pod = cri.run_pod()
    try:
        talker = pod.start("sh", "-c", f"echo pod {number}; exec sleep 100000", name="talker")
        sleeper = pod.start("sleep", "100000", name="sleeper")
        for container in (talker, sleeper):
            assert pod.container(container).state == RUNNING
        assert pod.exec(sleeper, "sh", "-c", "echo $((6 * 7)); exit 3") == (3, "42\n", "")
        url = cri("Exec", container_id=talker, cmd=["sh"], tty=True, stdin=True, stdout=True).url
        with open_stream(url, cri.node.netns) as stream:
            stream.expect(b"# ")
            stream.send(b"echo al''ive; exit 5\n")
            stream.expect(b"alive")
            assert stream.finish() == 5
        assert pod.log_text(talker) == [f"pod {number}"]
        cri("StopContainer", container_id=sleeper, timeout=0)
        cri("RemoveContainer", container_id=sleeper)
    except AssertionError as exc:
        return f"pod {number}: {exc}"
    finally:
        pod.stop_and_remove()
    return ""


@pytest.mark.reference
@pytest.mark.timeout(3600)
def test_over_and_over(cri: Cri, handler: str) -> None:
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="pod") as workers:
        failures = [
            failure for failure in workers.map(lambda number: one_pod(cri, number), range(PODS[handler])) if failure
        ]
    assert failures == []
    assert list(cri("ListPodSandbox").items) == []
    assert list(cri("ListContainers").containers) == []
