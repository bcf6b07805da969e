"""Cache of tokenized pairs in the user's cache folder.

A cache file is named by a digest of the data files, the tokenizer and all settings that matter. A
cache file with a wrong checksum is replaced. Standard input, rows in memory and small files are
not cached.
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
from functools import lru_cache, partial
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from mlx_dpo.data.chat_templates.template_date import get_day, is_dated, today
from mlx_dpo.data.dataset import MappedPairs, PairDataset
from mlx_dpo.data.files import RowLocations, file_format
from mlx_dpo.data.report import FROM_CACHE, PairsReport
from mlx_dpo.data.sources import Source
from mlx_dpo.data.tokenization.pair_file import (
    READ_BYTES,
    Arrays,
    PairFileWriter,
    read_metadata,
    read_pair_file,
)
from mlx_dpo.data.tokenization.parallel import Advance, TokenizerWorkers, tokenize_chunks
from mlx_dpo.data.tokenization.special_tokens import stop_tokens
from mlx_dpo.data.tokenization.tokenize import check_token_rules
from mlx_dpo.data.tokenization.tokenize_rows import (
    LoadedPairs,
    PairRules,
    check_any_pair,
    new_report,
)
from mlx_dpo.errors import DataError, reason
from mlx_dpo.io.atomic import temporary_path
from mlx_dpo.io.cache_listing import UNKNOWN, CacheEntry, list_cache

# Packages whose code decides which pairs and counts the rows become, and how they are stored.
CODE = ("mlx_dpo.schemas", "mlx_dpo.data")
SUFFIX = ".pairs"
MIN_CACHED_BYTES = 1 << 20  # size of files that take about a second to tokenize
LIBRARIES = ("transformers", "tokenizers", "mlx-lm", "jinja2")  # their versions change tokens

DAMAGED = "the cached tokens were damaged and have been computed again"

# Shows a progress bar for a number of rows, if it is known.
RowProgress = Callable[[int | None], AbstractContextManager[Advance]]


@dataclass(frozen=True)
class TokenCache:
    """Folder of the token cache, digest of the tokenizer's files, and name of the model."""

    folder: Path
    tokenizer_digest: str  # of the tokenizer's files
    model: str  # its name, for `mlx-dpo cache`


@contextmanager
def no_progress(rows: int | None = None) -> Iterator[Advance]:
    """Stand in for a progress bar: yield a function that ignores the reported progress."""
    yield lambda rows: None


def load_source(
    source: Source,
    workers: TokenizerWorkers,
    rules: PairRules,
    cache: TokenCache | None = None,
    *,
    progress: RowProgress = no_progress,
) -> LoadedPairs[PairDataset]:
    """Tokenize the rows of a source, or read the tokens from the cache. The pairs stay on disk.

    Raises:
        DataError: a row cannot be read as a pair, a bad pair is an error, or no pair is left.
        ConfigError: a setting has no effect with this tokenizer.
        ModelError: the tokenizer has no stop token.
    """
    check_token_rules(workers.tokenizer, rules.tokens)
    files = _files_to_cache(source) if cache is not None else ()
    before = _stamps(files)  # read before the digest, so that no change is missed
    path, key = None, ""
    if cache is not None and files:
        key = _key(source, files, workers.tokenizer, rules, cache)
        path = cache.folder / f"{key}{SUFFIX}"
        if (cached := _read(path, key)) is not None:
            return _loaded_pairs(*cached, source, FROM_CACHE)
    origin = DAMAGED if path is not None and os.path.lexists(path) else ""
    content: tuple[Arrays, dict[str, Any]] | None = None
    labels = _labels(key, source, cache)
    write = partial(_write, source=source, workers=workers, rules=rules, progress=progress)
    if path is not None:
        try:
            with temporary_path(path) as temporary:
                path.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("w+b") as stream:
                    content = write(stream, labels)
                # If the files changed in between, the digest does not belong to these pairs.
                if _stamps(files) == before:
                    os.replace(temporary, path)
        except OSError as error:  # full, read-only, or a file is in its place
            origin = f"tokens are not cached: {path.parent}: {reason(error)}"
    if content is None:
        with _open_unnamed_file(source) as stream:
            content = write(stream, labels)
    return _loaded_pairs(*content, source, origin)


def _loaded_pairs(
    arrays: Arrays, metadata: dict[str, Any], source: Source, origin: str
) -> LoadedPairs[PairDataset]:
    """Return pairs and report from the content of a pair file.

    Locations get the file names that the source has now; the cache file stores no names.
    """
    locations, report = RowLocations(source.file_names), metadata["report"]
    report |= {
        "source": source.name,
        "origin": origin,
        "dropped": {
            reason: [locations.decode(codes) for codes in rows]
            for reason, rows in report["dropped"].items()
        },
    }
    pairs = PairDataset([MappedPairs.from_arrays(arrays, locations)])
    return LoadedPairs(pairs, PairsReport.from_dict(report))


def _write(
    stream: IO[bytes],
    labels: dict[str, Any],
    source: Source,
    workers: TokenizerWorkers,
    rules: PairRules,
    progress: RowProgress,
) -> tuple[Arrays, dict[str, Any]]:
    """Tokenize the rows of a source into a pair file, and return its content.

    Raises:
        OSError: the file cannot be written, or its content changed while it was written.
    """
    locations, writer = RowLocations(source.file_names), PairFileWriter(stream)
    report = new_report(source.name, rules.tokens, rules.rows)
    show = partial(_show_progress, source, progress)
    for arrays in tokenize_chunks(source.rows(), workers, rules, report, locations, show):
        writer.add(arrays)
    check_any_pair(report)
    # Without file names: a copy of the file under another name has the same key.
    dropped = {
        reason: [locations.encode(location) for location in rows]
        for reason, rows in report.dropped.items()
    }
    values = report.to_dict() | {"source": "", "dropped": dropped}
    writer.finish({**labels, "pairs": report.used, "report": values})
    if (content := read_pair_file(stream)) is None:
        raise OSError(errno.EIO, "tokens changed while they were written")
    return content


def _show_progress(source: Source, progress: RowProgress) -> AbstractContextManager[Advance]:
    """Show a progress bar; the total is known only for uncompressed JSON Lines files."""
    if not source.files or any(file_format(path) != (".jsonl", "") for path in source.files):
        return progress(None)
    lines = 0
    for path in source.files:
        with path.open("rb") as stream:
            while block := stream.read(READ_BYTES):
                lines += block.count(b"\n")
    return progress(lines)


def _files_to_cache(source: Source) -> tuple[Path, ...]:
    """Return the files of a source that is large enough to be cached; otherwise no files."""
    files = source.files if source.dataset is None else source.dataset.files(source.split)
    return files if sum(path.stat().st_size for path in files) >= MIN_CACHED_BYTES else ()


def _key(
    source: Source, files: Sequence[Path], tokenizer: Any, rules: PairRules, cache: TokenCache
) -> str:
    """Return the cache key: a SHA-256 digest of everything that the tokenized pairs depend on."""
    formats: list[Any] = [file_format(path) for path in source.files]
    content = {
        "rules": asdict(rules),
        "code": _code_digest(),
        "files": [formats, [_digest(path) for path in files]],
        "tokenizer": [
            cache.tokenizer_digest,
            sorted(stop_tokens(tokenizer)),
            tokenizer.eos_token_id,
        ],
        "libraries": [version(name) for name in LIBRARIES],
        "day": str(get_day(tokenizer) or today()) if is_dated(tokenizer) else None,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@lru_cache
def _code_digest() -> str:
    """Return a SHA-256 digest of the code in the packages `CODE`."""
    digest = hashlib.sha256()
    for package in CODE:
        root = Path(str(resources.files(package)))
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stamps(files: Sequence[Path]) -> list[tuple[int, int, int]]:
    statuses = [path.stat() for path in files]
    return [(status.st_ino, status.st_size, status.st_mtime_ns) for status in statuses]


def _labels(key: str, source: Source, cache: TokenCache | None) -> dict[str, Any]:
    """Return the labels of a new cache file: key, source name, model name and time.

    The source's path is shortened to its last two parts.
    """
    name = source.name if source.dataset else "/".join(Path(source.name).parts[-2:])
    now = datetime.now(UTC).isoformat(timespec="seconds")
    model = cache.model if cache is not None else UNKNOWN
    return {"key": key, "name": name, "model": model, "written": now}


def _read(path: Path, key: str) -> tuple[Arrays, dict[str, Any]] | None:
    """Return arrays and metadata of a cached file; None if it is missing, damaged or renamed."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as stream:
            content = read_pair_file(stream)
    except OSError:
        return None
    with suppress(OSError):  # a cache that is read-only still serves
        os.utime(path)
    return content if content is not None and content[1].get("key") == key else None


@contextmanager
def _open_unnamed_file(source: Source) -> Iterator[IO[bytes]]:
    """Open a temporary file without a name, for tokens that are not cached.

    Raises:
        DataError: the disk of temporary files is full or cannot be written.
    """
    try:
        with tempfile.TemporaryFile() as stream:
            yield stream
    except OSError as error:
        if error.filename is not None:  # a file of the source
            raise
        raise DataError(
            f"{source.name}: its tokens cannot be written to a temporary file ({reason(error)}); "
            "free space on that disk, or set TMPDIR to a folder on another"
        ) from error


@dataclass(frozen=True, kw_only=True)
class TokenCacheEntry(CacheEntry):
    """A token cache file in the listing of `mlx-dpo cache`.

    `damaged` says that its checksum is wrong, or that another version wrote the file.
    """

    name: str = UNKNOWN  # of the source


def list_entries(folder: Path) -> list[TokenCacheEntry]:
    """Return the token cache files in the folder, sorted by name."""
    return list_cache(folder, SUFFIX, TokenCacheEntry, _read_labels)


def _read_labels(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as stream:
            return read_metadata(stream)
    except OSError:
        return None
