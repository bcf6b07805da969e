"""Pools of ranks that all tests of a pytest process share."""

from contextlib import ExitStack

import pytest

from tests.distributed.rank_pool import RankPool


@pytest.fixture(scope="session")
def pools(tmp_path_factory):
    """Return a pool of ranks by their number; the processes start at the first call."""
    folder = tmp_path_factory.mktemp("ranks")
    with ExitStack() as stack:
        yield {n: stack.enter_context(RankPool(n, folder / str(n))) for n in (1, 2, 3)}
