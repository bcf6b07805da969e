"""Every setting that can change the result has an effect on it."""

import json
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_dpo import DPOConfig, DPOTrainer
from mlx_dpo.adapters import attach as adapters
from mlx_dpo.adapters.adapter_files import save_adapter
from mlx_dpo.config.dpo_config import get_settings
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.models.load import load_model
from tests.checkpoints import make_checkpoint

CHANGED = {
    "model": "other-base",
    "pairs": "other.jsonl",
    "bits": 4,
    "group_size": 32,
    "dtype": "bfloat16",
    "mix": (0.5,),
    "split": "train_other",
    "valid": "other.jsonl",
    "valid_fraction": 0.4,
    "chat_template": "text",
    "max_length": 26,
    "truncation": "keep_end",
    "schema": "alpaca",
    "column": ("prompt=instruction",),
    "ranked": "all",
    "assistant_turns": "last",
    "system": "Be kind.",
    "margin_column": "lead",
    "weight_column": "trust",
    "reference_model": "other-base",
    "ref_model_mixup_alpha": 0.1,
    "ref_model_sync_steps": 2,
    "loss_type": ("ipo",),
    "loss_weights": (1.0, 0.5),
    "beta": 0.5,
    "label_smoothing": 0.2,
    "discopop_tau": 0.5,
    "dpop_lambda": 2.0,
    "simpo_gamma": 2.0,
    "cpo_alpha": 0.3,
    "rpo_eta": 0.3,
    "desirable_weight": 2.0,
    "undesirable_weight": 2.0,
    "f_divergence_type": "forward_kl",
    "f_alpha_divergence_coef": 0.8,
    "ld_alpha": 0.5,
    "use_weighting": True,
    "fine_tune_type": "dora",
    "use_rslora": True,
    "start_adapter": "start",
    "lora_r": 2,
    "lora_alpha": 8.0,
    "lora_dropout": 0.5,
    "lora_target_modules": ("q_proj",),
    "num_layers": 1,
    "optim": "lion",
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    "min_lr_rate": 0.5,
    "warmup_ratio": 0.5,
    "warmup_steps": 3,
    "epochs": 2,
    "max_steps": 7,
    "batch_size": 3,
    "group_by_prompt": False,
    "weight_decay": 0.5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 1e-2,
    "momentum": 0.5,
    "max_grad_norm": 0.01,
    "seed": 7,
    "metric_for_best_model": "rewards/rejected",
    "load_best_model_at_end": True,
    "early_stopping_patience": 2,
    "early_stopping_threshold": 9.0,
}
# At this rate the held-out loss rises from the second evaluation on.
OVERSHOOTS = {"learning_rate": 0.1, "eval_steps": 1, "valid_fraction": 0.4, "max_steps": 8}
ROLES = ("user", "assistant", "user", "assistant")
LABELLED = {"pairs": "labelled.jsonl", "loss_type": ("kto",), "valid_fraction": 0.4}
OTHER_SETTINGS = {
    "ref_model_mixup_alpha": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "ref_model_sync_steps": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "loss_weights": {"loss_type": ("sigmoid", "sft")},
    # Its penalty is felt once a step has made a chosen completion less likely.
    "dpop_lambda": {
        "loss_type": ("dpop",),
        "pairs": "contradicting.jsonl",
        "learning_rate": 0.1,
    },
    "discopop_tau": {"loss_type": ("discopop",)},
    "simpo_gamma": {"loss_type": ("simpo",)},
    "cpo_alpha": {"loss_type": ("cpo",)},
    "rpo_eta": {"loss_type": ("rpo_bwd_kl",), "margin_column": "lead"},
    "desirable_weight": LABELLED,
    "undesirable_weight": LABELLED,
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
    "group_size": {"bits": 4},
    "truncation": {"max_length": 26},
    "split": {"pairs": "splits"},
    "schema": {"pairs": "rows/both.jsonl"},
    "assistant_turns": {"pairs": "rows/talks.jsonl", "loss_type": ("sft",)},
    "column": {"pairs": "rows/both.jsonl"},
    "ranked": {"pairs": "rows/rated.jsonl"},
    "group_by_prompt": {"pairs": "rows/rated.jsonl", "ranked": "all"},
    "start_adapter": {"lora_r": None},
    "min_lr_rate": {"lr_scheduler_type": "cosine_with_min_lr"},
    "momentum": {"optim": "sgd"},
    "metric_for_best_model": OVERSHOOTS
    | {"metric_for_best_model": "loss", "load_best_model_at_end": True},
    "load_best_model_at_end": OVERSHOOTS
    | {"metric_for_best_model": "loss", "early_stopping_patience": 4},
    "early_stopping_patience": OVERSHOOTS
    | {"metric_for_best_model": "loss", "early_stopping_patience": 4},
    "early_stopping_threshold": OVERSHOOTS
    | {"metric_for_best_model": "rewards/rejected", "early_stopping_patience": 3},
}
# This dataset and model have no revisions, remote code, thinking template, bad pairs or labels,
# and the runs have fewer than 512 steps; other tests cover these settings.
TESTED_ELSEWHERE = {
    "revision", "trust_remote_code", "thinking", "bad_pairs", "pair_labelled", "sync_ref_model",
}  # fmt: skip
# Tested in tests/training/test_loop.py.
SAME_MATHEMATICS = {"micro_batch_size", "micro_batch_tokens", "scorer", "recompute"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    make_checkpoint(folder / "base")
    make_checkpoint(folder / "other-base", seed=5)
    make_adapter(folder)
    for name, word in (("pairs", "friend"), ("other", "mate")):
        rows = [
            {
                "prompt": f"{i} and {i}, what?",
                "chosen": f"It is {i}, {word}.",
                "rejected": f"{i * 7} no",
                "lead": i / 10,
                "trust": 0.5 + i / 10,
            }
            for i in range(10)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled_rows = [
        {"prompt": f"{i}, what?", "completion": f"It is {i}.", "label": i % 2 == 0}
        for i in range(10)
    ]
    answers = ("Yes, it is.", "No, never.")
    contradicting = [
        {"prompt": f"{i}, is it?", "chosen": answers[i % 2], "rejected": answers[1 - i % 2]}
        for i in range(10)
    ]
    (folder / "contradicting.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in contradicting)
    )
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled_rows))
    make_rows(folder)
    return folder


def make_rows(folder):
    """Rows that can be read in two ways, rated lists, and a folder of splits."""
    texts = [(f"{i} and {i}, what?", f"It is {i}.", f"{i * 7} no") for i in range(10)]
    both = [
        {"prompt": prompt, "instruction": f"Say {i}", "chosen": good, "rejected": bad}
        for i, (prompt, good, bad) in enumerate(texts)
    ]
    rated = [
        {"prompt": prompt, "completions": [bad, good, "Who knows?"], "scores": [1, 5, 3]}
        for prompt, good, bad in texts
    ]
    for name in ("rows", "splits"):
        (folder / name).mkdir()
    talks = [
        {
            "messages": [
                {"role": role, "content": text} for role, text in zip(ROLES, row * 2, strict=True)
            ]
        }
        for row in [pair[:2] for pair in texts]
    ]
    others = [row | {"rejected": "Who knows?"} for row in both]
    files: dict[str, list[dict]] = {
        "rows/both": both,
        "rows/talks": talks,
        "rows/rated": rated,
        "splits/train": both,
        "splits/train_other": others,
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_adapter(folder):
    """An adapter that does something, in `start`."""
    policy = load_model(str(folder / "base")).model
    adapters.attach_adapters(policy, rank=2, scale=2.0)
    for layer in adapters.adapted_layers(policy).values():
        layer.lora_b = layer.lora_b + 0.1
    (folder / "start").mkdir()
    save_adapter(folder / "start", policy, adapters.make_adapter_config(policy))


def outcome(folder, monkeypatch, output, **changes):
    """Weights and last evaluation of a short run."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLX_DPO_CACHE", str(folder / "cache"))
    config = DPOConfig(
        model="base", pairs="pairs.jsonl", output=str(output), batch_size=2, lora_r=4,
        learning_rate=1e-3,
    )  # fmt: skip
    with DPOTrainer(replace(config, **changes)) as trainer:
        trainer.prepare()
        *_, last = trainer.steps()
    return named_arrays(trainer.policy.trainable_parameters()), last


def same(a, b):
    (first, first_row), (second, second_row) = a, b
    keys = [name for name in first_row if name.startswith("eval_")]
    return (
        first.keys() == second.keys()
        and all(mx.array_equal(first[name], second[name]) for name in first)
        and [first_row[k] for k in keys] == [second_row.get(k) for k in keys]
    )


@pytest.fixture(scope="module")
def unchanged():
    """Results by the other settings, which are the same for most settings."""
    return {}


@pytest.mark.parametrize("name", sorted(CHANGED))
def test_changing_a_setting_changes_the_result(folder, unchanged, monkeypatch, tmp_path, name):
    others = OTHER_SETTINGS.get(name, {})
    key = repr(others)
    if key not in unchanged:
        unchanged[key] = outcome(folder, monkeypatch, tmp_path / "before", **others)
    after = outcome(folder, monkeypatch, tmp_path / "after", **(others | {name: CHANGED[name]}))
    assert not same(unchanged[key], after)


def test_nothing_else_changes_the_result(folder, monkeypatch, tmp_path):
    before = outcome(folder, monkeypatch, tmp_path / "before")
    changes = {"save_steps": 1, "save_total_limit": 1, "logging_steps": 5, "caffeinate": False,
               "report_to": ("tensorboard",)}  # fmt: skip
    assert same(before, outcome(folder, monkeypatch, tmp_path / "after", **changes))


def test_every_setting_is_accounted_for():
    matter = {name for name, spec in get_settings().items() if spec.changes_result}
    assert matter == CHANGED.keys() | TESTED_ELSEWHERE | SAME_MATHEMATICS
