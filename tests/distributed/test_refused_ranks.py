"""Ranks whose programs, settings or inputs differ are refused; what may differ is settled."""

import re
import shutil
import socket

import pytest

from tests.distributed.run_cases import CASES, differences, results

CHECKED = {"epochs": 1}
LITTLE_MEMORY = 0.006  # GB: too little for the passes that fit into 1 GB


@pytest.fixture
def two(runs):
    return runs[2]


def refused(two, name, call="train", changes=CHECKED, each=None, **others):
    """Start a run that is refused; return the messages of both ranks. Nothing was written."""
    replies = two.pool.call(call, two.arguments(name, changes, each=each), **others)
    assert all("error" in reply for reply in replies), replies
    for rank in range(2):
        left = [*(two.folder / name / f"rank-{rank}" / "work").rglob("*")]
        assert left == [], f"rank {rank} wrote {left}"
    return [reply["error"] for reply in replies]


def names_both(message, rank, *values):
    """Return whether a message is one line with the rank, its host and all values."""
    named = f"rank {rank} ({socket.gethostname()})" in message
    return named and "\n" not in message and all(value in message for value in values)


@pytest.mark.slow
def test_another_batch_size_on_a_rank_is_refused(two):
    main, _ = refused(two, "batch size", each=[{}, {"batch_size": 4}])
    assert names_both(main, 1, "`batch_size`", "4", "9"), main


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_other_pairs_on_a_rank_are_refused(two, inputs, rank):
    name = f"pairs of {rank}"
    for number in range(2):
        lines = (inputs / "pairs.jsonl").read_text().splitlines()
        if number == rank:
            lines[3] = lines[3].replace("friend", "mate")
        folder = two.folder / name / f"rank-{number}"
        folder.mkdir(parents=True)
        (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    main, _ = refused(two, name, each=[{"pairs": ["../pairs.jsonl"]}] * 2)
    assert names_both(main, 1, "the training pairs"), main
    digests = re.findall(r"[0-9a-f]{8,}", main)
    assert len(set(digests)) == 2, main


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "others", "noun"),
    [
        ("model", ("base", "other-base"), "the model"),
        ("reference_model", ("base", "other-base"), "the reference model"),
        ("start_adapter", ("start", "other-start"), "the start adapter"),
    ],
)
def test_another_model_on_a_rank_is_refused(two, inputs, setting, others, noun):
    for number, other in enumerate(others):
        folder = two.folder / setting / f"rank-{number}"
        folder.mkdir(parents=True)
        shutil.copytree(inputs / other, folder / "copy")
    changes = CHECKED | ({"lora_r": None} if setting == "start_adapter" else {})
    main, _ = refused(two, setting, changes=changes, each=[{setting: "../copy"}] * 2)
    assert names_both(main, 1, noun), main


@pytest.mark.slow
@pytest.mark.parametrize("package", ["mlx", "mlx-lm", "mlx-dpo"])
def test_another_version_on_a_rank_is_refused(two, package):
    main, _ = refused(
        two, package, "train_with_version", package=package, versions=["1.2.3", "1.2.4"]
    )
    assert names_both(main, 1, package, "1.2.3", "1.2.4"), main


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "file"),
    [("pairs", "pairs.jsonl"), ("model", "base"), ("start_adapter", "start")],
)
def test_an_input_that_a_rank_does_not_have_is_an_error_that_names_it(two, inputs, setting, file):
    name = f"no {file}"
    folder = two.folder / name / "rank-0"
    folder.mkdir(parents=True)
    (folder / file).symlink_to(inputs / file)
    changes = CHECKED | ({"lora_r": None} if setting == "start_adapter" else {})
    path = [f"../{file}"] if setting == "pairs" else f"../{file}"
    main, _ = refused(two, name, changes=changes, each=[{setting: path}] * 2)
    assert names_both(main, 1, f"../{file}"), main


# --- what may differ -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_rank_with_less_memory_decides_on_the_size_of_a_pass(two, runs, rank):
    """With 1 GB alone both would take larger passes."""
    changes = CASES["chosen by the run"] | {"scorer": "plain", "batch_size": 8}
    memory = [1.0, 1.0]
    memory[rank] = LITTLE_MEMORY
    large, small = (
        results_with_memory(two, f"{rank} {name}", changes, sizes)
        for name, sizes in (("large", [1.0, 1.0]), ("small", memory))
    )
    sizes = [r["run.json automatic_settings"]["micro_batch_size"] for r in (large, small)]
    assert sizes[0] > sizes[1]
    alone = runs[1].results("alone", changes | {"micro_batch_size": sizes[1]})
    names = [name for name in alone if name.startswith(("metrics", "checkpoints", "adapters"))]
    assert differences({n: alone[n] for n in names}, {n: small[n] for n in names}) == []


def results_with_memory(two, name, changes, gigabytes):
    two.pool.values("train_with_memory", two.arguments(name, changes), gigabytes=gigabytes)
    return results(two.folder / name / "rank-0" / "work" / "run")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"reference_model": "other-base"}])
@pytest.mark.parametrize("rank", [0, 1])
def test_log_probs_cached_on_one_rank_only_change_nothing(two, runs, rank, changes):
    expected = runs[1].train("alone", changes)
    cache = expected.parents[1] / "cache"
    assert list(cache.rglob("*.safetensors")), "nothing was cached"
    name = f"cached on {rank}"
    shutil.copytree(cache, two.folder / name / f"rank-{rank}" / "cache")
    assert differences(results(expected), two.results(name, changes)) == []
    shutil.rmtree(expected.parents[2])
