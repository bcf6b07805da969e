"""Where pairs come from: files, folders with splits, datasets on the Hub, standard input."""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_dpo.data.files import (
    DECOMPRESSORS,
    READERS,
    file_format,
    read_file,
    read_json_lines,
    to_rows,
)
from mlx_dpo.errors import ConfigError, DataError, reason
from mlx_dpo.schemas.schema import Row

BATCH = 1000  # rows that are held as Python objects at once
HUB_NAME = re.compile(
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

        names = _call_hub(
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

        return _call_hub(
            self, datasets.load_dataset, self.path, self.config, split=split,
            revision=self.revision,
        )  # fmt: skip


def parse_hub_name(name: str) -> HubDataset | None:
    """The dataset that a name stands for; None if no dataset is written like that."""
    found = HUB_NAME.fullmatch(name)
    return HubDataset(**found.groupdict()) if found else None


def _call_hub(dataset: HubDataset, ask: Any, *args: Any, **more: Any) -> Any:
    from datasets.exceptions import DatasetsError

    try:
        return ask(*args, **more)
    except (OSError, ValueError, LookupError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"{dataset}: neither a file or folder here nor a dataset that the Hub gives "
            f"({reason(error)}); mend the name, or look at the connection"
        ) from error


STDIN = "-"
TRAIN = "train"
HELD_OUT_SPLITS = ("valid", "validation", "eval", "test")  # the first that there is is taken
SHARD = re.compile(r"-(\d+)-of-(\d+)$")


@dataclass(frozen=True)
class Source:
    """One split of one place."""

    name: str  # for a person; places of rows begin with it or with a file of it
    files: tuple[Path, ...] = ()  # in order, none for the others
    dataset: HubDataset | None = None
    split: str = TRAIN  # of the dataset

    def rows(self) -> Iterator[Row]:
        """Its rows, in order; those of standard input can be read but once.

        Raises:
            DataError: names the place, and what is wrong there.
        """
        if self.dataset is not None:
            yield from self.dataset.rows(self.split)
        for path in self.files:
            yield from read_file(path)
        if self.name == STDIN:
            yield from to_rows(read_json_lines(sys.stdin.buffer, STDIN))


@dataclass(frozen=True)
class SplitSources:
    """The sources of training pairs and of held-out ones."""

    train: tuple[Source, ...]
    valid: tuple[Source, ...] = ()
    unused_valid: tuple[Source, ...] = ()  # held-out splits beside others that were asked for


def find_sources(
    pairs: str | Sequence[str], valid: str | None = None, split: str | None = None
) -> SplitSources:
    """The sources that `pairs` and `valid` stand for: each a file, a folder, a dataset or `-`.

    Of a folder or a dataset `split` is trained on (`train` if not said), and the first of
    `valid`, `validation`, `eval` and `test` is held out. A `valid` that is asked for goes before.

    Raises:
        DataError: nothing is there, or not of a kind that is read.
        ConfigError: standard input is asked for twice, or `split` has no effect.
    """
    names = [pairs] if isinstance(pairs, str) else list(pairs)
    if [*names, valid].count(STDIN) > 1:
        raise ConfigError("`-` stands for standard input, which can be read but once")
    if split is not None and not any(_has_splits(name) for name in names):
        raise ConfigError("`split` has no effect on files; they have none")
    typed = (resolve_held_out_source(valid),) if valid is not None else ()
    train = tuple(resolve_source(name, split) for name in names)
    own = tuple(found for name in names if (found := _own_held_out(name, split)) is not None)
    if not typed:
        return SplitSources(train, own)
    return SplitSources(train, typed, unused_valid=tuple(one for one in own if one not in typed))


def resolve_source(name: str, split: str | None = None) -> Source:
    """What is trained on of a place.

    Raises:
        DataError: nothing is there, or not of a kind that is read.
    """
    place = Path(name)
    if name == STDIN:
        if sys.stdin.isatty():
            raise DataError("-: standard input is a terminal; pipe rows into it, one object a line")
        return Source(STDIN)
    if place.is_dir():
        found = _in_folder(place, (split or TRAIN,))
        if found is None:
            wanted = split or TRAIN
            raise DataError(
                f"{place}: no file of the split `{wanted}` (looked for `{wanted}.jsonl` and the "
                "like, in it and in `data`)"
            )
        return found
    if not place.exists() and (dataset := parse_hub_name(name)) and not _named_like_a_file(place):
        return _of_dataset(dataset, (split or TRAIN,)) or _no_split(dataset, split or TRAIN)
    return _file(place)


def resolve_held_out_source(name: str) -> Source:
    """What is measured on of a place: a folder's or a dataset's held-out split, else all of it.

    Raises:
        DataError: nothing is there, or not of a kind that is read.
    """
    return _own_held_out(name, None) or resolve_source(name)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one file; see `files.read_file`."""
    return _file(path).rows()


def _own_held_out(name: str, split: str | None) -> Source | None:
    place = Path(name)
    # `train_prefs` has `test_prefs` beside it.
    names = tuple((split or TRAIN).replace(TRAIN, held) for held in HELD_OUT_SPLITS)
    names = tuple(held for held in names if held != split)
    if place.is_dir():
        return _in_folder(place, names)
    if _has_splits(name) and (dataset := parse_hub_name(name)):
        return _of_dataset(dataset, names)
    return None


def _has_splits(name: str) -> bool:
    place = Path(name)
    if place.exists() or name == STDIN:
        return place.is_dir()
    return parse_hub_name(name) is not None and not _named_like_a_file(place)


def _named_like_a_file(place: Path) -> bool:
    return place.suffix.lower() in (*READERS, *DECOMPRESSORS) or place.parts[:1] in (
        ("..",),
        ("~",),
    )


def _of_dataset(dataset: HubDataset, names: Sequence[str]) -> Source | None:
    there = dataset.splits()
    split = next((name for name in names if name in there), None)
    return Source(f"{dataset}:{split}", dataset=dataset, split=split) if split else None


def _no_split(dataset: HubDataset, split: str) -> Source:
    found = ", ".join(f"`{name}`" for name in dataset.splits())
    raise DataError(f"{dataset}: no split `{split}` (found {found}); name one with --split")


def _file(path: Path) -> Source:
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give a file")
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder; a dataset on the Hub is written `org/name`"
        )
    file_format(path)
    return Source(str(path), (path,))


def _in_folder(folder: Path, names: Sequence[str]) -> Source | None:
    """The first of the splits that the folder has, in one file or in numbered ones."""
    for name in names:
        for place in (folder, folder / "data"):  # where the Hub has them
            files = _files_of(place, name)
            if len(files) == 1:
                return Source(str(files[0]), (files[0],))
            if files:
                return Source(str(place / name), tuple(files))
    return None


def _files_of(folder: Path, split: str) -> list[Path]:
    shards, single = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        stem = path.name.partition(".")[0]
        if not path.is_file() or not _is_read(path):
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


def _is_read(path: Path) -> bool:
    """Whether it is a file of rows; a README beside them is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return bool(suffixes) and (
        suffixes[-1] in READERS or (suffixes[-1] in DECOMPRESSORS and suffixes[-2:-1] != [])
    )


def _check_all_shards(folder: Path, split: str, shards: Iterable[Path]) -> None:
    numbers = [SHARD.search(path.name.partition(".")[0]) for path in shards]
    have = sorted((int(found[2]), int(found[1])) for found in numbers if found)
    count = have[0][0]
    if have != [(count, number) for number in range(count)]:
        raise DataError(
            f"{folder}: {len(have)} of the {count} files of `{split}` are there; fetch the others"
        )
