"""The error ledger: which sample failed in which attempt, and why.

Invariants:
- The ledger is append-only. A row is never changed or removed, with two exceptions: an attempt that lost its commit
  removes its own file, and a file that is lost or damaged is written again (`runner.mend`).
- A ledger file holds a digest of its rows, because commit records hold only its name.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from resmaster_stages import redaction
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commits import Commits
from resmaster_stages.dataset.schemas import LEDGER_SCHEMA
from resmaster_stages.errors import ShardError, UserError
from resmaster_stages.keys import digest
from resmaster_stages.storage.filesystem import Folder
from resmaster_stages.storage.store_errors import is_damage
from resmaster_stages.storage.tables import decode_table, encode_table, facts_of, written_by

log = logging.getLogger(__name__)

MESSAGE_CHARACTERS = 1000
DIGEST = "rows_sha256"
"""Name in a ledger's metadata of the digest of its rows."""


def ledger_rows(commits: Commits, shards: set[int] | None = None) -> list[dict[str, Any]]:
    """The ledger rows of a stage under its configuration, of all shards or of `shards`, as in LEDGER_SCHEMA.

    A damaged file is left out with a warning, because `verify` reports it and `repair` makes it again.
    """
    found = commits.folder.names(layout.ledger_folder(commits.stage))
    by_name = {name: layout.ledger_shard(name) for name in found}
    names = [name for name, shard in by_name.items() if shard is not None and (shards is None or shard in shards)]
    return [row for rows in read_ledgers(commits, names).values() for row in rows]


def read_ledgers(commits: Commits, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Ledger file -> its rows of a stage under its configuration. A damaged file is left out with a warning."""
    files = commits.folder.read_many(list(names), lenient=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        try:
            rows = _decoded(files.get(name, b""), name)
        except ShardError as error:
            log.warning("left out: %s", error)
        else:
            found[name] = [row for row in rows if row["stage_hash"] == commits.stage_hash]
    return found


def encode_failures(commits: Commits, shard: int, attempt: str, failures: Sequence[tuple[str, Exception]]) -> bytes:
    """The ledger file of an attempt: one row per (key, error). `attempt_number` continues the earlier failures."""
    # the attempt's own file may be there, and damaged
    earlier = Counter(row["key"] for row in ledger_rows(commits, {shard}) if row["attempt"] != attempt)
    rows = [
        {
            "key": key,
            "stage": commits.stage,
            "stage_hash": commits.stage_hash,
            "shard": shard,
            "error_class": type(error).__name__,
            "message": one_line(error),
            "attempt": attempt,
            "attempt_number": earlier[key] + 1,
        }
        for key, error in failures
    ]
    return encode_table(rows, LEDGER_SCHEMA, {DIGEST: digest(rows)})


def _decoded(data: bytes, name: str) -> list[dict[str, Any]]:
    """The rows of a ledger file. Raises ShardError if the file is damaged."""
    table = decode_table(data, LEDGER_SCHEMA, name)
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
    except ValueError as error:  # text that is no UTF-8
        raise ShardError(f"{name}: a row cannot be read ({redaction.one_line(error)})") from error
    if facts_of(data, name).get(DIGEST, digest(rows)) != digest(rows):  # of earlier versions it has no digest
        raise ShardError(f"{name}: its rows were changed since they were written (sha256 differs)")
    return rows


def one_line(error: Exception) -> str:
    """An error's message as one line without credentials, at most `MESSAGE_CHARACTERS` long."""
    return redaction.one_line(error)[:MESSAGE_CHARACTERS]


def first_errors(failures: Sequence[tuple[str, Exception]]) -> str:
    """A text table of failures by class, the most frequent first: count, first key and first message."""
    counts = Counter(type(error).__name__ for _, error in failures)
    lines = [("error", "samples", "first key", "first message")]
    for name, count in counts.most_common():
        key, error = next((key, error) for key, error in failures if type(error).__name__ == name)
        lines.append((name, str(count), key, one_line(error)))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join("  ".join([*(f"{cell:<{width}}" for cell, width in zip(line, widths)), line[3]]) for line in lines)


def ledger_is_whole(folder: Folder, name: str) -> bool:
    """Whether an error ledger can be read, and is as it was written.

    Commit records hold only its name. So its rows are encoded again, which gives its bytes if the same version of the
    library wrote it. Of other versions only the rows are checked.
    """
    try:
        data = folder.read(name)
        rows, facts = _decoded(data, name), facts_of(data, name)
        again = encode_table(rows, LEDGER_SCHEMA, {DIGEST: facts[DIGEST]} if DIGEST in facts else None)
        return data == again or written_by(data, name) != written_by(again, name)
    except (FileNotFoundError, ShardError):
        return False
    except (OSError, UserError) as error:
        if is_damage(error):
            return False
        raise
