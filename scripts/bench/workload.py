"""The workload of all trainers: one checkpoint and one file of pairs, created once."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from mlx_dpo.errors import DataError
from mlx_dpo.profiling.bench.shapes import SHAPES
from scripts.bench import texts
from scripts.bench.shapes import write_checkpoint

MEMORY_LENGTHS = (1024, 256, 256)  # prompt, chosen, rejected


@dataclass(frozen=True)
class Workload:
    """A model folder and a file of pairs."""

    model: Path
    pairs: Path
    count: int
    faulty: int = 0  # rows of the source that are not usable


def make_workload(
    source: Path, *, shape: str, kind: str, count: int, cache: Path, folder: Path
) -> Workload:
    """Return the first `count` pairs of `source`, or long ones made of its words, and a model.

    The model's tokenizer is trained on `source`; both are stored in `cache`. The pairs are
    written into `folder`.

    Raises:
        DataError: `source` cannot be read, or has fewer pairs.
    """
    pairs, faulty = texts.read_pairs(source)
    model = _model(source, pairs, shape, cache)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    selected = _select_pairs(pairs, tokenizer, kind, count)
    if len(selected) < count:
        raise DataError(
            f"{source}: has {len(selected)} usable pairs; give --pairs-count at most that"
        )
    path = folder / "pairs.jsonl"
    texts.write_pairs(path, selected)
    return Workload(model, path, count, faulty)


def _select_pairs(
    pairs: Sequence[texts.TextPair], tokenizer: Tokenizer, kind: str, count: int
) -> Sequence[texts.TextPair]:
    """Return the first `count` pairs, or `count` pairs of another kind made of their words."""
    if kind == "short":
        return pairs[:count]
    if kind == "memory":
        words = texts.single_words(pairs, tokenizer)
        return [texts.synthesize_pair(words, *MEMORY_LENGTHS) for _ in range(count)]
    return texts.SYNTHETIC_KINDS[kind](pairs, tokenizer, count)


def sample_pairs(work: Workload, count: int) -> Workload:
    """Return `count` pairs, evenly spaced in the file, so that lengths are representative."""
    lines = work.pairs.read_text().splitlines(keepends=True)
    path = work.pairs.with_name(f"sample-{count}.jsonl")
    path.write_text("".join(lines[at * len(lines) // count] for at in range(count)))
    return Workload(work.model, path, count)


def _model(source: Path, pairs: Sequence[texts.TextPair], shape: str, cache: Path) -> Path:
    """Return the folder of the model, which is created if it is not cached."""
    name = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    folder = cache / "models" / f"{shape}-{name}"
    if not folder.is_dir():
        written = cache / "models" / f"tokenizer-{shape}-{name}"
        tokenizer = texts.train_tokenizer(pairs, SHAPES[shape].vocab_size)
        texts.write_tokenizer(written, tokenizer)
        write_checkpoint(folder, SHAPES[shape], written)
        shutil.rmtree(written)
    return folder
