"""Write docs/architectures.md: which scorer every architecture of mlx-lm gets, and why.

    python scripts/tools/docs/architectures_page.py

Each is built small, with random weights and adapters, and probed as a run would probe it.
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
from mlx_dpo.scoring.select_scorer import PACKINGS, select_scorer  # noqa: E402
from tests.scoring.architectures import UNBUILT, VOCAB, adapt, build, model_types  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
HEAD = """# Architectures

How pairs of each architecture of mlx-lm {mlx_lm} are scored, with MLX {mlx} on its CPU backend.
Written by `scripts/tools/docs/architectures_page.py`; a run probes its own model and says what it
found.

`shared`: each prompt goes through the model once, and only scored tokens through its head.
`plain`: whole rows, because the shared scorer does not give the same numbers. *Way*: how several
pairs go through together: behind one another in one row, without padding (`row`); as a batch with
padded prompts (`batch`, tried on a GPU only); or those with equally long prompts (`lengths`).

{totals}

| architecture | scorer | way | remarks |
|---|---|---|---|
"""


class Row(NamedTuple):
    """What was found for one architecture."""

    name: str
    scorer: str
    way: str  # how pairs go together, where prompts are shared
    remark: str


def examine(model_type: str) -> Row:
    """Build, adapt and probe one architecture."""
    if model_type in UNBUILT:
        return Row(model_type, "not tried", "", UNBUILT[model_type])
    model = adapt(model_type, build(model_type))
    try:
        choice = select_scorer(model, vocab_size=VOCAB, packings=tuple(PACKINGS))
    except ModelError as error:
        return Row(model_type, "none", "", str(error).partition(";")[0])
    remark = choice.reason
    if choice.name == "shared":  # how near it was differs from machine to machine
        remark = remark.partition("; ")[2].partition("; ")[2]
    return Row(model_type, choice.name, choice.packing or "", remark)


def page(rows: list[Row]) -> str:
    """The page as it is written."""
    counts = Counter(row.scorer for row in rows)
    totals = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    ways = Counter(row.way for row in rows if row.way)
    said = ", ".join(f"{way} {count}" for way, count in ways.most_common())
    head = HEAD.format(
        mlx_lm=mlx_lm.__version__,
        mlx=mx.__version__,
        totals=f"Of {len(rows)} architectures: {totals}; by {said}.",
    )
    lines = [f"| `{r.name}` | {r.scorer} | {r.way} | {r.remark} |\n" for r in rows]
    return head + "".join(lines)


if __name__ == "__main__":
    found = []
    for name in model_types():
        found.append(examine(name))
        print(*found[-1], file=sys.stderr)
    PAGE.write_text(page(found))
