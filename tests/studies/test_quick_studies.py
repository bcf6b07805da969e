"""Every claim of every study holds in its quick form."""

import pytest

from scripts.studies import NAMES, mutations


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_claim_holds_in_a_copy_of_the_checkout(name, tmp_path):
    """As for mutations, without one: what these find is not there before."""
    mutations.copy_checkout(tmp_path, None)
    assert mutations.run_quick(name, tmp_path) == mutations.Outcome(())
