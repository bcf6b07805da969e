"""The runs of the study of LoRA and bits: train, fuse and measure them."""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_dpo import load_policy
from mlx_dpo.evaluation.winrate import wilson_interval
from mlx_dpo.export.fuse import fuse_run
from mlx_dpo.export.options import FuseOptions
from mlx_dpo.models.load import LoadedModel, load_model
from mlx_dpo.models.quantize import expected_bytes
from mlx_dpo.optim.default_learning_rate import RateFactors, choose_learning_rate
from mlx_dpo.paths import tiny_chat
from scripts.studies.parts.lora_and_bits.shipped_model import (
    Answers,
    Text,
    mean_kl,
    preferences,
    sample_answers,
    text_logps,
    tokenize,
)
from scripts.studies.reporting.study import Row
from scripts.studies.toy.train import train_by_steps

BETA, STEPS, BATCH = 1.0, 24, 16
PROMPTS, KL_PROMPTS = 200, 100  # held-out prompts that are answered, and those of the KL
MODEL_BITS = 16  # of the shipped weights
WIDTH, ALPHA = 192, 32.0  # of its hidden states; of LoRA, by default
GROUP = 64  # weights that share a scale, by default
BASE, LORA, FULL, FUSED = "base", "lora", "full", "fused"
# Multiples of the package's default learning rate; the middle ones had the best reward.
LORA_RATES, FULL_RATES = (1, 2, 4), (4, 8, 16)
LORA_RATE, FULL_RATE = 2, 8
RANK, RANKS = 16, (1, 4, 16, 64)
BITS = (8, 4, 3, 2)


class Cell(NamedTuple):
    """A run: what is trained, on how many bits, at which multiple of the default rate."""

    method: str
    rank: int
    bits: int
    multiple: int


MAIN = Cell(LORA, RANK, MODEL_BITS, LORA_RATE)
QLORA = MAIN._replace(bits=4)
QUICK_CELLS = (MAIN, QLORA, Cell(FULL, 0, MODEL_BITS, FULL_RATE))
CELLS = (
    MAIN,
    *(MAIN._replace(bits=bits) for bits in BITS),
    *(MAIN._replace(rank=rank) for rank in RANKS if rank != RANK),
    *(MAIN._replace(multiple=multiple) for multiple in LORA_RATES if multiple != LORA_RATE),
    *(Cell(FULL, 0, MODEL_BITS, multiple) for multiple in FULL_RATES),
)
FUSIONS = ((MAIN, 8), (MAIN, 4), (QLORA, 8), (QLORA, 4))
# Columns that are not measured of fused models.
SAMPLED = (
    *("perplexity", "kl", "distance", "courteous", "correct", "reward", "reward_low"),
    *("reward_high", "learning_rate", "trainable", "peak_mb", "step_ms"),
)


@dataclass(frozen=True)
class Policy:
    """A model with its log-probs of the held-out pairs and its sampled answers."""

    loaded: LoadedModel
    logps: np.ndarray  # (pairs, 2), chosen and rejected
    answers: Answers

    @property
    def kl_texts(self) -> list[Text]:
        """The sampled answers that divergences are estimated from."""
        return self.answers.texts[:KL_PROMPTS]


class Bench:
    """Trains and measures the cells of one seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.model = tiny_chat()
        tokenizer = load_policy(None, model=str(self.model)).tokenizer
        held_out = preferences("valid")
        self.texts = tokenize(tokenizer, held_out, "chosen")
        self.texts += tokenize(tokenizer, held_out, "rejected")
        chosen = tokenize(tokenizer, preferences("train"), "chosen")
        self.mean_tokens = fmean(len(text.answer) for text in chosen)
        self.policies: dict[Cell, Policy] = {}
        self.rows: dict[Cell, Row] = {}

    def logps(self, loaded: LoadedModel) -> np.ndarray:
        """Return the log-probs of the held-out answers, chosen and rejected. (pairs, 2)"""
        return text_logps(loaded.model, self.texts).reshape(2, -1).T

    def measure(self, loaded: LoadedModel) -> Policy:
        """Score the held-out pairs and sample answers to the held-out prompts."""
        return Policy(
            loaded,
            self.logps(loaded),
            sample_answers(loaded, count=PROMPTS, seed=self.seed),
        )

    def base(self, bits: int) -> Policy:
        """Return the base model at these bits; each is measured once."""
        cell = Cell(BASE, 0, bits, 0)
        if cell not in self.policies:
            loaded = load_model(str(self.model), bits=None if bits == MODEL_BITS else bits)
            self.policies[cell] = self.measure(loaded)
        return self.policies[cell]

    def rate(self, cell: Cell) -> float:
        """Return the learning rate: a multiple of the one that the package chooses."""
        alpha = None if cell.method == FULL else ALPHA
        run = RateFactors(WIDTH, alpha, STEPS, self.mean_tokens)
        return cell.multiple * choose_learning_rate(run)

    def run_folder(self, cell: Cell) -> Path:
        """Return the run folder of a cell."""
        return self.folder / "-".join(map(str, (self.seed, *cell)))

    def train(self, cell: Cell) -> Row:
        """Train a cell and measure its policy; return what training cost."""
        settings: dict[str, Any] = {"fine_tune_type": cell.method}
        if cell.method == LORA:
            settings["lora_r"] = cell.rank
        if cell.bits != MODEL_BITS:
            settings["bits"] = cell.bits
        times, peak, trained = [time.monotonic()], 0.0, 0
        held = mx.get_active_memory()  # by models that were measured before
        for _, policy, row in train_by_steps(
            self.model,
            preferences("train"),
            self.run_folder(cell),
            beta=BETA,
            batch_size=BATCH,
            max_steps=STEPS,
            learning_rate=self.rate(cell),
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            max_length=128,
            seed=self.seed,
            **settings,
        ):
            times.append(time.monotonic())
            peak = float(row["peak_memory_gb"])
            trained = sum(value.size for _, value in tree_flatten(policy.trainable_parameters()))
        self.policies[cell] = self.measure(load_policy(str(self.run_folder(cell))))
        return {
            "learning_rate": self.rate(cell),
            "trainable": trained,
            "peak_mb": 1000 * peak - held / 1e6,
            "step_ms": 1000 * float(median(np.diff(times[1:]))),
        }

    def row(self, cell: Cell, costs: Row) -> Row:
        """Return the row of a measured policy or base."""
        policy, base = self.policies[cell], self.base(cell.bits)
        gain = policy.logps - base.logps
        both = policy.answers.courteous & policy.answers.correct
        low, high = wilson_interval(int(both.sum()), len(both))
        tokens = sum(len(text.answer) for text in self.texts[: len(gain)])
        self.rows[cell] = {
            "seed": self.seed,
            **cell._asdict(),
            "fused_bits": 0,
            **self._margins(gain),
            "perplexity": float(np.exp(-policy.logps[:, 0].sum() / tokens)),
            "kl": self._kl(policy, base),
            "distance": self._distance(cell),
            "courteous": float(policy.answers.courteous.mean()),
            "correct": float(policy.answers.correct.mean()),
            "reward": float(both.mean()),
            "reward_low": low,
            "reward_high": high,
            "weights_mb": self._weight_bytes(cell.bits) / 1e6,
            **{name: 0.0 for name in ("learning_rate", "trainable", "peak_mb", "step_ms")},
            "retained": float("nan"),
        } | costs
        return self.rows[cell]

    def _margins(self, gain: np.ndarray) -> Row:
        """Return loss, accuracy and mean margin from log-ratios of the pairs. (pairs, 2)"""
        margins = BETA * (gain[:, 0] - gain[:, 1])
        return {
            "loss": float(np.logaddexp(0, -margins).mean()),
            "accuracy": float((margins > 0).mean()),
            "margin": float(margins.mean()),
        }

    def _kl(self, policy: Policy, base: Policy) -> float:
        if policy is base:
            return 0.0
        return mean_kl(policy.loaded.model, base.loaded.model, policy.kl_texts)

    def _distance(self, cell: Cell) -> float:
        """Return KL(same run or base on 16 bits ‖ this one); NaN unless all but bits is equal."""
        anchor = self.policies.get(cell._replace(bits=MODEL_BITS))
        if anchor is None:
            return float("nan")
        return mean_kl(anchor.loaded.model, self.policies[cell].loaded.model, anchor.kl_texts)

    def _weight_bytes(self, bits: int) -> int:
        model = self.base(MODEL_BITS).loaded.model
        return expected_bytes(model, None if bits == MODEL_BITS else bits, GROUP, "float16")

    def fuse(self, cell: Cell, bits: int) -> Row:
        """Fuse a run at these bits with the package, and measure the written model."""
        pairs = str(self.model / "preferences" / "valid.jsonl")
        output = self.folder / f"fused-{self.seed}-{cell.bits}-{bits}"
        options = FuseOptions(bits=bits, pairs=pairs, force=True)
        fused = fuse_run(str(self.run_folder(cell)), output, options)
        written = self.logps(load_model(str(output)))
        gain = written - self.base(cell.bits).logps
        row = self.rows[cell] | dict.fromkeys(SAMPLED, float("nan")) | self._margins(gain)
        row |= {"method": FUSED, "fused_bits": bits, "weights_mb": fused.bytes / 1e6}
        return row | {"retained": fused.retention.margin}
