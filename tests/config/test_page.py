"""docs/configuration.md is what the fields' docstrings say now, and its example is a configuration."""

import yaml

from docs.configuration import EXAMPLE, PAGE, page
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "write it again: python docs/configuration.py"


def test_the_example_is_a_configuration_and_stands_on_the_page() -> None:
    loaded = parse_config(yaml.safe_load(EXAMPLE))
    assert (loaded.name, loaded.prompts, loaded.upscale.scale) == ("my-images", "my-prompts.txt", 4)
    assert EXAMPLE in page()
    assert len(EXAMPLE.splitlines()) <= 15


def test_every_part_of_a_configuration_has_a_section() -> None:
    text = page()
    for name in DatasetConfig.model_fields:
        assert f"\n## {name}\n" in text or f"| `{name}`" in text, name
