"""DPO makes answers longer than any in the data if labels have a slight length bias.

python -m scripts.studies.length [--quick]
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlx_dpo import load_policy
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
from scripts.studies.toy.exact import normalize, total_variation
from scripts.studies.toy.fillers import (
    BASE_LONGEST,
    CONTENT,
    CONTINUES,
    CUT,
    PAIR_LONGEST,
    PAIRS,
    PROMPTS,
    measure,
    pair_lengths,
    sample_pairs,
    write_base,
)
from scripts.studies.toy.train import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mlx_dpo.reporting.plots import Theme

BIAS = 0.1  # log-odds of a label per word by which an answer is longer
SETTINGS: Row = {
    "weight_column": "share",
    "batch_size": 64,
    "micro_batch_size": 64,
    "max_steps": 128,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
}
LOSSES: dict[str, Row] = {
    "dpo": {"loss_type": "sigmoid"},
    "ld_dpo": {"loss_type": "sigmoid", "ld_alpha": 0.5},
    "norm": {"loss_type": "sigmoid_norm"},
    "simpo": {"loss_type": "simpo"},
}
SUM_BETAS, TOKEN_BETAS = (0.1, 0.2, 0.5, 1.0), (0.2, 0.5, 1.0, 2.0, 5.0)
BETAS = {"dpo": SUM_BETAS, "ld_dpo": SUM_BETAS, "norm": TOKEN_BETAS, "simpo": TOKEN_BETAS}
QUICK_BETAS: dict[str, Sequence[float]] = {"dpo": (0.2, 1.0), "ld_dpo": (0.2,)}
WORD_TICKS = (2, 3, 4, 6, 8, 12, 16, 24)
LOW, BETWEEN = 0.2, (0.2, 0.5)  # β of DPO: of most claims, and of the same true reward
# β with about that reward.
SAME_REWARD_BETAS = {"dpo": 0.2, "ld_dpo": 0.2, "norm": 0.5, "simpo": 0.5}


def run(scale: Scale) -> Iterator[Row]:
    """Yield a row per seed for the base, and per length bias, loss and β."""
    for seed in scale.seeds:
        draw = np.random.default_rng(seed)
        content = draw.dirichlet(np.full(len(CONTENT), 3.0), len(PROMPTS))
        rewards = draw.uniform(-1, 1, content.shape)
        base = write_base(scale.folder / f"base-{seed}", content, seed)
        measured = measure(load_policy(None, model=str(base)).model, rewards)
        for bias in (BIAS, 0.0):
            pairs = list(sample_pairs(content, rewards, bias, seed))
            facts = {"seed": seed, "bias": bias, **pair_lengths(pairs)}
            yield facts | {"loss": "base", "beta": 0.0, **measured}
            for loss, beta in runs_of(bias, quick=scale.quick):
                output = scale.folder / f"run-{seed}-{bias}-{loss}-{beta}"
                values = SETTINGS | LOSSES[loss]
                policy = train(base, pairs, output, beta=beta, seed=seed, **values)
                yield facts | {"loss": loss, "beta": beta, **measure(policy, rewards)}


def runs_of(bias: float, *, quick: bool) -> Iterator[tuple[str, float]]:
    """Yield the losses and β that are trained on pairs of a length bias."""
    control = slice(0, 1) if quick else slice(1, 3)
    for loss, betas in (QUICK_BETAS if quick else BETAS).items():
        yield from ((loss, beta) for beta in (betas if bias else betas[control]))


def words_at(rows: Rows, loss: str, reward: float) -> float:
    """Return the mean words of a loss where its true reward is `reward`, NaN outside its range.

    From the highest β down, as long as the reward grows; between two β the logarithm of the words
    is interpolated linearly in the reward.
    """
    rewards, words = [], []
    for row in sorted(of(rows, loss=loss), key=lambda row: -float(row["beta"])):
        if rewards and float(row["reward"]) <= rewards[-1]:
            break
        rewards.append(float(row["reward"]))
        words.append(np.log(float(row["words"])))
    return float(np.exp(np.interp(reward, rewards, words, left=np.nan, right=np.nan)))


def words_over_dpo(rows: Rows, loss: str) -> float:
    """Return the mean words of a loss over those of DPO, at the same true reward.

    It is the mean of DPO's rewards at the β of `BETWEEN`.
    """
    biased = of(rows, bias=BIAS)
    reward = np.mean([float(one(biased, loss="dpo", beta=beta)["reward"]) for beta in BETWEEN])
    return words_at(biased, loss, float(reward)) / words_at(biased, "dpo", float(reward))


def one(rows: Rows, **values: float | str) -> Row:
    """Return the only row that has these values."""
    (row,) = of(rows, **values)
    return row


def ratio(rows: Rows, first: str, second: str) -> float:
    """Return a column over another one, of DPO with the lower β on biased labels."""
    row = one(rows, bias=BIAS, loss="dpo", beta=LOW)
    return float(row[first]) / float(row[second])


def ld_over_dpo(rows: Rows, key: str) -> float:
    """Return a column of LD-DPO over that of DPO, at the lower β on biased labels."""
    ld, dpo = (one(rows, bias=BIAS, beta=LOW, loss=loss) for loss in ("ld_dpo", "dpo"))
    return float(ld[key]) / float(dpo[key])


def words_by_beta(rows: Rows) -> float:
    """Return the mean words of DPO with the lower β over those with β = 1."""
    low, high = (one(rows, bias=BIAS, loss="dpo", beta=beta) for beta in (LOW, 1))
    return float(low["words"]) / float(high["words"])


def control_change(rows: Rows, losses: Sequence[str]) -> float:
    """Return the largest change of mean words from the base on labels without bias."""
    control = of(rows, bias=0)
    base = float(one(control, loss="base")["words"])
    changes = [abs(float(row["words"]) - base) for row in control if row["loss"] in losses]
    return max(changes)


def distance_from_theory(rows: Rows) -> float:
    """Return DPO's distance from π* over that of the base, the larger one of two β.

    The distance is the total variation of the lengths up to `PAIR_LONGEST` words. The true reward
    does not depend on the length, so that π* has lengths ∝ π_ref(n) exp(bias n / β).
    """
    biased, words = of(rows, bias=BIAS), np.arange(1, PAIR_LONGEST + 1)

    def lengths(loss: str, beta: float) -> np.ndarray:
        row = one(biased, loss=loss, beta=beta)
        return normalize(np.log([float(row[f"words_{n}"]) for n in words]))

    base, shares = lengths("base", 0), []
    for beta in (LOW, 1):
        best = normalize(base + BIAS * words / beta)
        distances = (total_variation(found, best) for found in (lengths("dpo", beta), base))
        shares.append(float(np.divide(*distances)))
    return max(shares)


def optimal_words(rows: Rows) -> float:
    """Return the mean words of π* for the biased labels over those of chosen answers.

    Lengths are ∝ π_ref(n) exp(bias n / β), up to `CUT` words, with the lower β.
    """
    words, base = np.arange(1, CUT + 1), one(rows, bias=BIAS, loss="base")
    shares = np.array([float(base[f"words_{n}"]) for n in words])
    best = np.average(words, weights=shares * np.exp(BIAS * words / LOW))
    return float(best) / float(base["chosen_words"])


NAMES = {
    "dpo": "DPO",
    "ld_dpo": "LD-DPO, α = 0.5",
    "norm": "length-normalized DPO",
    "simpo": "SimPO",
}


def draw_words(figure: "Figure", rows: Rows, theme: "Theme") -> None:
    """Draw mean words by β, and by true reward."""
    label = "mean words of an answer"
    by_beta = add_axes(figure, 1, 2, 1, x_label="β", y_label=label, xscale="log", yscale="log")
    by_reward = add_axes(figure, 1, 2, 2, x_label="true reward", y_label=label, yscale="log")
    biased = of(rows, bias=BIAS)
    for index, (loss, name) in enumerate(NAMES.items()):
        chosen = of(biased, loss=loss)
        draw_spread(by_beta, theme, index, chosen, "beta", "words", label=name)
        means = [
            np.mean([column(of(chosen, beta=beta), key) for key in ("reward", "words")], axis=1)
            for beta in sorted(distinct(chosen, "beta"))
        ]
        by_reward.plot(*np.transpose(means), **line_style(theme, index))
        for seed in distinct(rows, "seed"):
            points = of(chosen, seed=seed)
            style = line_style(theme, index) | {"linestyle": "", "alpha": 0.35}
            by_reward.plot(column(points, "reward"), column(points, "words"), **style)
    lines = (
        (np.mean(column(biased, "chosen_words")), (0, (4, 2)), "mean chosen answer"),
        (PAIR_LONGEST, (0, (1, 1)), "longest answer of the pairs"),
    )
    for axes in (by_beta, by_reward):
        for height, dashes, label in lines:
            axes.axhline(height, color=theme.ink, linewidth=0.9, linestyle=dashes, label=label)
        axes.set_yticks(WORD_TICKS, labels=[str(words) for words in WORD_TICKS])
        axes.set_yticks([], minor=True)
    betas = sorted({*SUM_BETAS, *TOKEN_BETAS})
    by_beta.set_xticks(betas, labels=[f"{beta:g}" for beta in betas])
    by_beta.set_xticks([], minor=True)
    add_legend(figure, columns=3)


def draw_lengths(figure: "Figure", rows: Rows, theme: "Theme") -> None:
    """Draw the distribution of lengths of the base and of policies of about equal reward."""
    axes = add_axes(
        figure, 1, 1, 1, x_label=f"words of an answer, cut after {CUT}", y_label="probability",
        yscale="log", ylim=(1e-3, 1),
    )  # fmt: skip
    biased = of(rows, bias=BIAS)
    words = np.arange(1, CUT + 1)
    series = (
        ("base", 0, "base"),
        *((loss, SAME_REWARD_BETAS[loss], name) for loss, name in NAMES.items()),
    )
    for index, (loss, beta, name) in enumerate(series):
        found = of(biased, loss=loss, beta=beta)
        shares = np.array([[float(row[f"words_{n}"]) for n in words] for row in found])
        label = name if loss == "base" else f"{name}, β = {beta:g}"
        style = line_style(theme, index - 1 if index else 6) | {"markersize": 4}
        axes.plot(words, shares.mean(axis=0), label=label, **style)
    axes.axvline(
        PAIR_LONGEST + 0.5, color=theme.ink, linewidth=0.9, linestyle=(0, (1, 1)),
        label="end of the pairs' range",
    )  # fmt: skip
    add_legend(figure, columns=3)


PARK = "Park et al. 2024"
STUDY = Study(
    name="length",
    title="DPO exploits length",
    result=(
        "DPO's answers get longer than all of its data; a part of it is what the labels ask for. "
        "At the reward that DPO has at β of about 0.2, LD-DPO, DPO per token and SimPO lengthen "
        "answers less."
    ),
    question=(
        "In preference data, chosen answers are slightly longer than rejected ones: 79.6 against "
        "75.7 tokens in HH. Park et al. (2024) find that DPO then gives answers that are far "
        "longer than the chosen ones. Length-desensitized DPO (LD-DPO), length-normalized DPO "
        "(Tülu 3) and SimPO are meant to reduce this. Does it happen if the reward does not "
        "depend on length at all? How long are the answers of each loss at the same true reward?"
    ),
    setup=(
        "The base model answers three prompts with one of four content words, followed by filler "
        f"words. It adds each filler word with probability {CONTINUES:g}, up to {BASE_LONGEST} "
        "words in all. The true reward, between −1 and 1, depends on the content word only. "
        f"{PAIRS} pairs of answers of at most {PAIR_LONGEST} words have Bradley–Terry labels with "
        f"a length bias: log-odds {BIAS:g} for each word by which an answer is longer. Both "
        "orders are rows, weighted by the probability of the label, so that labels are expected "
        "ones. The control has no bias. Full fine-tuning, 128 steps of 64 rows, learning rate "
        "3e-4 with cosine decay. Lengths and rewards are exact: all answers are enumerated, and "
        f"cut after {CUT} words. Answers that begin with something of probability below 1e-6 are "
        "left out (2e-4 in all at most, counted as no answer). Losses are compared at the true "
        "reward that DPO has at a β; between two β of a loss, the number of words is "
        "interpolated."
    ),
    run=run,
    claims=(
        Claim(
            name="data",
            text="Mean words of chosen answers over those of rejected ones; in HH it is 1.05",
            source=f"{PARK}, Table 1",
            measure=lambda rows: ratio(rows, "chosen_words", "rejected_words"),
            above=1.03,
            below=1.15,
        ),
        Claim(
            name="exploitation",
            text=f"Mean words of DPO's answers at β = {LOW:g} over those of chosen answers",
            source=f"{PARK}, lengths of DPO's answers",
            measure=lambda rows: ratio(rows, "words", "chosen_words"),
            above=2.0,
        ),
        Claim(
            name="optimum",
            text=f"The same for π\\* for the biased labels, ∝ π_ref(n) exp({BIAS:g} n/β), up to "
            f"{CUT} words: a part of DPO's length is what these labels ask for",
            source="Rafailov et al. 2023, Eq. 4",
            measure=optimal_words,
            above=1.5,
        ),
        Claim(
            name="beyond_data",
            text=f"Share of DPO's answers at β = {LOW:g} that are longer than every answer of the "
            "pairs; it is 0.04 for the base",
            source=f"{PARK} (lengths out of the distribution of the data)",
            measure=lambda rows: ratio(rows, "beyond", "bias") * BIAS,
            above=0.25,
        ),
        Claim(
            name="lower_beta",
            text=f"Mean words of DPO's answers at β = {LOW:g} over those at β = 1",
            source=f"{PARK}, lengths by β",
            measure=words_by_beta,
            above=1.5,
        ),
        Claim(
            name="theory",
            text=f"Total variation of DPO's lengths, among answers of up to {PAIR_LONGEST} words, "
            f"from those of π\\* for the biased labels, ∝ π_ref(n) exp({BIAS:g} n/β), over that of "
            f"the base's lengths: the larger one of β = {LOW:g} and 1",
            source="Rafailov et al. 2023, Eq. 4",
            measure=distance_from_theory,
            below=0.5,
        ),
        Claim(
            name="control",
            text="Without length bias: largest change of mean words from the base, of DPO and "
            "LD-DPO, all β",
            source="control",
            measure=lambda rows: control_change(rows, ("dpo", "ld_dpo")),
            below=1,
            unit="words",
        ),
        Claim(
            name="ld",
            text=f"Mean words of LD-DPO (α = 0.5) over those of DPO, at β = {LOW:g}",
            source="Liu et al. 2024 (10 to 40 % shorter answers than DPO)",
            measure=lambda rows: ld_over_dpo(rows, "words"),
            below=0.9,
        ),
        Claim(
            name="ld_reward",
            text="True reward of LD-DPO over that of DPO, at the same β",
            source="Liu et al. 2024",
            measure=lambda rows: ld_over_dpo(rows, "reward"),
            above=0.9,
            below=1.1,
        ),
        Claim(
            name="norm",
            text="Mean words of length-normalized DPO over those of DPO, at a true reward halfway "
            "between those of DPO at β = 0.2 and 0.5",
            source="Lambert et al. 2024 (Tülu 3)",
            measure=lambda rows: words_over_dpo(rows, "norm"),
            below=0.95,
            full_only=True,
        ),
        Claim(
            name="simpo",
            text="Mean words of SimPO over those of DPO, at the same true reward",
            source="Meng et al. 2024",
            measure=lambda rows: words_over_dpo(rows, "simpo"),
            below=0.8,
            full_only=True,
        ),
    ),
    pictures=(
        Picture(
            name="words",
            caption="Mean words of the answers of the trained policy by β, and by true reward (a "
            "lower β is further right). Values are exact, with answers cut after "
            f"{CUT} words. Left: lines are means of three seeds, bands run from the least to the "
            "largest. Right: pale marks are seeds, lines join means. β of losses that divide by "
            "length has another scale than that of DPO and LD-DPO.",
            draw=draw_words,
            size=(8.5, 3.8),
        ),
        Picture(
            name="lengths",
            caption="Probability of each number of words of an answer, at β of about equal true "
            "reward; mean of three seeds, exact. The last point has all answers that are cut "
            f"after {CUT} words.",
            draw=draw_lengths,
            size=(8.0, 3.6),
        ),
    ),
    deviations=(
        "With a bias of 0.1 for each word, π\\* for these labels is long, too. At β = 0.2 DPO's "
        "answers are about as long as those of π\\* on seed 0, and about twice as long on seeds 1 "
        "and 2. What is beyond π\\* is not asked for by the labels.",
        "Park et al. measure HH and TL;DR with Pythia 2.8B, where true quality and length may "
        "depend on each other. Here they do not, by construction.",
        "DPO's words do not grow with every step to a lower β. At β = 0.1 they are 0.93 to 1.20 "
        f"times those at 0.2: many answers reach the cut of {CUT} words or stop where the model "
        "has never been trained, and 128 steps do not converge. On seed 2 they are the same at "
        "β = 1 and 0.5. The first bound of the claim, growth at each step from 1 to 0.2, failed "
        "there; the claim now compares β = 0.2 with 1.",
        "At β = 0.1 LD-DPO hardly helps: 15.4, 12.6 and 16.2 words (seeds 0, 1, 2), where DPO has "
        "17.1, 12.7 and 13.9.",
        "Where DPO is hardly longer than the base (β of 0.5 and above), length-normalized DPO is "
        "about as long as DPO at the same true reward. Its loss leaves the total length free: a "
        "log-ratio that grows with every word by the same amount does not change it.",
        "Without length bias, SimPO and length-normalized DPO make answers shorter than the "
        "base's, where DPO makes them longer by at most 0.7 words. Part of their shorter answers "
        "on biased labels is this preference for short ones, and not insensitivity to length.",
        "R-DPO, their remedy, is not compared: the package has no loss with a length penalty.",
    ),
    sources=(
        "Rafailov et al. 2023, [arXiv:2305.18290](https://arxiv.org/abs/2305.18290)",
        "Park et al. 2024, [arXiv:2403.19159](https://arxiv.org/abs/2403.19159)",
        "Liu et al. 2024, [arXiv:2409.06411](https://arxiv.org/abs/2409.06411)",
        "Meng et al. 2024, [arXiv:2405.14734](https://arxiv.org/abs/2405.14734)",
        "Lambert et al. 2024, [arXiv:2411.15124](https://arxiv.org/abs/2411.15124)",
    ),
)

if __name__ == "__main__":
    main(STUDY)
