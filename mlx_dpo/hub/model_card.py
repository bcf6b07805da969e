"""The model card of an adapter: Hub metadata, results, code examples, settings and limitations.

Tests run the code examples that the card shows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData

from mlx_dpo.losses.catalogue import LOSSES
from mlx_dpo.losses.loss import RewardKind
from mlx_dpo.losses.metrics import EVAL_PREFIX, METRICS
from mlx_dpo.reporting.evaluations.shown_result import ShownResult
from mlx_dpo.reporting.markdown import code_block, code_span, escape_markdown
from mlx_dpo.runs.folder import CURVES

# Settings with which the sigmoid loss does not start at log 2.
CHANGES_INITIAL_LOSS = {
    "reference_model", "margin_column", "weight_column", "use_weighting", "loss_weights",
}  # fmt: skip
FULL = "full"  # fine-tune type without an adapter
REWARD_MEANING: Mapping[RewardKind, str] = {
    "log-ratio": "log-ratio of the policy to the reference",
    "log-probability": "log-probability of the completion",
    "average log-probability": "average log-probability per token of the completion",
}


@dataclass(frozen=True)
class Sample:
    """A prompt with a completion before training and a completion after training."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class CardContent:
    """The facts that a model card shows, without any path on this machine."""

    name: str
    base_model: str | None  # Hub id
    license: Mapping[str, Any]  # of the base: `license`, `license_name`, `license_link`
    language: Any
    datasets: Sequence[str]  # Hub ids
    pairs: str  # description of the training data, as the end of a sentence
    loss: str  # with its settings
    losses: Sequence[str]  # names
    rewarded: RewardKind
    labelled: bool  # the data are single labelled completions (KTO)
    supervised: bool  # the data are single answers (instruction tuning)
    reference: str
    adapter: str  # type and size
    steps: str  # number of steps, and why training stopped early
    evaluation: Mapping[str, float]
    held_out: int
    settings: Mapping[str, Any]  # those without their default value
    versions: Mapping[str, str]
    digest: str
    fine_tune_type: str  # lora, dora or full
    peft_problem: str | None  # why PEFT cannot load the adapter
    peft_base: str | None  # Hub id of the base for PEFT, if it is not `base_model`
    bits: int | None  # of a base that was quantized when it was loaded
    warnings: Sequence[str] = ()
    samples: Sequence[Sample] = ()
    results: Sequence[ShownResult] = ()  # of `mlx-dpo eval`
    curves: bool = False  # `curves.png` is there


def make_metadata(content: CardContent) -> ModelCardData:
    """Return the model card's metadata in the Hub's format."""
    optional: dict[str, Any] = dict(content.license)
    if content.base_model is not None:
        relation = "finetune" if content.fine_tune_type == FULL else "adapter"
        optional |= {"base_model": content.base_model, "base_model_relation": relation}
    if content.language:
        optional["language"] = content.language
    if content.datasets:
        optional["datasets"] = list(content.datasets)
    tags = ["dpo"] if list(content.losses) == ["sigmoid"] else content.losses
    aim = "instruction-tuning" if content.supervised else "preference-optimization"
    # `library_name: mlx` promises a model that mlx-lm loads by its name; an adapter is not one.
    return ModelCardData(
        library_name="mlx" if content.peft_problem else "peft",
        pipeline_tag="text-generation",
        tags=["mlx-dpo", "mlx", content.fine_tune_type, aim, *tags],
        **optional,
    )


def make_model_card(content: CardContent) -> ModelCard:
    """Return the model card of an adapter: metadata and Markdown text."""
    samples = ["## Before and after", *map(_format_sample, content.samples)]
    sections = [
        f"# {content.name}",
        _about(content),
        "## Results on held-out data",
        _results(content),
        *_eval_results(content.results),
        *(samples if content.samples else []),
        "## Usage",
        *_usage(content),
        "## Settings",
        *_settings(content),
        "## Limitations",
        _limitations(content),
    ]
    metadata = make_metadata(content).to_yaml()
    return ModelCard(f"---\n{metadata}\n---\n\n" + "\n\n".join(sections) + "\n")


def make_fused_model_card(
    base_model: str | None, *, to: str, bits: int | None, inherited: Mapping[str, Any]
) -> ModelCard:
    """Return the model card of a model into which an adapter is fused.

    Args:
        to: format of the model's files, `hf` (Hugging Face) or `mlx`.
        bits: number of bits of the quantized weights; None if they are not quantized.
        inherited: metadata from the base model's card, such as its license.
    """
    optional = dict(inherited)
    if base_model:
        optional |= {"base_model": base_model, "base_model_relation": "finetune"}
    metadata = ModelCardData(
        library_name="transformers" if to == "hf" else "mlx",
        pipeline_tag="text-generation",
        tags=["mlx-dpo", "preference-optimization", *([] if to == "hf" else ["mlx"])],
        **optional,
    )
    base = _hub_link(base_model) if base_model else "its base"
    quantized = f", quantized to {bits} bits" if bits else ""
    text = f"A model trained on preferences by mlx-dpo: {base} with a fused adapter{quantized}."
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}\n")


def _hub_link(name: str) -> str:
    return f"[{escape_markdown(name, keep_code=True)}](https://huggingface.co/{quote(name)})"


def _about(content: CardContent) -> str:
    base = _hub_link(content.base_model) if content.base_model else "a model that is not on the Hub"
    versions = ", ".join(f"{name} {version}" for name, version in content.versions.items())
    what = "Weights" if content.fine_tune_type == FULL else "An adapter"
    aim = "prefer the chosen completions of"
    if content.labelled:
        aim = "prefer the desirable of"
    if content.supervised:
        aim = "answer as in"
    sources = "; ".join(LOSSES[name].source for name in content.losses)
    lines = [
        f"{what} for {base}, trained to {aim} {content.pairs}.",
        "",
        f"* Loss: {content.loss} ({sources})",
        f"* Reference: {content.reference}",
        f"* Trained: {content.adapter}; digest `{content.digest[:12]}`",
        f"* {content.steps}, with {versions}",
    ]
    if content.curves:
        shown = "Loss and accuracy" if content.supervised else "Loss, rewards and accuracy"
        lines += ["", f"![{shown} over the steps]({CURVES})"]
    return "\n".join(lines)


def _results(content: CardContent) -> str:
    if not content.evaluation:
        unit = "rows" if content.supervised else "pairs"
        return f"No {unit} were held out, so the adapter was not evaluated."
    rows = [
        (f"`{name}`", f"{content.evaluation[name]:.4f}", meaning)
        for name, meaning in _metric_meanings(content).items()
        if name in content.evaluation
    ]
    return f"Means over {content.held_out:,}.\n\n" + _table(("metric", "value", "meaning"), rows)


def _eval_results(results: Sequence[ShownResult]) -> list[str]:
    """Return the section with the results of `mlx-dpo eval`; nothing without results."""
    blocks = ["## Other measurements"] if results else []
    for result in results:
        blocks += [
            f"* {finding.label.capitalize()}: {_escape(finding.text)}."
            for finding in result.findings
        ]
        for table in result.tables:
            header = ("", *map(_escape, table.columns))
            rows = [tuple(map(_escape, row)) for row in table.rows]
            blocks.append(f"{_escape(table.title)} ({result.date}):\n\n{_table(header, rows)}")
    return blocks


def _escape(text: str) -> str:
    return escape_markdown(text, keep_code=True)


def _metric_meanings(content: CardContent) -> dict[str, str]:
    """Return a description of each evaluation metric, by the name of the metric."""
    correct = "pairs with a higher reward for the chosen completion"
    if content.labelled:
        correct = "completions whose reward is on the labelled side of KTO's reference point"
    is_plain_dpo = list(content.losses) == ["sigmoid"]
    starts_at_log_2 = is_plain_dpo and not CHANGES_INITIAL_LOSS & content.settings.keys()
    initial = "; log 2 = 0.693 before training" * starts_at_log_2
    rewarded = REWARD_MEANING[content.rewarded]
    chosen = "answers" if content.supervised else "chosen completions"
    meanings = {
        "loss": "cross-entropy per token" if content.supervised else f"the loss{initial}",
        "mean_token_accuracy": "share of the answers' tokens that the model ranks first",
        "accuracies": f"share of {correct}",
        "margins": "reward of the chosen completion minus that of the rejected one",
        "best_worst_margins": "reward of the best completion of a ranked list minus that of the "
        "worst",
        "chosen_rewards": f"reward of chosen completions: beta × {rewarded}",
        "rejected_rewards": "reward of rejected completions",
        "chosen_logps": f"log-probability of {chosen}",
        "rejected_logps": "log-probability of rejected completions",
        "kl": "KTO's estimate of the KL divergence from the reference, in nats",
        "length_correlation": "correlation of the margin with the length difference; near 1 or -1 "
        "the policy learned length",
    }
    return {EVAL_PREFIX + METRICS[field].name: text for field, text in meanings.items()}


def _format_sample(sample: Sample) -> str:
    """Return a sample as blocks of code: a prompt or an answer may hold markup and HTML."""
    return "\n\n".join(
        f"**{name}:**\n\n{code_block(text.strip())}" for name, text in vars(sample).items()
    )


def _settings(content: CardContent) -> list[str]:
    if not content.settings:
        return ["All settings have mlx-dpo's default."]
    rows = [(f"`{name}`", code_span(str(value))) for name, value in content.settings.items()]
    return [_table(("setting", "value"), rows), "All other settings have mlx-dpo's default."]


def _limitations(content: CardContent) -> str:
    learned = "answers" if content.supervised else "preferences"
    lines = [
        f"* The model learned the {learned} of its training data, including their mistakes and "
        "gaps. The metrics were measured on similar data and say nothing about facts, safety or "
        "other tasks.",
        "* Fusing the adapter into a quantized model can undo the training; `mlx-dpo fuse` "
        "measures that.",
        "* " + _license_sentence(content),
    ]
    warnings = (
        f"* Warning during training: {escape_markdown(warning, keep_code=True)}."
        for warning in content.warnings
    )
    return "\n".join([*lines, *warnings])


def _license_sentence(content: CardContent) -> str:
    if name := content.license.get("license_name") or content.license.get("license"):
        return f"License: that of the base model, {escape_markdown(str(name), keep_code=True)}."
    return "License: that of the base model, which was unknown when this card was written."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _usage(content: CardContent) -> list[str]:
    """Return the sections on how to use the adapter in mlx-lm, in mlx-dpo, and in PEFT."""
    base = content.base_model or "BASE"
    sections = [] if content.base_model else ["`BASE` stands for the base model."]
    if content.bits is not None:
        sections.append(
            f"In MLX the adapter belongs to the base quantized to {content.bits} bits. Make it "
            f"with `mlx-dpo convert {base} --bits {content.bits} --output base`, and use `base` "
            "below."
        )
    mlx_base = "base" if content.bits is not None else base
    peft_base = content.peft_base or base
    sections += [
        "### mlx-lm",
        f"```sh\nhf download {content.name} --local-dir adapter\n```",
        f"""```python
from mlx_lm import generate, load

model, tokenizer = load("{mlx_base}", adapter_path="adapter")
chat = [{{"role": "user", "content": "Hello"}}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
print(generate(model, tokenizer, prompt, max_tokens=100))
```""",
        "### mlx-dpo",
        f"```sh\nmlx-dpo pull {content.name} --output adapter\n"
        f"mlx-dpo chat --model {mlx_base} --adapter adapter\n```",
        "### transformers and PEFT",
    ]
    if content.peft_problem:
        problem = escape_markdown(content.peft_problem, keep_code=True)
        return [*sections, f"PEFT cannot load this adapter: {problem}."]
    return [
        *sections,
        f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{peft_base}")
model = AutoModelForCausalLM.from_pretrained("{peft_base}")
model = PeftModel.from_pretrained(model, "{content.name}")
chat = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```""",
    ]
