"""SIGTERM to the first process of a PID namespace, which has it in its own way: as the kernel has it, so have we."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kit.containerd import Containerd
from kit.cri import Cri, mount
from kit.kata import wait_for
from kit.oci_archive import BUSYBOX

SOURCE = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

static sigset_t term;

static void *wait_in_thread(void *code) {
    int number;
    if (sigwait(&term, &number) == 0 && number == SIGTERM)
        exit((int)(long)code);
    return NULL;
}

static int forward(void) { /* as a small init does */
    pid_t child = fork();
    int number, status;
    sigset_t all;
    if (child == 0) {
        sigprocmask(SIG_UNBLOCK, &term, NULL);
        execl("/bin/sh", "sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done", NULL);
    }
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, NULL);
    for (;;) {
        if (sigwait(&all, &number) != 0)
            continue;
        if (number == SIGCHLD && waitpid(child, &status, WNOHANG) == child)
            return WEXITSTATUS(status);
        if (number != SIGCHLD)
            kill(child, number);
    }
}

int main(int argc, char **argv) {
    const char *way = argv[1];
    pthread_t thread;
    setvbuf(stdout, NULL, _IONBF, 0);
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    if (strcmp(way, "ignore") == 0)
        signal(SIGTERM, SIG_IGN);
    else if (strcmp(way, "default") != 0)
        sigprocmask(SIG_BLOCK, &term, NULL);
    if (strcmp(way, "init") == 0)
        return forward();
    if (strcmp(way, "sigwait") == 0) {
        puts("ready");
        wait_in_thread((void *)5L);
    } else if (strcmp(way, "thread") == 0) {
        pthread_create(&thread, NULL, wait_in_thread, (void *)8L);
        puts("ready");
        for (;;)
            pause();
    } else if (strcmp(way, "signalfd") == 0) {
        struct signalfd_siginfo info;
        int fd = signalfd(-1, &term, 0);
        puts("ready");
        if (read(fd, &info, sizeof info) == sizeof info && info.ssi_signo == SIGTERM)
            return 6;
    }
    puts("ready");
    sleep(6); /* no signal ends that */
    return 7;
}
"""
STATUSES = {"sigwait": 5, "signalfd": 6, "ignore": 7, "default": 7, "thread": 8, "init": 9}


@pytest.fixture(scope="module")
def program(debian_rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the static program `stop`."""
    folder = tmp_path_factory.mktemp("stop")
    compiler = ["chroot", str(debian_rootfs), "gcc", "-static", "-O", "-pthread", "-x", "c", "-o", "/tmp/stop", "-"]
    built = subprocess.run(compiler, input=SOURCE.encode(), capture_output=True, timeout=180, check=False)
    assert built.returncode == 0, built.stderr.decode()
    shutil.move(debian_rootfs / "tmp/stop", folder)
    return folder


@pytest.mark.reference
def test_a_container_stops_as_its_first_process_has_it(cri: Cri, program: Path) -> None:
    """Each with a PID namespace of its own, whose first process no signal reaches that it leaves at its default."""
    pod = cri.run_pod()
    options = {"security_context": {"namespace_options": {"pid": 1}}}
    containers = {
        way: pod.start("/stop/stop", way, name=way, mounts=[mount(program, "/stop", readonly=True)], linux=options)
        for way in STATUSES
    }
    for way, container in containers.items():
        wait_for(lambda one=container: "ready" in pod.log_text(one), f"{way} is ready", 180, 0.2)
    with ThreadPoolExecutor(len(containers)) as pool:
        for container in containers.values():
            pool.submit(cri, "StopContainer", container_id=container, timeout=180).add_done_callback(
                lambda done: done.result()
            )
    assert {way: pod.wait_exit(container) for way, container in containers.items()} == STATUSES


@pytest.mark.reference
def test_a_single_container_stops_as_its_first_process_has_it(
    ctr: Containerd, runtime: str, program: Path, tmp_path: Path
) -> None:
    container, log = ctr.new_id(), tmp_path / "log"
    share = f"type=bind,src={program},dst=/stop,options=rbind:ro"
    flags = ["--detach", "--runtime", runtime, "--mount", share, "--log-uri", f"file://{log}"]
    ctr.ok("run", *flags, BUSYBOX, container, "/stop/stop", "sigwait")
    wait_for(lambda: log.read_text() == "ready\n", "it waits")
    ctr.ok("tasks", "kill", "--signal", "SIGTERM", container)
    wait_for(lambda: ctr.tasks() == {container: "STOPPED"}, "the task is stopped")
    assert ctr.delete(container) == STATUSES["sigwait"]
