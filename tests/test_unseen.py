"""Characters that act without being seen: people read them as escapes in every output, and data keep them."""

from __future__ import annotations

import ast
import io
import json
import sys
import unicodedata
from pathlib import Path

import pytest
from PIL import Image
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from rich.table import Table

from resmaster_flows.cli.main import main
from resmaster_flows.watch.page import lines, table
from resmaster_flows.watch.progress import Progress
from resmaster_flows.watch.terminal import SafeConsole, say
from resmaster_stages.dataset import layout
from resmaster_stages.inspection.openmetrics import openmetrics
from resmaster_stages.inspection.status import status
from resmaster_stages.models.licences import Licence, Licensed
from resmaster_stages.progress import ShardFailed, emit, listening
from resmaster_stages.publish import sheets
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.publish.page import ReportSample, render_report
from resmaster_stages.publish.report import write_report
from resmaster_stages.publish.summary import summary
from resmaster_stages.publish.template import fill
from resmaster_stages.redaction import one_line, printable, printable_json, printable_lines
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.sources import unfit
from tests.checkout import ROOT
from tests.fake_stages import FAKES, planned

TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"
"""What Trojan source is made of: bidirectional overrides, isolates and marks."""
WIDTHLESS = "\u200b\u200c\u200d\u2060\ufeff\xad\u034f\u115f\u3164\ufff9\U000e0041"
COMMANDS = "\x00\x07\x1b\x7f\x9b\ud800"
FOREIGN = f"a {'x'.join(TURNING + WIDTHLESS)} cat"
"""What a prompt can hold: control characters are rejected when a build is planned."""


def unseen(text: str) -> set[str]:
    return set(text) & set(TURNING + WIDTHLESS + COMMANDS)


@pytest.mark.parametrize("character", TURNING + WIDTHLESS + COMMANDS)
def test_each_is_shown_by_its_number(character: str) -> None:
    shown = printable(f"pass{character}word")
    assert shown.isascii()
    assert f"{ord(character):x}" in shown
    assert shown.startswith("pass\\")
    assert printable(shown) == shown == one_line(f"pass{character}word")


def test_no_character_without_ink_is_forgotten() -> None:
    """Unicode's table knows them. Format characters that are drawn stay: signs over numbers, joints of hieroglyphs."""
    drawn = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD, *range(0x13430, 0x13440)}
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        acts = unicodedata.category(character) in ("Cc", "Cf", "Cs") and number not in drawn
        if acts:
            assert printable(f"a{character}b").isascii(), hex(number)
        elif unicodedata.category(character)[0] in "LNPS" and not unicodedata.name(character, "FILLER").count("FILLER"):
            assert printable(character) == character, hex(number)


@pytest.mark.parametrize(
    "text", ["an astronaut 👩‍🚀 and a flag 🏳️‍🌈", "می‌خواهم", "क्‍ष", "ﷺ 漢字 éü ½", "שלום عربي", "50 % [red]off[/red]", ""]
)
def test_text_of_every_script_stays_readable(text: str) -> None:
    assert printable(text) == text


def test_joiners_hide_nothing_in_words() -> None:
    assert printable("pay\u200dpal p\u0430y\u200cpal \u200d漢") == "pay\\u200dpal p\u0430y\\u200cpal \\u200d漢"


def test_json_keeps_its_value() -> None:
    value = {"prompt": FOREIGN, "message": COMMANDS, "emoji": "👩‍🚀"}
    shown = printable_json(json.dumps(value, ensure_ascii=False, indent=2))
    assert json.loads(shown) == value
    assert not unseen(shown.replace("👩‍🚀", ""))
    assert "👩‍🚀" in shown
    assert len(shown.splitlines()) == 5


def test_the_report_page() -> None:
    image = Image.new("RGB", (64, 64), "gray")
    captions = [{"y0": 0, "x0": 0, "y1": 64, "x1": 64, "row": 0, "col": 0, "caption": FOREIGN, "status": "ok"}]
    sample = ReportSample(FOREIGN, FOREIGN, image, image, captions, {"flags": [FOREIGN]}, {"from": FOREIGN}, FOREIGN)
    failure = {
        "key": FOREIGN,
        "stage": FOREIGN,
        "error_class": FOREIGN,
        "message": FOREIGN + COMMANDS,
        "command": FOREIGN,
    }
    page = render_report(FOREIGN, {FOREIGN: FOREIGN}, [sample], [failure])
    assert not unseen(page)
    assert page.count("\\u202e") >= 12


def test_the_dataset_card() -> None:
    facts = {
        "name": FOREIGN + COMMANDS,
        "header": FOREIGN,
        "facts": {FOREIGN: FOREIGN},
        "licences": [Licensed(FOREIGN, FOREIGN, Licence(FOREIGN, FOREIGN))],
        "provenance": [FOREIGN],
        "source_type": FOREIGN,
        "images": FOREIGN,
        "further": FOREIGN,
        "recaptions": FOREIGN,
    }
    told = {"listed": 1, "xmp": True, "curated": True, "chosen": True, "captions": True}
    told |= {"features": FOREIGN, "columns": [], "flags": []}
    card = fill("card.md", **facts, **told)
    assert not unseen(card)
    assert "\\u202e" in card


def test_the_contact_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    fit = sheets._fit
    monkeypatch.setattr(sheets, "_fit", lambda *arguments: drawn.append(fit(*arguments)) or drawn[-1])
    image = Image.new("RGB", (64, 64), "gray")
    sheets.contact_sheet([ReportSample("k", "\u202e cat", image, image, quality={"flags": ["\u200b"]})], "\u2066 set")
    assert drawn == ["\\u2066 set", "\\u202e cat", "k \\u200b"]


def test_the_prefect_page() -> None:
    progress, logged = Progress({"high_res": 2}, [0, 1]), []
    with listening(progress.hear), listening(lines(progress, logged.append)):
        emit(ShardFailed(0, f"{FOREIGN}{COMMANDS}"))
    assert not unseen(json.dumps(table(progress), ensure_ascii=False) + "".join(logged))
    assert "\\u202e" in logged[0]


@pytest.mark.parametrize("on_a_terminal", [False, True])
def test_the_terminal_in_lines_and_tables(on_a_terminal: bool) -> None:
    out = io.StringIO()
    console = SafeConsole(file=out, force_terminal=on_a_terminal, no_color=True, width=400)
    say(console, f"{FOREIGN}{COMMANDS}\nsecond line")
    cells = Table("head \x1b[2J\u202e", box=None)
    cells.add_row(f"{FOREIGN} \x1b]0;owned\x07")
    console.print(cells)
    text = out.getvalue()
    assert not unseen(text) - ({"\x1b"} if on_a_terminal else set())
    assert "\x1b]0;" not in text
    assert "\x1b[2J" not in text
    assert text.count("\\u202e") == 3
    assert "second line" in text.splitlines()[1]


def test_no_command_makes_a_console_that_shows_them_raw() -> None:
    for path in sorted((ROOT / "flows").rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert "Console" not in {call.func.id for call in calls if isinstance(call.func, ast.Name)}, path


def test_a_build_shows_them_and_its_data_keep_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the prompts file to each thing that people read: explain, summary, report, card, metrics."""
    prompts = [FOREIGN, "bad high_res \u202e cat"]
    dataset = planned(tmp_path / "out", prompts, tmp_path)
    for stage, process in FAKES.items():
        run_stage(dataset, stage, 0, process=process, provenance={"gpu": "\u202e\x1b[2J gpu"})
    write_manifest(dataset)
    write_report(dataset)
    (key,) = [sample.key for sample in dataset.plan.read(0) if sample.prompt == prompts[0]]

    assert main(["explain", dataset.url, key]) == 0
    assert "\\u202e" in (text := capsys.readouterr().out)
    assert not unseen(text)
    assert main(["explain", dataset.url, key, "--json"]) == 0
    assert not unseen(text := capsys.readouterr().out)
    assert prompts[0] in json.dumps(json.loads(text), ensure_ascii=False), "JSON keeps the value"

    metrics = openmetrics(dataset)
    assert not unseen(metrics)
    names = {
        value
        for family in text_string_to_metric_families(metrics)
        for s in family.samples
        for value in s.labels.values()
    }
    assert "\\u202e\\x1b[2J gpu" in names

    for page in (
        summary(dataset, status(dataset)),
        *(dataset.folder.read(name).decode() for name in (layout.REPORT_PAGE, layout.CARD)),
    ):
        assert not unseen(page)
    assert prompts[0].encode() in dataset.folder.read(layout.MANIFEST), "data stay as they are"


def test_words_of_the_command_line_come_back_visible(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["status", "--nonsense\x1b]0;owned\x07\u202e"])
    assert not unseen(text := capsys.readouterr().err)
    assert "--nonsense\\x1b]0;owned\\x07\\u202e" in text


def test_an_image_is_not_turned_down_for_a_mark_in_its_name() -> None:
    """Chat programs put a direction mark before the names of images."""
    assert not unfit("\u200eIMG 1.png", 1, 10)
    assert unfit("a\x1b.png", 1, 10)


def test_lines_stay_lines() -> None:
    assert printable_lines("a\u202e\nb\tc") == "a\\u202e\nb\\tc"
