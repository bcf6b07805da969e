"""LoRA against full fine-tuning, ranks, and the bits of the base.

python -m scripts.studies.lora_and_bits [--quick]
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from scripts.studies.lora.cells import (
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
from scripts.studies.lora.pictures import (
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


def reward_gap(rows: Rows, cell: Cell) -> float:
    """Return the reward of a cell minus that of LoRA with rank 16 on 16 bits."""
    return value(rows, cell, "reward") - value(rows, MAIN, "reward")


def margin_share(rows: Rows, bits: int) -> float:
    """Return the margin of LoRA on a base of these bits, as a share of that on 16 bits."""
    return value(rows, MAIN._replace(bits=bits), "margin") / value(rows, MAIN, "margin")


def gain_share(rows: Rows, bits: int) -> float:
    """Return the gain in reward over the 16-bit base, as a share of the gain on 16 bits."""
    start = value(rows, base_cell(MODEL_BITS), "reward")
    gain = value(rows, MAIN._replace(bits=bits), "reward") - start
    return gain / (value(rows, MAIN, "reward") - start)


def distance_ratio(rows: Rows, bits: int) -> float:
    """Return the KL of the aligned models on 16 and on these bits, over that of their bases."""
    aligned = value(rows, MAIN._replace(bits=bits), "distance")
    return aligned / value(rows, base_cell(bits), "distance")


def fused_share(rows: Rows, cell: Cell, bits: int) -> float:
    """Return the share of the margin that is left after fusing at these bits."""
    return value(rows, cell, "margin", fused_bits=bits) / value(rows, cell, "margin")


HU = "Hu et al. 2021, Table 6"
DETTMERS = "Dettmers et al. 2023, Table 4"
BIDERMAN = "Biderman et al. 2024"
SCHULMAN = "Schulman et al. 2025"
HERE = "this study"

STUDY = Study(
    name="lora_and_bits",
    title="LoRA, its rank, and the bits of the base",
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
        "training pairs, in which the chosen answer is polite and correct. LoRA is on all linear "
        "layers of the blocks, with alpha 32 and scale alpha / rank. Quantization is MLX's affine "
        "one in groups of 64, of all matrices and the embedding. Learning rates are multiples of "
        "the package's default, which is ten times as high for LoRA as for full fine-tuning: 1, 2 "
        "and 4 times for LoRA, 2, 4 and 8 times for full fine-tuning. The middle ones had the best "
        "reward on seed 0 with 32 steps, among 1, 2, 4 and 8 times the default for both. The "
        "reward is the share of answers that are polite and correct by the rules of the data: one "
        "answer at temperature 1 to each of 200 held-out prompts, which is sampled. Margins, "
        "losses and perplexities are exact, on 200 held-out pairs; the perplexity is that of the "
        "chosen answers. KL divergences are of whole answers, from answers to 100 prompts, with "
        "the divergence of each next token computed exactly. Seeds change adapters, order of pairs "
        "and samples. The column `step_ms` is a time, which differs from run to run."
    ),
    run=run,
    claims=(
        Claim(
            name="lora_equals_full",
            text="Reward with LoRA of rank 16 minus reward with full fine-tuning, each at the best "
            "of its learning rates",
            source=SCHULMAN,
            measure=lora_minus_full,
            above=-0.05,
            pooled=True,
        ),
        Claim(
            name="best_rate",
            text="Best learning rate of LoRA divided by the best one of full fine-tuning",
            source=SCHULMAN,
            measure=best_rate_ratio,
            above=2,
            below=22,
            pooled=True,
            full_only=True,
        ),
        Claim(
            name="forgets_less",
            text="KL divergence from the base with LoRA, divided by that of full fine-tuning at "
            "the same held-out margin",
            source=BIDERMAN,
            measure=kl_at_equal_margin,
            below=1,
            full_only=True,
        ),
        Claim(
            name="rank_4",
            text="Reward with rank 4 minus reward with rank 64",
            source=HU,
            measure=lambda rows: (
                reward_gap(rows, MAIN._replace(rank=4)) - reward_gap(rows, MAIN._replace(rank=64))
            ),
            above=-0.06,
            pooled=True,
            full_only=True,
        ),
        Claim(
            name="rank_1",
            text="Reward with rank 1 minus reward with rank 64",
            source=HU,
            measure=lambda rows: (
                reward_gap(rows, MAIN._replace(rank=1)) - reward_gap(rows, MAIN._replace(rank=64))
            ),
            above=-0.12,
            pooled=True,
            full_only=True,
        ),
        Claim(
            name="8_bits",
            text="Held-out margin on a base of 8 bits, as a share of that on 16 bits",
            source=HERE,
            measure=lambda rows: margin_share(rows, 8),
            above=0.98,
            below=1.02,
            full_only=True,
        ),
        Claim(
            name="4_bits",
            text="Held-out margin on a base of 4 bits, as a share of that on 16 bits",
            source=DETTMERS,
            measure=lambda rows: margin_share(rows, 4),
            above=0.9,
            below=1.1,
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
            name="2_bits",
            text="Reward on a base of 2 bits minus that on 16 bits",
            source=HERE,
            measure=lambda rows: reward_gap(rows, MAIN._replace(bits=2)),
            below=-0.04,
            pooled=True,
            full_only=True,
        ),
        Claim(
            name="gain",
            text="Reward with LoRA on 16 bits minus that of the base",
            source=HERE,
            measure=lambda rows: -reward_gap(rows, base_cell(MODEL_BITS)),
            above=0.2,
        ),
        Claim(
            name="fused_8",
            text="Share of the held-out margin that is left after training on 4 bits and fusing "
            "to 8 bits",
            source=HERE,
            measure=lambda rows: fused_share(rows, QLORA, 8),
            above=0.98,
            below=1.02,
            full_only=True,
        ),
        Claim(
            name="fused_4",
            text="The same after fusing to 4 bits",
            source=HERE,
            measure=lambda rows: fused_share(rows, QLORA, 4),
            above=0.9,
            below=1.1,
            full_only=True,
        ),
        Claim(
            name="memory",
            text="Peak memory of training with LoRA of rank 16, as a share of that of full "
            "fine-tuning",
            source="Hu et al. 2021, Section 4.2",
            measure=lambda rows: value(rows, MAIN, "peak_mb") / value(rows, full_cell(), "peak_mb"),
            below=0.85,
        ),
    ),
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
        "Dettmers et al. use NormalFloat 4 and instruction tuning of models of 7 to 65 billion "
        "weights; here it is MLX's affine quantization and DPO of 2 million weights, where "
        "quantization is harder because fewer weights share an error.",
        "Hu et al. adapt attention only; here all linear layers are adapted, as Schulman et al. "
        "advise.",
        "Biderman et al. measure forgetting on other tasks and train on 100,000 rows and more; "
        "here forgetting is the KL divergence from the base and the loss of correct answers, and "
        "the pairs are 384.",
        "On the CPU backend the weights are unpacked to float32, so that peak memory does not "
        "depend on the bits. The column `weights_mb` is what they take on disk and on a GPU.",
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
