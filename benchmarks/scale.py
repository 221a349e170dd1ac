"""How planning, committing, looking and publishing grow with a dataset: seconds, requests and peak memory per step.

    python -m benchmarks.scale [--shards 100,1000,10000] [--samples 100] [--s3] [--steps plan,commit,...] [--json FILE]

Builds datasets of null outputs (tiny objects, no model) of growing numbers of shards, in a temporary folder or on a
local S3 server (--s3), with the pipeline's own functions. Each step runs in a process of its own, so that its peak
memory is its own. Requests are S3 calls; in a folder, what is opened, listed, linked, renamed or removed. Last come the
ratios between the largest size and the smallest: 1.0 times the ratio of shards is linear.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.inspection.status import pending, status
from resmaster_stages.models import identity
from resmaster_stages.runner.run import ensure_stage

COMMIT_THREADS = 8
"""Shards under way at a time: what the store can do is measured, not the wait for one answer."""


def null(config: DatasetConfig, samples: Sequence[Sample], stage: str) -> Iterator[Output]:
    """The smallest output that a stage can have."""
    for sample in samples:
        if stage in ROWS:
            yield Output(sample.key, rows=[row_of(stage, sample.key)])
        else:
            yield Output(sample.key, files={"png": b"0", "json": b"{}", "txt": sample.prompt.encode()})


def row_of(stage: str, key: str) -> dict[str, Any]:
    """A sample's row of a table. No two samples look the same."""
    return {**ROWS[stage], "phash": key[:16]} if stage == "quality" else ROWS[stage]


ROWS: dict[str, dict[str, Any]] = {
    "captions": {
        "grid": "64x64/64/64",
        "caption": "null",
        "n_tokens": 1,
        "truncated": False,
        "status": "ok",
        **dict.fromkeys(("row", "col", "y0", "x0"), 0),
        **dict.fromkeys(("y1", "x1"), 64),
    },
    "quality": {
        "width": 64,
        "height": 64,
        "agreement_psnr": 30.0,
        "agreement_ssim": 0.9,
        "detail_energy": 0.1,
        "seam": 1.0,
        "seam_worst": 0.0,
        "lost_worst": 0.2,
        "added_worst": 0.2,
        "colour_worst": 2.0,
        "clipped": 0.0,
        "flags": [],
    },
}


# ----------------------------------------------------------------------------------------------------------------------
# steps


def write_prompts(path: Path, count: int) -> None:
    """As many different prompts of ordinary length."""
    with path.open("w") as file:
        for number in range(count):
            file.write(f"a red house with {number} windows beside a lake, three boats, snow on the mountains behind\n")


def config_of(folder: Path, root: str, samples: int) -> DatasetConfig:
    return parse_config(
        {
            "name": "scale",
            "root": root,
            "prompts": str(folder / "prompts.txt"),
            "samples_per_shard": samples,
            "low_res": {"height": 16, "width": 16},
        }
    )


def plan(folder: Path, root: str, samples: int) -> None:
    from resmaster_stages.prompts import ingest

    config = config_of(folder, root, samples)
    ingest(config)


def commit(folder: Path, root: str, samples: int) -> None:
    dataset = open_dataset(root)

    def build(shard: int) -> None:
        known: dict[str, Receipt] = {}
        for stage in dataset.hashes:
            process = partial(null, stage=stage)
            known[stage], _ = ensure_stage(dataset, stage, shard, known=known, process=process)

    with ThreadPoolExecutor(COMMIT_THREADS) as pool:
        for _ in pool.map(build, sorted({shard for todo in pending(dataset).values() for shard in todo})):
            pass


def fill(folder: Path, root: str, samples: int) -> None:
    """All commits at once, with objects of a few bytes and true records: what readers of a large dataset need, in
    minutes."""
    from resmaster_stages.dataset import layout
    from resmaster_stages.dataset.commit import new_attempt
    from resmaster_stages.dataset.schemas import quality_schema
    from resmaster_stages.keys import digest_of_keys
    from resmaster_stages.storage.tables import encode_table

    dataset = open_dataset(root)
    columns = quality_schema(dataset.config.quality)
    tiny = folder / "tiny"
    tiny.write_bytes(b"0")
    images = tuple(f"{512 * (1 + 6 * number)}+1.png" for number in range(samples))

    def add(shard: int) -> None:
        keys = [sample.key for sample in dataset.plan.read(shard)]
        quality = folder / f"quality-{shard}"
        quality.write_bytes(encode_table([{"key": key, **row_of("quality", key)} for key in keys], columns))
        for stage, own_hash in dataset.hashes.items():
            attempt = new_attempt()
            receipt = Receipt(
                stage=stage,
                stage_hash=own_hash,
                shard=shard,
                attempt=attempt,
                generation=0,
                samples_ok=len(keys),
                samples_failed=0,
                failed_keys=(),
                keys_digest=digest_of_keys(keys),
                upstream={},
                finished_at="2026-11-28T12:00:00+00:00",
                images=() if stage in ROWS else images[: len(keys)],
            )
            source = quality if stage == "quality" else tiny
            dataset.commits(stage).create(receipt, [(layout.shard_object(stage, shard, attempt), source)])
        quality.unlink()

    with ThreadPoolExecutor(4 * COMMIT_THREADS) as pool:
        for _ in pool.map(add, range(dataset.plan.shards)):
            pass


def look(folder: Path, root: str, samples: int) -> None:
    """What a build's parent does at every look, and `repair` at its start."""
    assert not any(pending(open_dataset(root)).values())


def preview(folder: Path, root: str, samples: int) -> None:
    from resmaster_stages.planning.preview import preview

    assert not any(preview(config_of(folder, root, samples)).pending_samples().values())


def stand(folder: Path, root: str, samples: int) -> None:
    found = status(open_dataset(root))
    assert all(stage.committed == found.shards and stage.samples_ok == found.samples for stage in found.stages)


def manifest(folder: Path, root: str, samples: int) -> None:
    from resmaster_stages.publish.manifest import write_manifest

    assert write_manifest(open_dataset(root)).shards_missing == 0


def verify(folder: Path, root: str, samples: int) -> None:
    from resmaster_stages.inspection.verify import verify

    assert not verify(open_dataset(root)).damage


def gc(folder: Path, root: str, samples: int) -> None:
    """Looking for leftovers; there are none."""
    from resmaster_stages.inspection.leftovers import find_leftovers

    dataset = open_dataset(root)
    assert not find_leftovers(dataset, timedelta(0))


def report(folder: Path, root: str, samples: int) -> None:
    from resmaster_stages.publish.report import write_report

    write_report(open_dataset(root))


STEPS: dict[str, Callable[[Path, str, int], None]] = {
    "plan": plan,
    "plan again": plan,
    "commit": commit,
    "fill": fill,
    "look": look,
    "preview": preview,
    "status": stand,
    "manifest": manifest,
    "verify": verify,
    "gc": gc,
    "report": report,
}
"""What is measured, in order. Either `commit` (by default) or `fill` makes what the others read; `report` needs real
tars."""


# ----------------------------------------------------------------------------------------------------------------------
# measuring


def count_requests(root: str) -> Counter[str]:
    """A counter that grows with every request from now on."""
    requests: Counter[str] = Counter()
    lock = threading.Lock()

    def note(kind: str) -> None:
        with lock:
            requests[kind] += 1

    if root.startswith("s3://"):
        from aiobotocore.client import AioBaseClient

        call = AioBaseClient._make_api_call

        async def counted(self: Any, operation: str, parameters: Any) -> Any:
            note(operation)
            return await call(self, operation, parameters)

        AioBaseClient._make_api_call = counted
    else:
        seen = {"open", "os.listdir", "os.scandir", "os.link", "os.rename", "os.remove", "os.mkdir"}

        def heard(event: str, arguments: tuple[Any, ...]) -> None:
            if event in seen and arguments and str(arguments[0]).startswith(root):
                note(event)

        sys.addaudithook(heard)
    return requests


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, folder: Path, root: str, samples: int) -> dict[str, Any]:
    """Run one step in this process."""
    import resmaster_stages.inspection.verify  # noqa: F401  (what is imported before does not count)

    identity.weights_of = lambda config: identity.Weights(config.model.id)
    before = peak_mib()
    requests = count_requests(root)
    started = time.perf_counter()
    STEPS[name](folder, root, samples)
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 3),
        "requests": sum(requests.values()),
        "mib": round(peak_mib() - before, 1),
        "kinds": dict(requests.most_common()),
    }


def in_a_process(name: str, folder: Path, root: str, samples: int) -> dict[str, Any]:
    """Run one step in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.scale", "--one", name, str(folder), root, str(samples)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"step {name} failed")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@contextmanager
def store(s3: bool, folder: Path) -> Iterator[str]:
    """Where datasets go: a folder, or a bucket of a server that lives as long as the block."""
    if not s3:
        yield str(folder / "root")
        return
    from tests.s3_server import serving

    with serving(folder) as server:
        os.environ |= server.environment
        yield f"s3://{server.bucket}"


def table(results: dict[int, dict[str, dict[str, Any]]]) -> str:
    """Markdown: a row per step and size, then the ratios of the largest size to the smallest."""
    lines = ["| step | shards | seconds | requests | per shard | peak MiB |", "|---|---:|---:|---:|---:|---:|"]
    for name in next(iter(results.values())):
        for shards, found in results.items():
            one = found[name]
            lines.append(
                f"| {name} | {shards:,} | {one['seconds']:.2f} | {one['requests']:,} | {one['requests'] / shards:.2f} "
                f"| {one['mib']:.0f} |"
            )
    small, large = min(results), max(results)
    if small < large:
        lines += ["", f"Ratios for {large / small:.0f} times the shards:", ""]
        lines += ["| step | seconds | requests | peak MiB |", "|---|---:|---:|---:|"]
        for name in results[small]:
            ratios = [
                results[large][name][what] / max(results[small][name][what], floor)
                for what, floor in (("seconds", 1e-3), ("requests", 1), ("mib", 1))
            ]
            lines.append(f"| {name} | " + " | ".join(f"{ratio:.1f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shards", default="100,1000,10000", help="sizes, comma-separated (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=100, help="samples per shard (default: %(default)s)")
    parser.add_argument("--s3", action="store_true", help="on a local S3 server instead of a folder")
    parser.add_argument(
        "--steps", default=",".join(name for name in STEPS if name != "fill"), help="only these (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.add_argument("--keep", metavar="FOLDER", help="build there instead of in a temporary folder, and keep it")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[int, dict[str, dict[str, Any]]]:
    args = parser().parse_args(argv)
    names = args.steps.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        raise SystemExit(f"--steps: unknown {', '.join(unknown)}; known: {', '.join(STEPS)}")
    results: dict[int, dict[str, dict[str, Any]]] = {}
    with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory(prefix="resmaster-scale-") as top:
        Path(top).mkdir(exist_ok=True, parents=True)
        with store(args.s3, Path(top)) as place:
            for shards in map(int, args.shards.split(",")):
                folder, root = Path(top) / str(shards), f"{place}/{shards}"
                folder.mkdir(exist_ok=True)
                write_prompts(folder / "prompts.txt", shards * args.samples)
                results[shards] = {}
                for name in names:
                    results[shards][name] = one = in_a_process(name, folder, root, args.samples)
                    print(f"{shards:>7,} shards  {name:<12} {one}", file=sys.stderr, flush=True)
    print(table(results))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        step, where, at, per_shard = sys.argv[2:]
        print(json.dumps(measure(step, Path(where), at, int(per_shard))))
    else:
        main()
