"""Loading: what is refused before anything is loaded, and what a base is made of."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from huggingface_hub import errors as hub
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as mlx_load_model
from mlx_lm.utils import quantize_model

from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.models import download as download_module
from mlx_dpo.models.device import cast_model, device_kind
from mlx_dpo.models.download import resolve_model
from mlx_dpo.models.empty_weights import load_empty_model
from mlx_dpo.models.files import model_fingerprint, tokenizer_fingerprint
from mlx_dpo.models.load import embedding_size, load_model
from mlx_dpo.models.quantize import expected_bytes
from tests.checkpoints import END, VOCAB, make_checkpoint

needs_cpu = pytest.mark.skipif(device_kind() != "cpu", reason="the CPU backend's own rule")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def parameters(model):
    return dict(tree_flatten(model.parameters()))


def edit(file: Path, **entries) -> None:
    """Set entries of a JSON file; None removes one."""
    old = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (old | entries).items() if v is not None}))


def edit_weights(folder: Path, **arrays) -> None:
    """Set tensors of a checkpoint; None removes one."""
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    arrays_to_save = {k: v for k, v in (weights | arrays).items() if v is not None}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays_to_save)


def refusal(source, **settings) -> str:
    """The one line with which loading is refused."""
    with pytest.raises((ModelError, ConfigError)) as caught:
        load_model(str(source), **settings)
    message = str(caught.value)
    assert "\n" not in message and not message.endswith(".")
    return message


# What a base is


def test_a_base_is_frozen_in_evaluation_mode_and_holds_the_stored_numbers(checkpoint):
    base = load_model(str(checkpoint))
    assert tree_flatten(base.model.trainable_parameters()) == []
    assert not base.model.training
    stored = mx.load(str(checkpoint / "model.safetensors"))
    held = parameters(base.model)
    assert held.keys() == stored.keys()
    assert all(mx.array_equal(held[name], stored[name]) for name in stored)
    assert base.notes == ()
    assert (base.path, base.source, base.vocab_size) == (checkpoint, str(checkpoint), VOCAB)


def test_the_tokenizer_stops_where_the_configuration_says(checkpoint):
    """Not where the tokenizer's own file says, which may name another token."""
    assert load_model(str(checkpoint)).tokenizer.eos_token_ids == {END}
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    assert load_model(str(checkpoint)).tokenizer.eos_token_ids == {0, 3}


@needs_cpu
def test_sixteen_bit_weights_are_widened_on_the_cpu_and_it_is_said(tmp_path):
    folder = make_checkpoint(tmp_path / "half", dtype=mx.bfloat16)
    base = load_model(str(folder))
    stored = mx.load(str(folder / "model.safetensors"))
    held = parameters(base.model)
    assert {v.dtype for v in held.values()} == {mx.float32}
    assert all(mx.array_equal(held[name], stored[name].astype(mx.float32)) for name in stored)
    assert base.notes == ()
    assert base.storage_notes == (
        "bfloat16 weights converted to float32 (faster on the CPU backend)",
    )


def test_an_asked_number_type_is_the_one_held(checkpoint):
    base = load_model(str(checkpoint), dtype="float16")
    assert {v.dtype for v in parameters(base.model).values()} == {mx.float16}
    assert "float16" in base.notes[0]


def test_a_cast_leaves_the_weights_that_the_model_wants_kept(checkpoint):
    model = load_model(str(checkpoint)).model
    model.cast_predicate = lambda name: "norm" not in name
    cast_model(model, mx.float16)
    for name, value in parameters(model).items():
        assert value.dtype == (mx.float32 if "norm" in name else mx.float16)


@pytest.mark.parametrize("tied", [True, False])
@needs_cpu
def test_quantising_on_load_gives_the_numbers_of_mlx_lms_quantised_model(tmp_path, tied):
    """Float32 throughout: the weights are the same, only where they are unpacked differs."""
    folder = make_checkpoint(tmp_path / "model", tied=tied)
    packed, config = mlx_load_model(folder)
    packed, _ = quantize_model(packed, config, 32, 4)
    tokens = mx.array([[5, 77, 120, 299, 3]])
    expected = packed(tokens)
    base = load_model(str(folder), bits=4, group_size=32)
    assert mx.abs(base.model(tokens) - expected).max() < 1e-5 * mx.abs(expected).max()
    assert base.config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert any("4-bit" in note for note in base.storage_notes)


def test_layers_whose_width_does_not_divide_are_counted(tmp_path):
    """Hidden 64 and intermediate 100: of 16 layers, only the two `down_proj` are 100 wide."""
    folder = make_checkpoint(tmp_path / "model", intermediate_size=100)
    notes = load_model(str(folder), bits=4).notes
    [note] = [note for note in notes if "left unquantized" in note]
    assert note == (
        "2 of 16 layers left unquantized: their width (100) is not a multiple of 64; "
        "none of the supported group sizes (32, 64, 128) divides them"
    )


@pytest.mark.parametrize("load", [load_model, load_empty_model])
def test_the_group_size_that_fits_is_named(tmp_path, load):
    folder = make_checkpoint(tmp_path / "model", hidden=96, intermediate_size=128)
    with pytest.raises(ConfigError, match=r"group size 32 fits all of them \(--group-size 32\)"):
        load(str(make_checkpoint(tmp_path / "other", hidden=96)), bits=4, group_size=128)
    [note] = [note for note in load(str(folder), bits=4).notes if "unquantized" in note]
    assert note.startswith("14 of 16 layers ")
    assert "their width (96) is not a multiple of 64; group size 32 fits all of them" in note
    notes = load(str(folder), bits=4, group_size=32).notes
    assert not any("unquantized" in note for note in notes)


def test_the_embedding_rows_are_those_of_the_token_table(checkpoint):
    """Neither a shorter table (positions) nor a longer one (n-grams) is taken for it."""
    model = load_model(str(checkpoint)).model
    model.positions = type(model.model.embed_tokens)(32, 64)
    model.ngrams = type(model.model.embed_tokens)(5000, 64)
    assert embedding_size(model, {"vocab_size": VOCAB - 20}) == VOCAB
    assert embedding_size(model, {"text_config": {"vocab_size": VOCAB}}) == VOCAB


# Settings that contradict the model


def test_bits_on_a_quantised_model_are_refused(checkpoint):
    edit(checkpoint / "config.json", quantization={"group_size": 64, "bits": 4})
    model, config = mlx_load_model(make_checkpoint(checkpoint.parent / "plain"))
    model, config = quantize_model(model, config, 64, 4)
    mx.save_safetensors(str(checkpoint / "model.safetensors"), parameters(model))
    assert "quantized already" in refusal(checkpoint, bits=4)


@pytest.mark.parametrize(
    ("group_size", "message"), [(128, "fits no layer"), (16, "must be one of 32, 64, 128, got 16")]
)
def test_groups_that_cannot_be_are_refused(tmp_path, group_size, message):
    folder = make_checkpoint(tmp_path / "model", intermediate_size=100)
    assert message in refusal(folder, bits=4, group_size=group_size)


@pytest.mark.parametrize(
    ("bits", "dtype", "expected"),
    [
        # 64-wide matrices: 2 of 300 rows, and in 2 layers 4 of 64 rows and 2 of 100:
        # 96,768 weights in 4 bits and 64 for a scale and a bias each 64: 60,480 bytes.
        # 100-wide: 12,800 weights; norms: 320. Both stay whole.
        (4, None, 60_480 + 13_120 * 4),
        (4, "float16", 54_432 + 13_120 * 2),  # 32 for a scale and a bias
        (None, "bfloat16", (96_768 + 13_120) * 2),
        (None, None, (96_768 + 13_120) * 4),
    ],
)
def test_the_size_on_disk_is_foreseen(tmp_path, bits, dtype, expected):
    folder = make_checkpoint(tmp_path / "model", intermediate_size=100)
    model, _ = mlx_load_model(folder, lazy=True)
    assert expected_bytes(model, bits, 64, dtype) == expected


def test_a_group_size_without_bits_is_refused(checkpoint):
    assert "no effect without `bits`" in refusal(checkpoint, group_size=32)


# Where a model comes from


def test_a_revision_of_a_folder_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="`revision` has no effect"):
        resolve_model(str(checkpoint), revision="main")


@pytest.mark.parametrize("source", ["", "./gone", "/gone/model", "~/gone-model", "a/b/c", "../x"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(source, monkeypatch):
    monkeypatch.setattr(download_module, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ModelError, match="no such folder"):
        resolve_model(source)


def test_a_file_is_not_a_model(checkpoint):
    assert "a file, not" in refusal(checkpoint / "model.safetensors")


def test_a_folder_wins_over_a_hub_id_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_checkpoint(tmp_path / "org" / "model")
    assert resolve_model("org/model") == folder


REPOSITORY = {
    "model-00001-of-00002.safetensors": True,
    "model.safetensors.index.json": True,
    "config.json": True,
    "tokenizer.model": True,
    "qwen.tiktoken": True,
    "merges.txt": True,
    "chat_template.jinja": True,
    "pytorch_model.bin": False,
    "consolidated.safetensors": False,  # a second copy of the weights, in another layout
    "model.gguf": False,
    "optimizer.pt": False,
    "modeling_custom.py": "trusted",
    "README.md": True,  # says the licence
    "LICENSE": True,
    "images.png": False,
}


@pytest.mark.parametrize("trusted", [False, True])
def test_only_what_is_read_is_downloaded_and_code_only_if_trusted(trusted, monkeypatch, tmp_path):
    request = {}

    def download(repo_id, *, revision, allow_patterns):
        request.update(repo_id=repo_id, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(download_module, "snapshot_download", download)
    found = resolve_model("org/name", revision="v2", trust_remote_code=trusted)
    assert (found, request["repo_id"], request["revision"]) == (tmp_path, "org/name", "v2")
    for name, wanted in REPOSITORY.items():
        fetched = any(fnmatch(name, pattern) for pattern in request["patterns"])
        assert fetched == (trusted if wanted == "trusted" else wanted), name


def answer(kind: type[Exception], status: int) -> Exception:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("the Hub's own words\nover two lines", response=response)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: answer(hub.GatedRepoError, 403), "accept its terms on https://huggingface.co/o/m"),
        (lambda: answer(hub.RepositoryNotFoundError, 404), "no such model on the Hub"),
        (lambda: answer(hub.RevisionNotFoundError, 404), "no revision `v9`"),
        (lambda: answer(hub.HfHubHTTPError, 503), "answered 503"),
        (lambda: hub.LocalEntryNotFoundError("long"), "the Hub cannot be reached"),
        (lambda: hub.IncompleteSnapshotError("long", "/x"), "not completely in the Hub's cache"),
        (lambda: hub.HFValidationError("long"), "not a Hub id"),
        (lambda: OSError(28, "No space left on device"), "No space left on device"),
        (lambda: hub.HTTPError("proxy refused\nagain"), "proxy refused"),
    ],
)
def test_each_error_of_the_hub_gives_a_one_line_error(error, message, monkeypatch):
    def download(*_, **__):
        raise error()

    monkeypatch.setattr(download_module, "snapshot_download", download)
    assert message in refusal("o/m", revision="v9")


def test_a_model_without_an_organisation_is_answered_with_the_form_of_a_hub_id(monkeypatch):
    def download(*_, **__):
        raise hub.LocalEntryNotFoundError("long")

    monkeypatch.setattr(download_module, "snapshot_download", download)
    assert "a model on the Hub is written `org/name`" in refusal("qwen2.5")


# What the files must be


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert "no `config.json`" in refusal(tmp_path)


def test_adapters_are_not_taken_for_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    message = refusal(tmp_path)
    assert "adapters, not a model" in message and "`org/base`" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "not a JSON object"), ("{}", "missing `model_type`")],
)
def test_a_broken_configuration_is_refused(checkpoint, text, message):
    (checkpoint / "config.json").write_text(text)
    assert message in refusal(checkpoint)


def test_an_unknown_model_type_names_the_nearest(checkpoint):
    edit(checkpoint / "config.json", model_type="lama")
    assert "`llama`" in refusal(checkpoint)
    edit(checkpoint / "config.json", model_type="zzz")
    message = refusal(checkpoint)
    assert "does not support the model type `zzz`" in message
    assert message.endswith("if the model is newer than this mlx-lm, update mlx-lm")


def test_code_that_comes_with_a_model_runs_only_if_trusted(checkpoint):
    edit(checkpoint / "config.json", model_file="arch.py")
    (checkpoint / "arch.py").write_text(
        "from pathlib import Path\nfrom mlx_lm.models.llama import Model, ModelArgs\n"
        "Path(__file__).with_name('ran').touch()\n"
    )
    assert "`arch.py`" in refusal(checkpoint)
    assert not (checkpoint / "ran").exists()
    load_model(str(checkpoint), trust_remote_code=True)
    assert (checkpoint / "ran").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "pickles can run code"),
        ("model.Q4_K.gguf", "GGUF"),
        ("consolidated.safetensors", "found `consolidated.safetensors`"),
        ("notes.md", "no weights"),
    ],
)
def test_weights_in_another_form_are_named(checkpoint, name, message):
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    assert message in refusal(checkpoint)


def test_a_missing_shard_is_named(checkpoint):
    shards = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    message = refusal(checkpoint)
    assert "1 of 2" in message and "`model-00002-of-00002.safetensors`" in message


def split(checkpoint) -> dict[str, str]:
    """Split the weights into two files; return the index's map from tensors to files."""
    weights = mx.load(str(checkpoint / "model.safetensors"))
    mx.eval(weights)
    (checkpoint / "model.safetensors").unlink()
    index = {}
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        mx.save_safetensors(str(checkpoint / file), {name: weights[name] for name in names})
        index |= dict.fromkeys(names, file)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return index


def test_an_interrupted_download_is_refused_by_its_missing_file(checkpoint):
    split(checkpoint)
    assert load_model(str(checkpoint))
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    message = refusal(checkpoint)
    assert "1 of 2" in message and "`model-00002-of-00002.safetensors`" in message


@pytest.mark.parametrize(
    "index",
    [
        '{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}',
        '{"weight_map": [1]}',
        '{"weight_map": {"a": ["b"], "c": {}}}',
        "{",
    ],
)
def test_the_index_of_other_weights_does_not_count(checkpoint, index):
    """Quantized models have the index of their source; mlx-lm reads none."""
    expected = parameters(load_model(str(checkpoint)).model)
    (checkpoint / "model.safetensors.index.json").write_text(index)
    loaded = parameters(load_model(str(checkpoint)).model)
    assert all(mx.array_equal(loaded[name], expected[name]) for name in expected)


def test_a_missing_file_whose_tensors_are_elsewhere_is_not_missed(checkpoint):
    index = split(checkpoint) | {"lm_head.weight": "model-00003-of-00003.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert load_model(str(checkpoint))


# Files of a kind or of types that are not known


def test_a_tokenizer_of_an_unknown_kind_names_the_file_and_the_version(checkpoint):
    file = checkpoint / "tokenizer.json"
    entries = json.loads(file.read_text())
    file.write_text(json.dumps(entries | {"model": entries["model"] | {"type": "FutureBPE"}}))
    message = refusal(checkpoint)
    assert "`tokenizer.json` cannot be read by tokenizers " in message
    assert "the file may need a newer tokenizers library" in message


def test_an_unknown_tokenizer_class_is_noted(checkpoint):
    assert load_model(str(checkpoint)).notes == ()
    edit(checkpoint / "tokenizer_config.json", tokenizer_class="FutureTokenizer")
    [note] = load_model(str(checkpoint)).notes
    assert note.startswith("tokenizer class `FutureTokenizer` is unknown to transformers ")


def test_a_damaged_sentencepiece_model_is_named(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer.model").write_bytes(b"\x0a\xff\x00garbage" * 20)
    edit(checkpoint / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    assert "`tokenizer.model`" in refusal(checkpoint) or "`sentencepiece`" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("generation_config.json", {"eos_token_id": "x"}, "`eos_token_id` is not a token id"),
        ("generation_config.json", {"eos_token_id": [3, None]}, "`eos_token_id` is not a token id"),
        ("generation_config.json", {"eos_token_id": 2**64}, "`eos_token_id` is not a token id"),
        ("generation_config.json", [], "generation_config.json: not a JSON object"),
        ("tokenizer_config.json", "text", "tokenizer_config.json: not a JSON object"),
        ("tokenizer_config.json", {"tokenizer_class": 1.5}, "tokenizer: cannot be read"),
        ("config.json", {"eos_token_id": True}, "`eos_token_id` is not a token id"),
        ("config.json", {"quantization": [1]}, "`quantization` must be a JSON object (found list)"),
        ("config.json", {"rope_theta": "far"}, "its configuration does not fit"),
        ("config.json", {"num_hidden_layers": "two"}, "cannot be read"),
    ],
)
def test_values_of_other_types_are_refused_in_one_line(checkpoint, file, entries, message):
    path = checkpoint / file
    old = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(old | entries if isinstance(entries, dict) else entries))
    assert message in refusal(checkpoint)


def test_weights_of_an_unknown_number_type_may_need_a_newer_mlx(checkpoint):
    file = checkpoint / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(b'"F32"', b'"F4X"')
    file.write_bytes(data[:8] + header + data[8 + size :])
    assert "the file may need a newer MLX than " in refusal(checkpoint)


def test_an_unknown_packing_is_named(checkpoint):
    edit(checkpoint / "config.json", quantization_config={"quant_method": "future"})
    edit_weights(checkpoint, **{"model.norm.scales": mx.zeros((2,))})
    assert "weights quantized with `future` may need a newer mlx-lm" in refusal(checkpoint)


@pytest.mark.parametrize("keep", [4, 1000, -1])
def test_a_truncated_weight_file_is_refused(checkpoint, keep):
    """Cut inside the length, inside the header, and by the very last byte."""
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "cannot be read" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"model.norm.weight": None}, "model.norm.weight"),
        ({"model.extra.weight": mx.zeros((2,))}, "model.extra.weight"),
        ({"model.norm.weight": mx.zeros((3,))}, "model.norm.weight"),
    ],
)
def test_tensors_that_do_not_fit_the_configuration_are_named(checkpoint, arrays, named):
    edit_weights(checkpoint, **arrays)
    assert named in refusal(checkpoint)


def test_a_configuration_without_a_size_is_refused(checkpoint):
    edit(checkpoint / "config.json", hidden_size=None)
    assert "hidden_size" in refusal(checkpoint)


def test_a_model_without_a_tokenizer_is_refused(checkpoint):
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (checkpoint / file).unlink()
    assert "no tokenizer" in refusal(checkpoint)


def test_a_tokenizer_without_its_main_file_is_refused(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    assert "there is no `tokenizer.json`" in refusal(checkpoint)


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_broken_tokenizer_is_refused(checkpoint, text):
    (checkpoint / "tokenizer.json").write_text(text)
    assert "tokenizer: cannot be read" in refusal(checkpoint)


def test_a_tokenizer_that_is_code_is_refused(checkpoint):
    edit(
        checkpoint / "tokenizer_config.json",
        tokenizer_class=None,
        auto_map={"AutoTokenizer": ["code.Tokenizer", None]},
    )
    assert "allow it with `trust_remote_code`" in refusal(checkpoint)


# Fingerprints


def test_a_fingerprint_is_of_the_contents_and_not_of_the_place(checkpoint, tmp_path):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "elsewhere"))
    assert model_fingerprint(copy) == model_fingerprint(checkpoint)
    assert tokenizer_fingerprint(copy) == tokenizer_fingerprint(checkpoint)
    (copy / "README.md").write_text("words")
    assert model_fingerprint(copy) == model_fingerprint(checkpoint)


def test_the_last_byte_of_the_weights_changes_the_fingerprint(checkpoint):
    before = model_fingerprint(checkpoint)
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert model_fingerprint(checkpoint) != before


def test_a_setting_or_the_name_of_a_weight_file_changes_the_fingerprint(checkpoint):
    seen = {model_fingerprint(checkpoint)}
    edit(checkpoint / "config.json", rope_theta=5000.0)
    seen.add(model_fingerprint(checkpoint))
    (checkpoint / "model.safetensors").rename(checkpoint / "model-a.safetensors")
    seen.add(model_fingerprint(checkpoint))
    assert len(seen) == 3


def test_the_template_changes_the_tokenizers_fingerprint_alone(checkpoint):
    model, tokenizer = model_fingerprint(checkpoint), tokenizer_fingerprint(checkpoint)
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    assert model_fingerprint(checkpoint) == model
    assert tokenizer_fingerprint(checkpoint) != tokenizer


@pytest.mark.parametrize("name", ["a [v2]", "a[!x]?*"])
def test_a_model_loads_from_a_folder_with_characters_of_glob_patterns(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / name / "m")
    ids = mx.array([[1, 5, 9]])
    make_checkpoint(tmp_path / "plain")
    expected = load_model("plain").model(ids)
    assert mx.array_equal(load_model(f"{name}/m").model(ids), expected)
    assert load_model(f"{name}/m").path == Path(f"{name}/m").resolve()
