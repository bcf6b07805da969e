import mlx.core as mx
import pytest

from mlx_dpo.training import reference
from mlx_dpo.training.reference import read_logps, reference_logps, write_logps
from mlx_dpo.types import PairLogps


class Counting:
    """A model that counts how often it is asked."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self, tokens):
        self.calls += 1
        return self.model(tokens)

    def eval(self):
        self.model.eval()


@pytest.fixture
def model(tiny_llama):
    return Counting(tiny_llama)


def ask(model, pairs, cache, provenance="base"):
    return reference_logps(model, pairs, provenance=provenance, cache=cache, pairs_per_pass=2)


def test_what_was_said_once_is_read_back_bit_for_bit(model, pairs, tmp_path):
    first = ask(model, pairs, tmp_path)
    calls = model.calls
    again = ask(model, pairs, tmp_path)
    assert model.calls == calls == 3
    assert mx.array_equal(first.chosen, again.chosen)
    assert mx.array_equal(first.rejected, again.rejected)


@pytest.mark.parametrize("change", ["provenance", "tokens", "order"])
def test_other_contents_are_asked_again(model, pairs, tmp_path, change):
    ask(model, pairs, tmp_path)
    calls = model.calls
    if change == "provenance":
        ask(model, pairs, tmp_path, provenance="another base")
    elif change == "tokens":
        ask(model, [*pairs[:-1], pairs[0]], tmp_path)
    else:
        ask(model, pairs[::-1], tmp_path)
    assert model.calls == 2 * calls


def test_a_crash_loses_one_block_at_most(model, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", 2)
    whole = ask(model, pairs, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    newest.unlink()
    model.calls = 0
    again = ask(model, pairs, tmp_path)
    assert model.calls == 1
    assert mx.array_equal(whole.chosen, again.chosen)


@pytest.mark.parametrize("damage", ["cut", "swapped", "shorter"])
def test_a_damaged_file_is_not_believed(pairs, tmp_path, damage):
    path = tmp_path / "logps.safetensors"
    logps = PairLogps(mx.array([1.0, 2.0]), mx.array([3.0, 4.0]))
    write_logps(path, logps)
    assert read_logps(path, 2) is not None
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "swapped":  # one bit of one number
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert read_logps(path, 3 if damage == "shorter" else 2) is None


def test_nothing_half_written_is_left(pairs, tmp_path, monkeypatch):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_logps(tmp_path / "x.safetensors", PairLogps(mx.zeros((1,)), mx.zeros((1,))))
    assert not list(tmp_path.iterdir())
