"""The names that `mlx_dpo` exports, and the answers to names that it does not have."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_dpo
from mlx_dpo import ConfigError, DPOConfig, losses

ROOT = Path(__file__).parents[1]


def imported_names():
    """Public names that the source of mlx_dpo/__init__.py imports, now or on first use."""
    tree = ast.parse((ROOT / "mlx_dpo" / "__init__.py").read_text())
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_dpo")
        for alias in node.names
    } - {"environment", "file_limit", "jit_cache", "openblas", "paths", "transformers_scan"}


def test_all_lists_every_exported_name():
    assert mlx_dpo.__all__ == sorted(imported_names())
    assert set(mlx_dpo.__all__) <= set(dir(mlx_dpo))
    assert mlx_dpo.LAZY.keys() <= imported_names()


def test_every_exported_name_can_be_imported():
    for name in mlx_dpo.__all__:
        assert getattr(mlx_dpo, name).__name__.rpartition(".")[2] == name


def test_every_exported_name_is_described():
    for name in mlx_dpo.__all__:
        assert inspect.getdoc(getattr(mlx_dpo, name))


def test_losses_exports_every_loss_function():
    defined = {
        name
        for module in ("pairwise", "pointwise", "reference_free", "optimal_transport", "listwise")
        for name, value in vars(sys.modules[f"mlx_dpo.losses.{module}"]).items()
        if name.endswith("_loss") and callable(value) and not name.startswith("_")
    }
    exported = set(losses.__all__)
    assert {name for name in exported if name.endswith("_loss")} == defined
    assert all(hasattr(losses, name) for name in exported)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"args": 1}, "unknown argument `args`; give the `DPOConfig` as the first argument"),
        ({"beta": 0.1}, "unknown argument `beta`; use `DPOConfig(beta=...)`"),
        (
            {"num_train_epochs": 1},
            "unknown argument `num_train_epochs`; in DPOConfig: use `epochs`",
        ),
        ({"train_datset": []}, "unknown argument `train_datset`; did you mean `train_dataset`?"),
        ({"xyz": 1}, "unknown argument `xyz`"),
    ],
)
def test_arguments_of_trl_and_misspelt_ones_are_answered(tmp_path, arguments, message):
    config = DPOConfig(model="m", pairs="p", output=str(tmp_path / "run"))
    with pytest.raises(ConfigError) as caught:
        mlx_dpo.DPOTrainer(config, **arguments)
    assert str(caught.value) == message


def test_the_call_of_trl_is_answered():
    with pytest.raises(ConfigError, match="unknown argument `model`; use "):
        mlx_dpo.DPOTrainer(model="m", args=None, train_dataset=[])
    with pytest.raises(ConfigError, match="must be a DPOConfig, got 'model'"):
        mlx_dpo.DPOTrainer("model")
