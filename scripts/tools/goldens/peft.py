"""Write tests/goldens/peft: adapters that PEFT saved, and what it makes of the model with them.

    python -m venv trl && trl/bin/pip install peft torch transformers   # CPU wheels will do
    trl/bin/python scripts/tools/goldens/peft.py

It needs neither MLX nor this package. Run it again whenever models/tiny-chat changes.
"""

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "models" / "tiny-chat"
FOLDER = ROOT / "tests" / "goldens" / "peft"
LOGITS = FOLDER / "logits.json"

TOKENS = (1, 40, 41, 42, 300, 7, 900, 2)
WORDS = 48  # logits that are stored per token
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": ["o_proj", "up_proj"], "use_rslora": True},
    "dora": {"target_modules": ["v_proj", "gate_proj"], "use_dora": True},
    "some-layers": {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [0, 2]},
    "embeddings": {"target_modules": ["embed_tokens", "k_proj"]},
}
SIZES = {"r": 2, "lora_alpha": 3.0, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}


def main() -> None:
    """Write the adapters and, next to them, the logits."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    golden = {
        "made_by": "scripts/tools/goldens/peft.py",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "model": sha256(MODEL / "model.safetensors"),
        "tokens": TOKENS,
        "logits": {name: make(name) for name in ADAPTERS},
    }
    LOGITS.write_text(json.dumps(golden) + "\n")
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{len(ADAPTERS)} adapters, {size / 1e3:.0f} kB in {FOLDER.relative_to(ROOT)}")


def sha256(path: Path) -> str:
    """Return the digest of a file in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make(name: str) -> list[list[float]]:
    """Save an adapter in which every array does something; logits under it. (tokens, WORDS)"""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    if name == "embeddings":  # of a tied model PEFT adapts the table and leaves the head
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.clone())
        base.config.tie_word_embeddings = False
    model = get_peft_model(base, LoraConfig(**SIZES, **ADAPTERS[name])).eval()
    drawn = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for path, value in model.named_parameters():
            if "magnitude" in path:
                value.mul_(1 + 0.1 * torch.randn(value.shape, generator=drawn))
            elif "lora_" in path:
                value.copy_(0.1 * torch.randn(value.shape, generator=drawn))
        logits = model(input_ids=torch.tensor([TOKENS])).logits[0, :, :WORDS]
    model.save_pretrained(FOLDER / name, save_embedding_layers=False)
    settings = FOLDER / name / "adapter_config.json"
    written = json.loads(settings.read_text()) | {"base_model_name_or_path": MODEL.name}
    settings.write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")
    (FOLDER / name / "README.md").unlink(missing_ok=True)
    return [[round(value, 6) for value in row] for row in logits.tolist()]


if __name__ == "__main__":
    main()
