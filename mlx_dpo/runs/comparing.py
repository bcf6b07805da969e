"""A run's policy and what it started from, or several runs, asked the same; answers shaded."""

from collections.abc import Iterator, Sequence

from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.comparison import (
    Column,
    Comparison,
    Shaded,
    completion_token_logps,
    shaded,
)
from mlx_dpo.policy.batched import Completion, complete
from mlx_dpo.policy.generation import context_length, prompt_tokens, text_tokens
from mlx_dpo.policy.sampling import Sampling
from mlx_dpo.policy.sides import Side
from mlx_dpo.preferences.prompts import Prompt, read_prompts, with_system
from mlx_dpo.runs.policies import Opened
from mlx_dpo.runs.questions import prompts_held_out
from mlx_dpo.runs.sides import TwoSided, open_sides

Ids = list[int]


def compare(
    runs: Sequence[str], prompts: str | None, sampling: Sampling, *, limit: int | None = None
) -> Comparison:
    """Base and aligned of a run; of several runs the aligned ones, one in memory at a time.

    Without a file of `prompts`, those that the first run held out; `limit` takes the first ones.

    Raises:
        ConfigError: a prompt leaves no room for an answer, or there are none.
        RunError, ModelError, DataError: a run, its model or the prompts are at fault.
    """
    asked, columns, notes = _ask(runs[0], prompts, sampling, limit, alone=len(runs) == 1)
    for name in runs[1:]:
        _, more, also = _ask(name, asked, sampling, None, alone=False)
        columns, notes = columns + more, notes + also
    return Comparison(tuple(asked), tuple(columns), tuple(dict.fromkeys(notes)))


def _ask(
    name: str,
    prompts: str | list[Prompt] | None,
    sampling: Sampling,
    limit: int | None,
    *,
    alone: bool,
) -> tuple[list[Prompt], list[Column], list[str]]:
    """The prompts, the columns of one run and what there is to say of it; it is freed here."""
    opened = open_sides(name)
    run = opened.run
    assert run is not None
    if prompts is None:
        prompts = prompts_held_out(run, opened.base)
    elif isinstance(prompts, str):
        prompts = read_prompts(prompts)
    asked = prompts[:limit]
    notes = [*_limited(len(prompts), limit), *_notes(name, opened, run)]
    sides: tuple[Side, ...] = ("base", "aligned") if alone else ("aligned",)
    told = with_system(asked, run.config.system)
    columns = [
        Column(side if alone else name, answers)
        for side, answers in _answers(opened, run, told, sides, sampling)
    ]
    return asked, columns, notes


def _limited(found: int, limit: int | None) -> Iterator[str]:
    if limit is not None and limit < found:
        yield f"the first {limit} of {found} prompts"


def _notes(name: str, opened: TwoSided, run: Opened) -> Iterator[str]:
    yield from opened.notes
    if run.config.reference_model is not None:
        yield (
            f"{name} was trained against {run.config.reference_model}; here it is held against "
            "the model that it started from"
        )


def _answers(
    opened: TwoSided,
    run: Opened,
    prompts: Sequence[Prompt],
    sides: Sequence[Side],
    sampling: Sampling,
) -> Iterator[tuple[Side, tuple[Shaded, ...]]]:
    """What each of the sides says, shaded by both."""
    base = opened.base
    rows = [_ids(opened, run, prompt) for prompt in prompts]
    _refuse_full(rows, prompts, context_length(base.config), sampling.max_tokens)
    for side in sides:
        with opened.sides.on(side):
            said = complete(base.model, base.tokenizer.eos_token_ids, rows, sampling)
        aligned, reference = (_logps(opened, which, rows, said) for which in ("aligned", "base"))
        whole = zip(said, aligned, reference, strict=True)
        yield side, tuple(shaded(base.tokenizer, *each) for each in whole)


def _logps(
    opened: TwoSided, side: Side, rows: Sequence[Ids], said: Sequence[Completion]
) -> list[list[float]]:
    """log p of the tokens of each completion, and of its end where it has one."""
    with opened.sides.on(side):
        return [
            completion_token_logps(
                opened.base.model, row, [*one.tokens, *([] if one.end is None else [one.end])]
            )
            for row, one in zip(rows, said, strict=True)
        ]


def _ids(opened: TwoSided, run: Opened, prompt: Prompt) -> Ids:
    tokenizer = opened.base.tokenizer
    if run.trained_on_text or not tokenizer.has_chat_template:
        said = "\n".join(str(m["content"]) for m in prompt.messages)
        return text_tokens(tokenizer, said if prompt.text is None else prompt.text)
    return prompt_tokens(tokenizer, prompt.messages, thinking=run.config.thinking)


def _refuse_full(
    rows: Sequence[Ids], prompts: Sequence[Prompt], context: int | None, room: int
) -> None:
    for row, prompt in zip(rows, prompts, strict=True):
        if context is not None and len(row) + room > context:
            raise ConfigError(
                f"{prompt.where}: {len(row)} tokens leave no room for an answer of {room} (the "
                f"model's context is {context}); use a smaller --max-tokens, or leave it out"
            )
