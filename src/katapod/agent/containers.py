"""Containers and their processes: the calls from CreateContainer to RemoveContainer.

crun creates and runs them; this module has the bundle, the streams and the responses. Whatever a container acquires is
registered in its `undo` list immediately, so that one function removes a container in any state.
"""

from __future__ import annotations

import json
import os
import signal
import stat

from katapod.agent import crowd, crun, devices, log, room, tree
from katapod.agent.container import Container
from katapod.agent.cpuinfo import mend_cpuinfo
from katapod.agent.launch import Launch, resolve_process
from katapod.agent.namespaces import share_pid_namespace
from katapod.agent.paths import check_id
from katapod.agent.process import Process, read_stdio, write_stdin
from katapod.agent.program import ProgramError
from katapod.agent.spec import cgroup_path, process_json, resources_json, spec_json
from katapod.kernel.mount import MNT_DETACH, MS_BIND, MS_REC, mount, umount
from katapod.kernel.trees import remove_tree, walk_tree
from katapod.rpc.pb import agent_pb2
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from katapod.agent.sandbox import Agent
    from katapod.agent.spare import Spare
    from katapod.rpc.pb import oci_pb2

__all__ = ["destroy", "find_container"]

PROCESSES_MAX = 512  # per container, including those that have ended but are not forgotten
ENDED_KEPT_MAX = 128  # processes whose exit status has been delivered, with output that is unread and not being read
KILL_LIMIT_S = 10.0
ENDING_S = 0.3
FORGET_AFTER_S = 2.0  # virtiofsd lets the kernel cache names for a second
FREEZE_LIMIT_S, FREEZE_POLL_S = 10.0, 0.005
SPARE_AFTER_S, SPARE_PAUSE_S, SPARE_KEPT_S = 1.0, 0.02, 60.0


def find_container(agent: Agent, container_id: str) -> Container:
    """Raises RpcError: INVALID_ARGUMENT for an unknown container, as in the protocol."""
    container = agent.containers.get(container_id)
    if container is None:
        raise RpcError(StatusCode.INVALID_ARGUMENT, f"invalid container id: {container_id[:200]!r}")
    return container


def find_process(agent: Agent, container_id: str, exec_id: str, *, waited: bool = False) -> Process:
    """Raises RpcError: INVALID_ARGUMENT for the container, NOT_FOUND for the process. `waited` includes processes whose
    exit status has been delivered."""
    container = find_container(agent, container_id)
    process = container.processes.get(exec_id or container_id)
    if process is None or (process.waited and not waited):
        raise RpcError(StatusCode.NOT_FOUND, f"no process {exec_id[:200]!r} in container {container_id}")
    return process


async def create_container(agent: Agent, request: agent_pb2.CreateContainerRequest) -> None:
    container_id = check_id(request.container_id, "container id")
    if container_id in agent.containers:
        raise RpcError(StatusCode.ALREADY_EXISTS, f"container {container_id} already exists")
    if not request.HasField("OCI") or not request.OCI.Process.Args:
        raise RpcError(StatusCode.INVALID_ARGUMENT, "cannot create container: the OCI spec has no process")
    above = room.GROUP if agent.room is not None else ""
    container = Container(container_id, above + cgroup_path(container_id, request.OCI.Linux.CgroupsPath))
    agent.containers[container_id] = container
    try:
        await _create(agent, container, request)
    except BaseException:
        await agent.tasks.spawn(f"undo-{container_id}", destroy(agent, container))
        raise
    container.state = "created"
    log.info(f"container {container_id} created")


async def _create(agent: Agent, container: Container, request: agent_pb2.CreateContainerRequest) -> None:
    spec = request.OCI
    _make_room(agent, container)
    timeout_s = agent.options.hotplug_timeout_s
    await devices.apply_devices(agent.loop, request.devices, spec, timeout_s)
    if agent.limits is not None and "CAP_NET_ADMIN" in spec.Process.Capabilities.Bounding:
        from katapod.agent.modules import load_packet_filters  # only in a guest: a host's modules are not ours

        await load_packet_filters(agent.loop)
    if devices.opens_all(spec.Linux.Resources):
        devices.add_guest_devices(spec)
    if spec.Linux.Sysctl:
        from katapod.agent.sysctls import apply_network_sysctls

        apply_network_sysctls(spec)
    os.makedirs(container.bundle, mode=0o711)
    container.undo.append(lambda: tree.remove_bundle(container.bundle))
    if request.files:
        _write_files(f"{container.bundle}/files", request.files)
    held = await agent.storages.add(request.storages, container.id)
    container.undo.append(lambda: agent.storages.release(held))
    rootfs = f"{container.bundle}/rootfs"
    os.mkdir(rootfs)
    if not os.path.isdir(spec.Root.Path):
        raise RpcError(
            StatusCode.INVALID_ARGUMENT, f"cannot create container: no root file system at {spec.Root.Path[:500]!r}"
        )
    mount(spec.Root.Path, rootfs, None, MS_BIND | MS_REC)
    container.undo.append(lambda: umount(rootfs, MNT_DETACH))

    container.annotations = dict(spec.Annotations)
    if agent.hooks:
        from katapod.agent.hooks import add_hooks

        add_hooks(spec, agent.hooks)
    container.has_poststart = bool(spec.Hooks.Poststart)
    container.binds = [(m.source, m.destination) for m in spec.Mounts if m.type == "bind" or "rbind" in m.options]
    automounts = agent.automounts.hold(request.automounts)
    container.undo.append(lambda: agent.automounts.release(automounts))
    container.shared_paths = [*automounts, spec.Root.Path, os.path.dirname(spec.Root.Path)]
    await resolve_process(agent.loop, spec.Process, request.string_user, rootfs, make_cwd=True)
    join_pid = request.sandbox_pidns or agent.sandbox_pidns
    shared = {k: v for k, v in agent.shared_namespaces.items() if k != "pid" or join_pid}
    _adapt_to_guest(agent, spec)
    config = json.dumps(spec_json(spec, rootfs, container.cgroup, shared))
    with open(f"{container.bundle}/config.json", "w") as handle:
        handle.write(config)
    command = Launch(agent.loop, spec.Process, rootfs, container.binds)
    container.undo.append(lambda: _forget_in_crun(agent, container))
    arguments = ["create", "--bundle", container.bundle, container.id]
    async with agent.launches:
        process = await command.run(container.id, arguments, container.bundle, agent.options.container_pipe_size_bytes)
    container.init_pid = process.pid
    container.processes[container.id] = process
    process.ended.on_done(lambda: _init_ended(agent, container))
    if join_pid and "pid" not in agent.shared_namespaces:
        share_pid_namespace(agent.shared_namespaces, process.pid)
    agent.oom.watch(container.id, container.cgroup)
    container.undo.append(lambda: agent.oom.forget(container.id))


def _make_room(agent: Agent, container: Container) -> None:
    """Raises RpcError if there is none for one more container."""
    if agent.limits is not None:
        agent.limits.follow()
    if agent.room is not None:
        agent.room.follow(agent.cpus)
        agent.room.admit(container)


def _write_files(directory: str, files: Iterable[agent_pb2.BundleFile]) -> None:
    """They go with the bundle. Raises RpcError, OSError."""
    os.mkdir(directory, 0o755)
    for file in files:
        path = f"{directory}/{check_id(file.name, 'file name')}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with open(fd, "wb") as handle:
            handle.write(file.data)
        os.chmod(path, 0o644)


def _adapt_to_guest(agent: Agent, spec: oci_pb2.Spec) -> None:
    mend_cpuinfo(spec)
    if agent.options.fixed_addresses and not spec.Linux.Personality.Domain:
        spec.Linux.Personality.Domain = "LINUX"  # without crun's own flags, which it would inherit: addresses at random


def _init_ended(agent: Agent, container: Container) -> None:
    agent.oom.check(container.id)
    container.state = "stopped"
    _drop_spare(container)


def _forget_in_crun(agent: Agent, container: Container) -> None:
    """Remove crun's state, if any; the processes are dead."""
    crun.forget(container.id)
    directory = container.cgroup_directory
    try:
        for parent, name in walk_tree(directory):  # a container may have nested any number of them
            if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                os.rmdir(name, dir_fd=parent)
        os.rmdir(directory)
    except OSError as exc:
        log.debug(f"cannot remove all of {directory}: {exc.filename}: {exc.strerror}")


def kill_all(container: Container) -> None:
    """SIGKILL to every process in the container's cgroup; cgroup.kill does so atomically."""
    try:
        with open(f"{container.cgroup_directory}/cgroup.kill", "w") as handle:
            handle.write("1")
    except FileNotFoundError:
        if container.init_pid and container.state not in ("stopped", "creating"):
            os.kill(container.init_pid, signal.SIGKILL)


async def destroy(agent: Agent, container: Container) -> None:
    """Kill and remove a container in any state. A failed step does not prevent the others."""
    _drop_spare(container)
    try:
        kill_all(container)
        for process in list(container.processes.values()):
            if not await agent.loop.wait_any([process.ended], KILL_LIMIT_S):
                log.warning(f"process {process.pid} of container {container.id} survives SIGKILL")
    except OSError as exc:
        log.warning(f"cannot kill container {container.id}: {exc.strerror}")
    for _ in range(100):
        if not _populated(container):
            break
        await agent.loop.sleep(0.01)
    for process in container.processes.values():
        process.stdio.close()
    while container.undo:
        step = container.undo.pop()
        try:
            step()
        except OSError as exc:
            log.warning(f"container {container.id}: {exc}")
    agent.containers.pop(container.id, None)


def _populated(container: Container) -> bool:
    try:
        with open(f"{container.cgroup_directory}/cgroup.events") as handle:
            return "populated 1" in handle.read()
    except OSError:
        return False


async def start_container(agent: Agent, request: agent_pb2.StartContainerRequest) -> None:
    container = find_container(agent, request.container_id)
    container.require("created", verb="start")
    try:
        if container.has_poststart or not crun.release(container.id):
            await crun.run(agent.loop, ["start", container.id])
    except ProgramError as exc:
        raise RpcError(StatusCode.INTERNAL, f"cannot start container {container.id}: {exc.tail or exc}") from exc
    if container.state == "created":  # it may have ended already
        container.state = "running"
    log.info(f"container {container.id} started")


async def remove_container(agent: Agent, request: agent_pb2.RemoveContainerRequest) -> None:
    """With a timeout (seconds), the container gets that long to end by itself."""
    container = find_container(agent, request.container_id)
    init = container.processes.get(container.id)
    if request.timeout and init is not None:
        await agent.loop.wait_any([init.ended], float(request.timeout))
    # in a task of its own: a host that disconnects meanwhile must not leave a half-removed container
    await agent.tasks.spawn(f"remove-{container.id}", destroy(agent, container))
    agent.tasks.spawn(f"forget-{container.id}", _forget_paths(agent, container.shared_paths))
    log.info(f"container {container.id} removed")


async def _forget_paths(agent: Agent, paths: list[str]) -> None:
    """Look up what the host is removing now: the kernel caches names of the share, which keeps the host's file systems
    mounted, until it learns that they are gone."""
    await agent.loop.sleep(FORGET_AFTER_S)
    for path in paths:
        try:
            os.stat(path)
        except OSError as exc:
            log.debug(f"{path}: {exc.strerror}")


async def exec_process(agent: Agent, request: agent_pb2.ExecProcessRequest) -> None:
    container = find_container(agent, request.container_id)
    exec_id = check_id(request.exec_id, "exec id")
    container.require("running", verb="run a process in")
    if exec_id in container.processes:
        raise RpcError(StatusCode.ALREADY_EXISTS, f"process {exec_id} already exists in container {container.id}")
    if len(container.processes) >= PROCESSES_MAX:
        _drop_oldest_ended(container)
    if len(container.processes) >= PROCESSES_MAX:
        raise RpcError(
            StatusCode.RESOURCE_EXHAUSTED, f"container {container.id} has too many processes ({PROCESSES_MAX})"
        )
    if not request.process.Args:
        raise RpcError(StatusCode.INVALID_ARGUMENT, "cannot run a process: it has no arguments")
    async with agent.launches:
        process = await _launch_exec(agent, container, exec_id, request)
    if agent.containers.get(container.id) is not container:
        process.kill(signal.SIGKILL)
        process.stdio.close()
        raise RpcError(StatusCode.FAILED_PRECONDITION, f"container {container.id} was removed")
    container.processes[exec_id] = process
    process.ended.on_done(lambda: agent.oom.check(container.id))
    if container.spare is None:
        agent.tasks.spawn(f"spare-{container.id}", _keep_spare(agent, container, process))


async def _launch_exec(
    agent: Agent, container: Container, exec_id: str, request: agent_pb2.ExecProcessRequest
) -> Process:
    container.require("running", verb="run a process in")  # it may have ended since the request
    if agent.room is not None:
        agent.room.admit(container)
    root = f"/proc/{container.init_pid}/root"
    nice = crowd.nice_for(container) if agent.room is not None else 0
    try:
        await resolve_process(agent.loop, request.process, request.string_user, root, make_cwd=False)
        described = json.dumps(process_json(request.process))
        command = Launch(agent.loop, request.process, root, (), nice)
        if not request.process.Terminal and (spare := _take_spare(container, described, nice)) is not None:
            try:
                return await command.run_spare(exec_id, spare)
            finally:
                remove_tree(spare.directory)
        directory = f"{container.bundle}/exec-{exec_id}"
        os.mkdir(directory)
        try:
            with open(f"{directory}/process.json", "w") as handle:
                handle.write(described)
            arguments = ["exec", "--detach", "--process", f"{directory}/process.json", container.id]
            return await command.run(exec_id, arguments, directory, agent.options.container_pipe_size_bytes)
        finally:
            remove_tree(directory)
    except (OSError, RpcError) as exc:
        told = isinstance(exc, RpcError) and exc.code is not StatusCode.INTERNAL
        if not told and await _is_ending(agent, container):
            # crun's error for a pid namespace whose init is dead is misleading, and so is that of /proc/PID/root
            raise RpcError(StatusCode.FAILED_PRECONDITION, f"container {container.id} has ended") from exc
        if not told and agent.room is not None and (full := agent.room.explain(container)) is not None:
            raise full from exc
        raise
    finally:
        if nice:
            crowd.calm(container)


def _take_spare(container: Container, described: str, nice: int) -> Spare | None:
    """The container's spare crun, told to run the process `described`; None if there is none that can."""
    spare, container.spare = container.spare, None
    return spare if spare is not None and spare.tell(described, nice) else None


async def _keep_spare(agent: Agent, container: Container, process: Process) -> None:
    """Have a crun ready for the next exec, for a while: where something has been executed more is likely to be."""
    from katapod.agent.spare import open_spare

    await agent.loop.wait_any([process.ended], SPARE_AFTER_S)
    await agent.loop.sleep(SPARE_PAUSE_S)  # its end is told first
    if container.spare is not None or container.state != "running":
        return
    try:
        spare = open_spare(agent.loop, container.id, container.bundle, agent.options.container_pipe_size_bytes)
    except (OSError, ProgramError) as exc:
        log.debug(f"no crun waits for execs in container {container.id}: {exc}")
        return
    container.spare = spare
    await agent.loop.wait_any([spare.gone], SPARE_KEPT_S)
    if container.spare is spare:
        _drop_spare(container)


def _drop_spare(container: Container) -> None:
    spare, container.spare = container.spare, None
    if spare is not None:
        try:
            spare.drop()
        except OSError as exc:
            log.warning(f"container {container.id}: {exc}")


async def _is_ending(agent: Agent, container: Container) -> bool:
    """Whether the container's init has ended, or is about to: its exit is seen after its effects."""
    init = container.processes.get(container.id)
    return init is None or bool(await agent.loop.wait_any([init.ended], ENDING_S))


async def signal_process(agent: Agent, request: agent_pb2.SignalProcessRequest) -> None:
    container = find_container(agent, request.container_id)
    process = find_process(agent, request.container_id, request.exec_id)
    if not request.exec_id and request.signal == signal.SIGKILL:
        kill_all(container)
    else:
        process.kill(request.signal)


async def wait_process(agent: Agent, request: agent_pb2.WaitProcessRequest) -> agent_pb2.WaitProcessResponse:
    container = find_container(agent, request.container_id)
    process = find_process(agent, request.container_id, request.exec_id)
    status = await process.ended
    process.waited = True
    _drop_read_out(container)
    return agent_pb2.WaitProcessResponse(status=status)


def _drop_read_out(container: Container) -> None:
    """Forget processes that have been waited for: those read to the end, and the oldest beyond ENDED_KEPT_MAX."""
    ended = [p for p in container.processes.values() if p.waited]
    kept = [p for p in ended if not (p.stdio.drained or p.readers)]
    for process in ended:
        if process.stdio.drained or process in kept[:-ENDED_KEPT_MAX]:
            process.stdio.close()
            container.processes.pop(process.exec_id, None)


def _drop_oldest_ended(container: Container) -> None:
    """Forget the process; output of its background processes is no longer forwarded."""
    process = next((p for p in container.processes.values() if p.waited), None)
    if process is not None:
        process.stdio.close()
        container.processes.pop(process.exec_id, None)


async def _read(agent: Agent, request: agent_pb2.ReadStreamRequest, stderr: bool) -> agent_pb2.ReadStreamResponse:
    process = find_process(agent, request.container_id, request.exec_id, waited=True)
    output = process.stdio.stderr if stderr else process.stdio.stdout
    if output is None:  # a terminal has a single stream
        return agent_pb2.ReadStreamResponse()
    own = not request.exec_id or request.exec_id == request.container_id  # the container ends with it
    data = await read_stdio(agent.loop, process, output, request.len, *(() if own else (None,)))
    if not data and process.waited and request.container_id in agent.containers:
        _drop_read_out(agent.containers[request.container_id])
    return agent_pb2.ReadStreamResponse(data=data)


async def read_stdout(agent: Agent, request: agent_pb2.ReadStreamRequest) -> agent_pb2.ReadStreamResponse:
    return await _read(agent, request, stderr=False)


async def read_stderr(agent: Agent, request: agent_pb2.ReadStreamRequest) -> agent_pb2.ReadStreamResponse:
    return await _read(agent, request, stderr=True)


async def write_stream(agent: Agent, request: agent_pb2.WriteStreamRequest) -> agent_pb2.WriteStreamResponse:
    process = find_process(agent, request.container_id, request.exec_id)
    return agent_pb2.WriteStreamResponse(len=await write_stdin(agent.loop, process, request.data))


async def close_stdin(agent: Agent, request: agent_pb2.CloseStdinRequest) -> None:
    process = find_process(agent, request.container_id, request.exec_id)
    if not process.stdio.terminal:
        await write_stdin(agent.loop, process, b"")  # after what is still being written


async def resize_terminal(agent: Agent, request: agent_pb2.TtyWinResizeRequest) -> None:
    process = find_process(agent, request.container_id, request.exec_id)
    if process.stdio.stdin >= 0 or not process.stdio.terminal:
        process.stdio.resize(request.row, request.column)


async def _freeze(agent: Agent, container: Container, verb: str, frozen: bool) -> None:
    """Freeze or thaw the cgroup, like crun, and wait until the kernel has done so."""
    directory = container.cgroup_directory
    with open(f"{directory}/cgroup.freeze", "w") as handle:
        handle.write("1" if frozen else "0")
    wanted = f"frozen {int(frozen)}"
    for _ in range(int(FREEZE_LIMIT_S / FREEZE_POLL_S)):
        with open(f"{directory}/cgroup.events") as handle:
            if wanted in handle.read():
                container.state = "paused" if frozen else "running"
                return
        await agent.loop.sleep(FREEZE_POLL_S)
    raise RpcError(
        StatusCode.DEADLINE_EXCEEDED, f"cannot {verb} container {container.id}: not done within {FREEZE_LIMIT_S:g} s"
    )


async def pause_container(agent: Agent, request: agent_pb2.PauseContainerRequest) -> None:
    container = find_container(agent, request.container_id)
    container.require("running", verb="pause")
    await _freeze(agent, container, "pause", True)


async def resume_container(agent: Agent, request: agent_pb2.ResumeContainerRequest) -> None:
    container = find_container(agent, request.container_id)
    container.require("paused", verb="resume")
    await _freeze(agent, container, "resume", False)


async def update_container(agent: Agent, request: agent_pb2.UpdateContainerRequest) -> None:
    container = find_container(agent, request.container_id)
    path = f"{container.bundle}/resources.json"
    with open(path, "w") as handle:
        json.dump(resources_json(request.resources), handle)
    try:
        await crun.run(agent.loop, ["update", "--resources", path, container.id])
    except ProgramError as exc:
        raise RpcError(StatusCode.INTERNAL, f"cannot update container {container.id}: {exc.tail or exc}") from exc


async def get_oom_event(agent: Agent, request: agent_pb2.GetOOMEventRequest) -> agent_pb2.OOMEvent:
    return agent_pb2.OOMEvent(container_id=await agent.oom.next_event())
