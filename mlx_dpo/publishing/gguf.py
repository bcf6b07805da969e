"""GGUF by llama.cpp's own converter, from a Hugging Face checkpoint.

mlx-lm's writer is not used: it writes llama, mistral and mixtral alone, and their vocabularies
without merges and with one score for all tokens, so that llama.cpp cuts text otherwise than the
model was trained.
"""

import shutil
import subprocess
from pathlib import Path

from mlx_dpo.errors import ConfigError, ModelError

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
    return path


def write_gguf(converter: Path, model: Path, output: Path) -> None:
    """Convert the checkpoint in the folder `model`.

    Raises:
        ModelError: the converter refuses it, an architecture that it does not know for one.
    """
    partial = output.with_name(f".{output.name}.partial")
    # By its own first line, for what it imports is in another environment than this one.
    done = subprocess.run(
        [str(converter.resolve()), str(model), "--outfile", str(partial)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not partial.is_file():
        partial.unlink(missing_ok=True)
        said = (done.stderr.strip() or done.stdout.strip() or "it wrote nothing").splitlines()[-1]
        raise ModelError(f"{output}: {converter.name} cannot convert the model ({said[:200]})")
    partial.replace(output)
