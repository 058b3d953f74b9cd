"""Man pages of kata-runtime and of each of its commands, from what `--help` is made of: man_pages.py FOLDER VERSION."""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import click
from click_man.core import write_man_pages

from katapod.cli.main import load_command
from katapod.cli.program import VERBS


def main() -> int:
    folder, version = Path(sys.argv[1]), sys.argv[2]
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
    date = datetime.fromtimestamp(epoch, UTC).date().isoformat()
    command = load_command(*VERBS)
    _plain(command)
    write_man_pages("kata-runtime", command, version=version, target_dir=str(folder), date=date)
    for page in folder.glob("kata-runtime*.1"):  # an administrator's program
        text = page.read_text().replace('"1"', '"8"', 1)
        page.with_suffix(".8").write_text(text)
        page.unlink()
    return 0


def _plain(command: click.Command) -> None:
    """Marks of rich text are for terminals."""
    command.help = (command.help or "").replace("\b", "")
    if isinstance(command, click.Group):
        for one in command.commands.values():
            _plain(one)


if __name__ == "__main__":
    sys.exit(main())
