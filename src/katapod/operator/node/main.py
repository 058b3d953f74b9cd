"""`kata-node`: put Katapod on this node, or take it away. The operator's jobs run it, and it can be run by hand."""

import argparse
import logging
import re
import sys
from pathlib import Path

import msgspec

from katapod.operator.handlers import NodeSettings, default_settings
from katapod.operator.node.engine import DEFAULT_SOCKET
from katapod.operator.node.errors import StageFailed
from katapod.operator.node.host import Host
from katapod.operator.node.payload import HANDLERS
from katapod.operator.node.stages import install, uninstall
from katapod.operator.report import ACCELERATORS, Report

__all__ = ["main"]

NAME = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"  # of a runtime handler. Source: Kubernetes API, RuntimeClass
MESSAGE = 1500  # characters: the kubelet takes 4096 bytes of a termination message


def main() -> int:
    options = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    host = Host(options.root)
    try:
        if options.action == "install":
            report = install(
                host,
                options.source,
                options.target,
                accelerators=options.accelerators,
                settings=options.settings,
                socket_path=options.socket,
            )
        else:
            report = uninstall(host, socket_path=options.socket)
    except StageFailed as exc:
        report = Report(
            action=options.action, ok=False, target=options.target, stage=exc.stage, message=str(exc)[:MESSAGE]
        )
        print(f"kata-node: cannot {options.action}, stage {exc.stage}: {exc}", file=sys.stderr)
    text = msgspec.json.encode(report).decode()
    if options.report:
        options.report.write_text(text)
    else:
        print(text)
    return 0 if report.ok else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kata-node", description=__doc__)
    parser.add_argument("action", choices=("install", "uninstall"))
    parser.add_argument("--root", type=Path, default=Path("/"), help="the node's root directory; / by default")
    parser.add_argument("--source", type=Path, default=Path("/"), help="root directory that the payload is copied from")
    parser.add_argument("--target", default="manual", help="name of the payload: /opt/katapod/TARGET")
    parser.add_argument(
        "--accelerators", type=parse_accelerators, default=ACCELERATORS, help="kvm,uml,tcg, or some of them"
    )
    parser.add_argument(
        "--settings",
        type=parse_settings,
        default=default_settings(),
        help="runtime handlers and their drop-ins, the handler kata without any by default: "
        '{"handlers": [{"name": "kata", "dropIns": ["TOML"], "measure": true}]}',
    )
    parser.add_argument("--socket", default=DEFAULT_SOCKET, help=f"containerd's; {DEFAULT_SOCKET} by default")
    parser.add_argument("--report", type=Path, help="write the outcome, JSON, to this file; to stdout by default")
    options = parser.parse_args()
    if (
        not options.target.replace("-", "").replace(".", "").isalnum()
        or options.target.startswith((".", "-"))
        or (options.target == HANDLERS)
    ):
        parser.error(f"--target {options.target!r} is no name for a directory")
    return options


def parse_accelerators(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if unknown := set(found) - set(ACCELERATORS):
        raise argparse.ArgumentTypeError(f"knows no {', '.join(sorted(unknown))}; known are {', '.join(ACCELERATORS)}")
    return found


def parse_settings(text: str) -> NodeSettings:
    try:
        found = msgspec.json.decode(text, type=NodeSettings)
    except msgspec.MsgspecError as exc:
        raise argparse.ArgumentTypeError(f"cannot read {text[:100]!r}: {exc}") from exc
    for one in found.handlers:
        if not re.fullmatch(NAME, one.name):
            raise argparse.ArgumentTypeError(f"{one.name!r} is no name for a runtime handler")
    return found


if __name__ == "__main__":
    sys.exit(main())
