"""A run whose chat template prints the date goes on with the day on which it began."""

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from mlx_dpo.chat.session import ChatSession
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.chat_templates import template_date as clock
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.errors import RunError
from mlx_dpo.evaluation.compare import _prompt_ids
from mlx_dpo.saved_runs.evaluate import evaluate_run
from mlx_dpo.saved_runs.open import open_run, open_switchable
from tests.checkpoints import TEMPLATE
from tests.runs.train_helper import train

FIRST, NEXT = datetime(2026, 3, 4, 23), datetime(2026, 3, 5, 9)


@pytest.fixture
def dated(config, monkeypatch):
    """Return settings of a run whose template prints the date; the first day is set."""
    path = Path(config.model) / "chat_template.jinja"
    undated = path.read_text()
    path.write_text("<|user|>{{ strftime_now('%d %b %Y') }}<|end|>" + TEMPLATE)
    monkeypatch.setattr(clock, "now", lambda: FIRST)
    yield replace(config, eval_steps=None)
    path.write_text(undated)


def on_the_next_day(monkeypatch):
    monkeypatch.setattr(clock, "now", lambda: NEXT)


def test_a_run_is_resumed_and_evaluated_on_the_next_day(dated, monkeypatch):
    train(dated, stop_after=2)
    record = Path(dated.output, "run.json")
    before = json.loads(record.read_text())
    assert before["day"] == "2026-03-04"
    reference = Path(dated.output, "reference", "train.safetensors")
    scored = reference.stat().st_mtime_ns
    on_the_next_day(monkeypatch)
    trainer, _ = train(dated, resume=True)
    after = json.loads(record.read_text())
    assert (after["day"], after["provenance"]) == (before["day"], before["provenance"])
    assert reference.stat().st_mtime_ns == scored  # not scored again
    evaluate_run(dated.output)
    new, _ = train(replace(dated, output=f"{dated.output}-new"), stop_after=1)
    assert new.record["day"] == "2026-03-05"
    assert new.record["provenance"]["train"] != trainer.record["provenance"]["train"]


def test_measures_print_the_runs_day_and_a_chat_prints_today(dated, monkeypatch):
    train(dated)
    on_the_next_day(monkeypatch)
    opened = open_switchable(dated.output)
    tokenizer = opened.base.tokenizer
    prompt = Prompt(({"role": "user", "content": "Hi"},), "x:1")
    assert opened.run is not None
    compared = tokenizer.decode(_prompt_ids(opened, opened.run, prompt))
    assert "04 Mar 2026" in compared
    chat = ChatSession(opened.base.model, tokenizer, Sampling(), switch=opened.switch)
    assert "05 Mar 2026" in tokenizer.decode(chat._tokens([{"role": "user", "content": "Hi"}]))


@pytest.mark.parametrize("day", ["someday", "", "2026-13-01"])
def test_a_day_that_is_none_is_refused_in_one_line(dated, day):
    train(dated, stop_after=2)
    record = Path(dated.output, "run.json")
    edited = {"day": day, "mlx_dpo_sha256": "edited"}
    record.write_text(json.dumps(json.loads(record.read_text()) | edited))
    with pytest.raises(RunError, match=r"`day` must be a date such as 2026-01-31"):
        open_run(dated.output).day  # noqa: B018 (the property raises)
