"""Every setting that can change the result does; none is parsed, stored and forgotten."""

import json
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_dpo import DPOConfig, Run
from mlx_dpo.arrays import flat
from mlx_dpo.config import options
from tests.checkpoints import make_checkpoint

CHANGED = {
    "model": "other-base",
    "pairs": "other.jsonl",
    "bits": 4,
    "group_size": 32,
    "dtype": "bfloat16",
    "valid": "other.jsonl",
    "valid_fraction": 0.4,
    "chat_template": "text",
    "max_length": 26,
    "truncation": "keep_end",
    "beta": 0.5,
    "label_smoothing": 0.2,
    "lora_r": 2,
    "lora_alpha": 8.0,
    "lora_dropout": 0.5,
    "lora_target_modules": ("q_proj",),
    "num_layers": 1,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.5,
    "epochs": 2,
    "max_steps": 7,
    "batch_size": 3,
    "weight_decay": 0.5,
    "max_grad_norm": 0.01,
    "seed": 7,
}
BESIDE = {"group_size": {"bits": 4}, "truncation": {"max_length": 26}}
# No revisions here, nothing to run, no thinking template, no bad pair: tested in their rooms.
ELSEWHERE = {"revision", "trust_remote_code", "thinking", "bad_pairs"}
# Tested in tests/training/test_loop.py.
SAME_MATHEMATICS = {"micro_batch_size", "max_tokens", "scorer", "recompute"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    make_checkpoint(folder / "base")
    make_checkpoint(folder / "other-base", seed=5)
    for name, word in (("pairs", "friend"), ("other", "mate")):
        rows = [
            {
                "prompt": f"{i} and {i}, what?",
                "chosen": f"It is {i}, {word}.",
                "rejected": f"{i * 7} no",
            }
            for i in range(10)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def outcome(folder, monkeypatch, output, **changes):
    """Weights and last evaluation of a short run."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLX_DPO_CACHE", str(folder / "cache"))
    config = DPOConfig(
        model="base", pairs="pairs.jsonl", output=str(output), batch_size=2, lora_r=4,
        learning_rate=1e-3,
    )  # fmt: skip
    with Run(replace(config, **changes)) as run:
        run.prepare()
        *_, last = run.train()
    return flat(run.policy.trainable_parameters()), last


def same(a, b):
    (first, first_row), (second, second_row) = a, b
    keys = [name for name in first_row if name.startswith("eval_")]
    return (
        first.keys() == second.keys()
        and all(mx.array_equal(first[name], second[name]) for name in first)
        and [first_row[k] for k in keys] == [second_row.get(k) for k in keys]
    )


@pytest.mark.parametrize("name", sorted(CHANGED))
def test_changing_a_setting_changes_the_result(folder, monkeypatch, tmp_path, name):
    beside = BESIDE.get(name, {})
    before = outcome(folder, monkeypatch, tmp_path / "before", **beside)
    after = outcome(folder, monkeypatch, tmp_path / "after", **beside, **{name: CHANGED[name]})
    assert not same(before, after)


def test_nothing_else_changes_the_result(folder, monkeypatch, tmp_path):
    before = outcome(folder, monkeypatch, tmp_path / "before")
    changes = {"save_steps": 1, "save_total_limit": 1, "logging_steps": 5, "caffeinate": False}
    assert same(before, outcome(folder, monkeypatch, tmp_path / "after", **changes))


def test_every_setting_is_accounted_for():
    matter = {name for name, (_, spec) in options().items() if spec.changes_result}
    assert matter == CHANGED.keys() | ELSEWHERE | SAME_MATHEMATICS
