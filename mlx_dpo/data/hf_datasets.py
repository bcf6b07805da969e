"""Read rows of Hugging Face datasets, from the Hub or in memory, and of lists of dictionaries."""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from mlx_dpo.data.files import to_rows
from mlx_dpo.errors import DataError, reason
from mlx_dpo.io.hub_token import check_hub_token
from mlx_dpo.phases import paused, phase
from mlx_dpo.schemas.schema import Row

BATCH_ROWS = 1000  # rows of a `datasets.Dataset` that are Python objects at the same time
HUB_SECONDS = 10  # until the Hub counts as out of reach
HUB_NAME = re.compile(
    r"(?P<path>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.+-]+))?(?:@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hugging Face Hub, written `org/name[:config][@revision]`."""

    path: str
    config: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return self.path + (f":{self.config}" if self.config else "")

    def splits(self) -> list[str]:
        """Return the names of the dataset's splits.

        Raises:
            DataError: the dataset does not exist, or the Hub cannot be reached.
        """
        import datasets

        names = _call_hub(
            self, datasets.get_dataset_split_names, self.path, self.config, revision=self.revision
        )
        return list(names)

    def rows(self, split: str) -> Iterator[Row]:
        """Yield the rows of a split; download the split if it is not in the local cache.

        Raises:
            DataError: the dataset cannot be read.
        """
        yield from to_rows(_iterate_dataset(self._load(split), f"{self}:{split}"))

    def files(self, split: str) -> tuple[Path, ...]:
        """Return the local cache files of a split; an empty tuple if the split is in memory.

        Raises:
            DataError: the dataset cannot be read.
        """
        return tuple(Path(file["filename"]) for file in self._load(split).cache_files)

    def _load(self, split: str) -> Any:
        import datasets

        return _call_hub(
            self, datasets.load_dataset, self.path, self.config, split=split,
            revision=self.revision,
        )  # fmt: skip


def _iterate_dataset(dataset: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield location and fields of each row of a dataset; images and audio are not decoded."""
    from mlx_dpo.data.formats.arrow import to_records

    index = 0
    for batch in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
        yield from to_records(batch, name, index)
        index += batch.num_rows


def parse_hub_name(name: str) -> HubDataset | None:
    """Parse a name of the form `org/name[:config][@revision]`; return None for other names."""
    match = HUB_NAME.fullmatch(name)
    return HubDataset(**match.groupdict()) if match else None


def _call_hub(dataset: HubDataset, call: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of `datasets` that reads a dataset from its cache or from the Hub.

    The Hub is asked once before. If it cannot be reached, the call reads the cache alone: by
    itself, `datasets` tries six times within half a minute and prints each try.

    Raises:
        DataError: the dataset does not exist, or it is not in the cache and cannot be downloaded.
    """
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    check_hub_token()
    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = is_offline = was_offline or not _is_hub_reachable(dataset)
    try:
        # The library shows progress bars itself.
        with phase(f"Loading {dataset} from the Hub or its cache"), paused():
            return call(*args, **kwargs)
    except (OSError, ValueError, LookupError, RuntimeError, DatasetsError, HTTPError) as error:
        problem = f"cannot be loaded from the Hub ({reason(error)}); check the name and the network"
        if is_offline:
            place = "`HF_HUB_OFFLINE` is set" if was_offline else "the Hub cannot be reached"
            problem = (
                f"no such file or folder, the dataset is not in the Hub's cache, and {place}; "
                "check the name and the network"
            )
        raise DataError(f"{dataset}: {problem}") from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _is_hub_reachable(dataset: HubDataset) -> bool:
    """Return whether the Hub answers a request for the dataset.

    Raises:
        DataError: the Hub has no such dataset, or does not let the user read it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    login = "log in with `hf auth login`"
    try:
        HfApi().dataset_info(
            dataset.path, revision=dataset.revision, timeout=HUB_SECONDS, expand=["private"]
        )
    except GatedRepoError as error:
        url = f"https://huggingface.co/datasets/{dataset.path}"
        problem = f"the dataset is gated; accept its terms on {url}, {login}"
        raise DataError(f"{dataset}: {problem}") from error
    except RepositoryNotFoundError as error:
        problem = "no such file or folder, and no such dataset on the Hub; check the name"
        raise DataError(f"{dataset}: {problem}; if the dataset is private, {login}") from error
    except RevisionNotFoundError as error:
        problem = f"the Hub has no revision `{dataset.revision}` of this dataset; check the name"
        raise DataError(f"{dataset}: {problem}") from error
    except HfHubHTTPError:
        return True  # the Hub has a problem, which the call reports
    except (HTTPError, OSError):
        return False
    return True


@dataclass(frozen=True, eq=False)
class InMemoryRows:
    """Rows in memory: a list of dictionaries or a `datasets.Dataset`.

    The location of a row is its index after the name, such as `pairs[3]`.
    """

    records: Any  # a sequence of dictionaries, or a Dataset
    name: str = "pairs"

    @classmethod
    def from_iterable(cls, records: Iterable[Any], name: str = "pairs") -> "InMemoryRows":
        """Return the rows of a `datasets.Dataset` or of any other iterable of dictionaries.

        Raises:
            DataError: `records` is a mapping, such as a dataset with splits, or not iterable.
        """
        if isinstance(records, Mapping):
            raise DataError(
                f"{name}: expected a list of dictionaries or one split of a dataset, found keys "
                f"{', '.join(f'`{key}`' for key in list(records)[:3]) or 'none'}"
            )
        if not isinstance(records, Iterable) or isinstance(records, str | bytes):
            kind = type(records).__name__
            raise DataError(f"{name}: expected a list of dictionaries or a dataset, found {kind}")
        return cls(records if is_dataset(records) else list(records), name)

    def __len__(self) -> int:
        return len(self.records)

    def rows(self) -> Iterator[Row]:
        """Yield the rows in their order.

        Raises:
            DataError: a record is not a dictionary.
        """
        yield from to_rows(self._items())

    @cached_property
    def digest(self) -> str:
        """SHA-256 digest of the rows as hex; a column or a message's field that is null is absent.

        The digest of a list of dictionaries and that of a `Dataset` made from it are the same.

        Raises:
            DataError: a record cannot be written as JSON.
        """
        hashed = sha256()
        for location, record in self._items():
            try:
                line = json.dumps(_without_nulls(record, 2), sort_keys=True, default=repr)
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(f"{location}: cannot be written as JSON ({error})") from error
            hashed.update(line.encode() + b"\n")
        return hashed.hexdigest()

    def _items(self) -> Iterator[tuple[str, Any]]:
        if is_dataset(self.records):
            yield from _iterate_dataset(self.records, self.name)
            return
        for index, record in enumerate(self.records):
            item = dict(record) if isinstance(record, Mapping) else record
            yield f"{self.name}[{index}]", item


def is_dataset(records: Any) -> bool:
    """Return whether `records` is a `datasets.Dataset`; the library is not imported for it."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(records, library.Dataset)


def _without_nulls(value: Any, levels: int) -> Any:
    """Return the value without null fields of objects, down to `levels` objects in each other."""
    if not levels:
        return value
    if isinstance(value, Mapping):
        return {k: _without_nulls(v, levels - 1) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item, levels) for item in value]
    return value
