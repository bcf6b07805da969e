"""Setting names of other trainers (TRL, transformers, mlx-lm, mlx-lm-lora) and their equivalents.

Names that are also settings of mlx-dpo, with the same meaning, are not listed.
"""

from collections.abc import Iterable

from mlx_dpo.config.setting import check_known
from mlx_dpo.errors import ConfigError

BATCH_SIZES = "`batch_size` (pairs per optimizer step) and `micro_batch_size` (per forward pass)"
PAIRS = "PAIRS"

_SETTINGS = {
    "model_name_or_path": "`model`",
    "model_revision": "`revision`",
    "torch_dtype": "`dtype`",
    "bf16": "`dtype` bfloat16",
    "fp16": "`dtype` float16",
    "load_in_4bit": "`bits` 4",
    "load_in_8bit": "`bits` 8",
    "dataset_name": PAIRS,
    "data": PAIRS,
    "dataset_config": f"{PAIRS} as `org/name:config`",
    "dataset_train_split": "`split`",
    "dataset_test_split": "`valid`",
    "output_dir": "`output`",
    "adapter_path": "`output`",
    "num_train_epochs": "`epochs`",
    "iters": "`max_steps`",
    "per_device_train_batch_size": BATCH_SIZES,
    "gradient_accumulation_steps": BATCH_SIZES,
    "per_device_eval_batch_size": "`micro_batch_size`",
    "gradient_checkpointing": "`recompute`",
    "grad_checkpoint": "`recompute`",
    "max_seq_length": "`max_length`",
    "max_prompt_length": "`max_length` and `truncation` (prompt and completion together)",
    "max_completion_length": "`max_length` and `truncation` (prompt and completion together)",
    "truncation_mode": "`truncation`",
    "use_peft": "`fine_tune_type` (default: lora)",
    "use_dora": "`fine_tune_type` dora",
    "lora_parameters": "`lora_r`, `lora_alpha` and `lora_dropout`",
    "resume_adapter_file": "`start_adapter`",
    "model_adapter_name": "`start_adapter`",
    "reference_model_path": "`reference_model`",
    "dpo_cpo_loss_type": "`loss_type`",
    "rpo_alpha": "`loss_type` sigmoid and sft, with `loss_weights`",
    "eval_strategy": "`eval_steps` N",
    "evaluation_strategy": "`eval_steps` N",
    "steps_per_eval": "`eval_steps` N",
    "save_strategy": "`save_steps` N",
    "save_every": "`save_steps` N",
    "steps_per_report": "`logging_steps` N",
    "logging_dir": "`report_to` tensorboard (writes into the run folder)",
    "data_seed": "`seed`",
    "resume_from_checkpoint": "--resume",
    "push_to_hub": "`mlx-dpo push` after training",
    "hub_model_id": "`mlx-dpo push` after training",
}

# The advice that follows "unknown setting `name`; ".
EQUIVALENTS = {name: f"use {setting}" for name, setting in _SETTINGS.items()} | {
    "precompute_ref_log_probs": "not needed, reference log-probs are always precomputed",
}

# Arguments of TRL's DPOTrainer: the advice that follows "unknown argument `name`; ".
TRAINER_ARGUMENTS = {
    "model": "use `DPOConfig(model=...)`",
    "ref_model": "not needed, the base with its adapter disabled is the reference; for another "
    "model use `DPOConfig(reference_model=...)`",
    "args": "give the `DPOConfig` as the first argument",
    "processing_class": "not needed, the model's own tokenizer is used",
    "tokenizer": "not needed, the model's own tokenizer is used",
    "peft_config": "use `DPOConfig(lora_r=..., lora_alpha=..., lora_target_modules=...)`",
    "callbacks": "iterate over `trainer.steps()` and act between steps",
    "data_collator": "not needed, pairs are packed or padded automatically",
    "compute_metrics": "not supported; metrics of each step are in `trainer.steps()`",
    "optimizers": "use `DPOConfig(optim=..., lr_scheduler_type=...)`",
}


def check_trainer_arguments(
    names: Iterable[str], *, known: Iterable[str], settings: Iterable[str]
) -> None:
    """Raise `ConfigError` for the first name that is no argument of `DPOTrainer`.

    Args:
        names: keyword arguments in a call of `DPOTrainer` that it does not accept.
        known: keyword arguments that `DPOTrainer` accepts.
        settings: names of the settings of `DPOConfig`.
    """
    for name in names:
        if name in TRAINER_ARGUMENTS:
            raise ConfigError(f"unknown argument `{name}`; {TRAINER_ARGUMENTS[name]}")
        if name in settings:
            raise ConfigError(f"unknown argument `{name}`; use `DPOConfig({name}=...)`")
        if name in EQUIVALENTS:
            raise ConfigError(f"unknown argument `{name}`; in DPOConfig: {EQUIVALENTS[name]}")
        check_known(name, known, "argument")
