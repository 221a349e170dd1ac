"""The JSON schema of configurations (draft 2020-12), for editors that check and complete YAML files."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.method import DEFAULT

TITLE = "A dataset of ResMaster Pipeline"


def json_schema() -> dict[str, Any]:
    """The schema: every key with its meaning, kind and choices, and of each method its own keys. Unknown keys are
    mistakes."""
    schema = DatasetConfig.model_json_schema()
    for method in schema["properties"]["upscale"]["anyOf"]:
        method = schema["$defs"][method["$ref"].rpartition("/")[2]] if "$ref" in method else method
        if method["properties"]["method"]["const"] != DEFAULT:
            method.setdefault("required", []).append("method")  # without it, a configuration means the default
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": TITLE}
