"""DPO reaches the policy that is optimal for the known reward.

python -m scripts.studies.optimum [--quick]
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlx_dpo import load_policy
from scripts.studies.reporting.command import main
from scripts.studies.reporting.figures import add_axes, add_legend, line_style
from scripts.studies.reporting.study import (
    Claim,
    Picture,
    Row,
    Rows,
    Scale,
    Study,
    column,
    distinct,
    of,
)
from scripts.studies.toy.base import make_base
from scripts.studies.toy.bradley_terry import preferences, weighted_pairs
from scripts.studies.toy.exact import (
    all_answer_logps,
    explained_variance,
    normalize,
    optimal_policy,
    total_variation,
)
from scripts.studies.toy.train import train
from scripts.studies.toy.words import Words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mlx_dpo.reporting.plots import Theme

VOCABULARY = Words(("red", "blue", "green", "sky", "sea", "leaf"))
PROMPTS = ("sky", "sea", "leaf")
# Answers that begin other answers: only the log-prob of the end distinguishes them.
ANSWERS = ("red", "red blue", "red blue green", "blue", "green red", "green green")
BETAS, QUICK_BETAS = (0.05, 0.1, 0.5, 1.0), (0.05, 1.0)
STEPS, RATE = 250, 3e-3
CLOSE = 0.002  # total variation


def make_model(folder: Path, seed: int) -> Path:
    """Write a base model that gives the answers with uneven probabilities."""
    shares = np.random.default_rng(seed).dirichlet(np.full(len(ANSWERS), 3.0), len(PROMPTS))
    answers = {
        prompt: dict(zip(ANSWERS, map(float, row), strict=True))
        for prompt, row in zip(PROMPTS, shares, strict=True)
    }
    return make_base(folder / f"base-{seed}", VOCABULARY, answers, seed=seed)


def draw_rewards(seed: int) -> np.ndarray:
    """Return the known reward of each answer to each prompt, from -1 to 1. (prompts, answers)"""
    return np.random.default_rng(100 + seed).uniform(-1, 1, (len(PROMPTS), len(ANSWERS)))


def run(scale: Scale) -> Iterator[Row]:
    """Train a policy per seed and β; yield a row per prompt and answer."""
    for seed in scale.seeds:
        model = make_model(scale.folder, seed)
        base = load_policy(None, model=str(model)).model
        reference = all_answer_logps(base, VOCABULARY, PROMPTS, ANSWERS)
        rewards = draw_rewards(seed)
        pairs = list(weighted_pairs(PROMPTS, ANSWERS, preferences(rewards)))
        for beta in QUICK_BETAS if scale.quick else BETAS:
            policy = train(
                model,
                pairs,
                scale.folder / f"run-{seed}-{beta}",
                beta=beta,
                weight_column="share",
                batch_size=len(pairs),
                micro_batch_size=len(pairs),
                max_steps=STEPS,
                learning_rate=RATE,
                lr_scheduler_type="cosine",
                seed=seed,
            )
            logps = all_answer_logps(policy, VOCABULARY, PROMPTS, ANSWERS)
            for (prompt, answer), reward in np.ndenumerate(rewards):
                yield {
                    "seed": seed,
                    "beta": beta,
                    "prompt": PROMPTS[prompt],
                    "answer": ANSWERS[answer],
                    "reward": float(reward),
                    "reference_logp": float(reference[prompt, answer]),
                    "logp": float(logps[prompt, answer]),
                }


def by_prompt(rows: Rows) -> Iterator[tuple[float, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield β, the rewards, and the reference's and policy's log-probs of each prompt and β."""
    for start in range(0, len(rows), len(ANSWERS)):
        group = rows[start : start + len(ANSWERS)]
        values = (np.array(column(group, n)) for n in ("reward", "reference_logp", "logp"))
        yield float(group[0]["beta"]), *values


def largest_distance(rows: Rows) -> float:
    """Return the largest total variation distance between policy and π* on the answers."""
    return max(
        float(total_variation(normalize(logps), optimal_policy(reference, rewards, beta)))
        for beta, rewards, reference, logps in by_prompt(rows)
    )


def smallest_r2(rows: Rows) -> float:
    """Return the smallest R² of the implicit reward β log(π / π_ref) as the known reward."""
    return min(
        explained_variance(beta * (logps - reference), rewards)
        for beta, rewards, reference, logps in by_prompt(rows)
    )


def smallest_mass(rows: Rows) -> float:
    """Return the smallest total probability of the compared answers."""
    return min(float(np.exp(logps).sum()) for *_, logps in by_prompt(rows))


def draw_optimum(figure: "Figure", rows: Rows, theme: "Theme") -> None:
    """Draw implicit against known rewards; distance from π* and total probability by β."""
    rewards = add_axes(figure, 1, 3, 1, x_label="known reward", y_label="implicit reward")
    rewards.plot([-1, 1], [-1, 1], color=theme.ink, linewidth=0.8, label="equality")
    scales = {"x_label": "β", "xscale": "log", "yscale": "log"}
    distance = add_axes(figure, 1, 3, 2, y_label="total variation from π*", **scales)
    distance.axhline(CLOSE, color=theme.ink, linestyle=(0, (4, 2)), linewidth=0.8, label="bound")
    mass = add_axes(figure, 1, 3, 3, y_label="probability of the six answers", **scales)
    betas = [float(beta) for beta in distinct(rows, "beta")]
    for axes in (distance, mass):
        axes.set_xlim(0.7 * min(betas), 1.4 * max(betas))
        axes.set_xticks(betas, labels=[f"{beta:g}" for beta in betas])
        axes.set_xticks([], minor=True)
    for index, beta in enumerate(betas):
        style = line_style(theme, index) | {"linestyle": "", "fillstyle": "none"}
        style["label"] = f"β = {beta:g}"
        for _, known, reference, logps in by_prompt(of(rows, beta=beta)):
            implicit = beta * (logps - reference)
            gap = total_variation(normalize(logps), optimal_policy(reference, known, beta))
            rewards.plot(known, implicit - implicit.mean() + known.mean(), **style)
            distance.plot(beta, gap, **style)
            mass.plot(beta, np.exp(logps).sum(), **style)
    add_legend(figure, columns=6)


STUDY = Study(
    name="optimum",
    title="DPO reaches the optimal policy",
    result=(
        "Yes, for every β: the policy is π\\* on the compared answers. Their total "
        "probability is left free."
    ),
    question=(
        "The policy that maximizes reward minus β times the KL divergence from the reference is "
        "π\\*(y|x) ∝ π_ref(y|x) exp(r(x, y)/β). DPO's loss has its minimum at this policy if "
        "labels follow the Bradley–Terry model. Does training reach it?"
    ),
    setup=(
        "A Llama with 2 layers and hidden size 48; each token is a word. The base model gives "
        "six answers of one to three words to each of three prompts. Each answer has a known "
        "reward between −1 and 1. Every ordered pair of answers is a row, weighted by its "
        "Bradley–Terry probability, so that the loss is the expected loss. Full fine-tuning, 250 "
        "steps; each step has all 90 rows. Log-probs of all answers are computed from logits in "
        "float64."
    ),
    run=run,
    claims=(
        Claim(
            name="total_variation",
            text="Total variation between the trained policy and π\\*, the largest of all prompts "
            "and β",
            source="Rafailov et al. 2023, Eq. 4",
            measure=largest_distance,
            below=CLOSE,
        ),
        Claim(
            name="implicit_reward",
            text="R² of β log(π/π_ref) as the known reward up to a constant, with slope 1, the "
            "smallest of all prompts and β",
            source="Rafailov et al. 2023, Eq. 5",
            measure=smallest_r2,
            above=0.9999,
        ),
        Claim(
            name="free_total",
            text="Total probability of the six compared answers, the smallest of all prompts, β "
            "and seeds; it is above 0.99 in the base, and the loss leaves it free",
            source="follows from Rafailov et al. 2023, Eq. 7: the loss has differences of "
            "log-ratios only",
            measure=smallest_mass,
            below=0.5,
            pooled=True,
            full_only=True,
        ),
    ),
    pictures=(
        Picture(
            name="rewards",
            caption=(
                "Left: implicit reward β log(π/π_ref) against the known reward of each answer, "
                "shifted by a constant per prompt to equal means. Middle: total variation between "
                "the trained policy and π\\*, with the bound of the claim. Right: total "
                "probability of the six answers under the trained policy. "
                "Numbers have no unit and are exact. Each point is an answer (left) or a prompt "
                "(middle, right) of one seed; n = 3 prompts with 6 answers per β and seed."
            ),
            draw=draw_optimum,
            size=(9.0, 3.2),
        ),
    ),
    deviations=(
        "The loss depends only on differences of log-ratios between the six answers, so it does "
        "not determine their total probability. We normalize π over the six answers before we "
        "compare it with π\\*. Some policies give nearly all probability to answers that are in "
        "no pair.",
        "The bounds were tightened after the results of seeds 0 to 2 were known.",
    ),
    sources=("Rafailov et al. 2023, [arXiv:2305.18290](https://arxiv.org/abs/2305.18290)",),
)

if __name__ == "__main__":
    main(STUDY)
