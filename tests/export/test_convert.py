"""Converting: refused early, whole or absent, and the same model as its source."""

import errno
import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from huggingface_hub import ModelCard
from mlx_lm import convert as mlx_convert
from mlx_lm import load as mlx_load
from mlx_lm.models import gpt2

from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.export import convert as conversion
from mlx_dpo.export.convert import convert, mean_logp_difference, sample_token_ids
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.models.load import load_model
from mlx_dpo.scoring.logps import token_logps
from tests.checkpoints import VOCAB, make_checkpoint
from tests.temporary_files import ended_process, temporary_path

TOKENS = mx.array([[5, 77, 120, 299, 3]])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "converted"


def names_next_to(output: Path) -> set[str]:
    """Return the names in the parent folder, except the source."""
    return {path.name for path in output.parent.iterdir()} - {"model"}


# What is written


def test_a_plain_conversion_is_the_same_model_and_mlx_lm_reads_it(checkpoint, output):
    report = convert(str(checkpoint), output)
    model, tokenizer = mlx_load(str(output))
    original, _ = mlx_load(str(checkpoint))
    assert mx.array_equal(model(TOKENS), original(TOKENS))
    assert tokenizer.encode("the cat") == load_model(str(checkpoint)).tokenizer.encode("the cat")
    assert report.conversion_error == 0
    assert report.bits_per_weight == 32
    assert names_next_to(output) == {"converted"}


def test_the_template_and_the_stop_token_come_along(checkpoint, output):
    convert(str(checkpoint), output)
    before, after = load_model(str(checkpoint)).tokenizer, load_model(str(output)).tokenizer
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
    assert after.apply_chat_template(turns) == before.apply_chat_template(turns)
    assert after.eos_token_ids == before.eos_token_ids


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        # 64-wide groups of 4 bits with a float32 scale and bias: 4 + 64 / 64
        ({"bits": 4}, 5.0),
        ({"bits": 8, "group_size": 32, "dtype": "float16"}, 9.0),  # 8 + 32 / 32
        ({"mode": "mxfp4"}, 4.25),  # 4 + 8 / 32
        ({"mode": "nvfp4", "bits": 4, "group_size": 16}, 4.5),  # 4 + 8 / 16
        ({"mode": "mxfp8"}, 8.25),  # 8 + 8 / 32
    ],
)
def test_bits_per_weight_are_the_bits_and_their_scales(checkpoint, output, settings, bits):
    """The norms, 320 of 120,000 weights, stay whole; they weigh a tenth of a bit."""
    report = convert(str(checkpoint), output, **settings)
    assert bits < report.bits_per_weight < bits + 0.1
    assert report.bytes_after == (output / "model.safetensors").stat().st_size
    assert report.bytes_before == (checkpoint / "model.safetensors").stat().st_size
    assert report.bytes_after < report.bytes_before * (bits + 1.5) / 32


def test_a_recipe_mixes_two_widths(checkpoint, output):
    convert(str(checkpoint), output, recipe="mixed_3_6")
    layers = json.loads((output / "config.json").read_text())["quantization"]
    widths = {entry["bits"] for name, entry in layers.items() if "." in name}
    groups = {entry["group_size"] for name, entry in layers.items() if "." in name}
    assert widths == {3, 6} and groups == {64}


def test_the_reported_difference_is_that_of_the_two_folders(checkpoint, output):
    report = convert(str(checkpoint), output, bits=4)
    source, converted = load_model(str(checkpoint)), load_model(str(output))
    ids = sample_token_ids(source)
    before = mx.log(mx.softmax(source.model(ids), axis=-1))[0]
    after = mx.log(mx.softmax(converted.model(ids), axis=-1))[0]
    row = ids[0].tolist()
    gaps = [abs((before[t - 1, i] - after[t - 1, i]).item()) for t, i in enumerate(row) if t]
    assert report.tokens == len(row) - 1
    assert report.conversion_error == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)


def test_layers_left_unquantised_are_reported(tmp_path, output):
    folder = make_checkpoint(tmp_path / "model", intermediate_size=100)
    notes = convert(str(folder), output, bits=4).notes
    assert notes[0].startswith("2 of 16 layers left unquantized")


def test_an_asked_number_type_is_written_and_named_in_the_configuration(checkpoint, output):
    """mlx-lm casts by that entry when it converts again, so a stale one would undo the cast."""
    convert(str(checkpoint), output, dtype="bfloat16")
    weights = mx.load(str(output / "model.safetensors"))
    assert {value.dtype for value in weights.values()} == {mx.bfloat16}
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = convert(str(output), output.with_name("again"))
    assert again.conversion_error == 0 and again.notes == ()


def test_a_number_type_that_nobody_asked_for_is_said(tmp_path, output):
    folder = make_checkpoint(tmp_path / "model", torch_dtype="bfloat16")
    assert convert(str(folder), output).notes == (
        "float32 weights written in bfloat16, which `config.json` names as theirs",
    )


def test_nothing_of_this_machine_is_written(checkpoint, output):
    convert(str(checkpoint), output, bits=4)
    for file in output.iterdir():
        assert str(checkpoint.parent).encode() not in file.read_bytes(), file.name
    assert "base_model" not in (output / "README.md").read_text()


def test_a_model_of_the_hub_is_named_in_the_card(checkpoint, output, monkeypatch):
    def download(repo_id, **_):
        return str(checkpoint)

    monkeypatch.setattr("mlx_dpo.models.download.snapshot_download", download)
    convert("org/name", output)
    assert "base_model: org/name\n" in (output / "README.md").read_text()


def test_the_licence_goes_along_by_name_and_by_text(tmp_path, output):
    folder = make_checkpoint(tmp_path / "model")
    (folder / "README.md").write_text(
        "---\nlicense: llama3\nlanguage: [en, de]\nbase_model: other/x\ntags: [y]\n---\nHello"
    )
    (folder / "LICENSE.txt").write_text("You may.")
    (folder / "NOTICE").write_text("Built with it.")
    convert(str(folder), output)
    assert ModelCard.load(output / "README.md").data.to_dict() == {
        "license": "llama3", "language": ["en", "de"],
        "library_name": "mlx", "pipeline_tag": "text-generation", "tags": ["mlx"],
    }  # fmt: skip
    assert (output / "LICENSE.txt").read_text() == "You may."
    assert (output / "NOTICE").read_text() == "Built with it."


@pytest.mark.parametrize("page", ["no card", "---\n- a\n---\n", "---\na: [\n---\n", "\udc80"])
def test_a_page_that_is_no_card_says_nothing_of_a_licence(tmp_path, output, page):
    folder = make_checkpoint(tmp_path / "model")
    (folder / "README.md").write_bytes(page.encode("utf-8", "surrogateescape"))
    convert(str(folder), output)
    assert "license" not in (output / "README.md").read_text()


def test_nothing_is_printed(checkpoint, output, capfd):
    convert(str(checkpoint), output, bits=4)
    assert capfd.readouterr() == ("", "")


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 32}, "`group_size` has no effect"),
        ({"recipe": "mixed_3_6", "bits": 4}, "`bits` has no effect"),
        ({"recipe": "mixed_3_6", "mode": "mxfp4"}, "needs the mode `affine`"),
        ({"mode": "mxfp4", "bits": 8}, "`bits` is 4 with the mode `mxfp4`, got 8"),
        ({"mode": "nvfp4", "group_size": 32}, "`group_size` is 16 with the mode `nvfp4`, got 32"),
        ({"mode": "mxfp8", "bits": 4}, "`bits` is 8"),
        ({"bits": 7}, "`bits` must be one of 2, 3, 4, 5, 6, 8, got 7"),
        ({"bits": 4, "group_size": 16}, "must be one of 32, 64, 128, got 16"),
        ({"bits": 4, "group_size": 128}, "fits no layer .*; group size 64 fits 14 of them"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"recipe": "mixed"}, "`recipe` must be one of"),
        ({"revision": "main"}, "`revision` has no effect"),
    ],
)
def test_settings_that_cannot_be_are_refused_and_nothing_is_written(
    tmp_path, output, settings, message
):
    folder = make_checkpoint(tmp_path / "model", intermediate_size=100)
    with pytest.raises(ConfigError, match=message):
        convert(str(folder), output, **settings)
    assert names_next_to(output) == set()


def test_a_quantised_model_is_not_quantised_again(checkpoint, output):
    convert(str(checkpoint), output, bits=4)
    with pytest.raises(ConfigError, match="quantized already"):
        convert(str(output), output.with_name("again"), bits=8)


# The target


def test_an_empty_folder_is_filled_and_folders_above_are_made(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    convert(str(checkpoint), tmp_path / "empty")
    convert(str(checkpoint), tmp_path / "deep" / "er" / "folder")
    assert load_model(str(tmp_path / "empty")).vocab_size == VOCAB
    assert load_model(str(tmp_path / "deep" / "er" / "folder")).vocab_size == VOCAB


def test_a_target_that_is_taken_is_left_as_it_is(checkpoint, output):
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    with pytest.raises(ModelError, match="is not empty"):
        convert(str(checkpoint), output)
    assert (output / "mine.txt").read_text() == "keep"
    with pytest.raises(ModelError, match="is a file"):
        convert(str(checkpoint), output / "mine.txt")


def test_a_disk_without_room_is_refused_before_anything_is_written(checkpoint, output, monkeypatch):
    """The checkpoint needs 0.5 MB: 200 kB are too few, and enough for 4 bits."""
    usage = type("Usage", (), {"free": 200_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ModelError, match=r"needs about 0\.5 MB and the disk has 0\.2 MB left"):
        convert(str(checkpoint), output)
    assert names_next_to(output) == set()
    convert(str(checkpoint), output, bits=4)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ModelError, "be written .No space left"),
        (
            RuntimeError("[write] Unable to write 9 bytes to file."),
            ModelError,
            "be written ..write. Unable",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_conversion_that_fails_or_is_stopped_leaves_nothing(
    checkpoint, output, monkeypatch, error, raised, message
):
    """MLX reports a full disk as a RuntimeError."""

    def stops_half_way(source, folder, **_):
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(conversion, "mlx_convert", stops_half_way)
    with pytest.raises(raised, match=message):
        convert(str(checkpoint), output)
    assert names_next_to(output) == set()


def test_what_mlx_lm_cannot_convert_is_one_line(tmp_path, output):
    """A recipe looks for `down_proj`, and GPT-2 has none."""
    config = {"model_type": "gpt2", "n_ctx": 64, "n_embd": 64, "n_head": 4, "n_layer": 1}
    config |= {"n_positions": 64, "layer_norm_epsilon": 1e-5, "vocab_size": VOCAB}
    folder = make_checkpoint(tmp_path / "model", **config)
    entries = json.loads((folder / "config.json").read_text())
    model = gpt2.Model(gpt2.ModelArgs.from_dict(entries))
    mx.save_safetensors(str(folder / "model.safetensors"), named_arrays(model.parameters()))
    with pytest.raises(
        ModelError, match=r"cannot be converted \(Model does not have expected keys"
    ):
        convert(str(folder), output, recipe="mixed_3_6")
    assert names_next_to(output) == set()


def test_what_a_dead_process_left_is_removed(checkpoint, output):
    stale = temporary_path(output, ended_process())
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    convert(str(checkpoint), output)
    assert names_next_to(output) == {"converted"}


def test_two_processes_do_not_write_the_same_target(checkpoint, output):
    other = temporary_path(output, os.getppid())
    other.mkdir()
    with pytest.raises(ModelError, match=f"process {os.getppid()} is writing to it"):
        convert(str(checkpoint), output)
    assert other.is_dir() and not output.exists()


# The check of the result


def test_a_result_that_is_another_model_is_refused(checkpoint, output, monkeypatch):
    """One of sixteen matrices is transposed on the way, as a wrong layout would."""
    real = mlx_convert

    def transposes(source, folder, **settings):
        real(source, folder, **settings)
        file = Path(folder) / "model.safetensors"
        weights = mx.load(str(file))
        name = "model.layers.1.self_attn.o_proj.weight"
        weights[name] = weights[name].T
        mx.eval(weights)
        mx.save_safetensors(str(file), weights)

    monkeypatch.setattr(conversion, "mlx_convert", transposes)
    for dtype in (None, "float16", "bfloat16"):
        with pytest.raises(ModelError, match="differs too much from the source"):
            convert(str(checkpoint), output, dtype=dtype)
        assert names_next_to(output) == set()


def test_weights_out_of_range_for_the_number_type_are_refused(checkpoint, output):
    """100,000 is more than float16 can hold, and the model would give nothing but NaN."""
    weights = mx.load(str(checkpoint / "model.safetensors"))
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1e6
    mx.eval(weights)
    mx.save_safetensors(str(checkpoint / "model.safetensors"), weights)
    with pytest.raises(ModelError, match="converted model gives log-probabilities that are not"):
        convert(str(checkpoint), output, dtype="float16")
    assert names_next_to(output) == set()


def test_differences_are_counted_token_by_token_and_do_not_cancel():
    """+1 and -1 are 1 apart on average, not 0."""
    assert mean_logp_difference(mx.array([-1.0, -2.0]), mx.array([-2.0, -1.0])) == 1.0


def test_every_token_but_the_first_is_scored_given_those_before():
    """A model that predicts the next id with certainty: log p is 0 wherever it is right."""

    def successor(ids):
        return 100.0 * mx.eye(8)[(ids + 1) % 8]

    logps = token_logps(successor, mx.array([[1, 2, 3, 5, 6]]))
    assert logps.tolist()[0] == pytest.approx([0, 0, -100, 0], abs=1e-4)


@pytest.mark.parametrize("name", ["stories260K", "babyllama-char105"])
def test_real_models_keep_their_log_probabilities(name, output):
    folder = Path(__file__).parents[2] / ".." / "shared" / "material" / "models" / name
    if not folder.is_dir():
        pytest.skip("no real models next to the checkout")
    half = convert(str(folder), output, dtype="bfloat16")
    assert half.conversion_error < 0.02
    report = convert(str(folder), output.with_name("eight"), bits=8)
    assert report.conversion_error < 0.05
