"""Temporary changes are undone, also in nested blocks and after an error."""

from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_dpo.io.arrays import random_state
from mlx_dpo.models.restore import module_modes, patched, preserved_random_state
from tests.conftest import make_llama


def test_nested_patches_are_undone_in_reverse_order():
    module = SimpleNamespace(name="original")
    with patched(module, "name", "outer"):
        with pytest.raises(KeyError), patched(module, "name", "inner"):
            assert module.name == "inner"
            raise KeyError
        assert module.name == "outer"
    assert module.name == "original"


def test_a_missing_name_is_an_error():
    with pytest.raises(AttributeError), patched(SimpleNamespace(), "name", 1):
        pass


def test_modes_of_all_modules_are_restored():
    model = make_llama().train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with module_modes(model):
        model.eval()
    assert [module.training for module in model.modules()] == modes
    assert set(modes) == {True, False}


def test_the_random_state_is_restored_and_may_start_elsewhere():
    mx.random.seed(3)
    start = mx.array(random_state())
    first = mx.random.normal((2,))
    mx.eval(first)
    before = random_state().tolist()
    with preserved_random_state(start):
        assert mx.array_equal(mx.random.normal((2,)), first)
    assert random_state().tolist() == before
