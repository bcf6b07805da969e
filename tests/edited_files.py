"""Edit files of a run as a person would: the checksum is marked as `edited`."""

import json
from pathlib import Path
from typing import Any

from mlx_dpo.io.checksums import DIGEST, EDITED, WRITER


def read_entries(path: Path | str) -> dict[str, Any]:
    """Return the entries of a JSON file without its checksum."""
    entries = json.loads(Path(path).read_text())
    return {key: value for key, value in entries.items() if key not in (DIGEST, WRITER)}


def write_edited(path: Path | str, entries: dict[str, Any]) -> None:
    """Write a JSON file that mlx-dpo takes for one of its own that a person edited."""
    Path(path).write_text(json.dumps({**entries, WRITER: "mlx-dpo", DIGEST: EDITED}, indent=2))


def edit(path: Path | str, **changes: Any) -> None:
    """Replace entries of a JSON file that mlx-dpo wrote."""
    write_edited(path, read_entries(path) | changes)
