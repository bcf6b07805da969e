"""`mlx-dpo convert` as a person types it."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.cli.convert import RECIPES, convert
from mlx_dpo.models.quantize import RECIPES as MLX_RECIPES
from tests.checkpoints import make_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return make_checkpoint(tmp_path / "model")


def run(*words: str):
    return CliRunner().invoke(cli, ["convert", *words])


def lines(result) -> list[str]:
    """What was printed, however wide the columns are."""
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def test_a_conversion_says_what_it_did_and_what_to_type_next(checkpoint):
    result = run("model", "--output", "my model", "--dtype", "bfloat16")
    assert result.exit_code == 0
    found = lines(result)
    assert found[0] == "model model → my model"
    assert found[1] == "weights 0.5 MB → 0.2 MB, 16.00 bits per weight"
    assert found[2].startswith("check log-probabilities differ by 0.0")
    assert found[-1] == "Next: mlx-dpo train PAIRS --model 'my model' --output RUN"
    assert "\x1b" not in result.stdout and result.stderr == ""


def test_bits_and_notes_reach_the_terminal(checkpoint):
    make_checkpoint(Path("odd"), intermediate_size=100)
    result = run("odd", "--output", "small", "--bits", "4", "--group-size", "32")
    notes = [line for line in lines(result) if line.startswith("note")]
    assert notes[0].startswith("note 2 of 16 layers left unquantized")


def test_an_error_is_one_line_and_leaves_no_folder(checkpoint):
    result = run("model", "--output", "out", "--group-size", "32")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == (
        "Error: `group_size` has no effect without `bits` or `recipe`; the model is not quantized\n"
    )
    assert not Path("out").exists()


def test_the_recipes_are_those_of_mlx_lm():
    """They are written out, so that `--help` does not load it."""
    assert RECIPES == MLX_RECIPES


def test_every_option_has_help():
    assert all(option.help for option in convert.params if option.param_type_name == "option")


def test_help_loads_no_model_library():
    code = (
        "import sys; from mlx_dpo.cli import cli; cli(['convert', '--help'], standalone_mode=False)"
        "; print('loaded', {'mlx_lm', 'transformers', 'huggingface_hub'} & sys.modules.keys())"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "loaded set()"
