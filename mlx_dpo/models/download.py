"""Find the local folder of a model, and download the model from the Hub if necessary."""

import os
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.io.hub_token import check_hub_token
from mlx_dpo.models.license import CARD, LICENSE_PATTERNS
from mlx_dpo.phases import paused, phase

# Files that mlx-lm and the tokenizers read, and license texts. Pickles, which can run code, are
# never downloaded.
WEIGHT_PATTERN = "model*.safetensors"
CONFIG_PATTERNS = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", CARD, *LICENSE_PATTERNS)
CODE_PATTERN = "*.py"


def resolve_model(
    source: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
    is_local: bool = False,
) -> Path:
    """Return the local folder of a model, downloading the model from the Hub if necessary.

    `source` is a folder or a Hub id; an existing folder takes precedence over a Hub id of the same
    name. Without `weights`, the weight files are not downloaded. With `is_local`, nothing is
    downloaded: the model must be in the Hub's cache.

    Raises:
        ModelError: there is no such folder, or the model cannot be downloaded from the Hub.
        ConfigError: `revision` is given for a folder, where it has no effect.
    """
    folder = _local_path(source)
    if source and os.path.isdir(folder):
        if revision is not None:
            raise ConfigError(f"`revision` has no effect: `{source}` is a folder, not a Hub id")
        return folder.resolve()
    if os.path.isfile(folder):
        raise ModelError(f"{source}: a file, not a model folder; name the folder that contains it")
    if not source or source[0] in "./~" or source.count("/") > 1:
        raise ModelError(
            f"{source or '(nothing)'}: no such folder; a model is a folder or a Hub id "
            "(`organisation/name`)"
        )
    patterns = [
        *CONFIG_PATTERNS,
        *([WEIGHT_PATTERN] if weights else []),
        *([CODE_PATTERN] if trust_remote_code else []),
    ]
    if is_local:
        return _find_in_cache(source, revision)
    return _download(source, revision, patterns)


def _find_in_cache(source: str, revision: str | None) -> Path:
    """Return the folder of a model in the Hub's cache, without asking the Hub."""
    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelError(
            f"{source}: no such folder, and not in the Hub's cache; nothing is downloaded here, so "
            f"download it first (`hf download {source}`)"
        ) from error


def is_hub_id(source: str) -> bool:
    """Return whether `source` is a Hub id, that is, not the name of a local file or folder."""
    return not os.path.exists(_local_path(source))


def _local_path(source: str) -> Path:
    return Path(os.path.expanduser(source))


def _download(source: str, revision: str | None, patterns: list[str]) -> Path:
    """Download the files that the Hub's local cache lacks, and return the model's folder."""
    check_hub_token()
    try:
        with phase(f"Looking for {source} on the Hub"), paused():  # it shows progress bars itself
            return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HFValidationError, HTTPError, OSError) as error:
        raise ModelError(f"{source}: {_download_message(error, source, revision)}") from error


def _download_message(error: Exception, source: str, revision: str | None) -> str:
    """Return one line that explains a download error and what the user can do about it.

    Error types are tested from specific to general.
    """
    login = "log in with `hf auth login`"
    if isinstance(error, HFValidationError):
        return "no such folder, and not a Hub id (`org/name`)"
    if isinstance(error, GatedRepoError):
        return f"the model is gated; accept its terms on https://huggingface.co/{source}, {login}"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such folder, and no such model on the Hub; if the model is private, {login}"
    if isinstance(error, RevisionNotFoundError):
        return f"the Hub has no revision `{revision}`; leave out `revision` for the latest"
    if isinstance(error, LocalEntryNotFoundError):
        return _unreachable(source)
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answered {error.response.status_code}; try again later"
    return f"cannot be downloaded ({_first_line(error)}); check the network and the disk"


def _unreachable(source: str) -> str:
    """Return what is wrong with a model that cannot be downloaded now, and what to do."""
    if "/" not in source:
        return "no such folder; a model on the Hub is written `org/name`; check the name"
    if constants.HF_HUB_OFFLINE:
        return (
            "no such folder, not completely in the Hub's cache, and `HF_HUB_OFFLINE` is set; "
            "unset it to download the model"
        )
    return (
        "no such folder, not completely in the Hub's cache, and the Hub cannot be reached; "
        "check the name and the network"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
