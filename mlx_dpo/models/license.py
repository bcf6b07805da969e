"""Read the license and metadata of a model, which derived models and adapters inherit.

A model card whose metadata cannot be parsed counts as empty.
"""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from yaml import YAMLError

CARD = "README.md"
LICENSE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
INHERITED_KEYS = ("license", "license_name", "license_link", "language")


def read_card_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of the model card in a folder; empty if there is no valid model card."""
    try:
        return dict(ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.to_dict())
    except (OSError, ValueError, TypeError, YAMLError):
        return {}


def inherited_metadata(card: dict[str, Any]) -> dict[str, Any]:
    """Return the license and language entries of a model card, which derived models inherit."""
    return {name: card[name] for name in INHERITED_KEYS if card.get(name)}


def copy_license_files(source: Path, target: Path) -> None:
    """Copy the license texts from a model's folder to the folder of a derived model."""
    for pattern in LICENSE_PATTERNS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
