"""Where a model comes from: what the user named → a local folder.

Knows folders and the Hub; nothing of what the files hold.
"""

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
from mlx_dpo.models.license import CARD, LICENSE_PATTERNS


# What mlx-lm and the tokenizers read, what the licence says, and nothing that runs: pickles never
# leave the Hub.
WEIGHT_PATTERN = "model*.safetensors"
CONFIG_PATTERNS = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", CARD, *LICENSE_PATTERNS)
CODE_PATTERN = "*.py"


def resolve_model(
    source: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> Path:
    """The local folder of the model that `source` names: a folder, or a Hub id to download.

    A folder that exists wins over a Hub id of the same name. Without `weights` these are not
    downloaded.

    Raises:
        ModelError: there is no such folder, or the Hub does not give the model.
        ConfigError: `revision` is given for a folder, where it has no effect.
    """
    folder = _here(source)
    if source and os.path.isdir(folder):
        if revision is not None:
            raise ConfigError(f"`revision` has no effect: `{source}` is a folder, not a Hub id")
        return folder.resolve()
    if os.path.isfile(folder):
        raise ModelError(f"{source}: a file, not a model's folder; name the folder that holds it")
    if not source or source[0] in "./~" or source.count("/") > 1:
        raise ModelError(
            f"{source or '(nothing)'}: no such folder; a model is a folder or a Hub id "
            "(`organisation/name`)"
        )
    patterns = [*CONFIG_PATTERNS, *([WEIGHT_PATTERN] if weights else []), *([CODE_PATTERN] if trust_remote_code else [])]
    return _download(source, revision, patterns)


def is_hub_id(source: str) -> bool:
    """Whether `source` names a model on the Hub, not a folder here."""
    return not os.path.exists(_here(source))


def _here(source: str) -> Path:
    return Path(os.path.expanduser(source))


def _download(source: str, revision: str | None, patterns: list[str]) -> Path:
    """The Hub's files in its own cache; files that are there already are not fetched again."""
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HFValidationError, HTTPError, OSError) as error:
        raise ModelError(f"{source}: {_reason(error, source, revision)}") from error


def _reason(error: Exception, source: str, revision: str | None) -> str:
    """One line on what the Hub said, and what to do; the narrower classes come first."""
    login = "log in with `hf auth login`"
    if isinstance(error, HFValidationError):
        return "no such folder, and not a Hub id (`organisation/name`)"
    if isinstance(error, GatedRepoError):
        return f"the model is gated; accept its terms on https://huggingface.co/{source}, {login}"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such folder, and no such model on the Hub; if the model is private, {login}"
    if isinstance(error, RevisionNotFoundError):
        return f"the Hub has no revision `{revision}` of it; leave `revision` out for the latest"
    if isinstance(error, LocalEntryNotFoundError):
        return _unreachable()
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answered {error.response.status_code}; try again later"
    return f"cannot be downloaded ({_first_line(error)}); check the network and the disk"


def _unreachable() -> str:
    if constants.HF_HUB_OFFLINE:
        return (
            "no such folder, and not whole in the Hub's cache while `HF_HUB_OFFLINE` is set; "
            "unset it to download the model"
        )
    return (
        "no such folder, not whole in the Hub's cache, and the Hub cannot be reached; "
        "check the network, or name a folder"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
