"""Bring a Prefect server to the state that `deployments/` describes: work pools, queues, deployments, automations.

    python -m resmaster_flows.deploy [--pool process|docker|kubernetes] [--gpus N]

Deploying is idempotent: existing objects are updated in place and keep their ids. Objects that the files do not name
are left alone.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker

from resmaster_flows.home import HOME, PROMPTS
from resmaster_flows.server import require_answer
from resmaster_stages.errors import ResMasterError, UserError

DEPLOYMENTS = HOME / "deployments"
POOLS = ("process", "docker", "kubernetes")

NOTIFY_BLOCK = "resmaster-notify"
NOTIFY_URL = "RESMASTER_NOTIFY_URL"

DEFAULTS = {
    "RESMASTER_ROOT": str(Path("out").resolve()),
    "RESMASTER_PROMPTS": str(PROMPTS),
    "RESMASTER_IMAGE": "resmaster-pipeline:cuda",
}
"""Values of the variables in `prefect.yaml` that are not set in the environment."""


def read_yaml(name: str) -> Any:
    """The content of a file in `deployments/`."""
    return yaml.safe_load((DEPLOYMENTS / name).read_text(encoding="utf-8"))


async def make_pool(client: PrefectClient, kind: str, gpus: int | None) -> str:
    """Create or update the work pool of a kind, with its queues. Returns the name of the pool."""
    pools = read_yaml("pools.yaml")
    pool = pools["pools"][kind]
    name = pool["name"]
    if "base_job_template" in pool:
        template = yaml.safe_load((HOME / pool["base_job_template"]).read_text(encoding="utf-8"))
    else:
        template = ProcessWorker.get_default_base_job_template()
    try:
        await client.read_work_pool(name)
    except ObjectNotFound:
        await client.create_work_pool(WorkPoolCreate(name=name, type=pool["type"], base_job_template=template))
    else:
        await client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
    for queue in pools["queues"]:
        limit = gpus if queue["name"] in pools["limited_by_gpus"] else queue.get("concurrency_limit")
        try:
            found = await client.read_work_queue_by_name(queue["name"], work_pool_name=name)
        except ObjectNotFound:
            found = await client.create_work_queue(queue["name"], work_pool_name=name)
        await client.update_work_queue(found.id, priority=queue["priority"], concurrency_limit=limit)
    return str(name)


def deploy_flows(kind: str) -> list[str]:
    """Deploy the entries of `prefect.yaml` for a kind of pool with Prefect's command. Returns their entrypoints."""
    wanted = [entry for entry in read_yaml("prefect.yaml")["deployments"] if entry["name"] == kind]
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--name", kind]
    done = subprocess.run(
        [*command, "--prefect-file", str(DEPLOYMENTS / "prefect.yaml")],
        env={**DEFAULTS, **os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ResMasterError(f"prefect deploy failed:\n{done.stdout}{done.stderr}".rstrip())
    return [entry["entrypoint"] for entry in wanted]


async def schedules_of(client: PrefectClient, kind: str) -> dict[tuple[UUID, str | None], DeploymentSchedule]:
    """(deployment, slug) -> schedule, of all deployments for a kind of pool."""
    named = DeploymentFilter(name=DeploymentFilterName(any_=[kind]))
    found = await client.read_deployments(deployment_filter=named, limit=200)
    return {(each.id, schedule.slug): schedule for each in found for schedule in each.schedules}


async def keep_switched(
    client: PrefectClient, kind: str, before: Mapping[tuple[UUID, str | None], DeploymentSchedule]
) -> None:
    """Restore which schedules are active: a deploy resets them to the files, but users may have changed them."""
    for place, schedule in (await schedules_of(client, kind)).items():
        if place in before and schedule.active != before[place].active:
            await client.update_deployment_schedule(place[0], schedule.id, active=before[place].active)


async def notification_block(client: PrefectClient) -> None:
    """Create or update the block that sends notifications, if the environment gives their URL."""
    url = os.environ.get(NOTIFY_URL)
    if url:
        block = CustomWebhookNotificationBlock(
            name=NOTIFY_BLOCK, url=url, json_data={"text": "{{subject}}\n{{body}}"}, headers=None, cookies=None
        )
        await block.save(NOTIFY_BLOCK, overwrite=True, client=client)


async def resolve(client: PrefectClient, action: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """An action with the ids of the deployment and block that it names. Raises ObjectNotFound."""
    values = dict(action)
    if flow := values.pop("deployment", None):
        values["deployment_id"] = (await client.read_deployment_by_name(f"{flow}/{kind}")).id
    if block := values.pop("block", None):
        slug, _, name = block.partition("/")
        values["block_document_id"] = (await client.read_block_document_by_name(name, slug)).id
    return values


async def make_automations(client: PrefectClient, kind: str) -> list[str]:
    """Create or update the automations. Returns the names of those left out because their block is missing."""
    left_out = []
    for entry in read_yaml("automations.yaml"):
        try:
            actions = [await resolve(client, action, kind) for action in entry["actions"]]
        except ObjectNotFound:
            left_out.append(entry["name"])
            continue
        wanted = AutomationCore.model_validate({**entry, "actions": actions})
        found = await client.read_automations_by_name(entry["name"])
        if not found:
            await client.create_automation(wanted)
        elif described(found[0]) != described(wanted):  # an update resets what the automation waits for
            await client.update_automation(found[0].id, wanted.model_copy(update={"enabled": found[0].enabled}))
    return left_out


def described(automation: AutomationCore) -> dict[str, Any]:
    """What an automation does, without ids and without whether it is enabled."""
    return automation.model_dump(
        mode="json", include={"name", "description", "trigger", "actions"}, exclude={"trigger": {"id"}}
    )


async def deploy(kind: str, gpus: int | None) -> None:
    """Create or update the pool, deployments and automations, and print what was done."""
    async with get_client() as client:
        pool = await make_pool(client, kind, gpus)
        schedules = await schedules_of(client, kind)
        entrypoints = await asyncio.to_thread(deploy_flows, kind)
        await keep_switched(client, kind, schedules)
        await notification_block(client)
        left_out = await make_automations(client, kind)
    api = get_current_settings().api.url
    print(f"{api}: work pool {pool}; {len(entrypoints)} deployments named {kind}; automations")
    for name in left_out:
        print(f"left out: {name}, for nobody is named to tell; set {NOTIFY_URL} and deploy again")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0 done, 1 not done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m resmaster_flows.deploy", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--pool", choices=POOLS, default="process", help="kind of work pool (default: process)")
    parser.add_argument("--gpus", type=int, help="runs at work at a time (default: what the workers' --limit allows)")
    args = parser.parse_args(argv)
    try:
        if args.gpus is not None and args.gpus < 1:
            raise UserError(f"--gpus {args.gpus}: give a number of at least 1")
        if get_current_settings().api.url is None:
            raise UserError("no server to deploy to: set PREFECT_API_URL, or start one with: make up")
        require_answer()
        asyncio.run(deploy(args.pool, args.gpus))
    except ResMasterError as error:
        print(f"deploy: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
