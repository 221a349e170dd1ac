"""What a reader can see of a dataset, and whether it is as in an undisturbed build.

Invariants:
- Where a commit record says the same batches as the undisturbed build's, in its stage and those before it, every byte
  must be the same.
- Where it says others, for samples run alone after their process was killed, the bytes may differ. Then the shard's
  objects are deleted, and must come back, to the byte, by `verify` and `repair`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from benchmarks.soak.processes import Difference
from benchmarks.soak.recipes import Recipe, repair, verified
from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.inspection.verify import verify
from resmaster_stages.publish.publish import publish
from tests.durability.injection import everything

Seen = dict[object, object]
Place = tuple[str, int]
"""Stage and shard."""

NAMES = ("key", "index", "shard", "replica", "prompt", "low_res_height", "low_res_width", "height", "width")
"""What the manifest says of a sample, whatever its bytes."""


def seen(root: str) -> Seen:
    """`everything`, by shard, with the batches that the records name. All processes here compute with one thread."""
    dataset, found = open_dataset(root), everything(root)
    rows, index = found.pop("manifest"), found.pop("index")
    assert isinstance(rows, list)
    assert isinstance(index, list)
    for stage in dataset.hashes:
        for shard, receipt in dataset.commits(stage).read_all().items():
            found["batches", stage, shard] = [replace(batch, threads=None) for batch in receipt.batches]
    for shard in range(dataset.plan.shards):
        own = [row for row in rows if row["shard"] == shard]
        found["names", shard] = [{name: row[name] for name in NAMES} for row in own]
        found["manifest", shard] = own
    found["index"] = [samples for samples, _ in index]
    found["sizes"] = dict(enumerate(size for _, size in index))
    found["stages"] = tuple(dataset.hashes)
    return found


def made_otherwise(found: Seen, expected: Seen) -> set[Place]:
    """The stages of shards that were not computed in the same batches, or from such."""
    stages = expected["stages"]
    assert isinstance(stages, tuple)
    differing = [
        (stages.index(key[1]), key[2])
        for key, batches in expected.items()
        if isinstance(key, tuple) and key[0] == "batches" and key in found and found[key] != batches
    ]
    return {(stage, shard) for first, shard in differing for stage in stages[first:]}


def differences(found: Seen, expected: Seen, otherwise: set[Place]) -> list[str]:
    """What is not as in the undisturbed build, in words. The bytes of `otherwise` may differ."""
    shards = {shard for _, shard in otherwise}
    free: set[object] = {("manifest", shard) for shard in shards}
    for place in otherwise:
        free |= {("batches", *place), *((*place, number) for number in range(9))}
    sizes = [dict(side.get("sizes") or {}) for side in (found, expected)]  # type: ignore[call-overload]
    for shard in shards:
        for side in sizes:
            side.pop(shard, None)
    found, expected = ({**side, "sizes": size} for side, size in zip((found, expected), sizes, strict=True))
    return [
        f"{key}: {found.get(key)!r:.200} where {expected.get(key)!r:.200} was due"
        for key in {**expected, **found}
        if key not in free and found.get(key) != expected.get(key)
    ]


def check(made: Recipe, root: str, expected: Seen) -> Counter[str]:
    """Compare a finished dataset with the undisturbed one. Raises Difference."""
    found = seen(root)
    otherwise = made_otherwise(found, expected)
    if wrong := differences(found, expected, otherwise):
        raise Difference("\n".join([f"{root}: differs from the undisturbed build", *wrong[:10]]))
    if damage := verify(open_dataset(root)).damage:
        raise Difference(f"{root}: verify says {damage[:3]} of a finished dataset")
    if otherwise:
        _made_again(made, root, otherwise)
    return Counter({"builds": 1, "identical": int(not otherwise), "other batches, repaired": int(bool(otherwise))})


def _made_again(made: Recipe, root: str, places: set[Place]) -> None:
    """Delete the objects of `places`, and have them made again with the recorded bytes. Raises Difference."""
    dataset = open_dataset(root)
    names = {
        stored.name
        for stage, shard in sorted(places)
        if (receipt := dataset.commits(stage).read(shard))
        for stored in receipt.objects
    }
    before = everything(root)
    for name in names:
        dataset.folder.remove(name)
    if (said := {damage.name for damage in verified(root).damage}) != names:
        raise Difference(f"{root}: {sorted(names)} are gone, and verify says {sorted(said)}")
    repair(made, dataset)
    publish(dataset)
    if wrong := [key for key, value in everything(root).items() if before.get(key) != value]:
        raise Difference(f"{root}: repaired from records of other batches, and differs at {wrong[:10]}")
