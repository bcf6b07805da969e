"""Pools of ranks that all tests of a pytest process share."""

from contextlib import ExitStack

import pytest

from tests.distributed.rank_pool import RankPool
from tests.distributed.rank_runs import RankRuns
from tests.distributed.run_cases import make_inputs


@pytest.fixture(scope="session")
def pools(tmp_path_factory):
    """Return a pool of ranks by their number; the processes start at the first call."""
    folder = tmp_path_factory.mktemp("ranks")
    with ExitStack() as stack:
        yield {n: stack.enter_context(RankPool(n, folder / str(n))) for n in (1, 2, 3)}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Return a folder with the models and pairs of all runs, which no test may change."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def runs(pools, inputs, tmp_path_factory):
    """Return what trains runs, by the number of ranks."""
    folder = tmp_path_factory.mktemp("runs")
    return {n: RankRuns(pool, inputs, folder / str(n)) for n, pool in pools.items()}
