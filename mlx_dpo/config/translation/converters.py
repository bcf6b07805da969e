"""Converters of single settings of other trainers whose names or values differ from ours.

Facts are from the trainers' documentation and example configurations: TRL's `DPOConfig`, the
arguments of LLaMA-Factory, Axolotl's reference of configurations, mlx-lm-lora's and Unsloth's.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_dpo.config.other_trainers import LOSS_ALIASES, LOSS_NAMES, check_loss_name

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Converted:
    """Our settings that replace a setting of another trainer, and a remark for the reader."""

    settings: dict[str, Any] = field(default_factory=dict)
    note: str | None = None


Converter = Callable[[Any, Values], Converted]

DEFAULT_DEVICE_BATCH = {"TRL": 8, "LLaMA-Factory": 8, "Unsloth": 8}
ADAMW = ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf")
OPTIMIZERS = ("adam", "adafactor", "lion", "muon", "sgd", "rmsprop")
TRACKERS = ("tensorboard", "wandb", "trackio", "swanlab", "none")


def rename(setting: str) -> Converter:
    """Return a converter that copies the value to `setting`."""
    return lambda value, values: Converted({setting: value})


def number(setting: str) -> Converter:
    """Return a converter that copies a number, which YAML 1.1 reads as text if it is `1e-5`."""
    return lambda value, values: Converted({setting: float(value)})


def switch(setting: str, on: Any) -> Converter:
    """Return a converter of a boolean: true gives `setting` the value `on`, false nothing."""

    def convert(value: Any, values: Values) -> Converted:
        if isinstance(value, bool):
            return Converted({setting: on} if value else {})
        return Converted(note=f"mlx-dpo chooses; write `{setting}: {on}` to set it")

    return convert


def remark(text: str) -> Converter:
    """Return a converter that sets nothing and leaves a remark."""
    return lambda value, values: Converted(note=text)


def silent(value: Any, values: Values) -> Converted:
    """Set nothing: another converter reads the value."""
    return Converted()


def epochs(value: Any, values: Values) -> Converted:
    """Convert a number of epochs, which may be a fraction elsewhere."""
    count = float(value)
    whole = max(1, math.ceil(count))
    note = None if whole == count else f"{count:g} epochs are rounded up; max_steps is exact"
    return Converted({"epochs": whole}, note)


def share(value: Any, values: Values) -> Converted:
    """Convert the size of the held-out split: a share below 1, otherwise a number of rows."""
    size = float(value)
    if 0 < size < 1:
        return Converted({"valid_fraction": size})
    if size == 0:
        return Converted(note="no pairs are held out there; mlx-dpo holds out 5 %")
    return Converted(note=f"{size:g} rows are held out there; set valid_fraction to a share")


def loss(value: Any, values: Values) -> Converted:
    """Convert one or several names of losses.

    Raises:
        ConfigError: there is no such loss.
    """
    names = [str(name).lower() for name in (value if isinstance(value, list) else [value])]
    ours = [(LOSS_NAMES | LOSS_ALIASES).get(name, name) for name in names]
    for name in ours:
        check_loss_name(name)
    return Converted({"loss_type": ours})


def method(value: Any, values: Values) -> Converted:
    """Convert the name of a method or loss; the loss of `dpo` may have a name of its own."""
    named = values.get("dpo_cpo_loss_type") if str(value).lower() == "dpo" else None
    return loss(named or value, values)


def stage(value: Any, values: Values) -> Converted:
    """Convert LLaMA-Factory's stage: preference optimization or instruction tuning."""
    if value in ("kto", "sft"):
        return Converted({"loss_type": [value]})
    if value == "dpo":
        return Converted()
    return Converted(note="neither preference optimization nor instruction tuning")


def supervised(value: Any, values: Values) -> Converted:
    """Convert TRL's settings of what instruction tuning scores, which only its SFT has."""
    if value is None or value is True:
        return Converted({"loss_type": ["sft"]})
    return Converted(note="only the assistant's turns are scored")


def sum_with_sft(value: Any, values: Values) -> Converted:
    """Convert the weight of a supervised loss on the chosen answers, which is added to the loss."""
    weight = float(value)
    if weight == 0:
        return Converted()
    if values.get("stage") == "kto":
        return Converted(note="kto cannot be summed with a loss of pairs")
    given = (values.get(name) for name in ("pref_loss", "loss_type", "rl"))
    names = loss(next(filter(None, given), "sigmoid"), values).settings["loss_type"]
    weights = values.get("loss_weights") or [1.0] * len(names)
    return Converted({"loss_type": [*names, "sft"], "loss_weights": [*weights, weight]})


def adapter(value: Any, values: Values) -> Converted:
    """Convert the way of training: LoRA, QLoRA, DoRA or all weights."""
    kind = {"lora": "lora", "qlora": "lora", "dora": "dora", "full": "full"}.get(str(value))
    if kind is None:
        return Converted(note="not supported; mlx-dpo trains lora, dora or full")
    return Converted({"fine_tune_type": kind})


def modules(value: Any, values: Values) -> Converted:
    """Convert the names of modules to adapt; all linear ones are the default here."""
    names = value if isinstance(value, list) else [name.strip() for name in str(value).split(",")]
    if names in (["all"], ["all-linear"]):
        return Converted(note="all linear modules are the default")
    return Converted({"lora_target_modules": names})


def optimizer(value: Any, values: Values) -> Converted:
    """Convert the name of an optimizer; variants of AdamW with small states become AdamW."""
    name = str(value).lower().removeprefix("optimizernames.")
    if name in ADAMW:
        return Converted({"optim": "adamw"})
    if "adamw" in name:
        return Converted({"optim": "adamw"}, f"{name} there; AdamW with float32 states here")
    base = name.split("_")[0]
    if base in OPTIMIZERS:
        return Converted({"optim": base})
    return Converted(note=f"optimizer {name} is not supported; adamw is the default")


def batch_size(trainer: str) -> Converter:
    """Return a converter of pairs per device and accumulation steps to pairs per optimizer step."""

    def convert(value: Any, values: Values) -> Converted:
        name = "micro_batch_size" if trainer == "Axolotl" else "per_device_train_batch_size"
        if trainer == "mlx-lm-lora":
            name = "batch_size"
        device = int(values.get(name) or DEFAULT_DEVICE_BATCH.get(trainer, 1))
        steps = values.get("gradient_accumulation_steps") or values.get("grad_accumulation_steps")
        total = device * int(steps or 1)
        note = f"{device} per pass x {int(steps or 1)} accumulated passes, on one device"
        return Converted({"batch_size": total, "micro_batch_size": device}, note)

    return convert


def files(value: Any, values: Values) -> Converted:
    """Convert LLaMA-Factory's names of datasets, separated by commas."""
    names = value if isinstance(value, list) else [name.strip() for name in str(value).split(",")]
    note = "names in LLaMA-Factory's dataset_info.json; write the path or Hub id of each instead"
    return Converted({"pairs": [str(name) for name in names]}, note)


def hub_dataset(value: Any, values: Values) -> Converted:
    """Convert TRL's name of a dataset, with its configuration."""
    config = values.get("dataset_config")
    return Converted({"pairs": [f"{value}:{config}" if config else str(value)]})


def dataset_list(value: Any, values: Values) -> Converted:
    """Convert Axolotl's list of datasets."""
    entries = [entry for entry in value if isinstance(entry, Mapping) and entry.get("path")]
    names = [f"{e['path']}:{e['name']}" if e.get("name") else str(e["path"]) for e in entries]
    splits = {str(entry["split"]) for entry in entries if entry.get("split")}
    settings: dict[str, Any] = {"pairs": names}
    if len(splits) == 1:
        settings["split"] = splits.pop()
    others = sorted({key for entry in entries for key in entry} - {"path", "name", "split"})
    note = f"without {', '.join(others)}: the schema is detected" if others else None
    return Converted(settings, note)


def trackers(value: Any, values: Values) -> Converted:
    """Convert the names of experiment trackers."""
    names = [str(name) for name in (value if isinstance(value, list) else [value])]
    known = [name for name in names if name in TRACKERS and name != "none"]
    others = [name for name in names if name not in TRACKERS]
    note = f"{', '.join(others)} is not supported" if others else None
    return Converted({"report_to": known} if known else {}, note)


def project(value: Any, values: Values) -> Converted:
    """Convert the name of a project at Weights & Biases, which also turns the tracker on."""
    return Converted({"report_to": ["wandb"], "project": str(value)})


def lora_parameters(value: Any, values: Values) -> Converted:
    """Convert mlx-lm's mapping of LoRA parameters; its scale is alpha / rank."""
    given = dict(value) if isinstance(value, Mapping) else {}
    settings: dict[str, Any] = {}
    if "rank" in given:
        settings["lora_r"] = int(given["rank"])
    if "alpha" in given:
        settings["lora_alpha"] = float(given["alpha"])
    elif "scale" in given:
        settings["lora_alpha"] = float(given["scale"]) * int(given.get("rank", 8))
    if "dropout" in given:
        settings["lora_dropout"] = float(given["dropout"])
    if "keys" in given:
        names = [str(key).rpartition(".")[2] for key in given["keys"]]
        settings["lora_target_modules"] = names
    return Converted(settings)


def layers(value: Any, values: Values) -> Converted:
    """Convert the number of last layers to train; -1 means all in mlx-lm."""
    if int(value) < 0:
        return Converted(note="all layers are the default")
    return Converted({"num_layers": int(value)})


def iterations(value: Any, values: Values) -> Converted:
    """Convert iterations, each of which is a pass there, to optimizer steps."""
    steps = int(values.get("gradient_accumulation_steps") or 1)
    note = None if steps == 1 else f"{value} passes there, {steps} for each optimizer step"
    return Converted({"max_steps": max(1, int(value) // steps)}, note)


def evaluation_steps(value: Any, values: Values) -> Converted:
    """Convert the number of steps between evaluations; a share of the run is not supported."""
    if float(value) < 1:
        return Converted(note="a share of the run there; give a number of steps")
    return Converted({"eval_steps": int(value)})


def checkpointing(value: Any, values: Values) -> Converted:
    """Convert gradient checkpointing: a boolean, or the name of a way to do it."""
    return Converted({"recompute": bool(value) and str(value).lower() != "false"})
