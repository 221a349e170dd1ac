"""Records of wrong types, with wrong numbers or foreign names are damaged records, whatever reads them."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import Receipt, StoredObject
from resmaster_stages.dataset.plan import find_plan
from resmaster_stages.dataset.publication import PublicationRecord
from resmaster_stages.dataset.records import parse_record, parse_values, record_text, signed, unsigned
from resmaster_stages.errors import PlanError
from tests.fake_stages import planned

OBJECT = StoredObject("low_res/000000-00000000.tar", "0" * 64, 7)
RECEIPT = Receipt(
    "low_res", "ab" * 32, 0, "0" * 8, 0, 2, 1, ("k",), "0" * 64, {"a": "b"}, "2026-11-28T12:00:00+00:00", (OBJECT,)
)
PUBLICATION = PublicationRecord("0" * 64, (OBJECT,), replace(OBJECT, name=layout.CONFIG), {"a": "b"}, 2)


def changed(values: Any) -> Iterator[Any]:
    """`values` with one value in them replaced by one of another type, or with one key misspelled."""
    for name in values if isinstance(values, dict) else range(len(values)):
        inner = values[name]
        for other in (None, "x", "1", [[1]], {"a": [1]}, 1.5):
            if not isinstance(other, type(inner)) and (name, other) not in (("ledger", None), ("seconds", 1.5)):
                yield {**values, name: other} if isinstance(values, dict) else [other]
        if isinstance(inner, (dict, list)):
            for each in changed(inner):
                yield {**values, name: each} if isinstance(values, dict) else [each]
        if isinstance(values, dict) and name != "a":
            yield {(f"{name}x" if key == name else key): value for key, value in values.items()}


@pytest.mark.parametrize("record", [RECEIPT, PUBLICATION])
def test_values_of_other_types_and_other_names_are_refused(record: Any) -> None:
    assert parse_record(type(record), record_text(record)) == record
    written = json.loads(unsigned(record_text(record)))
    values = {name: value for name, value in written.items() if name not in ("ledger", "provenance")}
    assert parse_values(type(record), json.dumps(values).encode()), "all else is refused for its own sake"
    tried = list(changed(values))
    assert len(tried) > 10
    for each in tried:
        with pytest.raises(ValueError, match=": ") as caught:
            parse_values(type(record), json.dumps(each).encode())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("record", [RECEIPT, PUBLICATION])
def test_any_change_to_a_record_is_noticed(record: Any) -> None:
    text = record_text(record)
    for at in range(len(text)):
        for bit in (0, 3, 6):
            with pytest.raises(ValueError, match=": "):
                parse_record(type(record), text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1 :])
        with pytest.raises(ValueError, match=": "):
            parse_record(type(record), text[:at])
    for without in (unsigned(text), json.dumps(json.loads(text)).encode()):
        with pytest.raises(ValueError, match="sha256: is not at the end"):
            parse_record(type(record), without)
    changed = text.replace(b'"a": "b"', b'"a": "c"')
    assert changed != text
    with pytest.raises(ValueError, match="sha256: differs, so the file was changed since it was written"):
        parse_record(type(record), changed)


@pytest.mark.parametrize("text", [b"", b"{", b"null", b"[]", b"{}", b"\xff", b"NaN", b"1" * 5000, b"[" * 100_000])
def test_what_is_no_record_is_refused(text: bytes) -> None:
    for parse in (parse_record, parse_values):
        with pytest.raises(ValueError, match=": "):
            parse(Receipt, text)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "a\0b"])
def test_a_name_that_leads_out_of_the_dataset_is_refused(name: str) -> None:
    for values in ({"objects": [{**asdict(OBJECT), "name": name}]}, {"ledger": name}):
        with pytest.raises(ValueError, match="cannot be a name in the dataset"):
            parse_values(Receipt, json.dumps({**asdict(RECEIPT), **values}).encode())


@pytest.mark.parametrize(
    "values", [{"number": 0}, {"number": -1}, {"finished_at": ""}, {"finished_at": "2026-11-28"}, {"objects": []}]
)
def test_numbers_and_times_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    """Number 0 has the file name of number 1, so that a reader would never come to an end."""
    with pytest.raises(ValueError, match=next(iter(values))):
        parse_values(Receipt, json.dumps({**asdict(RECEIPT), **values}).encode())


@pytest.mark.parametrize("facts", [{"device": None}, {"unet": {"rows": "x"}}, {"versions": []}])
def test_facts_of_other_types_are_refused(facts: dict[str, Any]) -> None:
    good = {"device": {"idle_share": 0.5}, "unet": {"rows": 1}, "versions": {"torch": "2"}, "flow_run": None}
    assert parse_values(Receipt, json.dumps({**asdict(RECEIPT), "provenance": good}).encode()).provenance == good
    with pytest.raises(ValueError, match=f"provenance: .*{next(iter(facts))}"):
        parse_values(Receipt, json.dumps({**asdict(RECEIPT), "provenance": {**good, **facts}}).encode())


@pytest.mark.parametrize(
    "values",
    [
        {"samples": 10**30},
        {"samples": -1},
        {"samples_per_shard": 0},
        {"first_shard": 1},
        {"number": 1},
        {"parts": []},
        {"duplicates_count": None},
    ],
)
def test_a_plan_whose_numbers_contradict_each_other_is_damaged(values: dict[str, Any], tmp_path: Path) -> None:
    folder = planned(tmp_path / "out", ["a", "b", "c"], tmp_path).folder
    name = layout.plan_record(0)
    folder.write(name, signed({**json.loads(unsigned(folder.read(name))), **values}, indent=1))
    with pytest.raises(PlanError, match=r"_PLAN\.json: damaged \(.*\); restore it from a copy"):
        find_plan(folder)
