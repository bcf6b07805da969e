"""Runs of models that compute another function without KV caches than in generation."""

import json
import math

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten

from mlx_dpo import DPOConfig, ModelError, evaluate_run
from tests.checkpoints import END, VOCAB, write_tokenizer
from tests.runs.train_helper import train
from tests.scoring import architectures
from tests.scoring.test_generation_match import generated_logps


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Write a checkpoint of an architecture, with the vocabulary of the test's tokenizer."""
    sizes = {"vocab_size": VOCAB}
    monkeypatch.setattr(architectures, "SMALL", architectures.SMALL | sizes)
    own = architectures.OWN_TEXT["gemma3n"] | {"vocab_size_per_layer_input": VOCAB}
    monkeypatch.setitem(architectures.OWN_TEXT, "gemma3n", own)

    def write(model_type):
        folder = tmp_path / model_type
        folder.mkdir()
        config = architectures.config(model_type) | {"eos_token_id": END}
        (folder / "config.json").write_text(json.dumps(config))
        weights = dict(tree_flatten(architectures.build(model_type).parameters()))
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
        write_tokenizer(folder)
        return str(folder)

    return write


def test_a_run_of_gemma3n_trains_what_it_generates(make, settings):
    """With the default target modules."""
    settings |= {"model": make("gemma3n"), "epochs": None, "max_steps": 2, "lora_dropout": 0.0}
    trainer, rows = train(DPOConfig.from_dict(settings))
    assert trainer.choice.generation.uses_caches
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)

    model, _ = mlx_lm.load(settings["model"], adapter_path=settings["output"])
    pairs = trainer.inputs.valid
    expected = [generated_logps(model, pair)[0] for pair in pairs]
    logps = evaluate_run(settings["output"]).metrics.chosen_logps
    assert logps == pytest.approx(sum(expected) / len(pairs), abs=1e-3)


def test_a_model_that_no_scorer_fits_is_refused_before_training(make, settings):
    settings |= {"model": make("plamo3")}
    with pytest.raises(
        ModelError, match="training would optimize another function than the one that generates"
    ) as caught:
        train(DPOConfig.from_dict(settings))
    assert "\n" not in str(caught.value)
