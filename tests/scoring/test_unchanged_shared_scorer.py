"""The shared scorer computes, bit for bit, what it computed before there was a trie scorer."""

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.scoring.backbone import split_backbone
from mlx_dpo.scoring.kernels.attention import QueryChunk
from mlx_dpo.scoring.kernels.attention_dispatch import use_structured_masks
from mlx_dpo.scoring.kernels.rope import TokenPositions, use_token_positions
from mlx_dpo.scoring.lm_head import chunked_logps
from mlx_dpo.scoring.packing.packed_sequence import PackedCache
from mlx_dpo.scoring.scorers import make_shared_scorer, memory_efficient_training
from mlx_dpo.types import PairLogps
from tests.conftest import VOCAB, make_llama
from tests.scoring.branching import branching_sets


class EarlierRow:
    """The row of that time: prompt, chosen and rejected of one pair after the other."""

    def __init__(self, pairs):
        self.parts, ids = [], []
        for pair in pairs:
            parts = (pair.prompt, pair.chosen[:-1], pair.rejected[:-1])
            self.parts.append((len(ids), *map(len, parts)))
            ids.extend(itertools.chain(*parts))
        self.tokens = mx.array(ids)[None]
        self.rope_offset = TokenPositions(np.concatenate([self.at(*p) for p in self.parts]))

    def __len__(self):
        return self.tokens.shape[1]

    @staticmethod
    def at(start, prompt, chosen, rejected):
        both = (prompt + np.arange(count) for count in (chosen, rejected))
        return np.concatenate([np.arange(prompt), *both])

    def predicting(self):
        chosen, rejected = [], []
        for start, prompt, first, second in self.parts:
            last, after = start + prompt - 1, start + prompt
            chosen += [last, *range(after, after + first)]
            rejected += [last, *range(after + first, after + first + second)]
        return mx.array(chosen + rejected)

    def chunks(self, size, dtype, window):
        assert window is None
        for offset, *counts in self.parts:
            part = np.repeat([0, 1, 2], counts)
            for start in range(0, len(part), size):
                end = min(start + size, len(part))
                rows, keys = np.arange(start, end)[:, None], np.arange(end)[None]
                seen = (keys <= rows) & ((part[keys] == 0) | (part[keys] == part[rows]))
                mask = mx.array(np.where(seen, 0.0, -np.inf).astype(np.float32))
                ends = offset + start, offset + end
                yield QueryChunk(*ends, ((offset, offset + end),), mask.astype(dtype))


class ChunkList(EarlierRow):
    """The same, with its chunks as a list that layers share."""

    def chunks(self, size, dtype, window):
        return list(super().chunks(size, dtype, window))


def earlier_scorer(model, pairs):
    row, parts = ChunkList(pairs), split_backbone(model)
    completions = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    with use_structured_masks(), use_token_positions():
        caches = [PackedCache(row) for _ in make_prompt_cache(model)]
        hidden = parts.hidden_states(row.tokens, caches)[0][row.predicting()]
    targets = mx.array(list(itertools.chain(*completions)))
    values = chunked_logps(
        parts, mx.concatenate([hidden]), targets, vocab_size=VOCAB, gradients=True
    )
    ends = list(itertools.accumulate(map(len, completions)))[:-1]
    sums = [part.sum() for part in mx.split(values, ends)]
    return PairLogps(mx.stack(sums[: len(pairs)]), mx.stack(sums[len(pairs) :]))


@pytest.mark.parametrize("recompute", [False, True])
def test_log_probs_and_gradients_have_the_same_bits(recompute):
    model = make_llama()
    adapters.attach_adapters(model, rank=4, scale=2.0)
    pairs = [pair for pairs in branching_sets(VOCAB, scale=5).values() for pair in pairs]

    def results(scorer):
        def loss(model):
            chosen, rejected = scorer(model, pairs)
            return -nn.log_sigmoid(0.1 * (chosen - rejected)).sum(), (chosen, rejected)

        with memory_efficient_training(model, recompute=recompute):
            found = nn.value_and_grad(model, loss)(model)
            mx.eval(found)
        return tree_flatten(found)

    shared = make_shared_scorer(vocab_size=VOCAB, gradients=True, packing="row")
    for (name, ours), (_, earlier) in zip(results(shared), results(earlier_scorer), strict=True):
        assert mx.array_equal(ours, earlier), name
