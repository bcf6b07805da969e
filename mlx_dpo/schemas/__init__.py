"""Table of the data set schemas, and the functions that parse a row by its schema.

A schema describes how rows store a preference pair (or an unpaired example). It has a name for
`--schema`, a function that recognizes such a row, and a function that parses the row. To add a
schema, write it in a file of this package, or of `pairs` if its rows hold pairs, or of
`annotation_tools` if a tool exports them, and put it into `SCHEMAS`. Schemas do not depend on
files or tokenizers.
"""

from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches

from mlx_dpo.errors import TIED, BadPairError, DataError
from mlx_dpo.schemas.annotation_tools.anything_llm import ANYTHING_LLM
from mlx_dpo.schemas.annotation_tools.argilla import ARGILLA
from mlx_dpo.schemas.annotation_tools.label_studio import LABEL_STUDIO
from mlx_dpo.schemas.annotation_tools.open_webui import OPEN_WEBUI
from mlx_dpo.schemas.labelled import LABELLED
from mlx_dpo.schemas.messages import check_no_media, get_field_type, parse_template_kwargs
from mlx_dpo.schemas.pairs.compared import COMPARED
from mlx_dpo.schemas.pairs.hh_rlhf import DIALOGUES
from mlx_dpo.schemas.pairs.instructions import ALPACA, ORCA, SHP
from mlx_dpo.schemas.pairs.ranked import RANKED
from mlx_dpo.schemas.pairs.sharegpt import SHAREGPT
from mlx_dpo.schemas.pairs.trl import MESSAGES, OPENAI, STRINGS, WHOLE_MESSAGES, WHOLE_STRINGS
from mlx_dpo.schemas.schema import (
    DEFAULT_RULES,
    Parsed,
    Row,
    RowRules,
    Schema,
    format_names,
    suggest_columns,
)
from mlx_dpo.schemas.supervised import (
    SUPERVISED_SCHEMAS,
    check_no_label,
    find_supervised,
    fits_supervised,
)
from mlx_dpo.types import PreferenceExample, UnpairedExample

# The first schema that fits a row parses it: those with field names of their own come first.
SCHEMAS = {
    schema.name: schema
    for schema in (
        OPEN_WEBUI, ANYTHING_LLM, ARGILLA, LABEL_STUDIO, OPENAI, SHAREGPT, SHP, RANKED, COMPARED,
        ALPACA, ORCA, STRINGS, WHOLE_MESSAGES, MESSAGES, DIALOGUES, WHOLE_STRINGS, LABELLED,
    )
}  # fmt: skip
SCHEMA_NAMES = tuple(dict.fromkeys([*SCHEMAS, *SUPERVISED_SCHEMAS]))  # values of `--schema`


def find_schema(row: Row, rules: RowRules = DEFAULT_RULES) -> Schema:
    """Return the schema set in `rules` or, if none is set, the first schema that fits the row.

    Raises:
        DataError: no schema fits the row.
    """
    if rules.schema is not None:
        return _named_schema(row, rules, rules.schema)
    if rules.supervised:
        check_no_label(row)
    reads_labels = rules.judged or (rules.pair_labelled and "chosen" not in row.record)
    if reads_labels and LABELLED.fits(row.record):
        return LABELLED
    for schema in SCHEMAS.values():
        if not schema.unpaired and schema.fits(row.record):
            if schema in (DIALOGUES, WHOLE_STRINGS, WHOLE_MESSAGES):
                _check_prompt_name(row)
            return schema
    if rules.supervised:
        return find_supervised(row)
    raise _unknown_schema(row)


def _named_schema(row: Row, rules: RowRules, name: str) -> Schema:
    """Return the schema `name`; of two with the name, that of pairs if it fits the row."""
    pairs, supervised = SCHEMAS.get(name), SUPERVISED_SCHEMAS.get(name)
    if supervised is None or not rules.supervised:
        return SCHEMAS[name]
    return pairs if pairs is not None and pairs.fits(row.record) else supervised


def has_pair_schema(row: Row) -> bool:
    """Return True if a schema of preference pairs fits the row."""
    return any(not schema.unpaired and schema.fits(row.record) for schema in SCHEMAS.values())


def parse_row(
    row: Row, rules: RowRules = DEFAULT_RULES, schema: Schema | None = None
) -> list[Parsed]:
    """Return a list of the row's examples, with a `BadPairError` for each unusable example.

    Args:
        row: the row, after its columns were renamed.
        rules: the settings for parsing rows.
        schema: `find_schema(row, rules)`, if the caller has it already.

    Raises:
        DataError: the row cannot be read at all.
    """
    schema = schema or find_schema(row, rules)
    if schema.unpaired and not (rules.judged or rules.pair_labelled):
        raise DataError(
            f"{row.location}: unpaired data (a single answer with a `label`), not preference pairs"
        )
    try:
        check_no_media(row)
        kwargs = parse_template_kwargs(row.record, schema.tools(row.record), row.location)
        examples = schema.parse(row, rules)
    except BadPairError as bad:
        return [bad]
    return [
        example if isinstance(example, BadPairError) else replace(example, template_kwargs=kwargs)
        for example in examples
    ]


def parse_pairs(
    row: Row, rules: RowRules = DEFAULT_RULES, schema: Schema | None = None
) -> list[PreferenceExample]:
    """Return the preference pairs of the row; equally rated completions make no pair.

    The arguments are those of `parse_row`.

    Raises:
        DataError: a field is missing or of another type, or the row is not a pair.
        BadPairError: the row is a pair, but nothing can be learned from it.
    """
    pairs = []
    for example in parse_row(row, rules, schema):
        if isinstance(example, PreferenceExample):
            pairs.append(example)
        elif isinstance(example, BadPairError) and example.reason != TIED:
            raise example
    return pairs


def parse_unpaired(
    row: Row, rules: RowRules = DEFAULT_RULES, schema: Schema | None = None
) -> list[UnpairedExample]:
    """Return the unpaired examples of the row.

    A labelled row gives one example, or several. A row with a pair gives a good and a bad example.

    The arguments are those of `parse_row`.

    Raises:
        DataError: a field is missing or of another type.
        BadPairError: nothing can be learned from the row.
    """
    schema = schema or find_schema(row, rules)
    if not schema.has_labels:
        return [
            UnpairedExample(
                pair.prompt, text, good, row.location, pair.template_kwargs, pair.implicit_prompt
            )
            for pair in parse_pairs(row, rules, schema)
            for text, good in ((pair.chosen, True), (pair.rejected, False))
        ]
    return _usable(parse_row(row, rules, schema))


def parse_supervised(
    row: Row, rules: RowRules, schema: Schema | None = None
) -> list[UnpairedExample]:
    """Return the examples of the row for instruction tuning; of a pair, the chosen completion.

    The arguments are those of `parse_row`.

    Raises:
        DataError: a field is missing or of another type.
        BadPairError: nothing can be learned from the row.
    """
    schema = schema or find_schema(row, rules)
    if schema is SUPERVISED_SCHEMAS.get(schema.name):
        return _usable(parse_row(row, rules, schema))
    return [
        UnpairedExample(
            pair.prompt, pair.chosen, True, row.location, pair.template_kwargs, pair.implicit_prompt
        )
        for pair in parse_pairs(row, rules, schema)
    ]


def _usable(parsed: Iterable[Parsed]) -> list[UnpairedExample]:
    """Return the unpaired examples; raise the first `BadPairError` among them."""
    examples = []
    for example in parsed:
        if isinstance(example, BadPairError):
            raise example
        if isinstance(example, UnpairedExample):
            examples.append(example)
    return examples


def _unknown_schema(row: Row) -> DataError:
    record, location = row.record, row.location
    if "label" in record and "chosen" not in record:
        return DataError(
            f"{location}: unpaired data (a single answer with a `label`), not preference pairs; "
            "use --loss-type kto, or --pair-labelled if prompts have good and bad answers"
        )
    if not {"chosen", "rejected"} & record.keys() and fits_supervised(record):
        return DataError(
            f"{location}: missing `chosen` and `rejected` (found {format_names(record)}); for "
            "instruction tuning on such rows, use --loss-type sft"
        )
    for name in ("chosen", "rejected"):
        if name not in record:
            return DataError(
                f"{location}: missing `{name}` (found {format_names(record)}); "
                + (suggest_columns(record) or f"if a column has another name, --column {name}=NAME")
            )
    kinds = {get_field_type(record[name], name, location) for name in ("chosen", "rejected")}
    if record.get("prompt") is not None:
        get_field_type(record["prompt"], "prompt", location)
    if len(kinds) > 1:
        return DataError(
            f"{location}: one of `chosen` and `rejected` is text, and the other is messages"
        )
    return DataError(f"{location}: unknown format of a row (found {format_names(record)})")


def _check_prompt_name(row: Row) -> None:
    """Raise `DataError` if the row seems to have a prompt in a column of another name.

    A row without `prompt` may have an implicit prompt, but a column `promt` is a typing error.
    """
    if isinstance(row.record.get("chosen"), str) and isinstance(row.record.get("messages"), list):
        raise DataError(
            f"{row.location}: missing `prompt`, and the answers are text (found `messages`); "
            "use --column prompt=messages"
        )
    near = get_close_matches("prompt", row.record, n=1, cutoff=0.75)
    if "prompt" not in row.record and near:
        raise DataError(f"{row.location}: missing `prompt` (found `{near[0]}`)")
