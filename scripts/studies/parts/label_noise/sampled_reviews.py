"""Train on sampled pairs of film reviews, a share of whose labels is flipped."""

from collections.abc import Iterator, Sequence

import numpy as np

from mlx_dpo import evaluate_run, load_policy
from scripts.studies.parts.label_noise.methods import ERROR, METHODS, returns
from scripts.studies.reporting.study import Row, Scale
from scripts.studies.toy import bradley_terry as bt
from scripts.studies.toy import reviews
from scripts.studies.toy.exact import normalize
from scripts.studies.toy.train import train, write_rows

PAIRS, HELD_OUT = 2048, 512
QUICK_METHODS = ("dpo", "cdpo", "rdpo")
SCALED = (0.2, 0.4)  # shares of flips at which DPO is trained with β(1−2ε) too
MISJUDGED, ASSUMED = 0.3, (0.1, 0.2, 0.4)  # true share of flips, and wrong ones
REVIEW_SETTINGS: Row = {
    "batch_size": 64,
    "micro_batch_size": 64,
    "max_steps": 128,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
}


def runs_at(rate: float, *, quick: bool) -> list[tuple[str, float]]:
    """Return the methods and assumed shares of flips that are trained at a share of flips."""
    if quick:
        return [(name, rate) for name in (QUICK_METHODS if rate else ("dpo",))]
    names = [name for name in METHODS if name != "dpo_scaled" or rate in SCALED]
    runs = [(name, rate) for name in (names if rate else ("dpo", "ipo"))]
    return [*runs, *(("rdpo", assumed) for assumed in ASSUMED if rate == MISJUDGED)]


def run_reviews(scale: Scale, seed: int, rates: Sequence[float]) -> Iterator[Row]:
    """Train on sampled pairs of film reviews, each with one label that may be flipped."""
    base = reviews.make_reviewer(scale.folder / f"reviews-{seed}", seed=seed)
    model = load_policy(None, model=str(base)).model
    reference = reviews.SPACE.all_logps(model, reviews.SUBJECTS)
    for rate in rates:
        pairs = list(sample_pairs(reference, rate, PAIRS, 300 + seed))
        held_out = write_rows(
            scale.folder / f"held-out-{seed}-{rate}.jsonl",
            sample_pairs(reference, rate, HELD_OUT, 400 + seed),
        )
        for name, assumed in runs_at(rate, quick=scale.quick):
            output = scale.folder / f"reviews-{seed}-{rate}-{name}-{assumed}"
            values = METHODS[name].settings(assumed) | REVIEW_SETTINGS
            logps = reviews.SPACE.all_logps(
                train(base, pairs, output, **values, seed=seed), reviews.SUBJECTS
            )
            yield {
                "seed": seed,
                "form": "sampled",
                "method": name,
                "flipped": rate,
                "assumed": assumed,
                **returns(logps, reference, reviews.REWARDS),
                "distance": np.nan,
                **ERROR,
                "clean_accuracy": clean_accuracy(logps, reference),
                "shown_accuracy": evaluate_run(str(output), str(held_out)).metrics.accuracies,
            }


def sample_pairs(reference: np.ndarray, rate: float, number: int, seed: int) -> Iterator[Row]:
    """Yield pairs of different answers of the base, labelled by Bradley-Terry and then flipped.

    For one seed the answers and labels are the same for all rates; a higher rate flips more.
    """
    draw = np.random.default_rng(seed)
    listed = normalize(reference[:, :-1])
    while number:
        prompt = draw.integers(len(listed))
        first, second = draw.choice(listed.shape[1], 2, p=np.exp(listed[prompt]))
        label, noise = draw.random(2)
        if first != second:
            gap = reviews.REWARDS[first] - reviews.REWARDS[second]
            prefers_first = (label < bt.preference(gap)) != (noise < rate)
            chosen, rejected = (first, second) if prefers_first else (second, first)
            yield {
                "prompt": reviews.SUBJECTS[prompt],
                "chosen": reviews.SPACE.answers[chosen],
                "rejected": reviews.SPACE.answers[rejected],
            }
            number -= 1


def clean_accuracy(logps: np.ndarray, reference: np.ndarray) -> float:
    """Return the exact share of unflipped labels that the policy's log-ratios agree with.

    The labels are those of `sample_pairs` without flips; the answers have the base's probabilities.
    """
    agreements = []
    wins = bt.preferences(reviews.REWARDS[:-1])
    for ratios, weights in zip(
        (logps - reference)[:, :-1], normalize(reference[:, :-1]), strict=True
    ):
        pairs = np.exp(weights[:, None] + weights[None, :]) * (1 - np.eye(len(weights)))
        agrees = ratios[:, None] > ratios[None, :]
        agreements.append(2 * (pairs * wins)[agrees].sum() / pairs.sum())
    return float(np.mean(agreements))
