import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.io.notices import notify_once
from mlx_dpo.losses.catalogue import LOSSES

ROOT = Path(__file__).parents[2]


def losses(*args):
    return CliRunner().invoke(cli, ["losses", *args])


def test_every_loss_is_listed_with_equation_use_and_source():
    done = losses()
    assert done.exit_code == 0
    output = " ".join(done.output.split())
    for loss in LOSSES.values():
        for text in (loss.name, loss.equation, loss.use, loss.source):
            assert " ".join(text.split()) in output, loss.name
    assert max(map(len, done.output.splitlines())) <= 100


def test_a_loss_is_shown_by_its_name():
    done = losses("simpo")
    assert "needs: no reference" in done.output
    assert "settings: beta 2, simpo_gamma 0.5, label_smoothing 0; also margins of the data" in (
        " ".join(done.output.split())
    )
    assert "sppo_hard" not in done.output


def test_an_unknown_name_is_answered_with_the_nearest():
    done = losses("dpoop")
    assert (done.exit_code, done.output) == (
        1,
        "Error: unknown loss `dpoop`; did you mean `dpop`?\n",
    )


@pytest.mark.parametrize("name", ["dpo", "DPO"])
def test_dpo_shows_the_loss_that_it_is_a_name_of(name, caplog):
    notify_once.cache_clear()
    assert losses(name).stdout == losses("sigmoid").stdout
    assert caplog.messages == [f"loss `{name}` is recorded as `sigmoid`, TRL's name for it"]


def test_json_output_is_one_object():
    result = json.loads(losses("--json").output)
    assert result.keys() == LOSSES.keys()
    assert result["kto"]["labelled"] and not result["aot"]["labelled"] and result["aot"]["couples"]
    assert result["cdpo"]["settings"] == {"beta": 0.1, "label_smoothing": 0.1}
    assert json.loads(losses("kto", "--json").output) == {"kto": result["kto"]}


def test_listing_loads_no_model_library():
    program = (
        "import sys; from mlx_dpo.cli import cli; cli.main(['losses'], standalone_mode=False); "
        "libraries = {'mlx_lm', 'transformers', 'huggingface_hub'}; "
        "sys.exit(', '.join(libraries & sys.modules.keys()) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_listed_loss_can_be_chosen():
    for name in LOSSES:
        assert DPOConfig(loss_type=name).loss_type == (name,)


@pytest.mark.parametrize("name", LOSSES)
def test_the_default_hyper_parameters_of_a_loss_can_be_set(name):
    loss = LOSSES[name]
    config = DPOConfig(loss_type=name, **loss.defaults)
    assert vars(config.get_hyperparameters(loss)) == loss.defaults
