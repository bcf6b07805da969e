"""Convert errors of `huggingface_hub` and of the network into `ModelError`s."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)

from mlx_dpo.errors import ConfigError, ModelError, reason
from mlx_dpo.io.hub_token import check_hub_token

# Worker threads and hf-xet, which uploads large files, raise RuntimeError.
HUB_ERRORS = (HTTPError, LocalTokenNotFoundError, OSError, ValueError, RuntimeError)
INVALID_NAME = "not the name of a repository; names are `ORG/NAME`"
LOGIN = "log in with `hf auth login`, using a token with write access"


def check_repository_name(name: str) -> None:
    """Raise `ConfigError` if `name` cannot be the name of a repository."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is None:
        raise ConfigError(f"{name}: {INVALID_NAME}")


@contextmanager
def as_model_errors(name: str) -> Iterator[None]:
    """Convert Hub and network errors inside the block into `ModelError`s with a one-line message.

    Args:
        name: name of the Hub repository, for the message.

    Raises:
        ConfigError: the login of this machine cannot be sent.
    """
    check_hub_token()
    try:
        yield
    except HUB_ERRORS as error:
        cause = error.__cause__
        is_wrapper = isinstance(error, RuntimeError) and isinstance(cause, HUB_ERRORS)
        raise ModelError(
            f"{name}: {_describe(cause if is_wrapper and cause else error)}"
        ) from error


def _describe(error: BaseException) -> str:
    if isinstance(error, HFValidationError):
        return INVALID_NAME
    if isinstance(error, RepositoryNotFoundError):
        return f"no such repository on the Hub, or no access to it; check the name, or {LOGIN}"
    if isinstance(error, HfHubHTTPError):
        return _describe_response(error)
    if isinstance(error, ValueError) and "README.md" in str(error):
        return f"the Hub rejects the model card ({reason(error)}); fix README.md"
    if isinstance(error, ValueError):
        return f"the response is not from the Hub ({reason(error)}); check the network, then try "
        "again"
    return f"the Hub cannot be reached ({reason(error)}); try again"


def _describe_response(error: HfHubHTTPError) -> str:
    """Describe an HTTP error without its URL, which may contain the signature of an upload."""
    code, phrase = error.response.status_code, error.response.reason_phrase
    text = " ".join((error.server_message or phrase).split())[:200]
    if code in (401, 403):
        return f"the Hub refuses ({code}: {text}); {LOGIN}, and check that you may write there"
    if code == 409:
        return f"the Hub refuses ({code}: {text}); choose another name, or {LOGIN}"
    if code == 412:
        return f"the repository changed during the upload ({code}: {text}); check it and try again"
    return f"the Hub answered {code} ({text}); try again{' later' * (code == 429)}"
