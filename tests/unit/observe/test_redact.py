"""Secrets do not get into a bug report: a corpus of what files, logs and hostile guests hold. HUNTER is the secret."""
# ruff: noqa: E501 - a table

import json

import pytest

from katapod.observe.redact import LEFT_OUT, redact, redact_arguments, redact_document

HUNTER = "hunTer2x9"
PEM = f"-----BEGIN RSA PRIVATE KEY-----\nMII{HUNTER}\nabc=\n-----END RSA PRIVATE KEY-----"

CORPUS = {
    "jaeger": f'jaeger_password = "{HUNTER}"',
    "jaeger user": f'jaeger_user = "{HUNTER}"',
    "toml literal": f"password = '{HUNTER}'",
    "toml in a row": f'auth = {{ username = "{HUNTER}", password = "{HUNTER}" }}',
    "toml table": f'[plugins."io.containerd.grpc.v1.cri".registry.configs."r.example".auth]\n  username = "{HUNTER}"\n  x="{HUNTER}"',
    "toml spread": f'identitytoken = """\n{HUNTER}\n{HUNTER}"""\nnext = 1',
    "toml closed at once": f'token = """{HUNTER}"""',
    "toml array": f'tokens = [\n  "{HUNTER}",\n  "b"\n]',
    "toml escaped key": f'"p\\u0061ssword" = "{HUNTER}"',
    "toml dotted key": f'registry.auth.password = "{HUNTER}"',
    "yaml": f"password: {HUNTER}",
    "yaml of many words": f"client_secret: two words {HUNTER}",
    "yaml block": f"  private_key: |\n    {HUNTER}\n\n    {HUNTER}\n  next: 1",
    "yaml folded": f"secret: >-\n  {HUNTER}",
    "yaml below": f"token:\n  {HUNTER}",
    "yaml list": f"tokens:\n- {HUNTER}\n- {HUNTER}\nnext: 1",
    "kubeconfig": f"users:\n- name: admin\n  user:\n    client-key-data: {HUNTER}\n    client-certificate-data: {HUNTER}",
    "json": json.dumps({"auths": {"r.example": {"auth": HUNTER}}}),
    "json spread": json.dumps({"credHelpers": 1, "auth": {"deep": [HUNTER]}, "password": HUNTER}, indent=2),
    "json in json": json.dumps({"msg": json.dumps({"password": HUNTER})}),
    "json in json in json": json.dumps({"msg": json.dumps({"msg": json.dumps({"password": HUNTER})})}),
    "json on lines of its own": f'{{\n"password":\n"{HUNTER}"\n}}',
    "json of a name and a value": json.dumps([{"name": "DB_PASSWORD", "value": HUNTER}]),
    "yaml of a name and a value": f"- name: DB_PASSWORD\n  value: {HUNTER}",
    "toml environment": f'default_env = ["HARMLESS={HUNTER}"]',
    "suffix": f"deploy_key = {HUNTER}",
    "json with a quote": json.dumps({"password": f'a"b {HUNTER}'}),
    "environment": f"AWS_SECRET_ACCESS_KEY={HUNTER}",
    "environment quoted": f'export DB_PASSWORD="{HUNTER} {HUNTER}"',
    "environment upper": f"PGPASSWORD={HUNTER}",
    "url": f"proxy = https://user:{HUNTER}@proxy.example:3128/",
    "url of a user": f"https://{HUNTER}@git.example/x",
    "url with at signs": f"https://user:{HUNTER}@{HUNTER}@proxy.example/",
    "url query": f"GET /v2?service=r&access_token={HUNTER}&scope=x",
    "header": f"Authorization: Basic {HUNTER}AAAA",
    "bearer": f"curl -H 'x: Bearer {HUNTER}.abc'",
    "cookie": f"Set-Cookie: sid={HUNTER}; path=/",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJodW5UZXIyeDki.hunTer2x9abc",
    "github": f"cloned with ghp_{HUNTER}{HUNTER}{HUNTER}",
    "flag": f"server --password={HUNTER} --port 80",
    "flag and word": f"server --token {HUNTER} --port 80",
    "flag in json": f'["server", "--token", "{HUNTER}"]',
    "unterminated": f'password = "{HUNTER}',
    "pem": f"a\n{PEM}\nb",
    "pem in json": json.dumps({"x": PEM}),
    "pem begun": f"-----BEGIN PRIVATE KEY-----\n{HUNTER}",
    "pem cut off": f"{HUNTER}\n{HUNTER}\n-----END EC PRIVATE KEY-----\nnext",
    "logfmt": f'level=info msg="login" password={HUNTER} user=x',
    "go struct": f"config: Password:{HUNTER} User:x",
    "case": f"PaSsWoRd = {HUNTER}",
    "no blanks": f"password:{HUNTER}",
    "walrus": f"password := {HUNTER}",
    "annotation": json.dumps({"kubectl.kubernetes.io/last-applied-configuration": f'{{"env":"{HUNTER}"}}'}),
}


@pytest.mark.parametrize("name", CORPUS)
def test_secret_is_left_out(name: str) -> None:
    clean = redact(CORPUS[name])
    assert HUNTER not in clean
    assert LEFT_OUT in clean


def test_the_rest_stays() -> None:
    text = (
        'kernel_params = "console=hvc0 quiet"\n[hypervisor.qemu]\npath = "/usr/bin/qemu-system-x86_64"\n'
        'default_memory = 2048\ntime=12:30:01 level=error msg="cannot start: no such file"\n'
        "-device vhost-user-fs-pci,chardev=char0,tag=kataShared\nhttps://docs.example/a?page=2\n"
        "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
    )
    assert redact(text) == text


def test_what_follows_a_secret_of_several_lines_stays() -> None:
    assert redact('token = """\nx\n"""\nnext = 1').endswith("\nnext = 1")
    assert redact('"password":\n"next": 1').endswith('"next": 1')
    assert redact("  key_data: |\n    x\n  next: 1").endswith("\n  next: 1")
    assert redact(f"a\n{PEM}\nb") == f"a\n{LEFT_OUT}\nb"
    assert redact('[x.auth]\na = "b"\n[y]\nc = "d"').endswith('[y]\nc = "d"')
    assert redact(f"server --password={HUNTER} --port 80").endswith(" --port 80")


@pytest.mark.parametrize(
    "text",
    [
        "a" * 500_000,
        "password" * 60_000,
        "password=" * 12_500,
        '"' * 100_000,
        'password="' + '\\"' * 50_000,
        "password='" * 10_000,
        "-----BEGIN PRIVATE KEY-----\n" * 5_000,
        "-----BEGIN " * 10_000,
        "https://" * 15_000,
        "https://" + "a:" * 50_000,
        "-" * 100_000,
        "--token " * 12_500,
        "\\u0061" * 15_000,
        "?a=" * 25_000,
        "eyJ" * 25_000,
        "eyJaaaaaaaa." * 7_500,
        "bearer " * 15_000,
        "[" * 100_000,
        " " * 100_000,
        "\n" * 100_000,
        "password:\n" * 10_000,
        ".-" * 50_000,
        "name:a,value" * 10_000,
        "name=" * 20_000,
        "-eyJaaaaaaaa" * 10_000,
        "name=x" + "\\" * 100_000,
        "a_secret=x " * 10_000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_hostile_text_takes_no_time(text: str) -> None:
    """In quadratic time it would take a quarter of an hour, which a test does not get."""
    redact(text * 4)


def test_arguments() -> None:
    shown = redact_arguments(
        ["mysqld", "--password", HUNTER, f"--root-token={HUNTER}", "-v", f"{HUNTER}{HUNTER}{HUNTER}AB", "/data/x"]
    )
    assert shown == ["mysqld", "--password", LEFT_OUT, f"--root-token={LEFT_OUT}", "-v", LEFT_OUT, "/data/x"]
    assert redact_arguments(["sleep", "infinity"]) == ["sleep", "infinity"]
    identity = "0123456789abcdef" * 4
    assert redact_arguments(["x", identity]) == ["x", identity]


def test_documents_keep_names_and_lose_values() -> None:
    spec = {
        "process": {"env": [f"A={HUNTER}", HUNTER], "args": ["x", "--token", HUNTER], "cwd": "/"},
        "Env": {"B": HUNTER},
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": HUNTER, "a/b": f"https://u:{HUNTER}@h/"},
        "token": HUNTER,
        "size": 3,
    }
    clean = redact_document(spec)
    assert HUNTER not in json.dumps(clean)
    assert clean["process"]["env"] == [f"A={LEFT_OUT}", LEFT_OUT]
    assert clean["Env"] == {"B": LEFT_OUT}
    assert (clean["process"]["cwd"], clean["size"]) == ("/", 3)
