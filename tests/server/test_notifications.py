"""Whom the automations tell of builds that end badly or do not begin: on a real server, by each kind of block."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from prefect import flow
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Crashed, Failed, Pending, Running

from resmaster_flows import deploy
from resmaster_flows.notifications import NOTIFY_BLOCK, NOTIFY_URL, block_for, blocks_to_tell
from resmaster_flows.server_runs import DATASET_LABEL
from resmaster_stages.errors import UserError
from tests.server.conftest import Stack, wait
from tests.server.receivers import PAGERDUTY, SLACK, TEAMS, Receivers, receiving, text_of

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(400)]

WITHIN_SECONDS = 10
"""Instead of the ten minutes that a build may take to begin."""
PLACES = ("webhook", "mail", "hooks.slack.com", "prod-1.westus.logic.azure.com", "events.pagerduty.com")


@pytest.fixture(scope="module")
def receivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receivers]:
    with receiving(tmp_path_factory.mktemp("receivers")) as found:
        yield found


@pytest.fixture(scope="module")
def server(receivers: Receivers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A server of its own, deployed to, that evaluates triggers and has no workers."""
    stack = Stack(tmp_path_factory.mktemp("prefect"))
    stack.environment |= receivers.environment | {
        "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "true",
        "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "true",
        "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": "1",
        "PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS": "2",
    }
    stack.start("server", "server", "start", "--host", "127.0.0.1", "--port", str(stack.port))
    read = deploy.read_yaml

    def hasty(name: str) -> Any:
        entries = read(name)
        for entry in entries if name == "automations.yaml" else []:
            if entry["name"] == "resmaster-build-not-started":
                entry["trigger"]["within"] = WITHIN_SECONDS
        return entries

    try:
        wait(stack.healthy)
        with temporary_settings({PREFECT_API_URL: stack.api}), pytest.MonkeyPatch.context() as patch:
            patch.setattr(deploy, "read_yaml", hasty)
            for name in ("PREFECT_API_URL", "PREFECT_HOME", "PYTHONPATH"):
                patch.setenv(name, stack.environment[name])
            patch.setenv(NOTIFY_URL, f"{receivers.webhook} {receivers.mail}\n{SLACK} {TEAMS} {PAGERDUTY}")
            asyncio.run(deploy.deploy("process", None))
            yield stack
    finally:
        for name in reversed(list(stack.processes)):
            stack.kill(name)


@pytest.fixture
def client(server: Stack) -> Iterator[SyncPrefectClient]:
    with server.client() as client:
        yield client


PARAMETERS: dict[str, dict[str, Any]] = {
    "process-shards/resmaster-shards": {"dataset_url": "s3://datasets/other", "shards": [0]},
    "repair/resmaster-repair": {"dataset_url": "s3://datasets/other"},
}


@flow(name="build-dataset")
def foreign(config: str = "") -> None:
    """Somebody else's flow, which has the name of ours and a deployment."""


def begin(client: SyncPrefectClient, deployment: str, name: str, *states: State) -> Any:
    """A run of a deployment, or of somebody else's, that goes through these states."""
    found = client.read_deployment_by_name(deployment)
    run = client.create_flow_run_from_deployment(found.id, name=name, parameters=PARAMETERS.get(deployment, {}))
    for state in states:
        client.set_flow_run_state(run.id, state, force=True)
    return run.id


def told(receivers: Receivers, name: str) -> dict[str, list[str]]:
    """Receiver -> what it was told of a run."""
    found = {
        place: [
            text for text in (text_of(place, each) for each in list(receivers.arrived.get(place, []))) if name in text
        ]
        for place in PLACES
    }
    return {place: texts for place, texts in found.items() if texts}


def test_everybody_hears_of_a_build_that_ends_badly_and_nobody_of_others(
    server: Stack, client: SyncPrefectClient, receivers: Receivers
) -> None:
    theirs = client.create_deployment(flow_id=client.create_flow(foreign), name="theirs", tags=["billing"])
    begin(client, "build-dataset/theirs", "build theirs", Running(), Failed(message="their fault"))
    begin(client, "build-dataset/resmaster-build", "build well", Running(), Completed())
    begin(client, "process-shards/resmaster-shards", "demo: shards 0", Running(), Failed(message="one of many"))
    incomplete = Failed(name="Incomplete", message="shards 3 not finished; first: captions: the server is down")
    begin(client, "build-dataset/resmaster-build", "build unfinished", Running(), incomplete)
    begin(client, "repair/resmaster-repair", "repair failed", Running(), Failed(message="wrong input"))
    for name, said in (("build unfinished", "captions: the server is down"), ("repair failed", "wrong input")):
        found = wait(lambda name=name: seen if set(seen := told(receivers, name)) == set(PLACES) else None)
        for place, texts in found.items():
            assert len(texts) == 1, place
            assert said in texts[0], place
            assert "/runs/flow-run/" in texts[0], place
    for name in ("build theirs", "their fault", "build well", "demo: shards 0"):
        assert told(receivers, name) == {}, "later events than theirs were told"
    client.delete_deployment(theirs)


def test_a_crashed_build_is_told_and_repaired(server: Stack, client: SyncPrefectClient, receivers: Receivers) -> None:
    run = begin(client, "build-dataset/resmaster-build", "build crashed", Running())
    client.update_flow_run_labels(run, {DATASET_LABEL: "s3://datasets/demo"})
    client.set_flow_run_state(run, Crashed(message="its worker is gone"), force=True)
    wait(lambda: set(told(receivers, "build crashed")) == set(PLACES))
    repairs = wait(lambda: [each for each in client.read_flow_runs() if each.parameters == REPAIR])
    assert [each.deployment_id for each in repairs] == [client.read_deployment_by_name("repair/resmaster-repair").id]


REPAIR = {"dataset_url": "s3://datasets/demo"}


def test_a_build_that_no_worker_takes_or_begins_is_told(
    server: Stack, client: SyncPrefectClient, receivers: Receivers
) -> None:
    begin(client, "build-dataset/resmaster-build", "build untaken")
    begin(client, "build-dataset/resmaster-build", "build stuck", Pending())
    begin(client, "build-dataset/resmaster-build", "build taken", Pending(), Running())
    for name in ("build untaken", "build stuck"):
        wait(lambda name=name: set(told(receivers, name)) == set(PLACES))
        (text,) = told(receivers, name)["webhook"]
        assert f"{name} does not start" in text
        assert "the queue builds of the pool resmaster-process?" in text
    assert told(receivers, "build taken") == {}


def test_deploying_again_without_addresses_keeps_them_and_a_block_replaces_them(
    server: Stack, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def actions() -> list[Any]:
        (found,) = client.read_automations_by_name("resmaster-build-ended-badly")
        return [action.block_document_id for action in found.actions]

    before = actions()
    assert len(before) == len(PLACES)
    monkeypatch.delenv(NOTIFY_URL)
    asyncio.run(deploy.deploy("process", None))
    assert actions() == before
    assert "left out" not in capsys.readouterr().out
    monkeypatch.setenv(NOTIFY_BLOCK, "custom-webhook/gone")
    with pytest.raises(UserError, match=r"RESMASTER_NOTIFY_BLOCK: the server has no block custom-webhook/gone; write"):
        asyncio.run(deploy.deploy("process", None))

    async def own() -> Any:
        async with get_client() as asking:
            block = CustomWebhookNotificationBlock(name="own", url="http://127.0.0.1:9/")
            await block.save("own", client=asking)
            return await blocks_to_tell(asking)

    monkeypatch.setenv(NOTIFY_BLOCK, "custom-webhook/own")
    (mine,) = asyncio.run(own())
    asyncio.run(deploy.deploy("process", None))
    assert actions() == [mine]


@pytest.mark.parametrize(
    "address",
    [
        "nonsense://secret",
        "secret",
        "https://hooks.slack.com/services/secret",
        "pagerduty://secret@",
        "pagerduty://secret",
    ],
)
def test_an_address_that_cannot_be_told_is_one_line_without_its_secret(address: str) -> None:
    with pytest.raises(UserError, match=r"^RESMASTER_NOTIFY_URL: an address that begins with") as found:
        block_for(address)
    assert "secret" not in str(found.value)
