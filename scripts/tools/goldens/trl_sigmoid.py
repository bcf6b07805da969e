"""Write tests/goldens/trl_sigmoid.json: the first steps of DPO as TRL takes them.

    python -m venv trl && trl/bin/pip install "trl>=1.16" peft torch   # CPU wheels will do
    trl/bin/python scripts/tools/goldens/trl_sigmoid.py

It needs neither MLX nor this package, and the tests use only the numbers, on which both trainers
must agree. It takes a minute on one core. Run it again whenever models/tiny-chat changes.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "models" / "tiny-chat"
PAIRS = MODEL / "preferences" / "train.jsonl"
GOLDEN = ROOT / "tests" / "goldens" / "trl_sigmoid.json"

SOURCES = (MODEL / "model.safetensors", MODEL / "tokenizer.json", MODEL / "tokenizer_config.json")
Settings = Mapping[str, Any]

PLAIN: Settings = {
    "beta": 0.1,
    "lora_r": 16,
    "lora_alpha": 32,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "steps": 20,
}
# Every number another one: what the plain run hides (its gradients are never clipped) shows here.
VARIED: Settings = {
    "beta": 0.5,
    "lora_r": 8,
    "lora_alpha": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.3,
    "max_grad_norm": 0.1,
    "weight_decay": 0.2,
    "steps": 8,
}
RUNS = {"plain": PLAIN, "varied": VARIED}
ADAPTER_SEED = 0
PAIRS_PER_PASS, PASSES = 4, 4
BATCH = PAIRS_PER_PASS * PASSES
WRITTEN_OUT = 4  # pairs whose token ids are in the file; a digest stands for the others
METRICS = (
    "epoch",
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "grad_norm",
    "learning_rate",
    "num_tokens",
)


# --- what both sides must agree on -------------------------------------------------------


def initial_a(widths: Mapping[str, int], *, rank: int) -> dict[str, np.ndarray]:
    """Return the random factor A of each adapted layer, in the order of names. (rank, in) each

    `widths` holds the inputs of each layer by its path in the model.
    """
    draw = np.random.default_rng(ADAPTER_SEED)
    return {
        name: (draw.uniform(-1, 1, (rank, widths[name])) / widths[name] ** 0.5).astype(np.float32)
        for name in sorted(widths)
    }


def tokens_digest(pairs: Iterable[Sequence[Sequence[int]]]) -> str:
    """SHA-256 over the ids of prompt, chosen and rejected of every pair, as hex."""
    return sha256(json.dumps([[list(ids) for ids in pair] for pair in pairs]).encode())


def first_lines(count: int) -> list[str]:
    """Return the pairs that the steps use, in the order of the file."""
    return PAIRS.read_text(encoding="utf-8").splitlines()[:count]


def sha256(data: bytes) -> str:
    """Return the digest in hex."""
    return hashlib.sha256(data).hexdigest()


# --- TRL ---------------------------------------------------------------------------------


def main() -> None:
    """Train with TRL and write its numbers, next to the old file and then over it."""
    import torch

    torch.set_num_threads(1)  # every sum in one order: the same values again
    with tempfile.TemporaryDirectory() as scratch:  # the trainers want a folder, and write nothing
        golden = make_golden(scratch)
    partial = GOLDEN.with_name(f".{GOLDEN.name}.partial")
    partial.write_text(json.dumps(golden, indent=1) + "\n")
    os.replace(partial, GOLDEN)
    for name, run in golden["runs"].items():
        losses = [row["loss"] for row in run["steps"]]
        print(f"{name}: {len(losses)} steps, loss {losses[0]:.6f} to {losses[-1]:.6f}")


def make_golden(scratch: str) -> dict[str, Any]:
    """Everything that the tests compare with."""
    lines = first_lines(BATCH * max(run["steps"] for run in RUNS.values()))
    trainers = {name: make_trainer(settings, lines, scratch) for name, settings in RUNS.items()}
    widths = [set_adapters(trainer.model, RUNS[name]) for name, trainer in trainers.items()]
    plain = trainers["plain"]
    pairs = [(p["prompt_ids"], p["chosen_ids"], p["rejected_ids"]) for p in plain.train_dataset]
    return {
        "made_by": "scripts/tools/goldens/trl_sigmoid.py",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "sources": {path.name: sha256(path.read_bytes()) for path in SOURCES},
        "pairs": {"count": len(lines), "sha256": sha256("\n".join(lines).encode())},
        "tokens": {"sha256": tokens_digest(pairs), "first": pairs[:WRITTEN_OUT]},
        "adapted": widths[0],
        "reference_logps": reference_logps(plain),
        "runs": {
            name: {"settings": RUNS[name], "steps": steps(trainer)}
            for name, trainer in trainers.items()
        },
    }


def make_trainer(settings: Settings, lines: Sequence[str], scratch: str) -> Any:
    """Return a DPOTrainer with new adapters on the base, which is the reference."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOTrainer

    records = [json.loads(line) for line in lines[: BATCH * settings["steps"]]]
    columns = ("prompt", "chosen", "rejected")
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        args=arguments(settings, scratch),
        train_dataset=Dataset.from_list([{c: record[c] for c in columns} for record in records]),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        peft_config=LoraConfig(
            r=settings["lora_r"],
            lora_alpha=settings["lora_alpha"],
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )


def arguments(settings: Settings, scratch: str) -> Any:
    """Return TRL's config: float32, and pairs in the order of the file."""
    from trl import DPOConfig

    per_pass = settings.get("pairs_per_pass", PAIRS_PER_PASS)
    return DPOConfig(
        output_dir=scratch,
        **settings.get("loss", {"loss_type": "sigmoid"}),
        beta=settings["beta"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["lr_scheduler_type"],
        warmup_steps=settings["warmup_ratio"],  # below 1 it is a share
        max_grad_norm=settings["max_grad_norm"],
        weight_decay=settings["weight_decay"],
        optim="adamw_torch",
        per_device_train_batch_size=per_pass,
        gradient_accumulation_steps=BATCH // per_pass,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def set_adapters(model: Any, settings: Settings) -> dict[str, int]:
    """Put `initial_a` into the attached adapters; returns the inputs of each adapted layer."""
    import torch

    before, after = "base_model.model.", ".lora_A.default.weight"
    factors = {
        name.removeprefix(before).removesuffix(after): parameter
        for name, parameter in model.named_parameters()
        if name.endswith(after)
    }
    widths = {name: parameter.shape[1] for name, parameter in sorted(factors.items())}
    drawn = initial_a(widths, rank=settings["lora_r"])
    with torch.no_grad():
        for name, parameter in factors.items():
            parameter.copy_(torch.from_numpy(drawn[name]))
    return widths


def reference_logps(trainer: Any) -> dict[str, list[float]]:
    """Return the log-probs of the first step's pairs under the base without adapters."""
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(BATCH)])
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, inputs)
    return {"chosen": chosen.tolist(), "rejected": rejected.tolist()}


def steps(trainer: Any) -> list[dict[str, float]]:
    """Train; what was logged of each step, unrounded."""
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return [{name: row[name] for name in METRICS} for row in logged]


if __name__ == "__main__":
    main()
