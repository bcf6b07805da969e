"""Variables by which a launcher tells a process that it is one of several ranks.

Nothing is imported that takes time: the command line asks before it imports MLX.
"""

from collections.abc import Mapping
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Literal

from mlx_dpo.errors import ConfigError

Backend = Literal["ring", "jaccl", "mpi", "nccl"]

# Variables that MLX's launcher, `mpirun` or a scheduler sets, by the backend that reads them.
RANK = "MLX_RANK"
# Open MPI's `mpirun`; MPICH's, and Slurm's with pmi2; Slurm's with PMIx.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
MPI_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")

# Seconds without a sign of life after which a rank is lost; ours.
RANK_TIMEOUT = "MLX_DPO_RANK_TIMEOUT"
DEFAULT_TIMEOUT = 120.0


def find_timeout(environment: Mapping[str, str]) -> float:
    """Return the seconds of silence after which a rank is lost.

    Raises:
        ConfigError: the variable is not a positive number.
    """
    text = environment.get(RANK_TIMEOUT, str(DEFAULT_TIMEOUT))
    with suppress(ValueError):
        if 0 < (seconds := float(text)) < inf:
            return seconds
    raise ConfigError(f"{RANK_TIMEOUT} must be a number of seconds above 0 (found `{text}`)")


def find_backend(environment: Mapping[str, str]) -> Backend | None:
    """Return the backend whose variables are set; None for a single process.

    Raises:
        ConfigError: there is a rank, but nothing that says how to reach the others.
    """
    if RANK not in environment:
        return "mpi" if _has_mpi_peers(environment) else None
    if "MLX_JACCL_COORDINATOR" in environment or "MLX_IBV_DEVICES" in environment:
        return "jaccl"
    if "NCCL_HOST_IP" in environment:
        return "nccl"
    if "MLX_HOSTFILE" in environment:
        return "ring" if _names_nodes(environment["MLX_HOSTFILE"]) else None
    raise ConfigError(
        f"{RANK} is set, but none of MLX_HOSTFILE (ring), MLX_JACCL_COORDINATOR (jaccl) and "
        "NCCL_HOST_IP (nccl); start the ranks with --ranks, --hosts or `mlx.launch`"
    )


def find_rank(environment: Mapping[str, str]) -> int | None:
    """Return the rank that the variables give to this process; None for a single process.

    Raises:
        ConfigError: a variable is not a number.
    """
    if RANK in environment:
        return None if find_backend(environment) is None else _number(environment, RANK)
    if not _has_mpi_peers(environment):
        return None
    return next((_number(environment, name) for name in MPI_RANKS if name in environment), 0)


def guess_rank(environment: Mapping[str, str]) -> int:
    """Return the rank by the first variable that has one; 0 without any. Raises no error."""
    names = (name for name in (RANK, *MPI_RANKS) if environment.get(name, "").isdigit())
    return next((int(environment[name]) for name in names), 0)


def _has_mpi_peers(environment: Mapping[str, str]) -> bool:
    return any(_number(environment, name) > 1 for name in MPI_SIZES if name in environment)


def _names_nodes(path: str) -> bool:
    """Return whether a file for ring has a text; `mlx.launch -n 1` writes an empty one."""
    try:
        return bool(Path(path).read_bytes().strip())
    except OSError:
        return True  # MLX reports what is wrong with it


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ConfigError(
            f"{name} must be a number (found `{environment[name]}`); start the ranks with "
            "--ranks, --hosts or `mlx.launch`"
        ) from None
