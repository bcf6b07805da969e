"""When a run computes two passes at once, and that a resumed run does as it did."""

import json
import multiprocessing
import sys
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_dpo.errors import TrainingError
from mlx_dpo.parallel import second_process
from mlx_dpo.runs import auto_batch_size
from mlx_dpo.runs.folder import lock_folder
from mlx_dpo.runs.trainer import DPOTrainer
from mlx_dpo.training.checkpoint import saved_steps
from tests.runs.test_auto_batch_size import memory_limit, stopped_after

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")


@pytest.fixture(autouse=True)
def possible(monkeypatch):
    """Let two passes at once be possible whatever BLAS is there."""
    monkeypatch.setattr(auto_batch_size, "can_compute_two_passes", lambda: True)


@pytest.fixture
def config(config):
    return replace(config, lora_dropout=None)


def adapters_of(config):
    return mx.load(f"{config.output}/adapters.safetensors")


def test_a_run_with_two_passes_at_once_ends_with_the_same_bits(config, tmp_path, monkeypatch):
    """Stopped and resumed, too; the run record says how many passes were computed at once."""
    whole, parts, single = (
        replace(config, output=str(tmp_path / name)) for name in ("whole", "parts", "single")
    )
    asked = []
    ask = second_process.SecondProcess.ask

    def count(self, question):
        asked.append(self)
        ask(self, question)

    monkeypatch.setattr(second_process.SecondProcess, "ask", count)
    trainer = stopped_after(whole, None)
    assert trainer.fitted.describe().endswith("in its own process, need up to twice as much")
    assert asked
    stopped_after(parts, 2)
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["passes_at_once"] == 2
    trainer = stopped_after(parts, None, resume=True)
    assert trainer.record["passes_at_once"] == 2
    monkeypatch.setattr(auto_batch_size, "can_compute_two_passes", lambda: False)
    asked.clear()
    assert stopped_after(single, None).record["passes_at_once"] == 1
    assert asked == []
    expected = adapters_of(single)
    for name, value in expected.items():
        assert mx.array_equal(adapters_of(whole)[name], value), name
        assert mx.array_equal(adapters_of(parts)[name], value), name


def test_leaving_the_trainer_ends_the_second_process_and_releases_the_lock(config):
    """Also if the caller keeps the iterator of the steps, as a cell of a notebook does."""
    with DPOTrainer(config) as trainer:
        steps = trainer.steps()
        next(steps)
        assert multiprocessing.active_children()
    assert multiprocessing.active_children() == []
    with lock_folder(trainer.paths):
        assert list(steps) == []


def test_a_run_whose_second_process_was_killed_resumes_from_its_last_step(config, tmp_path):
    """As by the system when memory runs out; the error comes at the next step."""
    whole, killed = (replace(config, output=str(tmp_path / name)) for name in ("whole", "killed"))
    stopped_after(whole, None)
    ended = pytest.raises(TrainingError, match="the second process of the run ended")
    with ended, DPOTrainer(killed) as trainer:
        for row in trainer.steps():
            if row["step"] == 1:
                [second] = multiprocessing.active_children()
                second.kill()
                second.join()
    assert saved_steps(trainer.paths.checkpoints) == [1]
    stopped_after(killed, None, resume=True)
    for name, value in adapters_of(whole).items():
        assert mx.array_equal(adapters_of(killed)[name], value), name


def test_without_memory_for_two_passes_they_come_one_after_the_other(config, tmp_path):
    needed = stopped_after(replace(config, output=str(tmp_path / "roomy")), 1).fitted.bytes
    with memory_limit(int(1.9 * needed)):
        trainer = stopped_after(config, 1)
    assert trainer.record["passes_at_once"] == 1
    assert "; one pass at a time, because two at once may need twice" in trainer.fitted.describe()


def test_many_trainable_weights_take_one_pass_at_a_time(config, monkeypatch):
    monkeypatch.setattr(auto_batch_size, "MAX_GRADIENT_BYTES", 0)
    trainer = stopped_after(config, 1)
    assert trainer.record["passes_at_once"] == 1
    assert "at once" not in trainer.fitted.describe()


def test_dropout_is_the_same_with_two_passes_at_once(config, tmp_path, monkeypatch):
    """Each pass draws from its own seed, whichever process computes it."""
    double, single = (
        replace(config, output=str(tmp_path / name), lora_dropout=0.3) for name in ("two", "one")
    )
    assert stopped_after(double, None).record["passes_at_once"] == 2
    monkeypatch.setattr(auto_batch_size, "can_compute_two_passes", lambda: False)
    assert stopped_after(single, None).record["passes_at_once"] == 1
    for name, value in adapters_of(single).items():
        assert mx.array_equal(adapters_of(double)[name], value), name
