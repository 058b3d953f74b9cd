"""Helm chart, OLM bundle, policies and dashboard: made from the plain manifests, and of names that there are."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from katapod import __version__
from katapod.observe.process_metrics import process_text, standard_process_text

ROOT = Path(__file__).parents[3]
PLAIN = ROOT / "packaging/operator"
CHART, BUNDLE = PLAIN / "chart", PLAIN / "bundle"


def test_chart_and_bundle_are_up_to_date() -> None:
    tool = ROOT / "tools/generate_operator_manifests.py"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def load(*paths: Path) -> list[dict[str, Any]]:
    return [one for path in paths for one in yaml.safe_load_all(path.read_text()) if one]


def helm_template(values: dict[str, Any], namespace: str = "katapod") -> list[dict[str, Any]]:
    """What Helm makes of the chart's templates, of the little that they use. Anything else is refused."""
    found = []
    for path in sorted((CHART / "templates").iterdir()):
        text, wanted = path.read_text(), True
        if begin := re.match(r"\{\{- if \.Values\.([\w.]+) \}\}\n", text):
            assert text.endswith("{{- end }}\n"), path
            wanted = bool(value_of(values, begin[1]))
            text = text[begin.end() :].removesuffix("{{- end }}\n")
        text = re.sub(r"\{\{ \.Values\.([\w.]+) \}\}", lambda one: str(value_of(values, one[1])), text)
        text = text.replace("{{ .Release.Namespace }}", namespace)
        text = re.sub(
            r'\{\{ \.Files\.Get "([\w./]+)" \| indent 4 \}\}',
            lambda one: "\n".join(f"    {line}" for line in (CHART / one[1]).read_text().splitlines()),
            text,
        )
        if path.name != "dashboard.yaml":  # Grafana's own are in its text
            assert "{{" not in text, path
        found += [one for one in yaml.safe_load_all(text) if one] if wanted else []
    return found


def value_of(values: dict[str, Any], path: str) -> Any:
    found: Any = values
    for name in path.split("."):
        found = found[name]
    return found


def default_values() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return found


def by_name(objects: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(one["kind"], one["metadata"].get("namespace", ""), one["metadata"]["name"]): one for one in objects}


def test_the_chart_installs_what_the_plain_manifests_do() -> None:
    assert by_name(helm_template(default_values())) == by_name(
        load(*(PLAIN / f"{name}.yaml" for name in ("rbac", "machine-config", "deployment", "webhook")))
    )
    assert (CHART / "crds/kataconfig-crd.yaml").read_text() == (PLAIN / "kataconfig-crd.yaml").read_text()


def test_the_chart_can_have_all_the_rest() -> None:
    values = default_values()
    values |= {"networkPolicies": True, "monitor": {"enabled": True, "podMonitor": True, "dashboard": True}}
    found = by_name(helm_template(values))
    rest = load(
        PLAIN / "network-policies/operator.yaml",
        PLAIN / "monitoring/monitor.yaml",
        PLAIN / "monitoring/pod-monitor.yaml",
    )
    assert by_name(rest).items() <= found.items()
    dashboard = found["ConfigMap", "katapod", "katapod-dashboard"]["data"]["katapod.json"]
    assert json.loads(dashboard) == json.loads((PLAIN / "monitoring/dashboard.json").read_text())


def test_the_charts_values_are_used() -> None:
    values = default_values() | {"image": "mirror/operator:9", "nodeImage": "mirror/node:9", "replicas": 2}
    values["monitor"]["enabled"] = True
    found = by_name(helm_template(values, "elsewhere"))
    deployment = found["Deployment", "elsewhere", "katapod-operator"]["spec"]
    container = deployment["template"]["spec"]["containers"][0]
    assert deployment["replicas"] == 2
    assert container["image"] == "mirror/operator:9"
    assert {"name": "KATAPOD_NODE_IMAGE", "value": "mirror/node:9"} in container["env"]
    monitor = found["DaemonSet", "elsewhere", "katapod-monitor"]["spec"]["template"]["spec"]
    assert monitor["containers"][0]["image"] == "mirror/node:9"
    assert {one[1] for one in found} == {"", "elsewhere", "default"}
    subjects = [one for body in found.values() for one in body.get("subjects", ())]
    assert {one["namespace"] for one in subjects} == {"elsewhere"}


def test_the_bundle_gives_the_same_rights_and_no_others() -> None:
    version = load(BUNDLE / "manifests/katapod-operator.clusterserviceversion.yaml")[0]
    install = version["spec"]["install"]["spec"]
    roles = [one for one in load(PLAIN / "rbac.yaml", PLAIN / "machine-config.yaml") if one["kind"].endswith("Role")]
    roles.sort(key=lambda one: str(one["kind"]))
    own = [rule for one in roles if one["metadata"].get("namespace") == "katapod" for rule in one["rules"]]
    everywhere = [rule for one in roles if one["metadata"].get("namespace") != "katapod" for rule in one["rules"]]
    assert [one["rules"] for one in install["permissions"]] == [own]
    assert [one["rules"] for one in install["clusterPermissions"]] == [everywhere]
    assert install["deployments"][0]["spec"] == load(PLAIN / "deployment.yaml")[0]["spec"]
    assert version["spec"]["version"] == __version__
    json.loads(version["metadata"]["annotations"]["alm-examples"])


def test_images_are_of_this_version() -> None:
    for path in PLAIN.rglob("*"):
        if path.is_file():
            versions = re.findall(r"katapod\.io/(?:node|operator):([\w.-]+)", path.read_text())
            assert set(versions) <= {__version__}, path


@pytest.mark.parametrize("folder", ["monitoring", "network-policies"])
def test_all_files_of_a_folder_are_installed(folder: str) -> None:
    body = load(PLAIN / folder / "kustomization.yaml")[0]
    named = set(body["resources"]) | {
        one.partition("=")[2] for maker in body.get("configMapGenerator", ()) for one in maker["files"]
    }
    assert named == {path.name for path in (PLAIN / folder).iterdir()} - {"kustomization.yaml"}


def test_policies_and_monitors_select_pods_that_there_are() -> None:
    objects = load(*PLAIN.glob("*.yaml"), *PLAIN.glob("monitoring/*.yaml"), *PLAIN.glob("network-policies/*.yaml"))
    pods = [one["spec"]["template"] for one in objects if one["kind"] in ("Deployment", "DaemonSet")]
    selectors = [one["spec"]["podSelector"] for one in objects if one["kind"] == "NetworkPolicy"]
    selectors += [one["spec"]["selector"] for one in objects if one["kind"] == "PodMonitor"]
    assert len(selectors) == 3
    for selector in selectors:
        chosen = [pod for pod in pods if selector["matchLabels"].items() <= pod["metadata"]["labels"].items()]
        assert len(chosen) == 1, selector
    ports = {one["name"] for pod in pods for c in pod["spec"]["containers"] for one in c.get("ports", ())}
    monitors = [one for one in objects if one["kind"] == "PodMonitor"]
    assert {end["port"] for one in monitors for end in one["spec"]["podMetricsEndpoints"]} <= ports


def metrics() -> str:
    """What kata-monitor answers, of this process in place of a VMM and of a recorded guest, and names that are made of
    parts elsewhere in the sources."""
    own = process_text("kata_hypervisor", "", [os.getpid()]) + standard_process_text("kata_monitor", os.getpid())
    guest = (ROOT / "tests/kit/guest-metrics.txt").read_text()
    sources = [path.read_text() for path in (ROOT / "src/katapod").rglob("*.py")]
    named = re.findall(r'"(kata_(?:monitor|shim)_\w+)"', "\n".join(sources))
    return own + guest + "\n".join([*named, "kata_shim_pod_overhead_cpu", "kata_shim_pod_overhead_memory_in_bytes", ""])


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    known = metrics()
    panels = json.loads((PLAIN / "monitoring/dashboard.json").read_text())["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    names = [re.search(r"(kata_\w+?)(?:_bucket)?(\{[^}]*\})?(?=[\[)\s,]|$)", expr) for expr in asked]
    assert len(asked) == 14
    for expr, found in zip(asked, names, strict=True):
        assert found is not None, expr
        assert re.search(rf"^{re.escape(found[1] + (found[2] or ''))}\b", known, re.MULTILINE) or (
            found[2] and f"{found[1]}{found[2]} " in known
        ), expr
    assert len({panel["id"] for panel in panels}) == len(panels)
