"""A tiny soak (`make soak` is the long one), and that it would notice."""

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import soak
from resmaster_stages.models.identity import Weights
from tests import fake_stages
from tests.checkout import PYTHONPATH, ROOT


@pytest.mark.s3
@pytest.mark.slow
def test_disturbed_builds_end_as_undisturbed_ones() -> None:
    """In a process of its own, for the program changes the environment and the names of weights for good."""
    words = [sys.executable, "-m", "benchmarks.soak", "--rounds", "1", "--processes", "2", "--seed", "7"]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    said = subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    for place in ("folder", "s3"):
        assert f"{place}: 1 rounds" in said
    assert said.count("every result as undisturbed") == 2


def test_a_result_that_depends_on_the_attempt_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))
    (tmp_path / "prompts.txt").write_text(soak.PROMPTS)
    monkeypatch.setenv(soak.PROMPTS_FILE, str(tmp_path / "prompts.txt"))
    monkeypatch.setattr(soak, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(soak, "disturbed", lambda *arguments: Counter())
    soak.ask(soak.build, str(tmp_path / "calm"), 0, None)
    expected = soak.ask(soak.everything, str(tmp_path / "calm"))
    soak.soak_round(str(tmp_path / "same"), random.Random(0), 1, expected)

    def attempt_shows(sample: fake_stages.Sample, size: int) -> dict[str, bytes]:
        return {**honest(sample, size), "txt": str(os.getpid()).encode()}

    honest = fake_stages.files_of
    monkeypatch.setattr(fake_stages, "files_of", attempt_shows)
    with pytest.raises(SystemExit, match=r"differs from the undisturbed build\n\('low_res', 0, 0\): .* was due"):
        soak.soak_round(str(tmp_path / "other"), random.Random(0), 1, expected)
