"""No byte of a checked file can change without being noticed."""

import json
import random

import mlx.core as mx
import pytest

from mlx_dpo.errors import DamagedFileError
from mlx_dpo.io.checksums import (
    DIGEST,
    EDITED,
    check_json,
    check_line,
    read_checked_arrays,
    read_checked_json,
    to_checked_json,
    to_checked_line,
    verify_arrays,
    verify_file,
    write_checked_arrays,
)
from tests.damaged_files import damage

ARRAYS = {"b.lora_a": mx.arange(300, dtype=mx.float32), "a": mx.ones((2, 3), mx.bfloat16)}
CONTENT = {"settings": {"beta": 0.1, "pairs": ["å.jsonl"]}, "state": "finished", "none": None}


@pytest.fixture
def weights(tmp_path):
    write_checked_arrays(tmp_path / "x.safetensors", ARRAYS, {"format": "mlx"})
    return tmp_path / "x.safetensors"


def test_checked_arrays_are_an_ordinary_safetensors_file(weights):
    arrays, metadata = read_checked_arrays(weights)
    assert metadata == {"format": "mlx"}
    plain = mx.load(str(weights))
    for name, value in ARRAYS.items():
        assert arrays[name].dtype == plain[name].dtype == value.dtype
        assert mx.array_equal(arrays[name], value) and mx.array_equal(plain[name], value)


def test_the_checksum_is_that_of_the_file_with_zeros_in_its_place(weights):
    import hashlib

    digest = verify_arrays(weights)
    content = weights.read_bytes()
    assert content.count(digest.encode()) == 1
    assert hashlib.sha256(content.replace(digest.encode(), b"0" * 64)).hexdigest() == digest


@pytest.mark.parametrize("bit", [0, 5])
def test_every_flipped_bit_of_a_safetensors_file_is_noticed(weights, bit):
    content = weights.read_bytes()
    offsets = [*range(400), *range(400, len(content), 37), len(content) - 1]
    for offset in offsets:
        changed = bytearray(content)
        changed[offset] ^= 1 << bit
        weights.write_bytes(changed)
        with pytest.raises((DamagedFileError, RuntimeError)):  # a wrong length of the header
            read_checked_arrays(weights)
        with pytest.raises(DamagedFileError, match=r"x\.safetensors: damaged"):
            verify_arrays(weights, expected="0" * 64)
    weights.write_bytes(content)
    verify_arrays(weights)


@pytest.mark.parametrize("change", ["zeroed", "cut", "emptied"])
def test_other_damage_of_a_safetensors_file_is_noticed(weights, change):
    content = weights.read_bytes()
    draw = random.Random(0)
    for offset in (0, 8, 100, len(content) - 1, *(draw.randrange(len(content)) for _ in range(9))):
        weights.write_bytes(content)
        if change == "zeroed" and not any(content[offset : offset + 512]):
            continue
        damage(weights, change, offset)
        with pytest.raises((DamagedFileError, RuntimeError)):
            read_checked_arrays(weights)


def test_a_file_of_another_program_is_read_but_is_not_whatever_is_expected(tmp_path):
    path = tmp_path / "x.safetensors"
    mx.save_safetensors(str(path), ARRAYS, {"format": "pt"})
    assert read_checked_arrays(path)[1] == {"format": "pt"}
    assert verify_arrays(path) is None
    with pytest.raises(DamagedFileError, match="not the one that the run recorded"):
        verify_arrays(path, expected="0" * 64)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match="the file is truncated"):
        verify_arrays(path)


def test_a_file_that_changes_after_it_was_verified_is_verified_again(weights):
    import os

    os.utime(weights, (1, 1))  # long ago, so that the result is remembered
    assert verify_arrays(weights) == verify_arrays(weights)
    damage(weights, "flipped")
    with pytest.raises(DamagedFileError):
        verify_arrays(weights)


def test_checked_json_is_read_without_its_checksum(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(to_checked_json(CONTENT))
    content, digest = read_checked_json(path)
    assert content == CONTENT and json.loads(path.read_text())[DIGEST] == digest
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))  # other spaces
    assert read_checked_json(path) == (CONTENT, digest)


@pytest.mark.parametrize("bit", [0, 5])
def test_every_flipped_bit_of_a_json_file_is_noticed_or_changes_nothing(tmp_path, bit):
    path = tmp_path / "run.json"
    text = to_checked_json(CONTENT).encode()
    noticed = 0
    for offset in range(len(text)):
        changed = bytearray(text)
        changed[offset] ^= 1 << bit
        path.write_bytes(changed)
        try:
            assert read_checked_json(path)[0] == CONTENT  # as in `1e-3` and `1E-3`
        except DamagedFileError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            noticed += 1
    assert noticed > 0.8 * len(text)


def test_a_person_may_edit_a_json_file_and_say_so():
    entries = json.loads(to_checked_json(CONTENT)) | {"state": "unfinished"}
    with pytest.raises(DamagedFileError, match=f'set its "{DIGEST}" to "{EDITED}"'):
        check_json(entries, "run.json")
    assert check_json(entries | {DIGEST: EDITED}, "run.json") == CONTENT | {"state": "unfinished"}
    del entries[DIGEST]
    with pytest.raises(DamagedFileError, match="its checksum is missing"):
        check_json(entries, "run.json")


def test_json_of_other_programs_is_unchanged():
    assert check_json({"r": 8, "peft_type": "LORA"}, "x") == {"r": 8, "peft_type": "LORA"}


def test_what_is_no_file_is_one_line(tmp_path):
    (tmp_path / "a.json").mkdir()
    (tmp_path / "b.json").symlink_to("b.json")
    (tmp_path / "c.json").write_text("[" * 100_000)
    (tmp_path / "d.json").write_text("[1]")
    (tmp_path / "e.safetensors").mkdir()
    (tmp_path / "f.safetensors").symlink_to("f.safetensors")
    for path in (*sorted(tmp_path.iterdir()), tmp_path / "none.json", tmp_path / "no.safetensors"):
        with pytest.raises(DamagedFileError) as error:
            verify_file(path)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_every_flipped_bit_of_a_line_is_noticed():
    row = {"step": 12, "loss": 0.1 + 0.2}
    line = to_checked_line(row)[:-1]
    assert json.loads(check_line(line)) == row
    for offset in range(len(line)):
        changed = line[:offset] + chr(ord(line[offset]) ^ 1) + line[offset + 1 :]
        assert check_line(changed) is None, changed


def test_lines_of_earlier_versions_are_unchanged():
    assert check_line('{"step": 1, "loss": 0.5}') == '{"step": 1, "loss": 0.5}'
