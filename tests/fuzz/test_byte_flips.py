"""Every file of a run and of the caches, damaged at many places: named, resumed before, or unread.

A command on damaged files must give the result of undamaged files bit for bit, or refuse them in
one line that names the file. If it gives the result because it computed something again, and said
nothing, the damage was in something that is not part of the result.
"""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_dpo import DPOConfig, DPOTrainer
from mlx_dpo.cli import cli
from mlx_dpo.data.tokenization import cache as token_cache
from mlx_dpo.io.notices import notify_once
from mlx_dpo.reporting.metrics_log import read_metrics
from tests.checkpoints import make_checkpoint
from tests.damaged_files import damage

RANDOM_FLIPS = 4  # per file, beside those at fixed places
RESUME = ("train", "--resume", "--output", "unfinished")
TRAIN = ("train", "pairs.jsonl", "--model", "base", "--output", "new", "--max-steps", "2",
         "--batch-size", "3", "--lora-r", "2", "--learning-rate", "1e-3")  # fmt: skip
FINISHED = (
    ("generate", "run", "What is 1?", "--max-tokens", "4"),
    ("report", "run"),
    ("eval", "run"),
    ("push", "run", "org/name", "--dry-run", "--base-model", "org/base"),
)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Return a folder with a base, a finished run, an unfinished run, and their caches."""
    folder = tmp_path_factory.mktemp("flips") / "material"
    folder.mkdir()
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"It is {i}, friend.", "rejected": f"{i * 7} no"}
        for i in range(12)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLX_DPO_CACHE", "cache")
        patch.setattr(token_cache, "MIN_CACHED_BYTES", 0)
        make_checkpoint(Path("base"))
        Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        _train("run")
        _train("unfinished", stop_after=5)
        assert CliRunner().invoke(cli, ["eval", "run"]).exit_code == 0  # stores its result
        assert CliRunner().invoke(cli, ["card", "run", "--base-model", "org/base"]).exit_code == 0
    return folder


def _train(output, stop_after=None):
    config = DPOConfig.from_dict(
        {
            "model": "base", "pairs": ["pairs.jsonl"], "output": output, "valid_fraction": 0.25,
            "batch_size": 3, "learning_rate": 0.01, "epochs": 3, "lora_r": 2, "save_steps": 2,
            "eval_steps": 2, "metric_for_best_model": "loss", "load_best_model_at_end": True,
        }
    )  # fmt: skip
    with DPOTrainer(config) as trainer:
        trainer.prepare()
        for row in trainer.steps():
            if row["step"] == stop_after:
                trainer.request_stop()


@pytest.fixture
def place(material, tmp_path, monkeypatch):
    """Enter an empty folder with a cache of its own; `renew` fills it with undamaged files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_DPO_CACHE", "cache")
    monkeypatch.setattr(token_cache, "MIN_CACHED_BYTES", 0)
    for name in ("base", "pairs.jsonl"):
        Path(name).symlink_to(material / name)
    return tmp_path


def renew(material, *names):
    for name in (*names, "new"):
        shutil.rmtree(name, ignore_errors=True)
    for name in names:
        shutil.copytree(material / name, name)


def files(folder):
    """Return the files that commands read; reports and plots are written only."""
    written = {"report.html", "curves.png", "README.md", ".lock", "CACHEDIR.TAG"}
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path for path in paths if path.name not in written and "jit" not in path.parts]


def damages(path):
    """Yield the damage to try on a file: its kind and its offset."""
    size, draw = path.stat().st_size, random.Random(path.name)
    fixed = [0, 8, 20, size // 2, size - 40, size - 2, size - 1]
    offsets = [*fixed, *(draw.randrange(size) for _ in range(RANDOM_FLIPS))]
    yield from (("flipped", offset) for offset in offsets if 0 <= offset < size)
    yield from (("zeroed", offset) for offset in (0, size // 3))
    yield from (("cut", offset) for offset in (0, size // 2, size - 1))
    yield "removed", 0


def invoke(words):
    notify_once.cache_clear()
    result = CliRunner().invoke(cli, list(words))
    if result.exception and not isinstance(result.exception, SystemExit):
        return f"traceback: {result.exception!r}", result
    if result.exit_code not in (0, 1):
        return f"status {result.exit_code}", result
    if result.exit_code == 1 and len(result.output.strip().splitlines()[-1:]) != 1:
        return "no line", result
    return "", result


def refused_by_name(result, path):
    last = result.output.strip().splitlines()[-1]
    return result.exit_code == 1 and last.startswith("Error: ") and str(path.parts[0]) in last


def adapters_and_rows(folder):
    arrays = mx.load(f"{folder}/adapters.safetensors")
    rows = [
        {k: v for k, v in row.items() if k not in ("tokens_per_second", "peak_memory_gb")}
        for row in read_metrics(Path(folder) / "metrics.jsonl")
    ]
    return {name: value.tolist() for name, value in arrays.items()}, rows


def report(counts, failures):
    print("\n" + "\n".join(f"{count:5} {name}: {what}" for (name, what), count in counts.items()))
    assert not failures, "\n".join(failures)


@pytest.mark.slow
def test_damage_of_an_unfinished_run_is_named_or_does_not_change_its_result(material, place):
    renew(material, "unfinished", "cache")
    assert invoke(RESUME)[1].exit_code == 0
    expected = adapters_and_rows("unfinished")
    counts, failures = Counter(), []
    for path in files(material / "unfinished"):
        name = path.relative_to(material)
        for kind, offset in damages(path):
            renew(material, "unfinished", "cache")
            before = name.read_bytes()
            damage(name, kind, offset)
            if name.exists() and name.read_bytes() == before:
                continue
            problem, result = invoke(RESUME)
            if not problem and result.exit_code == 0:
                is_same = adapters_and_rows("unfinished") == expected
                named = "said" if str(name) in result.stderr else "no trace"
                what, problem = named, "" if is_same else "another result"
            else:
                what = "refused"
                problem = problem or ("" if refused_by_name(result, name) else "not named")
            counts[str(name), problem or what] += 1
            if problem:
                failures.append(f"{name} {kind} at {offset}: {problem}: {result.output[-300:]}")
    report(counts, failures)


@pytest.mark.slow
@pytest.mark.parametrize("words", FINISHED, ids=lambda words: words[0])
def test_damage_of_a_finished_run_is_named_or_does_not_change_what_is_read(material, place, words):
    renew(material, "run", "cache")
    expected = invoke(words)[1].stdout
    counts, failures = Counter(), []
    for path in files(material / "run"):
        name = path.relative_to(material)
        if "checkpoints" in name.parts or "reference" in name.parts:
            continue  # not read once a run is finished
        for kind, offset in damages(path):
            renew(material, "run", "cache")
            before = name.read_bytes()
            damage(name, kind, offset)
            if name.exists() and name.read_bytes() == before:
                continue
            problem, result = invoke(words)
            if not problem and result.exit_code == 0:
                problem = "" if result.stdout == expected else "another result"
            elif not problem:
                problem = "" if refused_by_name(result, name) else "not named"
            counts[str(name), problem or f"status {result.exit_code}"] += 1
            if problem:
                failures.append(f"{name} {kind} at {offset}: {problem}: {result.output[-300:]}")
    report(counts, failures)


def problem_of_cache(material, name, kind, offset, expected):
    """Return what is wrong after a damage of the cached file `name`, or an empty text."""
    renew(material)
    shutil.rmtree("cache", ignore_errors=True)
    shutil.copytree("whole", "cache")
    before = name.read_bytes()
    damage(name, kind, offset)
    if name.read_bytes() == before:
        return ""
    listed = invoke(("cache",))[1].output
    problem, trained = invoke(TRAIN)
    again = invoke(("cache",))[1].output
    same = not problem and adapters_and_rows("new") == expected
    damage(name, kind, offset)
    problem = problem or invoke(("cache", "clear", "--yes"))[0]
    found = {
        "not listed": f": {name.name}" in listed,
        "nothing said": "again" in trained.output,
        "another result": same,
        "not made again": f": {name.name}" not in again,
        "not cleared": not name.exists(),
    }
    return problem or ", ".join(what for what, right in found.items() if not right)


@pytest.mark.slow
def test_damage_of_a_cache_is_listed_cleared_and_made_again(material, place):
    renew(material)
    assert invoke(TRAIN)[1].exit_code == 0
    expected = adapters_and_rows("new")
    Path("cache").rename("whole")
    counts, failures = Counter(), []
    for path in files(Path("whole")):
        name = Path("cache", *path.parts[1:])
        for kind, offset in damages(path):
            if kind == "removed":
                continue
            problem = problem_of_cache(material, name, kind, offset, expected)
            counts[name.suffix, problem or "listed, cleared and made again"] += 1
            if problem:
                failures.append(f"{name} {kind} at {offset}: {problem}")
    report(counts, failures)
