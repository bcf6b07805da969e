"""Import transformers in half the time.

When transformers is imported, it reads all files of its models, over 1,600, and looks at each of
their lines for the names that they export. It does so twice, because its cache has fewer places
than the models have folders. Here the last line that begins with `__all__` is found by a search in
the whole text, and the result for every folder is kept. The result is the same.
"""

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MODULE = "transformers.utils.import_utils"
SCAN, READ_NAMES = "create_import_structure_from_path", "fetch__all__"  # its functions
START = "__all__"


def speed_up_transformers() -> None:
    """Change the scan of transformers when it is imported; nothing changes if it is already."""
    if MODULE not in sys.modules and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the module `MODULE` as Python does, and changes it as soon as its code has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of `MODULE`; None for any other module."""
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                del loader.exec_module  # the loader's own method is found again
                execute(module)
                change_scan(module)

            loader.exec_module = execute_and_change
        return spec


def change_scan(module: ModuleType) -> None:
    """Replace the functions of the module `MODULE`; those that this version lacks are left out."""
    if (read := getattr(module, READ_NAMES, None)) is not None:
        setattr(module, READ_NAMES, names_reader(read))
    if (scan := getattr(getattr(module, SCAN, None), "__wrapped__", None)) is not None:
        setattr(module, SCAN, lru_cache(maxsize=None)(scan))


def names_reader(read: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
    """Return a function that reads exported names as `read` does, from the text's last lines."""

    def read_names(file_content: str) -> list[str]:
        start = file_content.rfind("\n" + START) + 1  # 0: the first line, or there is none
        return read(file_content[start:]) if file_content.startswith(START, start) else []

    return read_names
