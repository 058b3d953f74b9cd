"""A kernel of User-mode Linux with a tiny guest: busybox, some modules, and a script as its init. No agent, no jail."""

import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from katapod.host.regset import REGSET, preload
from kit.uml_guest import BUSYBOX, KERNEL, MODULES

NOBODY = 65534
LIMIT_S = 180.0  # beside others
IPV6 = ("lib/crc-ccitt.ko", "net/ipv6/ipv6.ko")

PREPARE = """#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /mnt /tmp
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmpfs /tmp
for module in $(cat /modules); do insmod /lib/$module; done
echo LISTENING
"""
LISTENING = "LISTENING"  # what is written to a console that no process has opened is lost


class TinyGuest:
    """`directory` is where its mconsole is, below vm/."""

    def __init__(self, process: "subprocess.Popen[bytes]", directory: Path) -> None:
        self.process = process
        self.directory = directory
        self.lines: list[str] = []
        self._unsaid: list[str] | None = []  # None: the guest listens
        self._lock = threading.Lock()
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.decode(errors="replace").strip()
            if text == LISTENING:
                self._say_what_waits()
            self._queue.put(text)
        self._queue.put(None)

    def _say_what_waits(self) -> None:
        with self._lock:
            waiting, self._unsaid = self._unsaid or [], None
            for line in waiting:
                self._write(line)

    def wait_for(self, beginning: str) -> str:
        """The next line of the console that begins so, without that."""
        while True:
            try:
                line = self._queue.get(timeout=LIMIT_S)
            except queue.Empty:
                line = None
            if line is None:
                raise AssertionError(f"no line {beginning!r} on the console:\n" + "\n".join(self.lines[-40:]))
            self.lines.append(line)
            if line.startswith(beginning):
                return line.removeprefix(beginning).strip()

    def say(self, line: str) -> None:
        """To the init's standard input, once it is there. Does not wait."""
        with self._lock:
            if self._unsaid is None:
                self._write(line)
            else:
                self._unsaid.append(line)

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def end(self) -> None:
        """SIGKILL to the kernel and its helpers, which outlive it. Idempotent."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(timeout=LIMIT_S)


@contextmanager
def tiny_guest(
    script: str, arguments: Sequence[str] = (), *, modules: Sequence[str] = (), netns: str = "", uid: int = NOBODY
) -> Iterator[TinyGuest]:
    """A guest that runs `script`, with `arguments` more on the kernel's command line, as the user `uid` without any
    capability; `modules` are paths below the kernel's module tree, in the order in which they are loaded."""
    directory = Path(tempfile.mkdtemp(prefix="kt-uml-", dir="/dev/shm"))
    try:
        initrd = make_initrd(directory, script, modules)
        library = shutil.copy(REGSET, directory)  # that user may not reach these sources, as below /root
        os.chown(directory, uid, uid)
        enter = ["nsenter", f"--net=/run/netns/{netns}"] if netns else []
        user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs"]
        command = [
            *(*enter, *user, "--bounding-set=-all", "--inh-caps=-all", str(KERNEL), "mem=192M", f"initrd={initrd}"),
            *("con=null", "con0=fd:0,fd:1", "quiet", "lpj=30613504", f"uml_dir={directory}/", "umid=vm", "panic=1"),
            "initcall_blacklist=raid6_select_algo,calibrate_xor_blocks,init_hostfs",
            *arguments,
        ]
        environment = {
            "HOME": str(directory),
            "TMPDIR": str(directory),
            "PATH": os.environ["PATH"],
            **preload(Path(library)),
        }
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        ) as process:
            guest = TinyGuest(process, directory)
            try:
                yield guest
            finally:
                guest.end()
    finally:
        shutil.rmtree(directory)


def make_initrd(directory: Path, script: str, modules: Sequence[str]) -> Path:
    root = directory / "root"
    for name in ("bin", "lib"):
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for module in modules:
        shutil.copy(min(MODULES.iterdir()) / "kernel" / module, root / "lib")
    (root / "modules").write_text("\n".join(Path(module).name for module in modules))
    (root / "init").write_text(PREPARE + script)
    (root / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    initrd = directory / "initrd"
    with initrd.open("wb") as target:
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"], input=names.encode(), cwd=root, stdout=target, check=True
        )
    shutil.rmtree(root)
    initrd.chmod(0o644)
    return initrd
