"""What a person finds of the answers in a chat, written to the files that `train` reads."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_dpo.chat.feedback import JsonlFile
    from mlx_dpo.chat.session import Author, ChatSession
    from mlx_dpo.saved_runs.open import TwoSided

Provenance = dict[str, Any]


@dataclass(frozen=True)
class FeedbackFiles:
    """The two files of a chat, and where its answers come from."""

    pairs: "JsonlFile"
    judged: "JsonlFile"
    chat: "ChatSession"
    opened: "TwoSided"

    def where(self) -> str:
        """What is written where, for the header."""
        return (
            f"/edit and /compare write pairs to {self.pairs.path}, /good and /bad write judged "
            f"answers to {self.judged.path}"
        )

    def mend(self) -> list[str]:
        """Repair what a crash left of a last line; says so."""
        notes = (journal.mend() for journal in (self.pairs, self.judged))
        return [note for note in notes if note is not None]

    def judge(self, *, good: bool) -> str:
        """Write down that the last answer is good or bad."""
        from mlx_dpo.chat.feedback import unpaired_row

        answer, [author] = self.chat.last_answer(), self.chat.authors[-1:]
        told = self._told() | self._facts(author)
        row = unpaired_row(self.chat.asked(), answer, good=good, provenance=told)
        self.judged.append(row)
        return f"Written to {self.judged.path}: {'good' if good else 'bad'}."

    def pair(self, chosen: tuple[str, "Author"], rejected: tuple[str, "Author"]) -> str:
        """Write down which of two answers to the last question is better."""
        from mlx_dpo.chat.feedback import pair_row

        authors = {"chosen": self._facts(chosen[1]), "rejected": self._facts(rejected[1])}
        row = pair_row(
            self.chat.asked(),
            chosen=chosen[0],
            rejected=rejected[0],
            provenance=self._told() | authors,
        )
        self.pairs.append(row)
        return f"Written to {self.pairs.path}."

    def _told(self) -> Provenance:
        from mlx_dpo.chat.feedback import utc_timestamp

        return {"by": "mlx-dpo chat", "judge": "person", "time": utc_timestamp()}

    def _facts(self, author: "Author") -> Provenance:
        if author == "person":
            return {"author": author}
        settings = asdict(self.chat.sampling).items()
        sampling = {name: value for name, value in settings if value is not None}
        return self.opened.facts(author) | {"sampling": sampling}
