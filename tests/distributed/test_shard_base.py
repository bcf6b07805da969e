"""A run whose base weights are sharded over its ranks has the results of one that holds them."""

import shutil

import pytest

from mlx_dpo import DPOConfig
from mlx_dpo.errors import ConfigError
from mlx_dpo.profiling.device_memory import MemoryBudget
from mlx_dpo.profiling.memory import parameter_bytes
from mlx_dpo.runs.distributed import shard_base
from mlx_dpo.runs.distributed.peers import Peers
from mlx_dpo.runs.distributed.shard_base import choose_ranks
from tests.distributed.run_cases import RATED, SYNCED, differences
from tests.scoring.sharded_models import RanksInTurn, build

RECOMPUTE = {"recompute": True, "shard_base": None, "samples": 0}
SHARDED = {"recompute": True, "shard_base": True}
CASES = {
    "trie, dropout": RATED | {"scorer": "trie", "lora_dropout": 0.3, "eval_steps": 2},
    "dora": {"fine_tune_type": "dora"},
    "moving reference, wpo": SYNCED | {"use_weighting": True, "eval_steps": 2},
    "reference model": {"reference_model": "other-base"},
    "start adapter": {"start_adapter": "start", "lora_r": None},
    "embedding and head": {"lora_target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "one layer": {"num_layers": 1},
    "packed": {"bits": 4, "group_size": 32},
    "chosen by the run": {"micro_batch_size": None, "scorer": "auto"},
    "one pass a step": {"batch_size": 1, "micro_batch_size": 1, "epochs": 1},
}


def sharded_results(runs, count, changes, **others):
    found = runs[count].results("sharded", changes | SHARDED, **others)
    return found | {"setting shard_base": None}


def test_a_sharded_run_is_equal_to_one_on_a_single_rank(runs):
    changes = CASES["trie, dropout"] | {"epochs": 1}
    expected = runs[1].results("whole", changes | RECOMPUTE)
    assert differences(expected, sharded_results(runs, 2, changes)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_sharded_run_is_equal_to_one_on_a_single_rank(runs, name):
    expected = runs[1].results("whole", CASES[name] | RECOMPUTE)
    for count in (2, 3):
        assert differences(expected, sharded_results(runs, count, CASES[name])) == [], count


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (3, 2)])
def test_a_sharded_run_is_resumed_without_shards_and_the_other_way(runs, before, after):
    """A resumed run on one rank ignores `shard_base`, which its record has."""
    changes = {"lora_dropout": 0.3, "save_steps": 1}
    expected = runs[1].results("straight", changes | RECOMPUTE)
    run = runs[before].train(
        "stopped", changes | (SHARDED if before > 1 else RECOMPUTE), stop_after=2, stop_rank=0
    )
    found = runs[after].results("resumed", changes | SHARDED, start=run)
    shutil.rmtree(run.parents[2])
    assert differences(expected, found | {"setting shard_base": None}) == []


def test_a_model_is_sharded_if_its_weights_do_not_fit_on_one_rank(monkeypatch):
    """Each rank has a machine of its own; the models have 4 bytes per parameter on the CPU."""
    model = build("llama")
    seen = {}
    peers = Peers(RanksInTurn(0, 2, seen), [{"host": "a"}, {"host": "b"}])
    settings = {"model": "m", "pairs": ("p",), "output": "o"}
    for share, fits in ((0.9, False), (0.5, True)):
        seen.clear()
        room = MemoryBudget(int(parameter_bytes(model) / share), "")
        monkeypatch.setattr(shard_base, "available_memory", lambda room=room: room)
        chosen = choose_ranks(DPOConfig(**settings), peers)(model)
        assert (chosen is None) is fits
        seen.clear()
        assert choose_ranks(DPOConfig(**settings, fine_tune_type="full"), peers)(model) is None
        assert choose_ranks(DPOConfig(**settings, shard_base=False), peers)(model) is None


def test_settings_that_contradict_shard_base_are_refused():
    needed = {"model": "m", "pairs": ("p",), "output": "o", "shard_base": True}
    with pytest.raises(ConfigError, match="`full` trains them"):
        DPOConfig(**needed, fine_tune_type="full")
    with pytest.raises(ConfigError, match="`recompute` false is not possible"):
        DPOConfig(**needed, recompute=False)
    with pytest.raises(ConfigError, match="`samples` is not possible"):
        DPOConfig(**needed, samples=2)


def test_one_rank_has_nothing_to_shard(runs):
    arguments = runs[1].arguments("alone", SHARDED | {"samples": 0}, resume=False)
    [reply] = runs[1].pool.call("train", arguments)
    assert "`shard_base` has no effect with one rank" in str(reply)
