"""Imports a user's own modules, which register methods, base models, metrics or stages (docs/extending.md)."""

from __future__ import annotations

import importlib
import os

from resmaster_stages.errors import UserError
from resmaster_stages.redaction import one_line

VARIABLE = "RESMASTER_PLUGINS"


def load_plugins() -> None:
    """Import the modules named in the environment variable `VARIABLE`, separated by commas.

    Every process that runs flows calls this function. Raises UserError for a module that cannot be imported.
    """
    for name in filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(","))):
        try:
            importlib.import_module(name)
        except Exception as error:
            raise UserError(
                f"{VARIABLE}: cannot import {name} ({type(error).__name__}: {one_line(error)}); install it where this "
                "runs, or take it out of the variable"
            ) from error
