"""Write docs/architectures.md: which scorer every architecture of mlx-lm gets, and why.

    python scripts/tools/docs/architectures_page.py

Each is built small, with random weights and adapters, and its scorer is selected as in a run.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

import mlx_dpo  # noqa: E402, F401  (first: it loads OpenBLAS before MLX is imported)

import mlx.core as mx  # noqa: E402  # isort: skip
import mlx_lm  # noqa: E402

from mlx_dpo.errors import ModelError  # noqa: E402
from mlx_dpo.scoring.generation_match import (  # noqa: E402
    GENERATED,
    MAX_TESTED_WINDOW,
    PROMPT,
    GenerationMismatchError,
    match_generation,
)
from mlx_dpo.scoring.select_scorer import PACKINGS, select_scorer  # noqa: E402
from tests.scoring.architectures import UNBUILT, VOCAB, adapt, build, model_types  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
HEAD = """# Architectures

> For developers: `mlx-dpo train` prints the result for your model.

How pairs of each architecture of mlx-lm {mlx_lm} are scored, with MLX {mlx} on its CPU backend.
Made by `scripts/tools/docs/architectures_page.py`. Every run tests its own model and prints the
result.

* *Scorer* `trie`: each distinct beginning of the texts of a pass goes through the model once, and
  only completion tokens go through its head. `shared`: the prompt of each pair goes through once.
  `plain`: padded rows of prompt and completion, because the others do not give the same numbers.
* *Packing* of several pairs: the trie in one row (`trie`), pairs concatenated in one row without
  padding (`row`), as a batch with padded prompts (`batch`, on a GPU only), or as a batch of pairs
  with equally long prompts (`lengths`).

*Cached = uncached* is the largest difference, in nats per token, between log-probs computed in one
pass without KV caches (as in scoring) and token by token with KV caches (as in generation). Each
run makes this comparison for its own model on {short} random tokens. If the model has a sliding
window of at most {window} tokens and `--max-length` is longer than the window, the run also
compares a sequence longer than the window. If the difference exceeds the rounding error of the
dtype, the model is scored with KV caches (gemma3n). If scoring with KV caches differs from
generation too, the model is refused (plamo3, whose window has one token less in generation than in
a prompt; the small model's window has 4 tokens).

{totals}

| architecture | scorer | packing | cached = uncached | remarks |
|---|---|---|---|---|
"""


class Row(NamedTuple):
    """The scorer of one architecture."""

    name: str
    scorer: str
    packing: str  # empty for the plain scorer
    difference: str  # between log-probs as scored and as generated, nats per token
    remark: str


def examine(model_type: str) -> Row:
    """Build an architecture, attach adapters, and select its scorer."""
    if model_type in UNBUILT:
        return Row(model_type, "not tried", "", "", UNBUILT[model_type])
    model = adapt(build(model_type))
    try:
        choice = select_scorer(model, vocab_size=VOCAB, packings=tuple(PACKINGS))
    except ModelError as error:
        return Row(model_type, "none", "", _difference(model_type), str(error).partition(";")[0])
    # The first part is the packing; errors differ from machine to machine.
    notes = choice.reason.split("; ")[choice.name != "plain" :]
    remark = "; ".join(
        n for n in notes if not n.startswith(("verified", "log-probs match generation"))
    )
    if choice.generation and choice.generation.uses_caches:
        remark = "; ".join(filter(None, [remark, "scored with KV caches, as it generates"]))
    return Row(model_type, choice.name, choice.packing or "", _difference(model_type), remark)


def _difference(model_type: str) -> str:
    """Return how far a pass without caches is from generation, in nats per token."""
    try:
        match = match_generation(build(model_type), vocab_size=VOCAB)
    except GenerationMismatchError as error:
        return _rounded(error.uncached_difference)
    return _rounded(match.uncached_difference)


def _rounded(nats: float) -> str:
    return f"{nats:.1g}" if nats < 0.01 else f"{nats:.2g}"


def page(rows: list[Row]) -> str:
    """Return the text of the page."""
    counts = Counter(row.scorer for row in rows)
    totals = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    packings = Counter(row.packing for row in rows if row.packing)
    by_packing = ", ".join(f"{name} {count}" for name, count in packings.most_common())
    head = HEAD.format(
        mlx_lm=mlx_lm.__version__,
        mlx=mx.__version__,
        short=PROMPT + GENERATED,
        window=MAX_TESTED_WINDOW,
        totals=f"Of {len(rows)} architectures: {totals}; by {by_packing}.",
    )
    lines = [
        f"| `{r.name}` | {r.scorer} | {r.packing} | {r.difference} | {r.remark} |\n" for r in rows
    ]
    return head + "".join(lines)


if __name__ == "__main__":
    rows = []
    for name in model_types():
        rows.append(examine(name))
        print(*rows[-1], file=sys.stderr)
    PAGE.write_text(page(rows))
