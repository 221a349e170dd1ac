"""Bring a Prefect server to the state that `deployments/` describes: work pools, queues, deployments, automations.

    python -m resmaster_flows.deploy [--pool process|docker|kubernetes] [--gpus N] [--remove]

Deploying is idempotent: existing objects are updated in place and keep their ids. Objects that the files do not name
are left alone. The one exception are deployments that had the name of their kind of pool: their schedules move to the
deployments that the files name, and they are deleted.
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
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    DeploymentFilterName,
    DeploymentFilterTags,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import DeploymentSchedule, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker

from resmaster_flows.deployments import KINDS, ROLES, deployment_name
from resmaster_flows.home import HOME, PROMPTS
from resmaster_flows.notifications import BLOCKS, NOTIFY_BLOCK, NOTIFY_URL, blocks_to_tell
from resmaster_flows.server import require_answer
from resmaster_stages.errors import ResMasterError, UserError

DEPLOYMENTS = HOME / "deployments"
TAG = "resmaster"
"""Tag of this project's deployments, and so of their runs."""
PAGE = 200

DEFAULTS = {
    "RESMASTER_ROOT": str(Path("out").resolve()),
    "RESMASTER_PROMPTS": str(PROMPTS),
    "RESMASTER_IMAGE": "resmaster-pipeline:cuda",
}
"""Values of the variables in `prefect.yaml` that are not set in the environment."""


def read_yaml(name: str) -> Any:
    """The content of a file in `deployments/`."""
    return yaml.safe_load((DEPLOYMENTS / name).read_text(encoding="utf-8"))


def pool_name(kind: str) -> str:
    """The name of the work pool of a kind."""
    return str(read_yaml("pools.yaml")["pools"][kind]["name"])


def entries_of(kind: str) -> list[dict[str, Any]]:
    """The entries of `prefect.yaml` for a kind of pool."""
    pool = pool_name(kind)
    return [entry for entry in read_yaml("prefect.yaml")["deployments"] if entry["work_pool"]["name"] == pool]


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
    await _name_default_queue(client, name, pools["default_queue"])
    for queue in pools["queues"]:
        limit = gpus if queue["name"] in pools["limited_by_gpus"] else queue.get("concurrency_limit")
        try:
            found = await client.read_work_queue_by_name(queue["name"], work_pool_name=name)
        except ObjectNotFound:
            found = await client.create_work_queue(queue["name"], work_pool_name=name)
        await client.update_work_queue(found.id, priority=queue["priority"], concurrency_limit=limit)
    return str(name)


async def _name_default_queue(client: PrefectClient, pool: str, wanted: str) -> None:
    """Rename the queue `default`, which Prefect makes and nobody looks into, to one that workers look into.

    Prefect deletes no pool's own queue. If there is a queue `wanted` beside it already, it is paused, and so no alarm.
    """
    try:
        default = await client.read_work_queue_by_name("default", work_pool_name=pool)
    except ObjectNotFound:
        return
    try:
        await client.read_work_queue_by_name(wanted, work_pool_name=pool)
    except ObjectNotFound:
        await client.update_work_queue(default.id, name=wanted)
    else:
        await client.update_work_queue(default.id, is_paused=True)


def deploy_flows(kind: str) -> list[str]:
    """Deploy the entries of `prefect.yaml` for a kind of pool with Prefect's command. Returns their names."""
    names = [str(entry["name"]) for entry in entries_of(kind)]
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy"]
    done = subprocess.run(
        [
            *command,
            *(word for name in names for word in ("--name", name)),
            *("--prefect-file", str(DEPLOYMENTS / "prefect.yaml")),
        ],
        env={**DEFAULTS, **os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ResMasterError(f"prefect deploy failed:\n{done.stdout}{done.stderr}".rstrip())
    return names


async def deployments_named(client: PrefectClient, names: Sequence[str]) -> list[DeploymentResponse]:
    """This project's deployments that have one of these names."""
    wanted = DeploymentFilter(name=DeploymentFilterName(any_=list(names)), tags=DeploymentFilterTags(all_=[TAG]))
    return await client.read_deployments(deployment_filter=wanted, limit=PAGE)


async def schedules_of(client: PrefectClient, kind: str) -> dict[tuple[UUID, str | None], DeploymentSchedule]:
    """(deployment, slug) -> schedule, of all deployments for a kind of pool."""
    found = await deployments_named(client, [entry["name"] for entry in entries_of(kind)])
    return {(each.id, schedule.slug): schedule for each in found for schedule in each.schedules}


async def keep_switched(
    client: PrefectClient, kind: str, before: Mapping[tuple[UUID, str | None], DeploymentSchedule]
) -> None:
    """Restore which schedules are active: a deploy resets them to the files, but users may have changed them."""
    for place, schedule in (await schedules_of(client, kind)).items():
        if place in before and schedule.active != before[place].active:
            await client.update_deployment_schedule(place[0], schedule.id, active=before[place].active)


async def replace_earlier(client: PrefectClient, kind: str) -> list[str]:
    """Delete the deployments that are called like the kind of pool, and move their schedules to the new ones.

    Returns a line for each.
    """
    told = []
    for old in await deployments_named(client, [kind]):
        flow = (await client.read_flow(old.flow_id)).name
        if flow not in ROLES:
            continue
        new = await client.read_deployment_by_name(f"{flow}/{deployment_name(flow, kind)}")
        known = {schedule.slug: schedule for schedule in new.schedules if schedule.slug}
        for schedule in old.schedules:
            if schedule.slug in known:
                await client.update_deployment_schedule(new.id, known[schedule.slug].id, active=schedule.active)
            else:
                await _copy_schedule(client, new.id, schedule, old.parameters)
        await client.delete_deployment(old.id)
        told.append(f"renamed: {flow}/{old.name} is {flow}/{new.name} now, with {len(old.schedules)} schedules")
    return told


async def _copy_schedule(
    client: PrefectClient, deployment: UUID, schedule: DeploymentSchedule, parameters: Mapping[str, Any]
) -> None:
    """Give a deployment a schedule of another one, with the parameters that its runs had there."""
    values = schedule.model_dump(mode="json", include={"schedule", "active", "max_scheduled_runs", "slug"})
    values["parameters"] = {**parameters, **(schedule.parameters or {})}
    await client.request("POST", "/deployments/{id}/schedules", path_params={"id": deployment}, json=[values])


def for_kind(entry: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """An entry of `automations.yaml` for a kind of pool.

    Where it names a flow as a deployment, the deployment of that flow is put. An automation that starts a deployment
    exists once for each kind of pool, so its name tells the kind.
    """

    def named(resource: Mapping[str, Any]) -> dict[str, Any]:
        name = resource.get("prefect.resource.name")
        if resource.get("prefect.resource.role") == "deployment" and name is not None:
            return {**resource, "prefect.resource.name": deployment_name(name, kind)}
        return dict(resource)

    trigger = {**entry["trigger"], "match_related": list(map(named, entry["trigger"]["match_related"]))}
    starts = any("deployment" in action for action in entry["actions"])
    suffix = f"-{kind}" if starts and kind != KINDS[0] else ""
    return {**entry, "name": f"{entry['name']}{suffix}", "trigger": trigger}


async def resolve(
    client: PrefectClient, action: Mapping[str, Any], kind: str, blocks: Sequence[UUID]
) -> list[dict[str, Any]]:
    """An action with the id of the deployment that it names, or once for each of the blocks if it tells people."""
    values = dict(action)
    if flow := values.pop("deployment", None):
        values["deployment_id"] = (await client.read_deployment_by_name(f"{flow}/{deployment_name(flow, kind)}")).id
    if values["type"] == "send-notification":
        return [{**values, "block_document_id": block} for block in blocks]
    return [values]


async def make_automations(client: PrefectClient, kind: str, blocks: Sequence[UUID]) -> list[str]:
    """Create or update the automations. blocks: what tells people. Returns the names of automations that are left out
    because there is nobody to tell."""
    left_out = []
    for entry in (for_kind(entry, kind) for entry in read_yaml("automations.yaml")):
        actions = [each for action in entry["actions"] for each in await resolve(client, action, kind, blocks)]
        if not actions:
            left_out.append(entry["name"])
            continue
        wanted = AutomationCore.model_validate({**entry, "actions": actions})
        found = await client.read_automations_by_name(entry["name"])
        if not found:
            await client.create_automation(wanted)
        elif described(found[0]) != described(wanted):  # an update resets what the automation waits for
            await client.update_automation(found[0].id, wanted.model_copy(update={"enabled": found[0].enabled}))
    return left_out


async def told_so_far(client: PrefectClient) -> list[UUID]:
    """The blocks that the automations on the server tell people by."""
    names = [entry["name"] for entry in read_yaml("automations.yaml")]
    found = [each for name in names for each in await client.read_automations_by_name(name)]
    actions = [action for each in found for action in each.actions if action.type == "send-notification"]
    return list(dict.fromkeys(action.block_document_id for action in actions))


def described(automation: AutomationCore) -> dict[str, Any]:
    """What an automation does, without ids and without whether it is enabled."""
    return automation.model_dump(
        mode="json", include={"name", "description", "trigger", "actions"}, exclude={"trigger": {"id"}}
    )


async def deploy(kind: str, gpus: int | None) -> None:
    """Create or update the pool, deployments and automations, and print what was done."""
    async with get_client() as client:
        blocks = await blocks_to_tell(client)
        pool = await make_pool(client, kind, gpus)
        schedules = await schedules_of(client, kind)
        names = await asyncio.to_thread(deploy_flows, kind)
        await keep_switched(client, kind, schedules)
        renamed = await replace_earlier(client, kind)
        blocks = await told_so_far(client) if blocks is None else blocks
        left_out = await make_automations(client, kind, blocks)
    api = get_current_settings().api.url
    print(f"{api}: work pool {pool}; deployments {', '.join(names)}; automations")
    for line in renamed:
        print(line)
    if left_out:
        print(
            f"left out: {', '.join(left_out)}, for nobody is named to tell; set {NOTIFY_URL} or {NOTIFY_BLOCK} and "
            "deploy again"
        )


async def remove(kind: str) -> None:
    """Delete the deployments, the queues and the pool of a kind, and its automations, and print what was deleted.

    With the last pool, the other automations and their blocks are deleted too. Raises UserError if runs are at work.
    """
    async with get_client() as client:
        pool, names = pool_name(kind), [entry["name"] for entry in entries_of(kind)]
        found = await deployments_named(client, [*names, kind])
        await _require_idle(client, found)
        for each in found:
            await client.delete_deployment(each.id)
        pools = {each.name for each in await client.read_work_pools()}
        if pool in pools:
            await client.delete_work_pool(pool)
        last = not any(pool_name(other) in pools - {pool} for other in KINDS)
        gone = await _remove_automations(client, kind, last)
        if last:
            await _remove_blocks(client)
    if not found and pool not in pools:
        raise UserError(f"{get_current_settings().api.url}: has no work pool {pool}; nothing to remove")
    print(f"{get_current_settings().api.url}: removed work pool {pool} with its queues", end="")
    print(f"; deployments {', '.join(sorted(each.name for each in found))}; automations {', '.join(gone) or 'none'}")


async def _require_idle(client: PrefectClient, deployments: Sequence[DeploymentResponse]) -> None:
    """Raise UserError if runs of the deployments are at work."""
    if not deployments:
        return
    at_work = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    runs = await client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[each.id for each in deployments])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=at_work))),
        limit=PAGE,
    )
    if runs:
        raise UserError(
            f"{len(runs)} runs are at work (such as {runs[0].name}); let them end or cancel them, then remove the pool"
        )


async def _remove_automations(client: PrefectClient, kind: str, last: bool) -> list[str]:
    """Delete the automations of a kind of pool, and with the last pool all others. Returns their names."""
    gone = []
    for entry in read_yaml("automations.yaml"):
        starts = any("deployment" in action for action in entry["actions"])
        for each in await client.read_automations_by_name(for_kind(entry, kind)["name"]) if starts or last else []:
            await client.delete_automation(each.id)
            gone.append(each.name)
    return gone


async def _remove_blocks(client: PrefectClient) -> None:
    for each in await client.read_block_documents():
        if each.name is not None and each.name.startswith(BLOCKS):
            await client.delete_block_document(each.id)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0 done, 1 not done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m resmaster_flows.deploy", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--pool", choices=KINDS, default=KINDS[0], help="kind of work pool (default: process)")
    parser.add_argument("--gpus", type=int, help="runs at work at a time (default: what the workers' --limit allows)")
    parser.add_argument("--remove", action="store_true", help="remove the pool with its queues and deployments instead")
    args = parser.parse_args(argv)
    try:
        if args.gpus is not None and args.gpus < 1:
            raise UserError(f"--gpus {args.gpus}: give a number of at least 1")
        if get_current_settings().api.url is None:
            raise UserError("no server to deploy to: set PREFECT_API_URL, or start one with: make up")
        require_answer()
        asyncio.run(remove(args.pool) if args.remove else deploy(args.pool, args.gpus))
    except ResMasterError as error:
        print(f"deploy: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
