"""What a model's licence asks of what is made from the model: that its name and its text go along.

Cards are written by anybody; what cannot be read as one says nothing.
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
    """The metadata of the card in a folder; nothing where there is none."""
    try:
        return dict(ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.to_dict())
    except (OSError, ValueError, TypeError, YAMLError):
        return {}


def inherited_metadata(card: dict[str, Any]) -> dict[str, Any]:
    """What of a model's card holds for what is made from the model."""
    return {name: card[name] for name in INHERITED_KEYS if card.get(name)}


def copy_license_files(source: Path, target: Path) -> None:
    """Put the texts of a model's licence beside what was made from it."""
    for pattern in LICENSE_PATTERNS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
