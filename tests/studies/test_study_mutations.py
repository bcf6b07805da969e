"""The faults that studies have to find: each can be put in, and (slow) each is found."""

from collections import Counter

import pytest

from scripts.studies import NAMES, mutations
from scripts.studies.mutations import BY_NAME, MUTATIONS, UNCHANGED, Outcome
from scripts.studies.reporting import csv_rows

PRINTED = """\
holds  total_variation: 2 × 10⁻⁵; bound < 0.01
       Total variation
FAILS  implicit_reward: 0.3; bound > 0.999
       R² of FAILS
"""


def test_there_are_twelve_of_loss_mask_reference_and_beta():
    assert Counter(m.breaks for m in MUTATIONS) == {"loss": 3, "mask": 3, "reference": 3, "β": 3}
    assert len(BY_NAME) == 12


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_text_that_a_mutation_replaces_is_in_its_file_once(mutation):
    """Whoever changes that code has to change the mutation with it."""
    for edit in mutation.edits:
        text = (csv_rows.ROOT / edit.file).read_text(encoding="utf-8")
        assert text.count(edit.before) == 1, edit.file
        compile(text.replace(edit.before, edit.after), edit.file, "exec")
    assert set(mutation.studies) <= set(NAMES)


def test_a_checkout_is_copied_with_the_mutation(tmp_path):
    mutations.copy_checkout(tmp_path, BY_NAME["no_beta"])
    changed = [
        path.relative_to(tmp_path).as_posix()
        for path in tmp_path.rglob("*.py")
        if path.read_bytes() != (csv_rows.ROOT / path.relative_to(tmp_path)).read_bytes()
    ]
    assert changed == [mutations.PAIRWISE]


def test_a_mutation_whose_text_is_gone_is_refused(tmp_path):
    gone = BY_NAME["no_beta"]._replace(edits=(mutations.Edit(mutations.PAIRWISE, "?!", ""),))
    with pytest.raises(ValueError, match="no_beta replaces is there 0 times"):
        mutations.copy_checkout(tmp_path, gone)


@pytest.mark.parametrize(
    ("status", "output", "errors", "outcome"),
    [
        (1, PRINTED, "", Outcome(("implicit_reward",))),
        (0, PRINTED.replace("FAILS", "holds"), "a warning", Outcome(())),
        # A crash is not a find, whatever was printed before it.
        (1, "", "Traceback\nValueError: x\n", Outcome((), "ValueError: x")),
        (-9, "", "", Outcome((), "exit status -9")),
        (2, PRINTED, "Error: no such option\n", Outcome((), "Error: no such option")),
    ],
)
def test_a_study_finds_a_mutation_if_a_claim_fails(status, output, errors, outcome):
    assert mutations.read_outcome(status, output, errors) == outcome


def test_results_are_in_the_order_of_mutations_and_studies_each_once(tmp_path):
    path = tmp_path / "mutations.csv"
    for name, failed in (("no_beta", ""), (UNCHANGED, ""), ("exchanged", "a b"), ("no_beta", "c")):
        mutations.record(path, {"mutation": name, "study": "optimum", "failed": failed})
    found = [(row["mutation"], row["failed"]) for row in csv_rows.read_rows(path)]
    assert found == [(UNCHANGED, ""), ("exchanged", "a b"), ("no_beta", "c")]


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_is_found(mutation):
    rows = list(mutations.try_mutation(mutation, mutation.studies))
    assert [row["error"] for row in rows] == [""] * len(rows)
    assert all(row["failed"] for row in rows), rows
