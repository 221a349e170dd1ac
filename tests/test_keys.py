"""Keys and seeds: stable for ever, unique, safe as WebDataset names."""

from hypothesis import given
from hypothesis import strategies as st

from resmaster_stages.keys import canonical_json, image_key, normalise_prompt, prompt_key, sample_seed


def test_golden_values() -> None:
    """These values name samples in datasets that exist: a change here orphans them."""
    assert prompt_key("a red house", "", 128, 128) == "3b471f65dc80c900240818da"
    assert sample_seed("00ff", 0, "high_res") == 6709681378926772088


@given(st.text(max_size=80))
def test_keys_are_hex_without_dots_and_ignore_white_space(prompt: str) -> None:
    key = prompt_key(prompt, "", 128, 128)
    assert len(key) == 24
    assert set(key) <= set("0123456789abcdef")
    assert key == prompt_key(f"  {normalise_prompt(prompt)}\t", "", 128, 128)
    assert normalise_prompt(normalise_prompt(prompt)) == normalise_prompt(prompt)


def test_every_part_of_a_key_counts() -> None:
    keys = [
        prompt_key("a", "b", 128, 128),
        prompt_key("ab", "", 128, 128),
        prompt_key("a", "b", 128, 256),
        prompt_key("a", "b", 128, 128, 1),
        image_key(b"a", "b"),
        image_key(b"ab", ""),
    ]
    assert len(set(keys)) == len(keys)


@given(st.integers(0, 2**31))
def test_seeds_fit_a_generator_and_differ_by_stage(base: int) -> None:
    seed = sample_seed("ab", base, "low_res")
    assert 0 <= seed < 2**63
    assert seed != sample_seed("ab", base, "high_res")
    assert seed != sample_seed("ab", base + 1, "low_res")


def test_canonical_json_ignores_order() -> None:
    assert (
        canonical_json({"b": 1, "a": [1.5, None]})
        == canonical_json({"a": [1.5, None], "b": 1})
        == '{"a":[1.5,null],"b":1}'
    )


def test_take_0_has_the_seed_of_always_and_each_take_another_one() -> None:
    assert sample_seed("00ff", 0, "high_res", 0) == sample_seed("00ff", 0, "high_res")
    assert len({sample_seed("00ff", 0, stage, take) for stage in ("low_res", "high_res") for take in range(100)}) == 200
