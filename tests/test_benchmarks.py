"""The benchmarks of the methods run, and their numbers are those of the work."""

from collections.abc import Callable

import pytest

from benchmarks import methods, peers
from resmaster_stages.config import METHODS

Run = Callable[..., list[dict[str, str]]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs it with some options: the rows of the table that it prints, by heading."""

    def rows(*words: str, main: Callable[[list[str]], None] = methods.main) -> list[dict[str, str]]:
        main(list(words))
        lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert set(lines[1]) <= {"---", "---:"}
        return [dict(zip(lines[0], [cell.strip() for cell in line])) for line in lines[2:]]

    return rows


@pytest.mark.slow
def test_picturebook_side_by_side(run: Run) -> None:
    rows = run("--scales", "1.25", "--steps", "2")
    assert [row["method"] for row in rows] == list(METHODS)
    by_method = {row["method"]: row for row in rows}
    assert by_method["direct"]["UNet calls, 1.25x"] == "2"
    assert by_method["direct"]["native rows, 1.25x"] == "6"  # 2 steps x 2 branches x 1.25 squared
    assert by_method["multidiffusion"]["native rows, 1.25x"] == "16"  # 2 steps x 2 branches x 4 views
    assert by_method["super_resolution"]["UNet calls, 1.25x"] == "0"
    assert all(float(row["seconds, 1.25x"]) >= 0 for row in rows)
    if methods.CLEAR.exists():
        assert all(float(row["peak GB, 1.25x"]) > 0.1 for row in rows)


@pytest.mark.slow
def test_presets_side_by_side_and_where_the_time_goes(capsys: pytest.CaptureFixture[str]) -> None:
    methods.main(["--methods", "resmaster,resmaster:accelerated", "--scales", "1.25", "--steps", "50", "--parts"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    table, parts = lines[:4], lines[4:]
    rows = [dict(zip(table[0], cells)) for cells in table[2:]]
    assert [row["native rows, 1.25x"] for row in rows] == ["400", str(11 * 4 * 2 + 7 * 4)]
    assert parts[0] == ["method", "scale", "image prompts", "VAE encoder", "text", "UNet", "VAE decoder", "rest"]
    for cells, row in zip(parts[2:], rows):
        shares = [float(cell.rstrip("%")) for cell in cells[2:]]
        assert sum(shares) == pytest.approx(100, abs=0.5)
        assert round(shares[3]) == pytest.approx(float(row["UNet share, 1.25x"].rstrip("%")), abs=1)
        assert shares[3] == max(shares)


@pytest.mark.slow
def test_an_sdxl_of_random_weights_and_counted_operations(run: Run) -> None:
    """The part for GPUs, on a CPU: the same code with SDXL's channels divided by 20."""
    some = "direct,resmaster,scalecrafter,freescale"
    rows = run("--model", "sdxl", "--shrink", "16", "--methods", some, "--scales", "2", "--steps", "2", "--flops")
    assert [row["method"] for row in rows] == some.split(",")
    assert rows[0]["native rows, 2x"] == "16"  # 2 steps x 2 branches x 4
    assert rows[1]["native rows, 2x"] == "36"
    assert all(row["Tflop/s, 2x"] for row in rows)


@pytest.mark.slow
def test_the_peer_draws_the_same_picture_with_more_calls(run: Run) -> None:
    rows = run("--shrink", "16", "--scale", "2", "--steps", "2", "--rounds", "1", main=peers.main)
    assert [row["UNet calls"] for row in rows] == ["2", "18", "2"]
    assert all(int(row["greatest difference of a pixel"]) <= 1 for row in rows)
    assert rows[0]["ratio"] == "1.00"
    assert all(float(row["ratio"]) > 0 for row in rows)
