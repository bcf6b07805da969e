import os
import time
from functools import partial

import mlx.core as mx
import pytest

from mlx_dpo.config.training import PassLimit
from mlx_dpo.scoring.score_pairs import score_pairs
from mlx_dpo.training import reference_logps as reference
from mlx_dpo.training.reference_logps import reference_logps


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


def ask(model, pairs, cache, provenance="base"):
    score = partial(score_pairs, limit=PassLimit(pairs=2))
    return reference_logps(model, pairs, provenance=provenance, cache=cache, score=score)


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
