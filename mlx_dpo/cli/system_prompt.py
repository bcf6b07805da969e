"""System prompts on the command line: the text itself, or `@` with the name of a file."""

from pathlib import Path

from mlx_dpo.errors import ConfigError

METAVAR = "PROMPT|@FILE"
TEXT_FILES = (".txt", ".md")  # a text without spaces that ends so is a file name


def read_system_prompt(value: str, setting: str) -> str:
    """Return the system prompt that `value` is, or the content of the file that `@FILE` names.

    Args:
        value: the text, or `@` and the name of a file.
        setting: name of the setting, for error messages.

    Raises:
        ConfigError: the file cannot be read, the system prompt is empty, or `value` is the name of
            a file without `@`.
    """
    if value.startswith("@"):
        from mlx_dpo.io.bounded import read_text

        path = Path(value[1:]).expanduser()
        text = read_text(path, ConfigError, accept_pipe=True).strip()
    else:
        text = value
        if _names_file(text):
            raise ConfigError(
                f"`{setting}` is a system prompt, but `{text}` is the name of a file; write "
                f"`@{text}` to read the file"
            )
    if not text.strip():
        raise ConfigError(f"`{setting}` is empty; write a system prompt")
    return text


def _names_file(text: str) -> bool:
    """Return whether a text names an existing file, or looks like the name of a text file."""
    if text.endswith(TEXT_FILES) and not any(map(str.isspace, text)):
        return True
    try:
        return Path(text).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):  # a long text, or one with `~` or NUL, is no name
        return False
