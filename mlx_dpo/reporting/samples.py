"""Sampled answers to held-out prompts: the file `samples.jsonl` of a run, and their display.

The file has one line per evaluation, with a checksum, in step order and without duplicates.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_dpo.errors import DamagedFileError
from mlx_dpo.io import bounded
from mlx_dpo.io.atomic import write_file
from mlx_dpo.io.checksums import check_line, damaged, to_checked_line
from mlx_dpo.io.write_errors import name_file
from mlx_dpo.terminal_text import escape_line

MAX_BYTES = 1_000_000_000  # of a samples file; an evaluation has a few thousand
MAX_PROMPT = 400  # characters of a prompt that are shown at a terminal
CUT_MARK = " …"  # shown after an answer that was cut at its token limit
SAME = "(same as base)"


class SampledText(NamedTuple):
    """A sampled answer as text."""

    text: str
    is_cut: bool  # whether the answer was cut at its token limit


class Sample(NamedTuple):
    """A held-out prompt, and the answers of base and policy to it."""

    prompt: str  # the last user turn, or the whole prompt of a plain text
    turn: int  # number of that user turn in the conversation, from 1
    base: SampledText | None  # None if the weights of the base model are gone
    policy: SampledText

    @property
    def is_unchanged(self) -> bool:
        """Whether the policy gives the answer of the base."""
        return self.base == self.policy


class EvaluationSamples(NamedTuple):
    """The samples of one evaluation; the prompts of all evaluations of a run are the same."""

    step: int
    samples: tuple[Sample, ...]


class SamplesLog:
    """The file `samples.jsonl` of a run, to which the samples of evaluations are appended."""

    def __init__(self, path: Path, *, after: int = 0) -> None:
        """Open the file and remove the samples after step `after`.

        A run that is resumed from step `after` samples the later answers again. A file without
        samples is not created.

        Raises:
            DamagedFileError: a line of the file is damaged.
        """
        self._path = path
        earlier = [item for item in read_samples(path) if item.step <= after]
        self.latest: EvaluationSamples | None = earlier[-1] if earlier else None
        if earlier:
            write_file(path, "".join(map(_to_line, earlier)))
        else:
            path.unlink(missing_ok=True)

    def write(self, item: EvaluationSamples) -> None:
        """Append the samples of an evaluation to the file.

        The samples of an evaluation that a crash kept out of `metrics.jsonl` already exist;
        they are equal, because sampling depends on seed and weights only.
        """
        if self.latest is not None and item.step <= self.latest.step:
            return
        with name_file(self._path), self._path.open("a") as file:
            file.write(_to_line(item))
        self.latest = item


def read_samples(path: Path) -> list[EvaluationSamples]:
    """Return the samples in a file, in step order; none if there is no file.

    A last line that a crash left incomplete is ignored.

    Raises:
        DamagedFileError: a complete line is not what was written.
    """
    if not os.path.lexists(path):
        return []
    text = bounded.read_bytes(path, DamagedFileError, limit=MAX_BYTES).decode(errors="replace")
    items = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            record = bounded.parse_json(check_line(line) or "", "", DamagedFileError)
            items.append(_parse(record))
        except (DamagedFileError, KeyError, TypeError, ValueError):
            advice = "restore it from a copy, or delete it to continue without its samples"
            raise damaged(f"{path}:{number}", "not the samples of a step", advice) from None
    return items


def _to_line(item: EvaluationSamples) -> str:
    def entry(answer: SampledText | None) -> dict[str, Any] | None:
        return None if answer is None else {"text": answer.text, "cut": answer.is_cut}

    samples = [
        {**sample._asdict(), "base": entry(sample.base), "policy": entry(sample.policy)}
        for sample in item.samples
    ]
    return to_checked_line({"step": item.step, "samples": samples})


def _parse(record: Any) -> EvaluationSamples:
    """Return the samples of a parsed line.

    Raises:
        KeyError, TypeError, ValueError: the line has another content.
    """
    samples = [
        Sample(
            _typed(str, entry["prompt"]),
            _typed(int, entry["turn"]),
            None if entry["base"] is None else _parse_answer(entry["base"]),
            _parse_answer(entry["policy"]),
        )
        for entry in _typed(list, record["samples"])
    ]
    return EvaluationSamples(_typed(int, record["step"]), tuple(samples))


def _parse_answer(entry: Any) -> SampledText:
    return SampledText(_typed(str, entry["text"]), _typed(bool, entry["cut"]))


def _typed(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} is not {kind.__name__}")
    if isinstance(value, str):
        value.encode()  # JSON can contain half of a surrogate pair, which no page can show
    return value


def print_samples(console: Console, item: EvaluationSamples, *, limit: int) -> None:
    """Print the first `limit` samples of an evaluation: prompt, base's answer, policy's answer.

    Each text is one line, which a terminal wraps within its column.
    """
    console.print(f"samples at step {item.step:,}", style="bold")
    for sample in item.samples[:limit]:
        table = Table.grid(padding=(0, 1))
        table.add_column(width=8, no_wrap=True)
        table.add_column(overflow="fold")
        for label, text, style in _lines(sample):
            if not console.is_terminal:
                console.print(f"  {label:<6} {text}")
            table.add_row(Text(f"  {label}", style=style), Text(text, style=style))
        if console.is_terminal:
            console.print(table)


def _lines(sample: Sample) -> list[tuple[str, str, str]]:
    """Return label, text and style of each line of a sample."""
    prompt = shorten(sample.prompt)
    if sample.turn > 1:
        prompt = f"(turn {sample.turn}) {prompt}"
    lines = [("prompt", escape_line(prompt), "dim")]
    if sample.base is not None:
        lines.append(("base", _format(sample.base), ""))
    if sample.is_unchanged:
        lines.append(("policy", SAME, "dim"))
    else:
        lines.append(("policy", _format(sample.policy), "bold"))
    return lines


def shorten(text: str) -> str:
    """Return `text` with its middle left out if it is longer than `MAX_PROMPT` characters."""
    if len(text) <= MAX_PROMPT:
        return text
    head = MAX_PROMPT * 3 // 4
    return f"{text[:head]} […] {text[-(MAX_PROMPT - head) :]}"


def _format(answer: SampledText) -> str:
    return escape_line(answer.text.strip() or "(empty)") + CUT_MARK * answer.is_cut
