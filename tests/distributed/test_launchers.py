"""Ranks that MLX's launcher or Open MPI starts train the weights of a single process."""

import ctypes.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
SECONDS = 600
SETTINGS = {"max_steps": 4, "micro_batch_size": 2, "batch_size": 8, "save_steps": 2}
CLI = """
import sys
from mlx_dpo.cli import main
main()
"""
API = f"""
import sys
from mlx_dpo import DPOConfig, DPOTrainer
config = DPOConfig(pairs="examples/pairs.jsonl", model="models/tiny-chat", output=sys.argv[1], **{SETTINGS})
with DPOTrainer(config) as trainer:
    print(len(list(trainer.steps())), "rows")
"""  # noqa: E501


def run(command, folder, **variables):
    """Run a command in a session of its own; return its exit code and its output."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("MLX_RANK", "MLX_HOST"))
    }
    environment |= {
        "OPENBLAS_NUM_THREADS": "1", "MLX_DPO_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT), **variables,
    }  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        shown, _ = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.communicate()
    return process.returncode, shown


def train_command(folder, output):
    (folder / "train.py").write_text(CLI)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    arguments = ["examples/pairs.jsonl", "--model", "models/tiny-chat", "--output", str(output)]
    return [sys.executable, str(folder / "train.py"), "train", *arguments, *flags]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Return the adapters of a single process, as bytes."""
    folder = tmp_path_factory.mktemp("one")
    code, shown = run(train_command(folder, folder / "run"), folder)
    assert code == 0, shown
    return (folder / "run" / "adapters.safetensors").read_bytes()


def mlx_launch(count):
    program = PROGRAMS / "mlx.launch"
    if not program.is_file():
        pytest.skip("mlx.launch is not installed next to this Python")
    return [str(program), "-n", str(count)]


def mpirun(count):
    """Return the command of Open MPI and the variables that it needs."""
    library = ctypes.util.find_library("mpi")
    if shutil.which("mpirun") is None or library is None:
        pytest.skip("Open MPI is not installed (Debian: openmpi-bin)")
    shown = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
    if "Open MPI" not in shown:
        pytest.skip("mpirun is not that of Open MPI, which MLX needs")
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return ["mpirun", "--oversubscribe", "-n", str(count)], {"MLX_MPI_LIBNAME": library, **as_root}


@pytest.mark.parametrize("count", [1, 2])
def test_mlx_launch_starts_the_command_line(tmp_path, one_process, count):
    command = mlx_launch(count) + train_command(tmp_path, tmp_path / "run")
    _, shown = run(command, tmp_path)  # mlx.launch always exits with 0
    assert "Traceback" not in shown
    assert (tmp_path / "run" / "adapters.safetensors").read_bytes() == one_process


def test_mlx_launch_starts_the_python_api(tmp_path, one_process):
    (tmp_path / "script.py").write_text(API)
    script = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "run")]
    _, shown = run(mlx_launch(2) + script, tmp_path)
    assert shown.count("rows") == 2  # each rank has all metrics
    assert (tmp_path / "run" / "adapters.safetensors").read_bytes() == one_process


def test_open_mpi_starts_the_command_line(tmp_path, one_process):
    start, variables = mpirun(3)
    code, shown = run(start + train_command(tmp_path, tmp_path / "run"), tmp_path, **variables)
    assert code == 0, shown
    assert (tmp_path / "run" / "adapters.safetensors").read_bytes() == one_process


def test_a_missing_library_of_open_mpi_is_one_line(tmp_path):
    start, variables = mpirun(2)
    command = start + train_command(tmp_path, tmp_path / "run")
    code, shown = run(command, tmp_path, **variables | {"MLX_MPI_LIBNAME": "libnothing.so"})
    assert code != 0
    assert "MLX needs Open MPI: start the ranks with its `mpirun`, and name its library" in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()
