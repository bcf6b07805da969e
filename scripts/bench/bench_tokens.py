"""Tokens through layers and head, and attention scores: prefix trie against shared prompts.

    python -m scripts.bench.bench_tokens                       synthetic sets and the shipped pairs
    python -m scripts.bench.bench_tokens --pairs PAIRS         also the pairs of a file
    python -m scripts.bench.bench_tokens --time                also the time of training passes

Counts are exact and do not depend on the machine. Passes have the pairs of a prompt together, as in
evaluations and with --group-by-prompt. `--time` measures a few passes of each set with both
scorers, which take turns; the ratios are those of wall and CPU time.
"""

import argparse
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import mlx_dpo  # noqa: F401  the fast BLAS is loaded with it, before MLX
from mlx_dpo.errors import DPOError

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_tokenizer

from mlx_dpo.data.load import load_pairs
from mlx_dpo.profiling.bench.shapes import SHAPES
from mlx_dpo.scoring.kernels.attention import QueryChunk
from mlx_dpo.scoring.packing.packed_sequence import PackedSequence
from mlx_dpo.scoring.scorers import (
    PACKED_LAYOUTS,
    Packing,
    make_shared_scorer,
    memory_efficient_training,
)
from mlx_dpo.types import TokenizedPair
from scripts.bench import branching_sets, machine, steps, texts
from scripts.bench.steps import ScorerVariant

SHIPPED = machine.ROOT / "models" / "tiny-chat"
QUERIES_PER_CHUNK = 64  # as on the CPU
LAYOUTS: tuple[Packing, Packing] = ("row", "trie")  # old and new
SYNTHETIC: dict[str, Callable[[int], list[TokenizedPair]]] = {
    "4 completions, 6 pairs": lambda vocab: branching_sets.ranked_pairs(40, vocab),
    "system message of 600 tokens": lambda vocab: branching_sets.system_pairs(240, vocab),
    "a pair at each of 4 turns": lambda vocab: branching_sets.dialogue_pairs(60, vocab),
    "answers that branch": lambda vocab: branching_sets.branching_answers(240, vocab),
}


class Work(NamedTuple):
    """Work of passes over pairs."""

    layer_tokens: int
    head_rows: int
    scores: int  # query-key products of attention, per layer and head

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        """Return the work of both."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_tokens", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--pairs", type=Path, action="append", default=[], help="file of plain-text pairs")
    add("--pass-pairs", type=int, default=8, help="pairs in a pass (default: 8)")
    add("--time", action="store_true", help="also measure training passes")
    add("--shape", choices=SHAPES, default="smollm2-135m", help="shape of the model for --time")
    add("--passes", type=int, default=2, help="passes of each set for --time (default: 2)")
    add("--repeats", type=int, default=3, help="rounds for --time; the median counts (default: 3)")
    return parser.parse_args(arguments)


def sets_of_pairs(files: Sequence[Path], vocab_size: int) -> dict[str, list[TokenizedPair]]:
    """Return the sets to count, by name."""
    sets = {name: make(vocab_size) for name, make in SYNTHETIC.items()}
    if SHIPPED.is_dir():
        tokenizer = load_tokenizer(SHIPPED)
        shipped = SHIPPED / "preferences"
        sets["tiny-chat"] = [
            pair
            for name in ("train", "valid")
            for pair in load_pairs(shipped / f"{name}.jsonl", tokenizer).pairs
        ]
    for file in files:
        pairs, _ = texts.read_pairs(file)
        encode = texts.train_tokenizer(pairs, vocab_size).encode
        sets[file.parent.name] = [
            TokenizedPair(*(tuple(encode(text).ids) for text in pair.values())) for pair in pairs
        ]
    return sets


def grouped_passes(pairs: Sequence[TokenizedPair], size: int) -> list[list[TokenizedPair]]:
    """Divide the pairs into passes of `size` pairs, with those of a prompt together."""
    ordered = sorted(pairs, key=lambda pair: (pair.prompt, pair.chosen, pair.rejected))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def count_work(sequence: PackedSequence) -> Work:
    """Count the work of a pass over a packed sequence."""
    chunks = sequence.chunks(QUERIES_PER_CHUNK, mx.float32, None)
    return Work(len(sequence), len(sequence.head_rows().targets), sum(map(_scores, chunks)))


def layer_tokens(passes: Sequence[Sequence[TokenizedPair]], layout: Packing) -> int:
    """Return the number of tokens through the layers of all passes."""
    return sum(len(PACKED_LAYOUTS[layout](pairs)) for pairs in passes)


def _scores(chunk: QueryChunk) -> int:
    return (chunk.query_end - chunk.query_start) * chunk.num_keys


def ratios(pairs: Sequence[TokenizedPair], size: int) -> tuple[Work, Work]:
    """Return the work of all passes with shared prompts, and with the trie."""
    passes = grouped_passes(pairs, size)
    old, new = (
        sum((count_work(PACKED_LAYOUTS[name](batch)) for batch in passes), Work(0, 0, 0))
        for name in LAYOUTS
    )
    return old, new


class Seconds(NamedTuple):
    """Time of a pass."""

    wall: float
    user: float


def measure_passes(
    model: nn.Module, passes: Sequence[Sequence[TokenizedPair]], vocab_size: int, repeats: int
) -> Seconds:
    """Return the ratios of the times of training passes, trie to shared prompts.

    Both scorers run each pass in turn. A warm-up round is not counted.
    """
    found: list[list[Seconds]] = []  # of each round, for both layouts
    for _ in range(repeats + 1):
        found.append([_time(model, name, passes, vocab_size) for name in LAYOUTS])
    old, new = zip(*found[1:], strict=True)
    return Seconds(
        *(
            median(getattr(b, n) / getattr(a, n) for a, b in zip(old, new, strict=True))
            for n in Seconds._fields
        )
    )


def _time(
    model: nn.Module, name: Packing, passes: Sequence[Sequence[TokenizedPair]], vocab_size: int
) -> Seconds:
    scorer = make_shared_scorer(vocab_size=vocab_size, gradients=True, packing=name)
    variant = ScorerVariant(
        name, scorer, scorer, lambda: memory_efficient_training(model, recompute=False)
    )
    before, started = resource.getrusage(resource.RUSAGE_SELF), perf_counter()
    for pairs in passes:
        mx.eval(steps.training_pass(model, variant, pairs)())
    after = resource.getrusage(resource.RUSAGE_SELF)
    return Seconds(perf_counter() - started, after.ru_utime - before.ru_utime)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row for each set, as a table of Markdown."""
    options = parse(arguments)
    shape = SHAPES[options.shape]
    model = steps.build(shape) if options.time else None
    titles = ["set", "pairs", "tokens through the layers", "head rows", "scores"]
    titles += ["wall time", "user time"] if options.time else []
    print(f"| {' | '.join(titles)} |\n|---|{'--:|' * (len(titles) - 1)}")
    try:
        sets = sets_of_pairs(options.pairs, shape.vocab_size)
    except DPOError as error:
        print(f"bench_tokens: {error}", file=sys.stderr)
        return 1
    for name, pairs in sets.items():
        old, new = ratios(pairs, options.pass_pairs)
        cells = [name, str(len(pairs))]
        cells += [f"{b / a:.3f}" for a, b in zip(old, new, strict=True)]
        if model is not None:
            passes = grouped_passes(pairs, options.pass_pairs)
            middle = (len(passes) - options.passes) // 2
            some = passes[middle : middle + options.passes]
            times = measure_passes(model, some, shape.vocab_size, options.repeats)
            tokens = layer_tokens(some, "trie") / layer_tokens(some, "row")
            cells += [f"{time:.2f} (tokens {tokens:.2f})" for time in times]
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
