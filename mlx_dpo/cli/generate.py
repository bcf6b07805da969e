"""`mlx-dpo generate`: print the answer to one prompt."""

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mlx_dpo.cli.answers import model_flags, note_on_cut, open_chat
from mlx_dpo.cli.command import FILE, FOLDER, Command
from mlx_dpo.cli.output import echo, echo_json, write_text
from mlx_dpo.cli.sampling_flags import sampling_flags
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError

if TYPE_CHECKING:
    from mlx_dpo.chat.session import ChatSession
    from mlx_dpo.generation.stream import GenerationSummary
    from mlx_dpo.saved_runs.open import SwitchableModel


@click.command(
    cls=Command,
    examples=(
        'mlx-dpo generate run "Why is the sky blue?"',
        'mlx-dpo generate --model models/tiny-chat "Why is the sky blue?"',
        "mlx-dpo generate run --json < prompt.txt",
        'mlx-dpo generate run --best-of 8 "Why is the sky blue?"',
    ),
    renamed={"--reference": "use --base"},
)
@click.argument("words", nargs=-1, metavar="[RUN] [PROMPT]", type=FOLDER)
@model_flags
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text; no chat template.")
@click.option(
    "--best-of",
    type=click.IntRange(min=2),
    metavar="N",
    help="Sample N answers and print the one with the highest reward.",
)
@click.option(
    "--reward",
    type=FILE,
    metavar="FILE:FUNCTION|run:RUN",
    help="With --best-of: score the answers with this Python function of (prompt, answer), whose "
    "file is run, or with the implicit reward of a run.",
    show_default="the implicit reward of RUN",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@sampling_flags(
    temperature=0.0,
    remarks={"temperature": "The default gives the same answer each time; with --best-of it is 1."},
)
@click.pass_context
def generate(  # noqa: PLR0913 (one argument per flag)
    ctx: click.Context,
    /,
    words: tuple[str, ...],
    model: str | None,
    adapter: str | None,
    reference: bool,
    raw: bool,
    best_of: int | None,
    reward: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Generate the answer to PROMPT with a run's policy, or with a model.

    Only the answer goes to stdout. Without PROMPT, or with `-`, the prompt is read from standard
    input, without its last newline.
    """
    run, given = _split_arguments(words, model)
    _check_run(run, given)
    chat_settings = {name: settings.pop(name) for name in ("system", "thinking")}
    if best_of and ctx.get_parameter_source("temperature") is ParameterSource.DEFAULT:
        settings["temperature"] = 1.0
    sampling = Sampling(**settings)
    _check_no_chat_settings(raw, **chat_settings)
    _check_best_of(best_of, reward, sampling, run=run, raw=raw)
    prompt = _read_prompt(given)

    chat, opened = open_chat(
        sampling,
        run=run,
        model=model,
        adapter=adapter,
        reference=reference,
        raw=raw,
        switching=bool(best_of) and _is_rated_by(run, reward),
        **chat_settings,
    )
    options: dict[str, Any] = {"model": opened.base.source, "run": run, "adapter": adapter}
    options |= {"reference": reference, "raw": chat.raw}
    options |= {"system": chat.system, "thinking": chat.thinking}
    if best_of:
        _generate_best(chat, opened, prompt, (best_of, reward), options if as_json else None)
        return
    completion, summary = _generate(chat, prompt, stream=not as_json)
    if as_json:
        _write_json(prompt, completion, summary, options | asdict(chat.sampling))
    if note := note_on_cut(summary.finish_reason, sampling.max_tokens):
        echo(note, err=True)


def _check_best_of(
    count: int | None, reward: str | None, sampling: Sampling, *, run: str | None, raw: bool
) -> None:
    """Raise `ConfigError` for flags that contradict --best-of, or have no effect without it."""
    if count is None:
        if reward is not None:
            raise ConfigError("`reward` has no effect without --best-of")
        return
    if raw:
        raise ConfigError("`best_of` rates the answers of a chat; leave out --raw")
    if sampling.temperature == 0:
        raise ConfigError("`temperature` 0 gives the same answer each time; set one above 0")
    if reward is None and run is None:
        raise ConfigError(
            "missing reward: name a run, or pass --reward FILE:FUNCTION or --reward run:RUN"
        )


def _is_rated_by(run: str | None, reward: str | None) -> bool:
    """Return whether the run that answers also gives the rewards, so that it is loaded once."""
    if run is None:
        return False
    return reward is None or Path(reward.removeprefix("run:")).resolve() == Path(run).resolve()


def _generate_best(
    chat: "ChatSession",
    opened: "SwitchableModel",
    prompt: str,
    wanted: tuple[int, str | None],
    options: dict[str, Any] | None,
) -> None:
    """Sample several answers and print the best one: its text, or with `options` a JSON object.

    Args:
        wanted: the number of answers, and what gives the rewards, None for the run itself.
        options: what made the answer, for the JSON object.

    Raises:
        ConfigError: the run was trained on plain text, so that it has no chat answers.
    """
    from mlx_dpo.data.prompts import add_system_prompt, make_prompt
    from mlx_dpo.evaluation.best_of import sample_best
    from mlx_dpo.evaluation.judge import open_judge
    from mlx_dpo.evaluation.run_reward import open_run_reward
    from mlx_dpo.saved_runs.respond import ModelResponder

    count, reward = wanted
    if chat.raw:
        raise ConfigError("`best_of` rates the answers of a chat, and the run is of plain text")
    run = None if opened.run is None else str(opened.run.paths.folder)
    judge = (
        open_run_reward(f"run:{run}", opened)
        if _is_rated_by(run, reward)
        else open_judge(reward, None, None)
    )
    state = opened.switch.active
    responder = ModelResponder(opened.base, opened.provenance(state), chat.thinking, chat.system)
    [whole] = add_system_prompt([make_prompt(prompt, "prompt")], chat.system)
    best = sample_best(responder, judge, whole, chat.sampling, count)
    for line in best.notes():
        echo(line, err=True)
    text, finish_reason = best.answer.text, best.answer.finish_reason
    if options is None:
        write_text(text + "\n")
    else:
        answer = {
            "prompt": prompt,
            "completion": text,
            "finish_reason": finish_reason,
            "reward": best.rewards[best.best],
            "rewards": list(best.rewards),
            "completions": [reply.text for reply in best.replies],
            "settings": options | asdict(chat.sampling) | {"best_of": count},
            "provenance": judge.provenance(),
        }
        echo_json(answer)
    if note := note_on_cut(finish_reason, chat.sampling.max_tokens):
        echo(note, err=True)


def _split_arguments(words: tuple[str, ...], model: str | None) -> tuple[str | None, str | None]:
    """Return the run and the prompt, each of which may be None; with --model there is no run."""
    max_words = 1 if model else 2
    if len(words) > max_words:
        raise click.UsageError(f"Got {len(words)} arguments; put the prompt in quotation marks.")
    padded = (*words, None, None)
    return (None, padded[0]) if model else (padded[0], padded[1])


def _check_run(run: str | None, prompt: str | None) -> None:
    """Raise a usage error if the only argument is not a folder; it is probably the prompt.

    Args:
        run: the first argument, if there is no --model.
        prompt: the second argument.
    """
    if run is not None and prompt is None and not Path(run).expanduser().exists():
        shown = shlex.quote(run)
        raise click.UsageError(
            f"`{run}` is not a run folder; for a prompt name a run (mlx-dpo generate RUN {shown}) "
            f"or a model (mlx-dpo generate --model MODEL {shown})"
        )


def _check_no_chat_settings(raw: bool, **settings: Any) -> None:
    for name, value in settings.items():
        if raw and value is not None:
            raise ConfigError(f"`{name}` has no effect with --raw, which uses no chat template")


def _read_prompt(given: str | None) -> str:
    """Return the given prompt, or the prompt read from stdin.

    Raises:
        ConfigError: the prompt is not usable.
    """
    if given is None and sys.stdin.isatty():
        raise click.UsageError("Give a prompt, or pipe one in.")
    prompt = _read_stdin() if given is None or given == "-" else given
    # Python has surrogates for bytes of an argument that are not UTF-8.
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ConfigError("prompt: it is not UTF-8; convert the text")
    if not prompt.strip():
        raise ConfigError("prompt: it is empty; give it as an argument or on stdin")
    return prompt


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"stdin: not UTF-8 (at byte {error.start}); convert the text") from None


def _generate(chat: "ChatSession", prompt: str, *, stream: bool) -> tuple[str, "GenerationSummary"]:
    """Generate the answer to `prompt`; with `stream`, write the text while it is generated.

    Returns:
        The answer, and a summary of its token counts and speed.
    """
    text, summary = "", None
    for piece in chat.reply(prompt):
        text, summary = text + piece.text, piece.summary
        if stream:
            write_text(piece.text)
    if stream:
        write_text("\n")
    assert summary is not None
    return text, summary


def _write_json(
    prompt: str, completion: str, summary: "GenerationSummary", settings: dict[str, Any]
) -> None:
    rate = summary.tokens_per_second
    answer = {
        "prompt": prompt,
        "completion": completion,
        "tokens": summary.tokens,
        "finish_reason": summary.finish_reason,
        "tokens_per_second": None if rate is None else round(rate, 1),
        "settings": settings,
    }
    echo_json(answer)
