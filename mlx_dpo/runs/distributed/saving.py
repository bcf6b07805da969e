"""Save a run: the ranks compare their weights, and rank 0 writes the files."""

import hashlib
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_dpo.adapters.adapter_files import save_adapter
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.distributed import heartbeats
from mlx_dpo.io.arrays import Arrays, named_arrays
from mlx_dpo.reporting.metrics_log import MetricsLog, read_metrics
from mlx_dpo.runs.distributed.follower_folder import send_folder
from mlx_dpo.runs.distributed.peers import Peers
from mlx_dpo.runs.early_stopping import BestCheckpoint
from mlx_dpo.runs.folder import RunPaths
from mlx_dpo.runs.inputs import Inputs
from mlx_dpo.runs.save_peft import save_peft
from mlx_dpo.training import checkpoint
from mlx_dpo.training.loop import Progress
from mlx_dpo.training.synced_reference import SyncedReference


class TrainedRun(Protocol):
    """What of a `DPOTrainer` the functions of this module read."""

    config: DPOConfig
    peers: Peers
    paths: RunPaths
    policy: nn.Module
    optimizer: optim.Optimizer
    synced_reference: SyncedReference | None
    adapter_config: dict[str, Any]
    best: BestCheckpoint
    inputs: Inputs


def save_checkpoint(run: TrainedRun, progress: Progress, log: MetricsLog) -> None:
    """Save a checkpoint of the run after the ranks have compared their weights.

    Raises:
        SharedError: adapters or optimizer state differ between ranks; nothing is written.
        RunError: the disk is full or cannot be written.
    """
    check_replicas(run, progress.step)
    with run.peers.sharing_errors():
        if not run.peers.ranks.is_main:
            return
        saved = checkpoint.save(
            run.paths.checkpoints,
            run.policy,
            run.optimizer,
            progress,
            run.adapter_config,
            run.synced_reference,
            log.flush(),
        )
        heartbeats.note(checkpoint=str(saved))
        checkpoint.prune(run.paths.checkpoints, run.config.save_total_limit)
        run.best.prune(read_metrics(run.paths.metrics))


def check_replicas(run: TrainedRun, step: int) -> None:
    """Check that all ranks have the same adapters and optimizer state.

    Raises:
        SharedError: they differ; the message names the rank and its host.
    """
    if run.peers.ranks.is_alone:
        return
    synced = {} if run.synced_reference is None else run.synced_reference.weights
    states = {
        f"the adapters after step {step}": named_arrays(run.policy.trainable_parameters()),
        f"the optimizer state after step {step}": named_arrays(run.optimizer.state),
        f"the synced reference after step {step}": synced,
    }
    run.peers.check_same(
        {name: digest(arrays) for name, arrays in states.items()},
        "no checkpoint was written; resume from the last one, and try the memory of the host",
    )


def digest(arrays: Arrays) -> str:
    """Return the SHA-256 of named arrays: their names, shapes, dtypes and bits."""
    content = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        content.update(f"{name} {array.shape} {array.dtype}\n".encode())
        content.update(np.array(array.reshape(-1).view(mx.uint8)).data)
    return content.hexdigest()


def save_best_adapters(run: TrainedRun, row: dict[str, float]) -> None:
    """Record an evaluation; rank 0 saves the adapters if it is the best so far."""
    with run.peers.sharing_errors():
        run.best.update(
            row,
            lambda folder: (
                run.peers.ranks.is_main and save_adapter(folder, run.policy, run.adapter_config)
            ),
        )


def save_final_adapters(run: TrainedRun) -> tuple[str, str]:
    """Write the adapters that the run ends with to the run folder, on rank 0.

    Afterwards the policy of each rank has these adapters.

    Returns:
        The SHA-256 of the adapters, and the text that names the programs that can load them; both
        empty on other ranks.
    """
    ranks = run.peers.ranks
    if run.best.step is not None:
        send_folder(ranks, run.best.folder if ranks.is_main else None, run.paths.best_adapters)
    with run.peers.sharing_errors():
        run.best.load_into(run.policy)
        if not ranks.is_main:
            return "", ""
        checksum = save_adapter(run.paths.folder, run.policy, run.adapter_config)
        return checksum, save_peft(run.paths.folder, run.inputs.base, run.config)
