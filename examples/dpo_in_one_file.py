"""DPO in one file: preference pairs in, a trained LoRA adapter out.

    python examples/dpo_in_one_file.py models/tiny-chat models/tiny-chat/preferences/train.jsonl

Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290) without the product around
it: only the LoRA layers come from the package, so that every step of the algorithm can be read
here. A test holds the losses to those of `mlx_dpo.DPOTrainer`.
"""

import json
import sys

import mlx_dpo  # noqa: F401  (loads OpenBLAS on Linux, before MLX)

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm import load

from mlx_dpo.adapters.attach import attach_adapters, disable_adapters

BETA, LEARNING_RATE, BATCH_SIZE, STEPS = 0.1, 5e-3, 8, 12


def tokenize(tokenizer, row):
    """Return the token ids of prompt, chosen completion and rejected completion."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)
    chosen, rejected = (
        tokenizer.apply_chat_template([*row["prompt"], *row[name]])[len(prompt) :]
        for name in ("chosen", "rejected")
    )
    return prompt, chosen, rejected


def collate(pairs):
    """Pad B pairs to token ids and a completion mask: B chosen rows, then B rejected. (2B, T)"""
    rows = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
    length = max(len(p) + len(c) for p, c in rows)
    tokens = [p + c + [0] * (length - len(p) - len(c)) for p, c in rows]
    mask = [[0] * len(p) + [1] * len(c) + [0] * (length - len(p) - len(c)) for p, c in rows]
    return mx.array(tokens), mx.array(mask)


def completion_logps(model, tokens, mask):
    """Sum log p(token | tokens before it) over each completion. (B,) chosen, (B,) rejected"""
    logits = model(tokens[:, :-1]).astype(mx.float32)
    logps = -nn.losses.cross_entropy(logits, tokens[:, 1:])  # (2B, T - 1)
    return mx.split((logps * mask[:, 1:]).sum(-1), 2)


def dpo_loss(policy, tokens, mask, reference):
    """Return mean(-log sigmoid(beta * margin)) and the margins. (), (B,)"""
    chosen, rejected = completion_logps(policy, tokens, mask)
    reference_chosen, reference_rejected = reference
    margins = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -nn.log_sigmoid(BETA * margins).mean(), margins


def train(model_path, pairs_path):
    """Yield loss and accuracy of each optimizer step."""
    policy, tokenizer = load(model_path)
    policy.set_dtype(mx.float32)  # 16-bit arithmetic is slow on the CPU backend
    with open(pairs_path, encoding="utf-8") as lines:
        pairs = [tokenize(tokenizer, json.loads(line)) for line in lines][: BATCH_SIZE * STEPS]
    batches = [collate(pairs[i : i + BATCH_SIZE]) for i in range(0, len(pairs), BATCH_SIZE)]
    attach_adapters(policy, rank=16, scale=2.0)
    with disable_adapters(policy):  # the reference is the policy before training: score it once
        reference = [completion_logps(policy, *batch) for batch in batches]
        mx.eval(reference)
    optimizer = optim.AdamW(LEARNING_RATE, bias_correction=True, weight_decay=0.0)
    loss_and_gradients = nn.value_and_grad(policy, dpo_loss)
    for batch, reference_logps in zip(batches, reference, strict=True):
        (loss, margins), gradients = loss_and_gradients(policy, *batch, reference_logps)
        optimizer.update(policy, gradients)
        mx.eval(policy.parameters(), optimizer.state)
        yield loss.item(), (margins > 0).mean().item()


if __name__ == "__main__":
    for step, (loss, accuracy) in enumerate(train(*sys.argv[1:]), start=1):
        print(f"step {step:2}  loss {loss:.4f}  accuracy {accuracy:.2f}")
