import json
from dataclasses import replace

import pytest

from mlx_dpo.errors import DamagedFileError
from mlx_dpo.runs.folder import RunPaths, remove_run
from mlx_dpo.saved_runs.stored_evaluations import (
    StoredEvaluation,
    read_evaluations,
    save_evaluation,
)

STORED = StoredEvaluation(
    measurement="perplexity",
    subject="book.txt",
    date="2026-11-30T06:15:00+00:00",
    adapter_digest="a1",
    versions={"mlx-dpo": "0.1.0"},
    settings={"window": 64},
    results={"base": {"token_perplexity": 2.5}},
)


def read(folder, digest=None):
    return read_evaluations(RunPaths(folder), adapter_digest=digest)


def test_what_was_saved_is_read_the_oldest_first(tmp_path):
    assert read(tmp_path) == []
    newer = replace(STORED, subject="a.txt", date="2026-12-01T00:00:00+00:00")
    for evaluation in (newer, STORED):
        save_evaluation(RunPaths(tmp_path), evaluation)
    assert read(tmp_path) == [STORED, newer]
    assert read(tmp_path, "a1") == [STORED, newer]
    assert read(tmp_path, "a2") == []


def test_a_newer_result_replaces_that_of_the_same_subject_alone(tmp_path):
    again = replace(STORED, settings={"window": 32})
    other = replace(STORED, subject="book.md")
    for evaluation in (STORED, other, again):
        save_evaluation(RunPaths(tmp_path), evaluation)
    assert {e.subject: e.settings["window"] for e in read(tmp_path)} == {
        "book.txt": 32,
        "book.md": 64,
    }


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a/b", "a-b"),
        ("x" * 100, "x" * 101),
        ("../../x", "x"),
        ("日本", "中国"),
        ("a, b", "a b"),
    ],
)
def test_different_subjects_have_different_files_in_the_folder(first, second):
    names = [replace(STORED, subject=subject).file_name for subject in (first, second)]
    assert names[0] != names[1]
    assert all("/" not in name and name.isascii() and len(name) < 120 for name in names)


def test_a_damaged_file_is_named(tmp_path):
    path = save_evaluation(RunPaths(tmp_path), STORED)
    path.write_text(path.read_text().replace("2.5", "2.4"))
    with pytest.raises(DamagedFileError, match=r"perplexity-book\.txt\.json: damaged"):
        read(tmp_path)
    path.write_text(json.dumps({"measurement": "perplexity"}))
    with pytest.raises(DamagedFileError, match="`subject` must be str, found nothing"):
        read(tmp_path)
    path.write_text(json.dumps({**STORED.__dict__, "results": [1]}))
    with pytest.raises(DamagedFileError, match="`results` must be dict, found list"):
        read(tmp_path)


def test_a_new_run_in_the_folder_has_no_results_of_the_earlier_one(tmp_path):
    save_evaluation(RunPaths(tmp_path), STORED)
    remove_run(RunPaths(tmp_path))
    assert read(tmp_path) == []
