"""Tokenized pairs, kept in the user's cache: made once of the same rows, tokenizer and rules.

What is found there is believed if its checksum holds; otherwise it is made again, and that is
said. Nothing is kept of standard input, and of files that are tokenized in no time.
"""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from mlx_dpo.data.dataset import (
    READ_BYTES,
    Arrays,
    MappedPairs,
    PairDataset,
    PairFileWriter,
    RowLocations,
    read_metadata,
    read_pair_file,
)
from mlx_dpo.data.files import file_format
from mlx_dpo.data.load import LoadedPairs, PairRules, check_any_pair, new_report
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.sources import Source
from mlx_dpo.data.tokenization.parallel import Advance, TokenizerWorkers, tokenize_chunks
from mlx_dpo.data.tokenization.special_tokens import stop_tokens
from mlx_dpo.data.tokenization.tokenize import check_token_rules
from mlx_dpo.errors import reason
from mlx_dpo.io.atomic import is_temporary, temporary_path

FORMAT_VERSION = (
    2  # to be raised when the same rows become other pairs, or other counts, than before
)
SUFFIX = ".pairs"
MIN_CACHED_BYTES = 1 << 20  # bytes of files that take about a second
LIBRARIES = ("transformers", "tokenizers", "mlx-lm", "jinja2")  # that make tokens of text
DATED = "strftime_now"  # a template that asks for the date

UNKNOWN = "unknown"
FROM_CACHE = "tokens read from the cache"
DAMAGED = "what the cache held of these tokens is damaged; they were made again"

RowProgress = Callable[[int | None], AbstractContextManager[Advance]]  # of so many rows, if known


@dataclass(frozen=True)
class TokenCache:
    """Where tokens are kept, and what only others know of them."""

    folder: Path
    tokenizer: str  # digest of the tokenizer's files
    model: str  # its name, for a person


def load_source(
    source: Source,
    hands: TokenizerWorkers,
    rules: PairRules,
    cache: TokenCache,
    *,
    counting: RowProgress,
) -> LoadedPairs[PairDataset]:
    """`load_pairs` for any number of pairs: they stay on the disk, and are tokenized but once.

    Raises:
        DataError, ConfigError, ModelError: as `load_pairs`.
    """
    check_token_rules(hands.tokenizer, rules.tokens)
    files = _files(source)
    before = _stamps(files)  # ahead of the digest, so that no change falls in between
    key = _key(source, files, hands.tokenizer, rules, cache) if files else None
    path = cache.folder / f"{key}{SUFFIX}" if key else None
    if path is not None and (kept := _read(path, key)) is not None:
        return _pair_set(*kept, source, FROM_CACHE)
    origin = DAMAGED if path is not None and path.is_file() else ""
    with _partial_file(path) as (stream, partial, why_not):
        _write(stream, source, hands, rules, counting, _labels(key, source, cache))
        made = read_pair_file(stream)
        if path is not None and partial is not None and _stamps(files) == before:
            os.replace(partial, path)  # what changed meanwhile is not what has this digest
    if made is None:
        raise OSError(errno.EIO, "what was just written reads otherwise", str(path or ""))
    return _pair_set(*made, source, why_not or origin)


def _pair_set(
    arrays: Arrays, facts: dict[str, Any], source: Source, origin: str
) -> LoadedPairs[PairDataset]:
    """Pairs and report with the names that the files have now."""
    places = _places(source)
    said = facts["report"]
    dropped = {why: [places.said(one) for one in at] for why, at in said["dropped"].items()}
    own = {"source": source.name, "origin": origin, "dropped": dropped}
    report = PairsReport.from_dict(said | own)
    return LoadedPairs(PairDataset([MappedPairs.of(arrays, places)]), report)


def _places(source: Source) -> RowLocations:
    return RowLocations([str(path) for path in source.files] or [source.name])


def _write(
    stream: IO[bytes],
    source: Source,
    hands: TokenizerWorkers,
    rules: PairRules,
    counting: RowProgress,
    labels: dict[str, Any],
) -> None:
    places, writer = _places(source), PairFileWriter(stream)
    report = new_report(source.name, rules.tokens, rules.rows)
    heard = partial(_counted, source, counting)
    for arrays in tokenize_chunks(source.rows(), hands, rules, report, places, heard):
        writer.add(arrays)
    check_any_pair(report)
    dropped = {why: [places.coded(one) for one in at] for why, at in report.dropped.items()}
    said = report.to_dict() | {"source": "", "dropped": dropped}
    writer.finish({**labels, "pairs": report.kept, "report": said})


def _counted(source: Source, counting: RowProgress) -> AbstractContextManager[Advance]:
    """Rows heard of as they are done; how many there are is quickly known of lines alone."""
    if not source.files or any(file_format(path) != (".jsonl", "") for path in source.files):
        return counting(None)
    lines = 0
    for path in source.files:
        with path.open("rb") as stream:
            while block := stream.read(READ_BYTES):
                lines += block.count(b"\n")
    return counting(lines)


def _files(source: Source) -> tuple[Path, ...]:
    """The files that hold the rows, if they are worth to be remembered."""
    files = source.files if source.dataset is None else source.dataset.files(source.split)
    return files if sum(path.stat().st_size for path in files) >= MIN_CACHED_BYTES else ()


def _key(
    source: Source, files: Sequence[Path], tokenizer: Any, rules: PairRules, cache: TokenCache
) -> str:
    """A digest of everything that the pairs are a function of."""
    kinds: list[Any] = [file_format(path) for path in source.files]
    dated = DATED in str(getattr(tokenizer, "chat_template", ""))
    content = {
        "rules": [FORMAT_VERSION, asdict(rules)],
        "files": [kinds, [_digest(path) for path in files]],
        "tokenizer": [cache.tokenizer, sorted(stop_tokens(tokenizer)), tokenizer.eos_token_id],
        "libraries": [version(name) for name in LIBRARIES],
        "today": f"{datetime.now():%Y-%m-%d}" if dated else None,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stamps(files: Sequence[Path]) -> list[tuple[int, int, int]]:
    facts = [path.stat() for path in files]
    return [(one.st_ino, one.st_size, one.st_mtime_ns) for one in facts]


def _labels(key: str | None, source: Source, cache: TokenCache) -> dict[str, Any]:
    """What a new file says of itself. A file is named without the way to it."""
    name = source.name if source.dataset else "/".join(Path(source.name).parts[-2:])
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"key": key, "name": name, "model": cache.model, "written": now}


def _read(path: Path, key: str | None) -> tuple[Arrays, dict[str, Any]] | None:
    """What is kept there; None if it is nothing, damaged, or something else under this name."""
    try:
        with path.open("rb") as stream:
            found = read_pair_file(stream)
    except OSError:
        return None
    with suppress(OSError):  # a cache that can only be read serves as well
        os.utime(path)
    return found if found is not None and found[1].get("key") == key else None


@contextmanager
def _partial_file(path: Path | None) -> Iterator[tuple[IO[bytes], Path | None, str]]:
    """A file to write, where it is, and why it is not where it should be."""
    why_not = ""
    if path is not None:
        with temporary_path(path) as temporary:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                stream = temporary.open("w+b")
            except OSError as error:
                why_not = f"tokens are not kept: {path.parent}: {reason(error)}"
            else:
                with stream:
                    yield stream, temporary, ""
                return
    with tempfile.TemporaryFile() as stream:
        yield stream, None, why_not


@dataclass(frozen=True)
class Entry:
    """A file of the cache."""

    path: Path
    name: str  # of the source
    model: str
    pairs: int
    size: int  # bytes
    written: str | None
    last_used: datetime
    damaged: bool  # its end is no end of such a file; the rest is looked at when it is read


def entries(folder: Path) -> list[Entry]:
    """Every file of the cache, in the order of their names."""
    found = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        with suppress(FileNotFoundError):  # somebody else clears
            found += [] if is_temporary(path) else [_entry(path)]
    return found


def _entry(path: Path) -> Entry:
    with path.open("rb") as stream:
        facts = read_metadata(stream)
    found, said = path.stat(), facts or {}
    return Entry(
        path=path,
        name=said.get("name", UNKNOWN),
        model=said.get("model", UNKNOWN),
        pairs=said.get("pairs", 0),
        size=found.st_size,
        written=said.get("written"),
        last_used=datetime.fromtimestamp(found.st_mtime, UTC),
        damaged=facts is None,
    )
