import os
import time
from functools import partial

import mlx.core as mx
import pytest

from mlx_dpo.config.training import PassLimit
from mlx_dpo.scoring.score_pairs import score_pairs
from mlx_dpo.training import reference_logps as reference
from mlx_dpo.training.reference_logps import ReferenceCache, are_scored, reference_logps


class Counting:
    """A model that counts how often it is asked."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self, tokens):
        self.calls += 1
        return self.model(tokens)

    def eval(self):
        self.model.eval()


@pytest.fixture
def model(tiny_llama):
    return Counting(tiny_llama)


def ask(model, pairs, cache, provenance="base", indices=None, **how):
    score = partial(score_pairs, limit=PassLimit(pairs=2))
    files = ReferenceCache(folder=cache, provenance=provenance)
    return reference_logps(model, pairs, indices, cache=files, score=score, **how)


def test_cached_logps_are_read_back_bit_for_bit(model, pairs, tmp_path):
    first = ask(model, pairs, tmp_path)
    calls = model.calls
    again = ask(model, pairs, tmp_path)
    assert model.calls == calls == 3
    assert mx.array_equal(first.chosen, again.chosen)
    assert mx.array_equal(first.rejected, again.rejected)


@pytest.mark.parametrize("change", ["provenance", "tokens", "order"])
def test_logps_of_other_contents_are_computed_again(model, pairs, tmp_path, change):
    ask(model, pairs, tmp_path)
    calls = model.calls
    if change == "provenance":
        ask(model, pairs, tmp_path, provenance="another base")
    elif change == "tokens":
        ask(model, [*pairs[:-1], pairs[0]], tmp_path)
    else:
        ask(model, pairs[::-1], tmp_path)
    assert model.calls == 2 * calls


def test_a_crash_loses_one_block_at_most(model, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_SIZE", 2)
    whole = ask(model, pairs, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    newest.unlink()
    model.calls = 0
    again = ask(model, pairs, tmp_path)
    assert model.calls == 1
    assert mx.array_equal(whole.chosen, again.chosen)


def test_an_answer_that_is_read_again_counts_as_used(model, pairs, tmp_path):
    ask(model, pairs, tmp_path)
    [path] = tmp_path.iterdir()
    os.utime(path, (0, 0))
    ask(model, pairs, tmp_path)
    assert path.stat().st_mtime > time.time() - 60


def test_a_cache_that_may_only_be_read_serves_as_well(model, pairs, tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(1, "Operation not permitted")

    first = ask(model, pairs, tmp_path)
    monkeypatch.setattr("os.utime", refused)
    assert mx.array_equal(ask(model, pairs, tmp_path).chosen, first.chosen)


def test_only_the_pairs_that_are_needed_are_scored_and_the_others_are_nan(model, pairs, tmp_path):
    """With one pair per pass the numbers are those of scoring all pairs, bit for bit."""
    one = partial(score_pairs, limit=PassLimit(pairs=1))
    files = [ReferenceCache(folder=tmp_path / name, provenance="base") for name in "ab"]
    whole = reference_logps(model, pairs, cache=files[0], score=one)
    model.calls, scored = 0, []
    some = reference_logps(model, pairs, [3, 1], cache=files[1], score=one, progress=scored.append)
    assert (model.calls, sum(scored)) == (2, 2)
    for got, expected in zip(some, whole, strict=True):
        assert mx.isnan(got).tolist() == [True, False, True, False, True]
        assert got[1].item() == expected[1].item() != got[3].item() == expected[3].item()
    assert are_scored(some, [1, 3])
    assert not are_scored(some, [1, 2])
    assert not are_scored(some)


def test_no_file_of_some_pairs_is_taken_for_one_of_all(model, pairs, tmp_path):
    """Runs of all pairs have the same bits whatever shorter runs have left in the cache."""
    fresh = ask(model, pairs, tmp_path / "fresh")
    for indices in ([3, 1], [1, 3], [4, 0, 2], [0, 1, 2, 3]):
        ask(model, pairs, tmp_path / "used", indices=indices)
    model.calls = 0
    after = ask(model, pairs, tmp_path / "used")
    assert model.calls == 3
    assert all(mx.array_equal(*values) for values in zip(fresh, after, strict=True))


def test_blocks_of_all_pairs_serve_a_shorter_run(model, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_SIZE", 2)
    whole = ask(model, pairs, tmp_path)
    model.calls, done = 0, []
    some = ask(model, pairs, tmp_path, indices=[3, 0], progress=done.append)
    assert (model.calls, sum(done)) == (0, 2)
    assert some.chosen[:4].tolist() == whole.chosen[:4].tolist()
    assert not are_scored(some, [4])


def test_a_longer_run_finds_the_blocks_of_a_shorter_one(model, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_SIZE", 2)
    ask(model, pairs, tmp_path, indices=[3, 1])
    model.calls = 0
    longer = ask(model, pairs, tmp_path, indices=[3, 1, 4, 0])
    assert model.calls == 1
    assert are_scored(longer, [0, 1, 3, 4])
