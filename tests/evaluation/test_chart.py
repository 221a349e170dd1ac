"""The chart of quality against rows."""

import importlib.util
from typing import Any
from xml.etree import ElementTree

import pytest

from resmaster_stages.config.method import methods
from resmaster_stages.evaluation.chart import BEST, BOTH, OTHER, Point, chart, front, points, ticks
from resmaster_stages.evaluation.page import markdown
from tests.checkout import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def row(method: str, rows: float | None, fid_r: float | None, fid_c: float | None = 10.0) -> dict[str, Any]:
    return {"method": method, "dataset": f"d-{method}", "unet_native_rows": rows, "fid_r": fid_r, "fid_c": fid_c}


ROWS = [
    row("lanczos", None, 20.0, 40.0),
    row("fast <b>", 100.0, 10.0, 10.0),
    row("slow", 1000.0, 5.0, 5.0),
    row("worse", 1000.0, 30.0, 9.0),
    row("not measured", 10.0, None, None),
    {"method": "(real images)", "dataset": "", "unet_native_rows": None, "fid_r": 2.0, "fid_c": 8.0},
]


def test_the_front_is_what_no_other_point_beats() -> None:
    found = [Point("a", 10, 5), Point("b", 10, 4), Point("c", 20, 4), Point("d", 30, 3), Point("e", 40, 9)]
    assert [point.label for point in front(found)] == ["b", "d"]


def test_points_are_methods_with_a_value_and_real_images_are_none_of_them() -> None:
    assert points(ROWS, "fid_r") == [
        Point("lanczos", 0.0, 20.0),
        Point("fast <b>", 100.0, 10.0),
        Point("slow", 1000.0, 5.0),
        Point("worse", 1000.0, 30.0),
    ]
    assert points(ROWS, BOTH)[0].value == pytest.approx((20 * 40) ** 0.5)


def test_the_chart_places_methods_by_rows_and_quality() -> None:
    drawn = chart("Quality & rows", ROWS)
    assert drawn is not None
    root = ElementTree.fromstring(drawn)
    marks: dict[str, list[tuple[float, float, str]]] = {}
    for circle in root.iter(f"{SVG}circle"):
        name = circle.find(f"{SVG}title")
        assert name is not None
        assert name.text
        place = float(circle.attrib["cx"]), float(circle.attrib["cy"]), circle.attrib["fill"]
        marks.setdefault(name.text, []).append(place)
    assert {name: len(each) for name, each in marks.items()} == dict.fromkeys(
        ["lanczos", "fast <b>", "slow", "worse"], 3
    )
    for panel in range(3):
        assert marks["lanczos"][panel][0] < marks["fast <b>"][panel][0] < marks["slow"][panel][0]
        assert marks["slow"][panel][0] == marks["worse"][panel][0]
        assert marks["slow"][panel][1] > marks["fast <b>"][panel][1]  # better is lower
    colours = {}
    for name, each in marks.items():
        by_height = sorted(each, key=lambda mark: mark[1])  # the panel of both stands above the others
        colours[name] = by_height[0][2]
    assert colours == {"lanczos": BEST, "fast <b>": BEST, "slow": BEST, "worse": OTHER}
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts.count("real images") == 3
    assert texts.count("none") == 3
    assert "Quality & rows" in texts
    for name in marks:
        assert texts.count(name) == 3


def test_names_of_crowded_points_do_not_cover_one_another() -> None:
    drawn = chart("t", [row(f"method_{number}", 500 + number, 10.0 + number / 100) for number in range(9)])
    assert drawn is not None
    names = [text for text in ElementTree.fromstring(drawn).iter(f"{SVG}text") if "method_" in (text.text or "")]
    assert len(names) == 27
    places = [(float(text.attrib["x"]), float(text.attrib["y"])) for text in names]
    for number, (x, y) in enumerate(places):
        for other_x, other_y in places[number + 1 :]:
            assert abs(x - other_x) > 40 or abs(y - other_y) > 9


def test_without_distances_there_is_no_chart() -> None:
    assert chart("t", [row("direct", 10.0, None, None)]) is None
    assert chart("t", []) is None
    equal = chart("t", [row("direct", 10.0, 0.0, None)])
    assert equal is not None
    assert equal.count("<circle") == 1


def test_ticks_are_one_two_and_five() -> None:
    assert ticks(3, 120) == [5, 10, 20, 50, 100]


def test_the_chart_of_the_docs_is_that_of_the_table_of_results() -> None:
    spec = importlib.util.spec_from_file_location("chart_of_docs", ROOT / "docs" / "chart.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.CHART.read_text() == script.drawn(), "run python docs/chart.py"
    rows = script.rows_of(script.PAGE.read_text())
    names = {row["method"].split(",")[0] for row in rows}
    assert set(methods()) <= names, "every method is on the chart"
    assert "](" not in "".join(names)


def test_the_page_shows_the_chart_of_its_scale() -> None:
    rows = [{**row("direct", 1.0, 2.0), "scale": "2x2", "samples": 3, "height": 8, "width": 8}]
    rows[0] |= {"features": "clip", "reference": "r", "reference_samples": 3}
    page = markdown("t", rows, {"2x2": "sheet.png"}, {"2x2": "chart-2x2.svg"})
    assert page.index("![quality against rows](chart-2x2.svg)") < page.index("sheet.png")
    assert "chart" not in markdown("t", rows, {"2x2": "sheet.png"})
