"""The manifests against the code: fields, defaults, versions."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from katapod import __version__
from katapod.model.kataconfig import Spec, Status
from katapod.operator.cluster.machine_config.names import (
    EXTENSION_CONFIG,
    IMAGE_CONFIG,
    LOG_CONFIG,
    MONITOR,
    POOL,
)
from katapod.operator.cluster.machine_config.objects import monitor
from katapod.operator.cluster.objects import Settings, node_job
from katapod.operator.cluster.views import parse_node
from katapod.operator.handlers import default_settings
from katapod.operator.names import GROUP

DIRECTORY = Path(__file__).parents[3] / "packaging/operator"

NODE = {"metadata": {"name": "node-a", "uid": "u"}, "spec": {}, "status": {}}


def load(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DIRECTORY / name).read_text()))


def schema() -> dict[str, Any]:
    crd = load("kataconfig-crd.yaml")[0]
    assert crd["spec"]["group"] == GROUP
    found: dict[str, Any] = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    return found


def defaults(part: dict[str, Any]) -> Any:
    """What the API server makes of an empty object."""
    found = {}
    for name, field in part["properties"].items():
        if "default" not in field:
            continue
        if field["type"] == "object":
            found[name] = defaults(field)
        elif name == "runtimeClasses":
            found[name] = [{**defaults(field["items"]), **one} for one in field["default"]]
        else:
            found[name] = field["default"]
    return found


def test_defaults_are_those_of_the_code() -> None:
    assert msgspec.convert(defaults(schema()["spec"]), Spec) == Spec()


REFUSED = {"enablePeerPods"}
"""Fields of upstream's that can have their default only."""


@pytest.mark.parametrize(("part", "kind"), [("spec", Spec), ("status", Status)])
def test_fields_are_those_of_the_code(part: str, kind: type[msgspec.Struct]) -> None:
    compare(schema()[part], kind)


def compare(part: dict[str, Any], kind: type[msgspec.Struct]) -> None:
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    assert set(part["properties"]) - REFUSED == set(fields), kind.__name__
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    for field in info.fields:
        for one in _structs(field.type):
            inner = part["properties"][field.encode_name]
            compare(inner.get("items", inner), one)


def _structs(kind: msgspec.inspect.Type) -> list[type[msgspec.Struct]]:
    match kind:
        case msgspec.inspect.StructType(cls=found):
            return [found]
        case msgspec.inspect.VarTupleType(item_type=item):
            return _structs(item)
        case msgspec.inspect.UnionType(types=types):
            return [found for one in types for found in _structs(one)]
    return []


def test_the_image_is_of_this_version() -> None:
    containers = load("deployment.yaml")[0]["spec"]["template"]["spec"]["containers"]
    assert [one["image"] for one in containers] == [f"katapod.io/operator:{__version__}"]


def test_all_manifests_are_installed() -> None:
    named = set(load("kustomization.yaml")[0]["resources"])
    assert named == {path.name for path in DIRECTORY.glob("*.yaml")} - {"kustomization.yaml"}


def test_the_rights_of_machine_configs_are_for_objects_of_ours() -> None:
    documents = load("machine-config.yaml")
    roles = [one for one in documents if one["kind"] in ("ClusterRole", "Role")]
    names = {(one["metadata"]["name"]) for one in documents if one["kind"] == "ServiceAccount"}
    assert names == {monitor(Settings("katapod", "", ""))["spec"]["template"]["spec"]["serviceAccountName"]}
    changed = set()
    for rule in (rule for role in roles for rule in role["rules"]):
        if "resourceNames" in rule:
            changed |= set(rule["resourceNames"])
        else:
            assert rule["verbs"] == ["list", "watch", "create"]
    assert changed == {EXTENSION_CONFIG, IMAGE_CONFIG, POOL, LOG_CONFIG, MONITOR}


def test_the_constraints_of_openshift_allow_what_the_monitor_asks_for() -> None:
    path = DIRECTORY.parent / "operator-openshift/security.yaml"
    allowed = next(iter(yaml.safe_load_all(path.read_text())))
    pod = monitor(Settings("katapod", "", "", monitor_image="m"))["spec"]["template"]["spec"]
    asked = pod["containers"][0]["securityContext"]
    assert set(asked["capabilities"]["add"]) == set(allowed["allowedCapabilities"])
    assert (pod["hostPID"], asked["readOnlyRootFilesystem"]) == (allowed["allowHostPID"], True)
    assert {kind for one in pod["volumes"] for kind in one if kind != "name"} == set(allowed["volumes"])
    assert allowed["users"] == [f"system:serviceaccount:katapod:{pod['serviceAccountName']}"]


def pods_of_ours() -> dict[str, dict[str, Any]]:
    """The specs of all pods that the operator's manifests and the operator itself have made."""
    settings = Settings("katapod", "node", "1", monitor_image="m")
    made = [monitor(settings), node_job(settings, "install", parse_node(NODE), ("kvm",), default_settings())]
    made += [one for name in ("deployment", "monitoring/monitor") for one in load(f"{name}.yaml")]
    return {
        one["metadata"]["name"]: one["spec"]["template"]["spec"] for one in made if "template" in one.get("spec", {})
    }


def test_pods_of_ours_are_not_the_first_to_starve() -> None:
    """Without requests they get what others leave of a busy node; without a priority they are evicted for others."""
    pods = pods_of_ours()
    assert len(pods) == 4
    for name, pod in pods.items():
        assert pod["priorityClassName"] in ("system-node-critical", "system-cluster-critical"), name
        for one in pod["containers"]:
            assert set(one["resources"]["requests"]) == {"cpu", "memory"}, name


def test_the_operators_probes_ask_what_it_serves() -> None:
    (container,) = load("deployment.yaml")[0]["spec"]["template"]["spec"]["containers"]
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    command = container["command"]
    alive, ready = container["livenessProbe"]["httpGet"], container["readinessProbe"]["httpGet"]
    assert command[command.index("--liveness") + 1].endswith(f":{alive['port']}{alive['path']}")
    assert command[command.index("--webhook") + 1] == str(ports[ready["port"]])
    assert ready["scheme"] == "HTTPS"
    service = load("webhook.yaml")[0]["spec"]
    assert {one["targetPort"] for one in service["ports"]} == {ready["port"]}, "its endpoints are those that are ready"


def test_node_jobs_have_no_token() -> None:
    accounts = {one["metadata"]["name"]: one for one in load("rbac.yaml") if one["kind"] == "ServiceAccount"}
    assert accounts["katapod-node"]["automountServiceAccountToken"] is False
    subjects = [
        subject["name"] for one in load("rbac.yaml") if one["kind"].endswith("Binding") for subject in one["subjects"]
    ]
    assert set(subjects) == {"katapod-operator"}
