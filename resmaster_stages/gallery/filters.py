"""Reads filters and order from the address of a request. docs/curating.md lists what an address may ask for."""

from __future__ import annotations

from collections.abc import Iterator

from starlette.datastructures import QueryParams

from resmaster_stages.errors import UserError, did_you_mean
from resmaster_stages.inspection.query import DUPLICATE_OF, Query, SampleTable, mentions
from resmaster_stages.metrics import metric_columns
from resmaster_stages.metrics.flags import known_flags

PAGE, LONGEST_PAGE = 100, 200
"""Samples of a page if the address does not say, and at most."""
WORDS = 20
"""More words of a search are ignored by nobody: they are refused."""

Condition = tuple[str, tuple[object, ...]]
VERDICTS = {"kept": "kept", "rejected": "rejected", "none": "not kept and not rejected"}
ANY, NONE = "*", "-"


def query_of(asked: QueryParams, table: SampleTable) -> Query:
    """The query that an address asks for, without offset and limit. Raises UserError."""
    sort = asked.get("sort", "index")
    column = table.require(sort.removeprefix("-"))
    query = Query(where=asked.get("where", ""), sort=column, descending=sort.startswith("-"))
    for condition, parameters in _conditions(asked, table):
        query = query.also(condition, *parameters)
    return query


def number_of(asked: QueryParams, name: str, default: int, limits: range) -> int:
    """A whole number of an address. Raises UserError."""
    text = asked.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 16 and int(text) in limits):
        raise UserError(f"{name}={text[:40]!r} is no number from {limits[0]} to {limits[-1]}")
    return int(text)


def offset_of(asked: QueryParams) -> int:
    """How many samples are left out before the page."""
    return number_of(asked, "offset", 0, range(10**12))


def limit_of(asked: QueryParams) -> int:
    """How many samples a page has."""
    return number_of(asked, "limit", PAGE, range(1, LONGEST_PAGE + 1))


def _conditions(asked: QueryParams, table: SampleTable) -> Iterator[Condition]:
    words = asked.get("q", "").split()
    if len(words) > WORDS:
        raise UserError(f"{len(words)} words to search for; give at most {WORDS}")
    yield from map(mentions, words)
    yield from map(_flagged, asked.getlist("flag"))
    if verdict := asked.get("verdict"):
        if verdict not in VERDICTS:
            raise UserError(f"verdict={verdict[:40]!r} is none of {', '.join(VERDICTS)}")
        yield VERDICTS[verdict], ()
    if asked.get("rating"):
        yield "rating >= ?", (number_of(asked, "rating", 1, range(1, 6)),)
    for text in asked.getlist("range"):
        yield from _within(text, table)
    if first := asked.get("group"):
        same = f" or {DUPLICATE_OF} = ?" if DUPLICATE_OF in table.columns else ""
        yield f"key = ?{same}", (first,) * (2 if same else 1)


def _flagged(flag: str) -> Condition:
    if flag in (ANY, NONE):
        return f"len(flags) {'>' if flag == ANY else '='} 0", ()
    if flag not in known_flags():
        raise UserError(f"there is no flag {flag[:80]!r}{did_you_mean(flag, known_flags())}")
    return "list_contains(flags, ?)", (flag,)


def _within(text: str, table: SampleTable) -> Iterator[Condition]:
    """The conditions of `column:low:high`, in which either end may be empty."""
    parts = text.split(":")
    if len(parts) != 3 or parts[0] not in numeric_columns():
        raise UserError(f"range={text[:80]!r} is not COLUMN:LOW:HIGH with one of {', '.join(numeric_columns())}")
    for end, sign in zip(parts[1:], (">=", "<=")):
        if end:
            try:
                yield f'"{table.require(parts[0])}" {sign} ?', (float(end),)
            except ValueError:
                raise UserError(f"range={text[:80]!r}: {end[:40]!r} is no number") from None


def numeric_columns() -> list[str]:
    """The metrics' columns that hold numbers."""
    return [column.name for column in metric_columns() if column.kind == "float64"]
