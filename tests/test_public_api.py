"""The names that `mlx_dpo` exports."""

import subprocess
import sys

import pytest

import mlx_dpo


def test_every_exported_name_can_be_imported():
    for name in mlx_dpo.__all__:
        assert getattr(mlx_dpo, name).__name__ == name


def test_run_is_a_deprecated_name_of_the_trainer():
    with pytest.warns(DeprecationWarning, match="use `mlx_dpo.DPOTrainer`") as caught:
        from mlx_dpo import Run
    assert Run is mlx_dpo.DPOTrainer
    assert {warning.filename for warning in caught} == {__file__}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'mlx_dpo' has no attribute 'Trainer'"):
        mlx_dpo.Trainer  # noqa: B018


def test_importing_the_package_loads_no_model_library():
    program = "import sys, mlx_dpo; print({'mlx_lm', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\n", "")
