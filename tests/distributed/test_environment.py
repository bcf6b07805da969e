"""Which launcher started a process is read from the variables that MLX's backends read."""

import pytest

from mlx_dpo.distributed.environment import find_backend, find_rank
from mlx_dpo.errors import ConfigError

RANK = {"MLX_RANK": "1"}


@pytest.mark.parametrize(
    ("variables", "backend", "rank"),
    [
        ({}, None, None),
        ({"MLX_HOSTFILE": "/no/file"}, None, None),  # MLX's ring needs a rank as well
        (RANK | {"MLX_HOSTFILE": "/no/file"}, "ring", 1),
        (RANK | {"MLX_JACCL_COORDINATOR": "10.0.0.1:1", "MLX_IBV_DEVICES": "f"}, "jaccl", 1),
        (RANK | {"NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "1"}, "nccl", 1),
        # Open MPI; MPICH, or Slurm with pmi2; Slurm with PMIx.
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "mpi", 1),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpi", 1),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "PMIX_RANK": "1"}, "mpi", 1),
        # One process: of `mpirun -n 1`, and of a batch script that reserves four.
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None, None),
        # `mlx.launch` inside of a Slurm job.
        (RANK | {"MLX_HOSTFILE": "/no/file", "SLURM_STEP_NUM_TASKS": "2"}, "ring", 1),
    ],
)
def test_variables_of_each_launcher_give_backend_and_rank(variables, backend, rank):
    assert find_backend(variables) == backend
    assert find_rank(variables) == rank


def test_one_process_of_mlx_launch_is_alone(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("\n")  # as `mlx.launch -n 1` writes it
    variables = {"MLX_RANK": "0", "MLX_HOSTFILE": str(path)}
    assert find_backend(variables) is None
    assert find_rank(variables) is None


def test_a_rank_without_the_others_is_refused():
    with pytest.raises(ConfigError, match=r"MLX_RANK is set, but none of MLX_HOSTFILE .*; start"):
        find_backend(RANK)
