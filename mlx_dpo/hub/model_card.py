"""The page that goes with an adapter: Hub metadata, and what a person wants to know of it.

Facts come in, text goes out; every program that is shown is run by a test.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from mlx_dpo.losses.catalogue import LOSSES
from mlx_dpo.losses.loss import RewardKind
from mlx_dpo.runs.folder import CURVES

# What makes a loss that is log 2 before anything is learnt another one.
MOVED = {"reference_model", "margin_column", "weight_column", "use_weighting", "loss_weights"}
FULL = "full"  # the way in which there is no adapter
REWARDED: Mapping[RewardKind, str] = {
    "log-ratio": "how much likelier the answer is than under the reference, as a log-ratio",
    "log-probability": "the log-probability of the answer",
    "average log-probability": "the average log-probability of a token of the answer",
}


@dataclass(frozen=True)
class Sample:
    """One prompt, and what was said to it before and after training."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class CardFacts:
    """What the card is made of; nothing in it names a place on this machine."""

    name: str
    base_model: str | None  # Hub id
    license: Mapping[str, Any]  # of the base: `license`, `license_name`, `license_link`
    language: Any
    datasets: Sequence[str]  # Hub ids
    pairs: str  # what was trained on, as a sentence's end
    loss: str  # with its settings
    losses: Sequence[str]  # their names
    rewarded: RewardKind
    labelled: bool
    reference: str
    adapter: str  # its kind and size
    steps: str  # how many, and why not more
    evaluation: Mapping[str, float]
    held_out: int
    settings: Mapping[str, Any]  # that are not the default
    versions: Mapping[str, str]
    digest: str
    way: str  # lora or dora
    not_in_peft: str | None  # why, or None where it loads there
    peft_base: str | None  # Hub id of the checkpoint that PEFT wants, where it is another
    bits: int | None  # the base was quantised on load
    warnings: Sequence[str] = ()
    samples: Sequence[Sample] = ()
    curves: bool = False


def metadata(facts: CardFacts) -> ModelCardData:
    """The card's metadata as the Hub reads it."""
    known: dict[str, Any] = dict(facts.license)
    if facts.base_model is not None:
        relation = "finetune" if facts.way == FULL else "adapter"
        known |= {"base_model": facts.base_model, "base_model_relation": relation}
    if facts.language:
        known["language"] = facts.language
    if facts.datasets:
        known["datasets"] = list(facts.datasets)
    tags = ["dpo"] if list(facts.losses) == ["sigmoid"] else facts.losses
    # An adapter's repository cannot be loaded as a model, which tag `library_name: mlx` promises.
    return ModelCardData(
        library_name="mlx" if facts.not_in_peft else "peft",
        pipeline_tag="text-generation",
        tags=["mlx-dpo", "mlx", facts.way, "preference-optimization", *tags],
        **known,
    )


def card(facts: CardFacts) -> ModelCard:
    """The whole card."""
    parts = [
        f"# {facts.name}",
        _about(facts),
        "## On pairs that were held out",
        _results(facts),
        *(["## Before and after", *map(_sample, facts.samples)] if facts.samples else []),
        "## How to use it",
        *usage(facts),
        "## Settings",
        *_settings(facts),
        "## Limits",
        _limits(facts),
    ]
    return ModelCard(f"---\n{metadata(facts).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def fused_card(
    base_model: str | None, *, to: str, bits: int | None, inherited: Mapping[str, Any]
) -> ModelCard:
    """The card of a model that a run was fused into: metadata, what it is `inherited` from its
    base among it, and what it is.
    """
    known = dict(inherited)
    if base_model:
        known |= {"base_model": base_model, "base_model_relation": "finetune"}
    data = ModelCardData(
        library_name="transformers" if to == "hf" else "mlx",
        pipeline_tag="text-generation",
        tags=["mlx-dpo", "preference-optimization", *([] if to == "hf" else ["mlx"])],
        **known,
    )
    of = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "its base"
    packed = f", quantised to {bits} bits" if bits else ""
    text = f"A model that mlx-dpo trained on preference pairs: {of} with its adapter in it{packed}."
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def _base(facts: CardFacts) -> str:
    name = facts.base_model
    return f"[{name}](https://huggingface.co/{name})" if name else "a model that is not on the Hub"


def _about(facts: CardFacts) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    what = "Weights" if facts.way == FULL else "An adapter"
    aim = "answer as the good of" if facts.labelled else "prefer the chosen answers of"
    lines = [
        f"{what} for {_base(facts)}, trained to {aim} {facts.pairs}.",
        "",
        f"* Loss: {facts.loss} ({'; '.join(LOSSES[name].source for name in facts.losses)})",
        f"* Reference: {facts.reference}",
        f"* Trained: {facts.adapter}; digest `{facts.digest[:12]}`",
        f"* {facts.steps}, with {versions}",
    ]
    if facts.curves:
        lines += ["", f"![Loss, rewards and accuracy over the steps]({CURVES})"]
    return "\n".join(lines)


def _results(facts: CardFacts) -> str:
    if not facts.evaluation:
        return "None were held out, so nothing is known of unseen pairs."
    rows = [
        (f"`{name}`", f"{facts.evaluation[name]:.4f}", meaning)
        for name, meaning in _meanings(facts).items()
        if name in facts.evaluation
    ]
    return f"Means over {facts.held_out:,}.\n\n" + _table(("metric", "value", "what it is"), rows)


def _meanings(facts: CardFacts) -> dict[str, str]:
    """What the figures of an evaluation are."""
    right = "pairs whose chosen answer has the larger reward"
    if facts.labelled:
        right = "answers whose reward lies on the side of KTO's reference point that they should"
    plain = list(facts.losses) == ["sigmoid"] and not MOVED & facts.settings.keys()
    start = "; log 2 = 0.693 before anything is learnt" * plain
    return {
        "eval_loss": f"the loss{start}",
        "eval_rewards/accuracies": f"share of {right}",
        "eval_rewards/margins": "reward of the chosen answer less that of the rejected one",
        "eval_rewards/chosen": f"reward of chosen answers: beta × {REWARDED[facts.rewarded]}",
        "eval_rewards/rejected": "the same of rejected answers",
        "eval_logps/chosen": "log-probability of whole chosen answers",
        "eval_logps/rejected": "the same of rejected answers",
        "eval_kl": "KTO's estimate of the divergence from the reference, in nats",
        "eval_length_correlation": "between how much longer chosen is and the margin; near 1 or "
        "-1: it learnt lengths",
    }


def _sample(sample: Sample) -> str:
    return "\n>\n".join(
        f"> **{name}:** " + text.strip().replace("\n", "\n> ")
        for name, text in vars(sample).items()
    )


def _settings(facts: CardFacts) -> list[str]:
    if not facts.settings:
        return ["All of them have mlx-dpo's default."]
    rows = [(f"`{name}`", f"`{value}`") for name, value in facts.settings.items()]
    return [_table(("setting", "value"), rows), "Everything else has mlx-dpo's default."]


def _limits(facts: CardFacts) -> str:
    lines = [
        "* It prefers what its pairs prefer, with their mistakes and blind spots; the figures are "
        "of pairs like those, and say nothing of facts, safety or other tasks.",
        "* Fusing it into a quantised model can undo the training; `mlx-dpo fuse` measures that.",
        "* " + _licence(facts),
    ]
    return "\n".join([*lines, *(f"* While it was trained: {said}." for said in facts.warnings)])


def _licence(facts: CardFacts) -> str:
    if licence := facts.license.get("license_name") or facts.license.get("license"):
        return f"Its licence is that of its base: {licence}."
    return "Its base's licence holds for it as well, and could not be read here."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
