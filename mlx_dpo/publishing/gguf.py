"""GGUF by llama.cpp's own converter, from a Hugging Face checkpoint.

mlx-lm's writer is not used: it writes llama, mistral and mixtral alone, and their vocabularies
without merges and with one score for all tokens, so that llama.cpp cuts text otherwise than the
model was trained.
"""

import os
import shutil
import subprocess
from pathlib import Path

from mlx_dpo.errors import ConfigError, ModelError, reason

CONVERTER = "convert_hf_to_gguf.py"


def find_converter(given: str | None) -> Path:
    """The converter that is given, or else the one that is found as a program.

    Raises:
        ConfigError: there is none.
    """
    found = given or shutil.which(CONVERTER)
    path = Path(found).expanduser() if found else None
    if path is not None and path.is_dir():
        path /= CONVERTER
    if path is None or not path.is_file():
        raise ConfigError(
            f"`--gguf` needs llama.cpp's `{CONVERTER}` ({given or 'none found'}); it comes with "
            "llama.cpp (`brew install llama.cpp`); name it with `--converter`"
        )
    if not os.access(path, os.X_OK):
        raise ConfigError(f"{path}: is no program; allow it to run with `chmod +x`")
    return path


def check_file(output: Path) -> None:
    """See that a file may be written, before work is done for it.

    Raises:
        ConfigError: it is there already, or its folder is not.
    """
    if output.exists():
        raise ConfigError(f"{output}: is there already; take another name")
    if not output.resolve().parent.is_dir():
        raise ConfigError(f"{output}: there is no folder {output.parent}; make it first")


def write_gguf(converter: Path, model: Path, output: Path) -> None:
    """Convert the checkpoint in the folder `model`.

    Raises:
        ModelError: the converter refuses it, an architecture that it does not know for one.
    """
    partial = output.with_name(f".{output.name}.partial")
    # By its own first line, for what it imports is in another environment than this one.
    command = [str(converter.resolve()), str(model), "--outfile", str(partial)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not partial.is_file():
            said = done.stderr.strip() or done.stdout.strip() or "it wrote nothing"
            raise ModelError(_refused(output, converter, model, said.splitlines()[-1]))
        partial.replace(output)
    except OSError as error:
        raise ModelError(_refused(output, converter, model, reason(error))) from error
    finally:
        partial.unlink(missing_ok=True)


def _refused(output: Path, converter: Path, model: Path, said: str) -> str:
    return (
        f"{output}: {converter.name} cannot convert the model ({said[:200]}); the checkpoint is "
        f"whole in {model}: see that the converter's own requirements are installed, and that it "
        "knows the architecture and the tokenizer"
    )
