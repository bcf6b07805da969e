"""Write tests/goldens/trl_kto.json: the first steps of KTO as TRL takes them.

    trl/bin/python -m scripts.tools.goldens.trl_kto

See scripts/tools/goldens/trl_sigmoid.py for the environment and the shared settings.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from scripts.tools.goldens.trl_sigmoid import (
    BATCH,
    MODEL,
    ROOT,
    SOURCES,
    Settings,
    first_lines,
    set_adapters,
    sha256,
)

GOLDEN = ROOT / "tests" / "goldens" / "trl_kto.json"
SETTINGS: Settings = {
    "beta": 0.3,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.5,
    "lora_r": 16,
    "lora_alpha": 32,
    "learning_rate": 3e-3,
    "steps": 20,
}
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "kl", "grad_norm")


def judged(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Two rows in three are good answers, the third is a bad one."""
    rows = []
    for i, line in enumerate(lines):
        record = json.loads(line)
        answer = record["rejected" if i % 3 == 2 else "chosen"]
        rows.append({"prompt": record["prompt"], "completion": answer, "label": i % 3 != 2})
    return rows


def main() -> None:
    """Train with TRL and write its results atomically."""
    import torch

    torch.set_num_threads(1)  # every sum in one order: the same values again
    lines = first_lines(BATCH * SETTINGS["steps"])
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(lines, scratch)
        widths = set_adapters(trainer.model, SETTINGS)
        trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    golden = {
        "made_by": "python -m scripts.tools.goldens.trl_kto",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "sources": {path.name: sha256(path.read_bytes()) for path in SOURCES},
        "pairs": {"count": len(lines), "sha256": sha256("\n".join(lines).encode())},
        "adapted": widths,
        "settings": SETTINGS,
        "steps": [{name: row[name] for name in METRICS} for row in logged],
    }
    partial = GOLDEN.with_name(f".{GOLDEN.name}.partial")
    partial.write_text(json.dumps(golden, indent=1) + "\n")
    os.replace(partial, GOLDEN)
    print([round(row["loss"], 6) for row in logged])


def make_trainer(lines: Sequence[str], scratch: str) -> Any:
    """Return a KTOTrainer with new adapters; a step is one pass, so its KL is the step's."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    return KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        args=KTOConfig(
            output_dir=scratch,
            beta=SETTINGS["beta"],
            desirable_weight=SETTINGS["desirable_weight"],
            undesirable_weight=SETTINGS["undesirable_weight"],
            learning_rate=SETTINGS["learning_rate"],
            lr_scheduler_type="constant",
            optim="adamw_torch",
            per_device_train_batch_size=BATCH,
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
        train_dataset=Dataset.from_list(judged(lines)),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        peft_config=LoraConfig(
            r=SETTINGS["lora_r"],
            lora_alpha=SETTINGS["lora_alpha"],
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )


if __name__ == "__main__":
    main()
