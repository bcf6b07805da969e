"""Schema of AnythingLLM's export of workspace chats as JSON, with a thumb per answer.

Format: `prepareChatsForExport` with the format `json`
(`server/utils/helpers/chat/convertTo.js` of Mintplex-Labs/anything-llm, 1.8 to 1.9). Each row is
one question with its answer; the export does not hold the turns before the question.
"""

from mlx_dpo.errors import EMPTY_COMPLETION, NOT_TEXT, UNJUDGED, UNPAIRED, BadPairError
from mlx_dpo.schemas.messages import has_content, parse_text
from mlx_dpo.schemas.schema import Parsed, Row, RowRules, Schema
from mlx_dpo.types import UnpairedExample

RATINGS = {"GOOD": True, "BAD": False}
FIELDS = frozenset({
    "id", "username", "workspace", "prompt", "response", "sent_at", "rating", "attachments",
})  # fmt: skip


def _parse(row: Row, rules: RowRules) -> list[Parsed]:
    is_good = RATINGS.get(str(row.record.get("rating")))
    if is_good is None:
        return [BadPairError(row.location, UNJUDGED)]
    if not (rules.judged or rules.pair_labelled):
        return [BadPairError(row.location, UNPAIRED)]
    if row.record.get("attachments"):
        return [BadPairError(row.location, NOT_TEXT, "`attachments`")]
    prompt, answer = (
        parse_text(row.record.get(name), name, row.location) for name in ("prompt", "response")
    )
    if not has_content(answer):
        return [BadPairError(row.location, EMPTY_COMPLETION)]
    return [UnpairedExample(prompt, answer, is_good, row.location)]


ANYTHING_LLM = Schema(
    "anything-llm",
    lambda record: {"prompt", "response", "rating", "workspace", "sent_at"} <= record.keys(),
    _parse,
    FIELDS,
    has_labels=True,
)
