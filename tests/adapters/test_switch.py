import mlx.core as mx
import mlx_lm
import pytest

from mlx_dpo.adapters.attach import attach_adapters, detach_adapters, enable_full_fine_tuning
from mlx_dpo.adapters.switch import AdapterSwitch, evaluate_arrays
from mlx_dpo.io.arrays import named_arrays
from tests.checkpoints import make_checkpoint

TOKENS = mx.array([[1, 40, 41, 42, 3, 2]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("switch"), dtype=mx.bfloat16))


def train(model, seed):
    """As training would leave it: every trained number moved."""
    key = mx.random.key(seed)
    moved = {k: v + mx.random.normal(v.shape, key=key) * 0.1 for k, v in trained(model).items()}
    model.load_weights(list(moved.items()), strict=False)
    model.freeze()


def trained(model):
    return named_arrays(model.trainable_parameters())


def lora(model):
    attach_adapters(model, rank=4, scale=2.0)
    train(model, 1)


def dora(model):
    attach_adapters(model, rank=4, scale=2.0, kind="dora")
    train(model, 1)


def full(model):
    enable_full_fine_tuning(model, num_layers=1)
    train(model, 1)


def started(model):
    """A base that has an adapter itself, and a policy that went on from it."""
    detach_adapters(model)
    attach_adapters(model, rank=2, scale=1.0, seed=3)
    train(model, 3)


@pytest.mark.parametrize("learn", [lora, dora, full])
@pytest.mark.parametrize("start", [None, started])
def test_switching_ten_times_gives_both_models_bit_for_bit(folder, learn, start):
    """The base is held against one that is loaded alone and never touched again."""
    alone, model = (mlx_lm.load(folder)[0] for _ in range(2))
    if start:
        start(alone)
        start(model)
    switch = AdapterSwitch(model)
    switch.save_state("base")
    detach_adapters(model)
    learn(model)
    switch.save_state("aligned")
    base, aligned = alone(TOKENS), model(TOKENS)
    assert not mx.array_equal(base, aligned)
    for _ in range(10):
        switch.activate("base")
        assert mx.array_equal(model(TOKENS), base)
        switch.activate("aligned")
        assert mx.array_equal(model(TOKENS), aligned)


def test_a_state_is_active_for_a_block_even_if_it_fails(folder):
    model = mlx_lm.load(folder)[0]
    switch = AdapterSwitch(model)
    switch.save_state("base")
    lora(model)
    switch.save_state("aligned")
    aligned = model(TOKENS)
    with pytest.raises(KeyError), switch.activated("base"):
        assert switch.active == "base"
        raise KeyError
    assert switch.active == "aligned"
    assert mx.array_equal(model(TOKENS), aligned)


def test_only_weights_of_the_model_itself_are_held_twice(folder):
    sizes = {}
    for learn in (lora, full):
        model = mlx_lm.load(folder)[0]
        last = sum(v.nbytes for k, v in named_arrays(model.parameters()).items() if "layers.1" in k)
        switch = AdapterSwitch(model)
        switch.save_state("base")
        assert switch.duplicated_bytes() == 0
        learn(model)
        switch.save_state("aligned")
        sizes[learn] = switch.duplicated_bytes()
    assert sizes == {lora: 0, full: last}


def test_a_state_that_was_never_remembered_cannot_be_activated(folder):
    switch = AdapterSwitch(mlx_lm.load(folder)[0])
    switch.save_state("base")
    assert not switch.can_switch
    with pytest.raises(KeyError):
        switch.activate("aligned")


def test_another_thread_can_compute_with_a_model_that_is_evaluated(folder):
    from threading import Thread

    model = mlx_lm.load(folder, lazy=True)[0]
    lora(model)
    evaluate_arrays(model)
    found = []

    def compute():
        found.append(model(TOKENS))
        mx.eval(found)

    thread = Thread(target=compute)
    thread.start()
    thread.join()
    assert mx.array_equal(found[0], model(TOKENS))
