"""Names of settings, flags and losses of other trainers, and what they are here.

The trainers are TRL and transformers, LLaMA-Factory, axolotl, Unsloth, mlx-lm and mlx-lm-lora.
Names that are also settings of mlx-dpo, with the same meaning, are not listed.
"""

from collections.abc import Iterable

from mlx_dpo.config.setting import check_known, suggest_near_name
from mlx_dpo.errors import ConfigError
from mlx_dpo.io.notices import notify_once
from mlx_dpo.losses.catalogue import LOSSES

BATCH_SIZES = "`batch_size` (pairs per optimizer step) and `micro_batch_size` (per forward pass)"
PAIRS = "`pairs` (the argument PAIRS on the command line)"
SUM_WITH_SFT = "`loss_type` sigmoid and sft, with `loss_weights`"
TOTAL_LENGTH = "`max_length` and `truncation` (prompt and completion together)"

# TRL and transformers.
_TRL = {
    "model_name_or_path": "`model`",
    "model_revision": "`revision`",
    "torch_dtype": "`dtype`",
    "bf16": "`dtype` bfloat16",
    "fp16": "`dtype` float16",
    "bnb_4bit_compute_dtype": "`dtype`",
    "load_in_4bit": "`bits` 4",
    "load_in_8bit": "`bits` 8",
    "dataset_name": PAIRS,
    "dataset_config": f"{PAIRS} as `org/name:config`",
    "dataset_train_split": "`split`",
    "dataset_test_split": "`valid`",
    "output_dir": "`output`",
    "num_train_epochs": "`epochs`",
    "per_device_train_batch_size": BATCH_SIZES,
    "gradient_accumulation_steps": BATCH_SIZES,
    "per_device_eval_batch_size": "`micro_batch_size`",
    "gradient_checkpointing": "`recompute`",
    "max_seq_length": "`max_length`",
    "max_prompt_length": TOTAL_LENGTH,
    "max_completion_length": TOTAL_LENGTH,
    "truncation_mode": "`truncation`",
    "use_peft": "`fine_tune_type` (default: lora)",
    "use_dora": "`fine_tune_type` dora",
    "model_adapter_name": "`start_adapter`",
    "reference_free": "`loss_type` simpo, cpo or orpo",
    "disable_dropout": "`lora_dropout` 0",
    "rpo_alpha": SUM_WITH_SFT,
    "assistant_only_loss": "`loss_type` sft with `assistant_turns` all, its default",
    "completion_only_loss": "`loss_type` sft, which scores the completions alone",
    "lr_scheduler_kwargs": "`min_lr_rate`",
    "eval_strategy": "`eval_steps` N",
    "evaluation_strategy": "`eval_steps` N",
    "save_strategy": "`save_steps` N",
    "logging_strategy": "`logging_steps` N",
    "logging_dir": "`report_to` tensorboard (writes into the run folder)",
    "data_seed": "`seed`",
    "resume_from_checkpoint": "--resume",
    "generate_during_eval": "`samples` N (answers to N held-out prompts at each evaluation)",
    "push_to_hub": "`mlx-dpo push` after training",
    "hub_model_id": "`mlx-dpo push` after training",
    "hub_private_repo": "`mlx-dpo push` after training",
}
_LLAMA_FACTORY = {
    "stage": "`loss_type` (for instruction tuning sft)",
    "mask_history": "`assistant_turns` last",
    "finetuning_type": "`fine_tune_type`",
    "lora_rank": "`lora_r`",
    "lora_target": "`lora_target_modules`",
    "pref_beta": "`beta`",
    "pref_loss": "`loss_type`",
    "pref_ftx": SUM_WITH_SFT,
    "dpo_label_smoothing": "`label_smoothing`",
    "kto_chosen_weight": "`desirable_weight`",
    "kto_rejected_weight": "`undesirable_weight`",
    "ref_model": "`reference_model`",
    "dataset": PAIRS,
    "dataset_dir": f"{PAIRS} with the path of the file",
    "eval_dataset": "`valid`",
    "val_size": "`valid_fraction`",
    "hub_token": "the environment variable HF_TOKEN",
    "hf_token": "the environment variable HF_TOKEN",
    "cutoff_len": "`max_length`",
    "quantization_bit": "`bits`",
    "adapter_name_or_path": "`start_adapter`",
    "interleave_probs": "`mix`",
    "enable_thinking": "`thinking`",
    "default_system": "`system`",
    "plot_loss": "`mlx-dpo report` after training",
    "export_dir": "`mlx-dpo fuse` after training",
    "export_hub_model_id": "`mlx-dpo push` after training",
}
_AXOLOTL = {
    "base_model": "`model`",
    "rl": "`loss_type` (dpo is sigmoid)",
    "rl_beta": "`beta`",
    "dpo_beta": "`beta`",
    "dpo_use_weighting": "`use_weighting`",
    "datasets": PAIRS,
    "test_datasets": "`valid`",
    "val_set_size": "`valid_fraction`",
    "sequence_len": "`max_length`",
    "adapter": "`fine_tune_type`",
    "lora_model_dir": "`start_adapter`",
    "lora_target_linear": "`lora_target_modules`",
    "peft_use_dora": "`fine_tune_type` dora",
    "peft_use_rslora": "`use_rslora`",
    "num_epochs": "`epochs`",
    "eval_batch_size": "`micro_batch_size`",
    "optimizer": "`optim`",
    "lr_scheduler": "`lr_scheduler_type`",
    "cosine_min_lr_ratio": "`min_lr_rate`",
    "evals_per_epoch": "`eval_steps` N",
    "saves_per_epoch": "`save_steps` N",
    "auto_resume_from_checkpoints": "--resume",
    "wandb_project": "`report_to` wandb and `project`",
    "wandb_name": "`report_to` wandb and `run_name`",
    "use_wandb": "`report_to` wandb",
    "use_tensorboard": "`report_to` tensorboard",
}
_UNSLOTH = {
    "model_name": "`model`",
    "r": "`lora_r`",
    "rank": "`lora_r`",
    "target_modules": "`lora_target_modules`",
    "use_gradient_checkpointing": "`recompute`",
    "random_state": "`seed`",
    "full_finetuning": "`fine_tune_type` full",
    "save_method": "`mlx-dpo fuse` after training",
    "save_model": "`mlx-dpo fuse` after training",
    "save_path": "`output`",
    "push_model": "`mlx-dpo push` after training",
    "hub_path": "`mlx-dpo push` after training",
}
_MLX_LM = {
    "data": PAIRS,
    "adapter_path": "`output`",
    "iters": "`max_steps`",
    "grad_checkpoint": "`recompute`",
    "grad_accumulation_steps": BATCH_SIZES,
    "lora_layers": "`num_layers`",
    "lora_parameters": "`lora_r`, `lora_alpha` and `lora_dropout`",
    "lr": "`learning_rate`",
    "lr_schedule": "`lr_scheduler_type`",
    "resume_adapter_file": "`start_adapter`",
    "reference_model_path": "`reference_model`",
    "dpo_cpo_loss_type": "`loss_type`",
    "train_type": "`fine_tune_type`",
    "train_mode": "`loss_type`",
    "steps_per_eval": "`eval_steps` N",
    "save_every": "`save_steps` N",
    "steps_per_report": "`logging_steps` N",
}
# Names that the command line takes for the flag of a setting, next to the setting's own.
FLAG_ALIASES = {
    "lora_r": ("rank", "lora_rank", "r"),
    "epochs": ("num_epochs",),
}

# Names of settings in earlier versions of mlx-dpo. Records of old runs are read with them.
EARLIER_NAMES = {"max_tokens": "micro_batch_tokens", "eval_samples": "samples"}

_SETTINGS = _TRL | _LLAMA_FACTORY | _AXOLOTL | _UNSLOTH | _MLX_LM

_LOGPS_PRECOMPUTED = "reference log-probs are always precomputed"
_OWN_TEMPLATE = "the model's own chat template is used"
_SINGLE_DEVICE = "training runs on one device"
_NOT_NEEDED = {
    "precompute_ref_log_probs": _LOGPS_PRECOMPUTED,
    "precompute_ref_batch_size": _LOGPS_PRECOMPUTED,
    "template": _OWN_TEMPLATE,
    "chat_template_path": _OWN_TEMPLATE,
    "tokenizer_name": "the model's own tokenizer is used",
    "tokenizer_type": "the model's own tokenizer is used",
    "model_type": "it is read from the model's config.json",
    "lora_task_type": "it is always a causal language model",
    "train": "`mlx-dpo train` trains",
    "do_train": "`mlx-dpo train` trains",
    "do_eval": "held-out pairs are always evaluated",
    "overwrite_output_dir": "a new run needs a new folder",
    "overwrite_cache": "the cache knows when rows or settings changed",
    "dataset_prepared_path": "tokenized pairs are cached",
    "dataset_num_proc": "rows are tokenized in parallel",
    "preprocessing_num_workers": "rows are tokenized in parallel",
    "dataset_processes": "rows are tokenized in parallel",
    "dataloader_num_workers": "pairs are read from the disk when a step needs them",
    "dataloader_pin_memory": "memory is shared with the GPU",
    "dataloader_drop_last": "steps are planned from the number of pairs",
    "remove_unused_columns": "unused columns are reported",
    "no_remove_unused_columns": "unused columns are reported",
    "attn_implementation": "attention is MLX's",
    "flash_attn": "attention is MLX's",
    "flash_attention": "attention is MLX's",
    "xformers_attention": "attention is MLX's",
    "use_liger_kernel": "the loss never stores all logits",
    "use_liger_loss": "the loss never stores all logits",
    "use_logits_to_keep": "only the tokens that count are scored",
    "use_unsloth": "MLX's kernels are used",
    "padding_free": "pairs are packed where it is equivalent",
    "sample_packing": "pairs are packed where it is equivalent",
    "packing": "pairs are packed where it is equivalent",
    "pad_to_sequence_len": "batches are only padded to their longest pair",
    "group_by_length": "pairs of a step are grouped by length",
    "train_on_inputs": "only completions are scored",
    "mask_prompt": "only completions are scored",
    "save_safetensors": "every file is safetensors",
    "save_only_model": "the final folder holds the adapters",
    "ddp_timeout": _SINGLE_DEVICE,
    "ddp_find_unused_parameters": _SINGLE_DEVICE,
    "local_rank": _SINGLE_DEVICE,
    "deepspeed": _SINGLE_DEVICE,
    "fsdp": _SINGLE_DEVICE,
    "fsdp_config": _SINGLE_DEVICE,
    "device_map": _SINGLE_DEVICE,
    "use_bnb_nested_quant": "weights are quantized by MLX",
    "bnb_4bit_quant_type": "weights are quantized by MLX",
    "bnb_4bit_use_double_quant": "weights are quantized by MLX",
    "quantization_method": "weights are quantized by MLX",
    "gradient_checkpointing_kwargs": "there is one way to recompute",
    "greater_is_better": "it follows from the metric",
    "tf32": "it is a format of NVIDIA's",
    "torch_compile": "steps are compiled by MLX",
    "is_encoder_decoder": "models are decoders",
    "bias": "LoRA trains no biases",
}
_NOT_SUPPORTED = (
    "max_samples", "neftune_noise_alpha", "lora_modules_to_save", "modules_to_save",
    "additional_target", "loraplus_lr_ratio", "pissa_init", "loftq_config", "init_lora_weights",
    "resize_vocab", "special_tokens", "added_tokens", "rope_scaling", "streaming",
    "dataset_streaming", "freeze_trainable_layers", "use_galore", "use_badam",
    "early_stopping_delta", "auto_find_batch_size", "plugins",
)  # fmt: skip

# The advice that follows "unknown setting `name`; ".
EQUIVALENTS = (
    {name: f"use {setting}" for name, setting in _SETTINGS.items()}
    | {name: f"use `{setting}`" for name, setting in EARLIER_NAMES.items()}
    | {name: f"not needed, {why}" for name, why in _NOT_NEEDED.items()}
    | dict.fromkeys(_NOT_SUPPORTED, "not supported; leave it out")
)

# Names that are accepted for a loss, and the names that they are recorded under.
LOSS_ALIASES = {"dpo": "sigmoid"}
# Losses under the names of other trainers.
LOSS_NAMES = {
    "slic": "hinge",
    "rso": "hinge",
    "kto_pair": "kto",
    "rdpo": "robust",
    "smaug": "dpop",
    "dpo_positive": "dpop",
    "nca": "nca_pair",
    "bco": "bco_pair",
    "exo": "exo_pair",
    "sppo": "sppo_hard",
    "apo": "apo_zero",
    "aot_pair": "aot",
    "nll": "sft",
    "ce": "sft",
    "dpo_norm": "sigmoid_norm",
    "ln_dpo": "sigmoid_norm",
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


def suggest(name: str, known: Iterable[str]) -> str:
    """Return advice on an unknown name of a setting: its equivalent here, or a similar name."""
    name = name.replace("-", "_")
    return EQUIVALENTS.get(name) or suggest_near_name(name, known)


def resolve_loss_name(name: str) -> str:
    """Return the name of a loss here; log a notice if it was given under another accepted name."""
    if name.lower() not in LOSS_ALIASES:
        return name
    loss = LOSS_ALIASES[name.lower()]
    notify_once(f"loss `{name}` is recorded as `{loss}`, TRL's name for it")
    return loss


def check_loss_name(name: str) -> None:
    """Raise `ConfigError` if there is no such loss; suggest the equivalent of another trainer's
    name.
    """
    known = LOSS_NAMES.get(name.lower().replace("-", "_"))
    if name not in LOSSES and known is not None:
        raise ConfigError(f"unknown loss `{name}`; it is `{known}` here")
    check_known(name, LOSSES, "loss", hint="`mlx-dpo losses` lists them")


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
