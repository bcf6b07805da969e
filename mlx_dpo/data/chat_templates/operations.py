"""Operators, filters and methods of chat templates, with the size of their result checked first."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jinja2.runtime import Context

from mlx_dpo.data.chat_templates.limits import MAX_BITS, Budget, TemplateLimitError

MAX_SLOW_TEXT = 1 << 18  # characters for filters whose time grows with the square of the length
MAX_OPERATIONS = 1 << 30
NESTED_FIELD = re.compile(r"\{[^{}]*\{")  # `{:{width}}`
DIGITS = re.compile(r"\d+")
SEQUENCES = (str, bytes, list, tuple)


def budget_of(context: Context) -> Budget:
    """Return the budget of the rendering in progress."""
    budget = context.budget  # type: ignore[attr-defined]
    assert isinstance(budget, Budget)
    return budget


def add(context: Context, operands: Sequence[Any]) -> Any:
    """Return the sum of a chain of operands, as `a + b + c`."""
    budget = budget_of(context)
    if all(type(operand) is str for operand in operands):
        budget.check_size(sum(map(len, operands)))
        return budget.admit("".join(operands))
    total = operands[0]
    for operand in operands[1:]:
        if isinstance(total, SEQUENCES) and isinstance(operand, SEQUENCES):
            budget.check_size(len(total) + len(operand))
        total = total + operand
    return budget.admit(total)


def concatenate(context: Context, operands: Sequence[Any]) -> str:
    """Return the operands as one text, as `a ~ b`."""
    budget = budget_of(context)
    budget.check_size(sum(budget.extent(operand).size for operand in operands))
    texts = [str(operand) for operand in operands]
    budget.check_size(sum(map(len, texts)))
    return str(budget.admit("".join(texts)))


def multiply(context: Context, operands: Sequence[Any]) -> Any:
    """Return `a * b`."""
    budget, (left, right) = budget_of(context), operands
    for value, times in ((left, right), (right, left)):
        if isinstance(value, SEQUENCES) and isinstance(times, int):
            budget.check_size(budget.extent(value).size * max(times, 0))
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    return budget.admit(left * right)


def power(context: Context, operands: Sequence[Any]) -> Any:
    """Return `a ** b`."""
    left, right = operands
    if isinstance(left, int) and isinstance(right, int) and abs(left) > 1:
        _check_bits(left.bit_length() * abs(right))
    return budget_of(context).admit(left**right)


def modulo(context: Context, operands: Sequence[Any]) -> Any:
    """Return `a % b`: the rest of a division, or a formatted text."""
    left, right = operands
    if isinstance(left, str | bytes):
        text = left if isinstance(left, str) else left.decode("latin-1")
        values = right if isinstance(right, tuple) else (right,)
        check_format(budget_of(context), text, "%", values, takes_width="*" in text)
    return budget_of(context).admit(left % right)


def check_format(
    budget: Budget, text: str, mark: str, values: Iterable[Any], *, takes_width: bool
) -> None:
    """Raise `TemplateLimitError` if formatting could build a text that is too large.

    Args:
        budget: the budget of the rendering.
        text: the format; every `mark` in it begins a field.
        mark: `%` or `{`.
        values: what the fields print.
        takes_width: a field may take its width from the values.
    """
    values = [*values]
    longest = max((budget.extent(value).size for value in values), default=0)
    size = len(text) + text.count(mark) * longest
    size += sum(int(digits[:20]) for digits in DIGITS.findall(text))
    if takes_width:
        size += text.count(mark) * max((abs(v) for v in values if isinstance(v, int)), default=0)
    budget.check_size(size)


def check_call(budget: Budget, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise `TemplateLimitError` if a method of a text or number could build too large a value."""
    function = getattr(function, "__wrapped__", function)  # the sandbox wraps `format`
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if isinstance(owner, str | bytes) and name in METHODS:
        METHODS[name](budget, owner, [*args, *kwargs.values()])
    elif isinstance(owner, int) and name == "to_bytes" and args:
        _check_number(budget, args[0])


def check_filter(budget: Budget, name: str, value: Any, args: Sequence[Any]) -> None:
    """Raise `TemplateLimitError` if a filter could build too large a value or take too long."""
    if name in SLOW_FILTERS and budget.extent(value).size > MAX_SLOW_TEXT:
        raise TemplateLimitError(f"the chat template applies `{name}` to too long a text")
    if name == "format":
        text = str(value)
        check_format(budget, text, "%", args, takes_width="*" in text)
    elif name in LIST_FILTERS:
        _check_list(budget, name, value, args)
    elif name in NUMBER_FILTERS:
        for number in args:
            _check_number(budget, number, times=NUMBER_FILTERS[name](budget, value))
    elif isinstance(value, str):
        METHODS[name](budget, value, args)


def _check_list(budget: Budget, name: str, value: Any, args: Sequence[Any]) -> None:
    size = budget.extent(value).size
    budget.check_size(size + sum(len(value) * budget.extent(argument).size for argument in args))
    if name == "sum":  # a sum of lists copies the first ones again for every list
        _check_work(len(value) * size)


def _check_number(budget: Budget, number: Any, *, times: int = 1) -> None:
    size = abs(number) if isinstance(number, int) else budget.extent(number).size
    budget.check_size(size * times)


def _check_work(operations: int) -> None:
    if operations > MAX_OPERATIONS:
        raise TemplateLimitError("the chat template compares or copies too many characters")


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise TemplateLimitError(
            f"the chat template computes a number of more than {MAX_BITS:,} bits"
        )


def _check_width(budget: Budget, owner: Any, args: Sequence[Any]) -> None:
    for number in args:
        _check_number(budget, number)


def _check_tabs(budget: Budget, owner: Any, args: Sequence[Any]) -> None:
    tab = "\t" if isinstance(owner, str) else b"\t"
    for number in args:
        _check_number(budget, number, times=owner.count(tab))


def _check_replace(budget: Budget, owner: Any, args: Sequence[Any]) -> None:
    old, new = (*args, "", "")[:2]
    if isinstance(old, type(owner)) and isinstance(new, type(owner)):
        budget.check_size(len(owner) + owner.count(old) * len(new))


def _check_join(budget: Budget, owner: Any, args: Sequence[Any]) -> None:
    for parts in args[:1]:
        if isinstance(parts, str | list | tuple | dict):
            budget.check_size(len(parts) * len(owner) + budget.extent(parts).size)


def _check_strip(budget: Budget, owner: Any, args: Sequence[Any]) -> None:
    for characters in args[:1]:
        if isinstance(characters, str | bytes):
            _check_work(len(characters) * len(owner))


def _check_translate(budget: Budget, owner: Any, args: Sequence[Any]) -> None:
    for table in args[:1]:
        budget.check_size(len(owner) * budget.extent(table).size if len(owner) > 1 else 0)


def _check_method_format(budget: Budget, owner: Any, args: Sequence[Any]) -> None:
    values = [*args[0].values()] if len(args) == 1 and isinstance(args[0], dict) else args
    takes_width = bool(NESTED_FIELD.search(owner))
    check_format(budget, owner, "{", values, takes_width=takes_width)


Check = Callable[[Budget, Any, Sequence[Any]], None]
# Methods of texts, and filters of the same name and arguments.
METHODS: dict[str, Check] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _check_width),
    **dict.fromkeys(("strip", "lstrip", "rstrip", "trim"), _check_strip),
    **dict.fromkeys(("format", "format_map"), _check_method_format),
    "expandtabs": _check_tabs,
    "replace": _check_replace,
    "join": _check_join,
    "translate": _check_translate,
}
SLOW_FILTERS = frozenset({"striptags", "urlize", "wordwrap"})
# Filters with numbers or texts that are repeated, and how often.
NUMBER_FILTERS: dict[str, Callable[[Budget, Any], int]] = {
    "indent": lambda budget, value: str(value).count("\n") + 1,
    "batch": lambda budget, value: 1,
    "slice": lambda budget, value: 1,
    "round": lambda budget, value: 1 << 8,  # ten to the power of the digits is computed
    "wordwrap": lambda budget, value: len(str(value)),
    "tojson": lambda budget, value: budget.extent(value).size,
}
LIST_FILTERS = frozenset({"join", "sum"})  # their value may be a generator, which has no length
CHECKED_FILTERS = (
    {"center", "replace", "trim", "format"} | SLOW_FILTERS | LIST_FILTERS | NUMBER_FILTERS.keys()
)
