import re
import shutil
from itertools import islice

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_map

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.config.loss import LossSettings
from mlx_dpo.config.training import PassLimit
from mlx_dpo.errors import DamagedFileError, ModelError, RunError
from mlx_dpo.scoring.score_pairs import score_pairs
from mlx_dpo.training import checkpoint
from mlx_dpo.training.loop import Progress, train
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import TrainingPlan
from tests.conftest import make_llama
from tests.damaged_files import damage
from tests.temporary_files import ended_process, temporary_path

FILES = ("adapters.safetensors", "adapter_config.json", "optimizer.safetensors")


def fresh(rank=4):
    policy = make_llama()
    adapters.attach_adapters(policy, rank=rank, scale=2.0, dropout=0.3, seed=1)
    optimizer = optim.AdamW(1e-2, weight_decay=0.01, bias_correction=True)
    optimizer.init(policy.trainable_parameters())
    return policy, optimizer


@pytest.fixture
def plan(tiny_llama, pairs):
    return TrainingPlan(
        pairs=pairs,
        reference=score_pairs(tiny_llama, pairs, limit=PassLimit(pairs=2)),
        objective=Objective(LossSettings(beta=0.1)),
        learning_rate=lambda done: 1e-2 / (1 + done),
        total_steps=8,
        batch_size=2,
        limit=PassLimit(pairs=1),
        max_grad_norm=1.0,
        seed=0,
    )


def save(folder, policy, optimizer, progress):
    return checkpoint.save(
        folder, policy, optimizer, progress, adapters.make_adapter_config(policy)
    )


def test_resuming_is_the_same_as_never_stopping_bit_for_bit(plan, tmp_path):
    """With dropout, weight decay, a schedule and a pass over the pairs that is cut in two."""
    straight, optimizer = fresh()
    expected = [row for _, row in train(straight, optimizer, plan, start=Progress())]

    stopped, optimizer = fresh()
    rows = []
    for done, row in islice(train(stopped, optimizer, plan, start=Progress()), 4):
        rows.append(row)
        save(tmp_path, stopped, optimizer, done)
    mx.random.seed(999)  # another process begins with another random state

    resumed, optimizer = fresh()
    start = checkpoint.restore(checkpoint.latest(tmp_path), resumed, optimizer)
    assert start == done
    rows += [row for _, row in train(resumed, optimizer, plan, start=start)]

    assert rows == expected
    for name, value in adapters.adapter_weights(resumed).items():
        assert mx.array_equal(value, adapters.adapter_weights(straight)[name]), name


@pytest.mark.parametrize("moment", ["os.replace", "mlx_dpo.io.atomic.flush"])
def test_a_failed_save_leaves_the_previous_checkpoint_and_no_partial_files(
    tmp_path, monkeypatch, moment
):
    policy, optimizer = fresh()
    save(tmp_path, policy, optimizer, Progress(step=1))

    def fail(*args):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(moment, fail)
    with pytest.raises(RunError, match=r"step-000002: cannot be written \(No space.*remain"):
        save(tmp_path, policy, optimizer, Progress(step=2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_only_the_last_checkpoints_remain_and_partial_files_of_a_crash_are_removed(tmp_path):
    policy, optimizer = fresh()
    for step in (9, 10, 11):
        save(tmp_path, policy, optimizer, Progress(step=step))
    temporary_path(tmp_path / "step-000012", ended_process()).mkdir()
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000010", "step-000011"]
    assert checkpoint.latest(tmp_path).name == "step-000011"


def test_a_step_is_saved_again_over_its_older_self(tmp_path):
    policy, optimizer = fresh()
    save(tmp_path, policy, optimizer, Progress(step=1, num_tokens=5))
    save(tmp_path, policy, optimizer, Progress(step=1, num_tokens=6))
    restored = checkpoint.restore(checkpoint.latest(tmp_path), *fresh())
    assert restored == Progress(step=1, num_tokens=6)


def test_adapters_of_another_shape_are_refused_by_name(tmp_path):
    folder = save(tmp_path, *fresh(rank=4), progress=Progress(step=1))
    with pytest.raises(ModelError, match=r"`model\.layers\.0\.mlp\.down_proj\.lora_a`"):
        checkpoint.restore(folder, *fresh(rank=8))


@pytest.mark.parametrize("name", [*FILES, "state.json"])
@pytest.mark.parametrize("change", ["emptied", "flipped", "removed", "cut"])
def test_a_damaged_checkpoint_gives_a_one_line_error(tmp_path, name, change):
    folder = save(tmp_path, *fresh(), progress=Progress(step=1))
    damage(folder / name, change)
    with pytest.raises(DamagedFileError, match=rf"^{re.escape(str(folder / name))}: ") as error:
        checkpoint.restore(folder, *fresh())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*FILES, "state.json"])
def test_a_run_falls_back_to_the_last_whole_checkpoint_and_says_so(tmp_path, name, caplog):
    for step in (1, 2, 3):
        save(tmp_path, *fresh(), progress=Progress(step=step))
    damage(tmp_path / "step-000003" / name, "flipped")
    damage(tmp_path / "step-000002" / name, "removed")
    assert checkpoint.latest_undamaged(tmp_path) == tmp_path / "step-000001"
    for step in (2, 3):
        assert f"step-{step:06d}/{name}: " in caplog.text
    assert caplog.text.count("resuming from step-000001") == 2
    # Otherwise pruning would keep them instead of the checkpoints that come after the first.
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_file_of_another_checkpoint_is_not_believed(tmp_path):
    for step in (1, 2):
        policy, optimizer = fresh()
        policy.update(tree_map(lambda value, step=step: value + step, policy.parameters()))
        save(tmp_path, policy, optimizer, progress=Progress(step=step))
    shutil.copy(tmp_path / "step-000001" / FILES[0], tmp_path / "step-000002" / FILES[0])
    with pytest.raises(DamagedFileError, match="not the one that the run recorded"):
        checkpoint.restore(tmp_path / "step-000002", *fresh())


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.latest(tmp_path / "checkpoints") is None
