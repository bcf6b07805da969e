"""Compare sharded models of all architectures with whole ones, as one of several ranks.

    python -m tests.distributed.sharded_architectures BITS [ARCHITECTURE ...]

Started with the variables of MLX's launcher. Rank 0 prints one JSON object per architecture and
scorer: what differs on any rank, and the bytes that this rank holds by MLX's count.
"""

import gc
import json
import sys

import mlx.core as mx

from mlx_dpo.adapters.attach import detach_adapters
from mlx_dpo.distributed.connect import connect
from mlx_dpo.models.sharded.shard_model import shard_model
from mlx_dpo.scoring.backbone import UnsupportedModelError
from mlx_dpo.scoring.equivalence import UNSUPPORTED_ERRORS, random_pairs
from mlx_dpo.scoring.kernels.gated_delta import use_fused_gated_delta
from mlx_dpo.scoring.scorers import make_shared_scorer, plain_scorer
from mlx_dpo.scoring.sharded.gathered_blocks import use_gathered_weights
from tests.scoring import architectures
from tests.scoring.sharded_models import adapt, build, different_bits, numbers

LENGTHS = ((9, 6, 2), (5, 3, 7), (12, 4, 4))
SCORERS = {"plain": plain_scorer} | {
    packing: make_shared_scorer(vocab_size=architectures.VOCAB, gradients=True, packing=packing)
    for packing in ("trie", "row", "batch")
}
# Calls parts of its blocks instead of the blocks, and is refused.
REFUSED = ("iquestloopcoder",)


def whole_numbers(model_type, bits, pairs):
    """What the whole model computes with each scorer that it supports."""
    model = build(model_type, bits)
    adapt(model)
    found = {}
    with use_fused_gated_delta(model):
        for name, scorer in SCORERS.items():
            try:
                found[name] = numbers(model, scorer, pairs)
            except (UnsupportedModelError, *UNSUPPORTED_ERRORS):
                continue
    return found


def compare(ranks, model_type, bits):
    """What differs on this rank, by scorer, and the bytes that the rank holds."""
    lengths = [(p + ranks.rank, c + ranks.rank, r) for p, c, r in LENGTHS]
    pairs = random_pairs(lengths[: 3 - ranks.rank % 2], architectures.VOCAB)
    expected = whole_numbers(model_type, bits, pairs)
    supported = ranks.all_gather_json("supported", sorted(expected))
    common = [name for name in SCORERS if all(name in names for names in supported)]
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    model = build(model_type, bits)
    shards = shard_model(model, ranks)
    shards.whole.clear()
    use_gathered_weights(model)
    outside = {id(a) for layer in model.layers for a in arrays(layer)}
    kept = sum(a.nbytes for a in arrays(model) if id(a) not in outside)
    gc.collect()
    mx.clear_cache()
    held = mx.get_active_memory() - before - kept
    adapt(model)
    with use_fused_gated_delta(model):
        differences = {
            name: different_bits(numbers(model, SCORERS[name], pairs), expected[name])
            for name in common
        }
    detach_adapters(model)
    return differences, held, shards.held_bytes + shards.absent_bytes


def arrays(module):
    return [v for m in module.modules() for v in m.values() if isinstance(v, mx.array)]


def main():
    bits, *names = sys.argv[1:]
    ranks = connect()
    for model_type in names or architectures.model_types():
        if model_type in (*architectures.UNBUILT, *REFUSED):
            continue
        differences, held, total = compare(ranks, model_type, int(bits))
        for rank, of_rank in enumerate(ranks.all_gather_json("differences", differences)):
            for name, different in of_rank.items():
                if different:
                    differences[name] = [f"rank {rank}", *different]
        if ranks.is_main:
            row = {"model_type": model_type, "differences": differences}
            print(json.dumps(row | {"held": held, "total": total}), flush=True)


if __name__ == "__main__":
    main()
