"""Write tests/goldens/trl_sft.json: the first steps of instruction tuning as TRL takes them.

    trl/bin/python -m scripts.tools.goldens.trl_sft

See scripts/tools/goldens/trl_sigmoid.py for the environment and the shared settings.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from scripts.tools.goldens.trl_sigmoid import (
    BATCH,
    MODEL,
    PAIRS_PER_PASS,
    ROOT,
    SOURCES,
    Settings,
    first_lines,
    set_adapters,
    sha256,
    tokens_digest,
)

GOLDEN = ROOT / "tests" / "goldens" / "trl_sft.json"
LINES = 700  # of the preferences, of which the rows are made
# Several answers in a row, all of them scored; its steps are four passes of unequal lengths.
CONVERSATIONS: Settings = {
    "lora_r": 16,
    "lora_alpha": 32,
    "learning_rate": 2e-3,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "rows_per_pass": PAIRS_PER_PASS,
    "steps": 20,
}
# The last answer alone, in one pass per step, with every number another one.
LAST_ANSWERS: Settings = {
    "lora_r": 8,
    "lora_alpha": 4,
    "learning_rate": 1e-2,
    "weight_decay": 0.2,
    "max_grad_norm": 0.1,
    "rows_per_pass": BATCH,
    "steps": 8,
}
RUNS = {"conversations": CONVERSATIONS, "last answers": LAST_ANSWERS}
METRICS = ("loss", "mean_token_accuracy", "num_tokens", "grad_norm", "epoch")
# The model's own template, with the mark of what TRL's `assistant_only_loss` scores.
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def conversations(lines: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Return rows of one, two and three questions with their chosen answers, in turn."""
    records = iter([json.loads(line) for line in lines])
    rows = []
    for number in range(count):
        turns = []
        for record in (next(records) for _ in range(1 + number % 3)):
            turns += [*record["prompt"], *record["chosen"]]
        rows.append({"messages": turns})
    return rows


def last_answers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows as TRL's prompt and completion, which is the last answer."""
    return [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]


def rows_of(name: str) -> list[dict[str, Any]]:
    """Return the rows of a run, in the order of its steps."""
    rows = conversations(first_lines(LINES), BATCH * RUNS[name]["steps"])
    return rows if name == "conversations" else last_answers(rows)


def main() -> None:
    """Train with TRL and write its results atomically."""
    import torch

    torch.set_num_threads(1)  # every sum in one order: the same values again
    with tempfile.TemporaryDirectory() as scratch:
        runs = {name: make_run(name, scratch) for name in RUNS}
    golden = {
        "made_by": "python -m scripts.tools.goldens.trl_sft",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "sources": {path.name: sha256(path.read_bytes()) for path in SOURCES},
        "pairs": {"count": LINES, "sha256": sha256("\n".join(first_lines(LINES)).encode())},
        "runs": runs,
    }
    partial = GOLDEN.with_name(f".{GOLDEN.name}.partial")
    partial.write_text(json.dumps(golden, indent=1) + "\n")
    os.replace(partial, GOLDEN)
    for name, run in runs.items():
        print(name, [round(row["loss"], 6) for row in run["steps"]])


def make_run(name: str, scratch: str) -> dict[str, Any]:
    """Train on the rows of a run, and return all that the tests compare with."""
    settings = RUNS[name]
    trainer = make_trainer(name, scratch)
    widths = set_adapters(trainer.model, settings)
    tokens = [scored_tokens(row) for row in trainer.train_dataset]
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "settings": settings,
        "adapted": widths,
        "tokens": {"sha256": tokens_digest(tokens), "first": tokens[:3]},
        "steps": [{metric: row[metric] for metric in METRICS} for row in logged],
    }


def scored_tokens(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return the token ids of a row, and the positions of those that TRL scores."""
    return list(row["input_ids"]), [i for i, label in enumerate(row["labels"]) if label != -100]


def make_trainer(name: str, scratch: str) -> Any:
    """Return an SFTTrainer with new adapters."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    settings = RUNS[name]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = TEMPLATE
    whole = name == "conversations"
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        args=SFTConfig(
            output_dir=scratch,
            assistant_only_loss=whole,
            completion_only_loss=None if whole else True,
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            max_grad_norm=settings["max_grad_norm"],
            weight_decay=settings["weight_decay"],
            optim="adamw_torch",
            per_device_train_batch_size=settings["rows_per_pass"],
            gradient_accumulation_steps=BATCH // settings["rows_per_pass"],
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows_of(name)),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=settings["lora_r"],
            lora_alpha=settings["lora_alpha"],
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )


if __name__ == "__main__":
    main()
