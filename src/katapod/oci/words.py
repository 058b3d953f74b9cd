"""Whether the words of a command line are runc's, or those of people who use Katapod. Imports nothing but os.

One program has both: Podman looks for /usr/bin/kata-runtime as its runtime `kata`. Options that only OCI engines use
decide, then the verb, and for a verb that both worlds have, whether `create` has made the container.
"""

import os

__all__ = ["GLOBAL_SWITCHES", "GLOBAL_VALUES", "ONLY_OCI", "default_root", "speaks_oci"]

OURS = ("--config", "--kata-config")
ENGINES = ("--root", "--log", "--log-format", "--log-level", "--cgroup-manager", "--rootless", "--criu")
GLOBAL_VALUES = (*OURS, *ENGINES)
GLOBAL_SWITCHES = ("--systemd-cgroup", "--debug", "--version", "-v", "--help", "-h")

BOTH = ("create", "start", "events")
"""Verbs of both worlds that do different things there."""
ONLY_OCI = ("state", "spec", "features", "checkpoint", "restore")
STARTS = ("--pid-file", "--console-socket", "--preserve-fds", "--keep", "--no-subreaper", "--no-pivot")
MARKS = {
    "run": STARTS,
    "exec": ("--process", "-p", "--pid-file", "--console-socket", "--preserve-fds", "--cap"),
    "update": ("--resources", "-r", "--cpu-share", "--cpu-period", "--cpu-quota", "--cpu-burst", "--l3-cache-schema"),
}
"""Options of a verb that only its OCI form has."""
RUNS, KEPT = "/run/vc/sbs", "/var/lib/katapod/sandboxes"
"""Where containers of `run` are recorded, and those that a start of the host has left: model.layout.Layout."""
VALUED = (
    *("--format", "-f", "--filter", "--since", "--until", "--interval"),
    *("-m", "--memory", "--memory-reservation", "--memory-swap", "--pids-limit", "--cpus"),
)
"""Options of such a verb, in either world, whose value is the next word."""
BY_CONTAINER = ("kill", "delete", "pause", "resume", "ps", "update")
"""Verbs that mean the same to both, and are carried out by who has made the container."""


def speaks_oci(words: list[str]) -> bool:
    rest = iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name in ENGINES or name == "--systemd-cgroup":
            return True
        if name in OURS:
            if not equals:
                next(rest, None)
        elif not word.startswith("-"):
            return _is_oci(word, list(rest))
    return False


def _is_oci(verb: str, rest: list[str]) -> bool:
    if verb in ONLY_OCI:
        return True
    if verb in BOTH:
        return not _is_docker(verb, rest)
    before = rest[: rest.index("--")] if "--" in rest else rest
    if verb in ("run", "exec"):  # what comes after the name is a command's
        first = next((place for place, word in enumerate(before) if not word.startswith("-")), len(before))
        before = before[: first + 1] if verb == "run" else _options(before)
    if any(word.partition("=")[0] in MARKS.get(verb, ()) for word in before):
        return True
    if verb == "exec" and {"-d", "--detach"} & set(before):
        return _is_recorded(next(iter(rest[len(before) :]), ""))
    if verb not in BY_CONTAINER or any(word.partition("=")[0] in ("-s", "--signal") for word in before):
        return False
    return _is_recorded(_first_operand(before))


def _is_docker(verb: str, rest: list[str]) -> bool:
    """Whether somebody means docker's verb of that name: `create IMAGE` where there is no bundle, `start` of a
    container of `run`, of several, or with options, `events` of all containers."""
    if verb == "create":
        options = set[str]()
        for word in rest:
            if word.partition("=")[0] in (*STARTS, "--bundle", "-b"):
                return False
            if word == "--" or not word.startswith("-"):  # or the value of an option of ours
                break
            options.add(word)
        return not (len(rest) - len(options) == 1 and os.path.exists("config.json"))
    if verb == "events":
        return not _first_operand(rest)
    names = [word for word in rest if not word.startswith("-")]
    if len(names) != 1 or len(rest) > 1:
        return True
    name = names[0]
    if not _is_name(name) or _is_recorded(name):
        return False
    return os.path.isdir(os.path.join(RUNS, name)) or os.path.exists(os.path.join(KEPT, name, "request.json"))


def _first_operand(words: list[str]) -> str:
    rest = iter(words)
    for word in rest:
        if word in VALUED:
            next(rest, None)
        elif not word.startswith("-"):
            return word
    return ""


def _is_recorded(container_id: str) -> bool:
    """Whether `create` has made it, below the default root."""
    return _is_name(container_id) and os.path.isdir(os.path.join(default_root(), container_id))


def _options(words: list[str]) -> list[str]:
    """The words before the name of a container: an option's value, which is no option itself, may be among them."""
    valued = {"-e", "--env", "-w", "--workdir", "--cwd", "-u", "--user", "--process", "-p", "--pid-file"}
    valued |= {"--console-socket", "--preserve-fds", "--cap", "-g", "--additional-gids", "--kata-debug-port"}
    found = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            break
        found.append(word)
        if word in valued:
            next(rest, None)
    return found


def _is_name(text: str) -> bool:
    return bool(text) and "/" not in text and not text.startswith(".")


def default_root() -> str:
    """Where containers are recorded without --root; for another user than root below XDG_RUNTIME_DIR."""
    base = "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return f"{base}/kata-runtime"
