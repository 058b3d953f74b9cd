"""Templates of --format."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from katapod.model.errors import UsageError
from katapod.model.go_template import parse_template

VALUE: dict[str, Any] = {
    "Name": "web",
    "State": {"Status": "running", "Pid": 7, "Dead": False, "Error": ""},
    "Labels": {"b": "2", "a": "1"},
    "Args": ["sh", "-c"],
    "None": None,
    "Empty": [],
    "Ports": [{"Host": 80}, {"Host": 81}],
}


def render(text: str, value: Any = VALUE) -> str:
    return parse_template(text).render(value)


# By the documentation of text/template, and of Docker's functions.
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("plain", "plain"),
        ("{{.Name}}", "web"),
        ("{{ .State.Status }}", "running"),
        ("{{.State.Pid}} {{.State.Dead}}", "7 false"),
        ("{{.Args}} {{.Labels}} {{.None}}", "[sh -c] map[a:1 b:2] <no value>"),
        ("{{json .Labels}}", '{"b":"2","a":"1"}'),
        ("{{.Args | json}}", '["sh","-c"]'),
        ("{{range .Args}}<{{.}}>{{end}}", "<sh><-c>"),
        ("{{range $i, $a := .Args}}{{$i}}={{$a}} {{end}}", "0=sh 1=-c "),
        ("{{range $k, $v := .Labels}}{{$k}}={{$v}};{{end}}", "a=1;b=2;"),
        ("{{range .Ports}}{{.Host}} {{$.Name}} {{end}}", "80 web 81 web "),
        ("{{range .Empty}}x{{else}}none{{end}}", "none"),
        ("{{if .State.Error}}bad{{else}}good{{end}}", "good"),
        ("{{if .State.Error}}1{{else if eq .Name `web`}}2{{else}}3{{end}}", "2"),
        ("{{with .State}}{{.Pid}}{{end}}", "7"),
        ("{{with $s := .State}}{{$s.Pid}}{{end}}", "7"),
        ('{{index .Labels "a"}}{{index .Args 1}}', "1-c"),
        ('{{index .Labels "none"}}', ""),
        ("{{len .Args}}", "2"),
        ('{{join .Args ","}}', "sh,-c"),
        ('{{range split "a.b" "."}}{{.}}{{end}}', "ab"),
        ("{{upper .Name}} {{lower `ABC`}} {{title .Name}}", "WEB abc Web"),
        ('{{printf "%-5s|%d|%q|%%" .Name .State.Pid .Name}}', 'web  |7|"web"|%'),
        ("{{println .Name}}", "web\n"),
        ("{{and .Name .State.Pid}} {{or .State.Error .Name}} {{not .State.Dead}}", "7 web true"),
        ("{{if and (eq .Name `web`) (gt .State.Pid 3)}}yes{{end}}", "yes"),
        ("{{$x := .Name}}{{$x}}", "web"),
        ("a {{- .Name -}} b", "awebb"),
        ("{{/* a comment */}}x", "x"),
        ("{{.Name}}\\t{{.State.Pid}}\\n", "web\t7\n"),
        ("{{slice .Name 0 2}}", "we"),
        ("{{(index .Ports 1).Host}}", "81"),
    ],
)
def test_rendered(text: str, shown: str) -> None:
    assert render(text) == shown


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{{.Nme}}", "there is no .Nme; there is .Args, .Empty"),
        ("{{.Name.X}}", "nothing below it"),
        ("{{.Name", "has no '}}'"),
        ("{{range .Args}}", "the range has no end"),
        ("{{end}}", "unexpected 'end'"),
        ("{{if .Name}}{{else}}{{else}}{{end}}", "more than one else"),
        ("{{frob .Name}}", "there is no function 'frob'"),
        ("{{$x}}", "there is no variable $x"),
        ("{{index .Args 9}}", "index 9 is not in"),
        ("{{range .Name}}{{end}}", "range cannot go over"),
        ("{{(.Name}}", "has no ')'"),
        ("{{}}", "a value is missing"),
        ("{{.Name | .State}}", "is no function"),
        ("{{len .State.Pid}}", "len()"),
        ("{{.Name ?}}", "cannot read"),
        ("{{if .Name}}" * 60, "nested too deep"),
    ],
)
def test_refused(text: str, cause: str) -> None:
    with pytest.raises(UsageError) as caught:
        render(text)
    assert cause in str(caught.value)
    assert "cannot use --format" in str(caught.value)


def test_a_table_names_its_columns() -> None:
    found = parse_template("table {{.Name}}\\t{{.State}}")
    assert (found.table, found.fields) == (True, ("Name", "State"))
    assert found.render({"Name": "a", "State": "b"}) == "a\tb"


@settings(max_examples=200)
@given(st.text(alphabet='{}.|()$"`abN eifndrgw:=,\\ 01-', max_size=60))
def test_any_text_is_a_template_or_refused(text: str) -> None:
    try:
        render(text)
    except UsageError:
        return
