"""Choose the settings of each recipe from the measured memory, and write examples/recipes/.

    python -m scripts.tools.recipes.rule

The peak of an optimizer step is the sum of weights, adapters, optimizer state and the larger of
pass and update, as in `mlx_dpo.profiling.memory.step_peak_bytes`. The usable memory of a Mac is
that of `plan --memory`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

from mlx_dpo.config.data import DEFAULT_MAX_LENGTH
from mlx_dpo.profiling.device_memory import mac_memory
from mlx_dpo.profiling.extrapolate import MemoryCurve
from mlx_dpo.profiling.memory import UPDATE_COPIES
from mlx_dpo.units import format_bytes

FOLDER = Path(__file__).parent
RECIPES = FOLDER.parents[2] / "examples" / "recipes"
MODELS: dict[str, dict[str, Any]] = json.loads((FOLDER / "models.json").read_text("utf-8"))
MEMORY_SIZES = (8, 16, 32, 64)  # GB that Macs are sold with
LENGTHS = (DEFAULT_MAX_LENGTH, 512)  # of the longest pairs, in tokens; the first that fits
PAIRS = (8, 4, 2, 1)  # per pass; the first that fits
RESERVE = 0.1  # share of the usable memory that a recipe leaves free: measurements are noisy
PROMPT_SHARE = 1 / 4  # of the tokens of the longest pairs
NO_ERRORS = {"stored": 0.0, "recomputed": 0.0}
PRECISION_NAMES = {"bfloat16": "16 bits", "8": "8 bits", "4": "4 bits"}


@dataclass(frozen=True)
class Recipe:
    """Settings for a model on a Mac, as far as they determine the memory."""

    model: str  # key in models.json
    memory: int  # of the Mac, in GB
    precision: str  # key in PRECISION_NAMES
    max_length: int  # tokens of a prompt with one completion
    pairs: int  # per pass
    recompute: bool

    @property
    def path(self) -> Path:
        """The file of the recipe."""
        return RECIPES / f"{self.model}-{self.memory}gb.yaml"

    @property
    def source(self) -> str:
        """The Hub id of the weights in this precision."""
        return str(MODELS[self.model]["sources"][self.precision])

    @property
    def usable(self) -> int:
        """Memory in bytes that Metal recommends on this Mac."""
        return mac_memory(f"{self.memory}GB").bytes

    @property
    def weights(self) -> int:
        """Memory of the weights in bytes."""
        return int(measured()[self.model]["weights"][self.precision])

    @property
    def peak(self) -> int:
        """Planned peak of an optimizer step in bytes."""
        record = measured()[self.model]
        in_pass = pass_bytes(self.model, self.max_length, self.pairs, recompute=self.recompute)
        update = UPDATE_COPIES * record["trained"]
        resident = self.weights + record["trained"] + record["optimizer"]
        return int(resident + max(in_pass, update))

    @property
    def fits(self) -> bool:
        """Whether the planned peak leaves RESERVE of the usable memory free."""
        return self.peak <= (1 - RESERVE) * self.usable

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        found: dict[str, Any] = {"model": self.source}
        if self.max_length != DEFAULT_MAX_LENGTH:
            found["max_length"] = self.max_length
        found["micro_batch_size"] = self.pairs
        return found | ({"recompute": True} if self.recompute else {})

    def to_yaml(self) -> str:
        """Return the text of the recipe's file."""
        peak, usable, weights = (
            format_bytes(size, is_estimate=True) for size in (self.peak, self.usable, self.weights)
        )
        name, base = MODELS[self.model]["name"], measured()[self.model].get("extrapolated_from")
        basis = f"Extrapolated from {MODELS[base]['name']}" if base else "Planned on a CPU"
        lines = [
            f"# {name} on a Mac with {self.memory} GB: DPO with LoRA, weights in "
            f"{PRECISION_NAMES[self.precision]}, pairs of up to {self.max_length:,} tokens.",
            f"# Planned peak: about {peak} of {usable} that Metal may use; weights {weights}.",
            f"# {basis}, not run on a Mac: docs/which-model.md says how.",
            f"# mlx-dpo train pairs.jsonl --config examples/recipes/{self.path.name}",
            *(f"{key}: {_yaml(value)}" for key, value in self.settings.items()),
        ]
        return "\n".join(lines) + "\n"


@cache
def measured() -> dict[str, dict[str, Any]]:
    """Return sizes and memory curves by model: those of measured.json, and extrapolated ones.

    The record of an extrapolated model has the model that it is extrapolated from, and the largest
    relative errors of such extrapolations, by which its curves are increased.
    """
    stored: dict[str, dict[str, Any]] = json.loads((FOLDER / "measured.json").read_text("utf-8"))
    found = {name: record for name, record in stored.items() if "curves" in record}
    extra = {}
    for name, record in stored.items():
        base = MODELS[name].get("extrapolated_from")
        if name not in found and base in found:
            family = {key: found[key] for key in found if _family(key) == _family(base)}
            errors = extrapolation_errors(family)
            curves = extrapolate(base, name, found[base]["curves"], errors)
            extra[name] = record | {"curves": curves, "extrapolated_from": base, "errors": errors}
    found |= extra
    return {name: found[name] for name in MODELS if name in found}


def extrapolate(
    base: str,
    model: str,
    curves: dict[str, dict[str, float]],
    errors: Mapping[str, float] = NO_ERRORS,
) -> dict[str, dict[str, float]]:
    """Return memory curves of `model`, in proportion to those of `base`.

    Activations grow with the widths of a layer's arrays; with gradient checkpointing a layer saves
    its input only.

    Args:
        errors: relative errors by which the curves are increased.
    """
    arrays = layer_width(model) / layer_width(base)
    inputs = _text_config(model)["hidden_size"] / _text_config(base)["hidden_size"]
    found = {}
    for name, curve in curves.items():
        factor = 1 + errors[name]
        found[name] = {
            "fixed": factor * arrays * curve["fixed"],
            "per_token": factor * arrays * curve["per_token"],
            "linear": factor * (inputs if name == "recomputed" else arrays) * curve["linear"],
            "quadratic": 0.0,
            "num_layers": _text_config(model)["num_hidden_layers"],
        }
    return found


def layer_width(model: str) -> int:
    """Return the sum of the widths of the arrays in a layer: hidden, attention and MLP."""
    config = _text_config(model)
    heads = config["num_attention_heads"] + config["num_key_value_heads"]
    head_width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(config["hidden_size"] + heads * head_width + config["intermediate_size"])


def extrapolation_errors(measurements: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the largest relative errors when measured models are predicted from each other.

    They are those of a pass over the longest pairs, by the name of the curve.
    """
    tokens, errors = tokens_per_pair(LENGTHS[0]), dict(NO_ERRORS)
    for base, model in permutations(measurements, 2):
        predicted = extrapolate(base, model, measurements[base]["curves"])
        for name, curve in measurements[model]["curves"].items():
            size = MemoryCurve(**predicted[name]).bytes(1, tokens)
            error = abs(size / MemoryCurve(**curve).bytes(1, tokens) - 1)
            errors[name] = max(errors[name], error)
    return errors


def _family(model: str) -> str:
    """Return `gemma`, `phi` or `llama`, which have different arrays in a layer."""
    kind = str(MODELS[model]["config"]["model_type"])
    return next((name for name in ("gemma", "phi") if kind.startswith(name)), "llama")


def _text_config(model: str) -> dict[str, Any]:
    config: dict[str, Any] = MODELS[model]["config"]
    return config.get("text_config", config)


@cache
def head_bytes() -> int:
    """Return the memory of the LM head, which is about the same for all models, in bytes.

    It is the largest that was measured.
    """
    found = json.loads((FOLDER / "measured.json").read_text("utf-8"))
    return max(int(record["head"]) for record in found.values() if "head" in record)


def tokens_per_pair(length: int) -> int:
    """Return the tokens through the layers of a pair whose two rows have `length` tokens.

    The prompt runs once; the last token of a completion is not fed to the model.
    """
    prompt = round(PROMPT_SHARE * length)
    return prompt + 2 * (length - prompt - 1)


def pass_bytes(model: str, length: int, pairs: int, *, recompute: bool) -> int:
    """Return the memory of a pass in bytes, beyond what is held between passes.

    Args:
        length: tokens of a row, a prompt with one completion.
        pairs: number of pairs, all of this length.
    """
    curves = measured()[model]["curves"]
    curve = MemoryCurve(**curves["recomputed" if recompute else "stored"])
    return int(curve.bytes(pairs, tokens_per_pair(length)) + head_bytes())


def candidates(model: str, memory: int) -> Iterator[Recipe]:
    """Yield the settings of a model on a Mac, the preferred first.

    More than 4 bits need room for the longest pairs without gradient checkpointing.
    """
    for precision in ("bfloat16", "8"):
        for pairs in PAIRS:
            yield Recipe(model, memory, precision, LENGTHS[0], pairs, recompute=False)
    for length in LENGTHS:
        for recompute in (False, True):
            for pairs in PAIRS:
                yield Recipe(model, memory, "4", length, pairs, recompute)


def choose(model: str, memory: int) -> Recipe | None:
    """Return the first candidate that fits into the memory; None if none does."""
    return next((recipe for recipe in candidates(model, memory) if recipe.fits), None)


def recipes() -> list[Recipe]:
    """Return the recipes of all measured models, in the order of models.json."""
    pairs = ((model, memory) for model in MODELS for memory in MEMORY_SIZES if model in measured())
    return [recipe for model, memory in pairs if (recipe := choose(model, memory))]


def write_recipes() -> None:
    """Write the files of all recipes, and remove files of others."""
    RECIPES.mkdir(exist_ok=True)
    found = {recipe.path: recipe.to_yaml() for recipe in recipes()}
    for path in set(RECIPES.glob("*.yaml")) - set(found):
        path.unlink()
    for path, text in found.items():
        path.write_text(text, encoding="utf-8")


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    write_recipes()
