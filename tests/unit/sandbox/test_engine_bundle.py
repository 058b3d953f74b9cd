"""What an engine's bundle asks for of its sandbox."""

import pytest

from katapod.model import oci
from katapod.model.annotations import parse_annotations
from katapod.sandbox.engine_bundle import sandbox_request


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (("size=65536k",), 64 << 20),
        (("nosuid", "mode=1777", "size=268435456"), 256 << 20),
        (("size=1M",), 1 << 20),
        (("size=0",), 64 << 20),
        (("size=50%",), 64 << 20),
        ((), 64 << 20),
    ],
)
def test_shared_memory_is_as_large_as_the_engine_says(options: tuple[str, ...], size: int) -> None:
    shm = oci.Mount(destination="/dev/shm", type="tmpfs", source="shm", options=options)
    linux = oci.Linux(namespaces=(oci.Namespace(type="network"),))
    process = oci.Process(args=("sh",), cwd="/")
    spec = oci.Spec(oci_version="1.0.2", process=process, root=oci.Root(path="rootfs"), mounts=(shm,), linux=linux)
    request = sandbox_request("one", spec, parse_annotations({}, "one"), cgroups_path="", labels={})
    assert request.shm_size_bytes == size
    assert request.volumes == ()
