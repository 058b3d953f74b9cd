"""`run`'s flags: what becomes a request, and what is refused before anything is touched."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from katapod.cli import run
from katapod.cli.settings import Globals
from katapod.model.errors import KatapodError
from katapod.supervisor import run as supervisor
from katapod.supervisor.run_context import RunContext
from katapod.supervisor.run_request import RunRequest


class Door:
    """`run` with its last step replaced: what it would have done is kept."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, RunRequest]] = []

    def __call__(self, *words: str) -> RunRequest:
        done = CliRunner().invoke(run.run, words, obj=Globals())
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return self.requests[-1][1]


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Door:
    found = Door()

    async def attached(context: RunContext, request: RunRequest) -> int:
        found.requests.append(("attached", request))
        return 0

    def detached(context: RunContext, request: RunRequest) -> int:
        found.requests.append(("detached", request))
        return 0

    monkeypatch.setattr(supervisor, "run_attached", attached)
    monkeypatch.setattr(supervisor, "run_detached", detached)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    return found


def test_words_after_the_image_are_the_command_s(door: Door) -> None:
    request = door("--rm", "busybox", "ls", "-l", "--rm", "-it")
    assert (request.image, request.options.args, request.remove) == ("busybox", ("ls", "-l", "--rm", "-it"), True)
    assert (request.interactive, request.options.tty) == (False, False)


def test_defaults(door: Door) -> None:
    request = door("busybox")
    assert len(request.container_id) == 12
    assert request.options.hostname == request.container_id
    assert (request.remove, request.accel, request.rootfs, request.bundle, request.labels) == (
        False,
        "",
        None,
        None,
        {},
    )
    assert request.options.entrypoint is None
    assert door.requests[-1][0] == "attached"


def test_many_flags(door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FROM_HOST", "h")
    (tmp_path / "env").write_text("# comment\nFILE=f\n")
    request = door(
        *("-d", "--name", "web", "-e", "A=1", "-e", "FROM_HOST", "--env-file", "env", "-w", "/w", "-u", "1:2"),
        *("-v", f"{tmp_path}:/data:ro", "--tmpfs", "/t", "-m", "64m", "--cpus", "1.5", "--read-only"),
        *("--cap-add", "net_admin", "--cap-drop", "ALL", "--entrypoint", "", "-h", "host", "-l", "k=v"),
        *("--stop-signal", "QUIT", "--security-opt", "no-new-privileges", "--accel", "tcg"),
        *("--group-add", "video", "--group-add", "7", "busybox", "x"),
    )
    options = request.options
    assert door.requests[-1][0] == "detached"
    assert (request.container_id, request.accel, request.stop_signal, request.labels) == ("web", "tcg", 3, {"k": "v"})
    assert options.env == ("FILE=f", "A=1", "FROM_HOST=h")
    assert (options.memory_bytes, options.cpus, options.read_only, options.entrypoint) == (64 << 20, 1.5, True, "")
    assert (options.cap_add, options.cap_drop) == (("CAP_NET_ADMIN",), ("ALL",))
    assert options.groups == ("video", "7")
    assert (options.hostname, options.cwd, options.no_new_privileges) == ("host", "/w", True)


def test_flags_around_a_container(door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FROM_HOST", "h")
    (tmp_path / "labels").write_text("# comment\na=file\n\nb=file\n")
    request = door(
        *("--name", "web", "--replace", "--cidfile", "cid", "-a", "stdout", "--env-host", "-e", "A=1", "--rm", "--rmi"),
        *("-v", "db:/db", "-v", "/anonymous", "--mount", "type=bind,src=.,dst=/src", "--mount", "type=tmpfs,dst=/t"),
        *("--label-file", "labels", "-l", "b=line", "--annotation", "x=y", "--stop-timeout", "3", "--pull", "always"),
        *("-q", "--authfile", "auth", "--tls-verify=false", "--cpuset-cpus", "0", "--cpu-quota", "50000", "-m", "64m"),
        *("--memory-swap", "64m", "--memory-reservation", "32m", "--oom-score-adj", "5", "--umask", "077", "-P"),
        *("--expose", "53/udp", "--dns-search", "a.example", "--dns-opt", "ndots:2", "--no-hosts", "--domainname", "n"),
        *("--log-driver", "json-file", "--log-opt", "max-size=1m", "--restart", "no", "--userns=host", "busybox"),
    )
    options, policy = request.options, request.image_policy
    assert (request.replace, request.remove_image, request.cid_file) == (True, True, tmp_path / "cid")
    assert request.attach == ("stdout",)
    assert {"FROM_HOST=h", "A=1"} <= set(options.env)
    assert [(each.name, each.destination) for each in options.named_volumes] == [("db", "/db"), ("", "/anonymous")]
    assert [each.source for each in options.volumes] == [str(tmp_path)]
    assert [each.destination for each in options.tmpfs] == ["/t"]
    assert (request.labels, options.annotations) == ({"a": "file", "b": "line"}, {"x": "y"})
    assert (policy.pull, policy.quiet, policy.tls_verify, policy.authfile) == ("always", True, False, tmp_path / "auth")
    assert (request.stop_timeout_s, request.cpus_allowed, options.cpus) == (3, frozenset({0}), 0.5)
    assert (options.memory_bytes, options.memory_reservation_bytes) == (64 << 20, 32 << 20)
    assert (options.oom_score_adj, options.umask, options.domainname) == (5, 0o77, "n")
    assert request.publish_all
    assert [(port.container_port, port.protocol) for port in request.exposed] == [(53, "udp")]
    network = request.network
    assert (network.search, network.options, network.no_hosts) == (("a.example",), ("ndots:2",), True)
    assert (request.log.keep, request.log.size_bytes) == (True, 1 << 20)


def test_security_options(door: Door, tmp_path: Path) -> None:
    profile = tmp_path / "seccomp: mine.json"
    profile.write_text('{"defaultAction": "SCMP_ACT_ALLOW", "archMap": []}')
    for form in (f"seccomp={profile}", f"seccomp:{profile}"):
        options = door("--security-opt", form, "--security-opt", "systempaths=unconfined", "busybox").options
        assert options.seccomp is not None
        assert (options.seccomp.default_action, options.system_paths) == ("SCMP_ACT_ALLOW", True)
    for form, on in (("", True), (":true", True), ("=true", True), ("=false", False), (":false", False)):
        assert door("--security-opt", f"no-new-privileges{form}", "busybox").options.no_new_privileges is on
    unconfined = ("seccomp=unconfined", "seccomp:unconfined", "apparmor=unconfined", "label=disable")
    plain = door("busybox").options
    options = door(*(word for form in unconfined for word in ("--security-opt", form)), "busybox").options
    assert (options.seccomp, options.system_paths, options.no_new_privileges) == (None, False, False)
    assert options.cap_add == plain.cap_add


def test_a_rootfs_takes_the_place_of_the_image(door: Door, tmp_path: Path) -> None:
    request = door("--rootfs", str(tmp_path), "sh", "-c", "x")
    assert (request.image, request.rootfs, request.options.args) == ("", tmp_path, ("sh", "-c", "x"))


def test_a_bundle_runs_as_it_is(door: Door, tmp_path: Path) -> None:
    request = door("--bundle", str(tmp_path), "--rm", "-t")
    assert (request.image, request.bundle, request.options.args) == ("", tmp_path, ())


def _refuse(door: Door, words: tuple[str, ...], cause: str) -> None:
    with pytest.raises(KatapodError, match=cause):
        door(*words)
    assert door.requests == []


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ((), "no image given"),
        (("--rootfs", "/r", "--bundle", "/b"), "cannot use --rootfs and --bundle together"),
        (("--bundle", "/b", "sh"), "its command is in its config.json"),
        (("--bundle", "/b", "-m", "64m"), "cannot change memory_bytes of a bundle by a flag"),
        (("--bundle", "/b", "-e", "A=1"), "cannot change env of a bundle by a flag"),
        (("--bundle", "/b", "--entrypoint", "x"), "cannot change entrypoint of a bundle by a flag"),
        (("-it", "busybox"), "standard input is not a terminal"),
        (("-id", "busybox"), "cannot use -i with -d"),
        (("--accel", "warp", "busybox"), "it must be auto, kvm, uml or tcg"),
        (("--name", "a/b", "busybox"), "it has a slash"),
        (("--name", "x" * 300, "busybox"), "300 characters"),
        (("--name", "..", "busybox"), "not allowed"),
        (("-m", "lots", "busybox"), "lots"),
        (("--cpus", "-1", "busybox"), "-1"),
        (("-v", "nonsense", "busybox"), "nonsense"),
        (("--mount", "type=bind", "busybox"), "it has no target"),
        (("--sig-proxy=false", "busybox"), "the process in the foreground holds the container"),
        (("--replace", "busybox"), "it needs --name"),
        (("--rmi", "busybox"), "the container that stays uses the image"),
        (("--cpus", "1", "--cpu-quota", "50000", "busybox"), "they say the same"),
        (("--memory-swap", "1g", "busybox"), "it needs a memory limit"),
        (("-m", "64m", "--memory-swap", "1g", "busybox"), "a guest has no swap"),
        (("-m", "64m", "--memory-reservation", "1g", "busybox"), "it is more than the limit"),
        (("--cidfile", "/dev/null", "busybox"), "it is there already"),
        (("--label-file", "/none/such", "busybox"), "cannot read --label-file /none/such"),
        (("--platform", "plan9/mips", "busybox"), "has this machine's processor"),
        (("--cap-add", "FLY", "busybox"), "FLY"),
        (("--env-file", "/none/such", "busybox"), "cannot read --env-file /none/such"),
        (("--security-opt", "seccomp=/none/such", "busybox"), "cannot read the seccomp profile /none/such"),
        (("--security-opt", "shields=up", "busybox"), "it is unknown"),
        (("--security-opt", "apparmor=my-profile", "busybox"), "it is unknown"),
        (("--security-opt", "label=type:my_t", "busybox"), "it is unknown"),
        (("--security-opt", "no-new-privileges=perhaps", "busybox"), "it is unknown"),
        (("--stop-signal", "NOPE", "busybox"), "NOPE"),
        (("--restart", "sometimes", "busybox"), "it is none of no, always"),
        (("--restart", "always", "--rm", "busybox"), "with --rm"),
    ],
)
def test_refused(door: Door, words: tuple[str, ...], cause: str) -> None:
    _refuse(door, words, cause)


def test_another_user_is_refused(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    _refuse(door, ("busybox",), "cannot run: this needs root")


def test_the_status_is_the_container_s(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    async def seven(*_: Any) -> int:
        return 7

    monkeypatch.setattr(supervisor, "run_attached", seven)
    result = CliRunner().invoke(run.run, ["busybox"], obj=Globals(), standalone_mode=False)
    assert result.return_value == 7
