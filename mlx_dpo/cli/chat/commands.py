"""What can be said to `mlx-dpo chat` beside questions: its commands, each a method of `Talk`."""

import json
from collections.abc import Callable, Generator, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_dpo.cli.answers import Shown, cut_note
from mlx_dpo.errors import ConfigError, DataError, reason
from mlx_dpo.io.atomic import write_file

if TYPE_CHECKING:
    from mlx_dpo.adapters.switch import Side
    from mlx_dpo.cli.chat.feedback import FeedbackFiles
    from mlx_dpo.generation.stream import Piece, Summary

COMMANDS = {
    "/help": ("", "this list"),
    "/system": ("[TEXT]", "have this system message from here on; without TEXT, none"),
    "/base": ("", "answer without what was learned from here on"),
    "/aligned": ("", "answer with it again"),
    "/compare": ("[QUESTION]", "what the other one says to the last question, or to this one"),
    "/retry": ("", "another answer to the last question"),
    "/undo": ("", "take the last question and its answer back"),
    "/reset": ("", "start over"),
    "/good": ("", "the last answer is good: a row to train on"),
    "/bad": ("", "the last answer is bad: a row to train on"),
    "/edit": ("[TEXT]", "the answer that it should have been: a pair to train on"),
    "/save": ("[FILE]", "write the conversation as JSON"),
    "/exit": ("", "leave, as /quit and Ctrl-D do"),
}
ALIASES = {"/quit": "/exit"}
INPUT_HELP = '''\
A line that ends with \\ goes on in the next; """ begins and ends a message of several lines.
Ctrl-C stops an answer; twice at the prompt it leaves.'''
PICK_QUESTION = "Which is better: 1 (the first), 2 (the second), Enter (neither)? "

AskPerson = Callable[[str], str | None]


class ChatCommands:
    """A chat and its commands. `pick` asks a person for a choice, `edit` for a better answer."""

    def __init__(
        self,
        rows: "FeedbackFiles",
        shown: Shown,
        *,
        pick: AskPerson | None = None,
        edit: AskPerson | None = None,
    ) -> None:
        self.rows, self.chat, self.shown = rows, rows.chat, shown
        self._pick, self._edit = pick, edit

    def obey(self, line: str) -> bool:
        """Do what a line that `is_command` says; False to leave."""
        name, _, text = line.partition(" ")
        name = ALIASES.get(name, name)
        if name == "/exit":
            return False
        takes_text, text = bool(COMMANDS[name][0]), text.strip()
        if text and not takes_text:
            raise ConfigError(f"`{name}` takes nothing behind it (found `{text}`)")
        getattr(self, f"do_{name[1:]}")(*([text] if takes_text else []))
        return True

    def answer(self, text: str) -> None:
        """Answer a question, and say what there is to say of the answer."""
        self._stream(self.chat.reply(text))

    def _stream(self, pieces: Generator["Piece"]) -> str:
        said, summary = self.shown.stream(pieces)
        for note in self._notes(summary):
            print_note(note)
        return said

    def _notes(self, summary: "Summary") -> Iterator[str]:
        if turns := summary.left_out:
            yield f"The context is full: from here on the oldest {turns} turns are left out."
        if note := cut_note(summary.finish_reason, self.chat.sampling.max_tokens):
            yield note
        if self._pick is not None:
            yield format_statistics(summary, self.chat.context)

    def do_help(self) -> None:
        """List the commands."""
        width = max(len(f"{name} {words}") for name, (words, _) in COMMANDS.items())
        for name, (words, what) in COMMANDS.items():
            print_note(f"{f'{name} {words}':<{width}}  {what}")
        print_note(INPUT_HELP)

    def do_system(self, text: str) -> None:
        """Set the system message, or take it away."""
        self.chat.instruct(text or None)
        print_note("The system message is set." if text else "There is no system message now.")

    def do_base(self) -> None:
        """Let the base answer."""
        self._put("base")
        print_note("The base answers from here on; /aligned switches back.")

    def do_aligned(self) -> None:
        """Let the aligned model answer."""
        self._put("aligned")
        print_note("The aligned model answers from here on.")

    def _put(self, side: "Side") -> None:
        self._need_both()
        self.chat.sides.put(side)

    def _need_both(self) -> None:
        if not self.chat.sides.both:
            raise ConfigError(
                "there is nothing to switch to; name a run, or a --model with an --adapter"
            )

    def do_compare(self, question: str) -> None:
        """Have the other side answer, too, and the person choose."""
        self._need_both()
        if question:
            self.answer(question)
        first, [author] = self.chat.last_answer(), self.chat.authors[-1:]
        side: Side = "base" if author == "aligned" else "aligned"
        print_note(f"The {side} model says:")
        said = self._stream(self.chat.other_answer(side))
        second = self.chat.answer_in(said)
        if first == second:
            print_note("Both say the same; there is nothing to choose.")
        elif self._pick is None:
            return
        elif (better := (self._pick(PICK_QUESTION) or "").strip()) == "1":
            print_note(self.rows.pair((first, author), (second, side)))
        elif better == "2":
            print_note(self.rows.pair((second, side), (first, author)))
            self.chat.replace(said, side)
        else:
            print_note("No pair is written.")

    def do_retry(self) -> None:
        """Answer the last question again."""
        self._stream(self.chat.retry())

    def do_undo(self) -> None:
        """Take the last question back."""
        print_note(f"Taken back: {self.chat.undo().splitlines()[0]}")

    def do_reset(self) -> None:
        """Start over."""
        self.chat.reset()
        print_note("Started over.")

    def do_good(self) -> None:
        """Judge the last answer."""
        print_note(self.rows.judge(good=True))

    def do_bad(self) -> None:
        """Judge the last answer."""
        print_note(self.rows.judge(good=False))

    def do_edit(self, text: str) -> None:
        """Put a better answer in the place of the last one."""
        answer, [author] = self.chat.last_answer(), self.chat.authors[-1:]
        if not text and self._edit is None:
            raise ConfigError("`/edit` needs the better answer behind it")
        better = text or (self._edit and self._edit(answer))
        if not better or better == answer:
            print_note("The answer stays as it is; no pair is written.")
            return
        print_note(self.rows.pair((better, "person"), (answer, author)))
        self.chat.replace(better, "person")

    def do_save(self, name: str) -> None:
        """Write the conversation."""
        self.chat.last_answer()
        path = Path(name or f"chat-{datetime.now():%Y-%m-%d-%H%M%S}.json").expanduser()
        write_json(path, {"messages": self.chat.conversation(), "authors": self.chat.authors})
        print_note(f"Saved as {path}.")


def is_command(line: str) -> bool:
    """Whether a line is one of the commands, with or without words behind it."""
    name = line.partition(" ")[0]
    return name in COMMANDS or name in ALIASES


def format_statistics(summary: "Summary", context: int | None) -> str:
    """Counts and speed of an answer."""
    rate = summary.tokens_per_second
    speed = "" if rate is None else f", {rate:.0f} a second"
    used = summary.prompt_tokens + summary.tokens
    room = f"; context: {used:,}" + ("" if context is None else f" of {context:,}")
    return f"({summary.tokens} tokens{speed}{room})"


def write_json(path: Path, record: dict[str, object]) -> None:
    """Write a new file, whole or not at all.

    Raises:
        DataError: there is one already, or it cannot be written.
    """
    if path.exists():
        raise DataError(f"{path}: is there already; choose another name")
    try:
        write_file(path, json.dumps(record, ensure_ascii=False, indent=2) + "\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({reason(error)})") from error


def print_note(line: str) -> None:
    """A line for the person, beside the answers."""
    click.echo(line, err=True)
