"""Finds out whether the Prefect server that is configured can be used, or starts a temporary one.

The checks come before anything is planned: what is wrong with Prefect's settings is one line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile

import httpx
from prefect.client.orchestration import get_client
from prefect.results import get_default_result_storage
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import get_current_settings, load_profiles

from resmaster_stages.errors import UserError
from resmaster_stages.redaction import one_line

TEMPORARY_SERVER_STARTS = 3


def start_temporary_server() -> None:
    """Start the temporary server that Prefect would start at the first flow run, but try several times.

    Prefect (3.8) gives up if the first answer takes 5 s, which happens on a busy machine. The second server starts
    faster, because the first has created the database. Raises ConnectionError if no server answers, and UserError if
    Prefect's settings allow no temporary server, or if its folder cannot be written.
    """
    _require_possible()
    for _ in range(TEMPORARY_SERVER_STARTS):
        server = SubprocessASGIServer()
        try:
            server.start()
        except httpx.TimeoutException:
            server.stop()
        except (RuntimeError, OSError, httpx.HTTPError) as error:
            server.stop()
            raise ConnectionError(
                f"the temporary Prefect server did not start ({one_line(error)}); check PREFECT_HOME and the free "
                "ports, or start a server that stays: make up"
            ) from error
        else:
            return
    raise ConnectionError(
        f"a temporary Prefect server did not answer, {TEMPORARY_SERVER_STARTS} times; try again when this machine is "
        "less busy, or start one that stays: make up"
    )


def require_answer() -> None:
    """Raise UserError if a server is configured but is none that can be used, or if none is configured and a temporary
    one cannot start, or for an unknown profile of Prefect's settings."""
    profile, known = os.environ.get("PREFECT_PROFILE"), load_profiles().names
    if profile and profile not in known:
        raise UserError(f"PREFECT_PROFILE: Prefect has no profile {profile!r}; known: {', '.join(sorted(known))}")
    api = get_current_settings().api.url
    if api is None:
        _require_possible()
        return
    if not api.startswith(("http://", "https://")):
        raise UserError(f"PREFECT_API_URL: {api} has no http:// or https://")
    client = get_client(sync_client=True)
    if (error := client.api_healthcheck()) is not None:
        raise UserError(f"{api}: no answer ({error}); start the server, or unset PREFECT_API_URL to do without one")
    try:
        client.raise_for_api_version_mismatch()
    except (RuntimeError, httpx.HTTPError) as unfit:
        reason = one_line(unfit.__cause__ or unfit)
        raise UserError(
            f"{api}: no Prefect server that can be used ({reason}); check PREFECT_API_URL, which ends in /api, "
            "PREFECT_API_KEY and PREFECT_API_AUTH_STRING"
        ) from unfit


def _require_possible() -> None:
    """Raise UserError if Prefect's settings allow no temporary server, or its folder cannot be written."""
    if not get_current_settings().server.ephemeral.enabled:
        raise UserError(
            "no Prefect server is configured, and Prefect's settings allow no temporary one: set PREFECT_API_URL "
            "(make up starts a server), or PREFECT_SERVER_ALLOW_EPHEMERAL_MODE=true"
        )
    home = get_current_settings().home
    try:
        home.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise UserError(f"PREFECT_HOME {home} cannot be written ({error.strerror}); set PREFECT_HOME") from error


def require_result_storage() -> None:
    """Raise UserError if Prefect's setting for the storage of results names a block that cannot be used. Starts the
    temporary server, which has the blocks, if no server is configured."""
    block = get_current_settings().results.default_storage_block
    if block is None:
        return
    if get_current_settings().api.url is None:
        start_temporary_server()
    try:
        get_default_result_storage()
    except Exception as error:  # whatever the block's own code raises
        raise UserError(
            f"PREFECT_DEFAULT_RESULT_STORAGE_BLOCK {block} cannot be used ({one_line(error)}); unset it, because this "
            "project needs no such storage"
        ) from error


@contextmanager
def server_within_reach() -> Iterator[None]:
    """Provide a server within the block: the configured server, or else a temporary one.

    Raises ConnectionError if the configured server is lost within the block.
    """
    api = get_current_settings().api.url
    if api is None:
        start_temporary_server()
        yield
        return
    try:
        yield
    except httpx.HTTPError as error:
        raise ConnectionError(
            f"{api}: lost ({error or type(error).__name__}); what is committed is kept: run the same command again"
        ) from error
