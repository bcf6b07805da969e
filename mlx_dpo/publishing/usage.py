"""How an adapter is used, as its card shows it: every program here is run by a test."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_dpo.publishing.card import CardFacts


def usage(facts: "CardFacts") -> list[str]:
    """Sections for mlx-lm, for mlx-dpo, and for transformers with PEFT."""
    base = facts.base_model or "BASE"
    parts = [] if facts.base_model else ["`BASE` is the model that it was trained on."]
    if facts.bits is not None:
        parts.append(
            f"In MLX it belongs to its base quantised to {facts.bits} bits: make that first with "
            f"`mlx-dpo convert {base} --bits {facts.bits} --output base`, and use `base` below."
        )
    mine = "base" if facts.bits is not None else base
    theirs = facts.peft_base or base
    parts += [
        "### mlx-lm",
        f"```sh\nhf download {facts.name} --local-dir adapter\n```",
        f"""```python
from mlx_lm import generate, load

model, tokenizer = load("{mine}", adapter_path="adapter")
chat = [{{"role": "user", "content": "Hello"}}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
print(generate(model, tokenizer, prompt, max_tokens=100))
```""",
        "### mlx-dpo",
        f"```sh\nmlx-dpo pull {facts.name} --output adapter\n"
        f"mlx-dpo chat --model {mine} --adapter adapter\n```",
        "### transformers and PEFT",
    ]
    if facts.not_in_peft:
        return [*parts, f"It does not load there: {facts.not_in_peft}."]
    return [
        *parts,
        f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{theirs}")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{theirs}"), "{facts.name}")
chat = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```""",
    ]
