"""`repair --redo`: chosen samples get another draw; every other sample stays the same to the byte."""

import json
import random
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from resmaster_flows.cli.main import main
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.chain import Chain, read_chain
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.curation import Choice, Session, now, read_choices
from resmaster_stages.dataset.damage import give_up_damaged
from resmaster_stages.dataset.dataset import Dataset, create_or_open, open_dataset
from resmaster_stages.dataset.reading import committed_outputs, shard_samples
from resmaster_stages.dataset.records import record_text
from resmaster_stages.dataset.redo import read_redos
from resmaster_stages.dataset.retry import number_of, retries_of
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.schemas import manifest_schema
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import PlanError, SampleError, ShardError, UserError
from resmaster_stages.gallery.serve import serving
from resmaster_stages.inspection.explain import explain, spelled
from resmaster_stages.inspection.leftovers import find_leftovers
from resmaster_stages.inspection.lists import listed
from resmaster_stages.inspection.query import Query, sample_table
from resmaster_stages.inspection.status import pending, status
from resmaster_stages.inspection.verify import REQUEST_GONE, note, verify
from resmaster_stages.models.identity import Weights
from resmaster_stages.planning.preview import preview
from resmaster_stages.planning.redoing import ask, asked, wish
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.publish.publish import publish
from resmaster_stages.runner.run import ensure_stage, run_stage
from resmaster_stages.storage.tables import decode_table
from tests.durability.injection import attempts, everything
from tests.fake_stages import FAKES, planned
from tests.runner.test_resume import in_child, killed_at, spills

SINGLY = {"height": 16, "width": 16, "batch_size": 1}
PROMPTS = ["a", "b", "bad high_res", "c", "d", "e"]


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))
    for name, process in FAKES.items():
        monkeypatch.setitem(STAGES, name, replace(STAGES[name], process=process))


def made(folder: Path, **values: object) -> Dataset:
    """Two shards of three, complete and published; one sample failed in high_res."""
    folder.mkdir(exist_ok=True)
    values = {"samples_per_shard": 3, "allow_overwriting_store": True, **values}
    dataset = planned(folder / "out", PROMPTS, folder, **values)
    finish(dataset)
    return dataset


def finish(dataset: Dataset, last: str | None = None) -> list[tuple[str, int]]:
    """Do all that is pending up to the stage `last`, as a new process does. Returns what was done."""
    dataset, done = open_dataset(dataset.url), []
    for shard in range(dataset.plan.shards):
        for stage in dataset.hashes:
            if ensure_stage(dataset, stage, shard)[1]:
                done.append((stage, shard))
            if stage == last:
                break
    if last is None:
        publish(dataset)
    return done


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return made(tmp_path / "one")


def key_of(dataset: Dataset, prompt: str) -> str:
    plan = dataset.plan
    return next(each.key for shard in range(plan.shards) for each in plan.read(shard) if each.prompt == prompt)


def redo(dataset: Dataset, *prompts: str, stage: str | None = None) -> str:
    return asked(open_dataset(dataset.url), ",".join(key_of(dataset, prompt) for prompt in prompts), stage)


def outputs(dataset: Dataset, stage: str) -> dict[str, Output]:
    """Prompt -> the committed output of the sample."""
    found = {}
    for shard in range(dataset.plan.shards):
        receipt = dataset.commits(stage).read(shard)
        assert receipt
        with committed_outputs(dataset, receipt) as files:
            prompts = {each.key: each.prompt for each in dataset.plan.read(shard)}
            found |= {prompts[key]: files[key] for key in files}
    return found


def records(dataset: Dataset) -> dict[str, dict[str, int]]:
    """Stage -> prompt -> take, by the records that count."""
    prompts = {each.key: each.prompt for shard in range(dataset.plan.shards) for each in dataset.plan.read(shard)}
    return {
        stage: {
            prompts[key]: take
            for receipt in dataset.commits(stage).read_all().values()
            for key, take in receipt.takes.items()
        }
        for stage in dataset.hashes
    }


def test_a_chosen_sample_is_another_one_and_all_others_stay_the_same_to_the_byte(dataset: Dataset) -> None:
    before = {stage: outputs(dataset, stage) for stage in FAKES}
    history = attempts(str(dataset.url))
    assert redo(dataset, "b").endswith("1 sample to make again from low_res on (redo/0001.json)")
    assert finish(dataset) == [(stage, 0) for stage in FAKES]
    for stage in FAKES:
        after = outputs(dataset, stage)
        assert after.keys() == before[stage].keys()
        assert {prompt for prompt in after if after[prompt] != before[stage][prompt]} == {"b"}, stage
    after = attempts(str(dataset.url))
    assert {place: after[place] for place in history} == history, "what was committed stays"
    assert after.keys() - history.keys() == {(stage, 0, "attempt 2") for stage in FAKES}
    assert records(dataset) == {key: {"b": 1} for key in FAKES}, "the record shows that it is the second take"
    assert json.loads(outputs(dataset, "high_res")["b"].files["json"])["take"] == 1
    assert finish(dataset) == []


def test_the_bytes_do_not_depend_on_who_makes_them_and_when(dataset: Dataset, tmp_path: Path) -> None:
    """Redone after the build, before it, in two steps, or in two requests that are fulfilled together."""
    redo(dataset, "b", "d")
    finish(dataset)
    expected = everything(dataset.url)

    early = planned(tmp_path / "early", PROMPTS, tmp_path, samples_per_shard=3, allow_overwriting_store=True)
    redo(early, "b", "d")
    finish(early)
    assert everything(early.url) == expected

    for name, last in (("low", "low_res"), ("high", "high_res")):
        steps = made(tmp_path / name)
        redo(steps, "b", "d")
        finish(steps, last)
        finish(steps)
        assert everything(steps.url) == expected

    two = made(tmp_path / "two")
    redo(two, "b")
    redo(two, "d")
    finish(two)
    assert everything(two.url) == expected


def test_from_high_res_the_low_res_image_and_the_captions_are_kept(dataset: Dataset) -> None:
    low, high = dataset.commits("low_res").read(0), outputs(dataset, "high_res")
    redo(dataset, "b", stage="high_res")
    assert finish(dataset) == [("high_res", 0), ("quality", 0)]
    assert dataset.commits("low_res").read(0) == low
    assert outputs(dataset, "high_res")["b"] != high["b"]
    assert records(dataset) == {"low_res": {}, "captions": {}, "high_res": {"b": 1}, "quality": {"b": 1}}


def test_every_further_redo_is_another_draw(dataset: Dataset) -> None:
    seen = [outputs(dataset, "high_res")["b"].files]
    for number, stage in enumerate(["low_res", "high_res", "low_res"], 1):
        redo(dataset, "b", stage=stage)
        finish(dataset)
        seen.append(outputs(dataset, "high_res")["b"].files)
        assert records(dataset)["high_res"] == {"b": number}
    assert records(dataset)["low_res"] == {"b": 3}
    assert len({files["png"] for files in seen}) == 4


def test_requests_from_two_stages_end_the_same_in_either_order_of_work(dataset: Dataset, tmp_path: Path) -> None:
    """high_res may not be made from a low-res image that is to be made again."""
    redo(dataset, "b", stage="high_res")
    redo(dataset, "b")
    finish(dataset)
    other = made(tmp_path / "other")
    redo(other, "b", stage="high_res")
    redo(other, "b")
    for stage in ("quality", "high_res", "captions"):
        _, worked = ensure_stage(open_dataset(other.url), stage, 0)
        assert not worked, f"{stage} waits for low_res"
    finish(other)
    assert everything(other.url) == everything(dataset.url)


def test_a_process_that_knows_only_the_first_request_does_no_harm(dataset: Dataset, tmp_path: Path) -> None:
    redo(dataset, "b")
    redo(dataset, "a", "b")
    finish(dataset)
    other = made(tmp_path / "other")
    redo(other, "b")
    old = open_dataset(other.url)
    assert len(old.redos.requests) == 1
    redo(other, "a", "b")
    run_stage(open_dataset(other.url), "low_res", 0)
    for stage in ("captions", "high_res", "quality"):
        run_stage(old, stage, 0)
    assert records(other) == {stage: {"a": 1, "b": 2} for stage in FAKES}, "a stage takes what is upstream"
    finish(other)
    assert everything(other.url) == everything(dataset.url)


def test_the_loser_of_a_race_makes_what_the_winner_did_not_know(dataset: Dataset) -> None:
    redo(dataset, "a")
    old = open_dataset(dataset.url)
    assert old.redos.requests
    redo(dataset, "b")

    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        if read_chain(old, 0).committed["low_res"].number == 1:
            run_stage(old, "low_res", 0)
        yield from FAKES["low_res"](config, samples)

    receipt = run_stage(open_dataset(dataset.url), "low_res", 0, process=process)
    assert receipt.number == 3
    assert records(dataset)["low_res"] == {"a": 1, "b": 1}


def test_failed_samples_and_redone_ones_do_not_disturb_each_other(dataset: Dataset) -> None:
    """The failed sample is in the same shard. It fails again, or it is mended; what is good is made once."""
    redo(dataset, "b")
    retries, samples = retries_of(open_dataset(dataset.url))
    assert samples == 1
    fresh = open_dataset(dataset.url)
    for stage in FAKES:
        run_stage(fresh, stage, 0, number=number_of(retries, stage, 0))
    assert {stage: receipt.number for stage, receipt in read_chain(fresh, 0).committed.items()} == dict.fromkeys(
        FAKES, 2
    )
    assert not any(pending(fresh, retries=retries).values()), "both wishes are fulfilled by one attempt"
    taken = outputs(dataset, "high_res")

    def good(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        yield from FAKES["high_res"](config, [replace(each, prompt="good") for each in samples])

    again, _ = retries_of(fresh)
    run_stage(fresh, "high_res", 0, number=number_of(again, "high_res", 0), process=good)
    now = outputs(dataset, "high_res")
    assert {prompt: now[prompt] for prompt in taken} == taken
    assert now.keys() - taken.keys() == {"bad high_res"}
    assert records(dataset)["high_res"] == {"b": 1}


def test_a_failed_sample_can_be_drawn_again_with_another_seed(dataset: Dataset) -> None:
    redo(dataset, "bad high_res")

    def unlucky(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        yield from FAKES["high_res"](config, [replace(each, prompt="good") if each.take else each for each in samples])

    fresh = open_dataset(dataset.url)
    for stage in FAKES:
        run_stage(fresh, stage, 0, process=unlucky if stage == "high_res" else None)
    assert write_manifest(fresh).samples == 6


@pytest.mark.parametrize("stage", ["low_res", "high_res"])
def test_a_redone_sample_that_fails_is_failed_and_nothing_of_its_old_take_is_published(
    dataset: Dataset, stage: str
) -> None:
    redo(dataset, "b")

    def failing(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for output, sample in zip(FAKES[stage](config, samples), samples):
            yield Output(sample.key, error=SampleError("unlucky")) if sample.take else output

    fresh, key = open_dataset(dataset.url), key_of(dataset, "b")
    for each in FAKES:
        run_stage(fresh, each, 0, process=failing if each == stage else None)
    assert finish(dataset) == [], "it is tried again only if somebody asks for it"
    assert key not in everything(dataset.url)["keys"]
    chain = read_chain(fresh, 0)
    later = list(FAKES)[list(FAKES).index(stage) + 1 :]
    assert all(key in chain.committed[each].lost_keys for each in later), "no tar leads to its old image"
    retries, _ = retries_of(fresh)
    for each in FAKES:
        run_stage(fresh, each, 0, number=number_of(retries, each, 0))
    finish(dataset)
    assert records(dataset) == {key_0: {"b": 1} for key_0 in FAKES}, "the same draw"
    assert key in everything(dataset.url)["keys"]


def test_a_half_redone_sample_is_not_published_and_not_read(dataset: Dataset) -> None:
    """Its small image would be of another take than its large one."""
    key = key_of(dataset, "b")
    redo(dataset, "b")
    for last in ("low_res", "captions", "high_res"):
        finish(dataset, last)
        fresh = open_dataset(dataset.url)
        assert write_manifest(fresh).samples == 4
        with shard_samples(fresh, 0, list(FAKES)) as samples:
            assert key not in samples.keys()  # noqa: SIM118
    finish(dataset)
    with shard_samples(open_dataset(dataset.url), 0, list(FAKES)) as samples:
        assert {each.key: each.take for each in samples}[key] == 1


@pytest.mark.parametrize("last", ["low_res", "captions", "high_res", "quality"])
@pytest.mark.parametrize("damaged", list(FAKES))
def test_damage_in_any_state_of_a_redo_is_mended_to_the_same_bytes(
    dataset: Dataset, tmp_path: Path, last: str, damaged: str
) -> None:
    """Of old and new attempts: of a stage whose upstream has moved on, too."""
    redo(dataset, "b")
    finish(dataset)
    other = made(tmp_path / "other")
    redo(other, "b")
    finish(other, last)
    receipt = other.commits(damaged).read(0)
    assert receipt
    other.folder.write(receipt.objects[0].name, b"damaged")
    found = verify(other)
    assert [each.name for each in found.damage] == [receipt.objects[0].name]
    note(other, found)
    run_stage(open_dataset(other.url), damaged, 0)
    assert {record.name for record in verify(other).damage} == set()
    finish(other)
    assert everything(other.url) | attempts(other.url) == everything(dataset.url) | attempts(dataset.url)


def test_what_was_made_from_deleted_objects_is_given_up_and_made_anew(dataset: Dataset, tmp_path: Path) -> None:
    """Half of a redo was done, then `gc` ran, then an object was damaged."""
    redo(dataset, "b")
    finish(dataset)
    other = made(tmp_path / "other")
    redo(other, "b")
    finish(other, "low_res")
    first, captions = other.commits("low_res").attempt(0, 1), other.commits("captions").read(0)
    assert first
    assert captions
    other.folder.remove(first.objects[0].name)
    other.folder.write(captions.objects[0].name, b"damaged")
    note(other, verify(other))
    with pytest.raises(ShardError, match=r"captions of shard 000000: was made from .* is gone .* --replace"):
        finish(other)
    give_up_damaged(other)
    finish(other)
    assert everything(other.url) == everything(dataset.url)


@pytest.mark.parametrize("number", range(12))
def test_whatever_happens_in_whatever_order_the_requests_alone_decide(tmp_path: Path, number: int) -> None:
    """Requests, stages that run in any order in processes that know more or fewer requests, damage, and repairs."""
    chance = random.Random(number)
    dataset = made(tmp_path / "one")
    known = [open_dataset(dataset.url)]
    names = [prompt for prompt in PROMPTS if "bad" not in prompt]
    for _ in range(12):
        step, stage, shard = chance.random(), chance.choice(list(FAKES)), chance.randrange(2)
        if step < 0.35:
            redo(dataset, *chance.sample(names, chance.randint(1, 3)), stage=chance.choice(["low_res", "high_res"]))
            known.append(open_dataset(dataset.url))
        elif step < 0.85:
            run_stage(chance.choice(known), stage, shard)
        else:
            receipt = dataset.commits(stage).read(shard)
            assert receipt
            dataset.folder.write(receipt.objects[0].name, b"damaged")
            note(dataset, verify(dataset))
            run_stage(chance.choice(known), stage, shard)
            assert verify(dataset).damage == ()
    finish(dataset)
    assert finish(dataset) == []
    calm = planned(tmp_path / "calm", PROMPTS, tmp_path, samples_per_shard=3, allow_overwriting_store=True)
    for name in dataset.folder.names(layout.REDO):
        calm.folder.create(name, dataset.folder.read(name))
    finish(calm)
    assert read_chain(calm, 0).committed["quality"].number == 1
    assert everything(calm.url) == everything(dataset.url)


def test_what_was_given_up_is_made_in_its_last_take(dataset: Dataset) -> None:
    redo(dataset, "b")
    finish(dataset)
    expected = {stage: outputs(dataset, stage) for stage in FAKES}
    for receipt in dataset.commits("low_res").read_all().values():
        dataset.commits("low_res").mark(receipt.shard, [])
    give_up_damaged(dataset)
    finish(dataset)
    assert read_chain(dataset, 0).committed["low_res"].number == 1
    assert {stage: outputs(dataset, stage) for stage in FAKES} == expected


def test_another_configuration_keeps_the_takes(dataset: Dataset) -> None:
    redo(dataset, "b")
    finish(dataset)
    config = open_dataset(dataset.url).config
    changed = create_or_open(config.model_copy(update={"upscale": config.upscale.model_copy(update={"steps": 7})}))
    finish(changed)
    assert read_chain(changed, 0).committed["high_res"].number == 1
    assert outputs(changed, "high_res") == outputs(dataset, "high_res")
    assert records(changed) == {key: {"b": 1} for key in FAKES}


def test_status_plan_and_explain_tell_what_is_asked_for_and_not_made(dataset: Dataset) -> None:
    def left() -> dict[str, tuple[tuple[int, ...], int]]:
        found = status(open_dataset(dataset.url))
        assert found.complete == (not any(each.redo_samples for each in found.stages))
        return {each.stage: (each.redo_shards, each.redo_samples) for each in found.stages}

    def to_do() -> dict[str, tuple[int, int]]:
        stages = preview(open_dataset(dataset.url).config).stages
        return {each.stage: (each.shards_pending, each.samples_pending) for each in stages}

    assert left() == dict.fromkeys(FAKES, ((), 0))
    assert to_do() == dict.fromkeys(FAKES, (0, 0))
    redo(dataset, "a", "b", "d")
    assert left() == dict.fromkeys(FAKES, ((0, 1), 3))
    assert to_do() == dict.fromkeys(FAKES, (2, 3))
    assert pending(open_dataset(dataset.url)) == {key: [0, 1] for key in FAKES}
    assert pending(open_dataset(dataset.url), stages=["high_res"]) == {"high_res": []}, "it waits for low_res"
    key = key_of(dataset, "b")
    told = explain(open_dataset(dataset.url), key)
    assert [(each.take, each.take_due) for each in told.stages] == [(0, 1)] * 4
    assert spelled(told).count("take 1 is still to be made") == 4
    seeds = told.seeds
    finish(dataset, "low_res")
    assert left() == {"low_res": ((), 0), **dict.fromkeys(("captions", "high_res", "quality"), ((0, 1), 3))}
    assert status(open_dataset(dataset.url)).published.problem == "stale"
    finish(dataset)
    assert left() == dict.fromkeys(FAKES, ((), 0))
    assert status(open_dataset(dataset.url)).published.problem == ""
    told = explain(open_dataset(dataset.url), key)
    assert [(each.take, each.take_due) for each in told.stages] == [(1, 1)] * 4
    assert not set(told.seeds.values()) & set(seeds.values())
    (request,) = read_redos(dataset.folder).requests
    assert f"take 1, from low_res on, asked for at {request.asked_at}" in spelled(told)
    assert json.loads(json.dumps(told.to_json()))["redos"][0]["take"] == 1


def test_the_same_command_asks_once_until_its_samples_are_published(dataset: Dataset) -> None:
    redo(dataset, "a", "b")
    for last in ("low_res", "quality"):
        assert redo(dataset, "b", "a").endswith(
            "2 samples to make again were asked for already (redo/0001.json); this goes on with them"
        )
        finish(dataset, last)
    assert redo(dataset, "a", "b").endswith("this goes on with them"), "it is made, and nobody has seen it"
    assert "2 samples to make again from high_res on" in redo(dataset, "a", "b", stage="high_res"), "another wish"
    finish(dataset)
    assert redo(dataset, "a", "b").endswith("2 samples to make again from low_res on (redo/0003.json)")
    assert [each.takes for each in read_redos(dataset.folder).requests] == [
        {"0": {key_of(dataset, prompt): take for prompt in "ab"}} for take in (1, 2, 3)
    ]


def test_a_list_of_choices_asks_only_for_what_was_rejected_since(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "choices.csv"

    def choose(**verdicts: str) -> str:
        rows = [f"{key_of(dataset, prompt)},{verdict}" for prompt, verdict in verdicts.items()]
        path.write_text("\n".join(["key,verdict,when", *rows]))
        return str(path)

    def now() -> str:
        return datetime.now(UTC).isoformat()

    first = now()
    said = asked(open_dataset(dataset.url), choose(a=f"rejected,{first}", b=f"kept,{first}", c=f"rejected,{first}"))
    assert "2 samples to make again" in said
    finish(dataset)
    said = asked(open_dataset(dataset.url), choose(a=f"rejected,{first}", c=f"rejected,{first}"))
    assert said.endswith("2 rejected samples were asked for again since they were rejected; none is left to ask for")
    said = asked(open_dataset(dataset.url), choose(a=f"rejected,{first}", c=f"rejected,{now()}"))
    assert "1 sample to make again" in said
    assert said.endswith("1 rejected samples were asked for again since they were rejected")


def test_a_lost_request_takes_nothing_back_and_verify_names_it(dataset: Dataset) -> None:
    redo(dataset, "a")
    redo(dataset, "b")
    finish(dataset)
    expected = everything(dataset.url)
    assert verify(dataset).damage == ()
    for number in (1, 2):
        text = dataset.folder.read(layout.redo(number))
        dataset.folder.remove(layout.redo(number))
        (damage,) = verify(dataset).damage
        assert (damage.name, damage.what, damage.mend) == (layout.redo(number), "gone", REQUEST_GONE)
        assert finish(dataset) == []
        assert everything(dataset.url) == expected
        for stage in FAKES:
            receipt = dataset.commits(stage).read(0)
            assert receipt
            dataset.folder.write(receipt.objects[0].name, b"damaged")
        note(dataset, verify(dataset))
        assert finish(dataset) == [(stage, 0) for stage in FAKES], "it is mended"
        assert everything(dataset.url) == expected
        dataset.folder.create(layout.redo(number), text)
    dataset.folder.remove(layout.redo(2))
    assert redo(dataset, "b").endswith("(redo/0002.json)")
    assert finish(dataset) == [(stage, 0) for stage in FAKES]
    assert records(dataset)["high_res"] == {"a": 1, "b": 2}, "a take is never given twice"
    assert verify(dataset).damage == ()


def test_a_damaged_request_is_named_and_stops_the_work(dataset: Dataset) -> None:
    redo(dataset, "a")
    dataset.folder.write(layout.redo(1), b"{}")
    (damage,) = verify(dataset).damage
    assert (damage.name, damage.what) == (layout.redo(1), "unreadable")
    for work in (finish, lambda each: status(open_dataset(each.url)), lambda each: redo(each, "a")):
        with pytest.raises(PlanError, match=r"0001.json: damaged .* --redo KEYS"):
            work(dataset)
    dataset.folder.remove(layout.redo(1))
    redo(dataset, "a")
    finish(dataset)
    assert records(dataset)["quality"] == {"a": 1}


def test_a_request_for_samples_of_elsewhere_has_no_effect(dataset: Dataset) -> None:
    redo(dataset, "a")
    (request,) = read_redos(dataset.folder).requests
    dataset.folder.write(layout.redo(1), record_text(replace(request, takes={"0": {"0" * 24: 1}, "99": {"1" * 24: 1}})))
    assert finish(dataset) == []
    assert status(open_dataset(dataset.url)).complete


def test_gc_removes_what_was_redone_and_keeps_the_requests(dataset: Dataset) -> None:
    redo(dataset, "b")
    finish(dataset)
    later = datetime.now(UTC) + timedelta(days=2)
    found = {each.file.name for each in find_leftovers(open_dataset(dataset.url), timedelta(hours=24), later)}
    replaced = [dataset.commits(stage).attempt(0, 1) for stage in FAKES]
    assert found == {stored.name for receipt in replaced if receipt for stored in receipt.objects}


def test_records_without_takes_are_as_they_were(dataset: Dataset) -> None:
    receipt = dataset.commits("low_res").read(0)
    assert receipt
    assert b"takes" not in record_text(receipt)
    assert b'"takes"' in record_text(replace(receipt, takes={"k": 1}))


def test_a_seed_is_needed(tmp_path: Path, dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"--from captions: no new seed .* low_res, high_res"):
        redo(dataset, "a", stage="captions")
    config = dataset.config
    assert [name for name in FAKES if STAGES[name].seeded(config)] == ["low_res", "high_res"]
    own = config.model_copy(update={"prompts": None, "images": "somewhere"})
    assert [name for name in FAKES if STAGES[name].seeded(own)] == ["high_res"]
    plain = open_dataset(dataset.url)
    lanczos = create_or_open(
        plain.config.model_copy(update={"upscale": type(plain.config).model_validate(
            {"name": "x", "upscale": {"method": "lanczos"}}).upscale})
    )  # fmt: skip
    assert wish(lanczos, key_of(dataset, "a")).stage == "low_res"
    with pytest.raises(UserError, match="--from high_res: no new seed"):
        wish(lanczos, key_of(dataset, "a"), "high_res")


def test_two_people_who_ask_at_once_lose_nothing(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one comes between the first one's look and its record."""
    key = {prompt: key_of(dataset, prompt) for prompt in "abd"}
    first = wish(open_dataset(dataset.url), f"{key['a']},{key['b']}")
    second = wish(open_dataset(dataset.url), f"{key['b']},{key['d']}")
    create, raced = type(dataset.folder).create, []

    def slow(self: object, name: str, data: bytes) -> None:
        if not raced:
            raced.append(name)
            ask(open_dataset(dataset.url), second)
        create(self, name, data)  # type: ignore[arg-type]

    monkeypatch.setattr(type(dataset.folder), "create", slow)
    request, new = ask(open_dataset(dataset.url), first)
    assert (request.number, new) == (2, True)
    finish(dataset)
    assert records(dataset)["quality"] == {"a": 1, "b": 2, "d": 1}


def test_a_waiting_sample_does_not_hold_up_the_others() -> None:
    """By hand: k waits for captions, j does not."""

    def receipt(stage: str, **takes: int) -> Receipt:
        return Receipt(stage, "0" * 64, 0, "0" * 8, 0, 2, 0, (), "", {}, "2026-11-28T12:00:00+00:00", takes=takes)

    chain = Chain(
        {
            "low_res": receipt("low_res", k=2),
            "captions": receipt("captions", k=1),
            "high_res": receipt("high_res", k=1),
        },
        {"low_res": {"k": 2}, "high_res": {"j": 1}},
    )
    assert chain.takes("low_res") == {"k": 2}
    assert chain.redone("captions") == {"k"}
    assert chain.takes("high_res") == {"k": 1, "j": 1}
    assert chain.redone("high_res") == {"j"}
    assert chain.redone("high_res", ahead=("captions",)) == {"k", "j"}
    assert chain.unfinished() == {"k"}


def test_a_spilled_sample_of_another_take_is_not_used(tmp_path: Path) -> None:
    dataset = planned(tmp_path / "out", ["a", "b", "c"], tmp_path, samples_per_shard=3, spill_seconds=0, low_res=SINGLY)
    assert in_child(dataset, "low_res", killed_at("c", "low_res", tmp_path / "log")) == -9
    assert len(spills(dataset)) == 2
    redo(dataset, "a")
    finish(dataset, "low_res")
    assert spills(dataset) == []
    assert json.loads(outputs(dataset, "low_res")["a"].files["json"])["take"] == 1


def test_a_choice_is_about_the_take_that_was_looked_at(dataset: Dataset, tmp_path: Path) -> None:
    """Rejected, drawn again, looked at anew: through the table of samples, the manifest and a file of choices."""
    b, c = key_of(dataset, "b"), key_of(dataset, "c")
    session = Session(dataset.folder)
    session.add([Choice(b, "rejected", when=now()), Choice(c, "kept", when=now())])
    redo(dataset, "b")
    finish(dataset)
    dataset = open_dataset(dataset.url)
    with sample_table(dataset) as table:
        assert not table.keys(Query(where="rejected")), "nobody has looked at the new image yet"
        assert [item["key"] for item in listed(dataset, "rejected")] == []
        assert [item["key"] for item in listed(dataset, "kept")] == [c]
        assert table.keys(Query(where="kept")) == [c]
        row = table.row(b)
        assert row is not None
        assert row["take"] == 1
    rows = decode_table(dataset.folder.read(layout.MANIFEST), manifest_schema(), "manifest").to_pylist()
    assert {row["key"]: row["verdict"] for row in rows if row["verdict"]} == {c: "kept"}
    (tmp_path / "mine.csv").write_text(f"key,verdict\n{b},kept\n")
    assert main(["curate", dataset.url, "--import", str(tmp_path / "mine.csv")]) == 0
    with sample_table(dataset) as table:
        assert table.keys(Query(where="kept", sort="key")) == sorted([b, c]), "a row without a take is of the last one"
    with serving(dataset, 0, "me") as address:
        body = json.dumps({"choices": [{"key": b, "verdict": "rejected"}]}).encode()
        request = urllib.request.Request(
            f"{address}api/choices", body, {"Content-Type": "application/json"}, method="POST"
        )
        urllib.request.urlopen(request).close()
    assert read_choices(dataset.folder)[b].take == 1
