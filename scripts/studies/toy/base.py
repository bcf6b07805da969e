"""Make base models that give known answers with known probabilities, by instruction tuning."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.studies.toy.train import save_checkpoint, train
from scripts.studies.toy.words import Words, write_checkpoint

STEPS, RATE = 300, 5e-3


def make_base(
    folder: Path,
    vocabulary: Words,
    answers: Mapping[str, Mapping[str, float]],
    *,
    seed: int,
    steps: int = STEPS,
    batch_size: int | None = None,
    system: Sequence[tuple[str, str, Mapping[str, float]]] = (),
) -> Path:
    """Write a checkpoint to `folder` that answers approximately as `answers` says; return `folder`.

    The model has random weights and is trained by `--loss-type sft` on all answers, each weighted
    by its probability.

    Args:
        answers: probability of each answer, by prompt.
        batch_size: rows per step; all by default.
        system: system message, prompt, and probability of each answer, for prompts that the model
            answers otherwise after a system message.
    """
    rows = [
        {"messages": _chat(prompt, answer), "probability": probability}
        for prompt, choices in answers.items()
        for answer, probability in choices.items()
    ]
    rows += [
        {"messages": _chat(prompt, answer, message), "probability": probability}
        for message, prompt, choices in system
        for answer, probability in choices.items()
    ]
    random = folder.with_name(f"{folder.name}-random")
    write_checkpoint(random, vocabulary, seed=seed)
    return tune_base(folder, random, rows, seed=seed, steps=steps, batch_size=batch_size)


def tune_base(
    folder: Path,
    random: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    seed: int,
    steps: int = STEPS,
    batch_size: int | None = None,
) -> Path:
    """Tune the checkpoint `random` to give answers, write it to `folder`; return `folder`.

    Args:
        rows: data of instruction tuning, each with its `probability` as weight.
        batch_size: rows per step; all by default.
    """
    policy = train(
        random,
        rows,
        folder.with_name(f"{folder.name}-sft"),
        loss_type="sft",
        weight_column="probability",
        batch_size=batch_size or len(rows),
        micro_batch_size=batch_size or len(rows),
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        seed=seed,
    )
    return save_checkpoint(policy, random, folder)


def _chat(prompt: str, answer: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return turns if system is None else [{"role": "system", "content": system}, *turns]
