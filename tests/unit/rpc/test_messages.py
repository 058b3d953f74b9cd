"""Message classes out of the descriptor set."""

import pytest

from katapod.rpc.agent import _ANSWERS
from katapod.rpc.pb import _load, agent_pb2, empty_pb2, health_pb2, oci_pb2, types_pb2


def test_messages_keep_their_numbers_on_the_wire() -> None:
    request = agent_pb2.WriteStreamRequest(container_id="c", exec_id="e", data=b"xyz")
    data = request.SerializeToString()
    assert data == b"\x0a\x01c\x12\x01e\x1a\x03xyz"
    assert agent_pb2.WriteStreamRequest.FromString(data) == request


def test_nested_messages_and_maps() -> None:
    process = oci_pb2.Process(Args=["a", "b"], User=oci_pb2.User(UID=5))
    spec = oci_pb2.Spec(Process=process, Annotations={"k": "v"})
    again = oci_pb2.Spec.FromString(spec.SerializeToString())
    assert list(again.Process.Args) == ["a", "b"]
    assert again.Process.User.UID == 5
    assert dict(again.Annotations) == {"k": "v"}


def test_enum_values_are_names_of_the_module() -> None:
    names = _load.load("katapod.rpc.pb.types_pb2")
    assert (names["v4"], types_pb2.v6) == (0, 1)


def test_one_class_for_one_message() -> None:
    assert _load.load("katapod.rpc.pb.agent_pb2")["Storage"] is agent_pb2.Storage
    assert isinstance(agent_pb2.CreateSandboxRequest(storages=[agent_pb2.Storage()]).storages[0], agent_pb2.Storage)
    assert empty_pb2.Empty().SerializeToString() == b""
    assert health_pb2.HealthCheckResponse().status == 0


def test_an_unknown_module() -> None:
    with pytest.raises(KeyError):
        _load.load("katapod.rpc.pb.nothing_pb2")


def test_every_method_of_the_agent_has_an_answer_class() -> None:
    methods = agent_pb2.DESCRIPTOR.services_by_name["AgentService"].methods
    assert {method.name for method in methods} == set(_ANSWERS)
    for method in methods:
        assert _ANSWERS[method.name].DESCRIPTOR.full_name == method.output_type.full_name
