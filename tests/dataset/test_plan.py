import threading
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resmaster_stages.dataset import plan as plan_module
from resmaster_stages.dataset.plan import GenerationWriter, Plan, Rejected, SampleSpec, find_plan, read_plan
from resmaster_stages.errors import PlanError
from resmaster_stages.storage.filesystem import open_root


def append(plan: Plan, samples: list[SampleSpec], per_shard: int, rejected: Sequence[Rejected] = ()) -> bool:
    with GenerationWriter(plan, per_shard) as writer:
        for sample in samples:
            writer.add(sample)
        return writer.commit(rejected, ())


def specs(*names: str) -> list[SampleSpec]:
    return [SampleSpec(name, f"prompt {name}", "", 16, 24, 0) for name in names]


@settings(max_examples=25)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 5))
def test_generations_are_dense_and_complete(sizes: list[int], per_shard: int, part_rows: int) -> None:
    folder = open_root(f"memory://{uuid.uuid4().hex}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "PART_ROWS", part_rows)
        names: list[str] = []
        for number, size in enumerate(sizes):
            new = [f"{number}-{place}" for place in range(size)]
            names += new
            assert append(find_plan(folder), specs(*new), per_shard)
    plan = read_plan(folder)
    shards = [plan.read(shard) for shard in range(plan.shards)]
    rows = [row for shard in shards for row in shard]
    assert [row.key for row in rows] == names
    assert [row.index for row in rows] == list(range(plan.samples)) == list(range(len(names)))
    assert [row.shard for row in rows] == sorted(row.shard for row in rows)
    assert [len(shard) for shard in shards] == [plan.size(shard) for shard in range(plan.shards)]
    assert all(1 <= len(shard) <= per_shard for shard in shards)
    assert list(plan.keys()) == names
    assert [plan.generation_of(rows[names.index(name)].shard).number for name in names] == [
        int(name.split("-")[0]) for name in names
    ]


def test_no_plan_and_no_such_shard(tmp_path: Path) -> None:
    folder = open_root(str(tmp_path))
    with pytest.raises(PlanError, match="has no plan yet"):
        read_plan(folder)
    append(find_plan(folder), specs("a"), 2)
    for shard in (1, -1):
        with pytest.raises(PlanError, match=f"shard {shard} is not in the plan"):
            read_plan(folder).read(shard)


def test_racing_planners_have_one_winner() -> None:
    folder = open_root(f"memory://{uuid.uuid4().hex}")
    empty, barrier, won = find_plan(folder), threading.Barrier(6), []

    def contend(number: int) -> None:
        barrier.wait()
        if append(empty, specs(f"k{number}"), 2, [Rejected("f:1", "", "empty")]):
            won.append(number)

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert list(read_plan(folder).keys()) == [f"k{won[0]}"]
    assert len(folder.names("plan/gen-0000")) == 3, "the losers' files are gone"


def test_damage_is_named(tmp_path: Path) -> None:
    folder = open_root(str(tmp_path))
    append(find_plan(folder), specs("a", "b"), 2)
    (part,) = (tmp_path / "plan/gen-0000").glob("part-*")
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    with pytest.raises(PlanError, match="damaged"):
        read_plan(folder).read(0)
    part.unlink()
    with pytest.raises(PlanError, match="gone"):
        read_plan(folder).read(0)
    record = tmp_path / "plan/gen-0000/_PLAN.json"
    for text in ('{"number":', "[]", "{}"):
        record.write_text(text)
        with pytest.raises(PlanError, match=r"_PLAN\.json: damaged"):
            find_plan(folder)
