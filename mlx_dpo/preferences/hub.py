"""Datasets on the Hugging Face Hub -> rows, through the `datasets` library and its cache.

No code of a dataset is run: the library reads data files alone. It goes offline as
`HF_HUB_OFFLINE` and `HF_DATASETS_OFFLINE` say.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_dpo.errors import DataError, reason
from mlx_dpo.preferences.rows import Row

BATCH = 1000  # rows that are held as Python objects at once
WRITTEN = re.compile(
    r"(?P<path>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.+-]+))?(?:@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True)
class HubDataset:
    """`org/name[:config][@revision]`, taken apart."""

    path: str
    config: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return self.path + (f":{self.config}" if self.config else "")

    def splits(self) -> list[str]:
        """The names of its splits.

        Raises:
            DataError: there is no such dataset, or it cannot be asked.
        """
        import datasets

        names = _asked(
            self, datasets.get_dataset_split_names, self.path, self.config, revision=self.revision
        )
        return list(names)

    def rows(self, split: str) -> Iterator[Row]:
        """Its rows, downloaded once; images and sounds are not decoded.

        Raises:
            DataError: it cannot be read.
        """
        index = 0
        for batch in self._table(split).with_format("arrow").iter(batch_size=BATCH):
            for record in batch.to_pylist():
                yield Row(record, f"{self}:{split}[{index}]")
                index += 1

    def files(self, split: str) -> tuple[Path, ...]:
        """The files of the library's cache that hold its rows; none where they are in memory.

        Raises:
            DataError: it cannot be read.
        """
        return tuple(Path(one["filename"]) for one in self._table(split).cache_files)

    def _table(self, split: str) -> Any:
        import datasets

        return _asked(
            self, datasets.load_dataset, self.path, self.config, split=split,
            revision=self.revision,
        )  # fmt: skip


def hub_dataset(name: str) -> HubDataset | None:
    """The dataset that a name stands for; None if no dataset is written like that."""
    found = WRITTEN.fullmatch(name)
    return HubDataset(**found.groupdict()) if found else None


def _asked(dataset: HubDataset, ask: Any, *args: Any, **more: Any) -> Any:
    from datasets.exceptions import DatasetsError

    try:
        return ask(*args, **more)
    except (OSError, ValueError, LookupError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"{dataset}: neither a file or folder here nor a dataset that the Hub gives "
            f"({reason(error)}); mend the name, or look at the connection"
        ) from error
