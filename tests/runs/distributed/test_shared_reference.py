"""The cache of rank 0 decides which reference log-probs are computed, on all ranks."""

import mlx.core as mx
import pytest

from mlx_dpo.runs.reference import LogpsFile, stored_logps
from mlx_dpo.scoring.equivalence import random_pairs
from mlx_dpo.training.logps_cache import write_logps
from mlx_dpo.training.reference_logps import ReferenceCache, reference_logps
from mlx_dpo.types import PairLogps
from tests.runs.distributed.thread_ranks import run_ranks

PAIRS = random_pairs([(3, 2, 2), (4, 2, 2)], 50)
KNOWN = PairLogps(mx.array([-1.0, -2.0]), mx.array([-3.0, -4.0]))
mx.eval(KNOWN)


def ask(caches, calls):
    """Return a function that asks for the log-probs of two pairs with the cache of its rank."""

    def score(model, pairs, *, progress):
        calls.append(len(pairs))
        return KNOWN

    def run(ranks):
        cache = ReferenceCache(folder=caches[ranks.rank], provenance="p", ranks=ranks)
        return reference_logps(None, PAIRS, cache=cache, score=score).chosen.tolist()

    return run


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hit_on_one_rank_counts_on_rank_0_alone(tmp_path, rank):
    caches = [tmp_path / "0", tmp_path / "1"]
    ReferenceCache(folder=caches[rank], provenance="p").write(PAIRS, KNOWN)
    calls = []
    assert run_ranks(2, ask(caches, calls)) == [KNOWN.chosen.tolist()] * 2
    assert calls == ([] if rank == 0 else [2, 2])
    assert len(list(caches[0].iterdir())) == 1  # rank 0 writes what was computed


def test_only_rank_0_writes_its_cache(tmp_path):
    caches = [tmp_path / "0", tmp_path / "1"]
    run_ranks(2, ask(caches, []))
    assert [cache.exists() for cache in caches] == [True, False]


@pytest.mark.parametrize("rank", [0, 1])
def test_stored_log_probs_are_those_of_rank_0(tmp_path, rank):
    files = [tmp_path / "0" / "train.safetensors", tmp_path / "1" / "train.safetensors"]
    write_logps(files[rank], KNOWN)
    calls = []

    def compute():
        calls.append(1)
        return KNOWN

    def run(ranks):
        file = LogpsFile(files[ranks.rank], 2, ranks)
        return stored_logps(file, [0, 1], compute, lambda count: None).rejected.tolist()

    assert run_ranks(2, run) == [KNOWN.rejected.tolist()] * 2
    assert len(calls) == (0 if rank == 0 else 2)
