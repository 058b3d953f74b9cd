#!/usr/bin/env python3
"""Make the Helm chart and the OLM bundle of the operator from the plain manifests in packaging/operator.

--check only says whether they are up to date. They hold nothing of their own, but for what Helm and OLM ask for: a
chart's values take the place of names and images, a bundle has the same rights and the same Deployment.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from katapod import __version__

ROOT = Path(__file__).parents[1]
PLAIN = ROOT / "packaging/operator"
CHART, BUNDLE = PLAIN / "chart", PLAIN / "bundle"
IMAGE, NODE_IMAGE = f"katapod.io/operator:{__version__}", f"katapod.io/node:{__version__}"
PARTS = ("rbac.yaml", "machine-config.yaml", "deployment.yaml", "webhook.yaml")
ACCOUNTS = {"katapod-node": "node-service-account.yaml", "monitor": "monitor-service-account.yaml"}
"""Beside the operator's own, which OLM makes."""
NOTE = "# Made by tools/generate_operator_manifests.py; `make manifests` makes it anew.\n"
DESCRIPTION = "Runs the pods of a RuntimeClass in virtual machines, with or without KVM"
WHAT = """\
Katapod runs each pod on a kernel of its own, in a small virtual machine: by KVM where there is one, and at nearly
native speed without. One KataConfig puts it on the chosen nodes, one after another, makes RuntimeClasses that only
nodes serve on which a sandbox has run, and takes all of it away again when it is deleted."""

VALUES = f"""\
{NOTE}
image: {IMAGE}
nodeImage: {NODE_IMAGE}
# of the operator; of several one acts
replicas: 1
# NetworkPolicies: the operator asks the API server and a name server only
networkPolicies: false
monitor:
  # kata-monitor on the nodes that have Katapod
  enabled: false
  # for the Prometheus operator
  podMonitor: false
  # a ConfigMap for Grafana's sidecar
  dashboard: false
"""

DASHBOARD = """\
apiVersion: v1
kind: ConfigMap
metadata:
  name: katapod-dashboard
  namespace: {{ .Release.Namespace }}
  labels:
    grafana_dashboard: "1"
data:
  katapod.json: |
{{ .Files.Get "files/dashboard.json" | indent 4 }}
"""


def plain(name: str) -> str:
    return (PLAIN / name).read_text()


def templated(text: str) -> str:
    """The chart's values in place of what the plain manifests name."""
    for old, new in (
        ("namespace: katapod\n", "namespace: {{ .Release.Namespace }}\n"),
        ("replicas: 1\n", "replicas: {{ .Values.replicas }}\n"),
        (f"image: {IMAGE}\n", "image: {{ .Values.image }}\n"),
        (f"image: {NODE_IMAGE}\n", "image: {{ .Values.nodeImage }}\n"),
        (f"value: {IMAGE}\n", "value: {{ .Values.image }}\n"),
        (f"value: {NODE_IMAGE}\n", "value: {{ .Values.nodeImage }}\n"),
    ):
        text = text.replace(old, new)
    return text


def optional(value: str, text: str) -> str:
    return f"{{{{- if .Values.{value} }}}}\n{text}{{{{- end }}}}\n"


def chart() -> dict[Path, str]:
    about = {
        "apiVersion": "v2",
        "name": "katapod-operator",
        "description": DESCRIPTION,
        "type": "application",
        "version": __version__,
        "appVersion": __version__,
        "kubeVersion": ">=1.20.0-0",
    }
    templates = {
        "operator.yaml": templated("---\n".join(map(plain, PARTS))),
        "network-policies.yaml": optional("networkPolicies", templated(plain("network-policies/operator.yaml"))),
        "monitor.yaml": optional("monitor.enabled", templated(plain("monitoring/monitor.yaml"))),
        "pod-monitor.yaml": optional("monitor.podMonitor", templated(plain("monitoring/pod-monitor.yaml"))),
        "dashboard.yaml": optional("monitor.dashboard", DASHBOARD),
    }
    return {
        CHART / "Chart.yaml": NOTE + dumped(about),
        CHART / "values.yaml": VALUES,
        CHART / "crds/kataconfig-crd.yaml": plain("kataconfig-crd.yaml"),
        CHART / "files/dashboard.json": plain("monitoring/dashboard.json"),
        **{CHART / "templates" / name: text for name, text in templates.items()},
    }


def dumped(body: Any) -> str:
    return yaml.dump(body, sort_keys=False, width=120, allow_unicode=True)


def bundle() -> dict[Path, str]:
    objects = [one for name in PARTS[:3] for one in yaml.safe_load_all(plain(name))]
    accounts = {one["metadata"]["name"]: one for one in objects if one["kind"] == "ServiceAccount"}
    for account in accounts.values():
        del account["metadata"]["namespace"]  # OLM's own
    labels = {
        "operators.operatorframework.io.bundle.mediatype.v1": "registry+v1",
        "operators.operatorframework.io.bundle.manifests.v1": "manifests/",
        "operators.operatorframework.io.bundle.metadata.v1": "metadata/",
        "operators.operatorframework.io.bundle.package.v1": "katapod-operator",
        "operators.operatorframework.io.bundle.channels.v1": "alpha",
        "operators.operatorframework.io.bundle.channel.default.v1": "alpha",
    }
    lines = [f"LABEL {name}={value}" for name, value in labels.items()]
    dockerfile = ["FROM scratch", "", *lines, "", "COPY manifests /manifests/", "COPY metadata /metadata/"]
    return {
        BUNDLE / "bundle.Dockerfile": NOTE + "\n".join(dockerfile) + "\n",
        BUNDLE / "metadata/annotations.yaml": NOTE + dumped({"annotations": labels}),
        BUNDLE / "manifests/kataconfig-crd.yaml": plain("kataconfig-crd.yaml"),
        **{BUNDLE / "manifests" / file: NOTE + dumped(accounts[name]) for name, file in ACCOUNTS.items()},
        BUNDLE / "manifests/katapod-operator.clusterserviceversion.yaml": NOTE
        + dumped(cluster_service_version(objects)),
    }


def cluster_service_version(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """Source: operator-framework/api, ClusterServiceVersion v1alpha1."""

    def rules(kind: str, namespace: str | None) -> list[Any]:
        return [
            rule
            for one in objects
            if one["kind"] == kind and one["metadata"].get("namespace") == namespace
            for rule in one["rules"]
        ]

    deployment = next(one for one in objects if one["kind"] == "Deployment")
    account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
    # OLM gives rights in the operator's own namespace, or in all: events are written in another one
    everywhere = rules("ClusterRole", None) + rules("Role", "default")
    namespace = next(iter(yaml.safe_load_all(plain("namespace.yaml"))))
    example = {
        "apiVersion": "kataconfiguration.openshift.io/v1",
        "kind": "KataConfig",
        "metadata": {"name": "kata"},
        "spec": {},
    }
    template = {"apiVersion": "v1", "kind": "Namespace", "metadata": namespace["metadata"]}
    return {
        "apiVersion": "operators.coreos.com/v1alpha1",
        "kind": "ClusterServiceVersion",
        "metadata": {
            "name": f"katapod-operator.v{__version__}",
            "namespace": "placeholder",
            "annotations": {
                "alm-examples": json.dumps([example], indent=2),
                "capabilities": "Full Lifecycle",
                "categories": "Security",
                "containerImage": IMAGE,
                "description": DESCRIPTION,
                "operatorframework.io/suggested-namespace-template": json.dumps(template),
            },
        },
        "spec": {
            "displayName": "Katapod",
            "description": WHAT,
            "version": __version__,
            "maturity": "alpha",
            "minKubeVersion": "1.20.0",
            "provider": {"name": "Katapod"},
            "keywords": ["kata", "sandbox", "virtual machine", "RuntimeClass"],
            "installModes": [
                {"type": kind, "supported": kind in ("OwnNamespace", "SingleNamespace", "AllNamespaces")}
                for kind in ("OwnNamespace", "SingleNamespace", "MultiNamespace", "AllNamespaces")
            ],
            "customresourcedefinitions": {
                "owned": [
                    {
                        "name": "kataconfigs.kataconfiguration.openshift.io",
                        "version": "v1",
                        "kind": "KataConfig",
                        "displayName": "KataConfig",
                        "description": "Katapod on the chosen nodes, and RuntimeClasses for it.",
                    }
                ]
            },
            "install": {
                "strategy": "deployment",
                "spec": {
                    "clusterPermissions": [{"serviceAccountName": account, "rules": everywhere}],
                    "permissions": [{"serviceAccountName": account, "rules": rules("Role", "katapod")}],
                    "deployments": [
                        {
                            "name": deployment["metadata"]["name"],
                            "label": deployment["metadata"]["labels"],
                            "spec": deployment["spec"],
                        }
                    ],
                },
            },
            "relatedImages": [{"name": "operator", "image": IMAGE}, {"name": "node", "image": NODE_IMAGE}],
        },
    }


def main() -> int:
    made = chart() | bundle()
    there = {path for folder in (CHART, BUNDLE) for path in folder.rglob("*") if path.is_file()}
    if "--check" in sys.argv[1:]:
        old = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
        wrong = sorted(str(path.relative_to(ROOT)) for path in {*old, *(there - made.keys())})
        if wrong:
            print(f"out of date: {', '.join(wrong)}; run: make manifests", file=sys.stderr)
        return 1 if wrong else 0
    for path in there - made.keys():
        path.unlink()
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
