"""CPU seconds of training and reference passes on one thread, of one checkout or of two.

    python -m scripts.bench.bench_pass                          this checkout, 2 pairs per pass
    python -m scripts.bench.bench_pass --tree OLD --tree .      an older checkout against this one
    python -m scripts.bench.bench_pass --pairs 8 --scorer trie  8 pairs per pass, prefix trie

Eight pairs with the lengths of short dialogues go through rank-8 adapters on a model with random
weights. Each measurement is a process of its own with one BLAS thread; the checkouts take turns.
User and system seconds come from `getrusage`: other processes hardly change them.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from scripts.bench import machine
from scripts.bench.tables import Row, text_table

# Tokens of prompt, chosen and rejected completion.
LENGTHS = (
    (106, 38, 46),
    (60, 20, 70),
    (150, 60, 40),
    (90, 30, 30),
    (110, 45, 50),
    (100, 25, 35),
    (200, 70, 60),
    (40, 15, 40),
)
PASSES = ("training", "reference")
COLUMNS = ("tree", "pass", "user_s", "system_s", "wall_s", "of_first")
# The process of a measurement: this file, but the modules of the given tree.
START = (
    "import runpy, sys; sys.path.insert(0, sys.argv[1]); "
    "runpy.run_path(sys.argv[2], run_name='measure')"
)
Seconds = dict[str, float]  # user, system and wall seconds


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_pass", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--tree", type=Path, action="append", help="checkout to measure; repeat it (default: this)")
    add("--shape", default="smollm2-135m", help="shape of the model")
    add("--pairs", type=int, default=2, help="pairs in a pass (default: 2)")
    add("--scorer", default="shared", help="scorer, as the trees call it (default: shared)")
    add("--rounds", type=int, default=3, help="measurements of each tree (default: 3)")
    options = parser.parse_args(arguments)
    options.tree = [tree.resolve() for tree in options.tree or [machine.ROOT]]
    for tree in options.tree:
        if not (tree / "mlx_dpo").is_dir():  # an installed package would be measured instead
            parser.error(f"{tree}: no checkout of this project; give a folder with `mlx_dpo`")
    return options


def measure_tree(options: argparse.Namespace, tree: Path) -> dict[str, Seconds]:
    """Return the seconds of each kind of pass, measured by a process with the modules of `tree`.

    Raises:
        RuntimeError: the process ended without a result.
    """
    job = [options.shape, str(options.pairs), options.scorer]
    done = subprocess.run(
        [sys.executable, "-c", START, str(tree), __file__, *job],
        capture_output=True,
        text=True,
        cwd=tree,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(tree)},
    )
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"{tree}: the measurement failed ({last})")
    seconds: dict[str, Seconds] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def measure(shape_name: str, pairs_per_pass: str, scorer_name: str) -> dict[str, Seconds]:
    """Return the seconds of eight pairs in passes of so many, with the modules on `sys.path`."""
    import mlx_dpo  # noqa: F401  loads the fast BLAS, before MLX

    # isort: split
    import mlx.core as mx

    from mlx_dpo.profiling.device_memory import keep_freed_memory
    from mlx_dpo.scoring.scorers import fast_inference, memory_efficient_training
    from mlx_dpo.scoring.select_scorer import select_scorer
    from scripts.bench import steps

    keep_freed_memory()
    shape = _shapes()[shape_name]
    model = steps.build(shape)
    choice: Any = select_scorer(model, vocab_size=shape.vocab_size, requested=scorer_name)
    variant = steps.ScorerVariant(
        choice.name,
        choice.scorer,
        choice.forward_only,
        lambda: memory_efficient_training(model, recompute=False),
        lambda: fast_inference(model),
    )
    pairs, size = _pairs(shape.vocab_size), int(pairs_per_pass)
    makers = dict(zip(PASSES, (steps.training_pass, steps.reference_pass), strict=True))
    seconds = {}
    for name, make in makers.items():
        runs = [make(model, variant, pairs[i : i + size]) for i in range(0, len(pairs), size)]
        mx.eval(runs[0]())
        seconds[name] = _seconds(lambda runs=runs: [mx.eval(run()) for run in runs])
    return seconds


def _shapes() -> dict[str, Any]:
    """Return the shapes of the tree; older trees have them among their scripts."""
    try:
        from mlx_dpo.profiling.bench.shapes import SHAPES
    except ModuleNotFoundError:
        from scripts.bench.shapes import SHAPES  # type: ignore[import-not-found,no-redef]
    return dict(SHAPES)


def _pairs(vocab_size: int) -> list[Any]:
    """Return eight pairs of random tokens with the lengths LENGTHS."""
    from mlx_dpo.types import TokenizedPair

    draw = random.Random(0)
    return [
        TokenizedPair(*(tuple(draw.randrange(vocab_size) for _ in range(n)) for n in lengths))
        for lengths in LENGTHS
    ]


def _seconds(run: Callable[[], Any]) -> Seconds:
    """Return the seconds of one call, of all threads of this process."""
    before, started = resource.getrusage(resource.RUSAGE_SELF), perf_counter()
    run()
    wall, after = perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "user_s": after.ru_utime - before.ru_utime,
        "system_s": after.ru_stime - before.ru_stime,
        "wall_s": wall,
    }


def rows(trees: Sequence[Path], measured: Sequence[Sequence[dict[str, Seconds]]]) -> list[Row]:
    """Return a row per tree and kind of pass: medians over the rounds.

    `of_first` is the median ratio of CPU seconds to the first tree's in the same round.

    Args:
        measured: for each round the seconds of each tree, in the order of `trees`.
    """
    table: list[Row] = []
    for name in PASSES:
        for number, tree in enumerate(trees):
            own = [results[number][name] for results in measured]
            first = [results[0][name] for results in measured]
            ratios = [_cpu(mine) / _cpu(other) for mine, other in zip(own, first, strict=True)]
            values = {key: f"{median(s[key] for s in own):.2f}" for key in own[0]}
            table.append({"tree": tree.name, "pass": name, "of_first": f"{median(ratios):.3f}"})
            table[-1] |= values
    return table


def _cpu(seconds: Seconds) -> float:
    """Return user and system seconds together."""
    return seconds["user_s"] + seconds["system_s"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    measured = [
        [measure_tree(options, tree) for tree in options.tree] for _ in range(options.rounds)
    ]
    print(f"{machine.processor()}, load {os.getloadavg()[0]:.1f}, {options.pairs} pairs per pass")
    print(text_table(rows(options.tree, measured), COLUMNS))
    return 0


if __name__ == "measure":
    print(json.dumps(measure(*sys.argv[3:])))
elif __name__ == "__main__":
    sys.exit(main())
