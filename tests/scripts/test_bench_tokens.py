"""The script that counts the tokens of passes."""

import pytest

from mlx_dpo.types import TokenizedPair
from scripts.bench import bench_tokens, branching_sets

# Tokens through the layers at 8 pairs a pass, prefix trie to shared prompts, at most.
BOUNDS = {
    "4 completions, 6 pairs": 0.40,
    "system message of 600 tokens": 0.36,
    "a pair at each of 4 turns": 0.53,
}


@pytest.mark.parametrize("name", BOUNDS)
def test_branching_sets_save_the_tokens_that_the_docs_promise(name):
    passes = bench_tokens.grouped_passes(bench_tokens.SYNTHETIC[name](49152), 8)
    old, new = (bench_tokens.layer_tokens(passes, layout) for layout in bench_tokens.LAYOUTS)
    assert new <= BOUNDS[name] * old


def test_work_is_counted_one_by_one():
    """2 prompt tokens, then 3 and 4 of which one is shared; the last ones are not run."""
    pair = TokenizedPair((1, 2), (3, 4, 5), (3, 6, 7, 8))
    old, new = bench_tokens.ratios([pair], 8)
    assert tuple(old) == (2 + 2 + 3, 7, 7 * 7)
    assert tuple(new) == (2 + 1 + 1 + 2, 6, 6 * 6)


def test_pairs_of_a_prompt_are_in_one_pass():
    pairs = branching_sets.ranked_pairs(3, 100)
    passes = bench_tokens.grouped_passes(pairs[::2] + pairs[1::2], 6)
    assert [len({pair.prompt for pair in batch}) for batch in passes] == [1, 1, 1]


def test_it_prints_a_row_for_every_set(capsys, monkeypatch, tmp_path):
    few = {
        name: (lambda vocab, make=make: make(vocab)[:2])
        for name, make in bench_tokens.SYNTHETIC.items()
    }
    monkeypatch.setattr(bench_tokens, "SYNTHETIC", few)
    monkeypatch.setattr(bench_tokens, "SHIPPED", tmp_path / "none")
    arguments = ["--time", "--shape", "tiny", "--passes", "1", "--repeats", "1"]
    assert bench_tokens.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(few)
    assert all(line.count("|") == 8 for line in lines)
