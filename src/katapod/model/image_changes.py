"""Changes of an image's config in the words of a Dockerfile: --change of `commit`. Pure."""

import json
import shlex
from typing import Any

from katapod.model.flags import refuse

__all__ = ["apply_change"]

EXAMPLE = '\'CMD ["httpd", "-f"]\''


def apply_change(config: dict[str, Any], text: str, flag: str = "--change") -> None:
    """Change the `config` object of an OCI image by one instruction: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL,
    USER, VOLUME or WORKDIR. Raises UsageError."""
    word, _, rest = text.strip().partition(" ")
    word, rest = word.upper(), rest.strip()
    if not rest:
        refuse(flag, text, "it is not INSTRUCTION VALUE", EXAMPLE)
    match word:
        case "CMD" | "ENTRYPOINT":
            config[word.title()] = _command(flag, text, rest)
        case "USER" | "STOPSIGNAL" | "WORKDIR":
            config[{"USER": "User", "STOPSIGNAL": "StopSignal", "WORKDIR": "WorkingDir"}[word]] = rest
        case "ENV":
            found = _pairs(flag, text, rest)
            kept = [entry for entry in config.get("Env") or [] if entry.partition("=")[0] not in found]
            config["Env"] = [*kept, *(f"{name}={value}" for name, value in found.items())]
        case "LABEL":
            config["Labels"] = {**(config.get("Labels") or {}), **_pairs(flag, text, rest)}
        case "EXPOSE":
            ports = [port if "/" in port else f"{port}/tcp" for port in rest.split()]
            config["ExposedPorts"] = {**(config.get("ExposedPorts") or {}), **{port: {} for port in ports}}
        case "VOLUME":
            places = _command(flag, text, rest) if rest.startswith("[") else rest.split()
            config["Volumes"] = {**(config.get("Volumes") or {}), **{place: {} for place in places}}
        case _:
            refuse(flag, text, f"{word} is none that can be changed", EXAMPLE)


def _command(flag: str, text: str, rest: str) -> list[str]:
    """A list of JSON, or a line for a shell."""
    if not rest.startswith("["):
        return ["/bin/sh", "-c", rest]
    try:
        found = json.loads(rest)
    except ValueError:
        refuse(flag, text, "what begins with [ has to be a list of JSON", EXAMPLE)
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        refuse(flag, text, "it is no list of words", EXAMPLE)
    return found


def _pairs(flag: str, text: str, rest: str) -> dict[str, str]:
    """NAME=VALUE ..., with quotes as a shell has them; or the old form NAME VALUE."""
    try:
        words = shlex.split(rest)
    except ValueError as exc:
        refuse(flag, text, str(exc).lower(), "'ENV A=b'")
    if "=" not in words[0]:
        name, _, value = rest.partition(" ")
        return {name: value.strip()}
    pairs = [word.partition("=") for word in words]
    if not all(name and equals for name, equals, _ in pairs):
        refuse(flag, text, "it is not NAME=VALUE", "'ENV A=b'")
    return {name: value for name, _, value in pairs}
