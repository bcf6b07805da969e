"""The recipes in examples/recipes/: valid settings, measured figures, and the page made of them."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_dpo import DPOConfig
from mlx_dpo.config.dpo_config import get_settings
from mlx_dpo.config.yaml_file import read_yaml
from mlx_dpo.profiling.extrapolate import MemoryCurve
from mlx_dpo.units import format_bytes
from scripts.tools.recipes import measure, rule
from scripts.tools.recipes.rule import MEMORY_SIZES, MODELS, Recipe

ROOT = Path(__file__).parents[2]
FILES = sorted(rule.RECIPES.glob("*.yaml"))
GIB = 2**30


@pytest.fixture(scope="module")
def made():
    return runpy.run_path(str(ROOT / "scripts" / "tools" / "docs" / "which_model_page.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_holds_what_the_measurements_say(path, made):
    values = read_yaml(str(path))
    config = DPOConfig.from_dict(values)  # refuses unknown settings and those without effect
    assert all(getattr(config, name) != get_settings()[name].default for name in values)
    found = made["recipe_of"](path)
    assert path.read_text(encoding="utf-8") == found.to_yaml()
    assert found.peak <= 0.9 * found.usable
    assert found == rule.choose(found.model, found.memory)
    peak = format_bytes(found.peak, is_estimate=True)
    assert f"Planned peak: about {peak} of " in path.read_text(encoding="utf-8")


def test_every_combination_that_fits_has_a_file_and_no_other_has():
    assert {path.stem for path in FILES} == {recipe.path.stem for recipe in rule.recipes()}
    assert list(rule.measured()) == list(MODELS)


def test_the_page_and_the_readme_are_up_to_date(made):
    assert made["PAGE"].read_text(encoding="utf-8") == made["page"]()
    assert made["readme_table"]() in made["README"].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [{"precision": "bfloat16"}, {"max_length": 8192}, {"pairs": 64}],
    ids=lambda change: next(iter(change)),
)
def test_a_change_that_needs_more_memory_than_the_mac_has_does_not_fit(change):
    [recipe] = [r for r in rule.recipes() if r.model == "qwen3-4b" and r.memory == 8]
    assert recipe.fits
    assert not replace(recipe, **change).fits


def test_a_recipe_with_other_bits_or_lengths_is_not_what_the_file_says(made):
    [path] = [path for path in FILES if path.stem == "qwen3-0.6b-64gb"]
    found = made["recipe_of"](path)
    for change in ({"precision": "4"}, {"max_length": 512}, {"pairs": 1}, {"recompute": True}):
        assert replace(found, **change) != found
        assert replace(found, **change).to_yaml() != path.read_text(encoding="utf-8")


def test_the_planned_peak_adds_weights_adapters_optimizer_and_pass(monkeypatch):
    curve = MemoryCurve(fixed=1e6, per_token=10, linear=100, quadratic=0, num_layers=2)
    record = {
        "weights": {"4": 5_000_000},
        "trained": 1000,
        "optimizer": 2000,
        "curves": {"stored": vars(curve), "recomputed": vars(replace(curve, linear=1))},
    }
    monkeypatch.setattr(rule, "measured", lambda: {"x": record})
    monkeypatch.setattr(rule, "head_bytes", lambda: 7_000_000)
    # 256 tokens of prompt, and 2 * 767 of the completions that are fed to the model.
    in_pass = 1_000_000 + 3 * 1790 * (10 + 2 * 100) + 7_000_000
    assert Recipe("x", 8, "4", 1024, 3, recompute=False).peak == 5_003_000 + in_pass
    in_pass = 1_000_000 + 3 * 1790 * (10 + 2 * 1) + 7_000_000
    assert Recipe("x", 8, "4", 1024, 3, recompute=True).peak == 5_003_000 + in_pass
    record["trained"] = 9_000_000  # then the update needs most: five copies
    assert Recipe("x", 8, "4", 1024, 3, recompute=True).peak == 14_002_000 + 45_000_000


def test_an_extrapolated_model_is_one_with_wider_layers_of_the_same_family(monkeypatch):
    small = {"model_type": "llama", "hidden_size": 10, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 35}
    large = small | {"hidden_size": 20, "num_hidden_layers": 3, "intermediate_size": 70}
    monkeypatch.setattr(rule, "MODELS", {"a": {"config": small}, "b": {"config": large}})
    assert rule.layer_width("a") == 10 + 3 * 5 + 35
    curve = {"fixed": 100, "per_token": 10, "linear": 1000, "quadratic": 0, "num_layers": 2}
    curves = {"stored": curve, "recomputed": curve}
    errors = {"stored": 0.5, "recomputed": 0.0}
    found = rule.extrapolate("a", "b", curves, errors)
    twice = {"fixed": 200, "per_token": 20, "linear": 2000, "quadratic": 0, "num_layers": 3}
    assert found["recomputed"] == twice  # twice the width
    assert found["stored"] == twice | {"fixed": 300, "per_token": 30, "linear": 3000}
    # b needs 10 % more than its widths say: 9 % low from a, a 10 % high from b.
    more = {name: twice | {"fixed": 220, "per_token": 22, "linear": 2200} for name in curves}
    found = rule.extrapolation_errors({"a": {"curves": curves}, "b": {"curves": more}})
    assert found == pytest.approx({"stored": 0.1, "recomputed": 0.1})


def test_usable_memory_is_that_of_plan():
    usable = [Recipe("x", size, "4", 512, 1, recompute=True).usable for size in MEMORY_SIZES]
    assert usable == [int(share * GIB) for share in (8 * 2 / 3, 16 * 2 / 3, 32 * 2 / 3, 48)]


@pytest.mark.parametrize("model", MODELS)
def test_shapes_have_the_published_number_of_parameters(model):
    config = MODELS[model]["config"]
    assert measure.count_parameters(config) == MODELS[model]["parameters"]
    record = rule.measured().get(model)
    if record is not None:
        assert record["parameters"] == MODELS[model]["parameters"]
        assert record["weights"] == measure.weight_bytes(config)


def test_pairs_are_measured_in_the_lengths_that_are_planned():
    shape = measure.pair_shape(128)
    assert (shape.prompt, shape.chosen, shape.rejected) == (32, 96, 96)
    assert rule.tokens_per_pair(128) == 32 + 2 * 95
    assert rule.PROMPT_SHARE == measure.PROMPT_SHARE


@pytest.mark.slow
def test_the_smallest_model_measures_the_same_again():
    again = measure.measure(MODELS["qwen3-0.6b"]["config"], [128, 256])
    before = rule.measured()["qwen3-0.6b"]
    for name in ("stored", "recomputed"):
        new, old = (MemoryCurve(**record["curves"][name]) for record in (again, before))
        assert new.bytes(1, 1790) == pytest.approx(old.bytes(1, 1790), rel=0.25)
