"""Virtual environments of the trainers, and a process per job."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from mlx_dpo.errors import DPOError
from scripts.bench import machine
from scripts.bench.job import Job, Result
from scripts.bench.trainers import Setting, Trainer


class PeerError(DPOError):
    """A trainer could not be installed, or ended without a result."""


def trainer_python(trainer: Trainer, cache: Path) -> Path:
    """Return the Python of the trainer's environment, which the first call creates.

    Raises:
        PeerError: pip could not install it.
    """
    if not trainer.requirements:
        return Path(sys.executable)
    folder = cache / "environments" / trainer.name
    python, stamp = folder / "bin" / "python", folder / "complete"
    expected = "\n".join((sys.version, *trainer.requirements))
    if stamp.is_file() and stamp.read_text() == expected:
        return python
    print(f"{trainer.name}: installing {', '.join(trainer.requirements)}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, *trainer.requirements], capture_output=True, text=True)
    if done.returncode:
        raise PeerError(f"{trainer.name}: cannot be installed ({last_line(done.stderr)})")
    stamp.write_text(expected)
    return python


def environment(trainer: Trainer, setting: Setting, threads: int, folder: Path) -> dict[str, str]:
    """Return the environment variables of a trainer: equal thread counts and BLAS for all."""
    count = str(threads)
    env = os.environ | {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "MLX_DPO_CACHE": str(folder),  # empty: no cached reference log-probs
        "TMPDIR": str(folder),
        "PYTHONPATH": str(machine.ROOT),
    }
    blas = machine.openblas()
    # This project loads OpenBLAS itself.
    if trainer.uses_mlx and trainer.requirements and blas is not None:
        env["LD_PRELOAD"] = blas
    return env | setting.env


def run(
    trainer: Trainer, setting: Setting, job: Job, *, python: Path, folder: Path, timeout: float
) -> Result:
    """Run the job in its own process and return the result.

    Raises:
        PeerError: it ended without a result, or took longer than `timeout` seconds.
    """
    folder.mkdir(parents=True)
    job = replace(job, setting=setting.options)
    try:
        done = subprocess.run(
            [python, "-m", trainer.module],
            input=json.dumps(asdict(job)),
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment(trainer, setting, job.threads, folder),
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PeerError(f"{trainer.name}: {setting.name} took over {timeout:.0f} s") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if done.returncode or not done.stdout.strip():
        raise PeerError(
            f"{trainer.name}: {setting.name} ended with status {done.returncode} "
            f"({last_line(done.stderr)})"
        )
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def last_line(text: str) -> str:
    """Return the last line that is not blank."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"
