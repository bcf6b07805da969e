"""Upload the adapter and the model card of a run to the Hugging Face Hub.

All files are sent in a single commit: the repository gets all of them or none. After a failure,
a retry does not send the large files again that have arrived.
"""

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo

from mlx_dpo.adapters.adapter_files import CONFIG, WEIGHTS, adapter_digest
from mlx_dpo.adapters.peft import WEIGHTS as PEFT_WEIGHTS
from mlx_dpo.errors import ConfigError
from mlx_dpo.hub.errors import as_model_errors, check_repository_name
from mlx_dpo.hub.run_card import trained_steps
from mlx_dpo.hub.secret_scan import scan_for_secrets
from mlx_dpo.models.files import read_json
from mlx_dpo.models.license import CARD
from mlx_dpo.phases import paused, phase
from mlx_dpo.runs.folder import CURVES
from mlx_dpo.saved_runs.export_peft import open_finished

REQUIRED_FILES = (CARD, CONFIG, WEIGHTS)
OPTIONAL_FILES = (PEFT_WEIGHTS, CURVES)
ADAPTER_FILES = REQUIRED_FILES + OPTIONAL_FILES
MAX_LISTED_SECRETS = 5  # in the error message


@dataclass(frozen=True)
class Upload:
    """Files of a run to upload (a path for each name in the repository), and the commit message."""

    files: dict[str, Path]
    message: str  # of the commit


@dataclass(frozen=True)
class PushResult:
    """Result of an upload."""

    url: str  # of the repository
    commit: str
    is_new: bool  # the repository was created
    is_unchanged: bool  # the repository had all files already


def prepare_upload(folder: str, also: tuple[str, ...] = ()) -> Upload:
    """Collect the adapter and model card of a finished run, and the files named in `also`.

    Pairs, checkpoints and logs are uploaded only if `also` names them.

    Raises:
        RunError: the run is unfinished.
        ConfigError: a named file is not in the run folder, or a file has a secret in it.
    """
    opened = open_finished(folder)
    run_folder = opened.paths.folder
    if missing := [name for name in REQUIRED_FILES if not (run_folder / name).is_file()]:
        raise ConfigError(f"{run_folder}: no `{missing[0]}`; make it with `mlx-dpo card {folder}`")
    names = [*REQUIRED_FILES, *(name for name in OPTIONAL_FILES if (run_folder / name).is_file())]
    if "peft_type" not in read_json(run_folder / CONFIG, str(run_folder / CONFIG)):
        names = [name for name in names if name != PEFT_WEIGHTS]  # stale or incomplete
    files = {name: _file_in_run(run_folder, name) for name in names}
    files |= {
        Path(os.path.normpath(name)).as_posix(): _file_in_run(run_folder, name) for name in also
    }
    with phase("Scanning for secrets"):
        check_secrets(files)
    digest, steps = adapter_digest(run_folder)[:12], trained_steps(opened.record)
    return Upload(files, f"Adapter {digest} of an mlx-dpo run, trained for {steps} steps")


def _file_in_run(folder: Path, name: str) -> Path:
    """Return the path of the file `name` in the run folder.

    Raises:
        ConfigError: there is no such file, or it is a link to a file outside the run folder.
    """
    file = folder / name
    if not file.is_file() or not file.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"{name}: not a file of the run folder {folder}; only files of the run are uploaded"
        )
    return file


def check_secrets(files: Mapping[str, Path | bytes]) -> None:
    """Raise `ConfigError` if a file contains a secret or a personal path; the message says where.

    Args:
        files: content of each file, or its path, by its name in the repository.
    """
    matches = [
        match for name, content in files.items() for match in scan_for_secrets(content, name)
    ]
    if matches:
        listed = ", ".join(
            f"{match.location} has {match.kind}" for match in matches[:MAX_LISTED_SECRETS]
        )
        hidden = len(matches) - MAX_LISTED_SECRETS
        more = f", and {hidden} more" if hidden > 0 else ""
        raise ConfigError(f"nothing was uploaded: {listed}{more}; remove it, or leave the file out")


def push(
    files: Mapping[str, Path], name: str, *, message: str, public: bool, overwrite: bool
) -> PushResult:
    """Upload the files to the repository `name` in one commit; create the repository if needed.

    Raises:
        ConfigError: a file contains a secret; an existing repository is public and `public` is
            False, or private and True; or a file would be replaced and `overwrite` is False.
        ModelError: the Hub refuses, or cannot be reached.
    """
    check_repository_name(name)
    additions = [_read_addition(path, file) for path, file in files.items()]
    check_secrets({addition.path_in_repo: _content(addition) for addition in additions})
    api = HfApi()
    with as_model_errors(name):
        repository = _get_or_create_repository(api, name, public=public)
        is_unchanged = repository is not None and _has_all(
            repository, additions, name, overwrite=overwrite
        )
        # The library shows progress bars itself.
        with phase(f"Uploading to {name}"), paused(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # hints about optional metadata of the card
            commit = api.create_commit(
                name,
                additions,
                commit_message=message,
                # The Hub refuses the commit if somebody else's came in between.
                parent_commit=repository.sha if repository else None,
            )
    return PushResult(f"{api.endpoint}/{name}", commit.oid, repository is None, is_unchanged)


def _read_addition(path: str, file: Path) -> CommitOperationAdd:
    """Read a file that will be uploaded as `path`, so that later changes to it are not uploaded.

    Weights are too large to keep in memory: only their digest is computed here, and the upload
    fails if they change afterwards.
    """
    if not path.endswith(".safetensors"):
        return CommitOperationAdd(path, file.read_bytes())
    addition = CommitOperationAdd(path, str(file))
    addition.upload_info.sha256  # noqa: B018  computed and cached on first access
    return addition


def _content(addition: CommitOperationAdd) -> Path | bytes:
    content = addition.path_or_fileobj
    assert isinstance(content, (str, bytes))
    return Path(content) if isinstance(content, str) else content


def _get_or_create_repository(api: HfApi, name: str, *, public: bool) -> ModelInfo | None:
    """Return the existing repository of this name, or create it and return None.

    Raises:
        ConfigError: the existing repository is public and `public` is False, or it is private and
            `public` is True.
    """
    try:
        repository = api.model_info(name, files_metadata=True)
    except RepositoryNotFoundError:
        api.create_repo(name, private=not public)
        return None
    if not repository.private and not public:
        raise ConfigError(
            f"{name}: is already public; add --public to publish, or choose another name"
        )
    if repository.private and public:
        raise ConfigError(
            f"{name}: is private, and `--public` applies to new repositories only; leave it out, "
            "or change the visibility on the repository's page"
        )
    return repository


def _has_all(
    repository: ModelInfo, additions: Sequence[CommitOperationAdd], name: str, *, overwrite: bool
) -> bool:
    """Return whether the repository already has all the files with the same content.

    Raises:
        ConfigError: the repository has a file with other content, and `overwrite` is False.
    """
    hub_digests = {
        file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id
        for file in repository.siblings or ()
    }
    digests = {addition.path_in_repo: _possible_digests(addition) for addition in additions}
    differing = [
        path
        for path in sorted(digests.keys() & hub_digests)
        if hub_digests[path] not in digests[path]
    ]
    if differing and not overwrite:
        raise ConfigError(
            f"{name}: has another `{differing[0]}`; add --overwrite to replace it, or choose "
            "another name"
        )
    return not differing and digests.keys() <= hub_digests.keys()


def _possible_digests(addition: CommitOperationAdd) -> set[str]:
    """Return the digests that the Hub may store for a file: SHA-256 (LFS) and git's blob id."""
    content = addition.path_or_fileobj
    digests = {addition.upload_info.sha256.hex()}
    if isinstance(content, bytes):
        digests.add(hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())
    return digests
