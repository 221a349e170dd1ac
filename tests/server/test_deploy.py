"""`make deploy`: the whole of `deployments/`, twice, on a real server."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Completed, Running

from resmaster_flows import build, deploy
from resmaster_flows.build import build_dataset
from resmaster_flows.deployments import ROLES
from resmaster_flows.server_runs import ServerRuns
from resmaster_stages.config.dataset import DispatchConfig
from resmaster_stages.config.method import methods
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import UserError
from tests.browser import Browser, chromium
from tests.server.conftest import POOL, ROOT, Stack

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(300)]

VOLATILE = {
    "created",
    "updated",
    "last_polled",
    "status",
    "labels",
    "created_by",
    "updated_by",
    "schedules",
    "work_queue_id",
}


def snapshot(stack: Stack) -> dict[str, Any]:
    """Everything that a deploy makes, without what time changes."""
    with stack.client() as client:

        def ask(path: str, **body: object) -> list[dict[str, Any]]:
            return client.request("POST", path, json=body).json()

        found = {
            "pools": ask("/work_pools/filter"),
            "queues": ask(f"/work_pools/{POOL}/queues/filter"),
            "deployments": ask("/deployments/filter"),
            "automations": ask("/automations/filter"),
            "blocks": ask("/block_documents/filter"),
        }
    schedules = [
        (item["name"], each["slug"], each["id"]) for item in found["deployments"] for each in item["schedules"]
    ]
    for items in found.values():
        items.sort(key=lambda item: item["id"])
    kept = {
        kind: [{k: v for k, v in item.items() if k not in VOLATILE} for item in items] for kind, items in found.items()
    }
    return {**kept, "schedules": schedules}


def nightly(stack: Stack) -> tuple[UUID, DeploymentSchedule]:
    """The deployment that has a schedule, and the schedule that it ships with."""
    with stack.client() as client:
        build = client.read_deployment_by_name("build-dataset/resmaster-build")
    (schedule,) = [each for each in build.schedules if each.slug == "nightly"]
    return build.id, schedule


NAMES = {flow: f"resmaster-{role}" for flow, role in ROLES.items()}


def deploy_again(stack: Stack, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "resmaster_flows.deploy", *words]
    return subprocess.run(command, cwd=ROOT, env=stack.environment, capture_output=True, text=True, check=False)


def test_deploying_twice_is_deploying_once(deployed: Stack) -> None:
    """What an operator switched stays switched."""
    first = snapshot(deployed)
    build, schedule = nightly(deployed)
    assert not schedule.active, "shipped, and paused"
    with deployed.client() as client:
        client.update_deployment_schedule(build, schedule.id, active=True)
    done = deploy_again(deployed, "--pool", "process")
    assert done.returncode == 0, done.stderr
    assert f"; deployments {', '.join(NAMES.values())}; automations" in done.stdout
    assert (
        "left out: resmaster-build-ended-badly, resmaster-build-not-started, resmaster-failure-rate, for" in done.stdout
    )
    assert "renamed" not in done.stdout
    assert snapshot(deployed) == first
    _, again = nightly(deployed)
    assert again.active
    with deployed.client() as client:
        client.update_deployment_schedule(build, again.id, active=False)

    priorities = {queue["name"]: queue["priority"] for queue in first["queues"]}
    assert set(priorities) == {"builds", "gpu", "gpu-repair"}, "no queue that no worker looks into"
    assert priorities["gpu-repair"] < priorities["gpu"] < priorities["builds"]
    assert {item["name"] for item in first["automations"]} == {"resmaster-zombies", "resmaster-repair-after-crash"}
    with deployed.client() as client:
        flows = {item["entrypoint"]: client.read_flow(UUID(item["flow_id"])).name for item in first["deployments"]}
        (zombie_repair,) = client.read_automations_by_name("resmaster-repair-after-crash")
        repair = client.read_deployment_by_name("repair/resmaster-repair")
    assert {flows[item["entrypoint"]]: item["name"] for item in first["deployments"]} == NAMES
    assert set(flows) == {
        "resmaster_flows.build.build_dataset",
        "resmaster_flows.process.process_shards",
        "resmaster_flows.build.repair",
        "resmaster_flows.build.publish",
        "resmaster_flows.compare.compare_methods",
        "resmaster_flows.overview.overview_of",
    }
    assert zombie_repair.actions[0].deployment_id == repair.id


def test_the_build_form_begins_with_what_most_builds_say(deployed: Stack) -> None:
    with deployed.client() as client:
        schema = client.read_deployment_by_name("build-dataset/resmaster-build").parameter_openapi_schema
    assert schema is not None
    fields = schema["properties"]
    assert sorted(fields, key=lambda name: fields[name]["position"]) == [
        *("config", "name", "root", "input", "model", "method", "preset", "scale", "limit", "price", "read_input"),
        "advanced",
    ]
    assert all(field["description"] and "default" in field for field in fields.values())
    assert not schema.get("definitions"), "the parts of a configuration are no fields of the form"
    assert fields["method"]["enum"] == ["as configured", *methods()]
    named = {preset for method in methods().values() for preset in method.presets}
    assert set(fields["preset"]["enum"]) == {"as configured", *named}
    assert [each["type"] for each in fields["config"]["anyOf"]] == ["string", "object"]


@pytest.mark.skipif(chromium() is None, reason="there is no Chromium here; on Debian: apt-get install chromium")
def test_the_build_form_fits_two_screens_and_can_be_sent(deployed: Stack, tmp_path: Path) -> None:
    """In both of Prefect's UIs. What is left as it is, is sent as it is, and the server takes it."""
    with deployed.client() as client:
        build = client.read_deployment_by_name("build-dataset/resmaster-build").id
        for number, ui in enumerate(("", "/v2")):
            with Browser(1440, 2000) as browser:
                browser.open(f"http://127.0.0.1:{deployed.port}{ui}/deployments/deployment/{build}/run")
                browser.wait_for("Submit", "advanced")
                browser.settle()
                submit = "[...document.querySelectorAll('button')].find(e => e.innerText.trim() === 'Submit')"
                assert browser.evaluate(f"{submit}.getBoundingClientRect().bottom") <= 2000
                browser.evaluate("document.querySelectorAll('textarea')[0].focus()")
                browser.command("Input.insertText", text=f"nothing-{number}.yaml")
                browser.click("Submit")
                browser.until(f"!location.href.includes('{build}/run')")
        runs = {run.parameters["config"]: run for run in client.read_flow_runs() if run.deployment_id == build}
        for number in range(2):
            run = runs[f"nothing-{number}.yaml"]
            assert set(run.parameters) == set(inspect.signature(build_dataset.fn).parameters)
            client.delete_flow_run(run.id)


def test_the_repair_form_says_what_its_fields_are(deployed: Stack) -> None:
    with deployed.client() as client:
        schema = client.read_deployment_by_name("repair/resmaster-repair").parameter_openapi_schema
    assert schema is not None
    fields = schema["properties"]
    assert sorted(fields, key=lambda name: fields[name]["position"]) == list(
        inspect.signature(build.repair.fn).parameters
    )
    assert {"dataset_url", "shards", "stages"} <= fields.keys()
    assert all(field["description"] for field in fields.values())
    assert fields["stages"]["anyOf"][0]["items"]["enum"] == list(STAGES)
    with pytest.raises(PrefectHTTPStatusError, match="nonsense"):
        deployed.run("repair/resmaster-repair", dataset_url="out/demo", stages=["nonsense"])


def test_the_limit_of_gpus_is_that_of_two_queues(deployed: Stack) -> None:
    async def make() -> None:
        async with get_client() as client:
            await deploy.make_pool(client, "process", gpus=3)

    asyncio.run(make())
    with deployed.client() as client:
        queues = client.request("POST", f"/work_pools/{POOL}/queues/filter", json={}).json()
    limits = {queue["name"]: queue["concurrency_limit"] for queue in queues}
    assert limits == {"builds": 8, "gpu": 3, "gpu-repair": 3}


def test_a_pool_of_another_kind_comes_and_goes_alone(deployed: Stack) -> None:
    before = snapshot(deployed)
    done = deploy_again(deployed, "--pool", "kubernetes", "--gpus", "8")
    assert done.returncode == 0, done.stderr
    kinds = {name: f"{name}-kubernetes" for name in NAMES.values()}
    with deployed.client() as client:
        for flow, name in NAMES.items():
            assert client.read_deployment_by_name(f"{flow}/{kinds[name]}").work_pool_name == "resmaster-kubernetes"
        (repair,) = client.read_automations_by_name("resmaster-repair-after-crash-kubernetes")
        its = client.read_deployment_by_name("repair/resmaster-repair-kubernetes")
        assert repair.actions[0].deployment_id == its.id
        assert {"prefect.resource.role": "deployment", "prefect.resource.name": "resmaster-build-kubernetes"} in [
            dict(each) for each in repair.trigger.match_related
        ]
        run = client.create_flow_run_from_deployment(its.id, parameters={"dataset_url": "x"})
        client.set_flow_run_state(run.id, Running(), force=True)
        refused = deploy_again(deployed, "--pool", "kubernetes", "--remove")
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"deploy: 1 runs are at work (such as {run.name}); let them end")
        client.set_flow_run_state(run.id, Completed(), force=True)
    done = deploy_again(deployed, "--pool", "kubernetes", "--remove")
    assert done.returncode == 0, done.stderr
    assert "removed work pool resmaster-kubernetes with its queues; deployments resmaster-build-kub" in done.stdout
    assert done.stdout.endswith("automations resmaster-repair-after-crash-kubernetes\n")
    assert snapshot(deployed) == before
    again = deploy_again(deployed, "--pool", "kubernetes", "--remove")
    assert again.returncode == 2
    assert again.stderr.endswith("has no work pool resmaster-kubernetes; nothing to remove\n")


@flow(name="build-dataset")
def earlier(config: dict[str, Any]) -> None:
    """A build as it was deployed under the name of its pool's kind."""


def test_deployments_of_an_earlier_name_go_and_their_schedules_stay(deployed: Stack) -> None:
    hourly = {"schedule": {"interval": 3600}, "active": True, "slug": "hourly"}
    switched = {"schedule": {"cron": "0 5 * * *"}, "active": True, "slug": "nightly"}
    with deployed.client() as client:
        of = client.create_flow(earlier)
        theirs = client.create_deployment(flow_id=of, name="process", tags=["theirs"])
        client.delete_deployment(theirs)
        old = client.create_deployment(flow_id=of, name="process", tags=["resmaster"], parameters={"config": {"a": 1}})
        client.request("POST", f"/deployments/{old}/schedules", json=[hourly, switched]).raise_for_status()
    done = deploy_again(deployed)
    assert done.returncode == 0, done.stderr
    assert "renamed: build-dataset/process is build-dataset/resmaster-build now, with 2 schedules" in done.stdout
    with deployed.client() as client:
        with pytest.raises(ObjectNotFound):
            client.read_deployment(old)
        build = client.read_deployment_by_name("build-dataset/resmaster-build")
        found = {each.slug: each for each in build.schedules}
        assert found["nightly"].active, "as the earlier one was"
        assert (found["hourly"].active, found["hourly"].parameters) == (True, {"config": {"a": 1}})
        client.delete_deployment_schedule(build.id, found["hourly"].id)
        client.update_deployment_schedule(build.id, found["nightly"].id, active=False)


def test_a_deployment_that_is_not_there_is_named(deployed: Stack) -> None:
    with pytest.raises(UserError, match=r"has no deployment process-shards/nonsense; make it with: make deploy"):
        ServerRuns(DispatchConfig(deployment="nonsense"), "out/demo")


def test_without_a_server_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy.main(["--gpus", "0"]) == 2
    assert "--gpus 0: give a number of at least 1" in capsys.readouterr().err
