"""`spec`, `features`, --version, --help: what needs no container."""

from __future__ import annotations

import json
import os

from katapod.oci.arguments import SYNTAX
from katapod.oci.errors import OciError, not_saved
from katapod.oci.starter_spec import starter_spec
from katapod.oci.summaries import SUMMARIES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.oci.arguments import Call

__all__ = ["features", "spec", "usage", "version"]


def version(call: Call) -> int:
    """As engines read it: Podman shows it all, Docker finds the commit and the version by their lines."""
    import katapod
    from katapod.version import OCI_VERSION, commit

    print(f"kata-runtime version {katapod.__version__}\ncommit: {commit()}\nspec: {OCI_VERSION}")
    return 0


def usage(call: Call) -> int:
    if call.verb not in SYNTAX:
        print("usage: kata-runtime [--root DIR] [--log FILE] [--log-format text|json] [--systemd-cgroup] COMMAND ...")
        print("commands:")
        for verb, summary in SUMMARIES.items():
            print(f"  {verb:<10}{summary}")
        return 0
    if call.verb == "checkpoint":  # by this Podman decides whether it can be done
        raise not_saved("checkpoint")
    syntax = SYNTAX[call.verb]
    print(f"usage: kata-runtime [OPTION...] {call.verb} [OPTION...]{' ID' if syntax.least else ''}")
    for alias, name in sorted({**syntax.values, **syntax.lists, **syntax.switches}.items()):
        if alias.startswith("--"):
            print(f"  {alias}{'' if name in syntax.switches.values() else ' VALUE'}")
    return 0


def spec(call: Call) -> int:
    path = os.path.join(call.values.get("bundle", "."), "config.json")
    try:
        with open(path, "x") as handle:
            json.dump(starter_spec(rootless="rootless" in call.switches), handle, indent="\t")
            handle.write("\n")
    except FileExistsError:
        raise OciError("file config.json exists. Remove it first") from None
    except OSError as exc:
        raise OciError(f"cannot write {path}: {os.strerror(exc.errno or 0)}") from exc
    return 0


def features(call: Call) -> int:
    from katapod.plan.oci_features import oci_features

    print(json.dumps(oci_features(), indent=2))
    return 0
