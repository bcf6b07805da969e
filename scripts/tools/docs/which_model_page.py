"""Write docs/which-model.md and the README's table from the recipes in examples/recipes/.

python scripts/tools/docs/which_model_page.py
"""

from pathlib import Path

from mlx_dpo.config.data import DEFAULT_MAX_LENGTH
from mlx_dpo.config.yaml_file import read_yaml
from mlx_dpo.profiling.extrapolate import MemoryCurve
from mlx_dpo.units import format_bytes
from scripts.tools.recipes import rule
from scripts.tools.recipes.rule import MEMORY_SIZES, MODELS, Recipe

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "which-model.md"
README = ROOT / "README.md"
NONE = "–"
HEAD = """# Which model fits my Mac

<!-- made by scripts/tools/docs/which_model_page.py from examples/recipes/ -->

Each cell is a recipe: a YAML file in [`examples/recipes`](../examples/recipes) with settings for
one model on a Mac with that much memory. It shows the bits of a weight, the length of the longest
pairs in tokens (`max_length`), the pairs per pass (`micro_batch_size`), whether activations are
recomputed (`recompute`), and the planned peak of memory. – means that not even one pair of 512
tokens fits. Other settings are the defaults: LoRA of rank 16 on all linear layers, 16 pairs per
optimizer step.

"""
NOTE = """
\\* Activations are not measured but extrapolated from a measured model, in proportion to the widths
of its layers (below). When measured models other than Gemma and Phi are predicted from each other
so, the largest error of a pass is {stored}, and {recomputed} with recomputation; the figures
include that much more.
"""
USE = """
Train with your own pairs, from a clone of the repository:

```sh
mlx-dpo train pairs.jsonl --config examples/recipes/qwen3-0.6b-16gb.yaml
```

A flag on the command line overrides the recipe. Longer pairs are cut to `max_length`
(`--truncation drop` leaves them out); `mlx-dpo data check` shows the lengths before. If your pairs
are shorter, plan with them on the Mac: more of them fit into a pass. (On the CPU backend `plan`
counts weights in float32.)

```sh
mlx-dpo plan pairs.jsonl --config examples/recipes/qwen3-0.6b-16gb.yaml --memory 16GB
```

## How the figures were made

**No recipe has been run on a Mac**, and times on Macs are not measured. The figures are planned:

* *Weights* are counted from the shapes of the published configuration, as a Mac stores them:
  4 or 8 bits with a scale and a bias per group of 64 weights, or bfloat16. Parameters are
  counted from these shapes; of Gemma 3 4B, the text part.
* *Activations* are measured. A training pass ran on a few layers with random weights, on MLX's CPU
  backend, and was extrapolated to all layers by the functions of
  [`mlx-dpo plan`](memory.md#estimate-first). The CPU computes in float32; a Mac computes in 16
  bits, so that the figures are an **upper bound** there, except for what Metal itself needs.
* `plan` runs pairs of the real length with the whole vocabulary. For these models that takes hours
  on a CPU, so the passes here were shorter and the LM head was measured by itself: {head}, added in
  full to every model, because logits are computed in chunks of a fixed size. {checked}
* Gemma 3 4B was measured with global attention in all layers. A pass of Gemma 3 1B is {uniform} by
  that.
* The pairs are the longest that `max_length` allows: a quarter is prompt, and both completions fill
  the rest.
* *Usable memory* is what Metal recommends: two thirds of the Mac's memory, three quarters from
  36 GB on. A 16 GB Mac has 16 GiB, which is 17.2 GB. A recipe leaves a tenth of it free.

Settings are chosen in this order: 16 bits, then 8 bits, if a pair of 1,024 tokens fits without
recomputation; otherwise 4 bits, with 1,024 tokens before 512, and without recomputation before
with it. Then the most pairs per pass, up to 8.

| model | published as | parameters | weights in 4 bits | layers measured | tokens of a row |
|---|---|--:|--:|--:|--:|
"""
TAIL = """
Measured on {dates} on two cores of a Linux machine with MLX {versions} and OpenBLAS, each pass once
or twice. `scripts/tools/recipes/measure.py` measures again, `rule.py` in its folder writes the
recipes, and `scripts/tools/docs/which_model_page.py` this page.
"""


def page() -> str:
    """Return the page as Markdown."""
    measured = rule.measured()
    about = [record["measured"] for record in measured.values() if "measured" in record]
    dates = ", ".join(sorted({entry["date"] for entry in about}))
    versions = " and ".join(sorted({entry["mlx"] for entry in about}))
    return (
        HEAD
        + _table()
        + _extrapolated()
        + USE.format(uniform=_uniform(), checked=_checked(), head=_size(rule.head_bytes()))
        + "\n".join(_source_row(model) for model in measured)
        + "\n"
        + TAIL.format(dates=dates, versions=versions)
    )


def readme_table() -> str:
    """Return the table of the README: the largest models of each memory size."""
    rows = ["| Mac | largest of ten models | in 16 bits |", "|---|---|---|"]
    for memory in MEMORY_SIZES:
        found = [recipe for recipe in rule.recipes() if recipe.memory == memory]
        whole = [recipe for recipe in found if recipe.precision == "bfloat16"]
        rows.append(f"| {memory} GB | {_largest(found)} | {_largest(whole)} |")
    return "\n".join(rows) + "\n"


def _largest(recipes: list[Recipe]) -> str:
    """Return the name of the model with most parameters."""
    models = sorted((recipe.model for recipe in recipes), key=lambda m: MODELS[m]["parameters"])
    return str(MODELS[models[-1]]["name"]) if models else NONE


def _table() -> str:
    header = " | ".join(f"{memory} GB" for memory in MEMORY_SIZES)
    rows = [f"| model | {header} |", "|---|" + "---|" * len(MEMORY_SIZES)]
    for model in rule.measured():
        cells = [_cell(model, memory) for memory in MEMORY_SIZES]
        mark = " *" if "extrapolated_from" in rule.measured()[model] else ""
        rows.append(f"| {MODELS[model]['name']}{mark} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _extrapolated() -> str:
    """Return the note on the models that were not measured; "" if all were."""
    found = [r for r in rule.measured().values() if "extrapolated_from" in r]
    if not found:
        return ""
    stored, recomputed = (f"± {found[0]['errors'][name]:.0%}" for name in rule.NO_ERRORS)
    return NOTE.format(stored=stored, recomputed=recomputed)


def _checked() -> str:
    """Return a sentence that compares planned passes with whole passes that were measured."""
    found = []
    for model, record in rule.measured().items():
        for check in (record[key] for key in ("check", "check_recomputed") if key in record):
            planned = rule.pass_bytes(model, check["length"], 1, recompute=check["recompute"])
            sizes = (_size(size) for size in (planned, check["bytes"]))
            found.append(
                f"{MODELS[model]['name']}, {check['length']} tokens"
                f"{', recomputed' if check['recompute'] else ''}: "
                f"{' planned, '.join(sizes)} measured ({planned / check['bytes'] - 1:+.0%})"
            )
    if not found:
        return "No pass through a whole model was measured for comparison."
    return (
        "Passes through a whole model, with all layers and the whole vocabulary, for comparison: "
        f"{'; '.join(found)}."
    )


def _uniform() -> str:
    """Return how much more memory a pass takes if all layers have the same attention."""
    check = rule.measured()["gemma-3-1b"]["uniform"]
    curve = MemoryCurve(**rule.measured()["gemma-3-1b"]["curves"]["stored"])
    more = check["bytes"] / curve.bytes(1, rule.tokens_per_pair(check["length"])) - 1
    return f"{abs(more):.0%} {'larger' if more > 0 else 'smaller'}"


def _cell(model: str, memory: int) -> str:
    """Return the settings in the file of a recipe, and the peak that is planned for them."""
    path = rule.RECIPES / f"{model}-{memory}gb.yaml"
    if not path.is_file():
        return NONE
    found = recipe_of(path)
    words = [
        rule.PRECISION_NAMES[found.precision],
        f"{found.max_length:,} tokens",
        f"{found.pairs} pair{'s' * (found.pairs > 1)}",
        *(["recomputed"] if found.recompute else []),
        f"**{_size(found.peak)}**",
    ]
    return ", ".join(words)


def recipe_of(path: Path) -> Recipe:
    """Return the recipe that a file contains."""
    model, _, memory = path.stem.rpartition("-")
    values = read_yaml(str(path))
    sources = {source: bits for bits, source in MODELS[model]["sources"].items()}
    return Recipe(
        model,
        int(memory.removesuffix("gb")),
        sources[values["model"]],
        values.get("max_length", DEFAULT_MAX_LENGTH),
        values["micro_batch_size"],
        values.get("recompute", False),
    )


def _source_row(model: str) -> str:
    entry, record = MODELS[model], rule.measured()[model]
    layers = record["curves"]["stored"]["num_layers"]
    if base := record.get("extrapolated_from"):
        basis = (f"extrapolated from {MODELS[base]['name']}", NONE)
    else:
        about = record["measured"]
        basis = (
            f"{' and '.join(map(str, about['layers']))} of {layers}",
            " and ".join(map(str, about["lengths"])),
        )
    cells = (
        entry["name"],
        f"`{entry['published']}`",
        f"{record['parameters']:,}",
        _size(record["weights"]["4"]),
        *basis,
    )
    return f"| {' | '.join(cells)} |"


def _size(size: int) -> str:
    return format_bytes(size, is_estimate=True)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
