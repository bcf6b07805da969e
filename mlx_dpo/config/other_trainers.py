"""What other trainers call by names of their own: TRL, transformers, mlx-lm and mlx-lm-lora.

Names that mean the same here as there are not in it: they are settings.
"""

ACCUMULATED = "`batch_size`, all pairs of a step; they go through `micro_batch_size` at a time"
EVERY = "which is how often"
PREFERENCES = "PAIRS"

EQUIVALENTS = {
    "model_name_or_path": "`model`",
    "model_revision": "`revision`",
    "torch_dtype": "`dtype`",
    "bf16": "`dtype` bfloat16",
    "fp16": "`dtype` float16",
    "load_in_4bit": "`bits` 4",
    "load_in_8bit": "`bits` 8",
    "dataset_name": PREFERENCES,
    "data": PREFERENCES,
    "dataset_config": f"{PREFERENCES} as `org/name:config`",
    "dataset_train_split": "`split`",
    "dataset_test_split": "`valid`",
    "output_dir": "`output`",
    "adapter_path": "`output`",
    "num_train_epochs": "`epochs`",
    "iters": "`max_steps`",
    "per_device_train_batch_size": ACCUMULATED,
    "gradient_accumulation_steps": ACCUMULATED,
    "per_device_eval_batch_size": "`micro_batch_size`",
    "gradient_checkpointing": "`recompute`",
    "grad_checkpoint": "`recompute`",
    "max_seq_length": "`max_length`",
    "max_prompt_length": "`max_length` and `truncation`, which are of prompt and answer together",
    "max_completion_length": "`max_length` and `truncation`, which are of prompt and answer",
    "truncation_mode": "`truncation`",
    "use_peft": "`fine_tune_type`, which is LoRA unless it says otherwise",
    "use_dora": "`fine_tune_type` dora",
    "lora_parameters": "`lora_r`, `lora_alpha` and `lora_dropout`",
    "resume_adapter_file": "`start_adapter`",
    "model_adapter_name": "`start_adapter`",
    "reference_model_path": "`reference_model`",
    "precompute_ref_log_probs": "nothing: they always are, once",
    "dpo_cpo_loss_type": "`loss_type`",
    "rpo_alpha": "`loss_type` sigmoid and sft, with `loss_weights`",
    "eval_strategy": f"`eval_steps`, {EVERY}",
    "evaluation_strategy": f"`eval_steps`, {EVERY}",
    "steps_per_eval": f"`eval_steps`, {EVERY}",
    "save_strategy": f"`save_steps`, {EVERY}",
    "save_every": f"`save_steps`, {EVERY}",
    "steps_per_report": f"`logging_steps`, {EVERY}",
    "logging_dir": "`report_to` tensorboard, which writes into the run folder",
    "data_seed": "`seed`",
    "resume_from_checkpoint": "--resume",
    "push_to_hub": "`mlx-dpo push`, once it is trained",
    "hub_model_id": "`mlx-dpo push`, once it is trained",
}
