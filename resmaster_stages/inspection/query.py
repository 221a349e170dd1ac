"""Asks the published samples of a dataset, with the choices about them: filters, sorts, counts, histograms.

The manifest and the choices are tables of a DuckDB database on this machine's disk, so memory does not grow with the
dataset. Users filter by expressions of SQL, such as `agreement_psnr > 22 and not near_duplicate`. Their names are the
columns of the manifest, every flag that is no column's name, `kept`, `rejected`, `rating`, `reason` and `bad` (the
number that sorts the worst samples first).

Invariants:
- Expressions only read. They reach neither files nor the network, and the database is a copy.
- Expressions call only `FUNCTIONS`, none of which makes values grow. What DuckDB gathers of rows stays within `MEMORY`
  and `SPILL`, and a table may be given a time that no question exceeds.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.curation import Choice, read_choices
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.schemas import CURATION_SCHEMA, manifest_schema
from resmaster_stages.errors import ShardError, UserError, did_you_mean, first_line
from resmaster_stages.metrics import metric_columns
from resmaster_stages.metrics.flags import UNKNOWN_BADNESS, known_flags
from resmaster_stages.metrics.metric import Flag
from resmaster_stages.redaction import quoted, shortened
from resmaster_stages.storage.scratch import scratch_folder
from resmaster_stages.storage.tables import decode_table, table_of

MEMORY = "256MB"
"""What DuckDB may hold in memory. What is beyond that lies on the disk."""
SPILL = "4GB"
"""What DuckDB may write to the disk for one question, beside the tables."""
EXAMPLE = "write, for example: agreement_psnr > 22 and not near_duplicate"
REASON_CHARACTERS = 300
"""Longer reasons of DuckDB are cut: it lists all names that it knows."""
CHOSEN = ("verdict", "rating", "reason", "who", "when")
"""Columns of the choices that count now. The manifest's own are those of the time when it was published."""
FUNCTIONS = frozenset(
    (
        *(
            "~~",
            "!~~",
            "~~*",
            "!~~*",
            "~~~",
            "^@",
            "like_escape",
            "ilike_escape",
            "not_like_escape",
            "not_ilike_escape",
        ),
        *("contains", "starts_with", "prefix", "ends_with", "suffix", "regexp_matches", "regexp_full_match"),
        *("position", "instr", "strpos", "lower", "upper", "length", "len", "strlen", "trim", "ltrim", "rtrim"),
        *("left", "right", "substring", "substr", "levenshtein", "hash", "ifnull", "nullif", "xor"),
        *(
            "+",
            "-",
            "*",
            "/",
            "//",
            "%",
            "**",
            "^",
            "abs",
            "sign",
            "round",
            "floor",
            "ceil",
            "ceiling",
            "trunc",
            "sqrt",
            "ln",
            "log",
        ),
        *("log2", "log10", "exp", "pow", "power", "least", "greatest", "isnan", "isfinite", "isinf"),
        *("list_contains", "list_has", "list_has_any", "list_has_all", "list_position"),
        *("array_contains", "array_has", "count", "count_star", "sum", "avg", "mean", "min", "max", "median"),
        *("mode", "quantile", "quantile_cont", "quantile_disc", "stddev", "stddev_pop", "stddev_samp"),
        *("variance", "var_pop", "var_samp", "bool_and", "bool_or", "any_value"),
        *("row_number", "rank", "dense_rank", "percent_rank", "cume_dist", "ntile"),
    )
)
"""What expressions may call, with operators under DuckDB's names (`~~` is `like`). Others make texts and lists of any
length, which DuckDB holds beyond `MEMORY` and builds without ever looking whether it is to stop."""


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

    def page(self, offset: int, limit: int) -> Query:
        """This query for a page of what it finds."""
        return replace(self, offset=offset, limit=limit)


KEPT_ONLY = Query().also("not rejected")
"""All samples that nobody rejected."""


class SampleTable:
    """The published samples of a dataset. Threads may share it. Made by `sample_table`."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, seconds: float | None = None) -> None:
        self._connection, self._lock, self._seconds = connection, threading.Lock(), seconds
        described = self._connection.execute("describe samples").fetchall()
        self.columns: dict[str, str] = {name: kind for name, kind, *_ in described if name != _PLACE}
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
        if query.limit is None:
            sql = f"select {shown} from samples {clause} order by {order} offset {int(query.offset)}"
            return [dict(zip(names, row)) for row in self._rows(query, sql, parameters)]
        page = f"limit {int(query.limit)} offset {int(query.offset)}"
        sql = f"select {_PLACE} from samples {clause} order by {order} {page}"  # whole rows would be sorted slowly
        places = [int(place) for (place,) in self._rows(query, sql, parameters)]
        if not places:
            return []
        sql = f"select {_PLACE}, {shown} from samples where {_PLACE} in ({', '.join(map(str, places))})"
        found = {place: dict(zip(names, row)) for place, *row in self._rows(Query(), sql, ())}
        return [found[place] for place in places]

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

    def limits(self, columns: Sequence[str]) -> dict[str, tuple[float, float] | None]:
        """Column -> its least and its greatest finite value; None if it has no value."""
        names = [_name(self.require(column)) for column in columns]
        ends = (f"{end}({name}) filter (isfinite({name}))" for name in names for end in ("min", "max"))
        found = self._rows(Query(), f"select {', '.join(ends)} from samples", ())[0]
        pairs = zip(found[::2], found[1::2])
        return {
            column: None if low is None else (float(low), float(high)) for column, (low, high) in zip(columns, pairs)
        }

    def distinct(self, column: str) -> list[str]:
        """The values of a column, each once, in the order of the samples."""
        name = _name(self.require(column))
        sql = f"select {name} from samples where {name} is not null group by {name} order by min(index)"
        return [value for (value,) in self._rows(Query(), sql, ())]

    def flag_counts(self) -> dict[str, int]:
        """Flag -> number of samples that have it; only flags that a sample has."""
        sql = "select flag, count(*) from (select unnest(flags) as flag from samples) group by flag order by flag"
        return dict(self._rows(Query(), sql, ()))

    def choice_counts(self) -> dict[str, int]:
        """How many samples are kept, rejected and rated."""
        sql = "select count(*) filter (kept), count(*) filter (rejected), count(rating) from samples"
        return dict(zip(("kept", "rejected", "rated"), self._rows(Query(), sql, ())[0]))

    def near_duplicates(self, limit: int, offset: int = 0) -> list[tuple[str, list[str]]]:
        """(key of the first, keys of all in order) of groups of near-duplicates, the largest group first."""
        if DUPLICATE_OF not in self.columns:
            return []
        sql = (
            f"select {DUPLICATE_OF} as first, list(key order by index) from samples where {DUPLICATE_OF} is not null "
            f"group by first order by count(*) desc, min(index) limit {int(limit)} offset {int(offset)}"
        )
        return [
            (first, [first, *(key for key in keys if key != first)]) for first, keys in self._rows(Query(), sql, ())
        ]

    def near_duplicate_groups(self) -> int:
        """How many groups of near-duplicates there are."""
        if DUPLICATE_OF not in self.columns:
            return 0
        return int(self._rows(Query(), f"select count(distinct {DUPLICATE_OF}) from samples", ())[0][0])

    def arrow(self, columns: Sequence[str]) -> pa.Table:
        """Columns of all samples."""
        shown = ", ".join(_name(self.require(name)) for name in columns)
        return self._connection.cursor().sql(f"select {shown} from samples").to_arrow_table()

    def choose(self, choices: Iterable[Choice], only: bool = False) -> None:
        """Let choices count from now on, beside the others or instead of them (`only`). The dataset stays as it is."""
        marks = ", ".join("?" * len(CURATION_SCHEMA))
        rows = [[asdict(choice)[name] for name in CURATION_SCHEMA.names] for choice in choices]
        with self._lock, self._writing() as cursor:
            if only:
                cursor.execute("delete from choices")
            if rows:
                cursor.executemany(f"insert or replace into choices values ({marks})", rows)

    def add_texts(self, texts: Mapping[str, str]) -> None:
        """Let `mentions` find more texts: key -> lower-case text about the sample."""
        given = pa.table({"key": list(texts), "text": list(texts.values())}, pa.schema(_TEXTS))
        with self._lock, self._writing() as cursor:
            cursor.register("given", given)
            cursor.execute("insert into texts from given")
            cursor.unregister("given")

    @contextmanager
    def _writing(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor whose changes count together, or not at all."""
        cursor = self._connection.cursor()
        cursor.execute("begin")
        try:
            yield cursor
            cursor.execute("commit")
        finally:
            cursor.close()

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
        """Raise UserError unless `where` is one expression that calls nothing but `FUNCTIONS`."""
        sql = f"select 1 from samples where ({where}\n)"
        try:
            statements = self._connection.extract_statements(sql)
        except duckdb.Error as error:
            raise _wrong(where, error) from error
        trees = [self._tree(sql)] if len(statements) == 1 else []
        if not trees or trees[0] is None or {**trees[0], _CLAUSE: None} != {**self._plainest, _CLAUSE: None}:
            raise UserError(f"{where!r} is more than one expression; join expressions by `and` or `or`")
        for name in _called(trees[0][_CLAUSE]):
            if name not in FUNCTIONS:
                meant = did_you_mean(name, FUNCTIONS)
                raise UserError(f"{where!r} cannot be asked (there is no function {name}{meant}); {EXAMPLE}")

    def _tree(self, sql: str) -> dict[str, Any] | None:
        """DuckDB's tree of a `select`; None for anything else."""
        text = self._connection.cursor().execute("select json_serialize_sql(?)", [sql]).fetchall()[0][0]
        found = json.loads(text)
        return None if found["error"] else found["statements"][0]["node"]

    @cached_property
    def _plainest(self) -> dict[str, Any]:
        """The tree of an expression that is nothing but one."""
        tree = self._tree("select 1 from samples where (true\n)")
        assert tree is not None
        return tree

    def _rows(self, query: Query, sql: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor, _stopped_after(self._seconds, cursor):
            try:
                return cursor.execute(sql, parameters).fetchall()
            except duckdb.InterruptException as error:
                asked = f"{query.where!r}" if query.where else "this"
                raise UserError(f"{asked} takes longer than {self._seconds:g} s; ask for less") from error
            except duckdb.Error as error:
                raise _wrong(query.where, error) from error


@contextmanager
def _stopped_after(seconds: float | None, cursor: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Interrupt what a cursor does if it takes longer."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, cursor.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def mentions(word: str) -> tuple[str, tuple[str, ...]]:
    """The condition that a sample's prompt or texts hold `word`, or that its key begins with it, in any case."""
    sql = (
        "(contains(lower(prompt), ?) or starts_with(key, ?) or "
        "key in (select t.key from texts t where contains(t.text, ?)))"
    )
    return sql, (word.lower(),) * 3


@contextmanager
def sample_table(dataset: Dataset, seconds: float | None = None) -> Iterator[SampleTable]:
    """The published samples of a dataset with the choices that count now, usable within the block.

    seconds: how long one question may take. Raises UserError if nothing is published, and ShardError if the manifest or
    a file of choices cannot be read.
    """
    if not dataset.folder.exists(layout.MANIFEST):
        raise UserError(f"{dataset.url}: nothing is published yet; run: resmaster publish {quoted(dataset.url)}")
    choices = read_choices(dataset.folder)
    with scratch_folder() as scratch:
        manifest, _ = dataset.folder.download(layout.MANIFEST, scratch)
        settings = {"memory_limit": MEMORY, "max_temp_directory_size": SPILL, "threads": 2}
        connection = duckdb.connect(scratch / "samples.duckdb", config=settings)
        try:
            decode_table(manifest, manifest_schema(), layout.MANIFEST, ["key"])  # says so if the file is damaged
            _fill(connection, manifest, choices)
            yield SampleTable(connection, seconds)
        finally:
            connection.close()


def _fill(connection: duckdb.DuckDBPyConnection, manifest: Path, choices: Mapping[str, Choice]) -> None:
    """Make the tables `manifest`, `choices` and `texts` and the view `samples`, and lock the database's settings."""
    connection.register("given", table_of([], manifest_schema()))
    there = frozenset(pq.read_schema(manifest).names)
    columns = ", ".join(
        f"cast({_name(name) if name in there else 'null'} as {kind}) as {_name(name)}"
        for name, kind, *_ in connection.execute("describe from given").fetchall()
    )
    connection.unregister("given")
    rows = f"(select {columns} from read_parquet(?))"
    try:
        connection.execute(f"create table manifest as select m.*, {_badness()} as bad from {rows} m", [str(manifest)])
    except duckdb.Error as error:
        raise ShardError(f"{layout.MANIFEST}: cannot be read ({first_line(error)})") from error
    connection.register("given", table_of([asdict(choice) for choice in choices.values()], CURATION_SCHEMA))
    connection.execute("create table choices as from given")
    connection.execute("create unique index by_key on choices (key)")
    connection.unregister("given")
    connection.execute("create table texts (key varchar, text varchar)")
    connection.execute(
        f"create view samples as select {', '.join(_columns())} from manifest m left join choices c on {_SAME}"
    )
    for setting in ("enable_external_access = false", "lock_configuration = true"):
        connection.execute(f"set {setting}")


_SAME = "m.key = c.key"
_PLACE = "_place"
"""Column of the view that is no name for users: where the row lies in the table, which finds it at once."""
_CLAUSE = "where_clause"
_TEXTS = [("key", pa.string()), ("text", pa.string())]
DUPLICATE_OF = "near_duplicate_of"
"""Column of the manifest, if it has one: key of the first sample of the group of near-duplicates."""


def _called(tree: Any) -> Iterator[str]:
    """The functions that a part of DuckDB's tree calls."""
    if isinstance(tree, Mapping):
        if name := tree.get("function_name"):
            yield name.lower()
        for part in tree.values():
            yield from _called(part)
    elif isinstance(tree, list):
        for part in tree:
            yield from _called(part)


def _columns() -> Iterator[str]:
    """The columns of the view: the manifest's, the choices', one for each flag, and badness."""
    own = [name for name in manifest_schema().names if name not in CHOSEN]
    yield from (f"m.{_name(name)}" for name in own)
    yield from (f"c.{_name(name)}" for name in CHOSEN)
    yield from (f"coalesce(c.verdict = '{verdict}', false) as {verdict}" for verdict in ("kept", "rejected"))
    for flag in known_flags():
        if flag not in own:
            yield f"list_contains(m.flags, {_text(flag)}) as {_name(flag)}"
    yield f"m.bad, m.rowid as {_PLACE}"


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
