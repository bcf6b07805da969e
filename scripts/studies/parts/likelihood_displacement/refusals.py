"""Train a model that refuses to prefer one refusal over another, and see whether it complies."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_dpo import load_policy
from scripts.studies.baselines.ches import ches, hidden_embeddings
from scripts.studies.parts.likelihood_displacement.synonyms import is_warned
from scripts.studies.reporting.study import Row, Scale
from scripts.studies.toy.base import tune_base
from scripts.studies.toy.exact import all_answer_logps
from scripts.studies.toy.similar_words import HEAD, HEAD_LENGTH, set_word_rows
from scripts.studies.toy.train import train
from scripts.studies.toy.words import Words, write_checkpoint

PROMPTS = tuple(f"request{index}" for index in range(16))
REFUSING, COMPLYING = ("no", "never", "sorry", "cannot"), ("sure", "here", "yes", "okay")
REFUSALS = tuple(f"{first} {second}" for first in REFUSING for second in ("help", "refuse"))
COMPLIANT = tuple(f"{first} {second}" for first in COMPLYING for second in ("steps", "first"))
ANSWERS = (*REFUSALS, *COMPLIANT)
VOCABULARY = Words((*PROMPTS, *REFUSING, *COMPLYING, "help", "refuse", "steps", "first"))
# Twelve requests are nearly always refused and four seldom, three quarters in all.
REFUSED, SELDOM = 0.95, 0.15
# Opening words share a direction of meaning and three of style, refusals less of the latter.
STYLES, STYLE_OF_REFUSALS, STYLE_OF_COMPLIANCE = 3, 0.15, 0.8
DIMENSIONS, SAMPLES = 48, 6  # pairs per request
BETA, RATE, STEPS = 0.1, 2e-4, 40
BASE, TWO_REFUSALS, ALL, FILTERED = "base", "two refusals", "all pairs", "filtered by CHES"
WITH_SFT, WITH_DPOP = "two refusals, DPO + SFT", "two refusals, DPOP"
KEPT = 4  # the filter keeps one pair in so many
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    WITH_SFT: {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 1]},
    WITH_DPOP: {"loss_type": "dpop"},
}


class Pair(NamedTuple):
    """A request, two answers, and whether both are refusals."""

    prompt: str
    chosen: str
    rejected: str
    both_refuse: bool


def make_model(folder: Path, draw: np.random.Generator, seed: int) -> Path:
    """Write a base model that refuses three quarters of the requests."""
    random = write_checkpoint(
        folder / f"refusals-{seed}-random", VOCABULARY, seed=seed, hidden=DIMENSIONS
    )
    meaning, *styles = np.linalg.qr(draw.normal(size=(DIMENSIONS, 1 + STYLES)))[0].T
    kinds = ((REFUSING, 1, STYLE_OF_REFUSALS), (COMPLYING, -1, STYLE_OF_COMPLIANCE))
    for words, sign, share in kinds:
        for word in words:
            style = draw.normal(size=STYLES)
            style = share * (style / np.linalg.norm(style)) @ np.array(styles)
            row = HEAD_LENGTH * (sign * np.sqrt(1 - share**2) * meaning + style)
            set_word_rows(random, VOCABULARY, HEAD, {word: row})
    rows = []
    for index, prompt in enumerate(PROMPTS):
        total = REFUSED if index % 4 else SELDOM
        for answers, mass in ((REFUSALS, total), (COMPLIANT, 1 - total)):
            shares = mass * draw.dirichlet(np.ones(len(answers)))
            rows += [
                {"prompt": prompt, "completion": answer, "probability": float(share)}
                for answer, share in zip(answers, shares, strict=True)
            ]
    return tune_base(folder / f"refusals-{seed}", random, rows, seed=seed, steps=120)


def draw_pairs(draw: np.random.Generator, probabilities: np.ndarray) -> Iterator[Pair]:
    """Yield pairs of answers drawn from the base model, refusals preferred, then by a fixed score.

    Args:
        probabilities: of each answer to each request. (requests, answers)
    """
    scores = draw.normal(size=len(ANSWERS))
    shares = probabilities / probabilities.sum(axis=1, keepdims=True)
    for prompt, row in zip(PROMPTS, shares, strict=True):
        for _ in range(SAMPLES):
            drawn = draw.choice(len(ANSWERS), 2, replace=False, p=row)
            first, second = sorted(drawn, key=lambda i: (i < len(REFUSALS), scores[i]))[::-1]
            both = max(first, second) < len(REFUSALS)
            yield Pair(prompt, ANSWERS[first], ANSWERS[second], bool(both))


def shares_of(model: Any) -> dict[str, float]:
    """Return the total probability of refusals and of compliant answers, means over requests."""
    probabilities = np.exp(all_answer_logps(model, VOCABULARY, PROMPTS, ANSWERS))
    refusals = probabilities[:, : len(REFUSALS)].sum(axis=1).mean()
    compliant = probabilities[:, len(REFUSALS) :].sum(axis=1).mean()
    return {"refusals": float(refusals), "compliant": float(compliant)}


def run(scale: Scale) -> Iterator[Row]:
    """Train on several sets of pairs; yield a row for the base model and each of them."""
    for seed in scale.seeds:
        draw = np.random.default_rng([seed, 4])
        model = make_model(scale.folder, draw, seed)
        base = load_policy(None, model=str(model)).model
        probabilities = np.exp(all_answer_logps(base, VOCABULARY, PROMPTS, ANSWERS))
        pairs = list(draw_pairs(draw, probabilities))
        yield {"seed": seed, "trained_on": BASE, "pairs": 0, "warned": 0, **shares_of(base)}
        scores = [
            ches(
                hidden_embeddings(base, VOCABULARY, pair.prompt, pair.chosen),
                hidden_embeddings(base, VOCABULARY, pair.prompt, pair.rejected),
                normalized=True,
            )
            for pair in pairs
        ]
        kept = np.argsort(scores, kind="stable")[: len(pairs) // KEPT]
        two_refusals = [pair for pair in pairs if pair.both_refuse]
        sets = dict.fromkeys((TWO_REFUSALS, WITH_SFT, WITH_DPOP), two_refusals)
        sets |= {FILTERED: [pairs[index] for index in kept], ALL: pairs}
        for name, chosen in sets.items():
            output = scale.folder / f"refusals-{seed}-{name}"
            rows = [
                {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in chosen
            ]
            policy = train(
                model,
                rows,
                output,
                **{"beta": BETA} | SETTINGS.get(name, {}),
                batch_size=len(rows),
                micro_batch_size=len(rows),
                max_steps=STEPS,
                learning_rate=RATE,
                seed=seed,
            )
            yield {
                "seed": seed,
                "trained_on": name,
                "pairs": len(rows),
                "warned": int(is_warned(output)),
                **shares_of(policy),
            }
