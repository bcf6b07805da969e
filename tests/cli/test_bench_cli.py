"""`mlx-dpo bench`: table, JSON, a user's model, refusals."""

import json

from click.testing import CliRunner

from mlx_dpo.cli import bench as command
from mlx_dpo.cli import cli
from mlx_dpo.profiling.bench.shapes import SHAPES
from tests.checkpoints import make_checkpoint


def bench(*words):
    return CliRunner().invoke(cli, ["bench", "--seconds", "1", *words])


def test_the_shapes_are_those_of_the_package():
    assert set(command.SHAPES) == set(SHAPES)


def test_the_table_is_80_columns_wide(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    done = bench("--shape", "tiny")
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    labels = [line[2:12].strip() for line in done.stdout.splitlines()]
    assert [label for label in labels if label and "-" not in label] == [
        "bench", "machine", "system", "device", "load", "model", "scorer", "pairs", "training",
        "reference", "evaluation", "generation", "products", "copy", "memory", "time", "sharing",
    ]  # fmt: skip
    assert "99.0 before the start: other programs were running" in done.stdout


def test_json_of_a_user_s_model_is_one_object(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "base", max_position_embeddings=300)
    done = bench(str(tmp_path / "base"), "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["model"]["name"] == "base"
    assert record["machine"]["device"] == "cpu"
    assert record["date"] and record["versions"]["mlx"]
    assert str(tmp_path) not in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_a_shape_has_no_effect_on_a_model():
    done = bench("base", "--shape", "tiny")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == "Error: `shape` has no effect together with MODEL"


def test_bits_that_fit_no_layer_are_refused():
    done = bench("--shape", "tiny", "--bits", "4")
    assert done.exit_code == 1
    assert "group size" in done.stderr.splitlines()[-1]
