"""System prompts on the command line: a text, or a file with the text."""

from pathlib import Path

from mlx_dpo.errors import ConfigError

TEXT_FILES = (".txt", ".md")  # a text without spaces that ends so is a mistyped name


def read_system_prompt(text: str) -> str:
    """Return a system prompt: a text, or the content of a file that `text` names, as `@` may say.

    Raises:
        ConfigError: there is no file of the name, it cannot be read, or it is empty.
    """
    named = text.removeprefix("@")
    is_name = named != text or (text.endswith(TEXT_FILES) and not any(map(str.isspace, text)))
    if not is_name and not _is_file(text):
        return text
    from mlx_dpo.io.bounded import read_text

    return read_text(Path(named).expanduser(), ConfigError, accept_pipe=True).strip()


def _is_file(text: str) -> bool:
    try:
        return Path(text).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):  # a long text, or one with `~` or NUL, is no name
        return False
