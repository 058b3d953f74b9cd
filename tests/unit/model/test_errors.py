"""The error tree: what a caller can rely on."""

import pytest

from katapod.model import errors


def test_every_error_is_a_katapod_error_with_the_runtimes_exit_code() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.KatapodError)
        assert kind.exit_code == 125


def test_hint_and_context_are_kept_apart_from_the_message() -> None:
    error = errors.DeviceMissing("cannot open /dev/kvm: no such device", hint="load kvm", sandbox_id="s1")
    assert str(error) == "cannot open /dev/kvm: no such device"
    assert error.hint == "load kvm"
    assert error.context == {"sandbox_id": "s1"}


@pytest.mark.parametrize("kind", [errors.MissingProgram, errors.DeviceMissing])
def test_host_lacks_covers_programs_and_devices(kind: type[errors.KatapodError]) -> None:
    assert issubclass(kind, errors.HostLacks)
