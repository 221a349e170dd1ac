import csv
import io
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resmaster_stages.errors import PlanError, UserError
from resmaster_stages.planning.drafts import draft_samples, why_unusable
from resmaster_stages.planning.prompt_files import RawPrompt, read_prompts
from resmaster_stages.storage.filesystem import Folder, open_root
from tests.fake_stages import config_at

GOOD = "a prompt that is good"
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)


TEXT_KIND = pa.string()


def stored(name: str, data: bytes) -> str:
    """The URL of a new file in memory."""
    folder = open_root(f"memory://{uuid.uuid4().hex}")
    folder.write(name, data)
    return folder.url_of(name)


def read(name: str, data: bytes) -> list[RawPrompt]:
    return list(read_prompts(stored(name, data)))


def parquet(columns: dict[str, Any] | pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), sink, **options)
    return sink.getvalue()


def not_utf8(kind: pa.DataType = TEXT_KIND) -> pa.Array:
    """A column with text that is not UTF-8 in its second row. Its other rows are good text and null."""
    offsets, values = pa.array(
        [b"ok", b"caf\xe9", None], {pa.string(): pa.binary()}.get(kind, pa.large_binary())
    ).buffers()[1:]
    validity = pa.array([True, True, None]).buffers()[0]
    return pa.Array.from_buffers(kind, 3, [validity, offsets, values])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (",prompt\n0,a red house\n1,a barn\n", [("a red house", 2), ("a barn", 3)]),  # pandas' index
        (",,prompt\n0,0,a red house\n", [("a red house", 2)]),  # an index of two levels
        ("prompt,,\na red house,,\n", [("a red house", 2)]),  # Excel's trailing commas
        ("prompt\na red house,, \n", [("a red house", 2)]),
        ("id,,prompt\n1,x,a red house\n", [("a red house", 2)]),
        ("prompt,prompt 2,id,id\na,b,1,2\n", [("a", 2)]),
        ("id,prompt,negative_prompt\n1\n2,a\n\n3,b,c\n", [(None, 2), ("a", 3), ("b", 5)]),
        ("\n \n,,\nprompt,x\na,\n", [("a", 5)]),
        ('prompt,x\n"a\nb",1\nc,2\n', [("a\nb", 3), ("c", 4)]),
        ("prompt\na\x0cb\u2028c\x85d\n", [("a\x0cb\u2028c\x85d", 2)]),
        (f"prompt,x\na,{'y' * 140_000}\n", [("a", 2)]),
        ("prompt\nnan\n", [("nan", 2)]),
    ],
)
def test_csv_as_programs_write_it(text: str, expected: list[tuple[str, int]]) -> None:
    for data in (text.encode(), text.encode("utf-8-sig")):
        assert [(raw.prompt, raw.row) for raw in read("p.csv", data)] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,,\na red house, with a door,\n", "line 2: text in a last column that has no name; put"),
        ("prompt,\na red house,checked\n", "line 2: text in a last column that has no name; put"),
        (",prompt\n0,a,b\n", "line 2: more cells than columns"),
        ("prompt,id,prompt\na,1,b\n", "has 'prompt' 2 times; keep one"),
        ("prompt, \ufeffprompt\na,b\n", "has 'prompt' 2 times; keep one"),
        ("prompt,negative_prompt,negative_prompt \na,b,c\n", "has 'negative_prompt' 2 times; keep one"),
        ('prompt\na\n"never closed\n\nb\n', "line 3: not valid CSV .a quote in this row is never closed"),
        (
            "prompt;id\na;1\n",
            "has no column 'prompt' .found: prompt;id.; separate the columns by commas, not by semico",
        ),
        ('id\t"prompt"\n1\ta, b\n', "has no column 'prompt' .* not by tabs"),
        ("sep=;\nid;prompt\n1;a\n", "has no column 'prompt' .* not by semicolons"),
        ("a cat; a prompt\n", "has no column 'prompt' .* name the column with the prompts so"),
        (",,\n", "has no column 'prompt' .found: none"),
    ],
)
def test_csv_that_would_lose_something_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"p\.csv: {message}"):
        read("p.csv", text.encode())


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_every_system(end: str) -> None:
    lines = ["a", "", "b\x0c\u2028\x85\x1e.", "c"]
    expected = [("a", 1), ("b\x0c\u2028\x85\x1e.", 3), ("c", 4)]
    text = read("p.txt", end.join(lines).encode())
    assert [(raw.prompt, int(raw.source.rpartition(":")[2])) for raw in text] == expected
    objects = [line and json.dumps({"prompt": line}, ensure_ascii=False) for line in lines]
    assert [(raw.prompt, raw.row) for raw in read("p.jsonl", end.join(objects).encode())] == expected
    mixed = read("p.txt", b"\xef\xbb\xbfa\rb\r\nc\nd\r")
    assert [raw.prompt for raw in mixed] == ["a", "b", "c", "d"]


def test_other_encodings_are_named_by_line() -> None:
    for encoding in ("utf-16", "utf-16-le", "utf-32", "latin-1"):
        for name in ("p.txt", "p.csv", "p.jsonl"):
            with pytest.raises(UserError, match=r"line 1: not (UTF-8 text|a text file)"):
                read(name, "prompt\ncafé\n".encode(encoding) if encoding != "latin-1" else b"caf\xe9\nprompt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("p.csv.gz", "is compressed; unpack it first"),
        ("p.jsonl.zst", "is compressed; unpack it first"),
        ("p.TSV", r"unknown kind of prompts file; known: \.txt, \.csv, \.jsonl, \.parquet"),
        ("p.ndjson", r"unknown kind of prompts file; known: \.txt, \.csv, \.jsonl, \.parquet"),
        ("p.json", "unknown kind"),
        ("p.xlsx", "unknown kind"),
    ],
)
def test_other_kinds_of_file(name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"{name}: .*{message}"):
        read(name, b'{"prompt": "a"}')
    assert [raw.prompt for raw in read("P.CSV", b"prompt\na\n")] == ["a"]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")  # would keep its reader waiting
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "folder").mkdir()
    kinds = {
        "pipe.txt": "no regular file",
        "zero.txt": "no regular file",
        "folder.csv": "a folder",
        "folder": "a folder",
    }
    for name, message in kinds.items():
        with pytest.raises(UserError, match=f"{name}: is {message}; give a file of prompts"):
            read_prompts(str(tmp_path / name))
    (tmp_path / "nothing.txt").symlink_to("gone.txt")
    (tmp_path / "itself.txt").symlink_to("itself.txt")
    (tmp_path / "a.txt").write_text("a")
    for name in ("nothing.txt", "itself.txt", "a\0.txt", "gone/p.txt"):
        with pytest.raises(UserError, match="no such prompts file; check the path"):
            read_prompts(str(tmp_path / name))
    for name in ("a.txt/p.txt", "p" * 300 + ".txt"):
        with pytest.raises(UserError):
            read_prompts(str(tmp_path / name))


NAMES = [
    "fo::ld?er #1/p.txt",
    "a::b.txt",
    "file::b.txt",
    "a#b.txt",
    "a?b.txt",
    "a*b.txt",
    "a%20b.txt",
    "[a].txt",
    "x.tar#y.txt",
    "ü ~.txt",
]


@pytest.mark.parametrize("store", ["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def test_any_name_opens_the_file_of_that_name(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    roots = {"local": lambda: str(tmp_path), "memory": lambda: f"memory://{uuid.uuid4().hex}"}
    folder: Folder = open_root(roots[store]() if store in roots else request.getfixturevalue("s3_root"))
    for name in NAMES:
        folder.write(name, name.encode())
    for name in NAMES:
        url = folder.url_of(name)
        assert [raw.prompt for raw in read_prompts(url)] == [name]
        assert [sample.prompt for sample in draft_samples(config_at(tmp_path, prompts=url)).samples] == [name]


ABSENT = {"prompt": "a", "negative_prompt": float("nan"), "detail_mask": float("nan")}


def test_nothing_has_many_spellings(tmp_path: Path) -> None:
    spellings = [None, float("nan"), "", " \t"]
    rows = [{**ABSENT, name: value} for name in ABSENT for value in spellings]
    rows += [{"prompt": f"b {number}", "negative_prompt": value} for number, value in enumerate(spellings)]
    files = {
        "p.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "p.parquet": parquet(
            {
                "prompt": ["a", "b", None],
                "negative_prompt": [float("nan"), None, float("nan")],
                "detail_mask": pa.array([float("nan"), None, float("nan")], pa.float32()),
            }
        ),
        "q.parquet": parquet({"prompt": ["a"], "negative_prompt": pa.nulls(1), "detail_mask": pa.nulls(1)}),
        "r.parquet": parquet({"prompt": ["a"], "negative_prompt": pa.array([None], pa.timestamp("ns"))}),
        "p.csv": b"prompt,negative_prompt,detail_mask\na,,\nb, , \n,,\n",
    }
    for name, data in files.items():
        draft = draft_samples(config_at(tmp_path, prompts=stored(name, data)))
        assert {sample.prompt.split()[0] for sample in draft.samples} <= {"a", "b"}
        assert {(sample.negative_prompt, sample.source) for sample in draft.samples} == {("", None)}
        assert {rejected.reason for rejected in draft.rejected} <= {"empty"}
        assert len(draft.rejected) == {"p.jsonl": 4, "q.parquet": 0, "r.parquet": 0}.get(name, 1)
    bad = b'{"prompt": "a"}\n{"prompt": 5}\n{"prompt": "a", "negative_prompt": 0.5}\n{"prompt": Infinity}\n'
    draft = draft_samples(config_at(tmp_path, prompts=stored("p.jsonl", bad)))
    assert [rejected.reason for rejected in draft.rejected] == ["not text", "negative prompt: not text", "not text"]


def test_numbers_of_any_length_cost_no_file() -> None:
    digits = b"9" * 5000
    rows = b'{"prompt": "a", "id": ' + digits + b'}\n{"prompt": ' + digits + b'}\n{"prompt": "b", "id": 1}\n'
    assert [raw.prompt for raw in read("p.jsonl", rows)] == ["a", float("inf"), "b"]


def test_a_name_twice_in_an_object_is_refused() -> None:
    with pytest.raises(UserError, match="line 2: has 'prompt' 2 times; keep one"):
        read("p.jsonl", b'{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}\n')
    nested = b'{"prompt": "a", "x": {"prompt": 1, "prompt": 2}, "y": 1, "y": 2}'
    assert [raw.prompt for raw in read("p.jsonl", nested)] == ["a"]
    with pytest.raises(UserError, match='line 1: no "prompt"'):
        read("p.jsonl", b'[["prompt", "a"]]')


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), "dictionary"])
def test_text_in_parquet_that_is_not_utf8_costs_its_row(tmp_path: Path, kind: Any) -> None:
    column = not_utf8().dictionary_encode() if kind == "dictionary" else not_utf8(kind)
    path = stored("p.parquet", parquet({"prompt": column, "x": not_utf8()}))
    draft = draft_samples(config_at(tmp_path, prompts=path))
    assert [sample.prompt for sample in draft.samples] == ["ok"]
    assert [str(rejected) for rejected in draft.rejected] == [
        f"{path}: row 2: not valid Unicode 'caf?'",
        f"{path}: row 3: empty",
    ]
    path = stored("p.parquet", parquet({"prompt": ["a", "b", "c"], "negative_prompt": column}))
    draft = draft_samples(config_at(tmp_path, prompts=path))
    assert [sample.prompt for sample in draft.samples] == ["a", "c"]
    assert [rejected.reason for rejected in draft.rejected] == ["negative prompt: not valid Unicode"]


COLUMNS: list[Any] = [
    pa.array([b"x"], pa.binary()),
    pa.array([b"x"], pa.large_binary()),
    pa.array([b"x"], pa.binary()).cast(pa.binary_view()),
    pa.array([b"x"], pa.binary(1)),
    pa.array([b"x"]).dictionary_encode(),
    pa.array([2**62], pa.timestamp("ns")),
    pa.array([2**62], pa.timestamp("us", tz="Nowhere/Never")),
    pa.array([2**31 - 1], pa.date32()),
    pa.array([1], pa.time64("ns")),
    pa.array([2**62], pa.duration("us")),
    pa.array([2**63], pa.uint64()),
    pa.array([True]),
    pa.array([0.5], pa.float16()),
    pa.array([1]).cast(pa.decimal128(30, 2)),
    pa.array([["x"]]),
    pa.array([["x"]], pa.list_(pa.string(), 1)),
    pa.array([{"bytes": b"x", "path": "x"}]),
    pa.array([[("x", "y")]], pa.map_(pa.string(), pa.string())),
    pa.array(["{}"], pa.json_()),
    pa.ListArray.from_arrays([0, 3], not_utf8()),
]


@pytest.mark.parametrize("column", COLUMNS, ids=[str(column.type) for column in COLUMNS])
def test_columns_of_other_kinds_cost_their_rows(tmp_path: Path, column: pa.Array) -> None:
    nothing = pa.nulls(1, column.type)
    prompts = pa.chunked_array([column, nothing])
    others = pa.chunked_array([nothing, column])
    path = stored("p.parquet", parquet({"prompt": prompts, "negative_prompt": others}))
    with pytest.raises(PlanError, match=r"nothing usable in it; first: .* row 1: not text"):
        draft_samples(config_at(tmp_path, prompts=path))
    path = stored("p.parquet", parquet({"prompt": ["a", "b"], "negative_prompt": others, "x": prompts}))
    draft = draft_samples(config_at(tmp_path, prompts=path))
    assert [sample.prompt for sample in draft.samples] == ["a"]
    assert [rejected.reason for rejected in draft.rejected] == ["negative prompt: not text"]


def test_text_of_every_kind_is_read_from_parquet() -> None:
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        column = pa.array(["ü", None, "b"]).cast(kind)
        assert [raw.prompt for raw in read("p.parquet", parquet({"prompt": column}))] == ["ü", None, "b"]


def test_columns_of_parquet_that_are_not_clear_are_refused() -> None:
    values = [pa.array(["a"]), pa.array(["b"])]
    for names in (["prompt", "prompt"], ["prompt", " prompt"], ["\ufeffprompt", "prompt"]):
        with pytest.raises(UserError, match="has 'prompt' 2 times; keep one"):
            read("p.parquet", parquet(pa.Table.from_arrays(values, names)))
    with pytest.raises(UserError, match="the column 'prompt ' has blanks around its name; name it 'prompt'"):
        read("p.parquet", parquet({"prompt ": ["a"]}))
    odd = pa.Table.from_arrays([*values, *values], ["prompt", "prompt.x", "x", "x"])
    assert [raw.prompt for raw in read("p.parquet", parquet(odd))] == ["a"]


def test_a_huge_cell_costs_its_row(tmp_path: Path) -> None:
    data = parquet({"prompt": ["a", "b" * 20_000_000]}, compression="zstd")
    draft = draft_samples(config_at(tmp_path, prompts=stored("p.parquet", data)))
    assert [rejected.reason for rejected in draft.rejected] == ["longer than 2000 characters"]


def write_csv(prompts: list[str], end: str, index: bool, spare: int) -> bytes:
    """CSV as Python and pandas write it; `spare`: columns without a name at the end, as Excel leaves them."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL)
    for number, cells in enumerate([["prompt"], *([prompt] for prompt in prompts)]):
        writer.writerow(([str(number) if number else ""] if index else []) + cells + [""] * spare)
    return text.getvalue().encode()


def write_jsonl(prompts: list[str], ascii_only: bool) -> bytes:
    return "\n".join(json.dumps({"id": 1, "prompt": prompt}, ensure_ascii=ascii_only) for prompt in prompts).encode()


def write_parquet(prompts: list[str], kind: pa.DataType, rows: int) -> bytes:
    return parquet({"i": range(len(prompts)), "prompt": pa.array(prompts).cast(kind)}, row_group_size=rows)


WRITERS: dict[str, st.SearchStrategy[Callable[[list[str]], bytes]]] = {
    "p.csv": st.builds(
        lambda *options: lambda prompts: write_csv(prompts, *options),
        st.sampled_from(["\n", "\r\n", "\r"]),
        st.booleans(),
        st.integers(0, 2),
    ),
    "p.jsonl": st.builds(lambda option: lambda prompts: write_jsonl(prompts, option), st.booleans()),
    "p.parquet": st.builds(
        lambda *options: lambda prompts: write_parquet(prompts, *options),
        st.sampled_from([pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]),
        st.integers(1, 3),
    ),
}


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=60)
@given(st.data())
def test_what_programs_write_is_read_back_and_every_row_accounted_for(name: str, data: st.DataObject) -> None:
    prompts = [*data.draw(st.lists(TEXT, max_size=6)), GOOD]
    path = stored(name, data.draw(WRITERS[name])(prompts))
    assert [raw.prompt for raw in read_prompts(path)] == [text if text.strip() else None for text in prompts]
    draft = draft_samples(config_at("memory://nowhere", prompts=path))
    assert len(draft.samples) + len(draft.rejected) + len(draft.duplicates) == len(prompts)
    assert {duplicate.key for duplicate in draft.duplicates} <= {sample.key for sample in draft.samples}


@settings(max_examples=60)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r\n\ufeff"), max_size=6), max_size=6
    ),
    st.lists(st.sampled_from(["\n", "\r\n", "\r"]), min_size=7, max_size=7),
)
def test_every_line_of_text_is_accounted_for(lines: list[str], ends: list[str]) -> None:
    data = "".join(line + end for line, end in zip([*lines, GOOD], ends)).encode()
    path = stored("p.txt", data)
    rows = [line for line in [*lines, GOOD] if line.strip()]
    assert [raw.prompt for raw in read_prompts(path)] == rows
    draft = draft_samples(config_at("memory://nowhere", prompts=path))
    assert len(draft.samples) + len(draft.rejected) + len(draft.duplicates) == len(rows)


PIECES = [
    *[b"prompt", b"negative_prompt", b",", b'"', b"\r", b"\n", b"a", b" ", b"\xef\xbb\xbf", b"\xff", b"\0", b"\x1a"],
    *[b'{"prompt": "a"}', b'{"prompt":', b"}", b"[", b"NaN", b"null", b"\xed\xa0\x80", b"\\ud800", "ü\u2028".encode()],
]


def rows_or_error(path: str) -> list[RawPrompt]:
    """The rows of a file; none if it is refused, in one line that begins with its name."""
    try:
        return list(read_prompts(path))
    except UserError as error:
        message = str(error)
    assert message.startswith(path)
    assert "\n" not in message
    return []


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl", "p.parquet"])
@settings(max_examples=100)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join) | st.binary(max_size=40))
def test_any_bytes_are_rows_or_one_line_of_error(name: str, data: bytes) -> None:
    path = stored(name, data)
    if (rows := rows_or_error(path)) and any(why_unusable(row.prompt) is None for row in rows):
        draft = draft_samples(config_at("memory://nowhere", prompts=path))
        assert len(draft.samples) + len(draft.rejected) + len(draft.duplicates) == len(rows)


WHOLE = [
    parquet({"prompt": ["a", "ü", "a"], "negative_prompt": pa.array(["x", None, "y"]).dictionary_encode()}),
    parquet(
        {"id": [[1], [2]], "prompt": ["a", "b"]}, compression="none", use_dictionary=False, data_page_version="2.0"
    ),
]


@settings(max_examples=100)
@given(
    st.sampled_from(WHOLE),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damaged_parquet_is_rows_or_one_line_of_error(whole: bytes, changes: list[tuple[int, int]]) -> None:
    data = bytearray(whole)
    for place, value in changes:
        data[place % len(data)] = value
    path = stored("p.parquet", bytes(data))
    rows = rows_or_error(path)
    assert [row.row for row in rows] == list(range(1, len(rows) + 1))
