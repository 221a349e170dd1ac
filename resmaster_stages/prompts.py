"""Stage 1: prompts, or the user's own images, become an immutable plan of samples.

Reads .txt (one prompt per line), .csv, .jsonl and .parquet (column `prompt`, optional `negative_prompt` and `detail_mask`), and
images with what lies beside them.
Knows nothing about what is made of them.

Invariants:
- A file that cannot be read at all is a UserError that names file and line; a single bad prompt is rejected with a reason.
- The same prompts give the same keys in the same order, whatever was planned before; what is planned stays planned.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from resmaster_stages.config import DatasetConfig
from resmaster_stages.disclosure import one_line, without_credentials
from resmaster_stages.errors import PlanError, SampleError, UserError
from resmaster_stages.identity import image_key, masked_key, normalise_prompt, prompt_key
from resmaster_stages.storage.dataset import RACES, Dataset
from resmaster_stages.storage.digests import DigestSet
from resmaster_stages.storage.filesystem import explained
from resmaster_stages.storage.images import find_images, image_size
from resmaster_stages.storage.masks import BATCH_ROWS, COLUMN, check_mask, forget_tables, mask_of_row
from resmaster_stages.storage.plan import GenerationWriter, Plan, Rejected, SampleSpec, find_plan

MAX_PROMPT_CHARACTERS = 2000
SHOWN_CHARACTERS = 80
PARQUET_BATCH_ROWS = 10_000
READ_BYTES = 1 << 20
SUFFIXES = (".txt", ".csv", ".jsonl", ".parquet")

_LONE_RETURN = re.compile(r"(?<=\r)(?!\n|\Z)")
"""Where a line of CSV ends too."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RawPrompt:
    """A prompt as it stands in a file: where, and its values, which may be anything."""

    source: str
    prompt: Any
    negative_prompt: Any = None
    detail_mask: Any = None
    row: int = 0
    """Line, or row of a table; from 1."""


class DraftReader:
    """The samples that a configuration asks for, each once and in order, as they are read. To be iterated once.

    Of what was read, 12 bytes a sample are held. Raises UserError for a source that cannot be read, at latest where it cannot;
    ConfigError if it gives detail masks that the configuration does not read; PlanError at the end if it gave no usable sample.
    """

    def __init__(self, config: DatasetConfig) -> None:
        self.rejected: list[Rejected] = []
        """What was turned down so far."""
        self.duplicates = 0
        """Inputs so far that were equal to an earlier one."""
        self._config = config
        if config.images:
            self._specs = _specs_of_images(config, self.rejected)
        elif config.prompts:
            self._specs = _specs_of_prompts(config, self.rejected)
        else:
            raise PlanError("nothing to plan: give prompts or images in the configuration, or --prompts or --images")

    def __iter__(self) -> Iterator[SampleSpec]:
        config, seen, inputs = self._config, DigestSet(), 0
        for replicas in self._specs:
            if config.limit is not None and inputs >= config.limit:
                break
            fresh = [spec for spec in replicas if seen.add(bytes.fromhex(spec.key))]
            inputs += bool(fresh)
            self.duplicates += not fresh
            yield from fresh
        if not inputs:
            first = f"; first: {self.rejected[0]}" if self.rejected else ""
            source = str(config.images or config.prompts)
            raise PlanError(f"{without_credentials(source)}: nothing usable in it{first}")


@dataclass(frozen=True)
class Draft:
    """What a configuration asks for: samples without duplicates, in order, and what was turned down."""

    samples: tuple[SampleSpec, ...]
    rejected: tuple[Rejected, ...]
    duplicates: int


def draft_samples(config: DatasetConfig) -> Draft:
    """All samples that `config` asks for, from its prompts or images; writes nothing. Raises as `DraftReader`."""
    reader = DraftReader(config)
    samples = tuple(reader)
    return Draft(samples, tuple(reader.rejected), reader.duplicates)


def ingest(dataset: Dataset, config: DatasetConfig) -> Plan:
    """Plan all samples that `config` asks for and the dataset does not have yet; a second call changes nothing.

    Samples that the source no longer gives stay planned. Raises UserError for a source that cannot be read.
    """
    plan = find_plan(dataset.folder)
    if plan.generations and not config.prompts and not config.images:
        return plan
    for _ in range(RACES):
        draft, known, kept = DraftReader(config), DigestSet(map(bytes.fromhex, plan.keys())), 0
        with GenerationWriter(plan, config.samples_per_shard) as writer:
            for sample in draft:
                if bytes.fromhex(sample.key) in known:
                    kept += 1
                else:
                    writer.add(sample)
            if gone := len(known) - kept:
                log.warning("%s: %d planned samples are no longer asked for; the plan keeps them", dataset.url, gone)
            if not writer.samples:
                return plan
            won = writer.commit(draft.rejected, draft.duplicates)
        plan = find_plan(dataset.folder)
        if won:
            log.info("%s: planned %d new samples, %d rejected", dataset.url, writer.samples, len(draft.rejected))
            return plan
    raise PlanError(f"{dataset.url}: other processes keep planning the same dataset; run one at a time")


def _specs_of_prompts(config: DatasetConfig, rejected: list[Rejected]) -> Iterator[list[SampleSpec]]:
    """The replicas of each good prompt; bad ones go to `rejected`."""
    height, width = _base_size(config)
    for raw in read_prompts(str(config.prompts)):
        negative = "" if raw.negative_prompt is None else raw.negative_prompt
        reason = why_unusable(raw.prompt)
        if reason is None and negative != "" and (reason := why_unusable(negative, may_be_empty=True)):
            reason = f"negative prompt: {reason}"
        if reason is not None:
            rejected.append(_rejection(raw.source, raw.prompt, reason))
            continue
        prompt, negative = normalise_prompt(raw.prompt), normalise_prompt(negative)
        keys = [prompt_key(prompt, negative, height, width, replica) for replica in range(config.replicas)]
        source = None
        if raw.detail_mask not in (None, ""):
            config.upscale.require_detail_mask(f"{raw.source}: gives")
            try:
                source, mask = mask_of_row(str(config.prompts), raw.detail_mask, raw.row)
            except SampleError as error:
                rejected.append(_rejection(raw.source, raw.prompt, f"its detail mask: {error}"))
                continue
            keys = [masked_key(key, mask) for key in keys]
        yield [SampleSpec(key, prompt, negative, height, width, replica, source) for replica, key in enumerate(keys)]


def _specs_of_images(config: DatasetConfig, rejected: list[Rejected]) -> Iterator[list[SampleSpec]]:
    """The replicas of each readable image; bad ones go to `rejected`."""
    for image in find_images(str(config.images)):
        if image.problem:
            rejected.append(_rejection(image.source, "", image.problem))
            continue
        reason = why_unusable(image.prompt, may_be_empty=True)
        if reason is not None:
            rejected.append(_rejection(image.source, image.prompt, f"its prompt: {reason}"))
            continue
        try:
            height, width = image_size(image.data, image.source)
        except SampleError as error:
            rejected.append(_rejection(image.source, "", str(error).removeprefix(f"{image.source}: ")))
            continue
        prompt = normalise_prompt(image.prompt)
        keys = [image_key(image.data, prompt, replica) for replica in range(config.replicas)]
        if image.mask is not None:
            config.upscale.require_detail_mask(f"{image.source}: has beside it")
            try:
                check_mask(image.mask)
            except SampleError as error:
                rejected.append(_rejection(image.source, image.prompt, f"its detail mask: {error}"))
                continue
            keys = [masked_key(key, image.mask) for key in keys]
        yield [SampleSpec(key, prompt, "", height, width, replica, image.source) for replica, key in enumerate(keys)]


def _base_size(config: DatasetConfig) -> tuple[int, int]:
    """(height, width) in px of the low-res images; the model's native size where the configuration gives none."""
    height, width = config.low_res.height, config.low_res.width
    if height is None or width is None:
        from resmaster_stages.models.geometry import native_px

        native = native_px(config.model)
        height, width = height or native, width or native
    return height, width


def why_unusable(text: Any, may_be_empty: bool = False) -> str | None:
    """Why a value cannot be a prompt, in a few words; None if it can."""
    if not isinstance(text, str):
        return "not text"
    kinds = {unicodedata.category(character) for character in text if not character.isspace()}
    if "Cc" in kinds:
        return "control characters"
    if "Cs" in kinds:
        return "not valid Unicode"
    if len(text) > MAX_PROMPT_CHARACTERS and len(normalise_prompt(text)) > MAX_PROMPT_CHARACTERS:
        return f"longer than {MAX_PROMPT_CHARACTERS} characters"
    if not may_be_empty and kinds <= {"Cf"}:  # blank, or nothing but invisible format characters
        return "empty"
    return None


def _rejection(source: str, value: Any, reason: str) -> Rejected:
    text = (value if isinstance(value, str) else repr(value))[:SHOWN_CHARACTERS]
    return Rejected(one_line(source), text.encode("utf-8", "replace").decode(), one_line(reason))


# ----------------------------------------------------------------------------------------------------------------------
# files


def read_prompts(path: str) -> Iterator[RawPrompt]:
    """The prompts of a file, as they stand there, with their line. `path` may be any fsspec URL.

    Raises UserError for a missing, empty, binary or malformed file, naming the line where there is one.
    """
    place = without_credentials(path)
    suffix = "." + path.rsplit(".", 1)[-1].lower() if "." in path.rsplit("/", 1)[-1] else ""
    if suffix not in SUFFIXES:
        raise UserError(f"{place}: unknown kind of prompts file; known: {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        with _opened(path) as file:
            return _from_parquet(file.read(), place)
    lines = _lines(path)
    for blank, line in enumerate(lines):
        if line.strip():
            whole = chain(repeat("\n", blank), [line], lines)
            if suffix == ".csv":
                return _from_csv(whole, place)
            return _from_jsonl(whole, place) if suffix == ".jsonl" else _from_text(whole, place)
    raise UserError(f"{place}: the prompts file is empty; write at least one prompt into it")


@contextmanager
def _opened(path: str) -> Iterator[io.BufferedReader]:
    """A prompts file, opened. Raises UserError if there is none or its place cannot be understood."""
    place = without_credentials(path)
    with explained(path), ExitStack() as stack:
        try:
            file = stack.enter_context(fsspec.open(path, "rb"))
        except FileNotFoundError:
            raise UserError(f"{place}: no such prompts file; check the path") from None
        except ValueError as error:
            raise UserError(f"{place}: cannot be opened ({error}); give a path or an s3:// URL") from None
        yield io.BufferedReader(file, READ_BYTES)


def _lines(path: str) -> Iterator[str]:
    """The lines of a text file with their ends, as they are read. Raises UserError naming the first line that is not text."""
    place = without_credentials(path)
    with _opened(path) as file:
        for number, data in enumerate(file, start=1):
            try:
                line = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{place}: line {number}: not UTF-8 text; save the file as UTF-8") from None
            if "\0" in line:
                raise UserError(
                    f"{place}: line {number}: not a text file (it holds NUL bytes); save the prompts as UTF-8 text"
                )
            yield line


def _from_text(lines: Iterable[str], place: str) -> Iterator[RawPrompt]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield RawPrompt(f"{place}:{number}", line.rstrip("\r\n"))


def _from_csv(lines: Iterable[str], place: str) -> Iterator[RawPrompt]:
    ends = (part for line in lines for part in _LONE_RETURN.split(line))
    reader = csv.DictReader(ends, strict=True, restkey="")
    try:
        _check_columns([name.strip() for name in reader.fieldnames or []], place)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        for row in reader:
            if row.get(""):
                message = "more cells than columns; put prompts that hold commas in double quotes"
                raise UserError(f"{place}: line {reader.line_num}: {message}")
            number = reader.line_num
            yield RawPrompt(
                f"{place}:{number}", row["prompt"] or "", row.get("negative_prompt"), row.get(COLUMN), number
            )
    except csv.Error as error:
        raise UserError(f"{place}: line {reader.reader.line_num}: not valid CSV ({error})") from None


def _from_jsonl(lines: Iterable[str], place: str) -> Iterator[RawPrompt]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            message = 'not valid JSON; each line is one object such as {"prompt": "..."}'
            raise UserError(f"{place}: line {number}: {message} ({reason})") from None
        if not isinstance(row, dict) or "prompt" not in row:
            raise UserError(f'{place}: line {number}: no "prompt"; each line is one object such as {{"prompt": "..."}}')
        yield RawPrompt(f"{place}:{number}", row["prompt"], row.get("negative_prompt"), row.get(COLUMN), number)


def _from_parquet(data: bytes, place: str) -> Iterator[RawPrompt]:
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        _check_columns(names, place)
        columns = [name for name in ("prompt", "negative_prompt", COLUMN) if name in names]
        forget_tables()
        size = BATCH_ROWS if COLUMN in names else PARQUET_BATCH_ROWS
        number = 0
        for batch in file.iter_batches(size, columns=columns):  # a few kilobytes may unfold to any size
            for row in batch.to_pylist():
                number += 1
                yield RawPrompt(
                    f"{place}: row {number}", row["prompt"], row.get("negative_prompt"), row.get(COLUMN), number
                )
    except (pa.ArrowException, OSError) as error:
        first_line = str(error).split("\n", 1)[0]
        raise UserError(f"{place}: not a readable Parquet file ({first_line}); write it again") from None


def _check_columns(names: list[str], place: str) -> None:
    if "prompt" not in names:
        shown = ", ".join(names) or "none"
        raise UserError(f"{place}: has no column 'prompt' (found: {shown}); name the column with the prompts so")
