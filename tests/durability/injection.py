"""A whole build of stand-in stages, another attempt at what failed in it, another draw, and faults at their steps.

The steps are all those that change the store.

A step is a moment just before or just after a call that writes, syncs, renames, links, makes a folder or deletes (on a
disk), or that sends or deletes an object or a part of one (S3), and the moment at which half of a file is written. Only
calls on the dataset count.
"""

from __future__ import annotations

import builtins
import errno
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.commits import all_records
from resmaster_stages.dataset.dataset import Dataset, open_dataset
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.schemas import manifest_schema
from resmaster_stages.dataset.stages import Process
from resmaster_stages.planning.redoing import asked
from resmaster_stages.prompts import ingest
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage import filesystem
from resmaster_stages.storage.filesystem import open_root
from resmaster_stages.storage.tables import decode_table
from tests.fake_stages import BAD, FAKES, config_at

Work = Callable[[str, str], None]
"""What faults strike: `build`, `retry` or `redo`, with a root and a file of prompts."""

S3_CHANGES = (
    "put_object",
    "create_multipart_upload",
    "upload_part",
    "complete_multipart_upload",
    "delete_object",
    "delete_objects",
)


PROMPTS = "a\nbad low_res\nb\n"
"""Two shards; the first one has an error ledger."""


def build(root: str, prompts: str) -> None:
    """Plan, every stage over every shard, manifest; two samples per shard, `bad STAGE` prompts fail there."""
    # without the probe of the store: its racing writers would make the order of steps a matter of luck
    config = config_at(root, prompts=prompts, allow_overwriting_store=True)
    dataset = ingest(config)
    plan = dataset.plan
    for shard in range(plan.shards):
        for stage, process in FAKES.items():
            run_stage(dataset, stage, shard, process=process)
    write_manifest(dataset)


def retry(root: str, prompts: str) -> None:
    """Another attempt at what failed in a build in the first stage and shard, all that follows from it, manifest."""
    dataset = open_dataset(root)
    for stage in FAKES:
        number = 2 if stage == "low_res" else 1
        run_stage(dataset, stage, 0, number=number, process=good_later(dataset, stage, 0))
    write_manifest(dataset)


def redo(root: str, prompts: str) -> None:
    """Another draw of a good sample beside a failed one: the request, all that follows from it, manifest.

    Without the record of a publication, so that the request stays open and is made once, however often this runs.
    """
    key = open_dataset(root).plan.keys_of(0)[0]
    asked(open_dataset(root), key)
    dataset = open_dataset(root)
    for stage, process in FAKES.items():
        run_stage(dataset, stage, 0, process=process)
    write_manifest(dataset)


def good_later(dataset: Dataset, stage: str, shard: int) -> Process:
    """A stand-in stage that makes what it is told to fail as well, once the shard's first attempt is committed.

    Other stages' prompts stay as they are, so that what was committed can be made again.
    """
    told = f"{BAD} {stage}"

    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        if dataset.commits(stage).attempt(shard, 1) is not None:
            samples = [replace(sample, prompt=sample.prompt.replace(told, f"good {stage}")) for sample in samples]
        yield from FAKES[stage](config, samples)

    return process


def everything(root: str) -> dict[object, object]:
    """All that a reader of the dataset can see, without the random names and the numbers of attempts."""
    dataset = open_dataset(root)
    found: dict[object, object] = {}
    named = set()
    for stage in dataset.hashes:
        for shard, receipt in dataset.commits(stage).read_all().items():
            found[stage, shard] = facts(receipt)
            for number, stored in enumerate(receipt.objects):
                data = dataset.folder.read(stored.name)
                assert hashlib.sha256(data).hexdigest() == stored.sha256, stored.name
                found[stage, shard, number] = stored.sha256
                named.add(stored.name)
            if receipt.ledger:
                assert dataset.folder.exists(receipt.ledger)
    manifest = decode_table(dataset.folder.read("manifest.parquet"), manifest_schema(), "manifest")
    objects = ("high_res_object", "low_res_object", "captions_object")
    found["manifest"] = manifest.drop(objects).to_pylist()
    keys = manifest["key"].to_pylist()
    assert len(set(keys)) == len(keys), "a sample occurs twice"
    found["keys"] = keys
    index = json.loads(dataset.folder.read("index.json"))["shardlist"]
    found["index"] = [(shard["nsamples"], shard["filesize"]) for shard in index]
    visible = {shard["url"] for shard in index}.union(*(manifest[name].to_pylist() for name in objects))
    assert visible <= named, (
        "readers are led to an object that no commit names, or that a later attempt took the place of"
    )
    return found


def facts(receipt: Receipt) -> tuple[object, ...]:
    """What a record says of samples."""
    lost = (receipt.failed_keys, receipt.lost_keys)
    return (receipt.samples_ok, *lost, receipt.keys_digest, bool(receipt.ledger))


def attempts(root: str) -> dict[object, object]:
    """Stage, shard and number of every attempt that is committed -> what it is, to the byte."""
    dataset = open_dataset(root)
    found: dict[object, object] = {}
    for record in all_records(dataset.folder):
        receipt = record.receipt
        assert receipt is not None, record.name
        for stored in receipt.objects:
            assert hashlib.sha256(dataset.folder.read(stored.name)).hexdigest() == stored.sha256, stored.name
        assert receipt.ledger is None or dataset.folder.exists(receipt.ledger)
        found[receipt.stage, receipt.shard, f"attempt {receipt.number}"] = (
            *facts(receipt),
            *(stored.sha256 for stored in receipt.objects),
        )
    return found


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(errno.EIO, "injected")


def interrupt() -> None:
    raise KeyboardInterrupt


class Steps:
    """Counts steps and strikes at one of them."""

    def __init__(self, strike_at: int | None = None, strike: Callable[[], None] = fail) -> None:
        self.strike_at = strike_at
        self.strike = strike
        self.seen: list[str] = []

    def step(self, label: str) -> None:
        self.seen.append(label)
        if len(self.seen) - 1 == self.strike_at:
            self.strike()


class _HalfWritten:
    """A file whose writes have a moment in the middle."""

    def __init__(self, file: Any, steps: Steps, name: str) -> None:
        self._file, self._steps, self._name = file, steps, name

    def write(self, data: bytes) -> None:
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        self._steps.step(f"half of {self._name}")
        self._file.write(data[len(data) // 2 :])

    def __enter__(self) -> _HalfWritten:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def injected(steps: Steps, root: str) -> Iterator[None]:
    """Every step in the block that changes what lies below `root` passes through `steps`."""
    if open_root(root).local:
        with _on_disk(steps, root):
            yield
    else:
        with _on_s3(steps):
            yield


@contextmanager
def _on_disk(steps: Steps, root: str) -> Iterator[None]:
    def wrapped(name: str) -> Any:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            place = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else str(arguments[-1])
            if not place.startswith(root):
                return real(*arguments, **options)
            steps.step(f"before {name} {place[len(root) :]}")
            result = real(*arguments, **options)
            steps.step(f"after {name} {place[len(root) :]}")
            return result

        return mock.patch.object(os, name, call)

    def opened(path: str, mode: str = "r") -> Any:
        steps.step(f"before open {path[len(root) :]}")
        return _HalfWritten(builtins.open(path, mode), steps, path[len(root) :])

    patches = [wrapped(name) for name in ("replace", "link", "fsync", "unlink", "makedirs")]
    patches.append(mock.patch.object(filesystem, "open", opened, create=True))
    with patches[0], patches[1], patches[2], patches[3], patches[4], patches[5]:
        yield


@contextmanager
def _on_s3(steps: Steps) -> Iterator[None]:
    from s3fs import S3FileSystem

    real = S3FileSystem._call_s3

    async def call(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        if method not in S3_CHANGES:
            return await real(self, method, *arguments, **options)
        steps.step(f"before {method} {options.get('Key', '')}")
        result = await real(self, method, *arguments, **options)
        steps.step(f"after {method} {options.get('Key', '')}")
        return result

    with mock.patch.object(S3FileSystem, "_call_s3", call):
        yield


def killed(work: Work, root: str, prompts: str, environment: dict[str, str], strike_at: int) -> None:
    """Work that is killed at a step; what a child process runs."""
    os.environ.update(environment)
    with injected(Steps(strike_at, kill), root):
        work(root, prompts)
