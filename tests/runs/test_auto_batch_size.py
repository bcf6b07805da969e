"""The micro-batch size and recomputation that a run chooses itself to fit into memory."""

import json
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations

import mlx.core as mx
import pytest

from mlx_dpo import DPOTrainer
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.distributed.ranks import Ranks
from mlx_dpo.errors import ConfigError
from mlx_dpo.profiling.device_memory import MemoryBudget
from mlx_dpo.runs import auto_batch_size
from mlx_dpo.runs.auto_batch_size import (
    _larger_sizes,
    candidate_settings,
    fit_micro_batch_size,
    longest_micro_batch,
    profile_micro_batch,
)
from mlx_dpo.runs.build import attach_adapters, choose_scorer
from mlx_dpo.runs.inputs import load_configured_base
from mlx_dpo.scoring.equivalence import random_pairs
from mlx_dpo.units import format_bytes
from tests.checkpoints import VOCAB, make_checkpoint

UNLIMITED = MemoryBudget(10**12, "a test's")


@contextmanager
def memory_limit(size):
    before = mx.set_memory_limit(size)
    try:
        yield
    finally:
        mx.set_memory_limit(before)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A base of ten blocks with adapters, its scorer, and pairs that are long for it."""
    folder = make_checkpoint(tmp_path_factory.mktemp("deep"), num_hidden_layers=10)
    config = DPOConfig(model=str(folder), lora_r=2, batch_size=4)
    base = load_configured_base(config)
    attach_adapters(base, config)
    lengths = [(100, 50, 40), (110, 60, 60), (10, 4, 3), (12, 5, 6), (9, 3, 4)]
    return base, config, choose_scorer(base, config), random_pairs(lengths, VOCAB)


def fitted(deep, room, *, measure=True, **changes):
    base, config, choice, pairs = deep
    return fit_micro_batch_size(
        base, replace(config, **changes), choice, pairs, room=room, measure=measure
    )


def needed(deep, **changes):
    return fitted(deep, UNLIMITED, **changes).bytes


def decided(fitted_size):
    return fitted_size.config.micro_batch_size, fitted_size.config.recompute, fitted_size.fits


def test_unset_sizes_are_tried_in_this_order():
    sizes = [(c.micro_batch_size, c.recompute) for c in candidate_settings(DPOConfig())]
    assert sizes == [(2, False), (1, False), (2, True), (1, True)]
    single = candidate_settings(DPOConfig(batch_size=1))
    assert [(c.micro_batch_size, c.recompute) for c in single] == [
        (1, False), (1, True),
    ]  # fmt: skip
    explicit = DPOConfig(micro_batch_size=3, recompute=True)
    assert list(candidate_settings(explicit)) == [explicit]
    by_tokens = candidate_settings(DPOConfig(micro_batch_tokens=99))
    assert [(c.micro_batch_size, c.recompute) for c in by_tokens] == [(None, False), (None, True)]


@pytest.mark.parametrize(
    "lengths, batch_size, scorer, sizes",
    [
        ((30, 12, 12), 16, "auto", [8, 2, 1]),
        ((60, 20, 30), 16, "auto", [4, 2, 1]),  # 440 tokens
        ((60, 25, 30), 16, "auto", [2, 1]),  # 460 tokens
        ((30, 12, 12), 8, "auto", [4, 2, 1]),  # two passes in a step
        ((30, 12, 12), 4, "auto", [2, 1]),
        ((30, 12, 12), 16, "shared", [2, 1]),  # as in earlier versions
    ],
)
def test_short_pairs_go_together_on_the_cpu(deep, lengths, batch_size, scorer, sizes):
    base, config, choice, _ = deep
    pairs = random_pairs([lengths] * batch_size, VOCAB)
    config = replace(config, batch_size=batch_size, scorer=scorer)
    choice = choice if scorer == "auto" else choose_scorer(base, config)
    tried = candidate_settings(config, _larger_sizes(config, choice, pairs))
    assert [(c.micro_batch_size, c.recompute) for c in tried] == [
        *((size, False) for size in sizes),
        (2, True),
        (1, True),
    ]
    explicit = replace(config, recompute=True)
    tried = candidate_settings(explicit, _larger_sizes(explicit, choice, pairs))
    assert [c.micro_batch_size for c in tried] == [2, 1]


def test_larger_passes_on_the_cpu_where_they_run_fewer_tokens(deep):
    _, config, choice, _ = deep
    config = replace(config, batch_size=16)
    rows = random_pairs([(120, 60, 60)] * 24, VOCAB)
    assert not _larger_sizes(config, choice, rows)  # 240 tokens a pair, nothing shared
    system = rows[0].prompt[:100]
    behind = [replace(pair, prompt=system + pair.prompt[100:]) for pair in rows]
    # 2 pairs run 100 + 2 * 138 = 376 tokens, 8 pairs 100 + 8 * 138: 0.64 of the tokens of 4 passes.
    assert _larger_sizes(config, choice, behind) == [8]
    assert _larger_sizes(replace(config, batch_size=8), choice, behind) == [4]  # two passes a step
    ranked = [
        replace(pair, prompt=first.prompt, chosen=better, rejected=worse)
        for first, second in zip(rows[::2], rows[1::2], strict=True)
        for pair, (better, worse) in zip(
            [first] * 6,
            combinations([first.chosen, first.rejected, second.chosen, second.rejected], 2),
            strict=True,
        )
    ]
    grouped = replace(config, group_by_prompt=True)
    assert _larger_sizes(grouped, choice, ranked) == [8]
    assert not _larger_sizes(replace(grouped, micro_batch_size=2), choice, ranked)


def test_the_longest_pairs_count(deep):
    _, config, choice, pairs = deep
    two = longest_micro_batch(replace(config, micro_batch_size=2), choice, pairs)
    assert [pair.prompt[2:] for pair in two] == [pairs[1].prompt[2:], pairs[0].prompt[2:]]
    assert [pair.prompt[:2] for pair in two] == [(0, 0), (1, 0)]  # so that nothing is shared
    assert [pair.chosen for pair in two] == [pairs[1].chosen, pairs[0].chosen]


def test_sizes_are_reduced_only_as_far_as_memory_requires(deep):
    two_pairs = needed(deep, micro_batch_size=2, recompute=False)
    single_pair = needed(deep, micro_batch_size=1, recompute=False)
    # How far MLX works ahead differs from time to time, by an array more and never by one less.
    least = min(needed(deep, micro_batch_size=1, recompute=True) for _ in range(5))
    assert least < 0.9 * single_pair < 0.9 * two_pairs
    assert decided(fitted(deep, MemoryBudget(int(1.08 * two_pairs), ""))) == (2, False, True)
    fitted_size = fitted(deep, MemoryBudget(int(1.08 * single_pair), "of a test"))
    assert decided(fitted_size) == (1, False, True)
    assert "1 pair per pass, because 2 pairs per pass would need " in fitted_size.describe()
    fitted_size = fitted(deep, MemoryBudget(int(0.92 * single_pair), ""))
    assert (fitted_size.config.recompute, fitted_size.fits) == (True, True)
    assert ", recomputed, because 2 pairs per pass would need" in fitted_size.describe()
    assert decided(fitted(deep, MemoryBudget(int(0.9 * least), ""))) == (1, True, False)


def test_explicit_sizes_are_not_reduced(deep):
    tight = MemoryBudget(int(0.9 * needed(deep, micro_batch_size=2, recompute=False)), "")
    assert decided(fitted(deep, tight, micro_batch_size=2, recompute=False)) == (2, False, False)


def test_with_enough_memory_nothing_is_measured(deep):
    fitted_size = fitted(deep, UNLIMITED, measure=False)
    assert (fitted_size.is_bound, fitted_size.cost) == (True, None)
    assert fitted_size.bytes > needed(deep)
    assert fitted_size.describe().startswith("at most about ")
    close = fitted(deep, MemoryBudget(int(1.2 * fitted_size.bytes), ""), measure=False)
    assert not close.is_bound
    assert close.cost is not None


def test_long_texts_are_not_run_whole_if_short_ones_show_that_they_fit(deep, monkeypatch):
    base, config, choice, _ = deep
    pairs = random_pairs([(200, 90, 80), (190, 100, 60)], VOCAB)
    long = (base, config, choice, pairs)
    bound = fitted(long, UNLIMITED, measure=False).bytes
    real = needed(long)
    lengths, measure = [], auto_batch_size.profile_micro_batch

    def profile(base, config, choice, pairs, **options):
        lengths.append(len(pairs[0]))
        return measure(base, config, choice, pairs, **options)

    monkeypatch.setattr(auto_batch_size, "profile_micro_batch", profile)
    found = fitted(long, MemoryBudget(int(1.2 * bound), ""), measure=False)
    assert lengths == [36, 72]  # an eighth and a quarter of 290 tokens
    assert (decided(found), found.is_bound) == ((2, False, True), True)
    assert 0.95 * real < found.bytes < bound
    tight = fitted(long, MemoryBudget(int(1.4 * real), ""), measure=False)
    assert (decided(tight), tight.is_bound) == ((2, False, True), False)
    assert lengths[2:] == [36, 72, 290]


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(config, tmp_path):
    with memory_limit(600_000), pytest.raises(ConfigError) as error, DPOTrainer(config) as trainer:
        trainer.prepare()
    message = str(error.value)
    assert message.startswith(
        "the longest pairs do not fit into memory, 1 pair per pass, recomputed ("
    )
    assert "1 MB is MLX's limit on this machine); use --max-length below" in message
    assert message.endswith("or start anyway with --force")
    assert "\n" not in message
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def stopped_after(config, step, **how):
    with DPOTrainer(config, **how) as trainer:
        trainer.prepare()
        for row in trainer.steps():
            if row["step"] == step:
                trainer.request_stop()
    return trainer


def test_force_starts_a_run_that_does_not_fit_and_the_header_reports_it(config):
    with memory_limit(600_000):
        trainer = stopped_after(replace(config, max_steps=2, epochs=None), 2, force=True)
    assert trainer.evaluation is not None
    assert (trainer.config.micro_batch_size, trainer.config.recompute) == (1, True)
    assert trainer.fitted.describe().endswith(": more than there is, started by --force")


def test_a_resumed_run_keeps_what_it_decided_when_it_began(config, tmp_path):
    """With more memory than before, and still to the same weights bit for bit."""
    whole, parts = (replace(config, output=str(tmp_path / name)) for name in ("whole", "parts"))
    with memory_limit(600_000):
        stopped_after(whole, None, force=True)
        stopped_after(parts, 2, force=True)
    record = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert record["automatic_settings"] == {
        "micro_batch_size": 1, "recompute": True, "scorer": "trie"
    }  # fmt: skip
    assert (record["settings"]["micro_batch_size"], record["settings"]["recompute"]) == (None, None)
    trainer = stopped_after(parts, None, resume=True)
    assert (trainer.config.micro_batch_size, trainer.config.recompute) == (1, True)
    assert trainer.fitted.describe() == "as when the run began: 1 pair per pass, recomputed"
    ours, theirs = (mx.load(f"{c.output}/adapters.safetensors") for c in (parts, whole))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (4_100_000, "4 MB"),
        (99e6, "99 MB"),
        (123e6, "0.12 GB"),
        (11.46e9, "11.5 GB"),
        (2e11, "200 GB"),
    ],
)
def test_memory_sizes_have_the_significant_digits(size, message):
    assert format_bytes(size, is_estimate=True) == message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"micro_batch_size": 4}, False),
        ({"micro_batch_size": 2}, True),
        # Pairs of 198 and of 228 tokens through the layers: the second one is cut to fit.
        ({"micro_batch_tokens": 300, "batch_size": 2}, True),
        # A step of whole lists may have more pairs than a batch.
        ({"micro_batch_size": 4, "loss_type": ("plackett_luce",)}, True),
    ],
)
def test_a_step_of_several_passes_holds_gradients_in_between(deep, changes, expected, monkeypatch):
    base, config, choice, pairs = deep
    held = []
    monkeypatch.setattr(
        auto_batch_size,
        "profile_training_pass",
        lambda policy, pairs, settings, **more: held.append(settings.accumulates),
    )
    config = replace(config, **changes)
    profile_micro_batch(base, config, choice, longest_micro_batch(config, choice, pairs))
    assert held == [expected]


class Narrow(Ranks):
    """Rank 0 of two, of which the other has too little memory for the first `refusals` tries."""

    def __init__(self, refusals):
        super().__init__()
        self.size, self.refusals = 2, refusals

    def any(self, name, flag):
        assert name == "memory"
        self.refusals -= 1
        return flag or self.refusals >= 0


@pytest.mark.parametrize(("refusals", "size"), [(0, 2), (1, 2), (2, 1)])
def test_the_rank_with_the_least_memory_decides(deep, refusals, size):
    """With plenty here, the bound and then the first size do not fit on the other rank."""
    base, config, choice, pairs = deep
    room = MemoryBudget(UNLIMITED.bytes, "")
    choice = replace(choice, ranks=Narrow(refusals))
    fit = fit_micro_batch_size(base, config, choice, pairs, room=room, measure=False)
    assert fit.config.micro_batch_size == size
    assert fit.passes_at_once == 1


def test_ranks_on_one_machine_share_its_memory():
    room = MemoryBudget(900, "MLX's limit")
    assert room.shared_by(1) == room
    assert room.shared_by(3) == MemoryBudget(300, "MLX's limit, shared by 3 ranks")
