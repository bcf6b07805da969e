from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dpo.io.arrays import read_arrays, write_arrays

FULL = Path("/dev/full")


def test_arrays_and_metadata_are_read_back(tmp_path):
    path = tmp_path / "a.safetensors"
    write_arrays(path, {"x.y": mx.array([1.5, -2.0])}, {"k": "v"})
    arrays, metadata = read_arrays(path)
    assert arrays["x.y"].tolist() == [1.5, -2.0]
    assert metadata["k"] == "v"


@pytest.mark.skipif(not FULL.exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_is_an_os_error_with_the_path(tmp_path):
    path = tmp_path / "full.safetensors"
    path.symlink_to(FULL)
    with pytest.raises(OSError, match="No space left on device") as error:
        write_arrays(path, {"x": mx.zeros((9000,))})
    assert error.value.filename == str(path)


def test_a_header_that_is_not_utf_8_is_reported_like_any_other_damage(tmp_path):
    path = tmp_path / "a.safetensors"
    write_arrays(path, {"a": mx.zeros(2)}, {"model": "xyz"})
    path.write_bytes(path.read_bytes().replace(b"xyz", b"x\xe4z"))
    with pytest.raises(RuntimeError, match="not UTF-8"):
        read_arrays(path)
