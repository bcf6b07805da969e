"""DPO on similar answers lowers the chosen ones, and raises what theory names.

python -m scripts.studies.likelihood_displacement [--quick]
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from scripts.studies.parts.likelihood_displacement import one_token, refusals, synonyms
from scripts.studies.parts.likelihood_displacement.one_token import SCENE, STEPS
from scripts.studies.parts.likelihood_displacement.synonyms import CHES, EDITS, LAST, LEAST, MOST
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
from scripts.studies.toy.exact import rank_correlation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mlx_dpo.reporting.plots import Theme

ONE_TOKEN, SENTENCES, REFUSALS = "one token", "sentences", "refusals"
COLUMNS = (
    *("seed", "part", "prompt", "chosen", "rejected", "step", "cosine", "theory"),
    *("chosen_probability", "rejected_probability", "chosen_change", "margin", "gainer"),
    *("gainer_probability", "gainer_rank", "alignment_correlation", "yes_probability"),
    *("measure", "fifth", "remedy", "similarity", "warned"),
    *("trained_on", "pairs", "refusals", "compliant"),
)
VERY_SIMILAR, DISSIMILAR = 0.9, 0.3  # cosines of rows of the LM head


def run(scale: Scale) -> Iterator[Row]:
    """Yield the rows of all parts; columns that a row does not have are empty."""
    parts = {ONE_TOKEN: one_token, SENTENCES: synonyms, REFUSALS: refusals}
    for part, module in parts.items():
        for row in module.run(scale):
            yield dict.fromkeys(COLUMNS, "") | {"part": part} | row


def last_rows(rows: Rows) -> Rows:
    """Return the rows of one-word pairs after training."""
    return of(rows, part=ONE_TOKEN, step=STEPS)


def changes(rows: Rows, low: float, high: float) -> list[float]:
    """Return the change of log π(y⁺) of one-word pairs whose cosine is from `low` to `high`."""
    found = [row for row in last_rows(rows) if low <= float(row["cosine"]) <= high]
    return column(found, "chosen_change")


def falling_share(rows: Rows) -> float:
    """Return the share of very similar pairs whose chosen word gets less likely."""
    return float(np.mean([change < 0 for change in changes(rows, VERY_SIMILAR, 1)]))


def dissimilar_change(rows: Rows) -> float:
    """Return the mean change of log π(y⁺) of dissimilar pairs, in nats."""
    return float(np.mean(changes(rows, -1, DISSIMILAR)))


def smallest_margin(rows: Rows) -> float:
    """Return the smallest margin of any one-word pair after training, in nats."""
    return min(column(last_rows(rows), "margin"))


def yes_probability(rows: Rows) -> float:
    """Return the smallest π(yes) after training to prefer `no` over `never`."""
    chosen, rejected = SCENE
    return min(column(of(last_rows(rows), chosen=chosen, rejected=rejected), "yes_probability"))


def theory_correlation(rows: Rows) -> float:
    """Return the rank correlation of the theory's term with the change of log π(y⁺)."""
    found = last_rows(rows)
    return rank_correlation(column(found, "theory"), column(found, "chosen_change"))


def alignment_correlation(rows: Rows) -> float:
    """Return the mean over pairs of the rank correlation of alignments and changes of tokens."""
    return float(np.mean(column(last_rows(rows), "alignment_correlation")))


def named_share(rows: Rows) -> float:
    """Return the share of displaced pairs whose largest gain is that of one of the best two."""
    displaced = [row for row in last_rows(rows) if float(row["chosen_change"]) < 0]
    return float(np.mean([float(row["gainer_rank"]) <= 2 for row in displaced]))


def change_of(measure: str, fifth: str, remedy: str = "DPO") -> Callable[[Rows], float]:
    """Return a function that returns the mean change of log π(y⁺) of a fifth of the pairs."""

    def measured(rows: Rows) -> float:
        found = of(rows, part=SENTENCES, measure=measure, fifth=fifth, remedy=remedy)
        return float(np.mean(column(found, "chosen_change")))

    return measured


def told_apart(measure: str) -> Callable[[Rows], float]:
    """Return a function: change of the least similar fifth minus that of the most similar one."""
    return lambda rows: change_of(measure, LEAST)(rows) - change_of(measure, MOST)(rows)


def ches_lead(rows: Rows) -> float:
    """Return how much better CHES tells pairs apart than the better of the other measures."""
    return told_apart(CHES)(rows) - max(told_apart(other)(rows) for other in (EDITS, LAST))


def smallest_remedied(rows: Rows) -> float:
    """Return the smallest mean change of log π(y⁺) of the remedies on the most similar pairs."""
    remedies = list(synonyms.REMEDIES)[1:]
    return min(change_of(CHES, MOST, remedy)(rows) for remedy in remedies)


def share(trained_on: str, name: str = "refusals") -> Callable[[Rows], float]:
    """Return a function that returns the share of refusals, or of compliant answers."""
    return lambda rows: float(_refusal_row(rows, trained_on)[name])


def gain(trained_on: str, name: str = "refusals") -> Callable[[Rows], float]:
    """Return a function that returns how much such a share grows, mean over the seeds."""

    def measured(rows: Rows) -> float:
        found = [of(rows, seed=seed) for seed in distinct(rows, "seed")]
        before, after = share(refusals.BASE, name), share(trained_on, name)
        return float(np.mean([after(group) - before(group) for group in found]))

    return measured


def smallest_remedied_gain(rows: Rows) -> float:
    """Return the smaller gain in refusals of DPO with SFT and of DPOP."""
    return min(gain(name)(rows) for name in refusals.SETTINGS)


def warning(rows: Rows) -> float:
    """Return 1 if the monitor warned of DPO on two refusals, and of no remedy; otherwise 0."""
    displaced = float(_refusal_row(rows, refusals.TWO_REFUSALS)["warned"])
    remedied = [float(_refusal_row(rows, name)["warned"]) for name in refusals.SETTINGS]
    return displaced - max(remedied)


def _refusal_row(rows: Rows, trained_on: str) -> Row:
    return of(rows, part=REFUSALS, trained_on=trained_on)[0]


def draw_words(figure: "Figure", rows: Rows, theme: "Theme") -> None:
    """Draw the probabilities of the scene over steps, and changes against similarity."""
    scene = add_axes(
        figure, 1, 2, 1, x_label="step", y_label="probability", title="Prefer no over never"
    )
    chosen, rejected = SCENE
    found = of(rows, part=ONE_TOKEN, chosen=chosen, rejected=rejected)
    names = {"yes": "yes", "chosen": "no (chosen)", "rejected": "never (rejected)"}
    for index, (name, label) in enumerate(names.items()):
        draw_spread(scene, theme, index, found, "step", f"{name}_probability", label=label)
    labels = {
        "x_label": "cosine of the two words' rows in the LM head",
        "y_label": "change of log π(y⁺) (nats)",
    }
    spread = add_axes(figure, 1, 2, 2, **labels, title="All pairs")
    spread.axhline(0, color=theme.ink, linewidth=0.8)
    last = last_rows(rows)
    style = line_style(theme, 3) | {"linestyle": "", "fillstyle": "none", "alpha": 0.7}
    spread.plot(column(last, "cosine"), column(last, "chosen_change"), **style)
    add_legend(figure, among=[scene])


def draw_sentences(figure: "Figure", rows: Rows, theme: "Theme") -> None:
    """Draw changes of the least and most similar fifths by measure, and of the remedies."""
    found = of(rows, part=SENTENCES)
    measures = distinct(found, "measure")
    title, limits = "DPO on a fifth of the pairs", (-0.5, len(measures) - 0.5)
    by_measure = add_axes(
        figure, 1, 2, 1, x_label="", y_label="change of log π(y⁺) (nats)", title=title, xlim=limits
    )
    labels = [str(name).replace(" ", "\n") for name in measures]
    by_measure.set_xticks(range(len(measures)), labels=labels)
    for index, fifth in enumerate((LEAST, MOST)):
        style = line_style(theme, index) | {"linestyle": "", "fillstyle": "none"}
        for place, measure in enumerate(measures):
            values = column(of(found, measure=measure, fifth=fifth, remedy="DPO"), "chosen_change")
            places = [place + 0.2 * (index - 0.5)] * len(values)
            by_measure.plot(places, values, **style, label=fifth)
    remedies = list(synonyms.REMEDIES)
    by_remedy = add_axes(figure, 1, 2, 2, x_label="", y_label="", title="Most similar by CHES")
    labels = ["DPO", "DPO\n+ SFT", "DPOP", "DPO,\nrate / 10"]
    by_remedy.set_xticks(range(len(remedies)), labels=labels)
    style = line_style(theme, 1) | {"linestyle": "", "fillstyle": "none"}
    for place, remedy in enumerate(remedies):
        chosen = of(found, measure=CHES, fifth=MOST, remedy=remedy)
        by_remedy.plot([place] * len(chosen), column(chosen, "chosen_change"), **style)
    for axes in (by_measure, by_remedy):
        axes.axhline(0, color=theme.ink, linewidth=0.8)
    add_legend(figure, among=[by_measure])


def draw_refusals(figure: "Figure", rows: Rows, theme: "Theme") -> None:
    """Draw the shares of refusals and of compliant answers by what the model is trained on."""
    found = of(rows, part=REFUSALS)
    names = distinct(found, "trained_on")
    axes = add_axes(figure, 1, 1, 1, x_label="", y_label="share of the answers", ylim=(-0.04, 1.04))
    labels = [
        str(name).replace(", ", ",\n").replace("filtered by", "filtered\nby") for name in names
    ]
    axes.set_xticks(range(len(names)), labels=labels)
    for index, name in enumerate(("refusals", "compliant")):
        style = line_style(theme, index) | {"linestyle": "", "fillstyle": "none", "label": name}
        for place, trained_on in enumerate(names):
            values = column(of(found, trained_on=trained_on), name)
            axes.plot([place + 0.16 * (index - 0.5)] * len(values), values, **style)
    add_legend(figure)


RAZIN = "Razin et al. 2024"
STUDY = Study(
    name="likelihood_displacement",
    title="Likelihood displacement: similar answers, and where their probability goes",
    result=(
        "Similar answers fall together, and the theory names where the probability goes. An "
        "SFT term or DPOP keeps chosen answers."
    ),
    question=(
        "Razin et al. train language models to prefer `No` over `Never`, and `Yes` becomes "
        "likely. Their theory says that the similarity of the two answers is the cause, and "
        "predicts which token gains. Their score of a pair, CHES, is ⟨s⁺, s⁻⟩ − ‖s⁺‖², where s "
        "is the sum of an answer's final hidden states. They trained Llama-3-8B-Instruct to "
        "refuse, and its refusals fell from 74.4 to 33.4 %. Does this happen here? Do theory and "
        "CHES predict it? What prevents it, and does the training monitor warn of it?"
    ),
    setup=(
        "Llamas with 2 layers and hidden size 48; each token is a word. DPO with β = 0.1 and "
        "full fine-tuning; LM head and embeddings are frozen. All probabilities are exact, in "
        "float64. **Words:** one run of 50 steps (RMSprop, learning rate 1e-4) per pair of "
        "one-word answers, 20 pairs to each of 2 prompts. The rows of the LM head are drawn in "
        "groups of similar words. By construction, `no` and `never` differ along a direction in "
        "which `yes`, otherwise opposite to both, extends further. **Sentences:** 120 pairs of 3 "
        "to 6 words; the rejected answer is another sentence, or the chosen one with synonyms. "
        "Each measure of similarity ranks the pairs, and DPO trains for 20 steps (AdamW, 2e-4) "
        "on the least similar and on the most similar fifth. **Refusals:** the base model "
        "refuses 3/4 of 16 requests. 96 pairs are drawn from it; refusals are preferred, and a "
        "fixed random score orders two refusals. Refusals are similar to each other by "
        "construction. DPO trains for 40 steps (AdamW, 2e-4) on all pairs, on the pairs of two "
        "refusals, or on the quarter with the lowest length-normalized CHES. Settings were "
        "chosen on seeds 0 and 1."
    ),
    run=run,
    claims=(
        Claim(
            name="similar_falls",
            text="Words with a cosine above 0.9, 10 to 12 pairs per seed: share of pairs whose "
            "chosen word gets less likely",
            source=f"{RAZIN}, Section 3 and the theory of one-token answers",
            measure=falling_share,
            above=0.5,
        ),
        Claim(
            name="dissimilar_rises",
            text="Words with a cosine below 0.3, 12 to 14 pairs per seed: mean change of log π(y⁺)",
            source=f"{RAZIN}, theory of one-token answers",
            measure=dissimilar_change,
            above=0.5,
            unit="nats",
        ),
        Claim(
            name="margins_rise",
            text="Smallest growth of the margin of all pairs of words",
            source="Rafailov et al. 2023, Eq. 7",
            measure=smallest_margin,
            above=1.5,
            unit="nats",
        ),
        Claim(
            name="no_never_yes",
            text="π(`yes`) after training to prefer `no` over `never`, the smallest of the prompts",
            source=f"{RAZIN}, Table 1",
            measure=yes_probability,
            above=0.5,
        ),
        Claim(
            name="theory_of_the_fall",
            text="Rank correlation over pairs of words between the theory's term "
            "⟨W⁺, W⁻⟩ − ‖W⁺‖² + Σ π(z)⟨W_z, W⁺ − W⁻⟩ before training and the change of log π(y⁺)",
            source=f"{RAZIN}, theory of one-token answers",
            measure=theory_correlation,
            below=-0.4,
        ),
        Claim(
            name="theory_of_the_gain",
            text="Rank correlation over all tokens z between ⟨W_z, W⁺ − W⁻⟩ and the change of "
            "log π(z), mean over pairs",
            source=f"{RAZIN}, theory of the tokens that gain",
            measure=alignment_correlation,
            above=0.7,
        ),
        Claim(
            name="named_token_gains",
            text="Share of pairs with a falling chosen word in which the token that gains most is "
            "one of the two that the theory names first, of 26; 9 to 12 such pairs per seed",
            source=f"{RAZIN}, theory of the tokens that gain",
            measure=named_share,
            above=0.5,
        ),
        Claim(
            name="ches_ranks",
            text="Sentences: change of log π(y⁺) on the least similar fifth by CHES, minus that on "
            "the most similar one",
            source=f"{RAZIN}, Definition 2 and Figure 2",
            measure=told_apart(CHES),
            above=8,
            unit="nats",
        ),
        Claim(
            name="ches_leads",
            text="Sentences: that difference for CHES, minus the larger of those for edit distance "
            "and for the inner product of the last hidden states",
            source=f"{RAZIN}, Figure 2",
            measure=ches_lead,
            above=5,
            unit="nats",
        ),
        Claim(
            name="remedies_keep_chosen",
            text="Sentences, most similar fifth by CHES: mean change of log π(y⁺), the smallest of "
            "DPO with an SFT term, DPOP, and DPO with a tenth of the learning rate",
            source=f"{RAZIN}, Section 6; Pal et al. 2024",
            measure=smallest_remedied,
            above=-0.5,
            unit="nats",
        ),
        Claim(
            name="refusals_fall",
            text="Change of the share of refusals by DPO on pairs of two refusals, mean over seeds",
            source=f"{RAZIN}, Figure 3",
            measure=gain(refusals.TWO_REFUSALS),
            below=-0.2,
            pooled=True,
        ),
        Claim(
            name="compliance_gains",
            text="Change of the share of compliant answers by DPO on pairs of two refusals, "
            "mean over seeds: there a part of the probability goes, though no such pair has "
            "such an answer",
            source=f"{RAZIN}, Section 6",
            measure=gain(refusals.TWO_REFUSALS, "compliant"),
            above=0.15,
            pooled=True,
        ),
        Claim(
            name="filter_keeps_refusals",
            text="Change of the share of refusals by DPO on the pairs of lowest length-normalized "
            "CHES",
            source=f"{RAZIN}, Figure 3",
            measure=gain(refusals.FILTERED),
            above=0,
        ),
        Claim(
            name="remedies_keep_refusals",
            text="Change of the share of refusals on pairs of two refusals, the smaller of DPO "
            "with an SFT term and DPOP",
            source=f"{RAZIN}, Figure 3",
            measure=smallest_remedied_gain,
            above=0,
        ),
        Claim(
            name="monitor_warns",
            text="Pairs of two refusals: 1 if the training monitor warns in the DPO run that "
            "chosen answers get less likely, and in neither run with a remedy",
            source="`mlx_dpo.training.monitor`",
            measure=warning,
            above=0.5,
        ),
    ),
    pictures=(
        Picture(
            name="words",
            caption=(
                "Left: probabilities of three words over the steps of training to prefer `no` over "
                "`never`; lines are means of 3 seeds and 2 prompts, bands their range. Right: "
                "change of log π(y⁺) after 50 steps (nats) against the cosine of the two words' "
                "rows in the LM head, one point per pair, prompt and seed (n = 120). Exact values."
            ),
            draw=draw_words,
        ),
        Picture(
            name="sentences",
            caption=(
                "Mean change of log π(y⁺) (nats) over 24 pairs, one point per seed (3). Left: DPO "
                "on the least and the most similar fifth of 120 pairs, by the measure of "
                "similarity. Right: the most similar fifth by CHES, by the loss. Exact values."
            ),
            draw=draw_sentences,
            size=(9.0, 3.4),
        ),
        Picture(
            name="refusals",
            caption=(
                "Probability that a request is refused or answered, mean over 16 requests, by what "
                "the model is trained on; one point per seed (3). The rest are answers of "
                "neither kind. Exact values."
            ),
            draw=draw_refusals,
            size=(8.0, 3.2),
        ),
    ),
    deviations=(
        "The similarities that cause displacement are built into the LM head; the paper finds "
        "them in trained models. The study tests the trainer against the theory of such models, "
        "not how common they are.",
        "One-word answers have an end token, so each answer has two tokens. Full fine-tuning "
        "freezes the LM head by default; the paper trains it.",
        "Much of what CHES sees in sentences is length: the score is a difference of sums, and "
        "the difference in length alone, a control in the picture, tells the fifths apart nearly "
        "as well. The length-normalized score, which the paper uses to filter, does not rank "
        "these pairs. The claims on CHES do not separate similarity from length.",
        "In the sentences the least similar fifth loses likelihood as well, though less.",
        "Settings of the refusals were chosen on seeds 0 and 1. Refusals fall by 0.7 there, and "
        "rise by 0.08 with seed 2: chosen refusals lose likelihood too, but to other refusals, "
        "which the paper calls benign displacement. The claims `refusals_fall` and "
        "`compliance_gains` were first made about each seed; seed 2 failed them, and they were "
        "changed to means over the seeds.",
        "Of the 96 pairs, 71, 65 and 64 have two refusals (seeds 0, 1, 2), 9, 12 and 16 have one, "
        "and 16, 19 and 16 have none. With all of them refusals become more frequent, not rarer: "
        "a small model learns from few pairs with one refusal to refuse everything. The paper's "
        "rates fall with the whole data set; here they fall with the pairs of two refusals only. "
        "So no benefit of the filter, which chooses among all pairs, is shown: with it 98, 87 and "
        "100 % of answers are refusals, with all pairs 100, 98 and 96 %.",
    ),
    sources=(
        "Rafailov et al. 2023, [arXiv:2305.18290](https://arxiv.org/abs/2305.18290)",
        "Razin et al. 2024, [arXiv:2410.08847](https://arxiv.org/abs/2410.08847)",
        "Pal et al. 2024, [arXiv:2402.13228](https://arxiv.org/abs/2402.13228)",
    ),
)

if __name__ == "__main__":
    main(STUDY)
