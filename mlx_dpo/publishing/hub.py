"""Adapters to and from the Hugging Face Hub, through `huggingface_hub` and its tokens.

Only named files go up, in one commit: a repository has all of them or none. Objects that arrived
before a failure are not sent again.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)

from mlx_dpo.errors import ConfigError, ModelError, reason
from mlx_dpo.publishing.leaks import leaks_in

Files = Mapping[str, Path]  # what is to go up, by its name there
ADAPTER_FILES = (
    "README.md",
    "adapter_config.json",
    "adapters.safetensors",
    "adapter_model.safetensors",
)
REFUSALS = (HTTPError, LocalTokenNotFoundError, OSError, ValueError)
LOGIN = "log in with `hf auth login`, with a token that may write"


@dataclass(frozen=True)
class Pushed:
    """A repository, and what went into it."""

    address: str
    commit: str
    is_new: bool


def refuse_leaks(files: Files) -> None:
    """See that nothing that must stay here is among what goes up.

    Raises:
        ConfigError: names every place.
    """
    found = [leak for name, file in files.items() for leak in leaks_in(file, name)]
    if found:
        places = ", ".join(f"{leak.where} has {leak.what}" for leak in found[:5])
        more = f", and {len(found) - 5} more" * (len(found) > 5)
        raise ConfigError(f"nothing was sent: {places}{more}; remove it, or leave the file out")


def push(files: Files, name: str, *, message: str, public: bool, overwrite: bool) -> Pushed:
    """Put the files into the repository `name`, which is made if there is none.

    Raises:
        ConfigError: something must not leave the machine, the repository is public and
            `public` is not set, or it has some of the files and `overwrite` is not set.
        ModelError: the Hub refuses, or cannot be reached.
    """
    refuse_leaks(files)
    api = HfApi()
    with _one_line(name):
        is_new = _prepare(api, name, files, public=public, overwrite=overwrite)
        operations = [CommitOperationAdd(path, str(file)) for path, file in files.items()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the card's check: about what no card needs
            done = api.create_commit(name, operations, commit_message=message)
    return Pushed(f"{api.endpoint}/{name}", done.oid, is_new)


def _prepare(api: HfApi, name: str, files: Files, *, public: bool, overwrite: bool) -> bool:
    """See whether the files may go there; whether the repository was made for them."""
    try:
        there = api.model_info(name)
    except RepositoryNotFoundError:
        api.create_repo(name, private=not public)
        return True
    if not there.private and not public:
        raise ConfigError(
            f"{name}: is public already; add --public to publish, or take another name"
        )
    taken = sorted(files.keys() & {sibling.rfilename for sibling in there.siblings or ()})
    if taken and not overwrite:
        raise ConfigError(
            f"{name}: has `{taken[0]}` already; add --overwrite to replace it, or take another name"
        )
    return False


def pull(name: str, *, revision: str | None = None) -> Path:
    """The Hub's own copy of an adapter, of which only its known files are fetched.

    Raises:
        ModelError: there is none, or the Hub cannot be reached.
    """
    with _one_line(name):
        # By its commit: where the Hub cannot be asked, a name alone would give an older copy.
        commit = HfApi().model_info(name, revision=revision).sha
        found = snapshot_download(name, revision=commit, allow_patterns=list(ADAPTER_FILES))
    folder = Path(found)
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{name}: no adapter (there is no `adapter_config.json`)")
    return folder


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turn what the Hub or the network say into one line."""
    try:
        yield
    except REFUSALS as error:
        raise ModelError(f"{name}: {_said(error)}") from error
    except RuntimeError as error:  # around what the network said of an object
        if not isinstance(error.__cause__, REFUSALS):
            raise
        raise ModelError(f"{name}: {_said(error.__cause__)}") from error


def _said(error: Exception) -> str:
    if isinstance(error, HFValidationError):
        return "no name of a repository; it is `ORG/NAME`"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no such repository for you; check the name, or {LOGIN}"
    if isinstance(error, HfHubHTTPError):
        code = error.response.status_code
        if code in (401, 403):
            return f"the Hub refuses ({code}); {LOGIN}, and look whether you may write there"
        return f"the Hub answered {code} ({reason(error)}); try again"
    if isinstance(error, ValueError):
        return f"the Hub refuses the card ({reason(error)}); mend README.md"
    return f"the Hub cannot be reached ({reason(error)}); try again"
