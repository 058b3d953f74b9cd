"""Write the tables of docs/how-to/from-docker.md from the declarations of the command line, and those of
docs/how-to/docker-lines.md from the lines that a test runs.

Run it after a change of cli/run_options.py, cli/program.py, cli/not_here.py or tests/e2e/docker-lines.txt: `make
configuration`. With --check it writes nothing and fails when a page is out of date.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from katapod.cli.declared import Declared
from katapod.cli.not_here import NOT_HERE
from katapod.cli.program import VERBS
from katapod.cli.run_options import RUN_OPTIONS

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from kit.docker_lines import LINES, Line, read_lines  # noqa: E402

PAGE = ROOT / "docs" / "how-to" / "from-docker.md"
LINES_PAGE = PAGE.with_name("docker-lines.md")


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


def differing_lines(lines: Iterable[Line]) -> str:
    table = ["| Line | What differs here, or why |", "|---|---|"]
    return "\n".join([*table, *(f"| `{cell(_named(each))}` | {cell(each.reason)} |" for each in lines if each.reason)])


def alike_lines(lines: Iterable[Line]) -> str:
    """By section, in the order in which they are run."""
    found = dict[str, list[str]]()
    for each in lines:
        if not each.reason:
            found.setdefault(each.section, []).append(_named(each))
    return "\n\n".join(f"{section}:\n\n```sh\n{chr(10).join(some)}\n```" for section, some in found.items())


def _named(line: Line) -> str:
    return line.words.replace("@", "")


def line_tables() -> dict[str, str]:
    lines = list(read_lines(LINES.read_text()))
    alike = sum(not each.reason for each in lines)
    return {
        "count": f"Of {len(lines)} lines {alike} are alike.",
        "differing": differing_lines(lines),
        "alike": alike_lines(lines),
    }


def command_tables() -> dict[str, str]:
    return {
        "options": working_options(RUN_OPTIONS),
        "refused": refused_options(RUN_OPTIONS),
        "verbs": present_verbs(),
        "absent": absent_verbs(),
    }


def render(path: Path, tables: Mapping[str, str]) -> str:
    """The page with its tables as they are now: each stands between <!-- NAME --> and <!-- end -->."""
    page = path.read_text()
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = pattern.subn(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", page)
        if count != 1:
            raise SystemExit(f"{path}: it has {count} places for {name}")
    return page


def main() -> None:
    for path, tables in ((PAGE, command_tables()), (LINES_PAGE, line_tables())):
        now = render(path, tables)
        if now == path.read_text():
            continue
        if "--check" in sys.argv[1:]:
            raise SystemExit(f"{path.relative_to(ROOT)} is out of date: run make configuration")
        path.write_text(now)


if __name__ == "__main__":
    main()
