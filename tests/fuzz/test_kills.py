"""After `kill -9` at any moment the next command works and ends at the same files, bit for bit.

Moments are of two kinds: of the clock, and before a change of the file system (a rename, a file
that is opened to write), where a command is in the middle of what it writes. Both come from a fixed
seed; `Scenario.chains` says how often a command is killed before it may end.
"""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest

from tests.fuzz.fork_server import ForkServer
from tests.fuzz.watchdog import write_material

Content = dict[str, Any]
TRAIN = ("train", "pairs.jsonl", "--model", "base", "--output", "new", "--valid-fraction", "0.25",
         "--batch-size", "3", "--learning-rate", "1e-3", "--epochs", "4", "--lora-r", "2",
         "--lora-dropout", "0.1", "--save-steps", "2", "--eval-steps", "3", "--resume")  # fmt: skip
COLLECT = ("collect", "--model", "base", "--prompts", "prompts.txt", "--output", "new.jsonl",
           "--reward", "rewards.py:vowels", "--max-tokens", "4", "--seed", "1")  # fmt: skip
LOOP = (
    "loop",
    "pairs.jsonl",
    "--model",
    "base",
    "--output",
    "new",
    "--reward",
    "rewards.py:vowels",
    "--rounds",
    "2",
    "--answers",
    "2",
    "--max-tokens",
    "4",
    "--learning-rate",
    "0.01",
    "--batch-size",
    "2",
    "--save-steps",
    "1",
    "--resume",
)
VARYING = re.compile(rb'"(time|tokens_per_second|seconds|peak_memory|date|id|wall)": [^,}\n]*')
MATERIAL = ("base", "pairs.jsonl", "prompts.txt", "rewards.py")


class Scenario(NamedTuple):
    """A command that is killed and given again until it ends."""

    words: tuple[str, ...]
    material: tuple[str, ...]  # what it needs, in its folder
    read: Callable[[Path], Content]  # what must be equal in the end
    chains: tuple[int, ...] = (4, 4, 4, 4, 4)  # kills before the command may end
    finished: str = ""  # what the command says if a killed one had finished


def files_of(*names: str) -> Callable[[Path], Content]:
    """Return a function that reads files, and folders as a whole, without times and speeds."""

    def read(folder: Path) -> Content:
        paths = [path for name in names for path in [folder / name, *(folder / name).rglob("*")]]
        return {
            str(path.relative_to(folder)): VARYING.sub(b"", path.read_bytes())
            for path in paths
            if path.is_file()
        }

    return read


def run_of(name: str) -> Callable[[Path], Content]:
    """Return a function that reads the adapters and the steps of a run."""

    def read(folder: Path) -> Content:
        rows = [
            json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()
        ]
        adapters = mx.load(str(folder / name / "adapters.safetensors"))
        values: Content = {key: value.tolist() for key, value in adapters.items()}
        record = json.loads((folder / name / "run.json").read_text())
        return values | {
            "steps": [(row["step"], row["loss"]) for row in rows if "loss" in row],
            "evaluation": record["evaluation"],
            "state": record["state"],
            "names": sorted(p.name for p in (folder / name).iterdir() if p.name[0] != "."),
        }

    return read


def collection(folder: Path) -> Content:
    """Read the pairs and skipped prompts of a collection, without times."""
    content = {}
    for name in ("new.jsonl", "new.passed.jsonl"):
        lines = (folder / name).read_text().splitlines() if (folder / name).exists() else []
        rows = [json.loads(line) for line in lines]
        content[name] = [(row["prompt"], row.get("chosen"), row.get("rejected")) for row in rows]
    return content


def rounds(folder: Path) -> Content:
    """Read the runs and pairs of a loop's rounds."""
    content: Content = {}
    for number in (1, 2):
        name = f"new/round-{number:02d}"
        content[name] = run_of(f"{name}/run")(folder)
        rows = [
            json.loads(line) for line in (folder / name / "pairs.jsonl").read_text().splitlines()
        ]
        content[name]["pairs"] = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
        evaluation = json.loads((folder / name / "evaluation.json").read_text())
        content[name]["reward"] = evaluation["mean_reward"]
    return content


EXISTS = r"already exists|is not empty"
SCENARIOS = {
    "train": Scenario(TRAIN, MATERIAL, run_of("new"), (6, 5, 5, 4), "is finished after"),
    "train --resume": Scenario(
        ("train", "--resume", "--output", "unfinished"), (*MATERIAL, "unfinished"),
        run_of("unfinished"), (4, 4, 4, 4, 4), "is finished after",
    ),
    "collect": Scenario(COLLECT, MATERIAL, collection, (4,) * 6),
    "loop": Scenario(LOOP, MATERIAL, rounds, (5, 5, 5, 5)),
    "data split": Scenario(
        ("data", "split", "pairs.jsonl", "--output", "new"), MATERIAL, files_of("new"),
        (2,) * 10, EXISTS,
    ),
    "data clean": Scenario(
        ("data", "clean", "pairs.jsonl", "--output", "new.jsonl", "--model", "base"), MATERIAL,
        files_of("new.jsonl", "new.report.json"), (2,) * 10, EXISTS,
    ),
    "convert": Scenario(
        ("convert", "base", "--bits", "4", "--group-size", "32", "--output", "new"), MATERIAL,
        files_of("new"), (2,) * 10, EXISTS,
    ),
    "fuse": Scenario(
        ("fuse", "run", "--output", "new", "--force"), (*MATERIAL, "run"), files_of("new"),
        (2,) * 10, EXISTS,
    ),
    "export": Scenario(
        ("export", "run", "--base-model", "base"), (*MATERIAL, "run"), files_of("run"), (2,) * 10
    ),
    "card": Scenario(
        ("card", "run", "--overwrite", "--base-model", "org/base", "--name", "org/name"),
        (*MATERIAL, "run"), files_of("run"), (2,) * 3,
    ),
    "push": Scenario(
        ("push", "run", "org/name", "--dry-run", "--base-model", "org/base"), (*MATERIAL, "run"),
        files_of("run"), (2,) * 3,
    ),
    "compare": Scenario(
        ("compare", "run", "--html", "new.html", "--max-tokens", "3"), (*MATERIAL, "run"),
        files_of("run"), (2,) * 4,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return write_material(tmp_path_factory.mktemp("kills") / "material")


@pytest.fixture(scope="module")
def server():
    server = ForkServer()
    yield server
    server.close()


def make_folder(material: Path, folder: Path, names: tuple[str, ...]) -> Path:
    """Copy what a scenario needs to a new folder."""
    folder.mkdir()
    for name in names:
        if (material / name).is_dir():
            shutil.copytree(material / name, folder / name)
        else:
            shutil.copy(material / name, folder / name)
    return folder


def temporaries(folder: Path, ignored: str = "-") -> list[str]:
    """List the temporary files and folders that are left, except in one folder."""
    paths = [path.relative_to(folder) for path in folder.rglob(".mlx-dpo-*")]
    return sorted(str(path) for path in paths if path.parts[0] != ignored)


def unknown_names(folder: Path, known: set[str]) -> set[str]:
    """Return the names that neither an uninterrupted command writes nor are temporary."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in names - known if ".mlx-dpo-" not in name}


def kill_and_finish(scenario, server, folder, draw, whole, kills):
    """Kill a command `kills` times, then let it end; return how many kills met it at work."""
    met = 0
    for number in range(kills):
        share = 1 / (1 + number)  # less and less is left to do
        moment: dict[str, Any] = {"before": draw.randint(1, max(1, round(share * whole.changes)))}
        if number % 2:
            moment = {"after": draw.uniform(0.02, share * whole.seconds)}
        ended = server.run(scenario.words, folder, **moment)
        met += ended.killed
        if not ended.killed:
            check_ended(scenario, ended)
    ended = server.run(scenario.words, folder)
    check_ended(scenario, ended)
    return met


def check_ended(scenario, ended):
    """Refuse a command that fails for another reason than that it had finished before."""
    if ended.status:
        assert scenario.finished, ended.output
        assert re.search(scenario.finished, ended.output), ended.output
        assert "Traceback" not in ended.output


def check_scenario(name, server, material, tmp_path):
    scenario = SCENARIOS[name]
    first = make_folder(material, tmp_path / "first", scenario.material)
    server.run(scenario.words, first)  # compiles kernels, which are changes of files, too
    straight = make_folder(material, tmp_path / "straight", scenario.material)
    whole = server.run(scenario.words, straight)
    assert whole.status == 0, whole.output
    expected = scenario.read(straight)
    known = {str(path.relative_to(straight)) for path in straight.rglob("*")}
    draw = random.Random(name)
    met = 0
    for number, kills in enumerate(scenario.chains):
        folder = make_folder(material, tmp_path / f"killed-{number}", scenario.material)
        met += kill_and_finish(scenario, server, folder, draw, whole, kills)
        assert scenario.read(folder) == expected
        assert temporaries(folder, "cache") == []
        assert server.run(("cache", "clear", "--yes"), folder).status == 0
        assert temporaries(folder) == []
        assert unknown_names(folder, known) == set()
    assert met >= sum(scenario.chains) / 3


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_killed_command_given_again_ends_at_the_same_files(name, server, material, tmp_path):
    check_scenario(name, server, material, tmp_path)


def test_commands_are_killed_two_hundred_times():
    assert sum(sum(scenario.chains) for scenario in SCENARIOS.values()) >= 200
    assert len({scenario.words[:2] for scenario in SCENARIOS.values()}) >= 10
