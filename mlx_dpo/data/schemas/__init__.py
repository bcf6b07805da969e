"""Rows -> preferences: which way a row is written is known by its shape. Text only.

One file for each family of ways; what a message may be is said in `messages` alone.
"""

import json
from dataclasses import replace
from difflib import get_close_matches
from hashlib import sha256

from mlx_dpo.data.errors import TIED, BadPairError
from mlx_dpo.data.files import Row, format_names, rename_columns
from mlx_dpo.data.schemas.hh_rlhf import DIALOGUES
from mlx_dpo.data.schemas.instructions import ALPACA, ORCA, SHP
from mlx_dpo.data.schemas.messages import TEMPLATE_FIELDS, kind_of, refuse_media, template_input
from mlx_dpo.data.schemas.openai import OPENAI
from mlx_dpo.data.schemas.ranked import RANKED
from mlx_dpo.data.schemas.schema import Outcome, RowRules, Schema
from mlx_dpo.data.schemas.sharegpt import SHAREGPT
from mlx_dpo.data.schemas.trl import MESSAGES, STRINGS, WHOLE_MESSAGES, WHOLE_STRINGS
from mlx_dpo.errors import DataError
from mlx_dpo.types import PreferenceExample, UnpairedExample

__all__ = [
    "DEFAULT", "SCHEMAS", "TEMPLATE_FIELDS", "Outcome", "RowRules", "Schema",
    "outcomes", "prompt_digest", "schema_of", "to_preferences",
]  # fmt: skip

# The first that fits is taken: those with field names of their own come first.
SCHEMAS = {
    schema.name: schema
    for schema in (
        OPENAI, SHAREGPT, SHP, RANKED, ALPACA, ORCA,
        STRINGS, WHOLE_MESSAGES, MESSAGES, DIALOGUES, WHOLE_STRINGS,
    )
}  # fmt: skip
DEFAULT = RowRules()


def to_preferences(row: Row, rules: RowRules = DEFAULT) -> list[PreferenceExample]:
    """What the row prefers: one pair, or several of a ranked list; ties make none.

    Raises:
        DataError: a field is missing or of another kind, or the row is no pair at all.
        BadPairError: the row is a pair, but teaches nothing.
    """
    found = []
    for outcome in outcomes(rename_columns(row, rules.renamed), rules):
        if isinstance(outcome, PreferenceExample):
            found.append(outcome)
        elif outcome.reason != TIED:
            raise outcome
    return found


def outcomes(row: Row, rules: RowRules = DEFAULT, schema: Schema | None = None) -> list[Outcome]:
    """Every pair of the row, and for each one lost what is wrong; fields have been renamed.

    `schema` is `schema_of(row, rules)` where a caller has asked for it already.

    Raises:
        DataError: the row cannot be read at all.
    """
    schema = schema or schema_of(row, rules)
    try:
        refuse_media(row)
        given = template_input(row.record, schema.tools(row.record), row.location)
        found = schema.read(row, rules)
    except BadPairError as bad:
        return [bad]
    return [
        replace(one, template_kwargs=given) if isinstance(one, PreferenceExample) else one
        for one in found
    ]


def schema_of(row: Row, rules: RowRules = DEFAULT) -> Schema:
    """How the row writes its pair; fields have been renamed.

    Raises:
        DataError: in no way that is read here; says which one it looks like.
    """
    if rules.schema is not None and rules.schema in SCHEMAS:
        return SCHEMAS[rules.schema]
    for schema in SCHEMAS.values():
        if schema.fits(row.record):
            if schema in (DIALOGUES, WHOLE_STRINGS, WHOLE_MESSAGES):
                _refuse_other_prompt(row)
            return schema
    raise _no_pair(row)


def prompt_digest(one: PreferenceExample | UnpairedExample) -> str:
    """Digest of the prompt and of what the template reads beside it, to tell like prompts by."""
    parts = [one.prompt, one.template_kwargs] if one.template_kwargs else one.prompt
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _no_pair(row: Row) -> DataError:
    record, where = row.record, row.location
    if "label" in record and "chosen" not in record:
        return DataError(
            f"{where}: a single judged answer (`label`), and no pair; use --loss-type kto, or "
            "--pair-labelled where a prompt has good and bad answers"
        )
    for name in ("chosen", "rejected"):
        if name not in record:
            return DataError(
                f"{where}: missing `{name}` (found {format_names(record)}); if a column has "
                f"another name, --column {name}=NAME"
            )
    kinds = {kind_of(record[name], name, where) for name in ("chosen", "rejected")}
    if record.get("prompt") is not None:
        kind_of(record["prompt"], "prompt", where)
    if len(kinds) > 1:
        return DataError(f"{where}: one of `chosen` and `rejected` is text, the other messages")
    return DataError(f"{where}: in no way that is read here (found {format_names(record)})")


def _refuse_other_prompt(row: Row) -> None:
    """A row without a prompt may be whole dialogues; one with a `promt` is a slip."""
    if isinstance(row.record.get("chosen"), str) and isinstance(row.record.get("messages"), list):
        raise DataError(
            f"{row.location}: missing `prompt` beside answers that are text (found `messages`); "
            "use --column prompt=messages"
        )
    near = get_close_matches("prompt", row.record, n=1, cutoff=0.75)
    if "prompt" not in row.record and near:
        raise DataError(f"{row.location}: missing `prompt` (found `{near[0]}`)")
