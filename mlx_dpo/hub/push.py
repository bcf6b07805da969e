"""Adapters to and from the Hugging Face Hub, through `huggingface_hub` and its tokens.

Only named files go up, in one commit: a repository has all of them or none. Objects that arrived
before a failure are not sent again.
"""

import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
from huggingface_hub.hf_api import ModelInfo

from mlx_dpo.adapters.files import CONFIG, WEIGHTS, adapter_digest, read_adapter
from mlx_dpo.adapters.peft import WEIGHTS as PEFT_WEIGHTS
from mlx_dpo.errors import ConfigError, ModelError, reason
from mlx_dpo.hub.run_card import steps_of
from mlx_dpo.hub.secret_scan import leaks_in
from mlx_dpo.models.files import read_json
from mlx_dpo.models.license import CARD, read_card_metadata
from mlx_dpo.models.output_folder import check_output_folder, disk_errors, new_output_folder
from mlx_dpo.runs.folder import CURVES
from mlx_dpo.saved_runs.export_peft import open_finished

Files = Mapping[str, Path]  # what is to go up, by its name there
ADAPTER_FILES = (
    "README.md",
    "adapter_config.json",
    "adapters.safetensors",
    "adapter_model.safetensors",
    CURVES,
)
# A RuntimeError is around what a thread met, or is that of the program that packs large files.
REFUSALS = (HTTPError, LocalTokenNotFoundError, OSError, ValueError, RuntimeError)
NO_NAME = "no name of a repository; it is `ORG/NAME`"
LOGIN = "log in with `hf auth login`, with a token that may write"


@dataclass(frozen=True)
class Pushed:
    """A repository, and what went into it."""

    address: str
    commit: str
    is_new: bool  # it was made for them
    is_same: bool  # all of them were there


def refuse_leaks(files: Mapping[str, Path | bytes]) -> None:
    """See that nothing that must stay here is among what goes up.

    Raises:
        ConfigError: names every place.
    """
    found = [leak for name, content in files.items() for leak in leaks_in(content, name)]
    if found:
        places = ", ".join(f"{leak.where} has {leak.what}" for leak in found[:5])
        more = f", and {len(found) - 5} more" * (len(found) > 5)
        raise ConfigError(f"nothing was sent: {places}{more}; remove it, or leave the file out")


def push(files: Files, name: str, *, message: str, public: bool, overwrite: bool) -> Pushed:
    """Put the files into the repository `name`, which is made if there is none.

    Raises:
        ConfigError: something must not leave the machine, the repository is public and
            `public` is not set or the other way round, or it has other files of these names and
            `overwrite` is not set.
        ModelError: the Hub refuses, or cannot be reached.
    """
    if name.count("/") != 1:
        raise ConfigError(f"{name}: {NO_NAME}")
    additions = [_addition(path, file) for path, file in files.items()]
    refuse_leaks({one.path_in_repo: _content(one) for one in additions})
    api = HfApi()
    with _one_line(name):
        there = _find_or_make(api, name, public=public)
        is_same = there is not None and _compare(there, additions, name, overwrite=overwrite)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the card's check: about what no card needs
            done = api.create_commit(
                name,
                additions,
                commit_message=message,
                parent_commit=there.sha if there else None,  # nobody's work meanwhile is undone
            )
    return Pushed(f"{api.endpoint}/{name}", done.oid, there is None, is_same)


def _addition(path: str, file: Path) -> CommitOperationAdd:
    """A file as it is now, so that no other content is sent than was searched.

    Weights may be large. They are named by their digest, and sent under no other.
    """
    if not path.endswith(".safetensors"):
        return CommitOperationAdd(path, file.read_bytes())
    made = CommitOperationAdd(path, str(file))
    made.upload_info.sha256  # noqa: B018  taken once, when it is asked for first
    return made


def _content(addition: CommitOperationAdd) -> Path | bytes:
    content = addition.path_or_fileobj
    assert isinstance(content, (str, bytes))
    return Path(content) if isinstance(content, str) else content


def _find_or_make(api: HfApi, name: str, *, public: bool) -> ModelInfo | None:
    """The repository that is there; None if it was made."""
    try:
        there = api.model_info(name, files_metadata=True)
    except RepositoryNotFoundError:
        api.create_repo(name, private=not public)
        return None
    if not there.private and not public:
        raise ConfigError(
            f"{name}: is public already; add --public to publish, or take another name"
        )
    if there.private and public:
        raise ConfigError(
            f"{name}: is private, and `--public` makes new ones only; leave it out, or make that "
            "one public on its page"
        )
    return there


def _compare(
    there: ModelInfo, additions: Sequence[CommitOperationAdd], name: str, *, overwrite: bool
) -> bool:
    """Whether the repository has all of it; refuses to replace other content unless asked."""
    digests = {
        one.rfilename: one.lfs.sha256 if one.lfs else one.blob_id for one in there.siblings or ()
    }
    here = {one.path_in_repo: _digests(one) for one in additions}
    others = [path for path in sorted(here.keys() & digests) if digests[path] not in here[path]]
    if others and not overwrite:
        raise ConfigError(
            f"{name}: has another `{others[0]}`; add --overwrite to replace it, or take another "
            "name"
        )
    return not others and here.keys() <= digests.keys()


def _digests(addition: CommitOperationAdd) -> set[str]:
    """What the Hub may know a file by: git's digest, or that of a large file."""
    content = addition.path_or_fileobj
    found = {addition.upload_info.sha256.hex()}
    if isinstance(content, bytes):
        found.add(hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())
    return found


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
        inner = error.__cause__
        around = isinstance(error, RuntimeError) and isinstance(inner, REFUSALS)
        raise ModelError(f"{name}: {_said(inner if around and inner else error)}") from error


def _said(error: BaseException) -> str:
    if isinstance(error, HFValidationError):
        return NO_NAME
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no such repository for you; check the name, or {LOGIN}"
    if isinstance(error, HfHubHTTPError):
        return _answered(error)
    if isinstance(error, ValueError) and "README.md" in str(error):
        return f"the Hub refuses the card ({reason(error)}); mend README.md"
    if isinstance(error, ValueError):
        return f"what answers is not the Hub ({reason(error)}); look at the network, then try again"
    return f"the Hub cannot be reached ({reason(error)}); try again"


def _answered(error: HfHubHTTPError) -> str:
    """Without the address, which of an object that is sent is as good as a password."""
    code, phrase = error.response.status_code, error.response.reason_phrase
    words = " ".join((error.server_message or phrase).split())[:200]
    if code in (401, 403):
        return f"the Hub refuses ({code}: {words}); {LOGIN}, and see whether you may write there"
    if code == 409:
        return f"the Hub refuses ({code}: {words}); take another name, or {LOGIN}"
    if code == 412:
        return f"was changed meanwhile ({code}: {words}); look at it, then try again"
    return f"the Hub answered {code} ({words}); try again{' later' * (code == 429)}"


ALWAYS = (CARD, CONFIG, WEIGHTS)
IF_THERE = (PEFT_WEIGHTS, CURVES)


@dataclass(frozen=True)
class Parcel:
    """What of a run is going to be sent, and the message that goes with it."""

    files: dict[str, Path]
    message: str


def pack(folder: str, also: tuple[str, ...] = ()) -> Parcel:
    """The files of a finished run that go to the Hub: its adapter, its card, and those that are
    named; never pairs, checkpoints or logs by themselves.

    Raises:
        RunError: the run is unfinished.
        ConfigError: a named file is not in the run folder, or something must not leave the machine.
    """
    opened = open_finished(folder)
    place = opened.paths.folder
    if missing := [name for name in ALWAYS if not (place / name).is_file()]:
        raise ConfigError(f"{place}: no `{missing[0]}`; make it with `mlx-dpo card {folder}`")
    names = [*ALWAYS, *(name for name in IF_THERE if (place / name).is_file())]
    if "peft_type" not in read_json(place / CONFIG, str(place / CONFIG)):
        names = [name for name in names if name != PEFT_WEIGHTS]  # of another adapter, or half made
    files = {name: _own_file(place, name) for name in names}
    files |= {Path(os.path.normpath(name)).as_posix(): _own_file(place, name) for name in also}
    refuse_leaks(files)
    digest = adapter_digest(place)[:12]
    steps = steps_of(opened.record)
    return Parcel(files, f"Adapter {digest} of an mlx-dpo run, trained for {steps} steps")


def _own_file(place: Path, name: str) -> Path:
    """A file of the run folder, which is none elsewhere that a link leads to."""
    file = place / name
    if not file.is_file() or not file.resolve().is_relative_to(place.resolve()):
        raise ConfigError(f"{name}: no file of the run folder {place}; nothing else is sent")
    return file


@dataclass(frozen=True)
class Pulled:
    """An adapter from the Hub."""

    folder: Path
    base_model: str | None
    bytes: int


def pull_adapter(name: str, output: Path, revision: str | None = None) -> Pulled:
    """Bring an adapter to the folder `output`, which appears whole or not at all.

    Raises:
        ModelError: there is none, it cannot be read here, or it cannot be written.
    """
    check_output_folder(output, 0)
    found = pull(name, revision=revision)
    try:
        read_adapter(found)
    except ModelError as error:  # says where the Hub's copy lies
        raise ModelError(str(error).replace(str(found), name)) from error
    check_output_folder(output, sum(file.stat().st_size for file in found.iterdir()))
    with new_output_folder(output) as partial, disk_errors(output):
        for file in ADAPTER_FILES:
            if (found / file).is_file():
                shutil.copyfile(found / file, partial / file)
    size = sum(file.stat().st_size for file in output.iterdir())
    return Pulled(output, _base_of(found), size)


def _base_of(folder: Path) -> str | None:
    """The model that an adapter is for, as its card or else its settings say."""
    said = read_card_metadata(folder).get("base_model")
    entries = read_json(folder / CONFIG, str(folder / CONFIG))
    found = [said[0] if isinstance(said, list) and said else said]
    found.append(entries.get("base_model_name_or_path"))
    return next((name for name in found if name and isinstance(name, str)), None)
