"""Write the tables of docs/how-to/from-docker.md from the declarations of the command line.

Run it after a change of cli/run_options.py, cli/program.py or cli/not_here.py: `make configuration`. With --check it
writes nothing and fails when the page is out of date.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from katapod.cli.declared import Declared
from katapod.cli.not_here import NOT_HERE
from katapod.cli.program import VERBS
from katapod.cli.run_options import RUN_OPTIONS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "how-to" / "from-docker.md"


def working_options(options: Iterable[Declared]) -> str:
    lines = ["| Option | Here |", "|---|---|"]
    for each in sorted((one for one in options if not one.cause), key=_order):
        about = cell(each.help.removesuffix("."))
        lines.append(f"| {shown(each)} | {about}{f'. *{cell(each.note)}*' if each.note else ''} |")
    return "\n".join(lines)


def refused_options(options: Iterable[Declared]) -> str:
    lines = ["| Option | Taken for | Otherwise refused, since | What does it |", "|---|---|---|---|"]
    for each in sorted((one for one in options if one.cause), key=_order):
        meant = ", ".join(f"`{value}`" for value in each.meant if value) if each.metavar else "`false`"
        lines.append(f"| {shown(each)} | {meant} | {cell(each.cause)} | {cell(each.way)} |")
    return "\n".join(lines)


def absent_verbs() -> str:
    lines = ["| Verb | Why | What does it |", "|---|---|---|"]
    lines += [f"| `{name}` | {cell(why)} | {cell(way)} |" for name, (why, way) in sorted(NOT_HERE.items())]
    return "\n".join(lines)


def present_verbs() -> str:
    lines = ["| Verb | Here |", "|---|---|"]
    lines += [f"| `{name}` | {cell(each.summary.removesuffix('.'))} |" for name, each in sorted(VERBS.items())]
    return "\n".join(lines)


def _order(each: Declared) -> str:
    return next(name for name in reversed(each.names) if name.startswith("-")).lstrip("-").lower()


def shown(each: Declared) -> str:
    return ", ".join(f"`{name}`" for name in each.names if name.startswith("-"))


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def render(page: str) -> str:
    """The page with its tables as they are now: each stands between <!-- NAME --> and <!-- end -->."""
    tables = {
        "options": working_options(RUN_OPTIONS),
        "refused": refused_options(RUN_OPTIONS),
        "verbs": present_verbs(),
        "absent": absent_verbs(),
    }
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = pattern.subn(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", page)
        if count != 1:
            raise SystemExit(f"{PAGE}: it has {count} places for {name}")
    return page


def main() -> None:
    before = PAGE.read_text()
    now = render(before)
    if now == before:
        return
    if "--check" in sys.argv[1:]:
        raise SystemExit(f"{PAGE.relative_to(ROOT)} is out of date: run make configuration")
    PAGE.write_text(now)


if __name__ == "__main__":
    main()
