"""The two files to which `mlx-dpo chat` writes a person's feedback."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_dpo.chat.feedback import JsonlFile, Row
    from mlx_dpo.chat.session import Author, ChatSession
    from mlx_dpo.saved_runs.open import SwitchableModel

    TextByAuthor = tuple[str, Author]

Provenance = dict[str, Any]
WRITER = "mlx-dpo chat"


@dataclass(frozen=True)
class FeedbackFiles:
    """The file of preference pairs and the file of labelled answers of a chat session."""

    pairs: "JsonlFile"
    labeled: "JsonlFile"
    chat: "ChatSession"
    opened: "SwitchableModel"

    def description(self) -> list[str]:
        """Return a line for each file of the chat: which commands write to which file."""
        can_compare = self.chat.switch.can_switch
        pair_commands = "/edit and /compare write pairs" if can_compare else "/edit writes pairs"
        return [
            f"{pair_commands} to {self.pairs.path}",
            f"/good and /bad write labelled answers to {self.labeled.path}",
        ]

    def repair(self) -> list[str]:
        """Remove incomplete last lines that a crash left in the files; return a note for each."""
        notes = (file.repair() for file in (self.pairs, self.labeled))
        return [note for note in notes if note is not None]

    def write_label(self, *, good: bool) -> str:
        """Write the last answer, labelled good or bad, to the file of labelled answers.

        An earlier label of the same answer is replaced.

        Returns:
            A note for the person.
        """
        from mlx_dpo.chat.feedback import has_same_answer, unpaired_row

        answer, [author] = self.chat.last_answer(), self.chat.authors[-1:]
        provenance = self._provenance() | self._answer_provenance(author)
        row = unpaired_row(self.chat.last_prompt(), answer, good=good, provenance=provenance)
        earlier = self.labeled.replace(row, lambda other: has_same_answer(other, row))
        note = f"Written to {self.labeled.path}: {_label(good)}."
        if earlier:
            before = _label(bool(earlier[-1].get("label")))
            note += f" This replaces the earlier label of the answer ({before})."
        return note

    def write_pair(self, *, chosen: "TextByAuthor", rejected: "TextByAuthor") -> str:
        """Write two answers to the last question as a preference pair; return a note.

        Each answer is given as (text, author). An earlier pair of the same two answers is replaced.
        The note names the file that the answers went to.
        """
        from mlx_dpo.chat.feedback import has_same_prompt

        row = self._pair_row(chosen, rejected)
        earlier = self.pairs.replace(
            row, lambda other: has_same_prompt(other, row) and _answers(other) == _answers(row)
        )
        replaced = " This replaces the earlier pair of these answers." if earlier else ""
        return f"Written to {self.pairs.path}.{replaced}"

    def _pair_row(self, chosen: "TextByAuthor", rejected: "TextByAuthor") -> "Row":
        from mlx_dpo.chat.feedback import pair_row

        authors = {
            "chosen": self._answer_provenance(chosen[1]),
            "rejected": self._answer_provenance(rejected[1]),
        }
        return pair_row(
            self.chat.last_prompt(),
            chosen=chosen[0],
            rejected=rejected[0],
            provenance=self._provenance() | authors,
        )

    def _provenance(self) -> Provenance:
        from mlx_dpo.chat.feedback import utc_timestamp

        return {"by": WRITER, "judge": "person", "time": utc_timestamp()}

    def _answer_provenance(self, author: "Author") -> Provenance:
        if author == "person":
            return {"author": author}
        settings = asdict(self.chat.sampling).items()
        sampling = {name: value for name, value in settings if value is not None}
        return self.opened.provenance(author) | {"sampling": sampling}


def _answers(pair: "Row") -> list[str]:
    """Return the two answers of a pair in an order that does not depend on the preference."""
    return sorted(map(repr, (pair.get("chosen"), pair.get("rejected"))))


def _label(good: bool) -> str:
    return "good" if good else "bad"
