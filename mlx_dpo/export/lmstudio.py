"""Find LM Studio's models folder, from which it loads models in MLX's layout.

LM Studio lists each folder `PUBLISHER/MODEL` of its models folder. Source:
https://lmstudio.ai/docs/app/basics/import-model. A user may move its home folder, which the file
`~/.lmstudio-home-pointer` then names, or the models folder alone, which is `downloadsFolder` in
`settings.json` of the home folder.
"""

import re
from pathlib import Path

from mlx_dpo.errors import ConfigError
from mlx_dpo.io.bounded import read_json, read_text

POINTER = ".lmstudio-home-pointer"
HOME = ".lmstudio"
PUBLISHER = "mlx-dpo"  # default publisher, under which LM Studio lists the models
NAME = re.compile(r"[\w][\w.-]*", re.ASCII)


def find_models_folder(user_home: Path | None = None) -> Path:
    """Return the folder from which LM Studio loads its models.

    Args:
        user_home: home folder of the user; by default that of the current user.

    Raises:
        ConfigError: LM Studio was never started here, or its settings cannot be read.
    """
    user_home = user_home or Path.home()
    home = user_home / HOME
    pointer = user_home / POINTER
    if pointer.is_file():
        home = Path(read_text(pointer, ConfigError).strip())
    if not home.is_dir():
        raise ConfigError(
            f"`--to lmstudio`: LM Studio's folder {home} was not found; start LM Studio once, or "
            "name a folder of its models folder with --output"
        )
    settings = home / "settings.json"
    if not settings.is_file():
        return home / "models"
    entries = read_json(settings, ConfigError)
    folder = entries.get("downloadsFolder") if isinstance(entries, dict) else None
    return Path(folder) if isinstance(folder, str) and folder else home / "models"


def model_folder(name: str) -> Path:
    """Return the folder of the model `name` (`MODEL` or `PUBLISHER/MODEL`) for LM Studio.

    Raises:
        ConfigError: the name is not of this form, or LM Studio's models folder is not found.
    """
    parts = name.split("/")
    if len(parts) > 2 or not all(NAME.fullmatch(part) for part in parts):
        raise ConfigError(
            f"`--name` must be MODEL or PUBLISHER/MODEL of letters, digits and `._-`, got {name!r}"
        )
    return find_models_folder().joinpath(*([PUBLISHER] if len(parts) == 1 else []), *parts)
