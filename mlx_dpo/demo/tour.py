"""The stages of the demo as values: what was converted, said before, trained, said after."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_dpo.adapters.attach import disable_adapters
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.sources import read_rows
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.tokenize import tokenize_pair
from mlx_dpo.demo.rules import courteous_markers, is_courteous, is_right
from mlx_dpo.errors import RunError
from mlx_dpo.export.convert import ConvertReport, convert
from mlx_dpo.generation.batch import generate_batch
from mlx_dpo.io.arrays import scalar
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.paths import tiny_chat
from mlx_dpo.runs.inputs import token_rules
from mlx_dpo.saved_runs.open import load_policy
from mlx_dpo.scoring.score_pairs import score_pairs
from mlx_dpo.types import PreferenceExample, TokenizedPair

MARK = "demo.txt"  # says that a folder is the demo's and may be replaced
SAMPLING = Sampling(temperature=1.0, max_tokens=64, seed=0)
SAMPLES = 2  # answers to each prompt
BITS = 8


@dataclass(frozen=True)
class Answers:
    """What a model said to the held-out prompts, sampled at temperature 1."""

    texts: list[str]
    courteous: float  # share, by the rule beside the model
    right: float  # share, by what each row expects


@dataclass
class Tour:
    """The folder of the demo and what is found out in it, stage by stage."""

    folder: Path
    source: Path = field(default_factory=lambda: tiny_chat())

    def __post_init__(self) -> None:
        self.rows = [row.record for row in read_rows(self.source / "preferences" / "valid.jsonl")]
        self.asked = self.rows * SAMPLES
        self.markers = courteous_markers(self.source)

    @property
    def model(self) -> Path:
        """The converted model."""
        return self.folder / "model"

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def clear(self) -> bool:
        """Begin with an empty folder; an earlier demo in it is removed, anything else is not.

        Returns:
            Whether there was one.

        Raises:
            RunError: the folder holds something that is not the demo's.
        """
        earlier = self.folder.exists() and any(self.folder.iterdir())
        if earlier:
            if not (self.folder / MARK).is_file():
                raise RunError(f"{self.folder}: not empty and not of an earlier demo; "
                               "choose another --output")  # fmt: skip
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / MARK).write_text("Written by `mlx-dpo demo`, which may replace it.\n")
        return earlier

    def convert(self) -> ConvertReport:
        """The shipped checkpoint, quantised."""
        return convert(str(self.source), self.model, bits=BITS)

    def config(self) -> DPOConfig:
        """Settings for a model of two million weights: larger steps than a real one bears."""
        return DPOConfig(
            model=str(self.model),
            pairs=(str(self.source / "preferences"),),
            output=str(self.run),
            learning_rate=1e-3,
            beta=1.0,
            epochs=2,
            micro_batch_size=8,
            max_length=128,
            logging_steps=20,
        )

    def ask(self, *, reference: bool) -> Answers:
        """Sampled answers of the base, or of the aligned policy, to every held-out prompt."""
        plain = str(self.model) if reference else None
        base = load_policy(None if reference else str(self.run), model=plain)
        prompts = [row["prompt"] for row in self.asked]
        return self.judged(generate_batch(base.model, base.tokenizer, prompts, sampling=SAMPLING))

    def judged(self, texts: list[str]) -> Answers:
        """Texts with the shares of them that follow the two rules."""
        polite = [is_courteous(text, self.markers) for text in texts]
        right = [is_right(text, row) for text, row in zip(texts, self.asked, strict=True)]
        return Answers(texts, sum(polite) / len(polite), sum(right) / len(right))

    def divergence(self, answers: Answers) -> float:
        """Mean over the policy's own sampled answers of log policy - log base, in nats.

        An unbiased estimate of the sequence-level KL divergence of policy from base.
        """
        base = load_policy(str(self.run))
        rules = token_rules(self.config(), base)
        # Each answer stands in for both completions of a pair; one of the two is read.
        pairs = [
            TokenizedPair(prompt, completion, completion)
            for prompt, completion in (
                self._encoded(base, row, text, rules)
                for row, text in zip(self.asked, answers.texts, strict=True)
                if text.strip()
            )
        ]
        policy = score_pairs(base.model, pairs, limit=PassLimit(pairs=8))
        with disable_adapters(base.model):
            reference = score_pairs(base.model, pairs, limit=PassLimit(pairs=8))
        return scalar((policy.chosen - reference.chosen).mean())

    def _encoded(
        self, base: LoadedModel, row: dict[str, Any], text: str, rules: TokenRules
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        reply = ({"role": "assistant", "content": text},)
        other = ({"role": "assistant", "content": text + "."},)
        prompt = tuple(row["prompt"])
        pair = tokenize_pair(
            base.tokenizer, PreferenceExample(prompt, reply, other, location="demo"), rules
        ).pair
        return pair.prompt, pair.chosen
