import json
import logging
import threading
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resmaster_stages.dataset.dataset import Dataset, find_dataset
from resmaster_stages.dataset.plan import read_plan
from resmaster_stages.dataset.schemas import DUPLICATES_SCHEMA, REJECTED_SCHEMA
from resmaster_stages.errors import PlanError, UserError
from resmaster_stages.keys import normalise_prompt
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.planning.drafts import draft_samples, why_unusable
from resmaster_stages.planning.prompt_files import read_prompts
from resmaster_stages.prompts import ingest
from resmaster_stages.storage.filesystem import open_root
from resmaster_stages.storage.tables import decode_table
from tests.fake_stages import config_at, planned, png


def test_four_kinds_of_file_give_the_same_samples(tmp_path: Path) -> None:
    pairs = [("a barn", "fog"), ('a "red", tree', ""), ("ein Häuschen", "")]
    (tmp_path / "p.csv").write_text(
        'id,negative_prompt, prompt\n1,fog,a barn\n2,,"a ""red"", tree"\n3,,ein Häuschen\n', encoding="utf-8-sig"
    )
    lines = [json.dumps({"prompt": p, "negative_prompt": n or None, "id": 1}) for p, n in pairs]
    (tmp_path / "p.jsonl").write_text("\n\n".join(lines) + "\n")
    pq.write_table(
        pa.table({"prompt": [p for p, _ in pairs], "negative_prompt": [n or None for _, n in pairs]}),
        tmp_path / "p.parquet",
    )
    drafts = [
        draft_samples(config_at(tmp_path, prompts=str(tmp_path / name))) for name in ("p.csv", "p.jsonl", "p.parquet")
    ]
    assert [(s.prompt, s.negative_prompt) for s in drafts[0].samples] == pairs
    assert drafts[0] == drafts[1] == drafts[2]
    (tmp_path / "p.txt").write_text("\ufeffa barn\r\n\n  \n# a hash is no comment\n", encoding="utf-8")
    text = draft_samples(config_at(tmp_path, prompts=str(tmp_path / "p.txt")))
    assert [sample.prompt for sample in text.samples] == ["a barn", "# a hash is no comment"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", b"", "empty"),
        ("p.txt", b" \n\n", "empty"),
        ("p.txt", b"good\nbad \xff\n", "line 2: not UTF-8"),
        ("p.txt", b"good\n\x00\x01", "line 2: not a text file"),
        ("p.csv", b"caption,id\nx,1\n", "no column 'prompt' .found: caption, id."),
        ("p.csv", b'prompt\n"never closed\n', "line 2: not valid CSV"),
        ("p.csv", b"prompt\na, b, c\n", "line 2: more cells than columns"),
        ("p.jsonl", b'{"prompt": "x"}\n{"prompt": \n', "line 2: not valid JSON"),
        ("p.jsonl", b'{"prompt": "x"}\n\n["x"]\n', 'line 3: no "prompt"'),
        ("p.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("p.parquet", b"PAR1 no", "not a readable Parquet"),
        ("p.doc", b"x", "unknown kind"),
        ("prompts", b"x", "unknown kind"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}: .*{message}"):
        list(read_prompts(str(tmp_path / name)))


def test_lines_end_as_they_may(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes('\ufeffid,prompt\r1,"a\rb"\r2,"c\r\nd"\r\n3,e\n4,f\r'.encode())
    prompts = [(raw.prompt, raw.source.rsplit(":", 1)[1]) for raw in read_prompts(str(tmp_path / "p.csv"))]
    assert prompts == [("a\rb", "3"), ("c\r\nd", "5"), ("e", "6"), ("f", "7")]
    (tmp_path / "p.txt").write_bytes(b"\n \r\na\r\nb")
    prompts = [(raw.prompt, raw.source.rsplit(":", 1)[1]) for raw in read_prompts(str(tmp_path / "p.txt"))]
    assert prompts == [("a", "3"), ("b", "4")]


def test_an_error_late_in_the_file_leaves_no_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.dataset.plan.PART_ROWS", 2)
    (tmp_path / "p.txt").write_bytes(b"a\nb\nc\nd\n\xff\n")
    config = config_at(tmp_path, prompts=str(tmp_path / "p.txt"))
    with pytest.raises(UserError, match="line 5: not UTF-8"):
        ingest(config)
    assert find_dataset(config) is None
    assert not [path for path in (tmp_path / "demo").rglob("*") if path.is_file()]


@pytest.mark.parametrize("store", ["memory", pytest.param("s3", marks=pytest.mark.s3)])
def test_prompts_in_a_store(store: str, request: pytest.FixtureRequest) -> None:
    folder = open_root(request.getfixturevalue("s3_root") if store == "s3" else f"memory://{uuid.uuid4().hex}")
    for suffix, head in ((".txt", ""), (".csv", "prompt\n")):
        folder.write(f"p{suffix}", f"{head}a\nein Häuschen\n".encode())
        assert [raw.prompt for raw in read_prompts(f"{folder.url}/p{suffix}")] == ["a", "ein Häuschen"]
    with pytest.raises(UserError, match="no such prompts file"):
        read_prompts(f"{folder.url}/gone.txt")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.txt: no such prompts file"):
        read_prompts(str(tmp_path / "gone.txt"))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match=r"folder\.txt"):
        read_prompts(str(tmp_path / "folder.txt"))
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="no column 'prompt'"):
        list(read_prompts(str(tmp_path / "p.parquet")))


def test_bad_prompts_are_rejected_with_reasons(tmp_path: Path) -> None:
    rows = [
        {"prompt": "good"},
        {"prompt": " \t "},
        {"prompt": "\u200b\u200d"},
        {"prompt": "x" * 2001},
        {"prompt": "bell \x07"},
        {"prompt": "\ud800"},
        {"prompt": 5},
        {"prompt": None},
        {"prompt": "good", "negative_prompt": ["x"]},
        {"prompt": " good\u00a0"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = config_at(tmp_path, prompts=str(tmp_path / "p.jsonl"))
    draft = draft_samples(config)
    assert [sample.prompt for sample in draft.samples] == ["good"]
    assert len(draft.duplicates) == 1
    assert [(item.source.rsplit(":", 1)[1], item.reason) for item in draft.rejected] == [
        ("2", "empty"),
        ("3", "empty"),
        ("4", "longer than 2000 characters"),
        ("5", "control characters"),
        ("6", "not valid Unicode"),
        ("7", "not text"),
        ("8", "empty"),
        ("9", "negative prompt: not text"),
    ]
    dataset = ingest(config)
    generation = dataset.plan.generations[0]
    assert (generation.rejected_count, generation.duplicates_count) == (8, 1)
    assert generation.rejected
    table = decode_table(dataset.folder.read(generation.rejected.name), REJECTED_SCHEMA, "rejected")
    assert table["reason"].to_pylist() == [item.reason for item in draft.rejected]


def test_nothing_usable_or_nothing_given(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": ""}')
    config = config_at(tmp_path, prompts=str(tmp_path / "p.jsonl"))
    with pytest.raises(PlanError, match=r"nothing usable in it; first: .*p\.jsonl:1: empty"):
        ingest(config)
    with pytest.raises(PlanError, match="give prompts or images"):
        draft_samples(config_at(tmp_path))


@settings(max_examples=100)
@given(st.text(max_size=40))
def test_what_is_usable_survives_storage(text: str) -> None:
    if why_unusable(text) is None:
        normal = normalise_prompt(text)
        assert normal
        assert normal.encode("utf-8").decode() == normal
        assert why_unusable(normal) is None
        assert "\n" not in normal
    else:
        assert why_unusable(text) in ("empty", "control characters", "not valid Unicode")


def test_planning_twice_changes_nothing(tmp_path: Path) -> None:
    dataset = planned(tmp_path, ["a", "b", "a", " a  "], tmp_path, replicas=2)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    plan = read_plan(dataset.folder)
    assert [(s.prompt, s.replica) for shard in (0, 1) for s in plan.read(shard)] == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("b", 1),
    ]
    assert ingest(dataset.config).plan == plan
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_new_prompts_append_and_removed_ones_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    planned(tmp_path, ["a", "b", "c"], tmp_path)
    with caplog.at_level(logging.WARNING):
        dataset = planned(tmp_path, ["c", "d", "a", "e", "f"], tmp_path)
    assert "1 planned samples are no longer asked for" in caplog.text
    plan = read_plan(dataset.folder)
    assert [[s.prompt for s in plan.read(shard)] for shard in range(plan.shards)] == [
        ["a", "b"],
        ["c"],
        ["d", "e"],
        ["f"],
    ]
    assert [s.index for shard in range(plan.shards) for s in plan.read(shard)] == list(range(6))


def test_limit_takes_the_first_and_the_rest_can_follow(tmp_path: Path) -> None:
    prompts = ["a", "a", "", "b", "c"]
    assert read_plan(planned(tmp_path, prompts, tmp_path, limit=2).folder).samples == 2
    plan = read_plan(planned(tmp_path, prompts, tmp_path).folder)
    assert [[s.prompt for s in plan.read(shard)] for shard in range(plan.shards)] == [["a", "b"], ["c"]]
    without_source = config_at(tmp_path)
    assert ingest(without_source).plan == plan


def test_keys_do_not_depend_on_order_or_company(tmp_path: Path) -> None:
    one = draft_samples(config_at(tmp_path, prompts=str(_write(tmp_path / "1.txt", "a\nb\n"))))
    two = draft_samples(config_at(tmp_path, prompts=str(_write(tmp_path / "2.txt", "c\nb\na\n"))))
    assert {s.prompt: s.key for s in one.samples}.items() <= {s.prompt: s.key for s in two.samples}.items()
    wide = config_at(tmp_path, prompts=str(tmp_path / "1.txt"), low_res={"height": 16, "width": 32})
    assert not {s.key for s in draft_samples(wide).samples} & {s.key for s in one.samples}


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_native_size_is_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.geometry.geometry_of", lambda model: Geometry(48, 8))
    config = config_at(tmp_path, prompts=str(_write(tmp_path / "p.txt", "a")), low_res={"width": 16})
    (sample,) = draft_samples(config).samples
    assert (sample.height, sample.width) == (48, 16)


def test_racing_planners_of_different_prompts_lose_nothing(tmp_path: Path) -> None:
    configs = [
        config_at(tmp_path, prompts=str(_write(tmp_path / f"{number}.txt", f"shared\nown {number}\n")))
        for number in range(4)
    ]
    barrier, errors = threading.Barrier(4), []

    def run(number: int) -> None:
        barrier.wait()
        try:
            ingest(configs[number])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    plan = ingest(configs[0]).plan
    prompts = [s.prompt for shard in range(plan.shards) for s in plan.read(shard)]
    assert sorted(prompts) == ["own 0", "own 1", "own 2", "own 3", "shared"]


def test_images_become_samples_of_their_own_size(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(png((1, 2, 3), (20, 10)))
    (folder / "a.txt").write_text(" a  barn\n")
    (folder / "b.png").write_bytes(png((4, 5, 6), (8, 8)))
    (folder / "copy of b.png").write_bytes(png((4, 5, 6), (8, 8)))
    (folder / "c.png").write_bytes(b"no image")
    (folder / "d.png").write_bytes(png((7, 8, 9)))
    (folder / "d.txt").write_bytes(b"\xff")
    config = config_at(tmp_path, images=str(folder))
    draft = draft_samples(config)
    assert [(s.prompt, s.height, s.width, s.source) for s in draft.samples] == [
        ("a barn", 10, 20, str(folder / "a.png")),
        ("", 8, 8, str(folder / "b.png")),
    ]
    assert len(draft.duplicates) == 1
    assert [(Path(item.source).name, item.reason.split(" (")[0]) for item in draft.rejected] == [
        ("c.png", "not a readable image"),
        ("d.png", "d.txt: not UTF-8 text; save the file as UTF-8"),
    ]
    plan = ingest(config).plan
    assert plan.read(0)[0].source == str(folder / "a.png")


def duplicates_of(dataset: Dataset, generation: int) -> list[dict[str, Any]]:
    stored = dataset.plan.generations[generation].duplicates
    assert stored
    return decode_table(dataset.folder.read(stored.name), DUPLICATES_SCHEMA, "duplicates").to_pylist()


def test_duplicates_are_listed_with_the_sample_that_they_equal(tmp_path: Path) -> None:
    prompts = ["a", "b", " a ", "", "a", "c", "b"]
    dataset = planned(tmp_path, prompts, tmp_path, replicas=2)
    keys = {sample.prompt: sample.key for shard in range(3) for sample in dataset.plan.read(shard)[:1]}
    path = tmp_path / "prompts.txt"
    assert duplicates_of(dataset, 0) == [
        {"source": f"{path}:{line}", "key": keys[prompt], "first": None}
        for line, prompt in ((3, "a"), (5, "a"), (7, "b"))
    ]
    again = planned(tmp_path, ["c", "d", "d", "c"], tmp_path, replicas=2)
    assert [each["source"] for each in duplicates_of(again, 1)] == [f"{path}:3", f"{path}:4"]
    assert duplicates_of(again, 1)[1]["key"] == keys["c"], "its sample is in the plan of before"
    assert [generation.duplicates_count for generation in again.plan.generations] == [3, 2]
    names = {stored.name for generation in again.plan.generations for stored in generation.objects}
    assert names == {f"plan/{path.relative_to(tmp_path / 'demo' / 'plan')}" for path in tmp_path.rglob("*.parquet")}


def test_images_that_equal_others_are_listed_with_them(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, color in (("a", 1), ("b", 2), ("copy  of a", 1), ("z", 1)):
        (folder / f"{name}.png").write_bytes(png((color, 0, 0)))
    (folder / "a.txt").write_text("a house")
    (folder / "copy  of a.txt").write_text(" a  house\n")
    config = config_at(tmp_path, images=str(folder))
    draft = draft_samples(config)
    assert [Path(sample.source or "").name for sample in draft.samples] == ["a.png", "b.png", "z.png"]
    assert list(map(str, draft.duplicates)) == [f"{folder}/copy  of a.png: equals {folder}/a.png"]
    (row,) = duplicates_of(ingest(config), 0)
    assert row == {
        "source": f"{folder}/copy  of a.png",
        "key": draft.samples[0].key,
        "first": f"{folder}/a.png",
    }
