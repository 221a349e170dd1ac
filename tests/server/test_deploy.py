"""`make deploy`: the whole of `deployments/`, twice, on a real server."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.exceptions import PrefectHTTPStatusError

from resmaster_flows import build, deploy
from resmaster_flows.server_runs import ServerRuns
from resmaster_stages.config.dataset import DispatchConfig
from resmaster_stages.config.method import methods
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import UserError
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
        build = client.read_deployment_by_name("build-dataset/process")
    (schedule,) = [each for each in build.schedules if each.slug == "nightly"]
    return build.id, schedule


def test_deploying_twice_is_deploying_once(deployed: Stack) -> None:
    """What an operator switched stays switched."""
    first = snapshot(deployed)
    build, schedule = nightly(deployed)
    assert not schedule.active, "shipped, and paused"
    with deployed.client() as client:
        client.update_deployment_schedule(build, schedule.id, active=True)
    command = [sys.executable, "-m", "resmaster_flows.deploy", "--pool", "process"]
    done = subprocess.run(command, cwd=ROOT, env=deployed.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "5 deployments named process" in done.stdout
    assert "left out: resmaster-failure-rate" in done.stdout
    assert snapshot(deployed) == first
    _, again = nightly(deployed)
    assert again.active
    with deployed.client() as client:
        client.update_deployment_schedule(build, again.id, active=False)

    priorities = {queue["name"]: queue["priority"] for queue in first["queues"]}
    assert priorities["gpu-repair"] < priorities["gpu"] < priorities["builds"]
    assert {item["name"] for item in first["automations"]} == {"resmaster-zombies", "resmaster-repair-after-crash"}
    entrypoints = {item["entrypoint"]: item for item in first["deployments"]}
    assert set(entrypoints) == {
        "resmaster_flows.build.build_dataset",
        "resmaster_flows.process.process_shards",
        "resmaster_flows.build.repair",
        "resmaster_flows.build.publish",
        "resmaster_flows.compare.compare_methods",
    }
    parts = entrypoints["resmaster_flows.build.build_dataset"]["parameter_openapi_schema"]["definitions"]
    for part in parts.values():
        assert all(field.get("description") for field in part["properties"].values()), part["title"]
    alternatives = {
        each["title"]: each["properties"] for each in parts["DatasetConfig"]["properties"]["upscale"]["anyOf"]
    }
    assert list(alternatives) == ["resmaster", *(name for name in methods() if name != "resmaster")], (
        "the form shows the first"
    )
    for name, fields in alternatives.items():
        assert all(field.get("description") for field in fields.values()), name
        assert fields["method"]["const"] == fields["method"]["default"] == name
        assert fields["preset"]["enum"] == list(methods()[name].presets)
    assert "cosine_scale_1" in alternatives["demofusion"]
    assert "default" not in alternatives["resmaster"]["steps"], (
        "the form sends defaults, and the preset has another one"
    )


def test_the_repair_form_says_what_its_fields_are(deployed: Stack) -> None:
    with deployed.client() as client:
        schema = client.read_deployment_by_name("repair/process").parameter_openapi_schema
    assert schema is not None
    fields = schema["properties"]
    assert sorted(fields, key=lambda name: fields[name]["position"]) == list(
        inspect.signature(build.repair.fn).parameters
    )
    assert {"dataset_url", "shards", "stages"} <= fields.keys()
    assert all(field["description"] for field in fields.values())
    assert fields["stages"]["anyOf"][0]["items"]["enum"] == list(STAGES)
    with pytest.raises(PrefectHTTPStatusError, match="nonsense"):
        deployed.run("repair/process", dataset_url="out/demo", stages=["nonsense"])


def test_notifications_come_with_an_address(deployed: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(deploy.NOTIFY_URL, "http://127.0.0.1:9/hook")

    async def make() -> list[str]:
        async with get_client() as client:
            await deploy.make_pool(client, "process", gpus=3)
            await deploy.notification_block(client)
            return await deploy.make_automations(client, "process")

    assert asyncio.run(make()) == [], "nothing is left out"
    with deployed.client() as client:
        (automation,) = client.read_automations_by_name("resmaster-failure-rate")
        assert automation.actions[0].type == "send-notification"
        queues = client.request("POST", f"/work_pools/{POOL}/queues/filter", json={}).json()
    limits = {queue["name"]: queue["concurrency_limit"] for queue in queues}
    assert limits == {"default": None, "builds": 8, "gpu": 3, "gpu-repair": 3}


def test_a_deployment_that_is_not_there_is_named(deployed: Stack) -> None:
    with pytest.raises(UserError, match=r"has no deployment process-shards/nonsense; make it with: make deploy"):
        ServerRuns(DispatchConfig(deployment="nonsense"), "out/demo")


def test_without_a_server_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy.main(["--gpus", "0"]) == 2
    assert "--gpus 0: give a number of at least 1" in capsys.readouterr().err
