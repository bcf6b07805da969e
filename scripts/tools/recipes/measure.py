"""Measure the memory of training passes of the recipes' models, as `mlx-dpo plan` does.

    python -m scripts.tools.recipes.measure [MODEL ...] [--lengths 64 128] [--repeats 1]

The pass over one pair runs on a few layers with random weights in the shapes of models.json, at two
lengths, with and without gradient checkpointing. Its memory is extrapolated to all layers and to
other lengths by the functions of `plan`. measured.json stores the coefficients.

`plan` runs the real lengths with the whole vocabulary. That takes hours for models of this size on
a CPU, so the layers are measured with VOCABULARY tokens, and the head (logits in chunks, whose size
does not depend on the vocabulary) is measured by itself with `--head` and added in full.

On the CPU backend activations are float32, twice the bytes of bfloat16: the figures are an upper
bound for a Mac's GPU. Weights count as a Mac stores them.
"""

import argparse
import copy
import datetime
import json
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx_dpo  # noqa: F401  (first: it loads OpenBLAS before MLX is imported)

import mlx.core as mx  # isort: skip
import mlx.nn as nn

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.models.device import cast_model
from mlx_dpo.models.empty_weights import build_model, remove_tied_head
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.models.quantize import DEFAULT_GROUP_SIZE, expected_bytes
from mlx_dpo.profiling import memory, profile
from mlx_dpo.profiling.bench.shapes import PassShape
from mlx_dpo.profiling.extrapolate import MemoryCurve, ProfilePoint, fit_memory_curve
from mlx_dpo.profiling.layer_subset import all_layers, choose_layer_subsets
from mlx_dpo.runs.auto_batch_size import profile_micro_batch
from mlx_dpo.runs.build import attach_adapters, optimizer_state_bytes
from mlx_dpo.scoring.scorers import make_shared_scorer
from mlx_dpo.scoring.select_scorer import ScorerChoice

FOLDER = Path(__file__).parent
MEASURED = FOLDER / "measured.json"
MODELS: dict[str, dict[str, Any]] = json.loads((FOLDER / "models.json").read_text("utf-8"))
VOCABULARY = 4096  # tokens of the models whose layers are measured
PROMPT_SHARE = 1 / 4  # of the tokens of a row; a completion fills the rest
STORED_DTYPE = "bfloat16"
PRECISIONS = (4, 8, None)  # bits of the weights; None: bfloat16
SETTINGS = DPOConfig(micro_batch_size=1)
HEAD_LENGTH = 64  # tokens of a row; its completions fill more than two chunks of logits


def pair_shape(length: int) -> PassShape:
    """Return the lengths of a pair whose two rows have `length` tokens each."""
    prompt = round(PROMPT_SHARE * length)
    return PassShape(prompt, length - prompt, length - prompt, 1)


def empty_model(config: dict[str, Any]) -> nn.Module:
    """Return the model that `config` describes, without an LM head that its checkpoint omits."""
    model = build_model(copy.deepcopy(config))
    remove_tied_head(model, config)
    return model


def count_parameters(config: dict[str, Any]) -> int:
    """Return the number of parameters of the model that `config` describes."""
    return memory.total_parameters(empty_model(config))


def weight_bytes(config: dict[str, Any]) -> dict[str, int]:
    """Return the bytes of the model's weights on a Mac, by bits; bfloat16 if not quantized."""
    model = empty_model(config)
    return {
        str(bits or STORED_DTYPE): expected_bytes(model, bits, DEFAULT_GROUP_SIZE, STORED_DTYPE)
        for bits in PRECISIONS
    }


class Measurement:
    """A model with random weights and new adapters, of which passes can be measured."""

    def __init__(self, config: dict[str, Any], vocab_size: int) -> None:
        """Build the model that `config` describes, with `vocab_size` tokens."""
        mx.random.seed(0)
        config = copy.deepcopy(config) | {"vocab_size": vocab_size}
        self.model = empty_model(config)
        cast_model(self.model, mx.float32)
        self.model.freeze()
        tokenizer: Any = None
        self.base = LoadedModel(self.model, tokenizer, config, Path(), "", vocab_size, ())
        attach_adapters(self.base, SETTINGS)
        scorer = make_shared_scorer(vocab_size=vocab_size, gradients=True, packing="row")
        self.choice = ScorerChoice(scorer, scorer, "shared", "not compared", "row")

    def point(self, length: int, *, recompute: bool) -> ProfilePoint:
        """Measure a pass over one pair whose rows have `length` tokens."""
        pairs = pair_shape(length).draw(1000)
        settings = replace(SETTINGS, recompute=recompute)
        found = profile_micro_batch(self.base, settings, self.choice, pairs)
        if found.text_share < 1:
            raise SystemExit("too little memory to measure whole texts; use shorter lengths")
        return ProfilePoint(found, 1, self.choice.cost(pairs).total)

    def layers(self) -> list[int]:
        """Return the numbers of layers that passes are measured on."""
        subsets = choose_layer_subsets(self.model)
        return [len(subsets.small), len(subsets.large)]


def linear_curve(long: ProfilePoint, short: ProfilePoint) -> MemoryCurve:
    """Return the memory curve through two points, linear in the tokens.

    Attention saves no array of tokens by tokens, so that growth beyond linear is noise, which a
    quadratic term would multiply at longer lengths.
    """
    curve = fit_memory_curve(long, short)
    return replace(curve, linear=long.layer_bytes_per_token, quadratic=0.0)


def model_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Return the number of parameters of a model, and sizes in bytes, from its shapes alone."""
    model = Measurement(config, VOCABULARY).model
    return {
        "parameters": count_parameters(config),
        "weights": weight_bytes(config),
        "trained": memory.trainable_bytes(model),
        "optimizer": optimizer_state_bytes(model, SETTINGS),
    }


def measure(config: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
    """Return the sizes of a model in bytes, and the memory curves of its passes."""
    measurement = Measurement(config, VOCABULARY)
    curves = {}
    for recompute in (False, True):
        long, short = (measurement.point(n, recompute=recompute) for n in sorted(lengths)[::-1])
        curves["recomputed" if recompute else "stored"] = asdict(linear_curve(long, short))
    return model_sizes(config) | {
        "curves": curves,
        "measured": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "lengths": sorted(lengths),
            "repeats": profile.REPEATS,
            "layers": measurement.layers(),
            "mlx": version("mlx"),
        },
    }


def measure_head(config: dict[str, Any]) -> int:
    """Return the memory of the head in bytes: the pass with the whole vocabulary less the layers.

    `config` is that of a model whose vocabulary is so large that the logits of HEAD_LENGTH rows
    take several chunks.
    """
    whole, layers = (
        Measurement(config, size).point(HEAD_LENGTH, recompute=False).profile.bytes
        for size in (config["vocab_size"], VOCABULARY)
    )
    return whole - layers


def measure_check(config: dict[str, Any], length: int, *, recompute: bool) -> dict[str, Any]:
    """Measure a pass through the whole model, with all layers and the whole vocabulary."""
    measurement = Measurement(config, config["vocab_size"])
    with patch.object(profile, "choose_layer_subsets", all_layers):
        point = measurement.point(length, recompute=recompute)
    return {"length": length, "recompute": recompute, "bytes": point.profile.bytes}


def _changed(config: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a configuration with other entries of its text model."""
    copied = copy.deepcopy(config)
    copied.get("text_config", copied).update(entries)
    return copied


def _store(model: str, found: dict[str, Any]) -> None:
    record = json.loads(MEASURED.read_text("utf-8")) if MEASURED.is_file() else {}
    record[model] = record.get(model, {}) | found
    ordered = {name: record[name] for name in MODELS if name in record}
    MEASURED.write_text(json.dumps(ordered, indent=2) + "\n", "utf-8")
    sys.stdout.write(f"{model}: {found}\n")
    sys.stdout.flush()


def main() -> None:
    """Measure the models named on the command line, by default all, and update measured.json."""
    parser = argparse.ArgumentParser(description="Measure the memory of the recipes' models.")
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--lengths", nargs=2, type=int, default=[64, 128], metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=1, metavar="N")
    parser.add_argument("--sizes", action="store_true", help="Store sizes; measure nothing.")
    parser.add_argument("--head", action="store_true", help="Measure the head.")
    parser.add_argument("--check", type=int, metavar="TOKENS", help="Measure whole passes.")
    parser.add_argument("--recompute", action="store_true", help="Check a pass that recomputes.")
    arguments = parser.parse_args()
    profile.REPEATS = arguments.repeats
    for model in arguments.models or MODELS:
        config = MODELS[model]["config"]
        if arguments.sizes:
            _store(model, model_sizes(config))
        elif arguments.head:
            _store(model, {"head": measure_head(config)})
        elif arguments.check:
            check = measure_check(config, arguments.check, recompute=arguments.recompute)
            _store(model, {"check_recomputed" if arguments.recompute else "check": check})
        else:
            entries = MODELS[model].get("measured_with", {})
            _store(model, measure(_changed(config, entries), arguments.lengths))


if __name__ == "__main__":
    main()
