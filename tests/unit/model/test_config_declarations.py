"""A key of configuration.toml is declared once: parser, `config show`, annotations, page and sample follow."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import katapod
from katapod.model.config import SECTIONS, Config, ParsedConfig, parse_config
from katapod.model.config_annotations import PREFIX, apply_annotations, known_annotations
from katapod.model.config_keys import TABLES, declaration
from katapod.model.config_refused import REFUSED_KEYS
from katapod.model.config_text import config_table, render_config
from katapod.model.errors import ConfigError
from katapod.model.toml_text import toml_value

TOOL = Path(__file__).parents[3] / "tools" / "generate_configuration.py"
KEYS = [(table, name) for table, section in SECTIONS.items() for name in section.__struct_fields__]
REFUSED = [(table, name) for table, keys in REFUSED_KEYS.items() for name in keys]
ALL_ALLOWED = b"""
[hypervisor.qemu]
enable_annotations = [".*"]
valid_hypervisor_paths = ["/*"]
valid_virtio_fs_daemon_paths = ["/*"]
valid_entropy_sources = ["/*"]
"""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_configuration", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def default_of(table: str, name: str) -> object:
    return getattr(getattr(Config(), TABLES[table]), name)


def as_annotation(value: object, separator: str) -> str:
    match value:
        case bool():
            return str(value).lower()
        case tuple():
            return separator.join(value) if separator else json.dumps(value)
        case _:
            return str(value)


def test_the_generated_files_are_up_to_date(tool: ModuleType) -> None:
    assert tool.PAGE.read_text() == tool.render_page(), "run: make configuration"
    assert tool.SAMPLE.read_text() == tool.render_sample(), "run: make configuration"


@pytest.mark.parametrize(("table", "name"), KEYS)
def test_a_key_has_a_type_a_default_and_documentation(table: str, name: str, tool: ModuleType) -> None:
    default = default_of(table, name)
    parsed = parse_config(f"[{table}]\n{name} = {toml_value(default)}\n".encode())
    assert (parsed.config, parsed.problems) == (Config(), ())
    assert config_table(ParsedConfig(Config()))[table][name]["origin"] == "default"
    assert f"\n{name} = {toml_value(default)}  # default\n" in render_config(ParsedConfig(Config()))
    ((_, _, kind, text),) = [row for row in dict(tool.rows())[table] if row[0] == name]
    assert re.fullmatch(r"\S.*[^\s.]", kind)
    assert re.fullmatch(r'["\w].+\.', text), "a docstring below the field, of whole sentences"


@pytest.mark.parametrize(("table", "name"), KEYS)
def test_an_annotation_is_honoured_as_declared(table: str, name: str) -> None:
    found = declaration(table, name)
    assert found is not None
    rule, default = found[1].annotation, default_of(table, name)
    own = (rule and rule.name) or name
    annotation = own if own.startswith(PREFIX) else f"{PREFIX}{table.partition('.')[0]}.{own}"
    before = parse_config(ALL_ALLOWED).config

    def applied() -> Config:
        values = {annotation: as_annotation(default, rule.separator if rule else "")}
        return apply_annotations(before, values, host_cpus=4, expand=lambda pattern: [str(default)]).config

    if rule is None and annotation in known_annotations():
        assert known_annotations()[annotation].table == "hypervisor.qemu", "the other hypervisor's key of that name"
    elif rule is None:
        with pytest.raises(ConfigError, match="no such annotation"):
            applied()
    elif rule.positive:
        with pytest.raises(ConfigError, match="must be greater than 0"):
            applied()
    elif rule.absolute and default == "":
        with pytest.raises(ConfigError, match="is not an absolute path"):
            applied()
    else:
        assert applied() == before
        assert known_annotations()[annotation].key == name


@pytest.mark.parametrize(("table", "name"), REFUSED)
def test_a_refused_key_is_in_the_page_with_its_reason(table: str, name: str, tool: ModuleType) -> None:
    of_table = tool.render_page().partition(f"Of `[{table}]`:")[2].partition("Of `[")[0]
    row = next(line for line in of_table.splitlines() if line.startswith(f"| `{name}` | "))
    assert row.endswith(f" | {tool._linked(REFUSED_KEYS[table][name].why)} |")
    annotations = [known for known in known_annotations().values() if (known.table, known.key) == (table, name)]
    assert len(annotations) == (REFUSED_KEYS[table][name].annotation is not None)


NEW_KEY = '''
    patience: Annotated[int, Meta(ge=1, le=99), Key(unit="seconds", annotation=AnnotationRule(positive=True))] = 42
    """How long to be patient: docs/how-to/memory.md."""
'''
TRIAL = """
import importlib.util, json, sys
from katapod.model.config import Config, ParsedConfig, judge_config
from katapod.model.config_annotations import apply_annotations
from katapod.model.config_text import render_config

spec = importlib.util.spec_from_file_location("tool", sys.argv[1])
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
annotation = "io.katacontainers.config.runtime.patience"
print(json.dumps({
    "default": Config().runtime.patience,
    "wrong": [problem.message for problem in judge_config(b"[runtime]\\npatience = 100").problems],
    "mistyped": [problem.message for problem in judge_config(b"[runtime]\\npatence = 1").problems],
    "pod": apply_annotations(Config(), {annotation: "7"}, host_cpus=1).config.runtime.patience,
    "show": render_config(ParsedConfig(Config())),
    "page": tool.render_page(),
    "sample": tool.render_sample(),
}))
"""


def test_a_new_key_needs_its_declaration_only(tmp_path: Path) -> None:
    """A copy of model/ gets two lines more; nothing else is told of the key."""
    source = Path(katapod.__file__).parent
    shutil.copytree(source / "model", tmp_path / "katapod" / "model")
    shutil.copy(source / "__init__.py", tmp_path / "katapod")
    keys = tmp_path / "katapod" / "model" / "config_keys.py"
    before, heading, after = keys.read_text().partition('    """[runtime]"""\n')
    keys.write_text(before + heading + NEW_KEY + after)
    # -I and the first entry of sys.path: the copy, whatever is installed
    trial = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{TRIAL}"
    said = subprocess.run(
        [sys.executable, "-I", "-c", trial, str(TOOL)], check=True, stdout=subprocess.PIPE, text=True, timeout=60
    ).stdout
    seen = json.loads(said)
    assert seen["default"] == 42
    assert seen["wrong"] == ["expected int <= 99, got int 100"]
    assert seen["mistyped"] == ["unknown key; did you mean patience?"]
    assert seen["pod"] == 7
    assert "\npatience = 42  # default\n" in seen["show"]
    row = (
        "| `patience` | `42` | integer, seconds, 1 to 99 | `runtime.patience`: greater than 0 "
        "| How long to be patient: [memory.md](memory.md). |"
    )
    assert row in seen["page"].splitlines()
    comment = "# How long to be patient: docs/how-to/memory.md.\n# Integer, seconds, 1 to 99.\n#patience = 42\n"
    assert comment in seen["sample"]
