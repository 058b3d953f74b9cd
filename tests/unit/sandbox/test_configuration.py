"""The configuration of a pod: the engine's file, changed by the pod's annotations."""

from pathlib import Path

import pytest

from katapod.model.errors import ConfigError
from katapod.sandbox.configuration import read_config

MEMORY = "io.katacontainers.config.hypervisor.default_memory"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    program = tmp_path / "program"
    program.write_text("")
    path = tmp_path / "c.toml"
    keys = ("path", "kernel", "initrd", "virtio_fs_daemon")
    lines = [f'{key} = "{program}"' for key in keys]
    path.write_text("\n".join(["[hypervisor.qemu]", 'enable_annotations = ["default_memory", "kernel"]', *lines]))
    return path


def test_annotations_change_one_pods_configuration(file: Path) -> None:
    assert read_config(str(file), {MEMORY: "512", "io.kubernetes.cri.sandbox-memory": "1"}).qemu.default_memory == 512
    assert read_config(str(file), {}).qemu.default_memory == 2048


def test_what_is_not_enabled_ends_the_start(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"hypervisor\.default_vcpus: it is not enabled"):
        read_config(str(file), {"io.katacontainers.config.hypervisor.default_vcpus": "1"})


def test_a_file_that_an_annotation_names_must_exist(file: Path) -> None:
    with pytest.raises(ConfigError, match="/no/kernel: no such file"):
        read_config(str(file), {"io.katacontainers.config.hypervisor.kernel": "/no/kernel"})
