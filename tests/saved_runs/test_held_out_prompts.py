"""What a run held out is asked again exactly as the run saw it."""

import json

import pytest

from mlx_dpo import DPOConfig
from mlx_dpo.data.prompts import add_system_prompt
from mlx_dpo.errors import DataError
from mlx_dpo.evaluation.compare import _prompt_ids
from mlx_dpo.generation.prompt import encode_prompt
from mlx_dpo.runs.inputs import load_inputs
from mlx_dpo.saved_runs.evaluate import held_out_prompts
from mlx_dpo.saved_runs.open import open_switchable
from tests.checkpoints import make_checkpoint
from tests.runs.train_helper import train

COUNT = 6


def dialogue(n):
    before = f"\n\nHuman: What is {n}?\n\nAssistant: It is.\n\nHuman: Why {n}?\n\nAssistant:"
    return {"chosen": f"{before} It is so.", "rejected": f"{before} no"}


def with_its_system(n):
    system_turn = {"role": "system", "content": f"Say {n}."}
    turns = [system_turn, {"role": "user", "content": f"What is {n}?"}]
    chosen, rejected = ({"role": "assistant", "content": text} for text in ("It is so.", "no"))
    return {
        "prompt": turns[1]["content"],
        "chosen": [*turns, chosen],
        "rejected": [*turns, rejected],
    }


def with_tools(n):
    tools = [{"type": "function", "function": {"name": "f"}}]
    return {"prompt": f"What is {n}?", "chosen": "It is so.", "rejected": "no", "tools": tools}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A run on rows of a kind."""
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))
    model = str(make_checkpoint(tmp_path / "base"))

    def run(row, **settings):
        lines = "".join(json.dumps(row(n)) + "\n" for n in range(COUNT))
        (tmp_path / "pairs.jsonl").write_text(lines)
        config = DPOConfig(
            model=model, pairs=(str(tmp_path / "pairs.jsonl"),), output=str(tmp_path / "run"),
            max_steps=1, batch_size=2, warmup_ratio=0.0, valid_fraction=0.5, **settings,
        )  # fmt: skip
        train(config)
        opened = open_switchable(config.output)
        return opened, load_inputs(config, read=lambda _: opened.base).valid

    return run


@pytest.mark.parametrize(
    ("row", "settings"),
    [(dialogue, {}), (dialogue, {"system": "Be brief."}), (with_its_system, {})],
)
def test_held_out_prompts_are_the_tokens_that_the_run_measured_on(trained, row, settings):
    opened, valid = trained(row, **settings)
    found = add_system_prompt(held_out_prompts(opened.run, opened.base), opened.run.config.system)
    token_ids = [tuple(encode_prompt(opened.base.tokenizer, p.messages)) for p in found]
    assert len(token_ids) == COUNT // 2
    assert set(token_ids) == {pair.prompt for pair in valid}


def test_prompts_of_a_run_on_plain_text_have_the_turn_marks(trained):
    opened, valid = trained(dialogue, chat_template="text")
    found = held_out_prompts(opened.run, opened.base)
    texts = {dialogue(n)["chosen"].removesuffix(" It is so.") for n in range(COUNT)}
    assert {prompt.text for prompt in found} < texts
    token_ids = {tuple(_prompt_ids(opened, opened.run, prompt)) for prompt in found}
    assert token_ids == {pair.prompt for pair in valid}


def test_held_out_prompts_with_tools_are_an_error(trained):
    opened, _ = trained(with_tools)
    with pytest.raises(DataError, match="prompts with `tools` are not supported here"):
        held_out_prompts(opened.run, opened.base)
