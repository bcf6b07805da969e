"""Every claim of every study holds in its quick form, and its pictures can be drawn."""

import pytest

from mlx_dpo.reporting.plots import DARK, LIGHT
from scripts.studies import NAMES, load_study, mutations
from scripts.studies.reporting.csv_rows import FOLDER, read_rows
from scripts.studies.reporting.figures import draw_picture


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_claim_holds_in_a_copy_of_the_checkout(name, tmp_path):
    """As for mutations, without one: what these find is not there before."""
    mutations.copy_checkout(tmp_path, None)
    assert mutations.run_quick(name, tmp_path) == mutations.Outcome(())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_the_committed_rows_are_drawn_without_a_warning(name):
    """Only the pictures' rows are checked in the gate, since drawing takes a second each."""
    rows = read_rows(FOLDER / f"{name}.csv")
    for picture in load_study(name).pictures:
        for theme in (LIGHT, DARK):
            assert b"</svg>" in draw_picture(picture, rows, theme)
