"""The words of an OCI command, parsed. By itself: argparse takes as long to load as a command has to run.

Source: runc(8) and the pages of its commands; what callers really pass.
"""

from katapod.oci.errors import OciError
from katapod.oci.words import GLOBAL_SWITCHES, GLOBAL_VALUES, default_root

__all__ = ["SYNTAX", "Call", "Syntax", "parse_call"]


class Syntax:
    """The options of a verb. `values`, `lists` (may be repeated) and `switches` are names; the first of those with the
    same meaning stands for them all, as in "--bundle -b". `least` and `most`: how many words there may be
    after the options; None: any number."""

    def __init__(
        self, values: str = "", lists: str = "", switches: str = "", *, least: int = 1, most: int | None = 1
    ) -> None:
        self.values = _names(values)
        self.lists = _names(lists)
        self.switches = _names(switches)
        self.least = least
        self.most = most


def _names(text: str) -> dict[str, str]:
    """Alias to name, of "--bundle=-b --pid-file"."""
    found = {}
    for group in text.split():
        name, *aliases = group.split("=")
        for alias in (name, *aliases):
            found[alias] = name.lstrip("-")
    return found


_CREATE = "--bundle=-b --pid-file --console-socket --pidfd-socket --preserve-fds"
_EXEC = "--process=-p --pid-file --console-socket --pidfd-socket --preserve-fds --cwd --user=-u --apparmor"
_EXEC += " --process-label --cgroup"
_UPDATE = "--resources=-r --memory --memory-reservation --memory-swap --kernel-memory --kernel-memory-tcp --cpu-share"
_UPDATE += " --cpu-period --cpu-quota --cpu-burst --cpu-rt-period --cpu-rt-runtime --cpuset-cpus --cpuset-mems"
_UPDATE += " --cpu-idle --blkio-weight --pids-limit --l3-cache-schema --mem-bw-schema"
_IMAGES = (
    "--image-path --work-path --parent-path --manage-cgroups-mode --status-fd --page-server --bundle=-b --pid-file"
)
_IMAGES += " --console-socket --lsm-profile --lsm-mount-context --empty-ns"
_CRIU = "--leave-running --tcp-established --tcp-close --tcp-skip-in-flight --file-locks --ext-unix-sk --shell-job"
_CRIU += " --pre-dump --lazy-pages --auto-dedup --detach=-d --no-subreaper --no-pivot"

SYNTAX = {
    "create": Syntax(_CREATE, switches="--no-pivot --no-new-keyring"),
    "run": Syntax(_CREATE, switches="--no-pivot --no-new-keyring --detach=-d --keep --no-subreaper"),
    "start": Syntax(),
    "state": Syntax(),
    "kill": Syntax(switches="--all=-a", most=2),
    "delete": Syntax(switches="--force=-f"),
    "exec": Syntax(
        _EXEC,
        "--env=-e --additional-gids=-g --cap=-c",
        "--detach=-d --tty=-t --no-new-privs --ignore-paused",
        most=None,
    ),
    "pause": Syntax(),
    "resume": Syntax(),
    "ps": Syntax("--format=-f", most=None),
    "list": Syntax("--format=-f", switches="--quiet=-q", least=0, most=0),
    "events": Syntax("--interval", switches="--stats"),
    "update": Syntax(_UPDATE),
    "spec": Syntax("--bundle=-b", switches="--rootless", least=0, most=0),
    "features": Syntax(least=0, most=0),
    "checkpoint": Syntax(_IMAGES, switches=_CRIU),
    "restore": Syntax(_IMAGES, switches=_CRIU),
}
GREEDY = ("exec", "ps")
"""What follows the container's id is another program's."""


class Call:
    """A command. `values` has what options were given once, `lists` what may be repeated."""

    def __init__(self) -> None:
        self.root = default_root()
        self.config = ""
        self.log = ""
        self.log_format = "text"
        self.debug = False
        self.verb = ""
        self.asks = ""  # "version" or "help", which are answered at once
        self.values: dict[str, str] = {}
        self.lists: dict[str, list[str]] = {}
        self.switches: set[str] = set()
        self.operands: list[str] = []

    @property
    def id(self) -> str:
        return self.operands[0]


def parse_call(words: list[str], call: Call) -> None:
    """Fill `call`, as far as the words go before what is wrong with them: where to log that comes first. Raises
    OciError."""
    rest = list(words)
    while rest and rest[0].startswith("-"):
        name, value = _option(rest)
        if name in GLOBAL_VALUES:
            _take_global(call, name, _value(name, value, rest))
        elif name in GLOBAL_SWITCHES:
            _take_switch(call, name)
        else:
            raise OciError(f"flag provided but not defined: {name}")
    if not rest:
        if not call.asks:
            raise OciError("a command is missing: see kata-runtime --root DIR --help")
        return
    call.verb = rest.pop(0)
    if call.verb not in SYNTAX:
        raise OciError(f"unknown command {call.verb!r}")
    _parse_verb(call, SYNTAX[call.verb], rest)


def _take_global(call: Call, name: str, value: str) -> None:
    if name == "--root":
        call.root = value
    elif name in ("--config", "--kata-config"):
        call.config = value
    elif name == "--log":
        call.log = value.removeprefix("file:")  # as crun has it
    elif name == "--log-format":
        if value not in ("text", "json"):
            raise OciError(f"invalid log format {value!r}: use text or json")
        call.log_format = value


def _take_switch(call: Call, name: str) -> None:
    if name in ("--version", "-v"):
        call.asks = "version"
    elif name in ("--help", "-h"):
        call.asks = "help"
    elif name == "--debug":
        call.debug = True


def _parse_verb(call: Call, syntax: Syntax, rest: list[str]) -> None:
    while rest:
        if rest[0] == "--":
            call.operands += rest[1:]
            break
        if not rest[0].startswith("-") or rest[0] == "-":
            call.operands.append(rest.pop(0))
            if call.verb in GREEDY:
                call.operands += rest[1:] if rest[:1] == ["--"] else rest
                break
            continue
        name, value = _option(rest)
        if name in ("--help", "-h"):
            call.asks = "help"
            return
        if name in syntax.values:
            call.values[syntax.values[name]] = _value(name, value, rest)
        elif name in syntax.lists:
            call.lists.setdefault(syntax.lists[name], []).append(_value(name, value, rest))
        elif name in syntax.switches:
            if value in (None, "true"):
                call.switches.add(syntax.switches[name])
            elif value != "false":
                raise OciError(f"invalid value {value!r} for {name}: true or false")
        else:
            raise OciError(f"flag provided but not defined: {name}")
    if len(call.operands) < syntax.least:
        raise OciError(f"{call.verb} requires a minimum of {syntax.least} argument")
    if syntax.most is not None and len(call.operands) > syntax.most:
        raise OciError(f"{call.verb} takes at most {syntax.most} arguments, not {len(call.operands)}")


def _option(rest: list[str]) -> tuple[str, str | None]:
    """The next option, and its value if that is part of the word. A single dash is as good as two: go-runc writes
    -no-subreaper."""
    name, equals, value = rest.pop(0).partition("=")
    if len(name) > 2 and not name.startswith("--"):
        name = f"-{name}"
    return name, value if equals else None


def _value(name: str, value: str | None, rest: list[str]) -> str:
    if value is not None:
        return value
    if not rest:
        raise OciError(f"flag needs an argument: {name}")
    return rest.pop(0)
