"""`deployments/` and `infra/`, checked without containers or a cluster: schemas, linters, and that the parts fit
together.

No image was ever built from the Dockerfile in these tests, no stack started and no cluster asked.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from prefect.events.schemas.automations import AutomationCore
from prefect.flows import load_flow_from_entrypoint
from prefect.workers.process import ProcessWorker

from resmaster_flows import deploy, server_runs
from resmaster_flows.cli.main import ENVIRONMENT
from resmaster_flows.deployments import KINDS, ROLES, deployment_name
from resmaster_flows.form import configuration
from resmaster_stages.config.dataset import DispatchConfig
from tests.checkout import ROOT

KUBERNETES_VERSIONS = ("1.28", "1.34")


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def template(kind: str) -> dict[str, Any]:
    pool = read("deployments/pools.yaml")["pools"][kind]
    if "base_job_template" not in pool:
        return ProcessWorker.get_default_base_job_template()
    return read(pool["base_job_template"])


ENTRIES = [(kind, entry["entrypoint"], entry) for kind in KINDS for entry in deploy.entries_of(kind)]


def test_every_flow_is_deployed_to_every_kind_of_pool_under_its_name() -> None:
    assert len(ENTRIES) == len(read("deployments/prefect.yaml")["deployments"]) == len(KINDS) * len(ROLES)
    named = {(load_flow_from_entrypoint(entrypoint).name, kind): entry["name"] for kind, entrypoint, entry in ENTRIES}
    assert named == {(flow, kind): deployment_name(flow, kind) for flow in ROLES for kind in KINDS}


@pytest.mark.parametrize(("kind", "entrypoint", "entry"), ENTRIES, ids=[f"{kind}-{e}" for kind, e, _ in ENTRIES])
def test_a_deployment_names_a_pool_a_queue_and_variables_that_exist(kind: str, entrypoint: str, entry: Any) -> None:
    pools = read("deployments/pools.yaml")
    assert entry["work_pool"]["name"] == pools["pools"][kind]["name"]
    assert entry["work_pool"]["work_queue_name"] in {queue["name"] for queue in pools["queues"]}
    assert pools["default_queue"] in {queue["name"] for queue in pools["queues"]}
    assert set(entry["work_pool"]["job_variables"]) <= set(template(kind)["variables"]["properties"])
    schedules = entry.get("schedules", [])
    assert [schedule["active"] for schedule in schedules] in ([], [False])
    for parameters in (entry.get("parameters", {}), *(schedule["parameters"] for schedule in schedules)):
        assert set(parameters) <= set(load_flow_from_entrypoint(entrypoint).parameters.properties)


def test_the_scheduled_build_is_a_configuration() -> None:
    from resmaster_stages.planning.preview import preview

    entry = next(entry for _, entrypoint, entry in ENTRIES if entrypoint == "resmaster_flows.build.build_dataset")
    text = yaml.safe_dump(entry["schedules"][0]["parameters"])
    for name, value in deploy.DEFAULTS.items():
        text = text.replace(f"{{{{ ${name} }}}}", value)
    fields = yaml.safe_load(text)
    config = configuration(fields.pop("config"), fields, fields.pop("advanced"))
    assert config.upscale.guidance_scale == 4.0, "as of deployments/datasets/picturebook.yaml"
    assert (config.name, config.root, config.dispatch.shards_per_run) == (
        "nightly",
        deploy.DEFAULTS["RESMASTER_ROOT"],
        2,
    )
    assert preview(config).pending_samples()["high_res"] == 16


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_a_job_template_uses_its_variables_and_has_those_that_it_uses(kind: str) -> None:
    found = template(kind)
    used = set(re.findall(r"\{\{ (\w+) \}\}", yaml.safe_dump(found["job_configuration"])))
    assert used == set(found["variables"]["properties"])


def filled(value: Any, values: dict[str, Any]) -> Any:
    """A template as Prefect fills it: a placeholder alone gives the value itself, or nothing if it has none."""
    if isinstance(value, dict):
        done = {key: filled(inner, values) for key, inner in value.items()}
        return {key: inner for key, inner in done.items() if inner is not None}
    if isinstance(value, list):
        return [filled(inner, values) for inner in value]
    if isinstance(value, str) and (alone := re.fullmatch(r"\{\{ (\w+) \}\}", value)):
        return values.get(alone[1])
    if isinstance(value, str):
        return re.sub(r"\{\{ (\w+) \}\}", lambda found: str(values.get(found[1])), value)
    return value


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kubernetes_takes_the_job_of_a_run(version: str) -> None:
    found = template("kubernetes")
    values = {name: field.get("default") for name, field in found["variables"]["properties"].items()}
    values |= {"name": "demo", "labels": {"app": "demo"}, "command": ["prefect", "flow-run", "execute"]}
    values["env"] = [{"name": "A", "value": "b"}]  # the worker turns a mapping into this
    job = filled(found["job_configuration"]["job_manifest"], values)
    kubernetes_validate.validate(job, version, strict=True)
    assert job["spec"]["backoffLimit"] == 0, "otherwise Kubernetes and Prefect both start an evicted run again"
    pod = job["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert pod["securityContext"]["runAsNonRoot"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["envFrom"] == [{"secretRef": {"name": "resmaster-store"}}]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**job, "spec": {**job["spec"], "backofLimit": 0}}, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kubernetes_takes_the_worker(version: str) -> None:
    documents = list(yaml.safe_load_all((ROOT / "infra/kubernetes/worker.yaml").read_text()))
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)
    assert "Secret" not in {document["kind"] for document in documents}, "secrets are named, not kept here"
    worker = next(document for document in documents if document["kind"] == "Deployment")
    (container,) = worker["spec"]["template"]["spec"]["containers"]
    pool = read("deployments/pools.yaml")["pools"]["kubernetes"]
    assert container["args"][:5] == ["prefect", "worker", "start", "--pool", pool["name"]]
    accounts = {document["metadata"]["name"] for document in documents if document["kind"] == "ServiceAccount"}
    variables = template("kubernetes")["variables"]["properties"]
    assert {variables["service_account_name"]["default"], "resmaster-worker"} == accounts
    claims = {d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
    assert claims == {variables["models_claim"]["default"]}


def test_compose_takes_the_stack() -> None:
    text = (ROOT / "infra/compose.yaml").read_text()
    interpolated = re.sub(r"\$\{\w+(?::-([^}]*)|:\?[^}]*)\}", lambda found: found[1] or "secret", text)
    assert "$" not in interpolated
    resolved = yaml.safe_load(interpolated)  # with merge keys resolved
    services = PyCompose.from_yaml(yaml.safe_dump(resolved)).service_names()
    assert set(services) == {"database", "folders", "store", "server", "deploy", "builds", "shards-gpu", "shards-cpu"}
    with pytest.raises(ValueError, match="imagee"):
        PyCompose.from_yaml("services: {a: {imagee: b}}")
    for name, service in resolved["services"].items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} listens beyond this machine"
        for other, condition in service.get("depends_on", {}).items():
            if condition["condition"] == "service_healthy":
                assert "healthcheck" in resolved["services"][other]
    for secret in re.findall(r"\$\{(\w*(?:PASSWORD|SECRET|KEY)\w*)([^}]*)\}", text):
        assert secret[1].startswith(":?"), f"{secret[0]} has a default"


def test_the_dockerfile_passes_its_linter_and_copies_what_is_there() -> None:
    path = ROOT / "infra" / "Dockerfile"
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(linter), str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    lines = path.read_text().splitlines()
    allowed = (ROOT / ".dockerignore").read_text().split()
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source.split('/')[0]}" in allowed, source
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["10001"]
    assert lines[-1] == "FROM runtime"


def test_the_automations_are_automations() -> None:
    entries = [deploy.for_kind(entry, "docker") for entry in read("deployments/automations.yaml")]
    for entry in entries:
        actions = [
            {key: value for key, value in action.items() if key != "deployment"}
            | ({"deployment_id": uuid4()} if "deployment" in action else {})
            | ({"block_document_id": uuid4()} if action["type"] == "send-notification" else {})
            for action in entry["actions"]
        ]
        AutomationCore.model_validate({**entry, "actions": actions})
        tag = {"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.resmaster"}
        assert tag in entry["trigger"]["match_related"], "runs of this project alone"
    zombies = next(entry for entry in entries if entry["name"] == "resmaster-zombies")
    beat = int(read("deployments/prefect.yaml")["definitions"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    assert zombies["trigger"]["within"] == 3 * beat
    assert int(ENVIRONMENT["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) == beat, "of a build that the command line runs"
    assert 3 * beat < server_runs.SILENT_SECONDS


def test_the_scripts_are_scripts() -> None:
    for path in sorted((ROOT / "infra").glob("*.sh")):
        subprocess.run(["bash", "-n", str(path)], check=True)
        assert path.stat().st_mode & 0o111, path


def workers(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PREFECT": str(folder / "prefect")}
    return subprocess.Popen(
        [str(ROOT / "infra" / "workers.sh"), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_workers_of_two_starts_have_names_of_their_own(tmp_path: Path) -> None:
    """Prefect takes two workers of one name for one. A script stands in for Prefect."""
    program = tmp_path / "prefect"
    program.write_text('#!/bin/bash\necho "$@"\nexec sleep 600\n')
    program.chmod(0o755)
    started = [workers(tmp_path, "shards", "2"), workers(tmp_path, "shards", "1"), workers(tmp_path, "builds")]
    try:
        lines = [process.stdout.readline() for process, n in zip(started, (2, 1, 1), strict=True) for _ in range(n)]  # type: ignore[union-attr]
    finally:
        for process in started:
            process.terminate()
            process.wait()
    names = [re.search(r"--name (\S+)", line)[1] for line in lines]  # type: ignore[index]
    assert len(set(names)) == 4
    assert ["builds" in name.split("-") for name in names] == [False] * 3 + [True], "shards are not counted on those"


def test_a_worker_that_keeps_ending_waits_longer_each_time_and_tells_why(tmp_path: Path) -> None:
    program = tmp_path / "prefect"
    program.write_text("#!/bin/bash\necho 'a traceback'\necho 'the server is away' >&2\necho\nexit 3\n")
    program.chmod(0o755)
    process = workers(tmp_path, "shards", "1")
    told = []
    try:
        while len(told) < 3:
            line = process.stdout.readline()  # type: ignore[union-attr]
            assert line, "it goes on"
            told += [line] if line.startswith("workers.sh: ") else []
    finally:
        process.terminate()
        process.wait(timeout=60)
    pattern = (
        r"workers.sh: worker shards-0 ended after \d+ s \(exit status 3\): the server is away; it is started again in "
    )
    assert [int(re.fullmatch(rf"{pattern}(\d+) s\n", line)[1]) for line in told] == [2, 4, 8]  # type: ignore[index]


def test_workers_without_prefect_end_with_one_line(tmp_path: Path) -> None:
    process = workers(tmp_path, "shards", "2")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == f"workers.sh: no program {tmp_path}/prefect; run make install, or set PREFECT\n"


def test_workers_find_the_program_beside_the_checkout(tmp_path: Path) -> None:
    (tmp_path / "infra").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "infra" / "workers.sh", tmp_path / "infra")
    program = tmp_path / ".venv" / "bin" / "prefect"
    program.write_text('#!/bin/bash\necho "$0"\nexec sleep 600\n')
    program.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT"}
    command = [str(tmp_path / "infra" / "workers.sh"), "shards", "1"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{program}\n"
        finally:
            process.terminate()


ELSEWHERE = {
    "make up": "tests/server/test_stack.py runs its recipe",
    "source out/stack/env": "written by make up; tests/server/test_stack.py sources it",
    ".venv/bin/resmaster run deployments/datasets/picturebook.yaml --root s3://datasets": (
        "tests/durability/test_page.py builds it on S3, tests/server/test_operation.py with workers"
    ),
    "make down": "tests/server/test_stack.py runs its recipe",
    "infra/lock.sh": "asks the package index; tests/test_hardening.py runs it with an index of its own",
    "python infra/pin_images.py": "asks registries; tests/test_hardening.py runs it with a registry of its own",
    "python infra/pin_images.py --check": "as above",
    "make deploy": "tests/server/test_deploy.py runs its recipe",
    "make deploy POOL=kubernetes GPUS=8": "as above; the options are checked below",
    "make undeploy POOL=kubernetes": "tests/server/test_deploy.py runs its recipe",
    "infra/workers.sh builds": "tests/server/test_stack.py, by make up",
    "infra/workers.sh shards": "needs GPUs to be more than the next one",
    "infra/workers.sh shards 2": "tests/server/test_stack.py runs one worker so",
    "export PREFECT_SERVER_DATABASE_CONNECTION_URL=postgresql+asyncpg://prefect:SECRET@HOST/prefect": "needs "
    "PostgreSQL",
    "prefect server start --host 0.0.0.0": "Prefect's own; tests/server starts it on the loopback",
    "sbatch infra/slurm/run.sbatch deployments/datasets/picturebook.yaml --root s3://datasets --max-hours 23.5": (
        "needs Slurm; tests/infra/test_slurm.py submits it to one of its own"
    ),
    "sbatch infra/slurm/builds.sbatch": "as above",
    "sbatch --array=1-8 infra/slurm/shards.sbatch": "as above",
    "sky jobs launch infra/skypilot/run.yaml --env CONFIG=deployments/datasets/sdxl-4k.yaml --env ROOT=s3://datasets": (
        "rents a machine; tests/infra/test_skypilot.py runs its script"
    ),
    "sky jobs launch infra/skypilot/shards.yaml --num-nodes 4 --env PREFECT_API_URL=https://prefect.example/api": (
        "as above"
    ),
    "helm install resmaster infra/helm/resmaster --namespace resmaster --set "
    "server.url=http://prefect-server.prefect:4200/api": "needs a cluster; tests/infra/test_helm.py fills it in",
    "helm upgrade resmaster infra/helm/resmaster --namespace resmaster --reuse-values --set shards.replicas=8": (
        "as above"
    ),
}
"""Commands of docs/deploying.md, which all need a server or more, and where they are run instead."""


def test_every_command_of_the_page_is_run_somewhere() -> None:
    page = (ROOT / "docs" / "deploying.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert {line for block in blocks for line in block.splitlines()} == set(ELSEWHERE)
    for name in re.findall(r"`((?:infra|deployments|tests)/[\w./-]*)[` ]", page):
        assert (ROOT / name).exists(), name
    makefile = (ROOT / "Makefile").read_text()
    for target, recipe in {
        "up": "infra/stack.sh up",
        "down": "infra/stack.sh down",
        "deploy": "-m resmaster_flows.deploy --pool",
        "undeploy": "-m resmaster_flows.deploy --pool $(POOL) --remove",
    }.items():
        assert re.search(rf"^{target}:.*\n\t.*{re.escape(recipe)}", makefile, flags=re.MULTILINE), target
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "-o", "install", "deploy", "POOL=kubernetes", "GPUS=8"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip().endswith("-m resmaster_flows.deploy --pool kubernetes --gpus 8")
    for table in re.findall(r"^\| `(resmaster-[\w-]+)`", page, flags=re.MULTILINE):
        assert table in {entry["name"] for entry in read("deployments/automations.yaml")}
    for field in re.findall(r"`dispatch\.(\w+)`", page):
        assert field in DispatchConfig.model_fields, field
