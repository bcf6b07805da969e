"""The login for the Hugging Face Hub, checked before it is sent."""

import os

from mlx_dpo.errors import ConfigError

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def check_hub_token() -> None:
    """Raise `ConfigError` if the login of this machine cannot be sent to the Hub.

    A token goes into an HTTP header, which holds ASCII only. Without this check, libraries say
    that they cannot encode a character, or that the Hub cannot be reached.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return  # nothing is sent
    token = get_token()
    if token is None or (token.isascii() and token.isprintable() and " " not in token):
        return
    position = next(i for i, c in enumerate(token, 1) if not "!" <= c <= "~")
    where = next((name for name in VARIABLES if os.environ.get(name)), constants.HF_TOKEN_PATH)
    raise ConfigError(
        f"{where}: not a token of the Hub (character {position} is not an ASCII letter, digit or "
        "sign); set it again, or log in with `hf auth login`"
    )
