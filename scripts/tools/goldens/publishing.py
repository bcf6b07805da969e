"""Write tests/goldens/publishing: tiny checkpoints, adapters that PEFT saved, and their logits.

    python -m venv trl && trl/bin/pip install peft torch transformers   # CPU wheels will do
    trl/bin/python scripts/tools/goldens/publishing.py

It needs neither MLX nor this package.
"""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "tests" / "goldens" / "publishing"

TOKENS = (1, 5, 9, 30, 2, 17, 3)
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 48,
    "max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"tie_word_embeddings": False},
    "mistral": SMALL,
    # mlx-lm takes this base where the configuration has it in `rope_parameters` alone.
    "qwen2": SMALL
    | {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "gemma2": SMALL | {"query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 3, "n_positions": 64, "vocab_size": 48},
    "mixtral": SMALL | {"num_local_experts": 2},
}
ATTENTION = ["q_proj", "v_proj"]
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "mixtral": ATTENTION}
ALL = [*ATTENTION, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "last-layers": {"layers_to_transform": [1, 2]},
}


def main() -> None:
    """Write checkpoints and adapters, and next to them the logits."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    golden = {
        "made_by": "scripts/tools/goldens/publishing.py",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "tokens": TOKENS,
        "logits": {kind: make(kind) for kind in MODELS},
    }
    (FOLDER / "logits.json").write_text(json.dumps(golden) + "\n")
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{len(MODELS)} checkpoints, {size / 1e3:.0f} kB in {FOLDER.relative_to(ROOT)}")


def make(kind: str) -> dict[str, list[list[float]]]:
    """Save a checkpoint and its adapters; logits of each. (T, V)"""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(sum(map(ord, kind)))
    config = AutoConfig.for_model(kind, **MODELS[kind], bos_token_id=1, eos_token_id=2)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for value in base.parameters():
            value.add_(0.1 * torch.randn(value.shape))
    base.save_pretrained(FOLDER / kind)
    if kind == "gpt2":
        _as_on_the_hub(FOLDER / kind)
    logits = {name: adapt(kind, name) for name in ADAPTERS}
    (FOLDER / kind / "generation_config.json").unlink()
    return logits


def _as_on_the_hub(folder: Path) -> None:
    """GPT-2's own checkpoint has no `transformer.` before its names, and an `n_ctx`."""
    from safetensors.torch import load_file, save_file

    file, settings = folder / "model.safetensors", folder / "config.json"
    tensors = {name.removeprefix("transformer."): v for name, v in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"n_ctx": 64}, indent=1))


def adapt(kind: str, name: str) -> list[list[float]]:
    """Save an adapter in which every array does something; logits under it. (T, V)"""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(FOLDER / kind, dtype=torch.float32)
    settings = LoraConfig(
        r=2,
        lora_alpha=3.0,
        task_type="CAUSAL_LM",
        target_modules=TARGETS.get(kind, ALL),
        fan_in_fan_out=kind == "gpt2",
        **ADAPTERS[name],
    )
    model = get_peft_model(base, settings).eval()
    drawn = torch.Generator().manual_seed(len(kind + name))
    with torch.no_grad():
        for path, value in model.named_parameters():
            if "magnitude" in path:
                value.mul_(1 + 0.1 * torch.randn(value.shape, generator=drawn))
            elif "lora_" in path:
                value.copy_(0.2 * torch.randn(value.shape, generator=drawn))
        logits = model(input_ids=torch.tensor([TOKENS])).logits[0]
    folder = FOLDER / kind / name
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    written = json.loads((folder / "adapter_config.json").read_text())
    written |= {"base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(
        json.dumps(written, indent=1, sort_keys=True) + "\n"
    )
    return [[round(value, 6) for value in row] for row in logits.tolist()]


if __name__ == "__main__":
    main()
