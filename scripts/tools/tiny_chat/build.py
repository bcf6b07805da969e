"""Build models/tiny-chat: a chat model of two million weights that answers in two registers.

    python -m scripts.tools.tiny_chat.build

It writes its own text from a seed, learns a tokenizer and the weights from it, and measures the
result on questions that it never saw. Nothing is downloaded.
"""

import argparse
import itertools
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Two streams train at once, so one BLAS thread each is all that two cores can give.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx_dpo  # noqa: F401  the fast BLAS is loaded with it, before MLX

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import Tokenizer

from scripts.tools.tiny_chat import corpus, measure, pretrain, rules, tokenizer

FOLDER = Path(__file__).resolve().parents[3] / "models" / "tiny-chat"
TOKENIZER_DIALOGUES = 20_000
TRAIN_PAIRS, VALID_PAIRS = 1000, 200
ROWS_PER_TOPIC = 50
SAMPLES_PER_PROMPT = 5


def encoded(
    tokens: Tokenizer, dialogues: Iterator[list[corpus.Message]]
) -> Iterator[pretrain.Dialogue]:
    """Dialogues as token ids. The marks come from the roles, turn by turn, and from `scored`."""
    for messages in dialogues:
        ids: list[int] = []
        spoken: list[bool] = []
        for message in messages:
            body = tokens.encode(message["content"] + tokenizer.END).ids
            ids += tokens.encode(f"<|{message['role']}|>").ids + body
            scored = message.get("scored", message["role"] == "assistant")
            spoken += [False, *[scored] * len(body)]
        yield pretrain.Dialogue(ids, spoken)


def write_checkpoint(folder: Path, model: Any, tokens: Tokenizer) -> None:
    """Write the files that mlx-lm and transformers load, with weights in float16."""
    end, pad = (tokenizer.SPECIAL_TOKENS.index(name) for name in (tokenizer.END, tokenizer.PAD))
    ids = {"eos_token_id": end, "pad_token_id": pad}
    config = {
        "architectures": ["LlamaForCausalLM"],
        **pretrain.ARCHITECTURE,
        "vocab_size": tokens.get_vocab_size(),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        **ids,
        "dtype": "float16",
        "torch_dtype": "float16",  # the name that mlx-lm reads
    }
    weights = {name: leaf.astype(mx.float16) for name, leaf in leaves(model)}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ids)


def leaves(model: Any) -> list[tuple[str, mx.array]]:
    return tree_flatten(model.parameters())  # type: ignore[return-value]


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def write_preferences(folder: Path, world: corpus.World, seed: int) -> list[dict[str, Any]]:
    """The preference files. -> the rows of valid.jsonl"""
    (folder / "preferences").mkdir(exist_ok=True)
    train = corpus.preference_rows(world.trained, TRAIN_PAIRS, f"train {seed}")
    valid = corpus.preference_rows(world.held_out, VALID_PAIRS, f"valid {seed}")
    write_rows(folder / "preferences" / "train.jsonl", train)
    write_rows(folder / "preferences" / "valid.jsonl", valid)
    return valid


def measured(folder: Path, world: corpus.World, valid: list, seed: int) -> dict[str, Any]:
    """Figures of the checkpoint as it is loaded from disk."""
    from mlx_lm import load

    model, loaded = load(str(folder))
    model.set_dtype(mx.float32)  # the CPU backend is fast in float32 only; the values are kept
    rng = random.Random(f"measure {seed}")
    rows = [
        corpus.preference_row(rng.choice(questions), rng)
        for questions in world.held_out.values()
        for _ in range(ROWS_PER_TOPIC)
    ]
    greedy = measure.answers(model, loaded, rows)
    mx.random.seed(seed)
    sampled_rows = valid * SAMPLES_PER_PROMPT
    sampled = measure.answers(model, loaded, sampled_rows, temperature=1.0)
    valid_greedy = measure.answers(model, loaded, valid)
    return {
        "held_out_accuracy_greedy": rounded(measure.content_by_topic(rows, greedy)),
        "held_out_answers": len(rows),
        "valid_accuracy_greedy": rounded(measure.content_by_topic(valid, valid_greedy))["all"],
        "valid_accuracy_sampled": rounded(measure.content_by_topic(sampled_rows, sampled))["all"],
        "valid_courteous_greedy": round(measure.courteous_share(valid_greedy), 3),
        "valid_courteous_sampled": round(measure.courteous_share(sampled), 3),
        "valid_answers_sampled": len(sampled),
    }


def rounded(shares: dict[str, float]) -> dict[str, float]:
    return {name: round(share, 3) for name, share in shares.items()}


def build(folder: Path, *, seed: int, steps: int, size: int) -> dict[str, Any]:
    """Text, tokenizer, weights, preferences, figures. -> what build.json says"""
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    world = corpus.build_world(seed)
    some = itertools.islice(corpus.dialogues(world, seed), TOKENIZER_DIALOGUES)
    tokens = tokenizer.train_tokenizer(m["content"] for messages in some for m in messages)
    tokenizer.save_tokenizer(tokens, folder)
    model = pretrain.new_model(tokens.get_vocab_size(), seed)
    stream = encoded(tokens, corpus.dialogues(world, seed))
    pad = tokenizer.SPECIAL_TOKENS.index(tokenizer.PAD)
    loss = pretrain.train(model, stream, steps=steps, size=size, pad=pad, seed=seed)
    seconds = time.monotonic() - began
    write_checkpoint(folder, model, tokens)
    write_json(folder / "rules.json", {"courteous": list(rules.COURTEOUS_MARKERS)})
    valid = write_preferences(folder, world, seed)
    facts = {
        "seed": seed,
        "steps": steps,
        "dialogues": steps * size,
        "questions_trained": sum(map(len, world.trained.values())),
        "questions_held_out": sum(map(len, world.held_out.values())),
        "parameters": sum(leaf.size for _, leaf in leaves(model)),
        "final_loss": round(loss, 4),
        "seconds": round(seconds),
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "tokenizers")},
        **measured(folder, world, valid, seed),
    }
    write_json(folder / "build.json", facts)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="where to write (models/tiny-chat)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of text and weights (0)")
    parser.add_argument("--steps", type=int, default=2800, help="updates (2800)")
    parser.add_argument("--batch-size", type=int, default=32, help="dialogues an update (32)")
    given = parser.parse_args()
    facts = build(given.out, seed=given.seed, steps=given.steps, size=given.batch_size)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
