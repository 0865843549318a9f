"""The shipped table of shapes: parameters by hand, and against the base in the wheel."""

from __future__ import annotations

import pytest

from srlm_lite.errors import UserError
from srlm_lite.planning.shapes import SHAPES, config_of, shape_of
from srlm_lite.recipe import load_recipe

TODAY = ("qwen3-8b", "gemma3-4b", "mistral-7b", "smollm3-3b")


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        # As the model cards and files of these bases count them.
        ("llama2-7b", 6_738_415_616),
        ("llama2-70b", 68_976_648_192),
        ("llama3.1-8b", 8_030_261_248),
        ("smollm2-135m", 134_515_008),
        ("qwen3-8b", 8_190_735_360),
        ("mistral-7b", 7_248_023_552),
        ("smollm3-3b", 3_075_098_624),
        ("gemma3-4b", 4_300_079_472),
        ("gemma3-270m", 268_098_176),
    ],
)
def test_a_model_of_the_shape_has_the_published_number_of_parameters(
    shape: str, parameters: int
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape))
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_it_says_of_smollm2_what_the_file_in_the_wheel_says(smollm2) -> None:
    ours, theirs = config_of("smollm2-135m"), smollm2.model.config
    for key in SHAPES["smollm2-135m"]:
        if key != "rope_parameters":  # the file has its numbers in float32
            assert getattr(ours, key) == pytest.approx(getattr(theirs, key), rel=1e-6), key
    assert ours.rope_parameters["rope_theta"] == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("recipe", ["llama2-7b", "llama2-70b", "llama3.1-8b", *TODAY])
def test_the_bases_of_the_recipes_for_a_gpu_are_in_the_table(recipe: str) -> None:
    assert shape_of(load_recipe(recipe).base.name) == recipe


def test_the_table_is_not_changed_through_a_config() -> None:
    config_of("llama2-7b").rope_parameters["rope_theta"] = 1.0
    assert SHAPES["llama2-7b"]["rope_parameters"]["rope_theta"] == 10000.0


def test_another_shape_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no such shape: llama9.*llama2-70b, llama2-7b"):
        config_of("llama9")


def test_gemma_3_has_its_windows_and_smollm3_its_layers_without_positions() -> None:
    text = config_of("gemma3-4b").get_text_config()
    assert text.layer_types[:6] == ["sliding_attention"] * 5 + ["full_attention"]
    assert text.layer_types.count("full_attention") == 5 and text.sliding_window == 1024
    assert config_of("smollm3-3b").no_rope_layers[:5] == [1, 1, 1, 0, 1]
