"""OCI hooks: what an engine wants done on the host around a container's life, such as nerdctl's networks."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kit.containerd import HANDLERS, Containerd

KATA = HANDLERS["kata"]


def spec_with(hooks: dict[str, Any], rootfs: Path) -> dict[str, Any]:
    return {
        "ociVersion": "1.0.2",
        "process": {"args": ["echo", "from the guest"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"]},
        "root": {"path": str(rootfs)},
        "hostname": "hooked",
        "linux": {"namespaces": [{"type": kind} for kind in ("network", "mount", "pid", "ipc", "uts")]},
        "annotations": {"answer": "42"},
        "hooks": hooks,
    }


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    folder = tmp_path / "rootfs"
    for name in ("bin", "dev", "proc", "sys", "tmp"):
        (folder / name).mkdir(parents=True)
    (folder / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (folder / "bin/busybox").chmod(0o755)
    for name in ("echo", "sh"):
        (folder / "bin" / name).symlink_to("busybox")
    return folder


def hook(tmp_path: Path, kind: str, *, code: int = 0) -> dict[str, Any]:
    """Notes the state that it gets, its own name, and whose network namespace its pid has."""
    out = tmp_path / kind
    script = f"""cat > {out}.state; echo "$0 $1 $COLOUR $HOME" > {out}.seen; echo {kind} >> {tmp_path}/order
        pid=$(sed -n 's/.*"pid":\\([0-9]*\\).*/\\1/p' {out}.state)
        test -z "$pid" || readlink /proc/$pid/ns/net > {out}.netns
        echo "no luck today" >&2; exit {code}"""
    return {"path": "/bin/sh", "args": ["my-hook", "-c", script, "zero", "one"], "env": ["COLOUR=blue"], "timeout": 20}


def test_hooks_run_in_order_with_the_state(ctr: Containerd, rootfs: Path, tmp_path: Path) -> None:
    kinds = ("prestart", "createRuntime", "poststart", "poststop")
    spec = tmp_path / "spec.json"
    failing = {"path": "/no/such/hook"}
    hooks: dict[str, Any] = {kind: [hook(tmp_path, kind)] for kind in kinds}
    hooks["poststart"].insert(0, failing)  # is logged, and the others run
    spec.write_text(json.dumps(spec_with(hooks, rootfs)))
    container = ctr.new_id()
    assert ctr.ok("run", "--rm", "--runtime", KATA, "--config", str(spec), container) == "from the guest\n"
    assert (tmp_path / "order").read_text().split() == list(kinds)
    for kind, status in zip(kinds, ("created", "created", "running", "stopped"), strict=True):
        state = json.loads((tmp_path / f"{kind}.state").read_text())
        assert (state["id"], state["status"], state["annotations"]) == (container, status, {"answer": "42"})
        assert Path(state["bundle"]).name == container
        assert (tmp_path / f"{kind}.seen").read_text() == "zero one blue \n"  # its arguments, and no other environment
    netns = (tmp_path / "createRuntime.netns").read_text().strip()
    assert netns.startswith("net:")
    assert netns != os.readlink("/proc/self/ns/net")


def test_a_hook_that_fails_ends_the_start(ctr: Containerd, rootfs: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(spec_with({"createRuntime": [hook(tmp_path, "createRuntime", code=3)]}, rootfs)))
    container = ctr.new_id()
    result = ctr("run", "--rm", "--runtime", KATA, "--config", str(spec), container)
    assert result.code != 0
    assert "createRuntime hook /bin/sh" in result.stderr
    assert "no luck today" in result.stderr
    assert container not in ctr.ok("tasks", "list")
