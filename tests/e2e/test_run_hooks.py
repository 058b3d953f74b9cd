"""The host's hooks of an OCI bundle that `run` starts: in their order, with the state on their standard input."""

import json
from pathlib import Path
from typing import Any

import pytest

from kit.kata import Kata, wait_for

KINDS = ("prestart", "createRuntime", "poststart", "poststop")
STATUS = dict(zip(KINDS, ("created", "created", "running", "stopped"), strict=True))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    for name in ("bin", "dev", "proc", "sys", "tmp"):
        (folder / "rootfs" / name).mkdir(parents=True)
    (folder / "rootfs/bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (folder / "rootfs/bin/busybox").chmod(0o755)
    for name in ("echo", "sh", "sleep"):
        (folder / "rootfs/bin" / name).symlink_to("busybox")
    return folder


def write_spec(bundle: Path, hooks: dict[str, Any], *args: str) -> None:
    spec = {
        "ociVersion": "1.0.2",
        "process": {"args": args, "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"]},
        "root": {"path": "rootfs"},
        "hostname": "hooked",
        "linux": {"namespaces": [{"type": kind} for kind in ("network", "mount", "pid", "ipc", "uts")]},
        "annotations": {"answer": "42"},
        "hooks": hooks,
    }
    (bundle / "config.json").write_text(json.dumps(spec))


def hook(notes: Path, kind: str, *, code: int = 0) -> dict[str, Any]:
    """Notes the state that it gets, its directory, and which program its pid is."""
    out = notes / kind
    script = f"""cat > {out}.state; pwd > {out}.pwd; echo {kind} >> {notes}/order
        pid=$(sed -n 's/.*"pid":\\([0-9]*\\).*/\\1/p' {out}.state)
        test -z "$pid" || tr '\\0' ' ' < /proc/$pid/cmdline > {out}.pid
        echo "no luck today" >&2; exit {code}"""
    return {"path": "/bin/sh", "args": ["my-hook", "-c", script], "timeout": 20}


def test_hooks_run_in_order_with_the_state(kata: Kata, bundle: Path, tmp_path: Path, accelerator: str) -> None:
    hooks: dict[str, Any] = {kind: [hook(tmp_path, kind)] for kind in KINDS}
    hooks["poststart"].insert(0, {"path": "/no/such/hook"})  # is told of, and the others run
    write_spec(bundle, hooks, "echo", "from the guest")
    name = kata.name()
    result = kata("run", "--rm", "--name", name, "--bundle", str(bundle))
    assert (result.code, result.stdout) == (0, "from the guest\n")
    assert "cannot run the poststart hook /no/such/hook" in result.stderr
    assert (tmp_path / "order").read_text().split() == list(KINDS)
    for kind in KINDS:
        state = json.loads((tmp_path / f"{kind}.state").read_text())
        assert (state["id"], state["status"], state["annotations"]) == (name, STATUS[kind], {"answer": "42"})
        assert state["bundle"] == str(bundle) == (tmp_path / f"{kind}.pwd").read_text().strip()
        assert ("pid" in state) == (kind != "poststop")
    vmm = "linux.uml" if accelerator == "uml" else "qemu"
    assert vmm in (tmp_path / "createRuntime.pid").read_text(), "it has the sandbox's network namespace"


def test_in_the_background_it_has_started_when_its_hooks_have_ended(kata: Kata, bundle: Path, tmp_path: Path) -> None:
    write_spec(bundle, {kind: [hook(tmp_path, kind)] for kind in KINDS}, "sleep", "600")
    name = kata.name()
    kata.ok("run", "-d", "--name", name, "--bundle", str(bundle))
    assert (tmp_path / "order").read_text().split() == list(KINDS[:3])
    assert kata("delete", "--force", name).code == 0
    assert (tmp_path / "order").read_text().split() == list(KINDS)


def test_a_create_runtime_hook_that_fails_undoes_the_start(kata: Kata, bundle: Path, tmp_path: Path) -> None:
    hooks = {kind: [hook(tmp_path, kind, code=3 if kind == "createRuntime" else 0)] for kind in KINDS}
    write_spec(bundle, hooks, "echo", "never")
    name = kata.name()
    result = kata("run", "--name", name, "--bundle", str(bundle))
    assert (result.code, result.stdout) == (125, "")
    wanted = f"kata-runtime: cannot run the createRuntime hook /bin/sh of {name}: exit status 3: no luck today\n"
    assert result.stderr.endswith(wanted)
    assert (tmp_path / "order").read_text().split() == ["prestart", "createRuntime", "poststop"]
    assert kata("logs", name).code != 0, "nothing of it is left"
    wait_for(lambda: not Path(f"/run/vc/sbs/{name}").exists(), "its state has been removed")
