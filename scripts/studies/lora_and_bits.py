"""LoRA against full fine-tuning, ranks, and the bits of the base.

python -m scripts.studies.lora_and_bits [--quick]
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from scripts.studies.parts.lora_and_bits.cells import (
    CELLS,
    FULL,
    FULL_RATES,
    FUSIONS,
    LORA,
    MAIN,
    MODEL_BITS,
    QLORA,
    QUICK_CELLS,
    Bench,
    Cell,
)
from scripts.studies.parts.lora_and_bits.pictures import (
    base_cell,
    best_cell,
    cell_rows,
    draw_bits,
    draw_rates_and_ranks,
    full_cell,
    value,
)
from scripts.studies.reporting.command import main
from scripts.studies.reporting.study import Claim, Picture, Row, Rows, Scale, Study


def run(scale: Scale) -> Iterator[Row]:
    """Train and measure all cells; yield a row per cell, base and fused model."""
    for seed in scale.seeds:
        bench = Bench(scale.folder, seed)
        cells = QUICK_CELLS if scale.quick else CELLS
        for bits in dict.fromkeys(cell.bits for cell in cells):
            bench.base(bits)
            yield bench.row(base_cell(bits), {})
        for cell in cells:
            yield bench.row(cell, bench.train(cell))
            mx.clear_cache()
        for cell, bits in () if scale.quick else FUSIONS:
            yield bench.fuse(cell, bits)


def best_rate_ratio(rows: Rows) -> float:
    """Return the best learning rate of LoRA divided by that of full fine-tuning."""
    lora, full = (value(rows, best_cell(rows, m), "learning_rate") for m in (LORA, FULL))
    return lora / full


def lora_minus_full(rows: Rows) -> float:
    """Return how many more answers are good with LoRA than with full fine-tuning, as a share.

    Each has the best of its learning rates; a quick run has one of each.
    """
    lora, full = MAIN, full_cell()
    if cell_rows(rows, full_cell(FULL_RATES[0])):
        lora, full = best_cell(rows, LORA), best_cell(rows, FULL)
    return value(rows, lora, "reward") - value(rows, full, "reward")


def kl_at_equal_margin(rows: Rows) -> float:
    """Return LoRA's KL from the base divided by that of full fine-tuning at the same margin.

    The KL of full fine-tuning is interpolated between its learning rates, in logarithms.
    """
    cells = [full_cell(multiple) for multiple in FULL_RATES]
    margins, kls = (np.log([value(rows, c, name) for c in cells]) for name in ("margin", "kl"))
    full = np.exp(np.interp(np.log(value(rows, MAIN, "margin")), margins, kls))
    return value(rows, MAIN, "kl") / float(full)


def reward_gap(rows: Rows, cell: Cell, other: Cell = MAIN) -> float:
    """Return the reward of a cell minus that of another one, LoRA with rank 16 on 16 bits."""
    return value(rows, cell, "reward") - value(rows, other, "reward")


def rank_kl_ratio(rows: Rows) -> float:
    """Return the KL from the base with rank 1, divided by that with rank 64."""
    return value(rows, with_rank(1), "kl") / value(rows, with_rank(64), "kl")


def with_rank(rank: int) -> Cell:
    """Return the cell of LoRA with this rank on 16 bits."""
    return MAIN._replace(rank=rank)


def with_bits(bits: int) -> Cell:
    """Return the cell of LoRA with rank 16 on a base of these bits."""
    return MAIN._replace(bits=bits)


def margin_share(rows: Rows, bits: int) -> float:
    """Return the margin of LoRA on a base of these bits, as a share of that on 16 bits."""
    return value(rows, with_bits(bits), "margin") / value(rows, MAIN, "margin")


def gain_share(rows: Rows, bits: int) -> float:
    """Return the gain in reward over the 16-bit base, as a share of the gain on 16 bits."""
    start = value(rows, base_cell(MODEL_BITS), "reward")
    return (value(rows, with_bits(bits), "reward") - start) / (value(rows, MAIN, "reward") - start)


def distance_share(rows: Rows, bits: int) -> float:
    """Return the KL of policies on 16 and on these bits, over that of the policy and its base."""
    return value(rows, with_bits(bits), "distance") / value(rows, MAIN, "kl")


def distance_ratio(rows: Rows, bits: int) -> float:
    """Return the KL of policies on 16 and on these bits, over that of their bases."""
    return value(rows, with_bits(bits), "distance") / value(rows, base_cell(bits), "distance")


def fused_share(rows: Rows, cell: Cell, bits: int) -> float:
    """Return the share of the margin that is left after fusing at these bits."""
    return value(rows, cell, "margin", fused_bits=bits) / value(rows, cell, "margin")


def retention_error(rows: Rows) -> float:
    """Return how far the package's measure of the retained margin is from ours, at most."""
    return max(
        abs(value(rows, cell, "retained", fused_bits=bits) - fused_share(rows, cell, bits))
        for cell, bits in FUSIONS
    )


def memory_share(rows: Rows) -> float:
    """Return the peak memory of LoRA with rank 16 as a share of that of full fine-tuning."""
    return value(rows, MAIN, "peak_mb") / value(rows, full_cell(), "peak_mb")


HU = "Hu et al. 2021, Table 6"
DETTMERS = "Dettmers et al. 2023, Table 4"
BIDERMAN = "Biderman et al. 2024"
SCHULMAN = "Schulman et al. 2025"
HERE = "this study"

CLAIMS = (
    Claim(
        name="lora_and_full",
        text="Reward with LoRA of rank 16 minus reward with full fine-tuning, each at the best of "
        "its learning rates",
        source=SCHULMAN,
        measure=lora_minus_full,
        above=0,
        pooled=True,
    ),
    Claim(
        name="best_rate",
        text="Best learning rate of LoRA divided by the best one of full fine-tuning",
        source=SCHULMAN,
        measure=best_rate_ratio,
        above=1.2,
        below=6,
        pooled=True,
        full_only=True,
    ),
    Claim(
        name="forgets_less",
        text="KL divergence from the base with LoRA, divided by that of full fine-tuning at the "
        "same held-out margin",
        source=BIDERMAN,
        measure=kl_at_equal_margin,
        below=0.6,
        full_only=True,
    ),
    Claim(
        name="rank_4",
        text="Reward with rank 4 minus reward with rank 64",
        source=HU,
        measure=lambda rows: reward_gap(rows, with_rank(4), with_rank(64)),
        above=-0.08,
        pooled=True,
        full_only=True,
    ),
    Claim(
        name="rank_1",
        text="Reward with rank 1 minus reward with rank 64",
        source=HU,
        measure=lambda rows: reward_gap(rows, with_rank(1), with_rank(64)),
        above=-0.12,
        pooled=True,
        full_only=True,
    ),
    Claim(
        name="rank_1_kl",
        text="KL divergence from the base with rank 1, divided by that with rank 64",
        source=HERE,
        measure=rank_kl_ratio,
        above=1.5,
        full_only=True,
    ),
    Claim(
        name="gain",
        text="Reward with LoRA on 16 bits minus that of the base",
        source=HERE,
        measure=lambda rows: reward_gap(rows, MAIN, base_cell(MODEL_BITS)),
        above=0.2,
    ),
    Claim(
        name="8_bits",
        text="Held-out margin on a base of 8 bits, as a share of that on 16 bits",
        source=HERE,
        measure=lambda rows: margin_share(rows, 8),
        above=0.99,
        below=1.01,
        full_only=True,
    ),
    Claim(
        name="4_bits",
        text="The same on 4 bits",
        source=DETTMERS,
        measure=lambda rows: margin_share(rows, 4),
        above=0.95,
        below=1.05,
    ),
    Claim(
        name="4_bits_gain",
        text="Gain in reward over the base of 16 bits with a base of 4 bits, as a share of the "
        "gain with 16 bits",
        source=DETTMERS,
        measure=lambda rows: gain_share(rows, 4),
        above=0.8,
        pooled=True,
    ),
    Claim(
        name="4_bits_distance",
        text="KL divergence of the aligned model on 16 bits from that on 4 bits, as a share of its "
        "divergence from its own base",
        source=HERE,
        measure=lambda rows: distance_share(rows, 4),
        below=0.06,
    ),
    Claim(
        name="4_bits_bases",
        text="KL divergence of the aligned model on 16 bits from that on 4 bits, divided by the "
        "divergence of their bases",
        source=HERE,
        measure=lambda rows: distance_ratio(rows, 4),
        above=0.5,
        below=2.5,
    ),
    Claim(
        name="3_bits",
        text="Held-out margin on a base of 3 bits, as a share of that on 16 bits",
        source=HERE,
        measure=lambda rows: margin_share(rows, 3),
        above=0.9,
        below=1.1,
        full_only=True,
    ),
    Claim(
        name="2_bits",
        text="Reward on a base of 2 bits minus that on 16 bits",
        source=HERE,
        measure=lambda rows: reward_gap(rows, with_bits(2)),
        below=-0.05,
        pooled=True,
        full_only=True,
    ),
    Claim(
        name="fused_4_8",
        text="Share of the held-out margin that is left after training on 4 bits and fusing to "
        "8 bits",
        source=HERE,
        measure=lambda rows: fused_share(rows, QLORA, 8),
        above=0.99,
        below=1.01,
        full_only=True,
    ),
    Claim(
        name="fused_4_4",
        text="The same after training on 4 bits and fusing to 4 bits",
        source=HERE,
        measure=lambda rows: fused_share(rows, QLORA, 4),
        above=0.9,
        below=0.98,
        full_only=True,
    ),
    Claim(
        name="fused_16_4",
        text="The same after training on 16 bits and fusing to 4 bits",
        source=HERE,
        measure=lambda rows: fused_share(rows, MAIN, 4),
        above=0.95,
        below=1.05,
        full_only=True,
    ),
    Claim(
        name="retention",
        text="Largest difference between the share that `fuse` reports and ours",
        source=HERE,
        measure=retention_error,
        below=0.005,
        full_only=True,
    ),
    Claim(
        name="memory",
        text="Peak memory of training with LoRA of rank 16, as a share of that of full fine-tuning",
        source="Hu et al. 2021, Section 4.2",
        measure=memory_share,
        below=0.85,
    ),
)

STUDY = Study(
    name="lora_and_bits",
    title="LoRA, its rank, and the bits of the base",
    result=(
        "8, 4 and 3 bits train as well as 16; 2 bits do not. Rank 4 is about as good as 64 here. "
        "Fuse a 4-bit run to 8 bits."
    ),
    question=(
        "Hu et al. 2021 found rank 1 to 4 as good as rank 64 (Table 6). Dettmers et al. 2023 found "
        "that LoRA on a base of 4 bits is as good as on 16 bits (MMLU 53.1 against 53.0, Table 4). "
        "Biderman et al. 2024 found that LoRA learns less than full fine-tuning and forgets less. "
        "Schulman et al. 2025 found the two equal on small data, if LoRA has about ten times the "
        "learning rate. What holds for DPO on a small chat model, and how many bits does it take?"
    ),
    setup=(
        "The shipped model tiny-chat: 2.1 million weights in 16 bits, 4 layers, width 192. It "
        "answers politely or rudely at random. DPO with β = 1 in 24 steps of 16 of its 1,000 "
        "training pairs; the chosen answers are polite and correct. LoRA is on all linear layers "
        "of the blocks, with alpha 32 and scale alpha / rank. Quantization is MLX's affine one in "
        "groups of 64, of all matrices and the embedding. Learning rates are multiples of the "
        "package's default, which is ten times as high for LoRA as for full fine-tuning: 1, 2 and "
        "4 times for LoRA, 4, 8 and 16 times for full fine-tuning. These ranges were chosen so "
        "that the best rate is not at their end (seed 0: 1, 2, 4 and 8 times the default for both, "
        "in 32 steps; all seeds: 2 times for full fine-tuning, which is worse). The reward is the "
        "share of answers that are polite and correct by the rules of the data: one sampled answer "
        "at temperature 1 to each of 200 held-out prompts. Margins, losses and perplexities are "
        "exact, on 200 held-out pairs; a margin is β times the difference in log-ratio to the "
        "run's own base, and the perplexity is that of the chosen answers. KL divergences are of "
        "whole answers, from sampled answers to 100 prompts, with the divergence of each next "
        "token computed exactly. Seeds change adapters, order of pairs and samples. The column "
        "`step_ms` is a time, which differs from run to run."
    ),
    run=run,
    claims=CLAIMS,
    pictures=(
        Picture(
            name="bits",
            caption=(
                "By bits of the base, before and after training with LoRA of rank 16. Left: share "
                "of polite and correct answers, with Wilson's 95 % intervals of the answers of all "
                "seeds, 200 for each. Middle: perplexity of the held-out chosen answers, exact. "
                "Right: KL divergence of whole answers from the same model on 16 bits, in nats. "
                "Middle and right: mean and range over the seeds."
            ),
            draw=draw_bits,
            size=(9.0, 3.4),
        ),
        Picture(
            name="rates",
            caption=(
                "On 16 bits. Left: share of polite and correct answers by learning rate. Middle: "
                "share of correct answers by held-out margin, a point per seed and rate. Right: "
                "share of polite and correct answers by rank, at the middle rate. Bars are "
                "Wilson's 95 % intervals of the answers of all seeds, 200 for each."
            ),
            draw=draw_rates_and_ranks,
            size=(9.0, 3.4),
        ),
    ),
    deviations=(
        "Full fine-tuning is behind LoRA here, where Schulman et al. find both equal and Biderman "
        "et al. find it ahead. The runs are short: with 96 steps at four times its default rate "
        "(seed 0, not in the rows) full fine-tuning gets a reward of 0.77, LoRA 0.81 at twice its "
        "default.",
        "The best learning rate of LoRA is 2.5 times that of full fine-tuning, not ten times. The "
        "rates differ by a factor of 2, so that the ratio is known to a factor of 2 on either "
        "side; the papers tune for the loss, not for the reward.",
        "Biderman et al. find that lower ranks forget less. Here rank 1 goes farther from the base "
        "than rank 64, with the same settings and a margin that is 4 to 16 % larger; so does rank "
        "4, with 1.3 to 1.4 times the KL divergence. They measure forgetting on other tasks, after "
        "training on 100,000 rows and more; here it is the KL divergence from the base after 384 "
        "pairs.",
        "On 2 bits the margin is 1.3 to 2.1 times as large as on 16 bits, and the reward is lower: "
        "a margin is measured from the run's own base and does not compare bases. What is lost is "
        "the share of correct answers, which training does not bring back.",
        "Dettmers et al. use NormalFloat 4 and instruction tuning of models of 7 to 65 billion "
        "weights; here it is MLX's affine quantization and DPO of 2 million weights.",
        "Hu et al. adapt attention only; here all linear layers are adapted, as Schulman et al. "
        "advise.",
        "On the CPU backend the weights are unpacked to float32, so that peak memory does not "
        "depend on the bits. The column `weights_mb` is their size as stored.",
    ),
    sources=(
        "Hu et al. 2021, [arXiv:2106.09685](https://arxiv.org/abs/2106.09685)",
        "Dettmers et al. 2023, [arXiv:2305.14314](https://arxiv.org/abs/2305.14314)",
        "Biderman et al. 2024, [arXiv:2405.09673](https://arxiv.org/abs/2405.09673)",
        "Schulman et al. 2025, [LoRA Without Regret](https://thinkingmachines.ai/blog/lora/)",
    ),
)

if __name__ == "__main__":
    main(STUDY)
