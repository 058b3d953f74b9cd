"""A node with a pod, on which the commands of the walkthrough are run.

To the commands, Katapod is installed: what a package puts into /etc and /usr is laid over the machine's own for them
alone. The pod runs through containerd, with a configuration file that the walkthrough's commands have made.
"""

import contextlib
import functools
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from kit.accel import VARIABLE, current_accelerator
from kit.containerd import Containerd, containerd_running
from kit.cri import Cri, Pod
from kit.kata import KATA, wait_for
from kit.tour_steps import ENABLE_CONSOLE, STEPS, Place, Step

__all__ = ["CONFIG_FILE", "HOSTNAME", "ROOT", "Tour", "touring"]

ROOT = Path(__file__).parents[2]
HOSTNAME = "mypod"
CONFIG_FILE = "etc/kata-containers/configuration.toml"
SYSTEMD_CONFIG_FILE = "etc/kata-containers/systemd.toml"
SYSTEMD_HANDLER = "kata-systemd"
NODE_FILES = {
    "etc/crio/crio.conf.d/50-kata": "packaging/crio/50-kata",
    "usr/share/kata-containers/defaults/configuration.toml": "packaging/configuration.toml",
    "usr/share/katapod/containerd/kata.toml": "packaging/containerd/kata.toml",
    "usr/share/kata-containers/image.toml": "packaging/osbuilder/image.toml",
    "usr/lib/systemd/system/kata-osbuilder-generate.service": "packaging/osbuilder/kata-osbuilder-generate.service",
    "usr/libexec/kata-containers/osbuilder/kata-osbuilder.sh": "packaging/osbuilder/kata-osbuilder.sh",
}
"""Where the packages put these files; that they do is for tests/integration/test_packages.py to see."""

OWN_PROCESS_IDS = {"namespace_options": {"pid": 1}}
"""Of each container, as the kubelet asks for; CRI's own default is one numbering for all of a pod."""


class Tour:
    """A node, and a pod on it: `sandbox` (its id, `sandbox` of the commands), `container` (its workload)."""

    def __init__(self, node: Containerd, cri: Cri, root: Path) -> None:
        self.node, self.cri, self.root = node, cri, root
        self.variables: dict[str, str] = {}
        self.pod, self.container = self._run_pod(cri)
        self.variables = {
            "SANDBOX": self.pod.id,
            "CONTAINER": self.container,
            "QEMU": Path(f"/run/vc/vm/{self.pod.id}/pid").read_text().strip(),
        }

    @property
    def sandbox(self) -> str:
        return self.pod.id

    def say(self, step: Step) -> str:
        """The output of a step, which has to succeed."""
        if "$PACKAGE" in step.command:
            self.variables["PACKAGE"] = str(self.package)
        if step.place is Place.CONTAINER:
            return self.pod.exec(self.container, *shlex.split(step.command)).stdout
        return self.run(step.command, 180 if step.place is Place.PAGE else 60)

    def run(self, text: str, limit_s: float = 180) -> str:
        """What a command of the node says, which has to succeed."""
        return run_on_node(self.node, self.root, text, self.variables, limit_s)

    def __call__(self, key: str) -> str:
        """`say` of the step with this key, such as "W13 env"."""
        (step,) = (one for one in STEPS if one.key == key)
        return self.say(step)

    def command(self, text: str) -> list[str]:
        """A command of the node as a list, for who runs it in a terminal."""
        return node_command(self.node, self.root, text, self.variables)

    @contextlib.contextmanager
    def systemd(self) -> Iterator[None]:
        """A second pod, SYSTEMD of the commands, whose guest has systemd as its first process."""
        cri = Cri(self.node, SYSTEMD_HANDLER)
        try:
            self.variables["SYSTEMD"] = self._run_pod(cri)[0].id
            # waits in the guest, whose processes are dear: it is told when its start is over, also where a unit failed
            self.run("kata-runtime exec $SYSTEMD systemctl is-system-running --wait || :")
            wait_for(self._systemd_is_up, "all units of the guest have started", 180, 0.5)
            yield
        finally:
            cri.remove_all()
            cri.close()

    def _systemd_is_up(self) -> bool:
        return self.run("kata-runtime exec $SYSTEMD systemctl is-active kata-containers.target || :") == "active\n"

    @functools.cached_property
    def package(self) -> Path:
        """An RPM of this source tree."""
        subprocess.run([ROOT / "tools/build-rpm"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (found,) = (ROOT / "dist").glob("katapod-*.x86_64.rpm")
        return found

    def _run_pod(self, cri: Cri) -> tuple[Pod, str]:
        pod = cri.run_pod(hostname=HOSTNAME, dns_config={"servers": ["10.88.7.1"]}, security=OWN_PROCESS_IDS)
        container = pod.start("sleep", "infinity", name=HOSTNAME, linux={"security_context": OWN_PROCESS_IDS})
        return pod, container


def lay_out(root: Path) -> None:
    """Put what a package holds below `root`, with programs that run this source tree."""
    for folder in ("etc", "usr/bin", "work"):
        (root / folder).mkdir(parents=True)
    for target, source in NODE_FILES.items():
        if (ROOT / source).exists():
            (root / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, root / target)
    for program in ("kata-runtime", "containerd-shim-kata-v2", "kata-monitor"):
        (root / "usr/bin" / program).symlink_to(Path(KATA).with_name(program))


def node_command(node: Containerd, root: Path, text: str, variables: dict[str, str]) -> list[str]:
    """A shell's command on the node that `root` makes of this machine, in the network namespace of containerd."""
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "TERM": "xterm",
        "LC_ALL": "C.UTF-8",
        "COLUMNS": "120",
        "CONTAINERD_ADDRESS": str(node.socket),
        "KATAPOD_NETWORK": "none",
        VARIABLE: current_accelerator(),
        **variables,
    }
    etc = f"lowerdir=/etc,upperdir={root}/etc,workdir={root}/work"
    script = (
        f"mount -t overlay tour -o {etc} /etc && mount -t overlay tour -o lowerdir={root}/usr:/usr /usr"
        ' && exec bash -c "$1"'
    )
    settings = [f"{name}={value}" for name, value in environment.items()]
    entered = ["nsenter", f"--net=/run/netns/{node.netns}", "unshare", "--mount", "--propagation", "private"]
    return ["env", "-i", *settings, *entered, "sh", "-c", script, "sh", text]


def run_on_node(node: Containerd, root: Path, text: str, variables: dict[str, str], limit_s: float) -> str:
    done = subprocess.run(
        node_command(node, root, text, variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    node.note(f"$ {text}\nstatus {done.returncode}\n{done.stdout}{done.stderr}")
    assert done.returncode == 0, f"{text}: status {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def touring(root: Path) -> Iterator[Tour]:
    """A tour whose node has its files below `root`, an empty directory on a real file system."""
    lay_out(root)
    more = {SYSTEMD_HANDLER: root / SYSTEMD_CONFIG_FILE}
    with containerd_running(root / CONFIG_FILE, more) as node:
        for command in ENABLE_CONSOLE:
            run_on_node(node, root, command, {}, 30)
        made = (root / CONFIG_FILE).read_text()
        flavour = '[katapod]\nguest_flavour = "systemd"'
        (root / SYSTEMD_CONFIG_FILE).write_text(made.replace("[katapod]", flavour, 1))
        cri = Cri(node, "kata")
        try:
            yield Tour(node, cri, root)
        finally:
            cri.remove_all()
            cri.close()
