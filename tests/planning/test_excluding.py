"""`run --exclude`: excluded samples are never planned, by no later run either; what is planned stays planned."""

from pathlib import Path

import pytest

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.exclusions import exclude, read_exclusions
from resmaster_stages.dataset.plan import GenerationWriter, read_plan
from resmaster_stages.dataset.schemas import REJECTED_SCHEMA
from resmaster_stages.errors import PlanError, UserError
from resmaster_stages.inspection.key_lists import KeyList, read_key_list
from resmaster_stages.inspection.verify import EXCLUSION_GONE, verify
from resmaster_stages.keys import prompt_key
from resmaster_stages.planning.preview import preview
from resmaster_stages.prompts import ingest
from resmaster_stages.storage.tables import decode_table
from tests.fake_stages import config_at, png

PROMPTS = list("abcdefgh")


def key_of(prompt: str, replica: int = 0) -> str:
    return prompt_key(prompt, "", 16, 16, replica)


def listed(*keys: str) -> KeyList:
    return read_key_list(",".join(keys), "--exclude")


@pytest.fixture
def config(tmp_path: Path) -> DatasetConfig:
    return config_for(tmp_path, PROMPTS)


def config_for(tmp_path: Path, prompts: list[str], **values: object) -> DatasetConfig:
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    return config_at(tmp_path / "out", prompts=str(tmp_path / "prompts.txt"), **values)


def prompts_of(dataset: Dataset) -> str:
    plan = read_plan(dataset.folder)
    return "".join(sample.prompt for shard in range(plan.shards) for sample in plan.read(shard))


def rejected(dataset: Dataset, generation: int = 0) -> list[tuple[str, str]]:
    table = read_plan(dataset.folder).generations[generation].rejected
    assert table
    rows = decode_table(dataset.folder.read(table.name), REJECTED_SCHEMA, "rejected").to_pylist()
    return [(row["text"], row["reason"]) for row in rows]


def test_excluded_inputs_are_not_planned_and_are_listed_with_their_reason(
    config: DatasetConfig, tmp_path: Path
) -> None:
    (tmp_path / "rejects.txt").write_text(f"{key_of('c')}\n{key_of('e')[:10]}\n")
    wanted = read_key_list(str(tmp_path / "rejects.txt"), "--exclude")
    look = preview(config, exclude=wanted)
    assert (look.new_samples, look.rejected.count) == (6, 2)
    assert "excluded by rejects.txt" in look.rejected.first[0]
    assert not (tmp_path / "out").exists()
    dataset = ingest(config, exclude=wanted)
    assert prompts_of(dataset) == "abdfgh"
    assert rejected(dataset) == [("c", "excluded by rejects.txt"), ("e", "excluded by rejects.txt")]
    assert verify(dataset).damage == ()


def test_a_later_run_without_the_list_does_not_plan_them_either(config: DatasetConfig, tmp_path: Path) -> None:
    dataset = ingest(config, exclude=listed(key_of("c")))
    for _ in range(2):
        assert len(read_plan(ingest(config).folder).generations) == 1
    assert preview(config).new_samples == 0
    more = config_for(tmp_path, [*PROMPTS, "i"])
    assert prompts_of(ingest(more)) == "abdefghi"
    assert rejected(dataset, 1) == [("c", "excluded by --exclude")]
    ingest(more, exclude=listed(key_of("c")))
    assert dataset.folder.names(layout.EXCLUDED) == [layout.excluded(1)], "the same list adds nothing"
    dataset.folder.remove(layout.excluded(1))
    assert prompts_of(ingest(more)) == "abdefghic", "without the record they are planned"


def test_the_others_are_the_same_as_without_the_list(config: DatasetConfig, tmp_path: Path) -> None:
    """Also with a limit: an excluded prompt leaves its place empty."""
    limited = config.model_copy(update={"limit": 4})
    assert prompts_of(ingest(limited, exclude=listed(key_of("b")))) == "acd"


def test_a_key_is_one_replica(tmp_path: Path) -> None:
    config = config_for(tmp_path, ["a", "b"], replicas=3)
    dataset = ingest(config, exclude=listed(key_of("a", 1)))
    planned = set(read_plan(dataset.folder).keys())
    assert planned == {key_of(prompt, replica) for prompt in "ab" for replica in range(3)} - {key_of("a", 1)}
    assert rejected(dataset) == [("a", "replica 1: excluded by --exclude")]


def test_images_can_be_excluded(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png((number, 0, 0)))
    draft = config_at(tmp_path / "draft", images=str(folder))
    keys = list(read_plan(ingest(draft).folder).keys())
    full = config_at(tmp_path / "full", images=str(folder))
    assert list(read_plan(ingest(full, exclude=listed(keys[1])).folder).keys()) == [keys[0], keys[2]]


def test_a_planned_sample_is_not_unplanned(config: DatasetConfig) -> None:
    dataset = ingest(config)
    before = {file.name for file in dataset.folder.files()}
    for look in (ingest, preview):
        with pytest.raises(PlanError, match=f"sample {key_of('c')} is planned already, .* --redo {key_of('c')}"):
            look(config, exclude=listed(key_of("c")))
    assert {file.name for file in dataset.folder.files()} == before, "nothing is done"
    exclude(dataset.folder, [key_of("c")], "a race")
    assert prompts_of(ingest(config)) == "".join(PROMPTS)
    assert preview(config).rejected.count == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["0" * 24], "no input has a key that begins with 0{24}; a key is of one prompt or image"),
        ([""], "holds no key"),
    ],
)
def test_a_list_that_does_not_fit_is_refused_before_anything_is_written(
    config: DatasetConfig, tmp_path: Path, keys: list[str], message: str
) -> None:
    for look in (ingest, preview):
        with pytest.raises(UserError, match=message):
            look(config, exclude=listed(key_of("c"), *keys) if keys != [""] else listed(*keys))
    assert not (tmp_path / "out").exists()


def test_ambiguous_keys_and_lists_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    many = [f"prompt {number}" for number in range(40)]
    config, firsts = config_for(tmp_path, many), [key_of(prompt)[0] for prompt in many]
    with pytest.raises(UserError, match="several keys begin with"):
        ingest(config, exclude=listed(next(digit for digit in "0123456789abcdef" if firsts.count(digit) > 1)))
    with pytest.raises(PlanError, match=r"nothing usable in it; first: .* excluded by --exclude"):
        ingest(config, exclude=listed(*map(key_of, many)))
    assert not (tmp_path / "out").exists()


def test_a_damaged_list_is_named_and_stops_planning(config: DatasetConfig) -> None:
    dataset = ingest(config, exclude=listed(key_of("c")))
    dataset.folder.write(layout.excluded(1), b"{}")
    (damage,) = verify(dataset).damage
    assert (damage.name, damage.what, damage.mend) == (layout.excluded(1), "unreadable", EXCLUSION_GONE)
    for look in (ingest, preview):
        with pytest.raises(PlanError, match=r"0001.json: damaged .* run CONFIG --exclude KEYS"):
            look(config)


def test_lists_of_several_writers_add_up(config: DatasetConfig) -> None:
    folder = ingest(config).folder
    exclude(folder, ["b", "a"], "one")
    exclude(folder, ["b", "c"], "two")
    exclude(folder, ["c", "a"], "three")
    assert read_exclusions(folder) == {"a": "one", "b": "one", "c": "two"}
    assert len(folder.names(layout.EXCLUDED)) == 2


def test_a_run_that_is_killed_before_its_plan_counts_has_kept_the_list(
    config: DatasetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the next run, without the option, does not plan what was to be left out."""

    def killed(writer: GenerationWriter) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GenerationWriter, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            ingest(config, exclude=listed(key_of("c")))
    assert prompts_of(ingest(config)) == "abdefgh"
