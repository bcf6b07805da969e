"""Stages of the demo: convert the shipped model, sample and rate answers, estimate the KL."""

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
from mlx_dpo.demo.rules import courteous_markers, is_correct, is_courteous
from mlx_dpo.errors import RunError
from mlx_dpo.export.convert import ConvertReport, convert
from mlx_dpo.generation.batch import generate_batch
from mlx_dpo.generation.context import context_length
from mlx_dpo.io.arrays import scalar
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.paths import tiny_chat
from mlx_dpo.runs.inputs import token_rules
from mlx_dpo.saved_runs.open import load_policy
from mlx_dpo.scoring.score_pairs import score_pairs
from mlx_dpo.types import PreferenceExample, TokenizedPair

MARKER_FILE = "demo.txt"  # marks a folder that the demo wrote and may replace
SAMPLING = Sampling(temperature=1.0, max_tokens=64, seed=0)
SAMPLES = 2  # answers per prompt
BITS = 8


@dataclass(frozen=True)
class Answers:
    """Sampled answers to the held-out prompts, and the shares of courteous and correct answers."""

    texts: list[str]
    courteous: float  # share, by the phrases in the model's `rules.json`
    correct: float  # share, by the words that each row expects


@dataclass(frozen=True)
class PolitenessChanges:
    """Indices of the answers that are polite after training only, or before it only."""

    became_polite: list[int]
    became_rude: list[int]


@dataclass
class Demo:
    """The demo, with one method per stage and a folder for its files."""

    folder: Path
    source: Path = field(default_factory=lambda: tiny_chat())

    def __post_init__(self) -> None:
        self.rows = [row.record for row in read_rows(self.source / "preferences" / "valid.jsonl")]
        self.prompt_rows = self.rows * SAMPLES
        self.markers = courteous_markers(self.source)

    @property
    def model(self) -> Path:
        """Folder of the converted model."""
        return self.folder / "model"

    @property
    def run(self) -> Path:
        """Run folder of the training."""
        return self.folder / "run"

    def clear(self) -> bool:
        """Create the demo's folder, and delete an earlier demo in it.

        Returns:
            Whether there was an earlier demo.

        Raises:
            RunError: the folder has files that the demo did not write.
        """
        earlier = self.folder.exists() and any(self.folder.iterdir())
        if earlier:
            if not (self.folder / MARKER_FILE).is_file():
                raise RunError(f"{self.folder}: not empty and not of an earlier demo; "
                               "choose another --output")  # fmt: skip
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / MARKER_FILE).write_text("Written by `mlx-dpo demo`, which may replace it.\n")
        return earlier

    def convert(self) -> ConvertReport:
        """Quantize the shipped model and write the result into the model folder."""
        return convert(str(self.source), self.model, bits=BITS)

    def config(self) -> DPOConfig:
        """Return the training settings; the learning rate suits a model of two million weights."""
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
        """Sample and rate answers of the reference or of the policy to every held-out prompt."""
        plain = str(self.model) if reference else None
        base = load_policy(None if reference else str(self.run), model=plain)
        prompts = [row["prompt"] for row in self.prompt_rows]
        context = context_length(base.config)
        return self.rate(
            generate_batch(base.model, base.tokenizer, prompts, sampling=SAMPLING, context=context)
        )

    def rate(self, texts: list[str]) -> Answers:
        """Return the answers, with the share of courteous and the share of correct ones."""
        courteous = [is_courteous(text, self.markers) for text in texts]
        correct = [is_correct(text, row) for text, row in zip(texts, self.prompt_rows, strict=True)]
        return Answers(texts, sum(courteous) / len(courteous), sum(correct) / len(correct))

    def politeness_changes(self, before: Answers, after: Answers) -> PolitenessChanges:
        """Compare the answers of base and policy, prompt by prompt in the order of the data set."""
        changes = PolitenessChanges([], [])
        for index, (old, new) in enumerate(zip(before.texts, after.texts, strict=True)):
            was, now = is_courteous(old, self.markers), is_courteous(new, self.markers)
            if now and not was:
                changes.became_polite.append(index)
            elif was and not now:
                changes.became_rude.append(index)
        return changes

    def divergence(self, answers: Answers) -> float:
        """Return the mean log-ratio log π − log π_ref of answers sampled from the policy, in nats.

        This is an unbiased estimate of the sequence-level KL divergence from the base.
        """
        base = load_policy(str(self.run))
        rules = token_rules(self.config(), base)
        # The scorer takes pairs: the answer is both completions, and only `chosen` is read.
        pairs = [
            TokenizedPair(prompt, completion, completion)
            for prompt, completion in (
                self._tokenize(base, row, text, rules)
                for row, text in zip(self.prompt_rows, answers.texts, strict=True)
                if text.strip()
            )
        ]
        policy = score_pairs(base.model, pairs, limit=PassLimit(pairs=8))
        with disable_adapters(base.model):
            reference = score_pairs(base.model, pairs, limit=PassLimit(pairs=8))
        return scalar((policy.chosen - reference.chosen).mean())

    def _tokenize(
        self, base: LoadedModel, row: dict[str, Any], text: str, rules: TokenRules
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        reply = ({"role": "assistant", "content": text},)
        other = ({"role": "assistant", "content": text + "."},)
        prompt = tuple(row["prompt"])
        pair = tokenize_pair(
            base.tokenizer, PreferenceExample(prompt, reply, other, location="demo"), rules
        ).pair
        return pair.prompt, pair.chosen
