"""Build models/tiny-critic: tiny-chat, trained on to criticise, revise and obey.

    python -m scripts.tools.tiny_critic.build

It starts from the weights and the tokenizer of models/tiny-chat, writes its own text from a seed,
and measures the result on questions and sentences that it never saw. Nothing is downloaded.
"""

import argparse
import json
import math
import os
import random
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

# Two streams train at once, so one BLAS thread each is all that two cores can give.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx_dpo  # noqa: F401  the fast BLAS is loaded with it, before MLX

# isort: split
import mlx.core as mx
from mlx_lm import load
from tokenizers import Tokenizer

from scripts.tools.tiny_chat import build as tiny_chat
from scripts.tools.tiny_chat import corpus, pretrain, tokenizer
from scripts.tools.tiny_critic import dialogues, measure, wordings

FOLDER = tiny_chat.FOLDER.with_name("tiny-critic")
STARTED_FROM = (
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "rules.json"),
)
RATES = pretrain.Rates(peak=1.5e-3)
BATCH = 32  # dialogues
TRAIN_PROMPTS, VALID_PROMPTS = 600, 120


class Stage(NamedTuple):
    """So many updates on a mix of dialogues. A stage starts from the weights of the one before."""

    steps: int
    kinds: dialogues.Kinds
    rates: pretrain.Rates = RATES


STAGES = (
    Stage(700, {"plain": 0.34, "system": 0.18, "revise": 0.34, "judge": 0.14}),
    # Short dialogues: after the first stage system prompts had no effect.
    Stage(500, {"plain": 0.3, "contrast": 0.25, "system": 0.33, "revise": 0.12}),
    # Revisions again: after the second stage they lost a quarter of the right values.
    Stage(
        90,
        {"plain": 0.25, "contrast": 0.1, "system": 0.2, "revise": 0.45},
        RATES._replace(warmup=10),
    ),
)


def prompts(questions: corpus.Questions, count: int, seed: str) -> list[str]:
    """`count` different prompts of one message."""
    rng = random.Random(f"prompts {seed}")
    found: dict[str, None] = {}
    while len(found) < count:
        messages = corpus.prompt_messages(corpus.draw(questions, rng), rng)
        if len(messages) == 1:
            found[messages[0]["content"]] = None
    return list(found)


def write_prompts(folder: Path, world: corpus.World, seed: int) -> None:
    """prompts/train.txt and prompts/valid.txt, one prompt a line."""
    (folder / "prompts").mkdir(exist_ok=True)
    for name, questions, count in (
        ("train", world.trained, TRAIN_PROMPTS),
        ("valid", world.held_out, VALID_PROMPTS),
    ):
        lines = [f"{prompt}\n" for prompt in prompts(questions, count, f"{name} {seed}")]
        (folder / "prompts" / f"{name}.txt").write_text("".join(lines), encoding="utf-8")


def write_principles(folder: Path) -> None:
    lines = [f"{principle}\n" for principle in wordings.SHIPPED_COURTESY]
    (folder / "principles.txt").write_text("".join(lines), encoding="utf-8")


def loaded(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer from disk, in float32: the CPU backend is fast in it only."""
    model, tokens = load(str(folder))
    model.set_dtype(mx.float32)
    return model, tokens


def train(folder: Path, world: corpus.World, sentences: wordings.Wordings, seed: int) -> float:
    """Trains the checkpoint in the folder, stage by stage. -> the loss of the last one"""
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pad = tokenizer.SPECIAL_TOKENS.index(tokenizer.PAD)
    loss = math.nan
    for number, stage in enumerate(STAGES, seed):
        model, _ = loaded(folder)
        text = dialogues.dialogues(world, sentences, stage.kinds, number)
        stream = tiny_chat.encoded(tokens, text)
        loss = pretrain.train(
            model, stream, steps=stage.steps, size=BATCH, pad=pad, seed=number, rates=stage.rates
        )
        tiny_chat.write_checkpoint(folder, model, tokens)
    return loss


def build(folder: Path, start: Path, *, seed: int) -> dict[str, Any]:
    """Text, weights, prompts, figures. -> what build.json says"""
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for name in STARTED_FROM:
        shutil.copyfile(start / name, folder / name)
    world, sentences = corpus.build_world(seed), wordings.build_wordings(seed)
    write_prompts(folder, world, seed)
    write_principles(folder)
    loss = train(folder, world, sentences, seed)
    facts = described(seed, loss, time.monotonic() - began)
    facts |= measure.figures(*loaded(folder), world, sentences, seed)
    tiny_chat.write_json(folder / "build.json", facts)
    return facts


def described(seed: int, loss: float, seconds: float) -> dict[str, Any]:
    """How a copy was built."""
    return {
        "seed": seed,
        "steps": [stage.steps for stage in STAGES],
        "dialogues": sum(stage.steps for stage in STAGES) * BATCH,
        "final_loss": round(loss, 4),
        "seconds": round(seconds),
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "tokenizers")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="where to write (models/tiny-critic)"
    )
    parser.add_argument(
        "--start", type=Path, default=tiny_chat.FOLDER, help="where to start (models/tiny-chat)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of text and order (0)")
    given = parser.parse_args()
    facts = build(given.out, given.start, seed=given.seed, steps=given.steps, size=given.batch_size)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
