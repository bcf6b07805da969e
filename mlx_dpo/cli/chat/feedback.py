"""The two files to which `mlx-dpo chat` writes a person's feedback."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_dpo.chat.feedback import JsonlFile
    from mlx_dpo.chat.session import Author, ChatSession
    from mlx_dpo.saved_runs.open import SwitchableModel

Provenance = dict[str, Any]


@dataclass(frozen=True)
class FeedbackFiles:
    """The file of preference pairs and the file of labelled answers of a chat session."""

    pairs: "JsonlFile"
    labeled: "JsonlFile"
    chat: "ChatSession"
    opened: "SwitchableModel"

    def description(self) -> str:
        """Return a line for the chat's start: which commands write to which file."""
        return (
            f"/edit and /compare write pairs to {self.pairs.path}, /good and /bad write labeled "
            f"answers to {self.labeled.path}"
        )

    def repair(self) -> list[str]:
        """Remove incomplete last lines that a crash left in the files; return a note for each."""
        notes = (file.repair() for file in (self.pairs, self.labeled))
        return [note for note in notes if note is not None]

    def write_label(self, *, good: bool) -> str:
        """Write the last answer, labelled good or bad, to the file of labelled answers.

        Returns:
            A note for the person.
        """
        from mlx_dpo.chat.feedback import unpaired_row

        answer, [author] = self.chat.last_answer(), self.chat.authors[-1:]
        provenance = self._provenance() | self._answer_provenance(author)
        row = unpaired_row(self.chat.last_prompt(), answer, good=good, provenance=provenance)
        self.labeled.append(row)
        return f"Written to {self.labeled.path}: {'good' if good else 'bad'}."

    def write_pair(self, *, chosen: tuple[str, "Author"], rejected: tuple[str, "Author"]) -> str:
        """Write two answers to the last question as a preference pair; return a note.

        Each answer is given as (text, author). The note names the file that they went to.
        """
        from mlx_dpo.chat.feedback import pair_row

        authors = {
            "chosen": self._answer_provenance(chosen[1]),
            "rejected": self._answer_provenance(rejected[1]),
        }
        row = pair_row(
            self.chat.last_prompt(),
            chosen=chosen[0],
            rejected=rejected[0],
            provenance=self._provenance() | authors,
        )
        self.pairs.append(row)
        return f"Written to {self.pairs.path}."

    def _provenance(self) -> Provenance:
        from mlx_dpo.chat.feedback import utc_timestamp

        return {"by": "mlx-dpo chat", "judge": "person", "time": utc_timestamp()}

    def _answer_provenance(self, author: "Author") -> Provenance:
        if author == "person":
            return {"author": author}
        settings = asdict(self.chat.sampling).items()
        sampling = {name: value for name, value in settings if value is not None}
        return self.opened.provenance(author) | {"sampling": sampling}
