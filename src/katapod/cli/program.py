"""`kata-runtime` as click's tree of commands: the options before the verb, and which module has which verb.

A module is loaded when its verb is asked for: `--help`, completion and the verb `version` load none.
"""

import copy
import importlib
from collections.abc import Callable
from typing import NamedTuple

import click

from katapod.cli.command import HOST_PATH, Command, F, Group, flag, near, option
from katapod.cli.settings import Globals
from katapod.model.errors import UsageError

__all__ = ["VERBS", "Program", "Verb", "kata_runtime"]


NEAR_VERB = 0.7  # of difflib's ratio: two letters of four in the wrong order


class Verb(NamedTuple):
    place: str  # MODULE:NAME of the click command
    summary: str  # its line in `kata-runtime --help`, and in man pages
    hidden: bool = False


VERBS = {
    "version": Verb("program:version", "Print the version."),
    "run": Verb("run:run", "Run a command in a new container, in a virtual machine of its own."),
    "exec": Verb("execute:execute", "Run a command in a running container, or open a shell in a VM."),
    "create": Verb("starting:create", "Make a container, without starting it."),
    "start": Verb("starting:start", "Start containers that were created or have stopped, with their files."),
    "restart": Verb("starting:restart", "Stop containers, and start them again."),
    "rename": Verb("starting:rename", "Give a container that does not run another name."),
    "list": Verb("containers:list_containers", "List containers."),
    "ps": Verb("containers:list_containers", "List containers.", hidden=True),
    "wait": Verb("life:wait", "Wait until containers have ended, and print their exit status."),
    "stop": Verb("life:stop", "Ask containers to end, and kill those that do not."),
    "kill": Verb("containers:kill", "Send a signal to containers."),
    "pause": Verb("containers:pause", "Freeze all processes of containers."),
    "resume": Verb("containers:resume", "Resume paused containers."),
    "unpause": Verb("containers:resume", "Resume paused containers.", hidden=True),
    "update": Verb("updating:update", "Change the limits of running containers."),
    "attach": Verb("life:attach", "Print what a running container writes, until it ends."),
    "cp": Verb("copying:copy", "Copy files between a running container and this host."),
    "export": Verb("copying:export", "Write the files of a running container as a tar."),
    "diff": Verb("diffing:diff", "Print what a running container has changed of its image's files."),
    "commit": Verb("committing:commit", "Make an image of the files of a running container."),
    "port": Verb("ports:port", "Print the published ports of a container."),
    "top": Verb("top:top", "List the processes of a container."),
    "stats": Verb("containers:stats", "Show the resource usage of containers."),
    "delete": Verb("containers:delete", "Remove containers."),
    "rm": Verb("containers:delete", "Remove containers.", hidden=True),
    "prune": Verb("pruning:prune_containers", "Remove containers that have stopped."),
    "logs": Verb("logs:logs", "Print the output of a container."),
    "events": Verb("events:events", "Print what happens to containers."),
    "overhead": Verb("overhead:overhead", "Measure the RuntimeClass overhead for this node."),
    "inspect": Verb("inspect:inspect", "Show a sandbox in detail: processes, devices, network, files, guest."),
    "check": Verb("check:check", "Check whether this machine can run sandboxes."),
    "kata-check": Verb("check:check", "Check whether this machine can run sandboxes.", hidden=True),
    "collect-data": Verb("collect:collect_data", "Collect the data for a bug report, without secrets."),
    "metrics": Verb("management:metrics", "Print the metrics of a sandbox, for Prometheus."),
    "env": Verb("environment:env", "Print versions, paths and settings."),
    "info": Verb("environment:env", "Print versions, paths and settings.", hidden=True),
    "kata-env": Verb("environment:env", "Print versions, paths and settings.", hidden=True),
    "container": Verb("container_group:container", "Manage containers.", hidden=True),
    "image": Verb("images:image", "Manage images."),
    "images": Verb("images:list_images", "List container images."),
    "rmi": Verb("images:remove", "Remove images.", hidden=True),
    "pull": Verb("images:pull", "Pull an image from a registry.", hidden=True),
    "import": Verb("images:import_image", "Bring in an image, or a root file system as a tar.", hidden=True),
    "load": Verb("image_verbs:load", "Bring in the images of an archive.", hidden=True),
    "save": Verb("image_verbs:save", "Write images to an archive.", hidden=True),
    "tag": Verb("image_verbs:tag", "Give an image one more name.", hidden=True),
    "history": Verb("image_verbs:history", "Show how an image was made.", hidden=True),
    "factory": Verb("factory:factory", "Manage virtual machine templates."),
    "network": Verb("network:network", "Manage container networks."),
    "system": Verb("pruning:system", "See what takes space, and remove what nobody needs."),
    "volume": Verb("volumes:volume", "Manage volumes."),
    "iptables": Verb("management:iptables", "Get or set the iptables rules of a sandbox's guest."),
    "direct-volume": Verb("direct_volumes:direct_volume", "Manage block devices that guests mount as volumes."),
    "cluster": Verb("cluster:cluster", "See Katapod on a Kubernetes cluster."),
    "config": Verb("config:config", "Show or check the configuration."),
}


class Program(Group):
    """The group of all verbs, whose commands are loaded one by one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands and cmd_name in VERBS:
            self.load(cmd_name)
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Raises UsageError for a verb that will not come, with what does it; click's error with the nearest verb."""
        name = args[0]
        if name not in VERBS and not name.startswith("-") and not ctx.resilient_parsing:
            from katapod.cli.not_here import NOT_HERE

            if name in NOT_HERE:
                why, way = NOT_HERE[name]
                raise UsageError(f"there is no {name}: {why}", hint=way)
            shown = [verb for verb, each in VERBS.items() if not each.hidden]
            known = near(name, [*shown, *dict(_engine_verbs()), *NOT_HERE], NEAR_VERB)
            ctx.fail(f"No such command {name!r}.{f' Did you mean {known[0]}?' if known else ''}")
        return super().resolve_command(ctx, args)

    def load(self, name: str) -> None:
        verb = VERBS[name]
        module, _, attribute = verb.place.partition(":")
        command: click.Command = getattr(importlib.import_module(f"katapod.cli.{module}"), attribute)
        command = copy.copy(command)  # which may have another name too, that is shown where this one is hidden
        command.short_help, command.hidden = verb.summary, verb.hidden
        self.add_command(command, name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.summary) for name, verb in VERBS.items() if not verb.hidden])
        with formatter.section("Commands of an OCI runtime, for container engines"):
            formatter.write_dl(_engine_verbs())

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list["click.shell_completion.CompletionItem"]:
        from click.shell_completion import CompletionItem

        ours = [(name, verb.summary) for name, verb in VERBS.items() if not verb.hidden]
        shown = [(name, summary) for name, summary in (*ours, *_engine_verbs()) if name.startswith(incomplete)]
        options = click.Command.shell_complete(self, ctx, incomplete)  # a group's own would load all verbs
        return [CompletionItem(name, help=summary) for name, summary in shown] + options


def _engine_verbs() -> list[tuple[str, str]]:
    """Those that only OCI engines have; of the others one name stands for both."""
    from katapod.oci.summaries import SUMMARIES
    from katapod.oci.words import ONLY_OCI

    return [(name, summary) for name, summary in SUMMARIES.items() if name in ONLY_OCI]


def _print_version() -> None:
    from katapod import __version__
    from katapod.version import OCI_VERSION, commit

    print(f"kata-runtime  : {__version__}\n   commit   : {commit()}\n   OCI specs: {OCI_VERSION}")


def _print_paths() -> None:
    from katapod.model.config import CONFIG_PATHS

    print("\n".join(CONFIG_PATHS))


def _install_completion() -> None:
    from katapod.cli.completion import install_completion

    install_completion()


def _show_completion() -> None:
    from katapod.cli.completion import show_completion

    show_completion()


def _question(*names: str, help: str, action: Callable[[], None]) -> Callable[[F], F]:
    """A flag that is answered at once, whatever verb comes after it."""

    def answer(context: click.Context, _: click.Parameter, given: bool) -> None:
        if given and not context.resilient_parsing:
            action()
            context.exit()

    return flag(*names, help=help, callback=answer, is_eager=True, expose_value=False)


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@option("--config", "--kata-config", "config", metavar="FILE", type=HOST_PATH, help="Configuration file to use.")
@flag("--debug", help="Log each step to standard error.")
@_question(
    "--show-default-config-paths",
    "--kata-show-default-config-paths",
    help="Print the paths of the configuration in search order, and exit.",
    action=_print_paths,
)
@_question("--version", "-v", help="Print the version.", action=_print_version)
@_question("--install-completion", help="Install completion for the current shell.", action=_install_completion)
@_question(
    "--show-completion",
    help="Show completion for the current shell, to copy it or customize the installation.",
    action=_show_completion,
)
@click.pass_context
def kata_runtime(context: click.Context, config: str, debug: bool) -> None:
    """Run containers, each in a small virtual machine with its own kernel.

    To begin with: kata-runtime run --rm busybox uname -r

    Container engines find the commands of an OCI runtime here, too: kata-runtime --root DIR --help
    """
    context.obj = Globals(config_file=config, debug=debug, keep_run=context.obj)
    context.obj.set_up_logging()


@click.command("version", cls=Command)
def version() -> None:
    """Print the version."""
    _print_version()
