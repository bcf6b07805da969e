"""Names and docstrings use the field's words, and what documents name exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlx_dpo"
TREES = {f: ast.parse(f.read_text(encoding="utf-8")) for f in sorted(PACKAGE.rglob("*.py"))}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef

# Everyday words that stood for a standard term, and so for several things at once.
PRIVATE = {
    "told",
    "said",
    "heard",
    "kept",
    "asked",
    "sides",
    "voice",
    "voices",
    "way",
    "those",
    "one",
}
# Documentation pages whose paths are checked; notes.md is a dated log.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def identifiers(tree):
    """Yield (line, name) of everything that the code gives a name to."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case ast.ClassDef(name=name) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)):
                yield node.lineno, name


def words(name):
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name)}


def test_words_of_a_name_are_found():
    assert words("_is_told") == {"is", "told"}
    assert words("HFModel") == {"hf", "model"}
    assert words("PairOutcomes2") == {"pair", "outcomes2"}


def test_no_name_is_of_a_private_vocabulary():
    found = [
        f"{file.relative_to(ROOT)}:{line} {name}"
        for file, tree in TREES.items()
        for line, name in identifiers(tree)
        if words(name) & PRIVATE
    ]
    assert found == []


def test_the_private_words_are_left_to_quotations():
    word = re.compile(r"\b(told|said|heard|voices?|sides?)\b")
    lines = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in TREES
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if word.search(line)
    ]
    assert len(lines) < 15, lines


def functions(tree):
    """Yield functions and methods with a docstring that are no properties."""
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS) and ast.get_docstring(node):
            decorators = {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}
            if not decorators & {"property", "cached_property"}:
                yield node


NOT_VERBS = re.compile(
    r"an?|all|and|any|as|at|but|by|each|every|for|from|how|i|if|in|its?|no|none|not|of|on|once|one|"
    r"only|or|that|the|their|there|these|they|this|those|to|until|what|whatever|when|where|whether|"
    r"which|who|whose|why|with|without"
)


def begins_with_a_verb(docstring):
    """Return whether the first word of a docstring may be an imperative (PEP 257)."""
    first = re.match(r"[A-Za-z]+(?=[\s,.:])", docstring)
    if first is None:
        return False
    word = first[0].lower()
    return not NOT_VERBS.fullmatch(word) and not re.search(r"(?<![sx])s$", word)


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the log-probs.", True),
        ("Process the rows.", True),
        ("Returns the log-probs.", False),
        ("What a model remembers.", False),
        ("The log-probs.", False),
        ("`path`, or its parent.", False),
    ],
)
def test_a_first_word_is_judged(docstring, expected):
    assert begins_with_a_verb(docstring) is expected


def test_docstrings_of_functions_begin_with_an_imperative():
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno} {ast.get_docstring(node).splitlines()[0]}"
        for file, tree in TREES.items()
        for node in functions(tree)
        if not begins_with_a_verb(ast.get_docstring(node))
    ]
    assert found == []


# Names of methods that override a method of another library's base class.
OVERRIDES = {
    "validate_model_parameters",  # mlx_lm.server.APIHandler calls it before it generates
}


def test_what_raises_is_named_check():
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS)
        and node.name not in OVERRIDES
        and words(node.name) & {"refuse", "validate"}
    ]
    assert found == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.py)`", text))
    paths |= {target for target in re.findall(r"\]\(([^)#:]+)\)", text) if "://" not in target}
    known = (ROOT, PACKAGE, page.parent)
    assert {p for p in paths if not any((base / p).exists() for base in known)} == set()
