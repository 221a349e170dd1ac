"""The records of failed attempts: which stage of which shard ended by an error, when, where and why.

The ledger holds the failures of samples. This module holds the failures of whole attempts: the caption server was down,
a model was missing, the GPU was lost, the store did not answer, too many samples failed.

Invariants:
- A record is written once and never changed or removed. It is no part of the commit protocol, and no data depends on
  it: a record that is gone or unreadable costs only what it said.
- Recording never raises an error, so that the error of the attempt is the one that is seen.
- An interruption (Ctrl-C, SIGTERM) is no failure and is not recorded. A process that is killed cannot record.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commits import Commits
from resmaster_stages.dataset.layout import FailedName
from resmaster_stages.dataset.ledger import one_line
from resmaster_stages.dataset.records import parse_record, record_text

log = logging.getLogger(__name__)

TIME_FORMAT = "%Y%m%dT%H%M%S%f"
UNREADABLE = "(its record cannot be read)"


@dataclass(frozen=True)
class FailedAttempt:
    """The content of a record."""

    stage: str
    stage_hash: str
    shard: int
    attempt: str
    error_class: str
    message: str
    """One line, without credentials."""
    failed_at: str
    """UTC, ISO 8601, by the clock of the host."""
    host: str
    flow_run: str | None = None
    """Id of the Prefect flow run; None without Prefect."""
    flow_run_name: str | None = None
    task_run: str | None = None
    seconds: float = 0.0
    """How long the attempt took, without the time of samples that it saved for the next one."""

    def spelled(self) -> str:
        """The attempt in one line: time, class, message, run and host."""
        reason = f"{self.error_class}: {self.message}" if self.message else self.error_class
        run = f"run {self.flow_run_name} " if self.flow_run_name else ""
        return f"{self.failed_at}: {reason} ({run}on {self.host}, attempt {self.attempt})"


def record_failure(
    commits: Commits, shard: int, attempt: str, error: Exception, provenance: Mapping[str, Any], seconds: float = 0.0
) -> None:
    """Record that an attempt at a shard ended by `error`. A record that cannot be written is only logged.

    provenance: may hold `flow_run`, `flow_run_name` and `task_run`. seconds: that the attempt took in vain.
    """
    try:
        now = datetime.now(UTC)
        failed = FailedAttempt(
            stage=commits.stage,
            stage_hash=commits.stage_hash,
            shard=shard,
            attempt=attempt,
            error_class=type(error).__name__,
            message=one_line(error),
            failed_at=now.isoformat(timespec="seconds"),
            host=socket.gethostname(),
            seconds=round(seconds, 3),
            **{name: provenance.get(name) for name in ("flow_run", "flow_run_name", "task_run")},
        )
        error_class = re.sub(r"\W", "_", failed.error_class, flags=re.ASCII)[:80]
        place = FailedName(shard, now.strftime(TIME_FORMAT), attempt, error_class)
        commits.folder.write(layout.failed_attempt(commits.stage, commits.stage_hash, place), record_text(failed))
    except Exception as problem:  # most likely the store is down, which is then the error of the attempt too
        log.warning("%s of shard %06d: the failed attempt is not recorded: %s", commits.stage, shard, one_line(problem))


def failed_names(commits: Commits, shards: Collection[int] | None = None) -> list[FailedName]:
    """What the names of the records say: every failed attempt of a stage under its configuration, by shard and time.

    From one listing. shards: only these.
    """
    names = commits.folder.names(layout.attempts_folder(commits.stage, commits.stage_hash))
    found = (layout.failed_attempt_of(name) for name in names)
    return sorted(each for each in found if each and (shards is None or each.shard in shards))


def read_failures(commits: Commits, failed: Sequence[FailedName]) -> list[FailedAttempt]:
    """The records of these attempts, in order. Of an unreadable record, what its name says."""
    names = [layout.failed_attempt(commits.stage, commits.stage_hash, each) for each in failed]
    found = commits.folder.read_many(names, lenient=True)
    return [_parsed(commits, each, found.get(name, b"")) for each, name in zip(failed, names, strict=True)]


def _parsed(commits: Commits, place: FailedName, data: bytes) -> FailedAttempt:
    try:
        failed_at = datetime.strptime(place.time, TIME_FORMAT).replace(tzinfo=UTC).isoformat(timespec="seconds")
    except ValueError:  # digits that are no time
        failed_at = place.time
    bare = FailedAttempt(
        stage=commits.stage,
        stage_hash=commits.stage_hash,
        shard=place.shard,
        attempt=place.attempt,
        error_class=place.error_class,
        message=UNREADABLE,
        failed_at=failed_at,
        host="unknown host",
    )
    try:
        told = parse_record(FailedAttempt, data)
    except ValueError:
        return bare
    return replace(
        bare,
        message=told.message,
        host=told.host,
        flow_run=told.flow_run,
        flow_run_name=told.flow_run_name,
        task_run=told.task_run,
        seconds=told.seconds,
    )
