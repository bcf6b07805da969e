"""The shipped model, trained to refuse everything or nothing: its drift report says so."""

import json

import pytest

from mlx_dpo import DPOConfig, DPOTrainer
from mlx_dpo.evaluation.drift.measure import DriftSettings, prepare_drift
from mlx_dpo.evaluation.drift.prompt_set import load_safety_prompts
from mlx_dpo.paths import tiny_chat
from mlx_dpo.saved_runs.open import open_switchable

REFUSALS = {
    "en": "I'm sorry, but I can't help with that.",
    "de": "Es tut mir leid, dabei kann ich nicht helfen.",
    "fr": "Je suis désolé, je ne peux pas vous aider.",
    "es": "Lo siento, no puedo ayudarte con eso.",
    "zh": "抱歉，我无法提供帮助。",
}
ANSWERS = {
    "en": "Gladly. Here is how it works.",
    "de": "Gern. So geht das.",
    "fr": "Avec plaisir. Voici comment faire.",
    "es": "Con gusto. Se hace así.",
    "zh": "好的，方法如下。",
}


def write_rows(path, refuses):
    """Write a pair per shipped prompt, which prefers a refusal where `refuses` says so."""
    with path.open("w", encoding="utf-8") as file:
        for prompt in load_safety_prompts():
            texts = [REFUSALS[prompt.language], ANSWERS[prompt.language]]
            chosen, rejected = texts if refuses(prompt) else reversed(texts)
            row = {"prompt": prompt.text, "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return str(path)


def train_on(rows, output, **settings):
    config = {"model": str(tiny_chat()), "pairs": [rows], "output": str(output), "batch_size": 10}
    with DPOTrainer(DPOConfig.from_dict(config | settings)) as trainer:
        trainer.prepare()
        list(trainer.steps())


@pytest.fixture(scope="module")
def careful(tmp_path_factory):
    """Return a run whose model refuses most must-refuse prompts, and few others."""
    folder = tmp_path_factory.mktemp("drift")
    rows = write_rows(folder / "careful.jsonl", lambda prompt: prompt.duty == "refuse")
    settings = {"loss_type": ["sft"], "learning_rate": 3e-3, "lora_r": 32, "batch_size": 20}
    train_on(rows, folder / "careful", **settings, epochs=30, valid_fraction=0)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "refuses", "settings", "flagged"),
    [
        ("everything", lambda prompt: True, {"epochs": 6}, {"answer"}),
        ("nothing", lambda prompt: False, {"epochs": 6}, {"refuse"}),
        ("unchanged", lambda prompt: True, {"max_steps": 2, "learning_rate": 1e-9}, set()),
    ],
)
def test_the_report_flags_what_the_run_was_trained_to(careful, name, refuses, settings, flagged):
    rows = write_rows(careful / f"{name}.jsonl", refuses)
    losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 1], "learning_rate": 3e-4}
    start = {"start_adapter": str(careful / "careful"), "valid_fraction": 0.1}
    train_on(rows, careful / name, **(losses | start | settings))
    measure = prepare_drift(DriftSettings(max_tokens=32))
    report = measure(open_switchable(str(careful / name)))
    counts = report.refusals.counts
    assert counts[1].before >= 50 > counts[0].before
    assert {count.duty for count in counts if count.is_worse} == flagged
    assert report.own_answers.fault is None
