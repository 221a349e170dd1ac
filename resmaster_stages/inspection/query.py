"""Asks the published samples of a dataset, with the choices about them: filters, sorts, counts, histograms.

The manifest and the choices are tables of a DuckDB database on this machine's disk, so memory does not grow with the
dataset. Users filter by expressions of SQL, such as `agreement_psnr > 22 and not near_duplicate`. Their names are the
columns of the manifest, every flag that is no column's name, `kept`, `rejected`, `rating`, `reason` and `bad` (the
number that sorts the worst samples first).

Invariant: expressions only read. They reach neither files nor the network, and the database is a copy.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.curation import Choice, read_choices
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.schemas import CURATION_SCHEMA, manifest_schema
from resmaster_stages.errors import UserError
from resmaster_stages.metrics import metric_columns
from resmaster_stages.metrics.flags import UNKNOWN_BADNESS, known_flags
from resmaster_stages.metrics.metric import Flag
from resmaster_stages.redaction import quoted, shortened
from resmaster_stages.storage.scratch import scratch_folder
from resmaster_stages.storage.tables import decode_table, table_of

MEMORY = "256MB"
"""What DuckDB may hold in memory. What is beyond that lies on the disk."""
EXAMPLE = "write, for example: agreement_psnr > 22 and not near_duplicate"
REASON_CHARACTERS = 300
"""Longer reasons of DuckDB are cut: it lists all names that it knows."""
CHOSEN = ("verdict", "rating", "reason", "who", "when")
"""Columns of the choices that count now. The manifest's own are those of the time when it was published."""


@dataclass(frozen=True)
class Query:
    """Which samples, in which order."""

    where: str = ""
    """An expression of the user's; "" for all samples."""
    conditions: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """Expressions of ours with their parameters (`?` in the expression), all of which must hold."""
    sort: str = "index"
    """Name of a column. Samples without a value come last, and equal ones by `index`."""
    descending: bool = False
    offset: int = 0
    limit: int | None = None

    def also(self, condition: str, *parameters: Any) -> Query:
        """This query with one more condition."""
        return replace(self, conditions=(*self.conditions, (condition, parameters)))


KEPT_ONLY = Query().also("not rejected")
"""All samples that nobody rejected."""


class SampleTable:
    """The published samples of a dataset. Threads may share it. Made by `sample_table`."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        described = self._connection.execute("describe samples").fetchall()
        self.columns: dict[str, str] = {name: kind for name, kind, *_ in described}
        """Name -> DuckDB's type (`VARCHAR`, `DOUBLE`, `BOOLEAN`, `VARCHAR[]`, ...), of all names in expressions."""

    def count(self, query: Query = Query()) -> int:
        """How many samples there are, whatever limit and offset."""
        clause, parameters = self._where(query)
        return int(self._rows(query, f"select count(*) from samples {clause}", parameters)[0][0])

    def keys(self, query: Query = Query()) -> list[str]:
        """The keys of samples."""
        return [row["key"] for row in self.rows(query, ("key",))]

    def rows(self, query: Query = Query(), columns: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Rows with `columns` (default: all)."""
        clause, parameters = self._where(query)
        names = [self.require(name) for name in columns or self.columns]
        shown = ", ".join(map(_name, names))
        order = f"{_name(self.require(query.sort))} {'desc' if query.descending else 'asc'} nulls last, index"
        limit = "" if query.limit is None else f"limit {int(query.limit)}"
        sql = f"select {shown} from samples {clause} order by {order} {limit} offset {int(query.offset)}"
        return [dict(zip(names, row)) for row in self._rows(query, sql, parameters)]

    def row(self, key: str) -> dict[str, Any] | None:
        """The row of one sample; None if it is not published."""
        found = self.rows(Query(limit=1).also("key = ?", key))
        return found[0] if found else None

    def histogram(self, column: str, edges: Sequence[float], query: Query = Query()) -> list[int]:
        """How many samples have a value from each of `edges` to the next. The last edge belongs to the last bin."""
        name, (clause, parameters) = _name(self.require(column)), self._where(query)
        bins = len(edges) - 1
        spread = (edges[-1] - edges[0]) or 1.0
        place = f"least({bins - 1}, floor(({name} - ?) / ? * {bins}))::int"
        sql = (
            f"select {place} as bin, count(*) from (select * from samples {clause}) "
            f"where {name} between ? and ? group by bin"
        )
        found = dict(self._rows(query, sql, [edges[0], spread, *parameters, edges[0], edges[-1]]))
        return [int(found.get(number, 0)) for number in range(bins)]

    def limits(self, column: str) -> tuple[float, float] | None:
        """The least and the greatest finite value of a column; None if it has no value."""
        name = _name(self.require(column))
        low, high = self._rows(Query(), f"select min({name}), max({name}) from samples where isfinite({name})", ())[0]
        return None if low is None else (float(low), float(high))

    def choose(self, choices: Iterable[Choice]) -> None:
        """Let choices count from now on. Does not write them into the dataset."""
        marks = ", ".join("?" * len(CURATION_SCHEMA))
        with self._lock:
            for choice in choices:
                values = [asdict(choice)[name] for name in CURATION_SCHEMA.names]
                self._connection.cursor().execute(f"insert or replace into choices values ({marks})", values)

    def require(self, column: str) -> str:
        """`column`, if there is one of this name. Raises UserError."""
        if column not in self.columns:
            raise UserError(f"there is no column {column!r}; there are: {', '.join(self.columns)}")
        return column

    def check(self, where: str) -> None:
        """Raise UserError if an expression cannot be used."""
        self.count(Query(where=where))

    def _where(self, query: Query) -> tuple[str, list[Any]]:
        """The clause of a query, and its parameters."""
        parts = [f"({condition})" for condition, _ in query.conditions]
        parameters = [value for _, values in query.conditions for value in values]
        if query.where.strip():
            self._require_expression(query.where)
            parts.append(f"({query.where}\n)")  # the line break ends a comment
        return (f"where {' and '.join(parts)}" if parts else ""), parameters

    def _require_expression(self, where: str) -> None:
        try:
            where.encode()
            statements = self._connection.extract_statements(f"select 1 from samples where ({where}\n)")
        except UnicodeEncodeError:
            raise UserError(f"{where!r} is no UTF-8; {EXAMPLE}") from None
        except duckdb.Error as error:
            raise _wrong(where, error) from error
        if len(statements) != 1:
            raise UserError(f"{where!r} is more than one expression; join expressions by `and` or `or`")

    def _rows(self, query: Query, sql: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        try:
            return self._connection.cursor().execute(sql, parameters).fetchall()
        except duckdb.Error as error:
            raise _wrong(query.where, error) from error


@contextmanager
def sample_table(dataset: Dataset) -> Iterator[SampleTable]:
    """The published samples of a dataset with the choices that count now, usable within the block.

    Raises UserError if nothing is published, and ShardError if the manifest or a file of choices cannot be read.
    """
    if not dataset.folder.exists(layout.MANIFEST):
        raise UserError(f"{dataset.url}: nothing is published yet; run: resmaster publish {quoted(dataset.url)}")
    choices = read_choices(dataset.folder)
    with scratch_folder() as scratch:
        manifest, _ = dataset.folder.download(layout.MANIFEST, scratch)
        connection = duckdb.connect(scratch / "samples.duckdb", config={"memory_limit": MEMORY, "threads": 2})
        try:
            decode_table(manifest, manifest_schema(), layout.MANIFEST, ["key"])  # says so if the file is damaged
            _fill(connection, manifest, choices)
            yield SampleTable(connection)
        finally:
            connection.close()


def _fill(connection: duckdb.DuckDBPyConnection, manifest: Path, choices: Mapping[str, Choice]) -> None:
    """Make the tables `manifest` and `choices` and the view `samples` of both, and lock the database's settings."""
    connection.register("empty", table_of([], manifest_schema()))
    connection.execute("create table manifest as from empty")
    there = pq.read_schema(manifest).names
    known = ", ".join(_name(name) for name in manifest_schema().names if name in there)
    connection.execute(f"insert into manifest by name select {known} from read_parquet(?)", [str(manifest)])
    connection.register("given", table_of([asdict(choice) for choice in choices.values()], CURATION_SCHEMA))
    connection.execute("create table choices as from given")
    connection.execute("create unique index by_key on choices (key)")
    connection.unregister("empty")
    connection.unregister("given")
    connection.execute(
        f"create view samples as select {', '.join(_columns())} from manifest m left join choices c on {_SAME}"
    )
    for setting in ("enable_external_access = false", "lock_configuration = true"):
        connection.execute(f"set {setting}")


_SAME = "m.key = c.key and coalesce(m.take, 0) = c.take"
"""A choice is about one take of a sample."""


def _columns() -> Iterator[str]:
    """The columns of the view: the manifest's, the choices', one for each flag, and badness."""
    own = [name for name in manifest_schema().names if name not in CHOSEN]
    yield from (f"m.{_name(name)}" for name in own)
    yield from (f"c.{_name(name)}" for name in CHOSEN)
    yield from (f"coalesce(c.verdict = '{verdict}', false) as {verdict}" for verdict in ("kept", "rejected"))
    for flag in known_flags():
        if flag not in own:
            yield f"list_contains(m.flags, {_text(flag)}) as {_name(flag)}"
    yield f"{_badness()} as bad"


def _badness() -> str:
    """`metrics.flags.badness` of a row of the manifest, in SQL."""
    parts = [f"len(m.flags) * {Flag.badness}"]
    for flag in known_flags().values():
        if flag.badness != Flag.badness:
            parts.append(f"list_contains(m.flags, {_text(flag.name)})::int * {flag.badness - Flag.badness}")
    for column in metric_columns():
        if column.badness:
            (good, bad), name = column.badness, f"m.{_name(column.name)}"
            share = f"least(1.0, greatest(0.0, ({name} - {good}) / {bad - good}))"
            parts.append(
                f"case when {name} is null then {UNKNOWN_BADNESS} when isfinite({name}) then {share} else 1 end"
            )
    return " + ".join(parts)


def _name(name: str) -> str:
    """A name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def _text(text: str) -> str:
    """A text in SQL."""
    return "'" + text.replace("'", "''") + "'"


def _wrong(where: str, error: duckdb.Error) -> UserError:
    """What is wrong with an expression, in one line."""
    reason = " ".join(line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("LINE"))
    reason = re.sub(r"^(Parser|Binder|Catalog|Conversion|Permission|Invalid Input) Error: ", "", reason)
    return UserError(f"{where!r} cannot be asked ({shortened(reason, REASON_CHARACTERS)}); {EXAMPLE}")
