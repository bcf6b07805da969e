"""Read settings from a YAML file, and refuse values that YAML reads differently from how they look.

PyYAML follows YAML 1.1: a repeated key silently replaces the first, `010` is 8 and `1:30` is 90.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from mlx_dpo.errors import ConfigError
from mlx_dpo.io.bounded import MAX_DIGITS, MAX_NESTING, read_text

MAX_SETTINGS_BYTES = 1_000_000
MAX_NODES = 10_000  # of a file, counted again wherever an alias repeats them
OCTAL = re.compile(r"[-+]?0[0-7_]+")
SEXAGESIMAL = re.compile(r"[-+]?\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?")
MERGE, TIMESTAMP = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:timestamp"


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with errors for repeated keys and ambiguous numbers."""

    # Without dates: they are text to every setting.
    yaml_implicit_resolvers = {  # noqa: RUF012 (as PyYAML declares it)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        """Create a loader of a YAML text."""
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node; refuse lists and mappings that are nested too deeply."""
        self._depth += 1
        if self._depth > MAX_NESTING:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise _error(f"nested more than {MAX_NESTING} times", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Construct a mapping; refuse a repeated key."""
        if isinstance(node, yaml.MappingNode):
            first: dict[str, Any] = {}
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                    continue
                key.tag = "tag:yaml.org,2002:str"  # `on` is a name here
                if key.value in first:
                    line = first[key.value].start_mark.line + 1
                    raise _error(f"`{key.value[:80]}` is set twice, first in line {line}", key)
                first[key.value] = key
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Construct a value; a text that its tag does not fit is an error with its line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, LookupError, TypeError, AttributeError):
            kind = node.tag.rpartition(":")[2]
            raise _error(f"not a value of the type `{kind}`", node) from None


def _error(problem: str, node: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _construct_number(loader: _StrictLoader, node: Any) -> int | float:
    text = str(node.value)
    if len(text) > MAX_DIGITS:
        raise _error(f"a number of {len(text)} digits", node)
    number: int | float
    if node.tag.endswith("float"):
        number = yaml.SafeLoader.construct_yaml_float(loader, node)
    else:
        number = yaml.SafeLoader.construct_yaml_int(loader, node)
    if SEXAGESIMAL.fullmatch(text) or OCTAL.fullmatch(text):
        base = "sexagesimal" if ":" in text else "octal"
        raise _error(
            f"`{text}` is {base} in YAML ({number}); write {number}, or quote it if it is text",
            node,
        )
    return number


for _tag in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct_number)


class YamlSettings(dict[str, Any]):
    """The settings of a YAML file by name, with the line of each."""

    def __init__(self, values: dict[str, Any], lines: dict[str, int]) -> None:
        """Store values and lines by name."""
        super().__init__(values)
        self.lines = lines


def read_yaml(path: str) -> YamlSettings:
    """Return the top-level entries of a YAML file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, does not map names to values, or has a
            repeated key or a number that YAML reads differently from how it looks.
    """
    text = read_text(
        Path(path).expanduser(), ConfigError, limit=MAX_SETTINGS_BYTES, accept_pipe=True
    )
    loader = None
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        if node is not None:
            _check_size(node)
        values = None if node is None else loader.construct_document(node)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"the character {text[error.position : error.position + 1]!a} is not allowed"
        raise ConfigError(f"{path}:{line}: not valid YAML ({problem}); fix the line") from error
    except yaml.MarkedYAMLError as error:
        raise _config_error(path, error) from error
    finally:
        if loader is not None:
            loader.dispose()
    if node is None or not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"{path}: expected `setting: value` on each line, found {found}")
    lines = {key.value: key.start_mark.line + 1 for key, _ in node.value if key.id == "scalar"}
    return YamlSettings(values, lines)


def _config_error(path: str, error: yaml.MarkedYAMLError) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    line = f":{mark.line + 1}" if mark else ""
    problem = str(error.problem or error.context or error).splitlines()[0]
    return ConfigError(f"{path}{line}: not valid YAML ({problem}); fix the line")


def _check_size(root: Any) -> None:
    """Raise a YAML error if the file expands to too many nodes, or contains itself, by aliases."""
    sizes: dict[int, int] = {}
    open_nodes: Counter[int] = Counter()

    def size(node: Any) -> int:
        if open_nodes[id(node)]:
            raise _error("a value that contains itself", node)
        if id(node) not in sizes:
            open_nodes[id(node)] += 1
            children = node.value if isinstance(node, yaml.CollectionNode) else ()
            items = [n for c in children for n in (c if isinstance(c, tuple) else (c,))]
            sizes[id(node)] = 1 + sum(map(size, items))
            open_nodes[id(node)] -= 1
        return sizes[id(node)]

    if size(root) > MAX_NODES:
        raise _error(f"more than {MAX_NODES:,} values", root)
