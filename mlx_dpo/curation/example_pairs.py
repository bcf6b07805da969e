"""Preference pairs that ship with the package: ten examples, and the pairs of the demo."""

import shutil
from pathlib import Path

from mlx_dpo.data.inspect.raw_rows import check_new_path, open_new_file
from mlx_dpo.io.atomic import atomic_folder
from mlx_dpo.paths import example_pairs, tiny_chat


def write_example_pairs(output: Path) -> int:
    """Write the ten example pairs to a new file; return their number.

    Raises:
        ConfigError: the file exists.
    """
    check_new_path(output)
    content = example_pairs().read_bytes()
    with open_new_file(output) as stream:
        stream.write(content)
    return content.count(b"\n")


def write_demo_pairs(output: Path) -> dict[str, int]:
    """Write `train.jsonl` and `valid.jsonl` of the demo to a new folder; return their pair counts.

    Raises:
        ConfigError: the folder exists.
    """
    check_new_path(output)
    counts = {}
    with atomic_folder(output) as folder:
        for name in ("train", "valid"):
            source = tiny_chat() / "preferences" / f"{name}.jsonl"
            shutil.copyfile(source, folder / source.name)
            counts[name] = source.read_bytes().count(b"\n")
    return counts
