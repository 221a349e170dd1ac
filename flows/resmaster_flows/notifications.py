"""Whom automations tell: addresses and names of blocks in the environment become notification blocks of Prefect."""

from __future__ import annotations

import os
from urllib.parse import unquote, urlsplit
from uuid import UUID

from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.notifications import (
    CustomWebhookNotificationBlock,
    MicrosoftTeamsWebhook,
    PagerDutyWebHook,
    SlackWebhook,
)
from prefect.client.orchestration import PrefectClient
from prefect.exceptions import ObjectNotFound
from pydantic import SecretStr

from resmaster_stages.errors import UserError

NOTIFY_URL = "RESMASTER_NOTIFY_URL"
"""Addresses, with blanks between them."""
NOTIFY_BLOCK = "RESMASTER_NOTIFY_BLOCK"
"""Blocks that the server has, as `TYPE/NAME`, with blanks between them."""
BLOCKS = "resmaster-notify-"
"""How the names of the blocks begin that are made for addresses."""
SLACK = ("hooks.slack.com", "hooks.slack-gov.com")


def block_for(address: str) -> NotificationBlock:
    """The block that tells an address. Raises UserError, whose message has no secrets."""
    place = urlsplit(address)
    try:
        if place.scheme == "pagerduty":
            return PagerDutyWebHook(
                integration_key=SecretStr(unquote(place.username or "")),
                api_key=SecretStr(
                    unquote(address.rpartition("@")[2].strip("/"))
                ),  # a host name would be in small letters
                notify_type="failure",
            )
        if place.scheme in ("http", "https"):
            return _webhook(address, place.hostname or "")
        from apprise import Apprise

        if Apprise.instantiate(address) is not None:
            return SlackWebhook(url=SecretStr(address), notify_type="failure")  # takes any address of Apprise
    except (ValueError, TypeError):
        pass
    raise UserError(
        f"{NOTIFY_URL}: an address that begins with {place.scheme}:// cannot be told; give a webhook (https://...) of "
        "Slack, Teams or your own, mailtos://USER:PASSWORD@HOST?to=ADDRESS, pagerduty://INTEGRATION_KEY@API_KEY, or "
        "another address of Apprise"
    )


def _webhook(address: str, host: str) -> NotificationBlock:
    from apprise.plugins.workflows import NotifyWorkflows

    if host in SLACK:
        block = SlackWebhook(url=SecretStr(address), notify_type="failure")
        if not len(block._apprise_client):
            raise ValueError("no address of a webhook of Slack")
        return block
    if NotifyWorkflows.parse_native_url(address):
        return MicrosoftTeamsWebhook(url=SecretStr(address), notify_type="failure")
    return CustomWebhookNotificationBlock(
        name="webhook", url=address, json_data={"text": "{{subject}}\n{{body}}"}, headers=None, cookies=None
    )


async def blocks_to_tell(client: PrefectClient) -> list[UUID] | None:
    """The ids of the blocks that the environment names; those for addresses are made or updated. None if it names none.

    Raises UserError for an address that cannot be told, before anything is made, and for a block that is not there.
    """
    addresses = [block_for(each) for each in os.environ.get(NOTIFY_URL, "").split()]
    named = os.environ.get(NOTIFY_BLOCK, "").split()
    if not addresses and not named:
        return None
    found = []
    for name in named:
        slug, _, own = name.partition("/")
        try:
            found.append((await client.read_block_document_by_name(own, slug)).id)
        except ObjectNotFound:
            raise UserError(
                f"{NOTIFY_BLOCK}: the server has no block {name}; write TYPE/NAME, e.g. slack-webhook/team"
            ) from None
    for number, block in enumerate(addresses, 1):
        saved = await block.save(f"{BLOCKS}{number}", overwrite=True, client=client)
        found.append(UUID(str(saved)))
    return found
