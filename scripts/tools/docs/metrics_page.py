"""Write docs/metrics.md from `METRICS` and the other columns of metrics.jsonl.

python scripts/tools/docs/metrics_page.py
"""

from pathlib import Path

from mlx_dpo.losses.metrics import METRICS, Metric
from mlx_dpo.training.monitor.samples import CLIPPED, KL, LENGTH, REPETITION

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"
PAIRS = {  # metrics of preference pairs, by public name
    "loss": "Training loss. Before the first update the DPO loss is log 2 = 0.6931.",
    "mean_token_accuracy": "Instruction tuning only: share of the scored tokens that the policy "
    "ranks first. Such runs have no rewards.",
    "rewards/accuracies": "Share of pairs whose margin is above 0; chance is 0.5. "
    "Rounding noise while the margin is near 0.",
    "rewards/margins": "Reward of chosen minus reward of rejected, in nats.",
    "rewards/margins_best_worst": "Ranked lists only: reward of a list's best completion minus "
    "that of its worst, in nats. Accuracy and margin are means over all pairs of the lists.",
    "rewards/chosen": "β × (log π − log π_ref) of the chosen completion, in nats.",
    "rewards/rejected": "The same for the rejected completion.",
    "logps/chosen": "Log-probability of the whole chosen completion (in instruction tuning, of all "
    "scored tokens of a row) under the policy, in nats.",
    "logps/rejected": "The same for the rejected completion.",
    "lengths/chosen": "Scored tokens of the chosen completion, its stop token included.",
    "lengths/rejected": "The same for the rejected completion.",
    "kl": "KTO only: estimate of the KL divergence from the reference, in nats.",
    "length_correlation": "Pearson correlation of margin and length difference; near 1 or −1 the "
    "policy learns length.",
    "rewards/margins_stderr": "Standard error of the mean margin.",
}
STEPS = {  # other columns of a step's row
    "step": "Optimizer steps so far.",
    "epoch": "Passes over the training pairs so far.",
    "grad_norm": "Global norm of the gradient before clipping.",
    "learning_rate": "Learning rate of this step.",
    "num_tokens": "Tokens so far, without padding.",
    "padding_share": "Share of padding among the tokens of this step's forward passes.",
    "tokens_per_second": "Tokens of this step per second.",
    "peak_memory_gb": "Peak of MLX's memory so far, in GB (10⁹ bytes).",
    "crc32": "Checksum of the line.",
}
SAMPLES = {  # of answers that are sampled at an evaluation
    LENGTH: "Mean number of tokens of an answer.",
    CLIPPED: "Share of answers that were cut at the length limit (64 tokens).",
    REPETITION: "Share of 4-grams that repeat an earlier one of the answer "
    "(Welleck et al. 2019, arXiv:1908.04319).",
    KL: "Estimate of the KL divergence from the base model, in nats per token: the mean "
    "log-ratio of the sampled tokens. None after full fine-tuning.",
}
HEAD = """# Metrics

<!-- made by scripts/tools/docs/metrics_page.py -->

`metrics.jsonl` in a run folder has one JSON object per optimizer step and one per evaluation.
Names are TRL's, so that curves of both trainers can be overlaid; over the first 20 steps on the
shipped model, losses and rewards agree with TRL 1.16 to 1e-6.
[Watching a run](watching.md) explains what to look for.

In a healthy run margins rise, held-out accuracy goes well above 0.5, and `rewards/chosen` does not
fall far below 0.

## Preference metrics

Means over the pairs of a step. With the prefix `eval_` they are means over all held-out pairs.

| name | label | better | meaning |
|---|---|---|---|
"""
STEP_HEAD = """
## Other columns of a step

| name | meaning |
|---|---|
"""
SAMPLE_HEAD = """
## Sampled answers

At each evaluation the policy answers a few held-out prompts (`--samples N`). The names have the
prefix `eval_`; `eval_completions/base_…` are the same metrics of the base model's answers, which
are sampled once, at the first evaluation.

| name | meaning |
|---|---|
"""


def page() -> str:
    """Return the page as Markdown."""
    pairs = [_pair_row(metric) for metric in METRICS.values()]
    samples = {f"eval_{name}": meaning for name, meaning in SAMPLES.items()}
    tables = (HEAD, "\n".join(pairs) + "\n", STEP_HEAD, _table(STEPS), SAMPLE_HEAD, _table(samples))
    return "".join(tables)


def _pair_row(metric: Metric) -> str:
    return f"| `{metric.name}` | {metric.label} | {metric.better or ''} | {PAIRS[metric.name]} |"


def _table(rows: dict[str, str]) -> str:
    return "".join(f"| `{name}` | {meaning} |\n" for name, meaning in rows.items())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
