"""Notes on held-out prompts before a run starts."""

from types import SimpleNamespace

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.runs.summary import describe_held_out_prompts
from mlx_dpo.types import TokenizedPair


def pairs(prompt, count):
    return [TokenizedPair((prompt,), (n,), (n + 1,), "x") for n in range(count)]


def notes(train, held_out, **settings):
    return describe_held_out_prompts(
        DPOConfig(**settings), SimpleNamespace(train=train, valid=held_out)
    )


def test_more_held_out_pairs_than_were_wanted_are_named_with_both_numbers():
    [note] = notes(pairs(1, 32), pairs(2, 28))
    assert note.startswith("28 pairs are held out, and 3 were wanted (--valid-fraction 0.05)")
    assert notes(pairs(1, 57), pairs(2, 3)) == []
    assert notes(pairs(1, 32), pairs(2, 28), valid="v.jsonl") == []


def test_training_pairs_with_held_out_prompts_are_counted():
    [note] = notes([*pairs(1, 5), *pairs(2, 3)], pairs(2, 4), valid="v.jsonl")
    assert note.startswith("3 of the training pairs have prompts that are held out too")
