"""Iterative DPO on its own answers, and DPO on answers sampled once or written by others.

python -m scripts.studies.on_policy [--quick]
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from scripts.studies.parts.on_policy.runs import (
    BASE,
    BEST_WORST,
    BETA,
    MODULE,
    OFFLINE,
    SAMPLED,
    SFT,
    STEPS,
    collect_offline,
    open_loop,
    run_loop,
    run_offline,
    write_pairs,
)
from scripts.studies.parts.reward_kl.kl_levels import best_within
from scripts.studies.reporting.command import main
from scripts.studies.reporting.figures import add_axes, add_legend, draw_spread, line_style
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
from scripts.studies.toy.genres import ANNOTATOR, PLAIN, World, make_world, tilted_reviews
from scripts.studies.toy.reviews import SUBJECTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mlx_dpo.reporting.plots import Theme

ROUNDS, QUICK_ROUNDS = 4, 3
SMALL_BETAS = (0.3, 0.1)
LOOP, LOOP_PREVIOUS = "loop", "loop, previous"
PEOPLE, PRAISE, HARSH, PLAIN_WORDS = "people", "praise", "harsh", "plain"  # other writers
TILTS = {PEOPLE: 0.0, PRAISE: 0.7, HARSH: -0.7}


def run(scale: Scale) -> Iterator[Row]:
    """Train by every method, per seed; yield rows of policies."""
    for seed in scale.seeds:
        world = make_world(scale.folder, seed, BETA)
        yield from compare_best_and_worst(world, quick=scale.quick)
        if not scale.quick:
            yield from compare_sampled(world)


def compare_best_and_worst(world: World, *, quick: bool) -> Iterator[Row]:
    """Compare the loop with offline data of several sources: the best and worst of 4 answers."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    with open_loop(world, "loop", rounds=rounds) as trainer:
        yield from run_loop(world, trainer, LOOP)
        folder = world.folder / f"offline-{world.seed}"
        pairs = collect_offline(trainer, folder, rounds)
    # With the pairs of one round, this is the first round of the loop.
    for count in (rounds,) if quick else range(2, rounds + 1):
        yield from run_offline(world, pairs[:count])
    for beta in SMALL_BETAS[-1:] if quick else SMALL_BETAS:
        yield from run_offline(world, pairs, beta=beta)
    draw = np.random.default_rng(world.seed)
    plain = dict.fromkeys(SUBJECTS, PLAIN)
    yield from run_offline(world, write_pairs(plain, rounds, draw), data=PLAIN_WORDS)
    if quick:
        return
    for data, slope in TILTS.items():
        written = write_pairs(tilted_reviews(slope), rounds, draw)
        yield from run_offline(world, written, data=data)
    yield from run_offline(world, pairs, method=SFT)
    with open_loop(world, "previous", rounds=rounds, reference="previous") as trainer:
        yield from run_loop(world, trainer, LOOP_PREVIOUS)


def compare_sampled(world: World) -> Iterator[Row]:
    """Compare loop and offline with two answers per prompt and Bradley-Terry preferences."""
    ANNOTATOR.restart(world.seed)
    settings = {"rounds": ROUNDS, "answers": 2, "reward": f"{MODULE}:noisy_reward"}
    with open_loop(world, "sampled", **settings) as trainer:
        yield from run_loop(world, trainer, LOOP, SAMPLED)
        folder = world.folder / f"offline-sampled-{world.seed}"
        pairs = collect_offline(trainer, folder, ROUNDS)
    yield from run_offline(world, pairs, labels=SAMPLED, answers=2)


def trained(rows: Rows, **values: Any) -> Rows:
    """Return the rows of policies at the end of their training, in order of their answers."""
    found = of(rows, **{"end": 1, "labels": BEST_WORST} | values)
    return sorted(found, key=lambda row: row["answers"])


def final(rows: Rows, name: str, **values: Any) -> float:
    """Return a number of the policy that was trained on the most answers."""
    return float(trained(rows, **values)[-1][name])


def least_gain_of_loop(rows: Rows) -> float:
    """Return the smallest reward of the loop minus offline DPO at equal answers and steps."""
    offline = of(trained(rows, method=OFFLINE, data=BASE), beta=BETA)
    return min(
        float(of(trained(rows, method=LOOP), answers=row["answers"])[0]["reward"])
        - float(row["reward"])
        for row in offline
    )


def gain_at_equal_kl(rows: Rows) -> float:
    """Return the reward of round 3 minus the best of offline DPO with no larger KL divergence.

    All offline checkpoints on the base's answers count, of every β and number of steps, and what
    follows one of two of them, or of one and the base, at random.
    """
    loop = trained(rows, method=LOOP)[QUICK_ROUNDS - 1]
    offline = of(rows, method=OFFLINE, data=BASE, labels=BEST_WORST)
    base = {"method": BASE, "kl": 0.0, "reward": loop["base_reward"]}
    return float(loop["reward"]) - best_within([*offline, base], OFFLINE, float(loop["kl"]))


def gain_of_more_answers(rows: Rows) -> float:
    """Return how much the reward of offline DPO rises from 2 rounds of answers to 4."""
    rewards = column(of(trained(rows, method=OFFLINE, data=BASE), beta=BETA), "reward")
    return rewards[-1] - rewards[0]


def gain_over(data: str) -> Callable[[Rows], float]:
    """Return the function that subtracts the reward with other data from that with the base's."""

    def measure(rows: Rows) -> float:
        base = final(rows, "reward", method=OFFLINE, data=BASE, beta=BETA)
        return base - final(rows, "reward", method=OFFLINE, data=data)

    return measure


def gain_over_sft(rows: Rows) -> float:
    """Return the reward of offline DPO minus that of instruction tuning on the chosen answers."""
    dpo = final(rows, "reward", method=OFFLINE, data=BASE, beta=BETA)
    return dpo - final(rows, "reward", method=SFT)


def kl_ratio(rows: Rows) -> float:
    """Return the KL divergence of offline DPO with the smallest β over that with β = 1."""
    small, large = (
        final(rows, "kl", method=OFFLINE, data=BASE, beta=beta) for beta in (SMALL_BETAS[-1], BETA)
    )
    return small / large


def gain_of_sampled_loop(rows: Rows, name: str = "reward") -> float:
    """Return a number of the loop minus that of offline DPO, with Bradley-Terry labels."""
    loop, offline = (final(rows, name, method=method, labels=SAMPLED) for method in (LOOP, OFFLINE))
    return loop - offline


def sampled_share_gain(rows: Rows) -> float:
    """Return the loop's gain in regularized reward minus that of offline DPO, as a share of π*'s.

    With Bradley-Terry labels.
    """
    return gain_of_sampled_loop(rows, "gain_share")


def draw_rewards(figure: "Figure", rows: Rows, theme: "Theme") -> None:
    """Draw reward against the number of sampled answers, and against the KL divergence."""
    y_label = "expected reward"
    answers = add_axes(figure, 1, 2, 1, x_label="sampled answers", y_label=y_label)
    answers.set_xticks(sorted(distinct(trained(rows, method=LOOP), "answers")))
    kls = add_axes(figure, 1, 2, 2, x_label="KL(π ‖ base) (nats)", y_label=y_label)
    first = [row | {"method": OFFLINE} for row in trained(rows, method=LOOP, step=STEPS)]
    for index, (label, group) in enumerate(_series(rows)):
        more = first if label == OFFLINE else []
        draw_spread(answers, theme, index, [*more, *group], "answers", "reward", label=label)
        _draw_points(kls, theme, index, group, label)
    small = [row for row in trained(rows, method=OFFLINE, data=BASE) if row["beta"] != BETA]
    _draw_points(kls, theme, 3, small, "offline, β = 0.3 or 0.1")
    for seed in distinct(rows, "seed"):
        curve = sorted(of(rows, seed=seed), key=lambda row: row["kl"])
        style = {"color": theme.ink, "linewidth": 0.8}
        kls.plot(
            column(curve, "kl"), column(curve, "largest_reward"), **style, label="optimal policies"
        )
    add_legend(figure)


def _series(rows: Rows) -> Iterator[tuple[str, Rows]]:
    for method in (LOOP, LOOP_PREVIOUS):
        if group := trained(rows, method=method):
            yield method, group
    yield OFFLINE, of(trained(rows, method=OFFLINE, data=BASE), beta=BETA)


def _draw_points(axes: "Axes", theme: "Theme", index: int, rows: Rows, label: str) -> None:
    style = line_style(theme, index) | {"linestyle": "", "fillstyle": "none"}
    axes.plot(column(rows, "kl"), column(rows, "reward"), **style, label=label)


def draw_coverage(figure: "Figure", rows: Rows, theme: "Theme") -> None:
    """Draw reward against the coverage of the data, and against the KL divergence, by data."""
    y_label = "expected reward"
    coverage = add_axes(figure, 1, 2, 1, x_label="coverage of π* by the pairs", y_label=y_label)
    kls = add_axes(figure, 1, 2, 2, x_label="KL(π ‖ base) (nats)", y_label=y_label)
    offline = of(trained(rows, method=OFFLINE), beta=BETA)
    most = max(column(offline, "answers"))
    for index, data in enumerate(distinct(offline, "data")):
        group = of(offline, data=data, answers=most)
        style = line_style(theme, index) | {"linestyle": "", "fillstyle": "none"}
        label = str(data)
        coverage.plot(column(group, "coverage"), column(group, "reward"), **style, label=label)
        _draw_points(kls, theme, index, group, label)
    add_legend(figure)


GUO = "Guo et al. 2024, arXiv:2402.04792"
TAJWAR = "Tajwar et al. 2024, arXiv:2404.14367"
TANG = "Tang et al. 2024, arXiv:2405.08448"
XU = "Xu et al. 2024, arXiv:2404.10719"

STUDY = Study(
    name="on_policy",
    title="Iterative DPO on its own answers",
    result=(
        "The loop gains more reward from as many answers, after round 3 also at equal KL "
        "divergence. With sampled labels it gains no more of r − β KL."
    ),
    question=(
        "DPO is an offline method: answers are sampled once, often by another model. Several "
        "papers find that it gains more reward if the policy samples new answers during "
        "training, and less if the data rarely contain the answers that the optimal policy "
        "gives. How large is the difference at equal numbers of sampled answers, and at equal KL "
        "divergence from the base model?"
    ),
    setup=(
        "The base model is a Llama with 2 layers; it writes reviews of up to three words to 120 "
        "prompts (a genre and a subject). A lexicon gives each review its true reward, from −3 "
        "to 3. **Loop:** `mlx-dpo loop` samples 4 answers to each prompt in each of 4 rounds, "
        "and trains 16 steps of 58 pairs of the best and the worst answer (β = 1). The reference "
        "is the base model, or the policy of the round before (“previous”). **Offline DPO** has "
        "as many answers of the base model and as many steps. **Off-policy data** are answers of "
        "other writers with known distributions: “people”, whom the base model imitates; "
        "“praise” and “harsh”, whose reviews are e^(±0.7 r) times as frequent; “plain”, who use "
        "six reviews without the best words. **Bradley–Terry:** in this setting, 2 answers are "
        "sampled and the first is preferred with probability σ(r₁ − r₂), so that loop and "
        "offline DPO have the same target, the optimal policy for β. Reward and KL divergence "
        "are exact, on 4 prompts of a held-out genre; answers of more than three words count as "
        "one answer with the lowest reward. Learning rate (constant or cosine, 1e-4 to 3e-4), β "
        "and steps were chosen by results of seed 0, so that the loop does not collapse before "
        "round 3."
    ),
    run=run,
    claims=(
        Claim(
            name="more_per_answer",
            text="Reward of the loop minus that of offline DPO on as many answers of the base and "
            "as many steps, the smallest after rounds 2 to 4",
            source=f"{GUO}; {XU}, iterative DPO",
            measure=least_gain_of_loop,
            above=0.1,
        ),
        Claim(
            name="equal_kl",
            text="Reward of the loop after round 3 minus that of the best offline policy with at "
            "most its KL divergence: checkpoints of all β and steps, the base, and mixtures of two",
            source=TANG,
            measure=gain_at_equal_kl,
            above=0.1,
        ),
        Claim(
            name="more_answers",
            text="Rise of the reward of offline DPO from 960 answers of the base to 1,920; the "
            "base's answers, not their number, limit it",
            source=f"{GUO}; {TANG}",
            measure=gain_of_more_answers,
            below=0.25,
            full_only=True,
        ),
        Claim(
            name="plain_data",
            text="Reward of offline DPO with the base's answers minus that with plain writers'",
            source=f"{TAJWAR}; {XU}, out-of-distribution answers",
            measure=gain_over(PLAIN_WORDS),
            above=0.2,
        ),
        Claim(
            name="harsh_data",
            text="Reward of offline DPO with the base's answers minus that with harsh writers'",
            source=f"{TAJWAR}; {TANG}",
            measure=gain_over(HARSH),
            above=0.3,
            full_only=True,
        ),
        Claim(
            name="negative_gradient",
            text="Reward of offline DPO minus that of instruction tuning on the chosen answers "
            "(distilled best of 4), at equal answers and steps, but not at equal KL divergence",
            source=f"{TAJWAR}, negative gradient",
            measure=gain_over_sft,
            above=0.1,
            full_only=True,
        ),
        Claim(
            name="sampled_labels",
            text="With Bradley–Terry labels: reward of the loop minus that of offline DPO on as "
            "many answers, after as many steps",
            source=GUO,
            measure=gain_of_sampled_loop,
            above=0.05,
            full_only=True,
        ),
        Claim(
            name="sampled_objective",
            text="Not reproduced, with Bradley–Terry labels: gain in reward − β KL of the loop "
            "minus that of offline DPO, as a share of the gain of π\\*; the loop is not better",
            source=GUO,
            measure=sampled_share_gain,
            below=0.05,
            full_only=True,
        ),
        Claim(
            name="smaller_beta",
            text="KL divergence of offline DPO with β = 0.1, as a multiple of that with β = 1",
            source="Rafailov et al. 2023, Eq. 4",
            measure=kl_ratio,
            above=1.5,
        ),
    ),
    pictures=(
        Picture(
            name="rewards",
            caption=(
                "Exact expected reward (no unit, at most 3). Left: against the number of sampled "
                "answers, mean of 3 seeds, with a band from minimum to maximum; with the answers "
                "of one round, both are the same. Right: against the exact KL divergence, one "
                "point per seed and number of answers; the curves are the optimal policies of the "
                "bases."
            ),
            draw=draw_rewards,
        ),
        Picture(
            name="coverage",
            caption=(
                "Offline DPO on 1,920 answers of each source. Exact expected reward against the "
                "probability of the answers in the pairs under the optimal policy for β = 1, and "
                "against the exact KL divergence; one point per seed, n = 3."
            ),
            draw=draw_coverage,
        ),
    ),
    deviations=(
        "The papers let a reward model or a language model judge, and compare win rates; here the "
        "known reward judges, so that no error of a judge is in the comparison, and there is no "
        "over-optimization of a proxy reward as in Tang et al.",
        "The best and the worst answer are compared without noise, so that DPO has no finite "
        "optimum and the KL divergence of the loop grows by the round. In round 4 a further "
        "round can cost reward (2.4 → 1.7 with seed 0): the answers are nearly equal, and the "
        "few remaining pairs are trained on more often. `equal_kl` is about round 3: after round 4 "
        "of seed 0 an offline policy has more reward at less KL divergence (1.89 at 2.7 nats, the "
        "loop 1.72 at 3.7).",
        "With Bradley–Terry labels, offline DPO and the loop have the same target, the optimal "
        "policy for β = 1. The loop moves farther and has the higher reward, but a part of it is "
        "the larger KL divergence: with seeds 0, 1 and 2 it reaches 35, 44 and 49 % of the "
        "largest gain in reward − β KL, and offline DPO 50, 58 and 55 %. With 120 "
        "pairs per round, the noise of the labels counts.",
        "The loop samples again after every 16 steps; Guo et al. sample at every step.",
        "Offline DPO reaches a higher reward than instruction tuning on the chosen answers, at two "
        "to three times the KL divergence. At the divergence of instruction tuning, a mixture of "
        "DPO's policies and the base has the lower reward (0.31, 0.45 and 0.46 against 0.59, 0.69 "
        "and 0.76), and instruction tuning has more of the gain in reward − β KL. DPO with a "
        "larger β was not tried, so that `negative_gradient` does not show which loss uses the "
        "divergence better.",
        "Learning rate, β and steps were chosen for the loop; offline DPO has the same, without a "
        "search of its own but for β. In `more_per_answer` the loop is also farther from the base; "
        "`equal_kl` compares without this.",
        "Off-policy data are not always worse: with the answers of writers who praise, the reward "
        "is higher than with the base's own on two of three seeds, at a larger KL divergence. "
        "Coverage alone does not decide either: the harsh writers' pairs have answers with three "
        "quarters of the probability of the optimal policy, but seldom, and give the lowest "
        "reward. Tang et al. also find that coverage does not explain the difference.",
        "With the policy of the round before as reference (“loop, previous”, the package's "
        "default), the loop moves farther; no claim is made about it.",
    ),
    sources=(
        "Rafailov et al. 2023, [arXiv:2305.18290](https://arxiv.org/abs/2305.18290)",
        "Guo et al. 2024, online AI feedback, [arXiv:2402.04792](https://arxiv.org/abs/2402.04792)",
        "Tajwar et al. 2024, [arXiv:2404.14367](https://arxiv.org/abs/2404.14367)",
        "Tang et al. 2024, [arXiv:2405.08448](https://arxiv.org/abs/2405.08448)",
        "Xu et al. 2024, [arXiv:2404.10719](https://arxiv.org/abs/2404.10719)",
    ),
)

if __name__ == "__main__":
    main(STUDY)
