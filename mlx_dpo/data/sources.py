"""Data sources: files, folders with splits, Hub datasets, standard input and rows in memory."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_dpo.data.files import (
    DECOMPRESSORS,
    READERS,
    file_format,
    read_file,
    read_json,
    to_rows,
)
from mlx_dpo.data.hf_datasets import HubDataset, InMemoryRows, is_dataset, parse_hub_name
from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.schemas.schema import Row

STDIN = "-"
TRAIN = "train"
HELD_OUT_SPLITS = ("valid", "validation", "eval", "test")  # the first that exists is used
SHARD = re.compile(r"-(\d+)-of-(\d+)$")


@dataclass(frozen=True)
class Source:
    """One split of a file, a folder, a Hub dataset, standard input or rows in memory."""

    name: str  # for messages; row locations begin with it or with the name of a file
    files: tuple[Path, ...] = ()  # in order; none for other kinds of sources
    dataset: HubDataset | None = None
    split: str = TRAIN  # of the Hub dataset
    memory: InMemoryRows | None = None

    @property
    def file_names(self) -> list[str]:
        """Names with which the row locations begin, such as `file` in `file:12`."""
        return [str(path) for path in self.files] or [self.name]

    def rows(self) -> Iterator[Row]:
        """Yield the rows in their order; standard input can be read only once.

        Raises:
            DataError: a row cannot be read; the message has the location.
        """
        if self.dataset is not None:
            yield from self.dataset.rows(self.split)
        elif self.memory is not None:
            yield from self.memory.rows()
        elif self.name == STDIN:
            yield from to_rows(read_json(sys.stdin.buffer, STDIN))
        for path in self.files:
            yield from read_file(path)


@dataclass(frozen=True)
class SplitSources:
    """The data sources of the training pairs and of the held-out pairs."""

    train: tuple[Source, ...]
    valid: tuple[Source, ...] = ()
    unused_valid: tuple[Source, ...] = ()  # held-out splits that a given `valid` replaces


Input = str | InMemoryRows | Iterable[Mapping[str, Any]]  # a name, or rows in memory


def find_sources(
    pairs: Input | Sequence[Input], valid: Input | None = None, split: str | None = None
) -> SplitSources:
    """Return the data sources of the training pairs and of the held-out pairs.

    Each input is a file, a folder, a Hub dataset, `-` for standard input, or rows in memory.

    Args:
        pairs: one input or several.
        valid: held-out pairs. By default the first of the splits `valid`, `validation`, `eval`
            and `test` that a folder or a dataset has.
        split: split of folders and datasets for training. [default: train]

    Raises:
        DataError: an input does not exist or its type is not supported.
        ConfigError: standard input is given twice, or `split` has no effect.
    """
    inputs = to_inputs(pairs)
    if [item for item in (*inputs, valid) if isinstance(item, str)].count(STDIN) > 1:
        raise ConfigError("`-` is standard input, which can be read only once")
    if split is not None and not any(_has_splits(item) for item in inputs):
        raise ConfigError("`split` has no effect: files have no splits")
    given = (resolve_held_out_source(valid),) if valid is not None else ()
    train = tuple(resolve_source(item, split) for item in inputs)
    own = tuple(source for item in inputs if (source := _held_out_split(item, split)) is not None)
    if not given:
        return SplitSources(train, own)
    return SplitSources(train, given, tuple(source for source in own if source not in given))


def to_inputs(pairs: Input | Sequence[Input]) -> list[str | InMemoryRows]:
    """Return `pairs` as a list of inputs: names of data sources, or rows in memory.

    A list of dictionaries or a `datasets.Dataset` is one input. A list of names, lists of
    dictionaries and datasets is several inputs; rows in memory are named `pairs`, `pairs-2`, ….

    Raises:
        DataError: an element is neither a name nor rows.
    """
    if isinstance(pairs, str | InMemoryRows):
        return [pairs]
    if is_dataset(pairs) or isinstance(pairs, Mapping):
        return [InMemoryRows.from_iterable(pairs)]
    items: list[Any] = list(pairs)
    if items and all(isinstance(item, Mapping) for item in items):
        return [InMemoryRows.from_iterable(items)]
    inputs: list[str | InMemoryRows] = []
    for item in items:
        if isinstance(item, str | InMemoryRows):
            inputs.append(item)
        else:
            number = sum(isinstance(other, InMemoryRows) for other in inputs) + 1
            name = "pairs" if number == 1 else f"pairs-{number}"
            inputs.append(InMemoryRows.from_iterable(item, name))
    return inputs


def resolve_source(source: Input, split: str | None = None) -> Source:
    """Return the data source that an input names.

    For a folder or a Hub dataset, this is the split called `split`, by default `train`.

    Raises:
        DataError: the input does not exist or its type is not supported.
    """
    if not isinstance(source, str):
        rows = source if isinstance(source, InMemoryRows) else InMemoryRows.from_iterable(source)
        return Source(rows.name, memory=rows)
    path, split = Path(source), split or TRAIN
    if source == STDIN:
        if sys.stdin.isatty():
            raise DataError(
                "-: standard input is a terminal; pipe rows into it, one object per line"
            )
        return Source(STDIN)
    if path.is_dir():
        source_in_folder = _find_in_folder(path, (split,))
        if source_in_folder is None:
            raise DataError(
                f"{path}: no file of the split `{split}` (looked for `{split}.jsonl` and similar "
                "names, there and in `data`)"
            )
        return source_in_folder
    if not path.exists() and (dataset := parse_hub_name(source)) and not _is_file_name(path):
        return _find_in_dataset(dataset, (split,)) or _raise_no_split(dataset, split)
    return _file_source(path)


def resolve_held_out_source(source: Input) -> Source:
    """Return the data source of the held-out pairs in an input.

    This is the input's held-out split or, if it has none, the source that `resolve_source` returns.

    Raises:
        DataError: the input does not exist or its type is not supported.
    """
    return _held_out_split(source, None) or resolve_source(source)


def read_rows(path: Path) -> Iterator[Row]:
    """Return an iterator over the rows of one data file of any supported format."""
    return _file_source(path).rows()


def _held_out_split(source: Input, split: str | None) -> Source | None:
    if not isinstance(source, str):
        return None
    path = Path(source)
    # A dataset with `train_prefs` has `test_prefs`.
    names = tuple((split or TRAIN).replace(TRAIN, name) for name in HELD_OUT_SPLITS)
    names = tuple(name for name in names if name != split)
    if path.is_dir():
        return _find_in_folder(path, names)
    if _has_splits(source) and (dataset := parse_hub_name(source)):
        return _find_in_dataset(dataset, names)
    return None


def _has_splits(source: Input) -> bool:
    if not isinstance(source, str):
        return False
    path = Path(source)
    if path.exists() or source == STDIN:
        return path.is_dir()
    return parse_hub_name(source) is not None and not _is_file_name(path)


def _is_file_name(path: Path) -> bool:
    return path.suffix.lower() in (*READERS, *DECOMPRESSORS) or path.parts[:1] in (("..",), ("~",))


def _find_in_dataset(dataset: HubDataset, names: Sequence[str]) -> Source | None:
    splits = dataset.splits()
    split = next((name for name in names if name in splits), None)
    return Source(f"{dataset}:{split}", dataset=dataset, split=split) if split else None


def _raise_no_split(dataset: HubDataset, split: str) -> Source:
    names = ", ".join(f"`{name}`" for name in dataset.splits())
    raise DataError(f"{dataset}: no split `{split}` (found {names}); name one with --split")


def _file_source(path: Path) -> Source:
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give a file")
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder; a dataset on the Hub is written `org/name`"
        )
    file_format(path)
    return Source(str(path), (path,))


def _find_in_folder(folder: Path, names: Sequence[str]) -> Source | None:
    """Return the first split in `names` that the folder has; None if it has none of them.

    The split may be one file or several shards, in the folder itself or in its folder `data`.
    """
    for name in names:
        for parent in (folder, folder / "data"):  # the Hub has files in `data`
            files = _split_files(parent, name)
            if len(files) == 1:
                return Source(str(files[0]), (files[0],))
            if files:
                return Source(str(parent / name), tuple(files))
    return None


def _split_files(folder: Path, split: str) -> list[Path]:
    shards, single = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        stem = path.name.partition(".")[0]
        if not path.is_file() or not _is_supported(path):
            continue
        if stem == split:
            single.append(path)
        elif SHARD.sub("", stem) == split and SHARD.search(stem):
            shards.append(path)
    if len(single) > 1 or (single and shards):
        named = " and ".join(f"`{path.name}`" for path in [*single, *shards][:2])
        raise DataError(f"{folder}: holds both {named}; keep one of them")
    if shards:
        _check_all_shards(folder, split, shards)
    return single or shards


def _is_supported(path: Path) -> bool:
    """Return whether the file name ends like that of a data file, plain or compressed."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return bool(suffixes) and (
        suffixes[-1] in READERS or (suffixes[-1] in DECOMPRESSORS and suffixes[-2:-1] != [])
    )


def _check_all_shards(folder: Path, split: str, shards: Iterable[Path]) -> None:
    matches = [SHARD.search(path.name.partition(".")[0]) for path in shards]
    present = sorted((int(match[2]), int(match[1])) for match in matches if match)
    count = present[0][0]
    if present != [(count, number) for number in range(count)]:
        raise DataError(
            f"{folder}: {len(present)} of the {count} files of `{split}` are present; download "
            "the others"
        )
