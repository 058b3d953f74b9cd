"""The command line of kata-monitor."""

import pytest

from katapod.monitor.options import Address, UsageError, parse_address, parse_options


@pytest.mark.parametrize(
    ("text", "address", "loopback"),
    [
        ("127.0.0.1:8090", Address("127.0.0.1", 8090), True),
        (":80", Address("", 80), False),
        ("[::1]:1", Address("::1", 1), True),
        ("localhost:0", Address("localhost", 0), True),
        ("0.0.0.0:9", Address("0.0.0.0", 9), False),
        ("10.0.0.1:9", Address("10.0.0.1", 9), False),
    ],
)
def test_addresses(text: str, address: Address, loopback: bool) -> None:
    assert parse_address(text) == address
    assert address.is_loopback is loopback
    assert str(address) == text


@pytest.mark.parametrize("text", ["", "8090", "host:", "host:x", "host:65536", "::1:80", "host:-1", "host:\u0661"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(UsageError, match="cannot listen on"):
        parse_address(text)


@pytest.mark.parametrize("dash", ["-", "--"])
def test_one_dash_or_two(dash: str) -> None:
    found = parse_options([f"{dash}listen-address", ":1", f"{dash}log-level=debug", f"{dash}runtime-endpoint", "/x"])
    assert (found.address, found.log_level, found.runtime_endpoint) == (Address("", 1), "debug", "/x")
    assert parse_options([f"{dash}version"]).version
    assert parse_options([f"{dash}help"]).help
    assert parse_options(["version"]).version
    assert parse_options([]).address == Address("127.0.0.1", 8090)


@pytest.mark.parametrize("words", [["-x"], ["run"], ["-log-level"], ["-log-level", "loud"], ["-"], ["version", "-h"]])
def test_wrong_words(words: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_options(words)
