"""Courtesy without labels, on the shipped model that criticises, revises and obeys prompts."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.collect.pairs_file import PairsFile
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import read_prompts
from mlx_dpo.demo.rules import correct, courteous
from mlx_dpo.paths import tiny_chat
from mlx_dpo.saved_runs.respond import open_any_responder

MODEL = Path(__file__).parents[2] / "models" / "tiny-critic"
COLLECTED = 300  # prompts
pytestmark = pytest.mark.slow


def shares(spec):
    """Return the shares of courteous and of correct answers to held-out prompts."""
    prompts = read_prompts(str(tiny_chat() / "preferences" / "valid.jsonl"))
    sampling = Sampling(temperature=0.7, seed=0, max_tokens=64)
    replies = open_any_responder(spec).reply(prompts, sampling)
    answers = [
        (prompt.messages, reply.text) for prompt, reply in zip(prompts, replies, strict=True)
    ]
    return [
        sum(rule(*answer) for answer in answers) / len(answers) for rule in (courteous, correct)
    ]


@pytest.mark.parametrize(
    ("epochs", "method"),
    [
        (
            3,
            (
                *("--principles", str(MODEL / "principles.txt")),
                *("--reward", "mlx_dpo.demo.rules:courteous"),
            ),
        ),
        (
            2,
            (
                *("--system-chosen", "Answer politely and kindly."),
                *("--system-rejected", "Answer curtly and rudely."),
            ),
        ),
    ],
    ids=["principles", "system prompts"],
)
def test_answers_become_courteous_and_stay_correct(tmp_path, monkeypatch, epochs, method):
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))
    lines = (tiny_chat() / "preferences" / "train.jsonl").read_text("utf-8").splitlines(True)
    (tmp_path / "prompts.jsonl").write_text("".join(lines[:COLLECTED]))
    pairs, run = tmp_path / "pairs.jsonl", str(tmp_path / "run")
    collect = ["collect", "--model", str(MODEL), "--prompts", str(tmp_path / "prompts.jsonl")]
    collect += ["--output", str(pairs), "--max-tokens", "64", "--temperature", "0.7", *method]
    result = CliRunner().invoke(cli, collect)
    assert result.exit_code == 0, result.output
    assert PairsFile(pairs).pair_count > COLLECTED / 4
    train = ["train", str(pairs), "--model", str(MODEL), "--output", run, "--beta", "0.5"]
    train += ["--learning-rate", "1e-3", "--epochs", str(epochs), "--max-length", "128"]
    train += ["--scorer", "plain", "--micro-batch-size", "8", "--seed", "0"]
    result = CliRunner().invoke(cli, train)
    assert result.exit_code == 0, result.output
    courtesy, content = shares(run)
    courtesy_before, content_before = shares(str(MODEL))
    assert 0.35 < courtesy_before < 0.65
    assert courtesy >= 0.9
    assert content >= content_before - 0.05
