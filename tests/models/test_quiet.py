"""Loading and calling models prints no warnings and no bars, and leaves the libraries as their user set them."""

import logging

import pytest
from diffusers.utils import logging as of_diffusers
from transformers.utils import logging as of_transformers

from resmaster_stages.models.quiet import quiet

LOGS = [logging.getLogger(library) for library in ("transformers", "diffusers")]


def bars(capsys: pytest.CaptureFixture[str]) -> list[bool]:
    """Whether transformers and diffusers draw their bars."""
    drawn = []
    for library in (of_transformers, of_diffusers):
        list(library.tqdm(range(3), desc="weights"))
        drawn.append("weights" in capsys.readouterr().err)
    return drawn


def test_warnings_and_bars_are_back_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    before = [log.level for log in LOGS]
    assert before == [logging.WARNING] * 2
    assert bars(capsys) == [True, True]
    with quiet(of_diffusers):
        assert [log.level for log in LOGS] == [logging.ERROR] * 2
        assert bars(capsys) == [False, False]
        with quiet(of_diffusers):
            pass
        assert bars(capsys) == [False, False]
    assert [log.level for log in LOGS] == before
    assert bars(capsys) == [True, True]


def test_after_an_error_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no such model"), quiet(of_diffusers):
        raise ValueError("no such model")
    assert [log.level for log in LOGS] == [logging.WARNING] * 2
    assert bars(capsys) == [True, True]


def test_what_a_user_set_stays(capsys: pytest.CaptureFixture[str]) -> None:
    """More than warnings, less than errors, and no bars."""
    of_transformers.set_verbosity_info()
    of_diffusers.set_verbosity(logging.CRITICAL)
    of_diffusers.disable_progress_bar()
    try:
        with quiet(of_diffusers):
            assert [log.level for log in LOGS] == [logging.INFO, logging.CRITICAL]
        assert [log.level for log in LOGS] == [logging.INFO, logging.CRITICAL]
        assert bars(capsys) == [True, False]
    finally:
        of_transformers.set_verbosity_warning()
        of_diffusers.set_verbosity_warning()
        of_diffusers.enable_progress_bar()
