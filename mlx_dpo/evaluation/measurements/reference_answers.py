"""Compare greedy answers of base and aligned model with reference answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from mlx_dpo.adapters.switch import AdapterState
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import Prompt, add_system_prompt, check_no_template_kwargs, make_prompt
from mlx_dpo.data.sources import resolve_source
from mlx_dpo.errors import BadPairError, ConfigError, DataError
from mlx_dpo.evaluation.measurements.measurement import Measure
from mlx_dpo.evaluation.measurements.paired_difference import paired_difference
from mlx_dpo.evaluation.measurements.rouge import is_exact_match, rouge_l
from mlx_dpo.generation.batch import generate_tokens
from mlx_dpo.generation.context import context_length
from mlx_dpo.generation.decode import decode_tokens, strip_thinking
from mlx_dpo.generation.prompt import encode_prompt, encode_text
from mlx_dpo.saved_runs.open import SwitchableModel
from mlx_dpo.schemas import parse_supervised
from mlx_dpo.schemas.schema import Row, RowRules
from mlx_dpo.types import Text
from mlx_dpo.units import format_items

DEFAULT_MAX_TOKENS = 512
STATES: tuple[AdapterState, ...] = ("base", "aligned")
LAST_TURN = RowRules(supervised=True, assistant_turns="last")
METRICS: dict[str, Callable[[str, str], float]] = {
    "rouge_l": rouge_l,
    "exact_match": is_exact_match,
}


class ReferenceAnswer(NamedTuple):
    """A prompt and the answer that is wanted."""

    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class ReferenceMeasurement:
    """Agreement of base and aligned model with reference answers.

    Attributes:
        scores: value per row, by state and metric.
        cut: number of answers that were cut, by state.
    """

    subject: str
    settings: Mapping[str, Any]
    scores: Mapping[AdapterState, Mapping[str, Sequence[float]]]
    cut: Mapping[AdapterState, int]
    notes: tuple[str, ...]
    name: str = "reference_answers"

    def to_dict(self) -> dict[str, Any]:
        """Return the means of both states and their paired differences."""
        base, aligned = self.scores["base"], self.scores["aligned"]
        results: dict[str, Any] = {"of": self.subject, "rows": len(base["rouge_l"])}
        for state, scores in self.scores.items():
            means = {name: fmean(values) for name, values in scores.items()}
            results[state] = means | {"cut_answers": self.cut[state]}
        results["difference"] = {
            name: paired_difference(base[name], aligned[name]).to_dict() for name in METRICS
        }
        return results


def prepare_reference_answers(
    file: str, *, limit: int | None = None, max_tokens: int | None = None
) -> Measure:
    """Read rows with answers, and return what measures a model's answers against them.

    Raises:
        DataError: the file cannot be read, or has no answers.
    """
    rows, dropped = read_reference_answers(file)
    used, subject = rows[:limit], Path(file).name or file
    notes = []
    if dropped:
        left_out = format_items(dropped, "rows")
        notes.append(f"left out: {left_out} without a usable prompt or answer")
    if len(used) < len(rows):
        notes.append(f"the first {len(used):,} of {len(rows):,} rows were used")
    sampling = Sampling(max_tokens=max_tokens or DEFAULT_MAX_TOKENS)

    def measure(model: SwitchableModel) -> ReferenceMeasurement:
        found = measure_reference_answers(model, used, sampling, subject=subject)
        settings = dict(found.settings) | {"limit": limit}
        return replace(found, settings=settings, notes=(*notes, *found.notes))

    return measure


def read_reference_answers(file: str) -> tuple[list[ReferenceAnswer], int]:
    """Return the rows of a file, and the number of rows that were left out.

    A row has `prompt` with `answer` or `completion`, or it is a conversation (`messages`), whose
    last answer is wanted, or of another schema of instruction tuning or of pairs (`chosen`).

    Raises:
        DataError: the file cannot be read, a row has no answer, or no row is left.
    """
    rows: list[ReferenceAnswer] = []
    dropped = 0
    for row in resolve_source(file).rows():
        try:
            rows.extend(_parse(row))
        except BadPairError:  # an empty prompt or answer
            dropped += 1
    if not rows:
        raise DataError(f"{file}: contains no answers; write rows with `prompt` and `answer`")
    return rows, dropped


def _parse(row: Row) -> list[ReferenceAnswer]:
    record = row.record
    if "answer" in record and "completion" not in record:
        row = replace(row, record={**record, "completion": record["answer"]})
    examples = parse_supervised(row, LAST_TURN)
    for example in examples:
        check_no_template_kwargs(example.template_kwargs, row.location)
    return [
        ReferenceAnswer(
            make_prompt(example.prompt, example.location, implicit_prompt=example.implicit_prompt),
            _text(example.completion),
        )
        for example in examples
    ]


def _text(completion: Text) -> str:
    if isinstance(completion, str):
        return completion.strip()
    return "\n".join(str(turn["content"]) for turn in completion).strip()


def measure_reference_answers(
    model: SwitchableModel, rows: Sequence[ReferenceAnswer], sampling: Sampling, *, subject: str
) -> ReferenceMeasurement:
    """Return how far greedy answers of base and aligned model agree with reference answers.

    Prompts are rendered as in training, with the system message of the run; thinking is not part
    of an answer.

    Raises:
        ConfigError: the tokenizer has no chat template, or a prompt leaves no room for an answer.
    """
    prompts = _encode(model, [row.prompt for row in rows])
    scores: dict[AdapterState, dict[str, list[float]]] = {}
    cut: dict[AdapterState, int] = {}
    for state in STATES:
        with model.switch.activated(state):
            answers, cut[state] = _answers(model, prompts, sampling)
        scores[state] = {
            name: [
                float(score(answer, row.answer)) for answer, row in zip(answers, rows, strict=True)
            ]
            for name, score in METRICS.items()
        }
    notes = () if not any(cut.values()) else (_cut_note(cut, sampling.max_tokens),)
    settings = {"max_tokens": sampling.max_tokens, "temperature": 0}
    return ReferenceMeasurement(subject, settings, scores, cut, notes)


def _encode(model: SwitchableModel, prompts: Sequence[Prompt]) -> list[list[int]]:
    tokenizer = model.base.tokenizer
    config = None if model.run is None else model.run.config
    if model.run is not None and model.run.trained_on_text:
        return [encode_text(tokenizer, _plain_text(prompt)) for prompt in prompts]
    if not tokenizer.has_chat_template:
        raise ConfigError(
            f"{model.base.source}: its tokenizer has no chat template; use a chat model"
        )
    system, thinking = (None, None) if config is None else (config.system, config.thinking)
    return [
        encode_prompt(tokenizer, prompt.messages, thinking=thinking)
        for prompt in add_system_prompt(prompts, system)
    ]


def _plain_text(prompt: Prompt) -> str:
    """Return the text of a prompt for a run that was trained on plain text.

    Raises:
        ConfigError: the prompt is a conversation.
    """
    if prompt.text is not None:
        return prompt.text
    if len(prompt.messages) > 1:
        raise ConfigError(
            f"{prompt.location}: a conversation, but the run was trained on plain text; write the "
            "prompt as text"
        )
    return str(prompt.messages[0]["content"])


def _answers(
    model: SwitchableModel, prompts: Sequence[list[int]], sampling: Sampling
) -> tuple[list[str], int]:
    """Return the active model's answers, and the number of those that were cut."""
    tokenizer = model.base.tokenizer
    generated = generate_tokens(
        model.base.model,
        tokenizer.eos_token_ids,
        prompts,
        sampling,
        context=context_length(model.base.config),
    )
    texts = [
        strip_thinking(tokenizer, prompt, decode_tokens(tokenizer, answer.tokens)).strip()
        for prompt, answer in zip(prompts, generated, strict=True)
    ]
    return texts, sum(answer.stop_token is None for answer in generated)


def _cut_note(cut: Mapping[AdapterState, int], max_tokens: int) -> str:
    return (
        f"answers that were cut at {max_tokens:,} tokens or at the end of the context: "
        f"{cut['base']:,} of the base, {cut['aligned']:,} of the aligned model"
    )
