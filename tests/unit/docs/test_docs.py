"""The documentation against the program: keys, defaults, messages, commands, links and rooms."""

import ast
import importlib
import pkgutil
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest

import katapod
from katapod.cli.main import load_command
from katapod.cli.program import VERBS
from katapod.model.config import Config, parse_config
from katapod.model.errors import KatapodError
from katapod.oci.arguments import Call, parse_call
from katapod.oci.words import speaks_oci

ROOT = Path(__file__).parents[3]
TOP_PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md"]
PAGES = sorted([*TOP_PAGES, *(ROOT / "docs").rglob("*.md")])
HOW_TO = ROOT / "docs" / "how-to"
CONFIGURATION = HOW_TO / "configuration.md"
CONFIGURATION_KEYS = HOW_TO / "configuration-keys.md"
SAMPLE = ROOT / "packaging" / "configuration.toml"
SOURCES = Path(katapod.__file__).parent
TABLES = {
    "hypervisor.qemu": "qemu",
    "hypervisor.uml": "uml",
    "agent.kata": "agent",
    "runtime": "runtime",
    "factory": "factory",
    "katapod": "katapod",
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def toml_of(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case tuple():
            return f"[{', '.join(toml_of(item) for item in value)}]"
        case _:
            return str(value)


def default_keys() -> dict[str, dict[str, str]]:
    """Table -> key -> default, as TOML, of every key that is honoured."""
    config = Config()
    return {
        table: {key: toml_of(getattr(section, key)) for key in section.__struct_fields__}
        for table, section in ((table, getattr(config, field)) for table, field in TABLES.items())
    }


def test_the_tables_are_all_of_the_configuration() -> None:
    assert set(TABLES.values()) == set(Config.__struct_fields__)


def test_configuration_page_has_every_key_with_its_default() -> None:
    found: dict[str, dict[str, str]] = {}
    table = ""
    for line in CONFIGURATION_KEYS.read_text().splitlines():
        if heading := re.fullmatch(r"### \[(.+)\]", line):
            table = heading[1]
            found[table] = {}
        elif line.startswith("## "):
            table = ""
        elif table and (row := re.match(r"\| `(\w+)` \| `(.+?)` \| \S", line)):
            found[table][row[1]] = row[2]
    assert found == default_keys()


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def test_configuration_page_shows_the_reports_that_are_made() -> None:
    accepted, refused = blocks(CONFIGURATION, "toml")
    reports, errors = blocks(CONFIGURATION, "")
    assert [str(problem) for problem in parse_config(accepted.encode()).problems] == reports.splitlines()
    with pytest.raises(KatapodError) as caught:
        parse_config(refused.encode())
    assert str(caught.value).splitlines() == errors.splitlines()


def test_sample_configuration_changes_nothing() -> None:
    parsed = parse_config(SAMPLE.read_bytes())
    assert parsed.problems == ()
    assert parsed.config == Config()


def test_sample_configuration_shows_every_key_with_its_default() -> None:
    text = SAMPLE.read_text()
    shown: dict[str, dict[str, str]] = {}
    table = ""
    for line in text.splitlines():
        if heading := re.fullmatch(r"\[(.+)\]", line):
            table = heading[1]
            shown[table] = {}
        elif key := re.fullmatch(r"#(\w+) = (.+)", line):
            assert key[1] not in shown[table]
            shown[table][key[1]] = key[2]
    assert shown == default_keys()
    switched_on = parse_config(re.sub(r"^#(\w+ = )", r"\1", text, flags=re.MULTILINE).encode())
    assert switched_on.problems == ()
    assert switched_on.config == Config()


@cache
def command_tree() -> Any:
    return load_command(*VERBS)


def parse_as_the_program_does(arguments: list[str]) -> None:
    """Raise what the program would for wrong verbs, flags and numbers of arguments. Runs nothing."""
    command, name = command_tree(), "kata-runtime"
    parent = None
    while True:
        context = command.make_context(name, list(arguments), parent=parent)
        if not hasattr(command, "commands"):
            return
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        name, command, arguments = command.resolve_command(context, rest)
        parent = context


def shell_words(line: str) -> list[list[str]]:
    """The `kata-runtime` commands of one shell line, each without its name and its redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|;&"):
            commands.append([])
        elif not re.match(r"[0-9]*[<>]", word):
            commands[-1].append(word)
    return [words[1:] for words in commands if words and words[0].endswith("kata-runtime")]


def documented_commands() -> list[Any]:
    """(line, whether it is a whole command as in a console, or a mention in a sentence)."""
    found = []
    for page in PAGES:
        shown = [line for block in blocks(page, "console") for line in block.splitlines() if line[:2] in ("# ", "$ ")]
        mentioned = re.findall(r"`((?:sudo )?kata-runtime [^`\n]+)`", page.read_text())
        for line, whole in [*((line[2:], True) for line in shown), *((line, False) for line in mentioned)]:
            line = line.removeprefix("sudo ")
            if "kata-runtime" in line:
                found.append(pytest.param(line, whole, id=f"{name_of(page)}: {line}"))
    return found


@pytest.mark.parametrize(("line", "whole"), documented_commands())
def test_documented_command_is_one(line: str, whole: bool) -> None:
    for words in shell_words(line):
        if "..." in words:  # "kata-runtime run ...": only what is in front can be wrong
            words = [*words[: words.index("...")], "--help"]
        try:
            if speaks_oci(words):
                parse_call(words, Call())
            else:
                parse_as_the_program_does(words)
        except click.exceptions.Exit:
            continue  # --help and --version end here
        except click.MissingParameter:
            assert not whole, line
        except click.ClickException as exc:
            pytest.fail(f"kata-runtime {shlex.join(words)}: {exc.format_message()}")


def texts_of(path: Path) -> list[str]:
    """The strings of a module that names the program, without docstrings, which are for readers of the source."""
    text = path.read_text()
    if "kata-runtime" not in text:  # parsing takes long
        return []
    nodes = list(ast.walk(ast.parse(text)))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]


def test_texts_of_the_program_name_verbs_that_exist() -> None:
    verbs = set(command_tree().commands)
    wrong = [
        f"{path.relative_to(SOURCES)}: kata-runtime {verb}"
        for path in SOURCES.rglob("*.py")
        for text in texts_of(path)
        for verb in re.findall(r"(?<!the )kata-runtime ([a-z][a-z-]+)\b", text)
        if verb not in verbs
    ]
    assert wrong == []


def all_errors() -> set[str]:
    for module in pkgutil.walk_packages(katapod.__path__, "katapod."):
        # libregset.so looks like a module, and is preloaded into kernels
        if not module.name.startswith("katapod.agent") and not module.name.endswith(("__main__", ".libregset")):
            importlib.import_module(module.name)
    found, left = set(), [KatapodError]
    while left:
        kind = left.pop()
        if kind.__module__.startswith("katapod."):  # tests derive their own
            found.add(kind.__name__)
            left.extend(kind.__subclasses__())
    return found


def test_troubleshooting_has_every_error() -> None:
    rows = re.findall(r"^\| .+? \| `(\w+)` \| \S", (HOW_TO / "troubleshooting.md").read_text(), re.MULTILINE)
    assert set(rows) == all_errors(), "add a row for a new error to docs/how-to/troubleshooting.md"


def test_architecture_names_every_room() -> None:
    rooms = {path.parent.name for path in SOURCES.glob("*/__init__.py")}
    page = (ROOT / "docs" / "architecture.md").read_text()
    picture = (ROOT / "docs" / "architecture.svg").read_text()
    assert set(re.findall(r"^\| `(\w+)/` \|", page, re.MULTILINE)) == rooms
    assert set(re.findall(r'class="name mid">(\w+)/</text>', picture)) == rooms


def test_architecture_lists_every_decision() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    files = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert len({path.name[:4] for path in files}) == len(files)  # numbers are taken before pages are written
    for path in files:
        text = path.read_text()
        assert re.match(rf"# {int(path.name[:4])}\. \S", text), name_of(path)
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Context", "Decision", "What we gave up"], name_of(path)
        assert f"](adr/{path.name})" in page, name_of(path)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_documents_name_modules_that_exist() -> None:
    """Decisions and the changelog tell of their time; all other pages tell of now."""
    for page in PAGES:
        if page.parent.name != "adr" and page.name != "CHANGELOG.md":
            for path in re.findall(r"`([\w./-]+/[\w-]+\.py)`", page.read_text()):
                found = any((base / path).exists() for base in (ROOT, ROOT / "tests", SOURCES))
                assert found, f"{name_of(page)} names {path}"


OF_OTHERS = re.compile(r"Kata\s+Containers|containerd|CRI-O|OCI|[Ss]pecification|opencontainers")


def test_sources_cite_files_that_exist() -> None:
    """A comment that cites a document names one of this repository, or says whose it is."""
    for path in sorted([*SOURCES.rglob("*.py"), *SOURCES.rglob("*.proto")]):
        text = path.read_text()
        for found in re.finditer(r"[\w./-]+\.md\b", text):
            here = any((base / found[0]).exists() for base in (ROOT, HOW_TO))
            around = text[max(0, found.start() - 250) : found.end() + 100]
            assert here or OF_OTHERS.search(around), f"{name_of(path)} cites {found[0]}: whose is it?"
