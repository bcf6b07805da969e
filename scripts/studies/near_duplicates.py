"""DPO on pairs that differ in one token lowers the chosen answers; DPO-Positive does not.

python -m scripts.studies.near_duplicates [--quick]
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import mlx.nn as nn
import numpy as np

from mlx_dpo import load_policy
from scripts.studies.reporting.command import main
from scripts.studies.reporting.figures import add_axes, add_legend, draw_spread, line_style
from scripts.studies.reporting.study import Claim, Picture, Row, Rows, Scale, Study, column, of
from scripts.studies.toy.base import tune_base
from scripts.studies.toy.exact import token_logps
from scripts.studies.toy.train import train
from scripts.studies.toy.words import Words, write_checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mlx_dpo.reporting.plots import Theme

NUMBERS = tuple(map(str, range(10)))
WORDS = tuple(f"{first}{second}" for first in "bdkm" for second in "aiou")
PAIRS = 24
PROMPTS = tuple(f"q{index}" for index in range(PAIRS))
VOCABULARY = Words((*PROMPTS, *NUMBERS, *WORDS))
LENGTH = 20  # words of a solution
NUMBER_PLACES = (6, 13)  # the number of a solution is in this range of places
CONCENTRATION = 0.1  # of a word's followers: about two follow a word
BASE_ROWS, BASE_STEPS, BASE_BATCH = 144, 150, 24
BETA, RATE, STEPS = 0.3, 1e-4, 60
LOSSES = {"DPO": "sigmoid", "DPOP": "dpop"}
LOW, HIGH = "one token", "all tokens"


class Pair(NamedTuple):
    """A prompt with its answers, and the place of the chosen answer's number."""

    prompt: str
    chosen: str
    rejected: str
    place: int


class Solutions:
    """Draws worked solutions: a chain of words, in which each word has few followers."""

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        followers = np.full(len(WORDS), CONCENTRATION)
        self.followers = self.draw.dirichlet(followers, len(WORDS))
        self.first = {prompt: int(self.draw.integers(len(WORDS))) for prompt in PROMPTS}

    def solution(self, prompt: str) -> tuple[list[str], int]:
        """Return the words of a solution, and the place of the number in them."""
        word, words = self.first[prompt], []
        for _ in range(LENGTH):
            words.append(WORDS[word])
            word = int(self.draw.choice(len(WORDS), p=self.followers[word]))
        place = int(self.draw.integers(*NUMBER_PLACES))
        words[place] = str(self.draw.choice(NUMBERS))
        return words, place

    def pairs(self) -> dict[str, list[Pair]]:
        """Return pairs with the same chosen answers, whose rejected ones differ a little or a lot.

        The rejected answer has another number, or is another solution.
        """
        pairs: dict[str, list[Pair]] = {LOW: [], HIGH: []}
        for prompt in PROMPTS:
            words, place = self.solution(prompt)
            other = list(words)
            other[place] = str(self.draw.choice([n for n in NUMBERS if n != words[place]]))
            for distance, rejected in ((LOW, other), (HIGH, self.solution(prompt)[0])):
                pairs[distance].append(Pair(prompt, " ".join(words), " ".join(rejected), place))
        return pairs


def make_model(folder: Path, solutions: Solutions, seed: int) -> Path:
    """Write a base model that is tuned on solutions other than those of the pairs."""
    random = write_checkpoint(folder / f"base-{seed}-random", VOCABULARY, seed=seed)
    rows = [
        {"prompt": prompt, "completion": " ".join(solutions.solution(prompt)[0]), "probability": 1}
        for index in range(BASE_ROWS)
        for prompt in [PROMPTS[index % PAIRS]]
    ]
    output = folder / f"base-{seed}"
    return tune_base(output, random, rows, seed=seed, steps=BASE_STEPS, batch_size=BASE_BATCH)


def logps_of_tokens(model: nn.Module, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Return log π of each token, the end included, of chosen and of rejected answers. (N, T)"""
    return (
        np.stack([token_logps(model, VOCABULARY, pair.prompt, pair.chosen) for pair in pairs]),
        np.stack([token_logps(model, VOCABULARY, pair.prompt, pair.rejected) for pair in pairs]),
    )


def describe(
    pairs: Sequence[Pair], chosen: np.ndarray, rejected: np.ndarray, reference: np.ndarray
) -> Iterator[Row]:
    """Yield a row per position, counted from the number, and a row per pair.

    Args:
        chosen: change of log π of the chosen answers' tokens. (N, T)
        rejected: the same of the rejected answers. (N, T)
        reference: log π_ref of the chosen answers' tokens. (N, T)
    """
    places = np.array([pair.place for pair in pairs])
    positions = np.arange(chosen.shape[1]) - places[:, None]
    for position in range(positions.min(), positions.max() + 1):
        here = positions == position
        yield {
            "row": "position",
            "index": position,
            "tokens": int(here.sum()),
            "reference_logp": float(reference[here].mean()),
            "chosen_change": float(chosen[here].mean()),
            "margin": float(chosen[here].mean() - rejected[here].mean()),
        }
    for index in range(len(pairs)):
        yield {
            "row": "pair",
            "index": index,
            "tokens": chosen.shape[1],
            "reference_logp": float(reference[index].sum()),
            "chosen_change": float(chosen[index].sum()),
            "margin": float(chosen[index].sum() - rejected[index].sum()),
        }


def run(scale: Scale) -> Iterator[Row]:
    """Train on both kinds of pairs with both losses; yield changes by position and by pair."""
    for seed in scale.seeds:
        solutions = Solutions(seed)
        model = make_model(scale.folder, solutions, seed)
        base = load_policy(None, model=str(model)).model
        for distance, pairs in solutions.pairs().items():
            reference = logps_of_tokens(base, pairs)
            for name, loss in LOSSES.items():
                if scale.quick and (distance, name) == (HIGH, "DPOP"):
                    continue
                policy = train(
                    model,
                    [
                        {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}
                        for p in pairs
                    ],
                    scale.folder / f"run-{seed}-{distance}-{name}",
                    loss_type=loss,
                    beta=BETA,
                    batch_size=PAIRS,
                    micro_batch_size=PAIRS,
                    max_steps=STEPS,
                    learning_rate=RATE,
                    seed=seed,
                )
                after = logps_of_tokens(policy, pairs)
                changes = (now - before for now, before in zip(after, reference, strict=True))
                for row in describe(pairs, *changes, reference[0]):
                    yield {"seed": seed, "distance": distance, "loss": name, **row}


Measure = Callable[[Rows], float]


def mean_change(loss: str, distance: str) -> Measure:
    """Return a function that returns the mean change of log π(y⁺) over the pairs, in nats."""
    return lambda rows: float(np.mean(_of_pairs(rows, loss, distance, "chosen_change")))


def change_per_token(loss: str, first: int, last: int) -> Measure:
    """Return a function that returns the mean change per token of near-duplicates.

    Args:
        first: first position, counted from the edit.
        last: last position.
    """

    def measure(rows: Rows) -> float:
        found = [
            row
            for row in of(rows, row="position", distance=LOW, loss=loss)
            if first <= float(row["index"]) <= last
        ]
        return float(np.average(column(found, "chosen_change"), weights=column(found, "tokens")))

    return measure


def smallest(loss: str, name: str) -> Measure:
    """Return a function that returns the smallest value of near-duplicate pairs."""
    return lambda rows: min(_of_pairs(rows, loss, LOW, name))


def _of_pairs(rows: Rows, loss: str, distance: str, name: str) -> list[float]:
    return column(of(rows, row="pair", distance=distance, loss=loss), name)


def saved_by_distance(rows: Rows) -> float:
    """Return how much less DPO lowers chosen answers if the rejected ones differ throughout."""
    return mean_change("DPO", HIGH)(rows) - mean_change("DPO", LOW)(rows)


def draw_positions(figure: "Figure", rows: Rows, theme: "Theme") -> None:
    """Draw the change of chosen tokens by position, and that of whole answers."""
    place = add_axes(
        figure,
        1,
        2,
        1,
        x_label="position from the changed number",
        y_label="change of log π (nats per token)",
        title="Near-duplicates, by token",
    )
    place.axvline(0, color=theme.faint, linewidth=6, zorder=0)
    total = add_axes(
        figure,
        1,
        2,
        2,
        x_label="tokens that differ",
        y_label="change of log π(y⁺) (nats)",
        title="Whole answers",
        xlim=(-0.5, 1.5),
    )
    total.set_xticks((0, 1), labels=(LOW, HIGH))
    for axes in (place, total):
        axes.axhline(0, color=theme.ink, linewidth=0.8)
    for index, loss in enumerate(LOSSES):
        near = of(rows, row="position", distance=LOW, loss=loss)
        near = [row for row in near if abs(float(row["index"])) <= NUMBER_PLACES[0]]
        draw_spread(place, theme, index, near, "index", "chosen_change", label=loss)
        style = line_style(theme, index) | {"linestyle": "", "alpha": 0.5, "fillstyle": "none"}
        for column_index, distance in enumerate((LOW, HIGH)):
            if not (changes := _of_pairs(rows, loss, distance, "chosen_change")):
                continue  # a quick run does not have it
            shift = 0.16 * (2 * index - 1)
            places = column_index + shift + np.linspace(-0.1, 0.1, len(changes))
            total.plot(places, changes, **style)
            ends = (column_index + shift - 0.13, column_index + shift + 0.13)
            total.plot(ends, [np.mean(changes)] * 2, color=theme.ink, linewidth=2.2)
    add_legend(figure, among=[place])


SOURCE = "Pal et al. 2024"
STUDY = Study(
    name="near_duplicates",
    title="Near-duplicates: DPO lowers the chosen answers, DPO-Positive keeps them",
    result=(
        "DPO makes chosen answers less likely if the rejected ones differ in one token. DPOP "
        "keeps them."
    ),
    question=(
        "DPO's loss depends on the difference of two log-ratios only. It can fall while the chosen "
        "answer gets less likely, if the rejected answer loses more. Pal et al. show that this "
        "happens for pairs of low edit distance: after DPO on mathematical solutions the tokens "
        "behind the error get less likely. Their DPO-Positive (DPOP) adds a penalty that stops it. "
        "Does `loss_type` `sigmoid` show the fault, and does `dpop` prevent it?"
    ),
    setup=(
        "A Llama with 2 layers and hidden size 48; each token is a word. A solution is a chain "
        "of 20 words and an end token; each word has about two possible successors, and one word "
        "is replaced by a number. The base model is tuned on 144 other solutions. There are 24 "
        "pairs per seed, in two sets with the same chosen answers. In the first set, the "
        "rejected answer differs in the number only (near-duplicates). In the second, it is "
        "another solution to the same prompt. Full fine-tuning, 60 steps of all 24 pairs, β = "
        f"{BETA}, AdamW, learning rate 1e-4; DPOP with its default λ = 50. Log-probs of every "
        "token before and after training are computed from logits in float64, so all numbers are "
        "exact. Base model and learning rate were chosen on seed 0."
    ),
    run=run,
    claims=(
        Claim(
            name="dpo_lowers_chosen",
            text="Near-duplicates: mean change of log π(y⁺) by DPO",
            source=SOURCE,
            measure=mean_change("DPO", LOW),
            below=-5,
            unit="nats",
        ),
        Claim(
            name="dpo_lowers_tokens_after",
            text="Near-duplicates: mean change of log π by DPO of a token after the changed one",
            source=f"{SOURCE}, log-probs by token",
            measure=change_per_token("DPO", 1, LENGTH),
            below=-0.25,
            unit="nats per token",
        ),
        Claim(
            name="dpo_learns_the_pairs",
            text="Near-duplicates: smallest growth of the margin of any pair by DPO. The loss "
            "falls as it should.",
            source="Rafailov et al. 2023, Eq. 7",
            measure=smallest("DPO", "margin"),
            above=3,
            unit="nats",
        ),
        Claim(
            name="distance_matters",
            text="DPO lowers the same chosen answers less if the rejected ones differ throughout: "
            "difference of the mean changes of log π(y⁺)",
            source=f"{SOURCE}, low and high edit distances",
            measure=saved_by_distance,
            above=4,
            unit="nats",
        ),
        Claim(
            name="dpop_keeps_every_answer",
            text="Near-duplicates: smallest change of log π(y⁺) of any pair by DPOP",
            source=f"{SOURCE}, the loss DPOP",
            measure=smallest("DPOP", "chosen_change"),
            above=-0.1,
            unit="nats",
        ),
        Claim(
            name="dpop_keeps_tokens_after",
            text="Near-duplicates: mean change of log π by DPOP of a token after the changed one",
            source=f"{SOURCE}, log-probs by token",
            measure=change_per_token("DPOP", 1, LENGTH),
            above=0,
            unit="nats per token",
        ),
        Claim(
            name="dpop_raises_the_edit",
            text="Near-duplicates: mean change of log π by DPOP of the token that differs",
            source=f"{SOURCE}, log-probs by token",
            measure=change_per_token("DPOP", 0, 0),
            above=0.1,
            unit="nats",
        ),
    ),
    pictures=(
        Picture(
            name="positions",
            caption=(
                "Left: change of the chosen answer's log-prob per token (nats) against the "
                "position, counted from the token that differs, for pairs that differ in one "
                "token; lines are means over 24 pairs, bands the range of 3 seeds. Right: change "
                "of log π(y⁺) of whole answers (nats), one point per pair and seed (n = 72), bars "
                "are means. Exact values. Zero is the reference."
            ),
            draw=draw_positions,
        ),
    ),
    deviations=(
        "The paper trains Llamas on MetaMath, ARC and HellaSwag; here solutions are chains of "
        "words without meaning, and the two sets of pairs differ in nothing but the rejected "
        "answers.",
        "In the paper's analysis only tokens from the error on have a gradient. Here tokens "
        "before it fall about as much as those after it: with equal prefixes their own gradient "
        "is zero, but the small model shares its weights between all positions.",
        "DPOP's margins are small after 60 steps (less than a tenth of DPO's, on average): with "
        "λ = 50 the loss raises chosen answers first, and one pair's margin falls by 0.1 (seed 1). "
        "The comparison is at equal steps, not at equal margins.",
        "DPO lowers chosen answers in the set of distant pairs as well, though less.",
    ),
    sources=(
        "Pal et al. 2024, [arXiv:2402.13228](https://arxiv.org/abs/2402.13228)",
        "Rafailov et al. 2023, [arXiv:2305.18290](https://arxiv.org/abs/2305.18290)",
    ),
)

if __name__ == "__main__":
    main(STUDY)
