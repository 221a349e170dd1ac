"""Answers questions about samples with plain JSON values: the dataset, pages of samples, one sample, histograms."""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from starlette.datastructures import QueryParams

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import ShardError, UserError
from resmaster_stages.gallery.caches import Kept
from resmaster_stages.gallery.errors import NotThere, told
from resmaster_stages.gallery.filters import limit_of, number_of, numeric_columns, offset_of, query_of
from resmaster_stages.gallery.images import PLACE_COLUMNS, Place, places, version
from resmaster_stages.inspection.explain import explain_command
from resmaster_stages.inspection.query import DUPLICATE_OF, Query, SampleTable
from resmaster_stages.metrics import metric_columns
from resmaster_stages.metrics.flags import known_flags
from resmaster_stages.publish.report import SIZE_COLUMNS, facts
from resmaster_stages.redaction import quoted, shortened
from resmaster_stages.storage.shards import Member, following

PLACES = 20_000
"""Samples whose images' places are kept in memory."""
HISTOGRAMS = 200
KEY_CHARACTERS = 80
META_BYTES = 8 << 10
"""So much is read behind an image for its JSON. A longer JSON takes a second read."""
LONGEST_META_BYTES = 4 << 20
PLAIN = ("key", "index", "shard", "replica", "prompt", "negative_prompt", "source", "width", "height", "flags", "bad")


class Samples:
    """The published samples of a dataset."""

    def __init__(self, dataset: Dataset, table: SampleTable) -> None:
        self._dataset, self._table = dataset, table
        self._places: Kept[dict[str, Place]] = Kept(PLACES)
        self._histograms: Kept[tuple[list[float], list[int]]] = Kept(HISTOGRAMS)
        extra = [DUPLICATE_OF] if DUPLICATE_OF in table.columns else []
        columns = [*PLAIN, "verdict", "rating", "reason", *PLACE_COLUMNS, *numeric_columns(), *extra]
        self._columns = list(dict.fromkeys(columns))

    @cached_property
    def about(self) -> dict[str, Any]:
        """What stays the same about the dataset while it is looked at."""
        config, table = self._dataset.config, self._table
        counts, limits = table.flag_counts(), table.limits(numeric_columns())
        return {
            "name": config.name,
            "url": self._dataset.url,
            "samples": table.count(),
            "columns": [
                {
                    "name": column.name,
                    "label": column.label,
                    "heading": column.heading,
                    "meaning": column.meaning,
                    "form": column.form,
                    "better": column.better,
                    **dict(zip(("min", "max"), limits[column.name] or (None, None))),
                }
                for column in metric_columns(config.quality)
                if column.label and column.kind == "float64"
            ],
            "flags": [
                {"name": flag.name, "meaning": flag.meaning, "count": counts.get(flag.name, 0)}
                for flag in known_flags(config.quality).values()
            ],
            "thresholds": [
                {
                    "field": limit,
                    "column": column.name,
                    "side": side,
                    "value": getattr(config.quality, limit),
                    "flag": column.flag.name,
                }
                for column in metric_columns(config.quality)
                if column.flag
                for side, limit in (("below", column.flag.below), ("above", column.flag.above))
                if isinstance(limit, str)
            ],
            "near_duplicate_groups": table.near_duplicate_groups(),
            "facts": {label: str(value) for label, value in facts(config, table.arrow(SIZE_COLUMNS)).items()},
        }

    def page(self, asked: QueryParams) -> dict[str, Any]:
        """A page of the samples that an address asks for."""
        query, offset = query_of(asked, self._table), offset_of(asked)
        rows = self._table.rows(query.page(offset, limit_of(asked)), self._columns)
        return {"total": self._table.count(query), "offset": offset, "samples": [self._told(row) for row in rows]}

    def count(self, asked: QueryParams) -> dict[str, Any]:
        """How many samples an address asks for."""
        return {"total": self._table.count(query_of(asked, self._table))}

    def histogram(self, asked: QueryParams) -> dict[str, Any]:
        """How the values of a column are spread over the samples that an address asks for, and over all."""
        column, bins = asked.get("column", ""), number_of(asked, "bins", 40, range(1, 201))
        if column not in numeric_columns():
            raise UserError(f"column={column[:80]!r} is none of {', '.join(numeric_columns())}")
        edges, everyone = self._histograms.get((column, bins), lambda: self._of_all(column, bins))
        query = query_of(asked, self._table)
        counts = self._table.histogram(column, edges, query) if edges else []
        missing = self._table.count(query) - sum(counts)
        return {"edges": edges, "counts": counts, "all": everyone, "missing": missing}

    def _of_all(self, column: str, bins: int) -> tuple[list[float], list[int]]:
        """(edges, counts) of a column in all samples; empty if no sample has a value."""
        limits = self._table.limits([column])[column]
        if limits is None:
            return [], []
        low, high = limits
        high = high if high > low else low + (abs(low) or 1.0)
        edges = [low + (high - low) * number / bins for number in range(bins)] + [high]
        return edges, self._table.histogram(column, edges)

    def one(self, key: str) -> dict[str, Any]:
        """All that the manifest says of one sample, its JSON in the tars, and commands. Raises NotThere."""
        row = self._row(key)
        first = row.get(DUPLICATE_OF) or key
        found = places(row)
        own = self._table.keys(Query().also(f"{DUPLICATE_OF} = ?", first)) if DUPLICATE_OF in row else []
        url = self._dataset.url
        return {
            **self._told(row),
            "captions_object": self._table.rows(Query(limit=1).also("key = ?", key), ("captions_object",))[0][
                "captions_object"
            ],
            "facts": self._meta(found["high"]),
            "low_facts": self._meta(found["low"]),
            "commands": {
                "explain": explain_command(url, key),
                "redo": f"resmaster repair {quoted(url)} --redo {quoted(key)}",
            },
            "group": [first, *(each for each in own if each != first)] if own else [],
        }

    def images_of(self, key: str) -> tuple[dict[str, Place], str]:
        """The places of a sample's images by kind, and their version. Raises NotThere for a key without a sample."""
        found = self._places.get(key, lambda: places(self._row(key)))
        return found, version(found)

    def _row(self, key: str) -> dict[str, Any]:
        rows = self._table.rows(Query(limit=1).also("key = ?", key), self._columns)
        if not rows:
            raise NotThere(f"no published sample has the key {shortened(key, KEY_CHARACTERS)!r}; reload the page")
        return rows[0]

    def _told(self, row: Mapping[str, Any]) -> dict[str, Any]:
        found = places(row)
        self._places.put(row["key"], found)
        return {
            **{name: row[name] for name in PLAIN},
            "low_width": row["low_res_width"],
            "low_height": row["low_res_height"],
            "verdict": row["verdict"] or "none",
            "rating": row["rating"],
            "reason": row["reason"] or "",
            DUPLICATE_OF: row.get(DUPLICATE_OF),
            "quality": {name: _finite(row[name]) for name in numeric_columns()},
            "v": version(found),
        }

    def _meta(self, place: Place) -> dict[str, Any]:
        """The JSON of a sample, which follows the image in the tar."""
        folder = self._dataset.folder
        with told(self._dataset, place.object):
            image = Member(place.member, place.offset, place.bytes)
            header_at = image.offset + -(-image.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            start = folder.read_part(place.object, header_at, META_BYTES)
            member = following(start, header_at, f"{place.member.partition('.')[0]}.json", place.object)
            if member.size > LONGEST_META_BYTES:
                raise ShardError(f"{place.object}: {member.name} is too long")
            data = start[tarfile.BLOCKSIZE :][: member.size]
            if len(data) < member.size:
                data = folder.read_part(place.object, member.offset, member.size)
            try:
                meta = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise ShardError(f"{place.object}: {member.name} is not JSON") from error
        return meta if isinstance(meta, dict) else {"value": meta}


def finite(values: Any) -> Any:
    """JSON values without numbers that JSON does not have."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return _finite(values)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
