"""Write docs/losses.md from the entries of `mlx_dpo.losses.catalogue`.

python scripts/tools/docs/losses_page.py
"""

import textwrap
from pathlib import Path

from mlx_dpo.losses.catalogue import LEGEND, LOSSES
from mlx_dpo.losses.loss import Loss

PAGE = Path(__file__).parents[3] / "docs" / "losses.md"
HEAD = f"""# Losses

<!-- made by scripts/tools/docs/losses_page.py from the entries in mlx_dpo/losses/ -->

`--loss-type` takes one or several of these; several are summed, with `--loss-weights`: RPO is
`--loss-type sigmoid --loss-type sft`, MPO `--loss-type sigmoid --loss-type bco_pair --loss-type
sft --loss-weights 0.8 --loss-weights 0.2 --loss-weights 1`. In a file it is `loss_type: [sigmoid,
sft]`. Names are TRL's where it has the loss, and so are the numbers: tests hold value and gradient
of each against TRL's own code within 1e-6, and against its formula in float64. `mlx-dpo losses`
shows the same in a terminal, `--json` gives it to programs.

{textwrap.fill(LEGEND, 98)}.

| loss | of one pair | when |
|---|---|---|
"""
TAIL = """
## What each needs, and what acts on it

Settings stand with the values they have for the loss unless they are set; one that no chosen loss
reads is an error. *Margins* are those of the data: they are taken from β times the margin (ODPO,
arXiv:2402.10571). *Divergences* are `f_divergence_type` (f-DPO, arXiv:2309.16240): log-ratios give
way to f'(π / π_ref). In a sum `beta` is one for all; unless set, that of the first loss.

| loss | needs | settings | margins | divergences | source |
|---|---|---|:-:|:-:|---|
"""
END = """
On all losses of pairs with a reference: `ld_alpha` (LD-DPO, arXiv:2409.06411), by which tokens
beyond the length of the shorter completion count less, under policy and reference. On all whose
terms are of one pair: `use_weighting` (WPO, arXiv:2406.11827), by which a pair counts as much as
the policy would write it itself; it takes one more pass a step.

## Where papers and TRL differ

* `sigmoid` takes `label_smoothing` (then it is `cdpo`); TRL ignores it there.
* `ipo` averages log-ratios over tokens, as its authors told TRL they did; the paper has sums.
* `bco_pair` has no running mean of rewards, as in TRL; the paper has one.
* The likelihood of chosen in `cpo` and `orpo` is a mean over tokens, as in TRL; of the completion
  alone, as in the papers. TRL's ORPO counts the prompt in.
* `sft` is divided by the mean length over a step, so that it is the mean over the step's tokens
  however it is cut into passes. TRL's is a mean over each pass, and fails with `use_weighting`.
* Exponentials of `forward_kl` and `alpha_divergence` go on as their tangent beyond e^30, so that a
  completion far out of reach is still pulled back. TRL cuts at e^80, where the gradient is zero,
  or overflows. `f_alpha_divergence_coef` is TRL's: 1 less the paper's α.
* Rewards of losses without a reference are β times log-probabilities (`simpo`, `orpo`: averages),
  as TRL logs them.
"""


def page() -> str:
    """Return the page as Markdown."""
    equations = [f"| `{x.name}` | {_cell(x.equation)} | {_cell(x.use)} |" for x in LOSSES.values()]
    needs = [_needs_row(loss) for loss in LOSSES.values()]
    return HEAD + "\n".join(equations) + "\n" + TAIL + "\n".join(needs) + "\n" + END


def _needs_row(loss: Loss) -> str:
    settings = ", ".join(f"`{name}` {value:g}" for name, value in loss.defaults.items())
    cells = (
        f"`{loss.name}`",
        ", ".join(loss.needs) or "no reference",
        settings or "none",
        "yes" if loss.uses_margins else "",
        "yes" if loss.uses_divergence else "",
        _cell(loss.source),
    )
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
