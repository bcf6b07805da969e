"""A run that was killed while it wrote its reference log-probs leaves no temporary file."""

import mlx.core as mx

from mlx_dpo.runs.reference import LogpsFile, stored_logps
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
