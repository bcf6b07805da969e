"""Ranks that are killed, suspended or interrupted: all end, and the run goes on to the same end.

The slow tests kill at least 200 ranks, drawn by fixed seeds, and print how many tries failed.
"""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest

from mlx_dpo.io.atomic import TEMPORARY
from mlx_dpo.startup.jit_cache import use_private_jit_cache
from tests.distributed.launched_run import LaunchedRun
from tests.distributed.run_cases import differences, results

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")

# 24 steps: a kill has many steps, evaluations and checkpoints to meet.
LONG = {
    "epochs": 12, "lora_dropout": 0.2, "save_steps": 2, "save_total_limit": 2, "eval_steps": 3,
    "logging_steps": 1,
}  # fmt: skip
TOTAL = 24
END_SECONDS = 30  # until all ranks have ended; 10 are stated for an idle machine
KILLS = 16  # per phase and number of ranks: 7 * 2 * 16 = 224
TIMEOUT = 5  # seconds without a sign of life after which a rank is given up, in these tests


@pytest.fixture(scope="module")
def place(tmp_path_factory, inputs):
    return Place(tmp_path_factory.mktemp("killed"), inputs)


class Place:
    """Starts runs in new folders; has the results of the uninterrupted run."""

    def __init__(self, folder, inputs):
        self.folder = folder
        self.inputs = inputs
        self.number = 0
        with self.run(1, self.new_output()) as straight:
            code, _ = straight.end(240)
            assert code == 0, straight.text()
            self.expected = results(straight.output)
        assert self.expected["run.json steps"] == TOTAL

    def new_output(self, start=None):
        """Return the path of a run folder that does not exist, or is a copy of `start`."""
        self.number += 1
        output = self.folder / f"{self.number}" / "run"
        if start is not None:
            shutil.copytree(start, output)
        return output

    def run(self, count, output, *words):
        """Start or resume a run, with the compiled kernels of this machine and no other cache."""
        cache = output.parent / "cache"
        if not cache.exists():
            kernels = use_private_jit_cache(None)
            if kernels is not None and (kernels / "mlx").is_dir():
                (cache / kernels.name).mkdir(parents=True, mode=0o700)
                shutil.copytree(kernels / "mlx", cache / kernels.name / "mlx")
        return LaunchedRun(count, self.inputs, output, LONG, *words, cache=cache)

    def finish(self, count, output):
        """Resume a run to its end on `count` ranks; return how its results are wrong."""
        if not is_finished(output):
            with self.run(count, output, "--resume") as run:
                code, _ = run.end(240)
                if code != 0:
                    return [f"resuming on {count}: exit code {code}: {run.text()}"]
        wrong = differences(self.expected, results(output))
        wrong += [f"left: {path}" for path in output.rglob("*") if TEMPORARY.fullmatch(path.name)]
        shutil.rmtree(output.parent)
        return wrong


def is_finished(output):
    record = output / "run.json"
    return record.exists() and json.loads(record.read_text())["state"] == "finished"


# --- moments -------------------------------------------------------------------------------------
# Each function waits until the phase has begun, and returns False if the run ended before.


def in_connect(run, draw):
    return run.wait_for_ranks()


def in_load(run, draw):
    return run.wait_until(lambda: "Loading model" in run.text())


def in_reference(run, draw):
    return run.wait_until(lambda: "Computing reference" in run.text())


def in_step(run, draw):
    due = draw.randint(1, 6) + run.rows_before
    return run.wait_until(lambda: run.rows() >= due)


def in_checkpoint(run, draw):
    """In the writing of a checkpoint, which is in a temporary folder until it is complete."""
    folder = run.output / "checkpoints"
    due = draw.randint(1, 6) + run.rows_before
    return run.wait_until(lambda: run.rows() >= due) and run.wait_until(
        lambda: folder.exists() and any(TEMPORARY.fullmatch(name) for name in os.listdir(folder)),
        every=0.0005,
    )


def in_evaluation(run, draw):
    """After the row of a step that an evaluation follows."""
    due = 4 * draw.randint(1, 2) + run.rows_before // 4 * 4 + 3  # three steps and an evaluation
    return run.wait_until(lambda: run.rows() >= due, every=0.0005)


def at_end(run, draw):
    return run.wait_until(lambda: run.rows() >= TOTAL * 4 // 3 - 1)


PHASES = {  # and the longest time between the sign of the phase and the kill, in seconds
    in_connect: 0.6,
    in_load: 0.4,
    in_reference: 0.1,
    in_step: 0.1,
    in_checkpoint: 0.002,
    in_evaluation: 0.02,
    at_end: 0.3,
}
FRESH = (in_connect, in_load, in_reference)  # phases of a run that has no results yet


# --- kills ---------------------------------------------------------------------------------------


def try_to_kill(run, rank, phase, draw):
    """Kill a rank in a phase; returns whether it was killed, and what is wrong afterwards."""
    run.rows_before = run.rows()
    seconds = draw.uniform(0, PHASES[phase])
    killed = False
    if phase(run, draw):
        due = run.age() + seconds
        run.wait_until(lambda: run.age() >= due, every=0.0005)
        killed = run.send(rank, signal.SIGKILL)
    try:
        code, _ = run.end(END_SECONDS)
    except AssertionError as error:
        return killed, [str(error)]
    wrong = []
    if killed and code == 0 and not is_finished(run.output):
        wrong.append(f"exit code 0\n{run.text()}")
    if killed and not is_finished(run.output) and f"rank {rank}" not in run.text():
        wrong.append(f"the message does not name rank {rank}\n{run.text()}")
    if "resume with: " in run.text() and f" --ranks {run.count}" not in run.text():
        wrong.append(f"the command resumes on one rank\n{run.text()}")
    if not killed and code != 0:
        wrong.append(f"exit code {code} without a kill\n{run.text()}")
    return killed, wrong


def kill_often(place, count, phase, kills, seed):
    """Kill ranks of runs in a phase `kills` times; every run is resumed to its end."""
    draw = random.Random(f"{seed} {count} {phase.__name__}")
    done, failures, output = 0, [], place.new_output()
    tries = 0
    while done < kills and tries < 3 * kills:
        tries += 1
        rank = draw.randrange(count)
        if phase in FRESH and draw.random() < 0.7:  # the others go on from what is there
            output = place.new_output()
        with place.run(count, output, "--resume") as run:
            killed, wrong = try_to_kill(run, rank, phase, draw)
        done += killed
        print(f"{phase.__name__}, rank {rank} of {count}: kill {done}, {wrong or 'all ended'}")
        if wrong:
            failures.append(f"rank {rank} of {count}, kill {done}: " + "; ".join(wrong))
            output = place.new_output()
        elif is_finished(output) or done == kills or phase is at_end or draw.random() < 0.15:
            wrong = place.finish(draw.choice([1, 2, 3]), output)
            print(f"resumed: {wrong or 'as uninterrupted'}")
            failures += [f"after rank {rank} of {count} was killed: {w}" for w in wrong]
            output = place.new_output()
    print(f"\n{phase.__name__}, {count} ranks: {done} kills, {len(failures)} failures")
    assert failures == []
    assert done == kills


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("phase", PHASES)
def test_ranks_are_killed_in_a_phase(place, phase, count):
    kill_often(place, count, phase, KILLS, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("phase", [in_load, in_step, in_evaluation])
def test_a_killed_launcher_leaves_no_rank(place, phase, count):
    output = place.new_output()
    with place.run(count, output) as run:
        run.rows_before = 0
        assert phase(run, random.Random(count))
        run.process.kill()
        run.process.wait()
        ended = run.wait_for_end(END_SECONDS)
        assert ended, f"ranks outlived the launcher: {run.processes()}\n{run.text()}"
    assert place.finish(2, output) == []


# --- suspended -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("phase", [in_load, in_step])
@pytest.mark.parametrize(("count", "rank"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_a_suspended_rank_ends_all_within_the_timeout(place, count, rank, phase):
    output = place.new_output()
    with place.run(count, output, "--rank-timeout", str(TIMEOUT)) as run:
        run.rows_before = 0
        assert phase(run, random.Random(rank))
        assert run.send(rank, signal.SIGSTOP)
        code, _ = run.end(TIMEOUT + END_SECONDS)
        assert code != 0, run.text()
        assert f"rank {rank}" in run.text()
    assert place.finish(1, output) == []


# --- interrupted ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("target", ["launcher", 0, 1])
def test_an_interrupt_saves_one_common_step(place, count, target):
    output = place.new_output()
    with place.run(count, output) as run:
        run.rows_before = 0
        assert in_step(run, random.Random(count))
        interrupt(run, target)
        code, _ = run.end(END_SECONDS)
        assert code == 130, run.text()
        assert "Traceback" not in run.text()
        assert run.text().count("Importing MLX") == 1  # not by the launcher and rank 0
        command = f"resume with: mlx-dpo train --resume --output {output.name} --ranks {count}"
        assert command in " ".join(run.text().split())
    assert not is_finished(output)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert (output / "checkpoints" / f"step-{max(steps):06d}" / "state.json").exists()
    assert place.finish(3, output) == []


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_a_second_interrupt_ends_all_at_once(place, count):
    output = place.new_output()
    with place.run(count, output) as run:
        run.rows_before = 0
        assert in_step(run, random.Random(count))
        run.process.send_signal(signal.SIGINT)
        run.process.send_signal(signal.SIGINT)
        code, _ = run.end(END_SECONDS)
        assert code != 0, run.text()
        assert "Traceback" not in run.text()
    assert place.finish(1, output) == []


def interrupt(run, target):
    if target == "launcher":
        run.process.send_signal(signal.SIGINT)
    else:
        assert run.send(target, signal.SIGINT)


def test_the_signs_of_the_phases_are_still_those_of_the_program():
    """The phases are recognized by lines that the program prints."""
    texts = [p.read_text() for p in (Path(__file__).parents[2] / "mlx_dpo").rglob("*.py")]
    for sign in ("Loading model", "Computing reference"):
        assert any(sign in text for text in texts), sign
