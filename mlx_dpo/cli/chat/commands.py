"""The slash commands of `mlx-dpo chat`, each a method of `ChatCommands`."""

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Generator, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_dpo.cli.answers import AnswerWriter, note_on_cut
from mlx_dpo.cli.output import can_style, echo
from mlx_dpo.errors import ConfigError, DataError, reason
from mlx_dpo.io.atomic import write_file

if TYPE_CHECKING:
    from mlx_dpo.adapters.switch import AdapterState
    from mlx_dpo.cli.chat.feedback import FeedbackFiles
    from mlx_dpo.generation.stream import AnswerChunk, GenerationSummary

COMMANDS = {
    "/help": ("", "this list"),
    "/system": ("[TEXT]", "set the system message; no TEXT clears it"),
    "/base": ("", "switch to the base model"),
    "/aligned": ("", "switch to the aligned model"),
    "/compare": ("[QUESTION]", "answer QUESTION, or the last one, with the other model as well"),
    "/retry": ("", "another answer to the last question"),
    "/undo": ("", "undo the last turn"),
    "/reset": ("", "start over"),
    "/good": ("", "label the last answer as good, for training; replaces an earlier label"),
    "/bad": ("", "label the last answer as bad, for training; replaces an earlier label"),
    "/edit": ("[TEXT]", "write a better answer: a preference pair for training"),
    "/save": ("[FILE]", "write the conversation as JSON"),
    "/exit": ("", "leave; /quit and Ctrl-D do the same"),
}
ADAPTER_COMMANDS = ("/base", "/aligned", "/compare")  # they switch an adapter on or off
ALIASES = {"/quit": "/exit"}
INPUT_HELP = '''\
A line that ends with \\ continues on the next; """ begins and ends a message of several lines.
Ctrl-C stops an answer; pressed twice at the prompt, it leaves.'''
PICK_QUESTION = "Which is better: 1 (the first), 2 (the second), Enter (neither)? "

MIN_WIDTH = 20  # columns; on a narrower terminal, notes are wrapped by it
AskPerson = Callable[[str], str | None]


class ChatCommands:
    """The slash commands of a chat session, and the answers to messages that are no commands.

    Args:
        pick: Asks the person which of two answers is better; None through a pipe.
        edit: Lets the person edit an answer; None through a pipe.
    """

    def __init__(
        self,
        feedback: "FeedbackFiles",
        writer: AnswerWriter,
        *,
        pick: AskPerson | None = None,
        edit: AskPerson | None = None,
    ) -> None:
        self.feedback, self.chat, self.writer = feedback, feedback.chat, writer
        self._pick, self._edit = pick, edit

    def run(self, line: str) -> bool:
        """Run the slash command in `line` (see `is_command`); return False to end the chat."""
        name, _, text = line.partition(" ")
        name = ALIASES.get(name, name)
        if name == "/exit":
            return False
        takes_text, text = bool(COMMANDS[name][0]), text.strip()
        if text and not takes_text:
            raise ConfigError(f"`{name}` takes no text (found `{text}`)")
        getattr(self, f"do_{name[1:]}")(*([text] if takes_text else []))
        return True

    def answer(self, text: str) -> None:
        """Stream the answer to a question, and print notes about the answer."""
        self._stream(self.chat.reply(text))

    def _stream(self, pieces: Generator["AnswerChunk"]) -> str:
        text, summary = self.writer.stream(pieces)
        for note in self._notes(summary):
            print_note(note)
        return text

    def _notes(self, summary: "GenerationSummary") -> Iterator[str]:
        if turns := summary.dropped_turns:
            yield f"The context is full: the oldest {turns} turns are dropped from here on."
        if note := note_on_cut(summary.finish_reason, self.chat.sampling.max_tokens):
            yield note
        if self._pick is not None:
            yield format_statistics(summary, self.chat.context)

    def do_help(self) -> None:
        """Print the commands that this chat has, and the files that they write."""
        commands = COMMANDS
        if not self.chat.switch.can_switch:
            commands = {name: row for name, row in COMMANDS.items() if name not in ADAPTER_COMMANDS}
        width = max(len(f"{name} {argument}") for name, (argument, _) in commands.items())
        for name, (argument, description) in commands.items():
            print_note(f"{f'{name} {argument}':<{width}}  {description}", indent=width + 2)
        for note in self.feedback.description():
            print_note(note)
        print_note(INPUT_HELP)

    def do_system(self, text: str) -> None:
        """Set or clear the system message."""
        self.chat.set_system(text or None)
        print_note("The system message is set." if text else "The system message is cleared.")

    def do_base(self) -> None:
        """Switch to the base model."""
        self._switch_to("base")
        print_note("The base model answers from here on; /aligned switches back.")

    def do_aligned(self) -> None:
        """Switch to the aligned model."""
        self._switch_to("aligned")
        print_note("The aligned model answers from here on.")

    def _switch_to(self, adapter_state: "AdapterState") -> None:
        self._check_two_models()
        self.chat.switch.activate(adapter_state)

    def _check_two_models(self) -> None:
        if not self.chat.switch.can_switch:
            raise ConfigError(
                "no adapter is loaded, so there is no other model; name a run, or a --model with "
                "an --adapter"
            )

    def do_compare(self, question: str) -> None:
        """Stream the other model's answer to a question, and ask the person which answer is better.

        If the person prefers one answer, both are written as a preference pair. An empty
        `question` means the last question of the chat.
        """
        self._check_two_models()
        if question:
            self.answer(question)
        first, [author] = self.chat.last_answer(), self.chat.authors[-1:]
        other: AdapterState = "base" if author == "aligned" else "aligned"
        print_note(f"Answer of the {other} model:")
        text = self._stream(self.chat.answer_with(other))
        second = self.chat.strip_thinking(text)
        if first == second:
            print_note("Both answers are identical; there is nothing to pick.")
        elif self._pick is None:
            return
        elif (better := (self._pick(PICK_QUESTION) or "").strip()) == "1":
            print_note(self.feedback.write_pair(chosen=(first, author), rejected=(second, other)))
        elif better == "2":
            print_note(self.feedback.write_pair(chosen=(second, other), rejected=(first, author)))
            self.chat.replace_answer(text, other)
        else:
            print_note("No pair is written.")

    def do_retry(self) -> None:
        """Stream another answer to the last question and replace the earlier answer."""
        self._stream(self.chat.retry())

    def do_undo(self) -> None:
        """Remove the last question and its answer."""
        print_note(f"Removed: {self.chat.undo().splitlines()[0]}")

    def do_reset(self) -> None:
        """Clear the conversation."""
        self.chat.reset()
        print_note("Started over.")

    def do_good(self) -> None:
        """Write the last answer with the label good to the file of labelled answers."""
        print_note(self.feedback.write_label(good=True))

    def do_bad(self) -> None:
        """Write the last answer with the label bad to the file of labelled answers."""
        print_note(self.feedback.write_label(good=False))

    def do_edit(self, text: str) -> None:
        """Replace the last answer by a better text, and write both as a preference pair."""
        answer, [author] = self.chat.last_answer(), self.chat.authors[-1:]
        if not text and self._edit is None:
            raise ConfigError("`/edit` needs a text, the better answer")
        better = text or (self._edit and self._edit(answer))
        if not better or better == answer:
            print_note("The answer is unchanged; no pair is written.")
            return
        print_note(self.feedback.write_pair(chosen=(better, "person"), rejected=(answer, author)))
        self.chat.replace_answer(better, "person")

    def do_save(self, name: str) -> None:
        """Write the conversation to a JSON file."""
        self.chat.last_answer()
        path = Path(name or f"chat-{datetime.now():%Y-%m-%d-%H%M%S}.json").expanduser()
        write_json(path, {"messages": self.chat.conversation(), "authors": self.chat.authors})
        print_note(f"Saved as {path}.")


def is_command(line: str) -> bool:
    """Return whether a line begins with the name of a slash command."""
    name = line.partition(" ")[0]
    return name in COMMANDS or name in ALIASES


def asks_question(line: str) -> bool:
    """Return whether a line asks a new question: a message, or `/compare` with a question."""
    return not is_command(line) or line.startswith("/compare ")


def format_statistics(summary: "GenerationSummary", context: int | None) -> str:
    """Return one line with an answer's token counts and speed and how full the context is."""
    rate = summary.tokens_per_second
    speed = "" if rate is None else f", {rate:.0f} per second"
    used = summary.prompt_tokens + summary.tokens
    room = f"; context: {used:,}" + ("" if context is None else f" of {context:,}")
    return f"({summary.tokens} tokens{speed}{room})"


def write_json(path: Path, record: dict[str, object]) -> None:
    """Write a new JSON file, complete or not at all.

    Raises:
        DataError: the file already exists or cannot be written.
    """
    if path.exists():
        raise DataError(f"{path}: already exists; choose another name")
    try:
        write_file(path, json.dumps(record, ensure_ascii=False, indent=2) + "\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({reason(error)})") from error


def print_note(note: str, *, indent: int = 0) -> None:
    """Print a note for the person on stderr; stdout is for answers only.

    A terminal shows notes dim, and wraps them between words: a file name is never broken.

    Args:
        note: text of the note.
        indent: columns by which a terminal indents the lines after the first.
    """
    if sys.stderr.isatty():
        note = "\n".join(_wrap(line, indent) for line in note.split("\n"))
    style = {"dim": True} if can_style(sys.stderr) else {}
    echo(note, err=True, **style)


def _wrap(line: str, indent: int) -> str:
    width = shutil.get_terminal_size().columns - 1
    return textwrap.fill(
        line,
        max(width, 2 * indent, MIN_WIDTH),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        drop_whitespace=True,
    )
