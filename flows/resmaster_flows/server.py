"""Finds out whether the Prefect server that is configured can be used. Without a configured server nothing is checked.

The checks come before anything is planned: what is wrong with Prefect's settings is one line.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.client.orchestration import get_client
from prefect.results import get_default_result_storage
from prefect.settings import get_current_settings, load_profiles

from resmaster_stages.errors import ServerLost, UserError
from resmaster_stages.redaction import one_line


def require_answer() -> None:
    """Raise UserError if a server is configured but is none that can be used, or for an unknown profile of Prefect's
    settings."""
    profile, known = os.environ.get("PREFECT_PROFILE"), load_profiles().names
    if profile and profile not in known:
        raise UserError(f"PREFECT_PROFILE: Prefect has no profile {profile!r}; known: {', '.join(sorted(known))}")
    api = get_current_settings().api.url
    if api is None:
        return
    if not api.startswith(("http://", "https://")):
        raise UserError(f"PREFECT_API_URL: {api} has no http:// or https://")
    try:
        client = get_client(sync_client=True)
    except Exception as error:  # whatever httpx and ssl make of addresses, keys, proxies and certificates
        raise UserError(
            f"{api}: cannot be asked ({one_line(error)}); check PREFECT_API_URL, PREFECT_API_KEY, "
            "PREFECT_API_AUTH_STRING, and the variables that name a proxy or a certificate"
        ) from error
    silent = client.api_healthcheck()
    if silent is not None and not _refuses(silent):
        raise UserError(f"{api}: no answer ({silent}); start the server, or unset PREFECT_API_URL to do without one")
    try:
        if silent is not None:
            raise silent
        client.raise_for_api_version_mismatch()
    except (RuntimeError, httpx.HTTPError) as error:
        unfit = error.__cause__ or error
        if isinstance(unfit, httpx.HTTPStatusError):  # the rest of its message is for programmers
            unfit = RuntimeError(f"{unfit.response.status_code} {unfit.response.reason_phrase}")
        raise UserError(
            f"{api}: no Prefect server that can be used ({one_line(unfit)}); check PREFECT_API_URL, which ends in "
            "/api, PREFECT_API_KEY and PREFECT_API_AUTH_STRING"
        ) from error


def _refuses(error: Exception) -> bool:
    """Whether something answered, and would answer another try in the same way."""
    return isinstance(error, httpx.HTTPStatusError) and error.response.is_client_error


def require_result_storage() -> None:
    """Raise UserError if Prefect's setting for the storage of results names a block that the configured server does not
    have, or that cannot be used."""
    block = get_current_settings().results.default_storage_block
    if block is None or get_current_settings().api.url is None:
        return
    try:
        get_default_result_storage()
    except Exception as error:  # whatever the block's own code raises
        raise UserError(
            f"PREFECT_DEFAULT_RESULT_STORAGE_BLOCK {block} cannot be used ({one_line(error)}); unset it, because this "
            "project needs no such storage"
        ) from error


@contextmanager
def server_within_reach() -> Iterator[None]:
    """Raise ServerLost if the configured server is lost within the block. What the server then does not learn (logs) is
    not told on the terminal."""
    api, told = get_current_settings().api.url, logging.raiseExceptions
    logging.raiseExceptions = False
    try:
        yield
    except httpx.HTTPError as error:
        if api is None:
            raise
        raise ServerLost(
            f"{api}: lost ({error or type(error).__name__}); what is committed is kept: run the same command again"
        ) from error
    finally:
        logging.raiseExceptions = told
