"""Runs whose results are compared between numbers of ranks: their settings, files and results."""

import hashlib
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.adapters.adapter_files import save_adapter
from mlx_dpo.io.arrays import read_arrays
from mlx_dpo.losses.catalogue import LOSSES
from mlx_dpo.models.load import load_model
from mlx_dpo.reporting.metrics_log import read_metrics
from tests.checkpoints import make_checkpoint

# 12 training pairs: steps of 9 and 3 pairs, so 5 and 2 passes. With five, the order of sums shows
# on two and on three ranks; the last step of an epoch has fewer passes than three ranks.
BASIC = {
    "model": "base",
    "pairs": ["pairs.jsonl"],
    "output": "run",
    "valid_fraction": 0.25,
    "batch_size": 9,
    "micro_batch_size": 2,
    "learning_rate": 1e-3,
    "epochs": 3,
    "save_steps": 2,
    "save_total_limit": 9,
    "lora_r": 4,
    "scorer": "plain",
    "recompute": False,
    "samples": 0,
    "caffeinate": False,
}
SPEED = {"tokens_per_second", "peak_memory_gb"}  # metrics that are not a result of the training


def loss_settings(loss):
    """Return the settings that a loss of the catalogue needs."""
    settings = {"loss_type": [loss.name]}
    if loss.labelled:
        settings["pairs"] = ["labelled.jsonl"]
    if loss.listwise:
        settings |= {"pairs": ["rated.jsonl"], "batch_size": 7}
    if loss.uses_margins:
        settings["margin_column"] = "lead"
    return settings


LOSS_CASES = {f"loss {loss.name}": loss_settings(loss) for loss in LOSSES.values()}
RATED = {"pairs": ["rated.jsonl"], "ranked": "all"}
LABELLED = {"pairs": ["labelled.jsonl"], "loss_type": ["kto"]}
SYNCED = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6}
CHOSEN = {"micro_batch_size": None, "scorer": "auto", "recompute": None}
OTHER_CASES = {
    "weighted losses": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [1, 0.5, 0.3]},
    "label smoothing": {"label_smoothing": 0.2},
    "divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    "ld_alpha": {"ld_alpha": 0.5},
    "weight column": {"weight_column": "trust"},
    "wpo": {"use_weighting": True},
    "wpo of a loss without reference": {"use_weighting": True, "loss_type": ["simpo"]},
    "moving reference": SYNCED,
    "moving reference, wpo, evaluations": SYNCED | {"use_weighting": True, "eval_steps": 2},
    "moving reference of kto": LABELLED | SYNCED,
    "dora": {"fine_tune_type": "dora"},
    "full": {"fine_tune_type": "full", "lora_r": None, "learning_rate": 1e-4},
    "full, master weights": {
        "fine_tune_type": "full", "lora_r": None, "dtype": "bfloat16", "learning_rate": 1e-4,
    },
    "dropout": {"lora_dropout": 0.3},
    "dropout of kto": LABELLED | {"lora_dropout": 0.3},
    "dropout, dora": {"lora_dropout": 0.3, "fine_tune_type": "dora"},
    "dropout, recompute": {"lora_dropout": 0.3, "recompute": True},
    "grouped": RATED | {"group_by_prompt": True},
    "not grouped": RATED | {"group_by_prompt": False},
    "shared": {"scorer": "shared"},
    "shared, ranked": RATED | {"scorer": "shared"},
    "trie": RATED | {"scorer": "trie", "micro_batch_size": None, "micro_batch_tokens": 150},
    "trie of kto": LABELLED | {"scorer": "trie"},
    "recompute": {"recompute": True},
    "tokens of a pass": {"micro_batch_size": None, "micro_batch_tokens": 100},
    "chosen by the run": CHOSEN,
    "chosen by the run, 16 pairs": CHOSEN | {"batch_size": 16, "learning_rate": None},
    "one pass a step": {"micro_batch_size": None, "batch_size": 2, "micro_batch_tokens": 4000},
    "one pair a step": {"batch_size": 1, "micro_batch_size": 1, "epochs": 1},
    "reference model": {"reference_model": "other-base"},
    "start adapter": {"start_adapter": "start", "lora_r": None},
    "samples": {"samples": 2, "eval_steps": 2},
    "evaluations": {"eval_steps": 1},
    "best": {
        "eval_steps": 1, "metric_for_best_model": "loss", "load_best_model_at_end": True,
        "learning_rate": 0.3, "max_grad_norm": 100,
    },
    "early stopping": {
        "eval_steps": 1, "metric_for_best_model": "loss", "early_stopping_patience": 1,
        "learning_rate": 0.3, "epochs": 4, "max_grad_norm": 100,
    },
    "clipped": {"max_grad_norm": 1e-3},
    "packed": {"bits": 4, "group_size": 32},
    "bfloat16": {"dtype": "bfloat16"},
    "lion": {"optim": "lion", "weight_decay": 0.1},
    "some steps": {"epochs": None, "max_steps": 4},
    "held-out file": {"valid": "held_out.jsonl", "valid_fraction": None, "eval_steps": 3},
    "nothing held out": {"valid_fraction": 0},
    "every checkpoint removed but one": {"save_steps": 1, "save_total_limit": 1},
}  # fmt: skip
CASES = LOSS_CASES | OTHER_CASES


def make_inputs(folder):
    """Write the models, adapters and pairs of all cases to `folder`; returns it."""
    make_checkpoint(folder / "base")
    make_checkpoint(folder / "other-base", seed=5)
    for name, scale in (("start", 0.05), ("other-start", 0.06)):
        make_adapter(folder / name, str(folder / "base"), scale)
    for name, rows in make_rows().items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_adapter(folder, model, scale):
    """Write adapters that change `model` to `folder`."""
    policy = load_model(model).model
    adapters.attach_adapters(policy, rank=2, scale=2.0)
    for number, layer in enumerate(adapters.adapted_layers(policy).values()):
        noise = mx.random.normal(layer.lora_b.shape, key=mx.random.key(number))
        layer.lora_b = layer.lora_b + scale * noise
    folder.mkdir()
    save_adapter(folder, policy, adapters.make_adapter_config(policy))


def make_rows():
    """Return the rows of all files of pairs, whose texts have different lengths."""
    prompts = [f"What is {i}{' and then some' * (i % 4)}?" for i in range(16)]
    good = [f"It is {i}, friend{' of the house' * (i % 3)}." for i in range(16)]
    bad = [f"{i * 7} no{' never' * (i % 5)}" for i in range(16)]
    pairs = [
        {"prompt": p, "chosen": g, "rejected": b, "lead": i / 10, "trust": 0.5 + i / 20}
        for i, (p, g, b) in enumerate(zip(prompts, good, bad, strict=True))
    ]
    labelled = [
        {"prompt": p, "completion": g if i % 2 else b, "label": bool(i % 2)}
        for i, (p, g, b) in enumerate(zip(prompts, good, bad, strict=True))
    ]
    rated = [
        {"prompt": p, "completions": [b, g, "Who knows?"], "scores": [1, 5, 3]}
        for p, g, b in zip(prompts[:8], good, bad, strict=False)
    ]
    return {"pairs": pairs, "labelled": labelled, "rated": rated, "held_out": pairs[12:]}


def full_settings(inputs, changes, output="run"):
    """Return all settings of a case, with whole paths of its inputs."""
    settings = BASIC | changes | {"output": str(output)}
    for name in ("model", "reference_model", "start_adapter", "valid"):
        if settings.get(name):
            settings[name] = str(inputs / settings[name])
    settings["pairs"] = [str(inputs / file) for file in settings["pairs"]]
    return {name: value for name, value in settings.items() if value is not None}


def results(run):
    """Return the results of a run by name: its arrays, metrics, samples and record.

    Two runs are equal if these dictionaries are. Speed, memory and the time are left out.
    """
    found = {
        str(path.relative_to(run)): arrays_digest(path)
        for path in sorted(run.rglob("*.safetensors"))
    }
    for number, row in enumerate(read_metrics(run / "metrics.jsonl")):
        found |= {f"metrics {number} {k}": v for k, v in row.items() if k not in SPEED}
    record = json.loads((run / "run.json").read_text())
    names = ("state", "steps", "counts", "provenance", "automatic_settings", "chosen_settings",
             "evaluation", "best_checkpoint", "stopped_early_at", "warnings", "before")  # fmt: skip
    found |= {f"run.json {name}": record.get(name) for name in names}
    found |= {f"setting {name}": value for name, value in record["settings"].items()}
    if (run / "samples.jsonl").exists():
        for number, line in enumerate((run / "samples.jsonl").read_text().splitlines()):
            found[f"samples {number}"] = line
    return found


def arrays_digest(path):
    """Return a digest of the names, dtypes, shapes and bytes of the arrays in a file."""
    digest = hashlib.sha256()
    for name, array in sorted(read_arrays(Path(path))[0].items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return digest.hexdigest()


def differences(expected, found):
    """Return the results in which two runs differ, at most six of them."""
    names = [n for n in expected | found if expected.get(n, "-") != found.get(n, "-")]
    return [f"{n}: {found.get(n, '-')}, not {expected.get(n, '-')}" for n in names[:6]]


def copy_run(source, target):
    """Copy a run folder without its lock."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".lock"))
    return target
