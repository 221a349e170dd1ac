import threading
import uuid
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resmaster_stages.dataset import layout
from resmaster_stages.dataset import plan as plan_module
from resmaster_stages.dataset.dataset import Dataset, open_dataset
from resmaster_stages.dataset.lost_plan import restore_plan, survey
from resmaster_stages.dataset.plan import GenerationWriter, Plan, Rejected, SampleSpec, find_plan, read_plan
from resmaster_stages.dataset.retry import retries_of
from resmaster_stages.errors import PlanError
from resmaster_stages.inspection.status import pending, status
from resmaster_stages.inspection.verify import verify
from resmaster_stages.prompts import ingest
from resmaster_stages.publish.publish import publish
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import Folder, open_root
from tests.fake_stages import FAKES, planned


def append(plan: Plan, samples: list[SampleSpec], per_shard: int, rejected: Sequence[Rejected] = ()) -> bool:
    with GenerationWriter(plan, per_shard) as writer:
        for sample in samples:
            writer.add(sample)
        for item in rejected:
            writer.reject(item)
        return writer.commit()


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


@pytest.mark.parametrize("others", [False, True])
def test_a_planner_is_told_of_its_own_record_and_keeps_its_files(
    others: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store answers "exists" to a request that it has fulfilled, and that was sent once more."""
    folder = open_root(str(tmp_path))
    empty, real = find_plan(folder), Folder.create
    if others:
        append(empty, specs("b"), 2)

    def create(self: Folder, name: str, data: bytes) -> None:
        real(self, name, data)
        raise FileExistsError(name)

    monkeypatch.setattr(Folder, "create", create)
    assert append(empty, specs("a"), 2) is not others
    assert list(read_plan(folder).keys()) == ["b" if others else "a"]
    assert len(folder.names("plan/gen-0000")) == 2


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


def test_a_lost_record_is_made_again_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every generation, also with several files, and also if it is the last one or all are gone at once."""
    monkeypatch.setattr(plan_module, "PART_ROWS", 2)
    dataset = two_generations(tmp_path)
    folder, names = dataset.folder, [layout.plan_record(0), layout.plan_record(1)]
    whole = {name: folder.read(name) for name in names}
    assert len(find_plan(folder).generations[0].parts) == 2
    for lost in (names[:1], names[1:], names):
        for name in lost:
            folder.remove(name)
        with pytest.raises(PlanError, match=r"restore (it|the folder plan/) from a copy, or run: resmaster repair"):
            read_plan(folder).require(4)
        assert restore_plan(folder) == lost
        assert {name: folder.read(name) for name in names} == whole
        assert restore_plan(folder) == []
    folder.write(names[0], whole[names[0]][:-3])
    assert restore_plan(folder) == names[:1]
    assert folder.read(names[0]) == whole[names[0]]


def test_a_record_is_not_made_again_from_files_that_are_not_whole(tmp_path: Path) -> None:
    dataset = two_generations(tmp_path)
    folder, name = dataset.folder, layout.plan_record(0)
    (part,) = (each for each in folder.names(layout.generation(0)) if layout.is_plan_part(each))
    whole = folder.read(part)
    folder.remove(name)
    table, sink = pq.read_table(BytesIO(whole)), BytesIO()
    prompts = pa.array(["another prompt", *table["prompt"].to_pylist()[1:]])
    pq.write_table(table.set_column(table.schema.get_field_index("prompt"), "prompt", prompts), sink)
    for harmed in (whole[:-1], sink.getvalue(), None):
        if harmed is None:
            folder.remove(part)
        else:
            folder.write(part, harmed)
        assert [(each.name, each.what, each.generation) for each in survey(folder)[1]] == [(name, "gone", None)]
        with pytest.raises(PlanError, match=r"gone, and cannot be made again; restore the folder plan/ from a copy"):
            restore_plan(folder)
        with pytest.raises(PlanError, match="gone"):
            read_plan(folder)
    folder.write(part, whole)
    assert restore_plan(folder) == [name]


def test_a_record_is_not_made_again_if_an_earlier_file_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "PART_ROWS", 2)
    folder, name = two_generations(tmp_path).folder, layout.plan_record(0)
    first, _ = (each for each in folder.names(layout.generation(0)) if layout.is_plan_part(each))
    whole = folder.read(first)
    folder.remove(name)
    folder.write(first, whole[:-1])
    assert [(each.name, each.generation) for each in survey(folder)[1]] == [(name, None)]
    with pytest.raises(PlanError, match="cannot be made again"):
        restore_plan(folder)
    folder.write(first, whole)
    assert restore_plan(folder) == [name]
    assert verify(open_dataset(folder.url)).damage == ()


def test_of_the_files_of_two_planners_those_count_that_fit_the_commits(tmp_path: Path) -> None:
    """The slower planner was killed before it could remove its files, and then the record was lost."""
    dataset = planned(tmp_path / "out", ["a", "b"], tmp_path)
    (tmp_path / "other").mkdir()
    other = planned(tmp_path / "other", ["c", "d"], tmp_path / "other")
    folder, name = dataset.folder, layout.plan_record(0)
    whole = folder.read(name)
    (part,) = (each for each in other.folder.names(layout.generation(0)) if layout.is_plan_part(each))
    folder.write(part, other.folder.read(part))
    folder.remove(name)
    assert restore_plan(folder) == [], "nobody knows whose samples were planned"
    folder.create(name, whole)
    run_stage(dataset, "low_res", 0, process=FAKES["low_res"])
    folder.remove(name)
    assert restore_plan(folder) == [name]
    assert folder.read(name) == whole


def test_of_the_files_of_several_planners_those_count_that_fit_the_commits(tmp_path: Path) -> None:
    """The slower planner was killed before it could remove its files, and then the record was lost."""
    (tmp_path / "other").mkdir()
    other = planned(tmp_path / "other", ["other", "prompts", "here"], tmp_path / "other").folder
    dataset = two_generations(tmp_path)
    folder, name = dataset.folder, layout.plan_record(0)
    whole = folder.read(name)
    (part,) = (each for each in other.names(layout.generation(0)) if layout.is_plan_part(each))
    folder.write(part, other.read(part))
    folder.remove(name)
    assert restore_plan(folder) == [name]
    assert folder.read(name) == whole
    dataset.commits("low_res").drop([0, 1])
    folder.remove(name)
    with pytest.raises(PlanError, match="cannot be made again"):  # nobody knows whose samples were planned
        restore_plan(folder)


def test_nothing_goes_on_as_if_the_rest_of_the_plan_were_all(tmp_path: Path) -> None:
    folder = two_generations(tmp_path).folder
    folder.remove(layout.plan_record(1))
    rest = open_dataset(folder.url)
    for look in (status, pending, retries_of, publish):
        with pytest.raises(PlanError, match="a part of its plan is gone: it has 2 shards, and commits are of 3"):
            look(rest)  # type: ignore[operator]


def test_a_lost_record_is_noticed_before_anything_is_committed(tmp_path: Path) -> None:
    """Of an earlier generation by the later one, and of the last one by what stands in its place."""
    folder = open_root(str(tmp_path))
    append(find_plan(folder), specs("a"), 2)
    append(find_plan(folder), specs("b"), 2)
    earlier, last = layout.plan_record(0), layout.plan_record(1)
    whole = folder.read(earlier), folder.read(last)
    folder.remove(earlier)
    with pytest.raises(PlanError, match=r"gen-0000/_PLAN\.json: gone; .* run: resmaster repair"):
        find_plan(folder)
    assert restore_plan(folder) == [earlier]
    place = tmp_path / last
    place.unlink()
    place.symlink_to(place.name)
    assert restore_plan(folder) == [last]
    assert (folder.read(earlier), folder.read(last)) == whole


def test_a_planner_that_was_killed_is_no_loss(tmp_path: Path) -> None:
    folder = open_root(str(tmp_path))
    append(find_plan(folder), specs("a"), 2)
    append(find_plan(folder), specs("b"), 2)
    folder.remove(layout.plan_record(1))
    assert survey(folder)[1] == []
    assert restore_plan(folder) == []
    assert append(find_plan(folder), specs("c"), 2)


def two_generations(tmp_path: Path) -> Dataset:
    """Three samples, then one more; all are in `low_res`."""
    dataset = planned(tmp_path / "out", [f"prompt number {number}" for number in range(3)], tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt number {number}" for number in range(4)))
    dataset = ingest(dataset.config)
    for shard in range(3):
        run_stage(dataset, "low_res", shard, process=FAKES["low_res"])
    return dataset


def test_without_its_files_the_same_prompts_make_the_same_plan_and_others_are_refused(tmp_path: Path) -> None:
    dataset = two_generations(tmp_path)
    keys = list(dataset.plan.keys())
    dataset.folder.remove_all(layout.PLAN)
    with pytest.raises(PlanError, match=r"the commits of shard 1 are of other samples .* restore the folder plan/"):
        ingest(dataset.config)  # all four at once: other shards than before
    assert dataset.folder.names(layout.generation(0)) == [], "a plan that is refused leaves nothing"
    (tmp_path / "prompts.txt").write_text("other\nprompts\n")
    with pytest.raises(PlanError, match="the commits of shard 0 are of other samples"):
        ingest(dataset.config)
    for count in (3, 4):
        (tmp_path / "prompts.txt").write_text("\n".join(f"prompt number {number}" for number in range(count)))
        assert list(ingest(dataset.config).plan.keys()) == keys[:count]
    assert survey(dataset.folder)[1] == []
