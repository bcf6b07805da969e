"""A run that was killed while it wrote its reference log-probs leaves no temporary file."""

import os

import mlx.core as mx

from mlx_dpo.runs import reference
from mlx_dpo.runs.reference import LogpsFile, reference_cache, stored_logps
from mlx_dpo.startup import openblas
from mlx_dpo.types import PairLogps
from tests.temporary_files import ended_process, temporary_path


def test_the_temporary_file_of_a_killed_run_is_removed(tmp_path):
    path = tmp_path / "reference" / "train.safetensors"
    path.parent.mkdir()
    leftover = temporary_path(path, ended_process())
    leftover.write_bytes(b"half")
    logps = PairLogps(mx.array([-1.0]), mx.array([-2.0]))
    stored_logps(LogpsFile(path, 1), [0], lambda: logps, lambda count: None)
    assert not leftover.exists()
    assert path.is_file()


def test_log_probs_of_other_numbers_of_threads_are_not_mixed(monkeypatch):
    """Caches of earlier versions have no number: they are found with the default one."""
    monkeypatch.setattr(reference, "reference_provenance", lambda *args: "p")
    monkeypatch.setattr(reference, "computes_with_caches", lambda model: False)
    monkeypatch.setattr(reference, "_model_name", lambda record: "m")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    found = []
    for threads in (0, 1, 2, 4):
        monkeypatch.setattr(openblas, "num_threads", lambda threads=threads: threads)
        found.append(reference_cache(None, {}, "cpu float32").provenance)
    assert found == ["p", "p with 1 BLAS threads", "p", "p with 4 BLAS threads"]
