"""Notes on held-out prompts before a run starts."""

from dataclasses import replace
from pathlib import Path

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.runs.inputs import Inputs, load_inputs
from mlx_dpo.runs.summary import describe_held_out_prompts
from mlx_dpo.types import TokenizedPair


def pairs(prompt, count):
    return [TokenizedPair((prompt,), (n,), (n + 1,), "x") for n in range(count)]


def notes(train, held_out, share=0.05):
    inputs = Inputs(None, train, held_out, [], held_out_share=share)
    return describe_held_out_prompts(DPOConfig(), inputs)


def test_more_held_out_pairs_than_were_wanted_are_named_with_both_numbers():
    [note] = notes(pairs(1, 32), pairs(2, 28))
    assert note.startswith("28 pairs are held out, but --valid-fraction 0.05 asks for 3: ")
    assert notes(pairs(1, 57), pairs(2, 3)) == []
    assert notes(pairs(1, 32), pairs(2, 28), share=0.0) == []


def test_a_split_of_a_folder_is_not_compared_with_a_share(config, tmp_path):
    rows = Path(config.pairs[0]).read_text().splitlines()
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(rows[:6]))
    (folder / "valid.jsonl").write_text("\n".join(rows[6:]))
    config = replace(config, valid_fraction=None)
    loaded = load_inputs(replace(config, pairs=(str(folder),)))
    assert (len(loaded.valid), loaded.held_out_share) == (6, 0.0)
    assert describe_held_out_prompts(config, loaded) == []
    assert load_inputs(config).held_out_share == 0.05


def test_training_pairs_with_held_out_prompts_are_counted():
    [note] = notes([*pairs(1, 5), *pairs(2, 3)], pairs(2, 4), share=0.0)
    assert note.startswith("3 of the training pairs have a prompt that is also held out")
