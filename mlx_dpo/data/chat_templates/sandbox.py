"""Run chat templates with limits on time and size, and with the clock of `clock`.

transformers compiles a chat template for Jinja's sandbox, in which a template reaches neither
files nor the program. This sandbox is narrower: loops and calls are counted, and every
value that a template builds is measured. The syntax tree of a template is changed for that before
it is compiled, so that loops without a body and operators are counted as well.
"""

import sys
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import TemplateError
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from mlx_dpo.data.chat_templates import operations
from mlx_dpo.data.chat_templates import template_date as clock
from mlx_dpo.data.chat_templates.limits import (
    Budget,
    TemplateLimitError,
    UnusableTemplateError,
)
from mlx_dpo.data.chat_templates.operations import CHECKED_FILTERS, LIST_FILTERS, budget_of
from mlx_dpo.errors import reason

MAX_SOURCE = 1 << 20  # characters of a template
# Python's compiler refuses blocks or expressions that are nested too deeply.
COMPILER_ERRORS = (SyntaxError, RecursionError, MemoryError, ValueError, OverflowError)
# Names of our own filters in the compiled template; a template itself can hardly name them.
ADMIT, COUNT, STORE = "mlx_dpo admit", "mlx_dpo count", "mlx_dpo store"
OPERATORS = {
    nodes.Add: ("mlx_dpo add", operations.add),
    nodes.Concat: ("mlx_dpo concatenate", operations.concatenate),
    nodes.Mul: ("mlx_dpo multiply", operations.multiply),
    nodes.Pow: ("mlx_dpo power", operations.power),
    nodes.Mod: ("mlx_dpo modulo", operations.modulo),
}
_rendering: ContextVar[Budget | None] = ContextVar("rendering", default=None)
SMALL_FILTERS = frozenset({  # their result is no new text or list
    "length", "count", "int", "float", "abs", "first", "last", "default", "d", "attr", "min", "max",
    "items", "map", "select", "reject", "selectattr", "rejectattr",
})  # fmt: skip


def _join_output(pieces: Iterable[str]) -> str:
    """Return the joined pieces of a text, which the template wrote one after another."""
    budget, texts, size = _rendering.get() or Budget({}), [], 0
    for piece in pieces:
        size += len(piece)
        budget.check_size(size)
        texts.append(piece)
    return "".join(texts)


class CountedIterable:
    """An iterable whose rounds are counted; its length is that of the original."""

    def __init__(self, iterable: Any, budget: Budget) -> None:
        self._iterable, self._budget = iterable, budget

    def __iter__(self) -> Iterator[Any]:
        step = self._budget.step
        for item in self._iterable:
            step()
            yield item

    def __len__(self) -> int:
        return len(self._iterable)


class LimitedContext(Context):
    """Variables of one rendering, with its budget."""

    def __init__(self, environment: Any, parent: dict[str, Any], *args: Any, **more: Any) -> None:
        super().__init__(environment, parent, *args, **more)
        self.budget = Budget(parent)

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        """Return a context with further variables, which shares the budget."""
        context = super().derived(locals)
        assert isinstance(context, LimitedContext)
        context.budget = self.budget
        return context


class LimitedTemplate(Template):
    """A compiled template whose rendering has limits."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        """Return the rendered text.

        Raises:
            TemplateLimitError: the template computes for too long or builds too large a value.
        """
        context = self.new_context(dict(*args, **kwargs))
        token = _rendering.set(budget_of(context))
        try:
            return self.environment.concat(self.root_render_func(context))
        except MemoryError:
            raise TemplateLimitError(
                "the chat template needs more memory than is available"
            ) from None
        finally:
            _rendering.reset(token)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox for templates that counts their steps and measures what they build.

    Args:
        plain: the environment in which transformers compiles chat templates.
    """

    context_class = LimitedContext
    template_class = LimitedTemplate
    concat = staticmethod(_join_output)

    def __init__(self, plain: ImmutableSandboxedEnvironment) -> None:
        super().__init__(
            trim_blocks=plain.trim_blocks,
            lstrip_blocks=plain.lstrip_blocks,
            extensions=[type(extension) for extension in plain.extensions.values()],
            undefined=plain.undefined,
        )
        self.globals |= plain.globals
        self.globals["strftime_now"] = clock.strftime_now
        self.globals.pop("lipsum", None)  # random text
        self.filters |= plain.filters
        self.filters |= {name: _checked_filter(plain, name) for name in CHECKED_FILTERS}
        self.filters |= {name: pass_context(function) for name, function in OPERATORS.values()}
        self.filters |= {ADMIT: _admit, COUNT: _count, STORE: _store, "random": _check_not_random}

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        limited = _Limiter().visit(source)
        limited.set_environment(self)
        return super()._generate(limited, *args, **kwargs)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function for a template, and count the call."""
        budget = budget_of(__context)
        budget.step()
        if isinstance(__obj, LoopContext) and args:  # a recursive loop
            args = (CountedIterable(args[0], budget), *args[1:])
        operations.check_call(budget, __obj, args, kwargs)
        return budget.admit(super().call(__context, __obj, *args, **kwargs))


class _Limiter(NodeTransformer):
    """Changes a template's syntax tree so that its loops are counted and its values measured."""

    def get_visitor(self, node: nodes.Node) -> Any:
        """Return the method that changes a node of this type, or None."""
        method = _LIMITED_NODES.get(type(node))
        return None if method is None else getattr(self, method)

    def _limit_loop(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(COUNT, node.iter)
        return node

    def _limit_sum(self, node: nodes.Add) -> nodes.Node:
        operands: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):  # a long sum is nested on its left
            operands.append(self.visit(left.right))
            left = left.left
        operands.append(self.visit(left))
        return _operation(nodes.Add, operands[::-1])

    def _limit_text(self, node: nodes.Concat) -> nodes.Node:
        return _operation(nodes.Concat, [self.visit(operand) for operand in node.nodes])

    def _limit_operator(self, node: nodes.BinExpr) -> nodes.Node:
        return _operation(type(node), [self.visit(node.left), self.visit(node.right)])

    def _limit_slice(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(ADMIT, node) if isinstance(node.arg, nodes.Slice) else node

    def _limit_literal(self, node: nodes.List | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filter(ADMIT, node)

    def _limit_tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filter(ADMIT, node) if node.ctx == "load" else node  # else names to assign to

    def _limit_filter(self, node: nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        return node if node.name in SMALL_FILTERS else _filter(ADMIT, node)

    def _limit_assignment(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.target, nodes.NSRef):
            node.node = _filter(STORE, node.node)
        return node


_LIMITED_NODES = {
    nodes.For: "_limit_loop",
    nodes.Add: "_limit_sum",
    nodes.Concat: "_limit_text",
    nodes.Mul: "_limit_operator",
    nodes.Pow: "_limit_operator",
    nodes.Mod: "_limit_operator",
    nodes.Getitem: "_limit_slice",
    nodes.List: "_limit_literal",
    nodes.Dict: "_limit_literal",
    nodes.Tuple: "_limit_tuple",
    nodes.Filter: "_limit_filter",
    nodes.Assign: "_limit_assignment",
}


def _operation(kind: type[nodes.Expr], operands: list[nodes.Expr]) -> nodes.Filter:
    return _filter(OPERATORS[kind][0], nodes.List(operands, lineno=operands[0].lineno))


def _filter(name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@pass_context
def _admit(context: Context, value: Any) -> Any:
    return budget_of(context).admit(value)


@pass_context
def _count(context: Context, iterable: Any) -> CountedIterable:
    return CountedIterable(iterable, budget_of(context))


@pass_context
def _store(context: Context, value: Any) -> Any:
    """Return a value that becomes an attribute of a namespace; another namespace is refused.

    Namespaces in one another could be written as endless text.
    """
    if isinstance(value, Namespace):
        raise TemplateLimitError("the chat template stores a namespace in another value")
    return value


@pass_context
def _check_not_random(context: Context, value: Any) -> Any:
    raise UnusableTemplateError(
        "the chat template uses random numbers, so the text of a conversation would change"
    )


def _checked_filter(plain: ImmutableSandboxedEnvironment, name: str) -> Any:
    """Return the filter of the environment `plain` with a check before it."""

    @pass_context
    def checked(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        if name in LIST_FILTERS and not isinstance(value, str | list | tuple):
            value = list(value)
        operations.check_filter(budget_of(context), name, value, [*args, *kwargs.values()])
        return plain.call_filter(name, value, args, kwargs, context, context.eval_ctx)

    return checked


def install_limits() -> None:
    """Let transformers compile chat templates in a `LimitedEnvironment`.

    Its function is replaced, because tokenizers, and mlx-lm's server through them, offer no other
    way to choose the environment. Without a tokenizer of transformers there is nothing to do.
    """
    if "transformers" in sys.modules:
        _replace_compiler()


@lru_cache(maxsize=1)
def _replace_compiler() -> None:
    from transformers.utils import chat_template_utils as library

    plain = library._compile_jinja_template("").environment

    @lru_cache(maxsize=32)
    def compile_template(chat_template: str) -> Template:
        return compile_limited(plain, chat_template)

    library._compile_jinja_template = compile_template


def compile_limited(plain: ImmutableSandboxedEnvironment, source: str) -> Template:
    """Return a template that is compiled for a `LimitedEnvironment`.

    Raises:
        UnusableTemplateError: the source is too long, or is no template.
    """
    if len(source) > MAX_SOURCE:
        raise TemplateLimitError(
            f"the chat template has {len(source):,} characters (at most {MAX_SOURCE:,})"
        )
    try:
        return LimitedEnvironment(plain).from_string(source)
    except (TemplateError, *COMPILER_ERRORS) as error:
        why = reason(error)
        raise UnusableTemplateError(f"the chat template cannot be compiled ({why})") from error
