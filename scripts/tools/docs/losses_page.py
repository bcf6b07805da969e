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

`--loss-type` takes one or more of these names; several losses are summed, with the weights of
`--loss-weights`: RPO is `--loss-type sigmoid --loss-type sft`, MPO `--loss-type sigmoid --loss-type
bco_pair --loss-type sft --loss-weights 0.8 --loss-weights 0.2 --loss-weights 1`. In a YAML file,
write `loss_type: [sigmoid, sft]`. Names are TRL's if TRL has the loss. Tests compare value and
gradient of each loss with TRL's own code (within 1e-6) and with its formula in float64.
`mlx-dpo losses` shows the same table in a terminal; `--json` prints it for programs.

{textwrap.fill(LEGEND, 98)}.

| loss | of one pair | when to use it |
|---|---|---|
"""
TAIL = """
## Requirements and settings

Settings are listed with their default values for the loss; a setting that none of the chosen losses
reads is an error. *Margins*: a margin column of the data acts on the loss; the margin is subtracted
from β times the log-ratio margin (ODPO, arXiv:2402.10571), but in `rpo_bwd_kl` it is the score gap.
*Divergences*: `f_divergence_type` acts on the loss (f-DPO, arXiv:2309.16240); log-ratios are
replaced by f'(π / π_ref). In a sum all losses have the same `beta`; the default is that of the
first loss.

| loss | needs | settings | margins | divergences | source |
|---|---|---|:-:|:-:|---|
"""
END = """
Two more settings act on several losses. `ld_alpha` (LD-DPO, arXiv:2409.06411) acts on all losses of
pairs with a reference: tokens beyond the length of the shorter completion have this weight, under
policy and reference. `use_weighting` (WPO, arXiv:2406.11827) acts on all losses whose terms are of
one pair: pairs are weighted by their probability under the policy, at the cost of one more forward
pass per step.

## Ranked lists

`plackett_luce` and `lipo_lambda` take whole lists: rows with `completions` and their scores or
ranks, of which `ranked: all` makes every pair with different scores; no other value is accepted.
The held-out lists of such a run are whole as well; plain pairs are refused. The loss of a list is
divided among its pairs: with K completions it is the paper's divided by K (K − 1) / 2, so that its
gradient has the size of a pairwise loss's, and the loss before the first step is not log 2 unless
K is 2 (`plackett_luce`: log K! divided by the number of pairs). A step has whole lists, as many as
fit into `batch_size` pairs, and one at least. Micro-batches may cut a list: its gradient stays that
of the whole list (GradCache, at the cost of one more forward pass in such a step).

* Equal scores make no pair. In `plackett_luce` completions of equal score are not compared with
  each other; in `lipo_lambda` each of them takes a rank.
* `lipo_lambda` ranks completions by the policy's log-ratios. Log-ratios within 0.001 nats are
  ordered by score, since rounding would decide otherwise, as at the first step. Scores are used as
  they are (a rank n is the score −n); its gains are powers of 2, so scores must be within ±20.
* Pairs that are left out (equal texts, `truncation: drop`) are missing in their list. The run
  reports how many there are, and how many lists have prompts that were cut differently from pair to
  pair.
* `rpo_bwd_kl` is a loss of single pairs with a score gap (`margin_column`), of any format.
  `--ranked all` gives it all pairs of a list.

## Differences between papers, TRL and mlx-dpo

* `sigmoid` takes `label_smoothing` (it is then `cdpo`); TRL ignores it for this loss.
* `ipo` averages log-ratios over tokens, as its authors confirmed to TRL; the paper has sums.
* `bco_pair` has no running mean of rewards, as in TRL; the paper has one.
* The likelihood of chosen in `cpo` and `orpo` is a mean over tokens, as in TRL, of the completion
  only, as in the papers. TRL's ORPO includes the prompt.
* `sft` is divided by the mean length over a step, so that it is the mean over the step's tokens
  for every micro-batch size. TRL's is a mean over each forward pass, and fails with
  `use_weighting`.
* Exponentials of `forward_kl` and `alpha_divergence` continue as their tangent above e^30, so that
  a completion that has become very unlikely still gets a gradient. TRL cuts at e^80, where the
  gradient is zero, or overflows. `f_alpha_divergence_coef` is TRL's: 1 minus the paper's α.
* Rewards of reference-free losses are β times log-probabilities (`simpo`, `orpo`: averages over
  tokens), as TRL logs them.
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
