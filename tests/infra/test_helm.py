"""The Helm chart, filled in by a real Helm, and checked against the schemas of Kubernetes. No cluster is asked."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from resmaster_flows.cli.main import parser
from tests.checkout import ROOT
from tests.test_hardening import OWN, RESTRICTED
from tests.test_infra import KUBERNETES_VERSIONS, read

CHART = ROOT / "infra/helm/resmaster"
BESIDE = Path(sys.executable).with_name("helm")
HELM = str(BESIDE) if BESIDE.exists() else shutil.which("helm")
URL = "server.url=http://prefect-server:4200/api"
ALL = f"{URL},root=s3://datasets,view.enabled=true,exporter.enabled=true"

pytestmark = pytest.mark.skipif(HELM is None, reason="no helm: helm-binary of the extra dev is for Linux on x86_64")


def helm(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(HELM), *words], capture_output=True, text=True, check=False)


def rendered(values: str = ALL) -> list[dict[str, Any]]:
    done = helm("template", "trial", str(CHART), "--namespace", "images", "--set", values)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def of_kind(kind: str, values: str = ALL) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in rendered(values) if each["kind"] == kind}


def container(name: str, values: str = ALL) -> dict[str, Any]:
    (found,) = of_kind("Deployment", values)[f"trial-{name}"]["spec"]["template"]["spec"]["containers"]
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("values", [URL, ALL])
def test_helm_has_nothing_against_the_chart(values: str) -> None:
    done = helm("lint", str(CHART), "--strict", "--set", values)
    assert done.returncode == 0, done.stdout
    assert "0 chart(s) failed" in done.stdout


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize(
    "values",
    [
        URL,
        ALL,
        f"{URL},models.claim=mine,shards.gpus=0,networkPolicies.enabled=false",
        f"{ALL},models.storageClass=nfs",
    ],
)
def test_kubernetes_takes_what_the_chart_makes(values: str, version: str) -> None:
    found = rendered(values)
    assert {"ServiceAccount", "Deployment"} <= {document["kind"] for document in found}
    for document in found:
        kubernetes_validate.validate(document, version, strict=True)
    assert "Secret" not in {document["kind"] for document in found}, "secrets are named, not made"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ("root=s3://datasets", "set server.url to the URL of the Prefect server's API"),
        (f"{URL},view.enabled=true", "set root to the root of the datasets"),
        (f"{URL},shard.replicas=3", "Additional property shard is not allowed"),
        (f"{URL},shards.replicas=many", "shards.replicas: Invalid type"),
        (f"{URL},builds.limit=0", "builds.limit: Must be greater than or equal to 1"),
    ],
)
def test_a_mistake_is_told(values: str, told: str) -> None:
    done = helm("template", "trial", str(CHART), "--set", values)
    assert done.returncode != 0
    assert told in done.stderr


def test_every_pod_is_of_the_profile_restricted() -> None:
    for name, deployment in of_kind("Deployment").items():
        pod = deployment["spec"]["template"]
        assert [rule for rule, holds in {**RESTRICTED, **OWN}.items() if not holds(pod)] == [], name
        assert pod["spec"]["automountServiceAccountToken"] is False
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        mounts = {mount["name"] for each in pod["spec"]["containers"] for mount in each["volumeMounts"]}
        assert mounts == volumes
        assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert not {"Role", "RoleBinding", "ClusterRole"} & {each["kind"] for each in rendered()}


def test_workers_serve_the_queues_that_the_script_serves() -> None:
    """infra/workers.sh starts the same workers on a machine, and `make deploy` makes their pool and queues."""
    script = (ROOT / "infra/workers.sh").read_text()
    pools = read("deployments/pools.yaml")
    for role in ("builds", "shards"):
        args = container(role)["args"]
        assert args[:5] == ["prefect", "worker", "start", "--pool", pools["pools"]["process"]["name"]]
        queues = " ".join(args[args.index("--work-queue") :])
        assert f"arguments=({queues})" in script
        assert set(re.findall(r"--work-queue (\S+)", queues)) <= {queue["name"] for queue in pools["queues"]}
    assert "-builds" in of_kind("Deployment")["trial-builds"]["metadata"]["name"], "builds do not count such workers"
    assert container("builds", f"{URL},builds.limit=3")["args"][-2:] == ["--limit", "3"]


def test_values_reach_their_places() -> None:
    shards = container("shards")
    assert {"name": "PREFECT_API_URL", "value": "http://prefect-server:4200/api"} in shards["env"]
    assert shards["envFrom"] == [{"secretRef": {"name": name}} for name in ("resmaster-prefect", "resmaster-store")]
    assert shards["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in container("builds")["resources"]["limits"]
    assert "nvidia.com/gpu" not in container("shards", f"{URL},shards.gpus=0")["resources"]["limits"]
    assert of_kind("Deployment", f"{URL},shards.replicas=5")["trial-shards"]["spec"]["replicas"] == 5
    assert of_kind("PersistentVolumeClaim").keys() == {"trial-models"}
    assert of_kind("PersistentVolumeClaim", f"{URL},models.claim=mine") == {}
    spec = of_kind("Deployment", f"{URL},models.claim=mine")["trial-shards"]["spec"]["template"]["spec"]
    assert {"name": "models", "persistentVolumeClaim": {"claimName": "mine"}} in spec["volumes"]
    assert set(of_kind("Deployment", URL)) == {"trial-builds", "trial-shards"}, "view and exporter are optional"


def test_view_and_exporter_are_commands_of_this_project() -> None:
    for name, verb in (("view", "view"), ("exporter", "status")):
        program, *words = container(name)["args"]
        assert program == "resmaster"
        args = parser().parse_args(words)
        assert (args.command, args.root) == (verb, "s3://datasets")
    (port,) = of_kind("Service")["trial-exporter"]["spec"]["ports"]
    assert container("exporter")["args"][3:5] == ["--serve", f"0.0.0.0:{port['port']}"]
    (token,) = container("view")["env"]
    assert token["valueFrom"]["secretKeyRef"] == {"name": "resmaster-view", "key": "RESMASTER_VIEW_TOKEN"}


def test_nobody_calls_a_pod_but_for_metrics() -> None:
    policies = of_kind("NetworkPolicy")
    assert policies["trial"]["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policies["trial"]["spec"]
    labels = policies["trial"]["spec"]["podSelector"]["matchLabels"]
    for deployment in of_kind("Deployment").values():
        assert labels.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    (rule,) = policies["trial-metrics"]["spec"]["ingress"]
    assert rule == {"ports": [{"protocol": "TCP", "port": 9843}]}
    assert set(of_kind("NetworkPolicy", URL)) == {"trial"}
