"""Exports the samples of a published dataset to a folder, in one of the formats of `FORMATS`.

Samples are read shard by shard, from tars that are checked against their commit records. One tar is on the disk at a
time, and one sample in memory, or one chunk of a packed format. A run that is broken off goes on after its last whole
shard. A later run of the same export writes the shards that have changed since, and removes what is not chosen now.

Invariants:
- Images without a size are the dataset's own bytes, unless they are signed.
- File names come from keys, never from prompts.
- The order is that of the dataset.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.chain import Chain
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.commits import Commits
from resmaster_stages.dataset.curation import digest_of_choices, read_choices
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.publication import read_publication
from resmaster_stages.dataset.reading import ShardSamples, chosen_samples
from resmaster_stages.dataset.sample import DESCRIBED, EncodedImage, Sample
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import UserError
from resmaster_stages.inspection.query import KEPT_ONLY, Query, SampleTable, sample_table
from resmaster_stages.metrics import metric_columns
from resmaster_stages.publish.exports import format_of
from resmaster_stages.publish.exports.format import Format, Item, Part, Place, Row, value_of
from resmaster_stages.publish.exports.record import (
    EXPORT,
    ExportRecord,
    Options,
    ShardRecord,
    claim,
    content_of,
    finished_shards,
    read_export,
    read_shard,
    read_shards,
    shard_name,
    write_export,
    write_shard,
)
from resmaster_stages.publish.exports.signing import Signer
from resmaster_stages.publish.exports.sizes import copied, fitted
from resmaster_stages.redaction import quoted
from resmaster_stages.storage.filesystem import Folder, open_root
from resmaster_stages.storage.scratch import scratch_folder

PAGE_ROWS = 5_000
"""Rows of the manifest that are held at a time."""
HELD_BYTES = 16 << 20
"""Files are held until they are so large together: every time that files are written, a record is written before."""
PLAIN = ("key", "take", "prompt", "negative_prompt", "width", "height", "flags", "verdict", "rating")
"""Columns that are exported beside the metrics."""
OBJECTS = ("high_res_object", "low_res_object", "captions_object")
"""Columns that say what the samples' files are made from."""

Progress = Callable[[int, int], None]
"""Called with (samples done, samples in all)."""


@dataclass(frozen=True)
class Exported:
    """What a run did."""

    samples: int
    """Samples that the export holds."""
    written: int
    """Samples that this run wrote. The others were there already."""
    removed: int
    """Files of earlier runs that this run removed."""
    notes: tuple[str, ...] = ()


def export(
    dataset: Dataset,
    url: str,
    options: Options,
    progress: Progress = lambda done, total: None,
    signer: Signer | None = None,
) -> Exported:
    """Export the chosen samples to the folder `url`, or complete an earlier run. If nothing is chosen, writes nothing.

    signer: signs the images. Its fingerprint is part of `options`.
    Raises UserError for a folder that cannot be used, for a wrong expression, and if nothing is published; ShardError
    if an object of the dataset is gone or damaged.
    """
    if options.signer != (signer.fingerprint if signer else ""):
        raise ValueError("options.signer must be the fingerprint of the signer")
    target = _target(dataset, url)
    with sample_table(dataset) as table:
        query = replace(Query() if options.with_rejected else KEPT_ONLY, where=options.where)
        total = table.count(query)
        total = total if options.limit is None else min(total, options.limit)
        if not total:
            return Exported(0, 0, 0)
        claim(target, dataset, options)
        run = _Run(dataset, target, options, signer)
        for shard, rows in _rows_by_shard(table, query, total):
            run.shard(shard, rows)
            progress(run.samples, total)
    return run.finish()


def _target(dataset: Dataset, url: str) -> Folder:
    """The folder of an export. Raises UserError if it lies in the dataset, or has no name that can be written down."""
    target = open_root(url)
    if target.local:
        target = Folder(target.fs, os.path.realpath(target.path))
    places = [f"{os.path.realpath(each.path) if each.local else each.path}/" for each in (target, dataset.folder)]
    if target.local == dataset.folder.local and places[0].startswith(places[1]):
        raise UserError(f"{target.url}: lies in the dataset; choose a folder outside of {dataset.url}")
    try:
        target.url.encode()
    except UnicodeEncodeError:
        raise UserError(f"{target.url!r}: the name of the folder is no UTF-8; choose another one") from None
    return target


def _rows_by_shard(table: SampleTable, query: Query, total: int) -> Iterator[tuple[int, list[Row]]]:
    """(shard, its chosen rows) in the order of the dataset. total: so many rows in all."""
    offsets = range(0, total, PAGE_ROWS)
    columns = ["shard", *_columns(), *(f"{name.removesuffix('_object')}_hash" for name in OBJECTS)]
    pages = (table.rows(replace(query, offset=at, limit=min(PAGE_ROWS, total - at)), columns) for at in offsets)
    rows = itertools.chain.from_iterable(pages)
    for shard, group in itertools.groupby(rows, key=lambda row: row["shard"]):
        yield int(shard), list(group)


class _Run:
    """One run of an export."""

    def __init__(self, dataset: Dataset, target: Folder, options: Options, signer: Signer | None) -> None:
        self._dataset, self._target, self._options, self._signer = dataset, target, options, signer
        self._format: Format = format_of(options.format)
        self._sizes: Sequence[int | None] = options.sizes or (None,)
        self._done: list[int] = []
        self.samples = self._written = self._removed = 0
        self._changed = read_export(target) is None

    def shard(self, shard: int, rows: Sequence[Row]) -> None:
        """Export the chosen samples of one shard, unless that is done."""
        content = content_of([{name: row[name] for name in _columns()} for row in rows])
        before = read_shard(self._target, shard)
        if before is None or before.content != content:
            self._change()
            self._write(shard, rows, content, before)
            self._written += len(rows)
        self._done.append(shard)
        self.samples += len(rows)

    def _change(self) -> None:
        """From here on the export is not whole."""
        if not self._changed:
            self._target.remove(EXPORT)
            self._changed = True

    def _write(self, shard: int, rows: Sequence[Row], content: str, before: ShardRecord | None) -> None:
        known = {*(before.files if before else ())}
        files: list[str] = []
        given: list[tuple[Row, ...]] = []

        def at_work() -> None:
            write_shard(self._target, shard, ShardRecord("", 0, (), tuple(sorted(known)), ()))

        def flush(place: Place) -> None:
            files.extend(place.held)
            if not known.issuperset(place.held):  # a file that no record names would never be removed
                known.update(place.held)
                at_work()
            place.flush()

        if before and before.content:  # its files are not its own any more
            at_work()

        chosen = {row["key"]: row for row in rows}
        with _samples(self._dataset, shard, self._reads(), rows) as samples:
            for size in self._sizes:
                place = Place(self._target, shard, self._prefix(size))
                found = []
                for row in self._format.write(self._items(samples, chosen, size), place):
                    found.append(row)
                    if sum(map(len, place.held.values())) >= HELD_BYTES:
                        flush(place)
                flush(place)
                given.append(tuple(found))
        self._remove(known - {*files})
        write_shard(self._target, shard, ShardRecord(content, len(rows), self._whole(rows), tuple(files), tuple(given)))

    def _reads(self) -> set[str]:
        """The stages whose outputs are read."""
        own = self._signer is not None and self._dataset.config.images is not None  # it becomes part of the credentials
        return {"high_res", *self._format.reads, *(("low_res",) if own else ())}

    def _items(self, samples: ShardSamples, rows: Mapping[str, Row], size: int | None) -> Iterator[Item]:
        """The chosen samples of a shard in one size. rows: key -> row."""
        for position, key in enumerate(samples.keys()):
            if key in rows:
                item = _item(samples[position], rows[key], size)
                if self._signer:
                    config = self._dataset.config
                    signed = self._signer.signed(item.image, item.extension, samples[position], config)
                    item = replace(item, image=signed)
                yield item

    def _whole(self, rows: Sequence[Row]) -> tuple[int, ...]:
        """For each size, the samples that are smaller."""
        return tuple(sum(row["height"] * row["width"] < size**2 for row in rows) if size else 0 for size in self._sizes)

    def _remove(self, names: Collection[str]) -> None:
        """Remove files of an earlier run."""
        for name in sorted(names):
            self._target.remove(name)
            self._removed += 1

    def _prefix(self, size: int | None) -> str:
        return f"{size or 'full'}/" if self._options.sizes else ""

    def finish(self) -> Exported:
        """Remove what is not chosen any more, write what describes the whole, and then the record."""
        for shard in sorted({*finished_shards(self._target)} - {*self._done}):
            self._change()
            record = read_shard(self._target, shard)
            self._remove(record.files if record else ())
            self._target.remove(shard_name(shard))
        finished = read_export(self._target)
        if self._changed or finished is None:
            self._tidy()
            finished = self._describe()
            write_export(self._target, finished)
        return Exported(self.samples, self._written, self._removed, finished.notes)

    def _tidy(self) -> None:
        """Remove what a killed run left of files that it was writing. Stores keep no such part."""
        if self._target.local:
            for file in [each.name for each in self._target.files() if layout.is_temporary(each.name)]:
                self._target.remove(file)

    def _describe(self) -> ExportRecord:
        parts = [
            Part(size, Place(self._target, prefix=self._prefix(size)), self._rows(number))
            for number, size in enumerate(self._sizes)
        ]
        whole = Place(self._target)
        with scratch_folder() as scratch:
            notes = self._format.finish(parts, whole, scratch)
        for place in (*(part.place for part in parts), whole):
            place.flush()
        publication = read_publication(self._dataset.folder)
        return ExportRecord(
            name=self._dataset.config.name,
            options=self._options,
            samples=self.samples,
            publication=publication.commits if publication else "",
            choices=digest_of_choices(read_choices(self._dataset.folder)),
            notes=(*notes, *self._smaller()),
        )

    def _rows(self, number: int) -> Callable[[], Iterator[Row]]:
        """A function that gives the rows of the `number`th size of all shards."""
        return lambda: (row for record in read_shards(self._target, self._done) for row in record.rows[number])

    def _smaller(self) -> Iterator[str]:
        """What to say of images that are smaller than a size."""
        counts = [0] * len(self._sizes)
        for record in read_shards(self._target, self._done):
            counts = [sum(pair) for pair in zip(counts, record.whole, strict=True)]
        for size, count in zip(self._sizes, counts, strict=True):
            if count:
                yield f"size {size}: {count:,} images are smaller and stay as they are"


def _columns() -> list[str]:
    """The columns of the manifest that an export depends on."""
    return [*PLAIN, *OBJECTS, *(column.name for column in metric_columns())]


def _samples(
    dataset: Dataset, shard: int, reads: Collection[str], rows: Sequence[Row]
) -> AbstractContextManager[ShardSamples]:
    """A context with the samples of a shard, as published, with the outputs of the stages `reads`.

    Raises UserError if another attempt counts by now.
    """
    receipts: dict[str, Receipt | None] = {}
    for stage in STAGES:
        published = rows[0][f"{stage}_object"] if stage in reads else None
        if published is None:  # not wanted, or the dataset has no captions
            continue
        receipt = Commits(dataset.folder, stage, rows[0][f"{stage}_hash"]).read(shard)
        if receipt is None or receipt.objects[0].name != published:
            raise UserError(
                f"{dataset.url}: shard {shard:06d} has changed since it was published; run: resmaster publish "
                f"{quoted(dataset.url)}"
            )
        receipts[stage] = receipt
    chain = Chain(receipts)
    return chosen_samples(dataset, shard, chain, list(receipts), chain.unfinished(), chain.made())


def _item(sample: Sample, row: Row, size: int | None) -> Item:
    assert sample.high_res is not None
    height, width = fitted(row["height"], row["width"], size)
    image, extension = _image(sample.high_res, (row["height"], row["width"]), (height, width))
    names = [*PLAIN, *(column.name for column in metric_columns())]
    return Item(
        key=sample.key,
        prompt=sample.prompt,
        image=image,
        extension=extension,
        height=height,
        width=width,
        facts={name: value_of(row[name]) for name in names} | {"height": height, "width": width},
        made=sample.high_res.meta,
        low_res=sample.low_res,
        captions=[caption for caption in sample.captions if caption["status"] in DESCRIBED],
        boxes_px=(row["height"], row["width"]),
    )


def _image(image: EncodedImage, has: tuple[int, int], wanted: tuple[int, int]) -> tuple[bytes, str]:
    """(file, extension) of an exported image. Sizes are (height, width) in px."""
    if has == wanted:
        return image.data, image.extension
    return copied(image, *wanted), "png"
