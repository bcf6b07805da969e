import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.training.logps_cache import read_labelled, read_logps, write_logps
from mlx_dpo.types import PairLogps

LOGPS = PairLogps(mx.array([1.0, 2.0]), mx.array([3.0, 4.0]))


@pytest.mark.parametrize("damage", ["cut", "swapped", "shorter", "emptied", "other"])
def test_a_damaged_file_is_not_believed(tmp_path, damage):
    path = tmp_path / "logps.safetensors"
    write_logps(path, LOGPS)
    assert read_logps(path, 2) is not None
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "swapped":  # one bit of one number
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "other":
        mx.save_safetensors(str(path), {"weight": mx.zeros((2,))})
    assert read_logps(path, 3 if damage == "shorter" else 2) is None


def test_what_a_file_says_of_itself_is_read_with_it(tmp_path):
    path = tmp_path / "logps.safetensors"
    write_logps(path, LOGPS, {"model": "org/name", "computed_on": "cpu float32"})
    logps, labels = read_labelled(path)
    assert np.array_equal(logps.rejected, LOGPS.rejected)
    assert labels == {"model": "org/name", "computed_on": "cpu float32"}


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_logps(tmp_path / "x.safetensors", LOGPS)
    assert not list(tmp_path.iterdir())
