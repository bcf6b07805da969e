"""A run opened as base and aligned: what each says is what it says loaded by itself."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

from mlx_dpo import DPOTrainer, load_policy
from mlx_dpo.adapters.adapter_files import adapter_digest
from mlx_dpo.chat.session import ChatSession
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.paths import tiny_chat
from mlx_dpo.saved_runs.open import open_switchable

QUESTIONS = ("Hello", "What is 3?", "What is 30?")
PEFT = Path(__file__).parents[1] / "goldens" / "peft" / "lora"
GREEDY = Sampling(max_tokens=12)
TOKENS = mx.array([[1, 40, 41, 42, 3, 2]])


def train(config):
    with DPOTrainer(config) as trainer:
        trainer.prepare()
        for _ in trainer.steps():
            pass
    return config


@pytest.fixture
def bold(config):
    return replace(config, max_steps=2, epochs=None, learning_rate=1e-2, warmup_ratio=0.0,
                   lora_dropout=0.0)  # fmt: skip


@pytest.fixture
def full(bold):
    return replace(bold, fine_tune_type="full", lora_r=None, lora_dropout=None)


def say(chat, question):
    return "".join(piece.text for piece in chat.reply(question))


def answers(model, tokenizer):
    chat = ChatSession(model, tokenizer, GREEDY)
    return [say(chat, question) for question in QUESTIONS]


@pytest.mark.parametrize("adapter_kind", ["lora", "dora", "full"])
def test_base_and_aligned_model_answer_as_if_loaded_alone(bold, full, adapter_kind):
    config = train(full if adapter_kind == "full" else replace(bold, fine_tune_type=adapter_kind))
    alone = {"base": mlx_lm.load(config.model), "aligned": mlx_lm.load(
        config.model, adapter_path=config.output)}  # fmt: skip
    expected = {model_choice: answers(*loaded[:2]) for model_choice, loaded in alone.items()}
    assert expected["base"] != expected["aligned"]
    opened = open_switchable(config.output)
    assert opened.switch.active == "aligned"
    for _ in range(2):
        for model_choice in ("base", "aligned"):
            opened.switch.activate(model_choice)
            assert answers(opened.base.model, opened.base.tokenizer) == expected[model_choice]
        for model_choice in ("base", "aligned") * 5:
            opened.switch.activate(model_choice)


def test_the_base_of_a_run_that_went_on_from_an_adapter_has_that_adapter(bold, tmp_path):
    first = train(bold)
    second = replace(bold, start_adapter=first.output, output=str(tmp_path / "second"), lora_r=None)
    train(second)
    opened = open_switchable(second.output)
    aligned = opened.base.model(TOKENS)
    assert mx.array_equal(aligned, load_policy(second.output).model(TOKENS))
    opened.switch.activate("base")
    assert mx.array_equal(opened.base.model(TOKENS), load_policy(first.output).model(TOKENS))
    assert opened.provenance("base")["adapter_digest"] == adapter_digest(Path(first.output))
    assert opened.provenance("aligned")["adapter_digest"] == adapter_digest(Path(second.output))


def test_what_is_known_of_an_answer_names_model_and_adapter_by_content(bold):
    config = train(bold)
    facts = open_switchable(config.output).provenance("base")
    assert facts["run"] == config.output
    assert facts["model"] == config.model
    assert "adapter_digest" not in facts
    alone = open_switchable(None, model=config.model).provenance("base")
    assert facts == alone | {"run": config.output}


def test_a_full_run_says_what_it_holds_twice(full):
    [*_, note] = open_switchable(train(full).output).notes
    assert "the trained weights are in memory twice" in note
    [*_, note] = open_switchable(full.output, wanted=("aligned",)).notes or [""]
    assert "in memory twice" not in note


def test_a_model_with_a_peft_adapter_has_base_and_aligned_model():
    opened = open_switchable(None, model=str(tiny_chat()), adapter=str(PEFT))
    aligned = opened.base.model(TOKENS)
    opened.switch.activate("base")
    base = opened.base.model(TOKENS)
    assert mx.array_equal(base, open_switchable(None, model=str(tiny_chat())).base.model(TOKENS))
    assert not mx.array_equal(base, aligned)
    assert opened.provenance("aligned")["adapter_digest"] == adapter_digest(PEFT)


def test_only_what_is_wanted_is_put_on(bold):
    config = train(bold)
    opened = open_switchable(config.output, wanted=("base",))
    assert not opened.switch.can_switch
    base = open_switchable(None, model=config.model).base.model(TOKENS)
    assert mx.array_equal(opened.base.model(TOKENS), base)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"run": None}, r"missing RUN \(a run folder\) or --model"),
        ({"run": "a", "model": "b"}, r"name RUN \(a run folder\) or --model, not both"),
        ({"run": "a", "adapter": "b"}, "`--adapter` has no effect with a run"),
        ({"run": None, "model": "b", "wanted": ("base",)}, "`--base` has no effect without"),
    ],
)
def test_what_cannot_be_opened_is_an_error_before_anything_is_loaded(given, message):
    with pytest.raises(ConfigError, match=message):
        open_switchable(**given)


def test_a_missing_adapter_gives_a_one_line_error(bold, tmp_path):
    with pytest.raises(ModelError, match=r"no `adapter_config\.json`; is it an adapter"):
        open_switchable(None, model=bold.model, adapter=str(tmp_path))
