"""Check the files of a model folder before loading, and compute fingerprints of their content."""

import hashlib
import json
import pkgutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from glob import escape
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx

from mlx_dpo.errors import ModelError
from mlx_dpo.io.bounded import MAX_FILE_BYTES, parse_json, read_bytes
from mlx_dpo.io.checksums import check_json

CONFIG = "config.json"
WEIGHT_PATTERN = "model*.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
MAX_TOKEN_ID = 2**31 - 1  # tokenizers read ids as 32-bit integers
SETTINGS_FILES = (
    CONFIG,
    GENERATION_CONFIG,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
REMOTE_CODE_REFUSED = (
    "Python code of a model is not run without permission; read it, then allow it with "
    "`trust_remote_code`"
)
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# `hf_quant_config.json` holds ModelOpt's settings, `*.py` a model's own architecture.
MODEL_FILES = (CONFIG, WEIGHT_PATTERN, "hf_quant_config.json", "*.py")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
)

# Completes "FOLDER: …" where a run is expected.
MODEL_FOLDER = (
    "a model, not a run folder; train it with `mlx-dpo train --model`, or use it as it is, such as "
    "with `mlx-dpo chat --model`"
)


@contextmanager
def glob_safe(folder: Path) -> Iterator[Path]:
    """Yield a path of the folder without characters that mean something in a glob pattern.

    mlx-lm looks for weights by a pattern that begins with the folder's path, and finds nothing in
    `model [v2]`. The path is then a link in a temporary folder, which is removed at the end.
    """
    if escape(str(folder)) == str(folder):
        yield folder
        return
    with TemporaryDirectory(prefix="mlx-dpo-") as temporary:
        link = Path(temporary) / "model"
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield link


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that mlx-lm reads, sorted by name."""
    return sorted(folder.glob(WEIGHT_PATTERN))


def weight_bytes(folder: Path) -> int:
    """Return the size of the weight files in bytes."""
    return sum(file.stat().st_size for file in weight_files(folder))


def model_fingerprint(base_path: Path) -> str:
    """Return the SHA-256 (hex) of a model's weight, configuration and code files.

    File names are hashed as well as content.
    """
    return _digest(base_path, MODEL_FILES)


def tokenizer_fingerprint(path: Path) -> str:
    """Return the SHA-256 (hex) of a tokenizer's files and chat templates.

    File names are hashed as well as content.
    """
    return _digest(path, TOKENIZER_FILES)


def code_fingerprint(path: Path) -> str:
    """Return the SHA-256 (hex) of the Python files in a model's folder.

    File names are hashed as well as content.
    """
    return _digest(path, ("*.py",))


def _digest(folder: Path, patterns: Iterable[str]) -> str:
    files = {file for pattern in patterns for file in folder.glob(pattern)}
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(json.dumps([file.relative_to(folder).as_posix(), content]).encode())
    return digest.hexdigest()


def check_model_folder(folder: Path, source: str, *, trust_remote_code: bool) -> dict[str, Any]:
    """Check that the folder contains a readable model, and return its `config.json`.

    Raises:
        ModelError: the folder holds adapters, pickles or nothing; a file is missing or broken; the
            model type is unknown to mlx-lm, or is Python code and `trust_remote_code` is not set.
    """
    config = check_config(folder, source, trust_remote_code=trust_remote_code)
    _check_weights(folder, source)
    check_tokenizer(folder, source)
    return config


def check_config(folder: Path, source: str, *, trust_remote_code: bool) -> dict[str, Any]:
    """Check that mlx-lm can build the model of a `config.json`, and return the file's content.

    Raises:
        ModelError: the file is missing or broken; the model type is unknown to mlx-lm, or is Python
            code and `trust_remote_code` is not set.
    """
    config = _read_config(folder, source)
    _check_settings_files(folder, source)
    _check_code(config, source, trust_remote_code)
    return config


def check_tokenizer(folder: Path, source: str) -> None:
    """Raise `ModelError` if the folder contains no tokenizer."""
    if not any(any(folder.glob(name)) for name in TOKENIZER_FILES):
        raise ModelError(
            f"{source}: no tokenizer (`tokenizer.json` is missing); copy the tokenizer's files "
            "of the original model into the folder"
        )


def _read_config(folder: Path, source: str) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(_adapters_not_model(folder, source))
        raise ModelError(
            f"{source}: not a model folder (no `{CONFIG}`); name the folder that contains it"
        )
    config = read_json(folder / CONFIG, f"{source}/{CONFIG}")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(
            f"{source}/{CONFIG}: missing `model_type`; mlx-lm cannot know the architecture"
        )
    return config


def _adapters_not_model(folder: Path, source: str) -> str:
    entries = read_json(folder / "adapter_config.json", f"{source}/adapter_config.json")
    base = entries.get("base_model_name_or_path") or entries.get("model")
    named = f" (`{base}`)" if isinstance(base, str) else ""
    return (
        f"{source}: adapters, not a model; name the model they were trained on{named}, "
        "or, if this is a run folder, give it without --model"
    )


def read_json(file: Path, where: str) -> dict[str, Any]:
    """Return the content of a JSON file, which has to be an object.

    If mlx-dpo wrote the file, its checksum is verified.

    Args:
        where: Name of the file for error messages.

    Raises:
        ModelError: the file is not JSON, or does not contain an object.
        DamagedFileError: the content does not match its checksum.
    """
    entries = parse_json(read_bytes(file, ModelError), where, ModelError, limit=MAX_FILE_BYTES)
    if not isinstance(entries, dict):
        raise ModelError(f"{where}: not a JSON object (found {type(entries).__name__})")
    return check_json(entries, where)


def _check_settings_files(folder: Path, source: str) -> None:
    """Check the types in the JSON files that mlx-lm and transformers read without checking them.

    Raises:
        ModelError: a file is not a JSON object, or names no token ids as the end tokens.
    """
    for name in SETTINGS_FILES:
        if not (folder / name).is_file():
            continue
        where = f"{source}/{name}"
        entries = read_json(folder / name, where)
        if name in (CONFIG, GENERATION_CONFIG):
            _check_end_tokens(entries.get("eos_token_id"), where)
        for key in ("quantization", "quantization_config", "text_config"):
            if not isinstance(entries.get(key) or {}, dict):
                found = type(entries[key]).__name__
                raise ModelError(
                    f"{where}: `{key}` must be a JSON object (found {found}); "
                    "download the file again"
                )


def _check_end_tokens(value: Any, where: str) -> None:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and 0 <= token <= MAX_TOKEN_ID for token in ids):
        shown = json.dumps(value)[:60]
        raise ModelError(
            f"{where}: `eos_token_id` is not a token id (found {shown}); write the number of the "
            "end "
            "token, or a list of numbers"
        )


def _check_code(config: dict[str, Any], source: str, trust_remote_code: bool) -> None:
    if (code := config.get("model_file")) is not None:
        if not trust_remote_code:
            raise ModelError(f"{source}: `{code}`: {REMOTE_CODE_REFUSED}")
        return
    known = known_model_types()
    if (kind := config["model_type"]) not in known:
        near = get_close_matches(kind, sorted(known), n=3)
        hint = f"similar names: {', '.join(f'`{name}`' for name in near)}; " if near else ""
        raise ModelError(
            f"{source}/{CONFIG}: mlx-lm {version('mlx-lm')} does not support the "
            f"model type `{kind}`; {hint}if the model is newer than this mlx-lm, update mlx-lm"
        )


def known_model_types() -> set[str]:
    """Return every `model_type` that mlx-lm can build."""
    from mlx_lm import models, utils

    return {module.name for module in pkgutil.iter_modules(models.__path__)} | set(
        utils.MODEL_REMAPPING
    )


def _check_weights(folder: Path, source: str) -> None:
    if weight_files(folder):
        _check_shards(folder, source)
        return
    files = [file.name for file in folder.iterdir()]
    if pickles := [file.name for pattern in PICKLE_PATTERNS for file in folder.glob(pattern)]:
        raise ModelError(
            f"{source}: weights are pickled (`{min(pickles)}`), and pickles can run code, so they "
            "are never loaded; take the model's safetensors, or save it as such with transformers"
        )
    if gguf := [name for name in files if name.endswith(".gguf")]:
        raise ModelError(
            f"{source}: weights are GGUF (`{min(gguf)}`), which cannot be trained; "
            "take the model's safetensors"
        )
    other = sorted(name for name in files if name.endswith(".safetensors"))
    hint = f" (found `{other[0]}`)" if other else ""
    raise ModelError(f"{source}: no weights: no file matches `{WEIGHT_PATTERN}`{hint}")


def _check_shards(folder: Path, source: str) -> None:
    """Raise `ModelError` if weight files that the index names are missing.

    mlx-lm does not read the index. Quantized models are published with the index of their source
    next to their own weights: then no file that the index names is there. If some are there, the
    download was interrupted, unless the other files contain all tensors.
    """
    try:
        index = read_json(folder / INDEX, INDEX).get("weight_map")
    except ModelError:  # there is none, or it is damaged: loading compares the tensors themselves
        return
    files = (
        {k: v for k, v in index.items() if isinstance(v, str)} if isinstance(index, dict) else {}
    )
    shards = set(files.values())
    missing = {name for name in shards if not (folder / name).is_file()}
    if not missing or missing == shards:
        return
    wanted = {tensor for tensor, name in files.items() if name in missing}
    if wanted - _tensor_names(folder):
        raise ModelError(
            f"{source}: {len(missing)} of {len(shards)} weight files are missing "
            f"(`{min(missing)}`); download the model again"
        )


def _tensor_names(folder: Path) -> set[str]:
    """Return the names of all tensors in the weight files; damaged files are left out."""
    names: set[str] = set()
    for file in weight_files(folder):
        with suppress(RuntimeError, ValueError, OSError):
            tensors = mx.load(str(file))  # lazy: only the header is read
            names |= tensors.keys() if isinstance(tensors, dict) else set()
    return names
