"""Take secrets out of text that is to be published in a bug report. Pure.

When in doubt more is left out: a report that lacks a word is still one, a published password is not a secret any more.
Lines are cut to LINE_MAX, and what looks at the whole text runs in time linear to it: guests and containers write some
of it.
"""

import re
from typing import Any

__all__ = ["LEFT_OUT", "redact", "redact_arguments", "redact_document"]

LEFT_OUT = "[left out]"
LINE_MAX = 8192  # characters

_SECRET = re.compile(
    r"pass(word|wd|phrase)|(^|[._-])(pass|pwd|pw)$|secret|token|credential|(^|[._-])auths?$|authorization|cookie|"
    r"(api|access|private|signing|encryption|client|account|session|storage|shared)[._-]?key|key[._-]?data|"
    r"jaeger_user|kubeconfig|dockercfg|dockerconfigjson|last-applied-configuration|certificate-authority-data|"
    r"[._-]key$|(^|[._-])env(ironment)?$|client-certificate-data|signature|connection[._-]?string|(^|[._-])dsn$",
    re.IGNORECASE,
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY( BLOCK)?-----.*?(-----END [A-Z0-9 ]{0,40}-----|\Z)", re.DOTALL
)
_KEY_END = re.compile(r"\A.*?-----END [A-Z0-9 ]{0,40}PRIVATE KEY( BLOCK)?-----", re.DOTALL)
_USER_INFO = re.compile(r"(?<![a-z0-9+.-])([a-z][a-z0-9+.-]{0,30}://)[^\s/?#\"'<>]*@", re.IGNORECASE)
_QUERY = re.compile(r"([?&;])([\w.~%-]++)=([^\s&;#\"']++)")
_SCHEME = re.compile(r"\b(bearer|basic|digest|negotiate)\s+[\w.~+/=:-]{4,}", re.IGNORECASE)
_KNOWN = re.compile(
    r"(?<![\w-])eyJ[\w-]{8,}+\.[\w-]{8,}(\.[\w-]*)?|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\b(AKIA|ASIA)[A-Z0-9]{16}\b|"
    r"\bxox[abposr]-[\w-]{10,}|\bglpat-[\w-]{16,}|\bsk-[\w-]{20,}"
)
_PAIR = re.compile(r"(?<![\w.\\-])([\w.\\-]++)([\"']?\s{0,8})(:=|[:=])(\s{0,8})")
_QUOTED = re.compile(r"\\*\"(?:[^\"\\]|\\[^\"])*+(?:\\\"(?![,}\]\s:])(?:[^\"\\]|\\.)*+)?+(\\?\"|$)|'[^']*+('|$)")
_NEXT_KEY = re.compile(r"\s*([\"'])[\w.-]+\1\s*[:=]")
_FLAG = re.compile(r"(?<![^\s\"'\[,])(--?[\w.-]++)([\"']?,?\s{1,8}[\"']?)(?!-)([^\s\"']++)")
_NAMED = re.compile(
    r"(\bname\\{0,8}[\"']?\s{0,8}[:=]\s{0,8}\\{0,8}[\"']?)([\w.-]++)"
    r"(\\{0,8}[\"']?,?\s{0,80}\\{0,8}[\"']?value\\{0,8}[\"']?\s{0,8}[:=]\s{0,8})[^\n]*"
)
_ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")
_TABLE = re.compile(r"\s*\[{1,2}(.*?)\]{1,2}\s*(#.*)?$")
_LONG = re.compile(r"(?=[^\s]*[A-Za-z])(?=[^\s]*\d)[A-Za-z0-9+/_=-]{24,}")
_ID = re.compile(r"(sha256:)?[0-9a-f]{12,64}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _is_secret(name: str) -> bool:
    plain = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), name)
    return _SECRET.search(plain.strip("\"'.\\-")) is not None


def redact(text: str) -> str:
    """Text of any kind: logs, command lines, TOML, YAML, JSON, environment files. Long lines are cut."""
    text = (
        _KEY_END.sub(LEFT_OUT, text) if _KEY_END.match(text) and "-----BEGIN" not in text.split("-----END")[0] else text
    )
    text = _PRIVATE_KEY.sub(LEFT_OUT, text)
    text = _NAMED.sub(lambda m: f"{m[1]}{m[2]}{m[3]}{LEFT_OUT}" if _is_secret(m[2]) else m[0], text)
    kept: list[str] = []
    block: int | None = None  # indentation of the key whose value takes the next, deeper lines
    closing = ""  # what ends a value of several lines
    table = False  # in a TOML table that holds credentials
    for line in text.split("\n"):
        if closing:
            if closing in line:
                closing = ""
            continue
        if len(line) > LINE_MAX:
            line = f"{line[:LINE_MAX]} ..."
        indentation = len(line) - len(line.lstrip())
        if block is not None:
            below = indentation == block and line.lstrip().startswith(("- ", '"', "'"))
            if not line.strip() or indentation > block or (below and not _NEXT_KEY.match(line)):
                continue
            block = None
        if header := _TABLE.fullmatch(line):
            table = _is_secret(header[1].rpartition(".")[2].strip())
        elif table and "=" in line and not line.lstrip().startswith("#"):
            line = f"{line.partition('=')[0]}= {LEFT_OUT}"
        if indentation < len(line):  # a line of blanks is as it should be
            line, block, closing = _redact_line(line, indentation)
        kept.append(line)
    return "\n".join(kept)


def _redact_line(line: str, indentation: int) -> tuple[str, int | None, str]:
    """The line; the indentation of a key whose value follows in deeper lines; what ends a value of several lines."""
    line = _SCHEME.sub(rf"\1 {LEFT_OUT}", line)
    line = _USER_INFO.sub(rf"\1{LEFT_OUT}@", line)
    line = _QUERY.sub(lambda m: f"{m[1]}{m[2]}={LEFT_OUT if _is_secret(m[2]) else m[3]}", line)
    line = _KNOWN.sub(LEFT_OUT, line)
    line = _FLAG.sub(lambda m: f"{m[1]}{m[2]}{LEFT_OUT if _is_secret(m[1]) else m[3]}", line)
    done: list[str] = []
    position = 0
    for match in _PAIR.finditer(line):
        if match.start() < position or not _is_secret(match[1]):
            continue
        done.append(line[position : match.end()])
        rest = line[match.end() :]
        mark = rest.lstrip()[:3]
        if mark in ('"""', "'''") and mark not in rest.lstrip()[3:]:
            return "".join([*done, LEFT_OUT]), None, mark
        if not rest.strip() or re.fullmatch(r"\s*[|>][-+0-9]*\s*(#.*)?", rest):
            return "".join([*done, LEFT_OUT]), indentation, ""
        if rest[:1] in "[{":  # all that it holds, wherever it ends
            return "".join([*done, LEFT_OUT]), indentation, ""
        done.append(LEFT_OUT)
        if mark in ('"""', "'''"):
            return "".join(done), None, ""
        if quoted := _QUOTED.match(rest):
            position = match.end() + quoted.end()
        elif match[3] == "=" and not match[4]:
            word = re.match(r"\S*", rest)
            position = match.end() + (word.end() if word else 0)
        else:
            return "".join(done), None, ""  # a value of several words
    return "".join(done) + line[position:], None, ""


def redact_arguments(arguments: list[Any]) -> list[str]:
    """The arguments of a program: values of flags with secret names, and words that look like keys."""
    shown: list[str] = []
    hide = False
    for argument in map(str, arguments):
        flag, equals, _ = argument.partition("=")
        if hide and not argument.startswith("--"):
            shown.append(LEFT_OUT)
            hide = False
        elif equals and _is_secret(flag):
            shown.append(f"{flag}={LEFT_OUT}")
        else:
            hide = argument.startswith("-") and _is_secret(argument)
            shown.append(_hide_keys(redact(argument)))
    return shown


def _hide_keys(text: str) -> str:
    """Long words of letters and digits, but ids, digests and paths."""
    words = re.split(r"(\s+)", text)
    return "".join(
        LEFT_OUT if _LONG.fullmatch(word) and not _ID.fullmatch(word) and "/" not in word[:1] else word
        for word in words
    )


def redact_document(value: Any, key: str = "") -> Any:
    """A JSON document, such as a sandbox's record or an OCI spec. Of an environment only the names are kept."""
    if key.lower() in ("env", "environment", "envs"):
        if isinstance(value, list):
            return [f"{str(item).partition('=')[0]}={LEFT_OUT}" if "=" in str(item) else LEFT_OUT for item in value]
        return dict.fromkeys(value, LEFT_OUT) if isinstance(value, dict) else LEFT_OUT
    if key and _is_secret(key) and value not in (None, "", [], {}):
        return LEFT_OUT
    if isinstance(value, dict):
        return {str(name): redact_document(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        if key.lower() in ("args", "argv", "command", "cmd", "entrypoint"):
            return redact_arguments(value)
        return [redact_document(item) for item in value]
    return redact(value) if isinstance(value, str) else value
