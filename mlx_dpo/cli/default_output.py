"""The run folder of `mlx-dpo train` if `--output` is not given."""

import re
from datetime import date
from itertools import count
from pathlib import Path

from mlx_dpo.errors import ConfigError

RUNS = Path("runs")  # in the current folder


def choose_run_folder(model: str) -> str:
    """Return a path `runs/MODEL-DATE` or `runs/MODEL-DATE-N` that does not exist yet."""
    name = re.sub(r"[^\w.-]+", "-", Path(model).expanduser().absolute().name).strip(".-") or "run"
    first = RUNS / f"{name}-{date.today()}"
    others = (first.with_name(f"{first.name}-{number}") for number in count(2))
    return str(first if not first.exists() else next(p for p in others if not p.exists()))


def find_unfinished_run() -> str:
    """Return the path of the only unfinished run in `runs/`.

    Raises:
        ConfigError: there is none, or there are several.
    """
    from mlx_dpo.runs.folder import RunPaths, read_record

    folders = sorted(path.parent for path in RUNS.glob("*/run.json"))
    records = {folder: read_record(RunPaths(folder)) for folder in folders}
    found = [str(folder) for folder, record in records.items() if record and not _is_done(record)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            f"--output is missing: {RUNS}/ has {len(found)} unfinished runs "
            f"({', '.join(found)}); name the one to resume"
        )
    raise ConfigError(
        f"--output is missing: {RUNS}/ has no unfinished run; name the folder of the run to resume"
    )


def _is_done(record: dict[str, object]) -> bool:
    return record["state"] == "finished"
