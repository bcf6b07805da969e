"""`fuse --to lmstudio` and `--to ollama`, with stand-ins for llama.cpp's programs."""

import re
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.errors import ConfigError
from mlx_dpo.export.lmstudio import find_models_folder, model_folder
from tests.edited_files import edit, read_entries

# The converter renames all matrices and reverses their rows; the quantizer rounds to a grid.
CONVERTER = """
assert sys.argv[2] == "--outfile" and sys.argv[4:] == ["--outtype", "f16"]
tensors = mx.load(sys.argv[1] + "/model.safetensors")
mx.save_gguf(sys.argv[3], {
    "blk." + name: value.astype(mx.float16)[::-1] if value.ndim > 1 else value
    for name, value in tensors.items()
}, {})
"""
QUANTIZER = """
steps = {"Q8_0": 2000, "Q4_0": 2}[sys.argv[3]]
mx.save_gguf(sys.argv[2], {
    name: (mx.round(value * steps) / steps) if value.ndim > 1 else value
    for name, value in mx.load(sys.argv[1]).items()
}, {})
"""


def program(path, code):
    path.write_text(f"#!{sys.executable}\nimport sys\nimport mlx.core as mx\n{code}")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def llama_cpp(workplace):
    return (
        "--converter", program(workplace / "convert_hf_to_gguf.py", CONVERTER),
        "--quantizer", program(workplace / "llama-quantize", QUANTIZER),
    )  # fmt: skip


def run(*words):
    result = CliRunner().invoke(cli, ["fuse", "run", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def lines_of(result):
    """Return the printed table as (label, text)."""
    return dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line[:1] != " ")


def test_lm_studio_gets_8_bits_that_keep_the_training(workplace, home):
    (home / ".lmstudio").mkdir()
    result = run("--to", "lmstudio", "--name", "polite")
    assert result.exit_code == 0, result.output
    folder = home / ".lmstudio" / "models" / "mlx-dpo" / "polite"
    assert read_entries(folder / "config.json")["quantization"]["bits"] == 8
    assert lines_of(result)["model"].endswith("8 bits")


def test_lm_studio_gets_all_bits_where_8_lose_the_training(workplace, home):
    (home / ".lmstudio").mkdir()
    result = run("--to", "lmstudio", "--name", "me/polite", "--min-retained", "0.9999")
    assert result.exit_code == 0, result.output
    folder = home / ".lmstudio" / "models" / "me" / "polite"
    assert "quantization" not in read_entries(folder / "config.json")
    assert "not quantized, because 8 bits do not keep the training" in result.stdout
    assert [path.name for path in folder.parent.iterdir()] == ["polite"]


def test_bits_that_were_asked_for_are_not_replaced(workplace, home):
    (home / ".lmstudio").mkdir()
    refused = run("--to", "lmstudio", "--bits", "8", "--min-retained", "0.9999")
    assert refused.exit_code == 1 and "so it was not written" in refused.stderr
    assert not (home / ".lmstudio" / "models" / "mlx-dpo" / "run").exists()


def test_where_lm_studio_keeps_its_models(home):
    with pytest.raises(ConfigError, match="start LM Studio once"):
        find_models_folder()
    (home / ".lmstudio").mkdir()
    assert find_models_folder() == home / ".lmstudio" / "models"
    (home / ".lmstudio" / "settings.json").write_text('{"downloadsFolder": "/Volumes/X/models"}')
    assert find_models_folder() == Path("/Volumes/X/models")
    other = home / "other"
    other.mkdir()
    (home / ".lmstudio-home-pointer").write_text(f"{other}\n")
    assert find_models_folder() == other / "models"
    assert model_folder("a/b") == other / "models" / "a" / "b"
    for name in ("a/b/c", "../b", "", "a/"):
        with pytest.raises(ConfigError, match="must be MODEL or PUBLISHER/MODEL"):
            model_folder(name)


def test_ollama_gets_weights_that_are_measured_after_quantizing(workplace, llama_cpp):
    result = run("--to", "ollama", "-o", "polite", *llama_cpp)
    assert result.exit_code == 0, result.output
    assert {path.name for path in Path("polite").iterdir()} == {"model.gguf", "Modelfile"}
    shown = lines_of(result)
    kept = float(shown["change"].partition("%")[0])
    assert 98 < kept < 102 and kept != 100
    assert shown["next"] == "ollama create run -f polite/Modelfile"
    text = Path("polite/Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ range')


def test_a_quantization_that_undoes_the_training_is_not_written(workplace, llama_cpp):
    words = ("--to", "ollama", "-o", "polite", "--gguf-type", "q4_0", *llama_cpp)
    result = run(*words)
    assert result.exit_code == 1
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert "polite: the fused model keeps" in line and "use a --gguf-type with more bits" in line
    assert not list(Path().glob("*polite*"))
    forced = run(*words, "--force")
    assert forced.exit_code == 0, forced.output
    kept = float(lines_of(forced)["change"].partition("%")[0])
    assert not 90 < kept < 110  # what the refusal said is what is shown


def test_16_bits_need_no_quantizer(workplace, llama_cpp):
    result = run("--to", "ollama", "-o", "polite", "--gguf-type", "f16", *llama_cpp[:2])
    assert result.exit_code == 0, result.output
    assert len(mx.load("polite/model.gguf")) == len(mx.load("base/model.safetensors"))


def test_a_failing_quantizer_leaves_nothing(workplace, llama_cpp):
    broken = program(workplace / "llama-quantize", "sys.exit('type is not supported')")
    result = run("--to", "ollama", "-o", "polite", *llama_cpp[:2], "--quantizer", broken)
    assert result.exit_code == 1
    assert "llama-quantize cannot quantize the model to q8_0 (type is not supported)" in (
        result.stderr
    )
    assert not list(Path().glob("*polite*"))


def test_a_chat_template_of_another_kind_is_refused_before_any_work(workplace, llama_cpp):
    Path("base/chat_template.jinja").write_text("{{ messages[-1].content }}")
    result = run("--to", "ollama", "-o", "polite", *llama_cpp)
    assert result.exit_code == 1
    assert "its chat template does more than put fixed text around messages" in result.stderr
    assert "Scoring" not in result.stderr


def test_the_adapter_alone_for_a_model_of_ollama(workplace):
    result = run("--to", "ollama", "-o", "polite", "--ollama-base", "llama3.2", "--name", "p")
    assert result.exit_code == 0, result.output
    assert Path("polite/Modelfile").read_text() == "FROM llama3.2\nADAPTER ./adapter\n"
    weights = Path("polite/adapter/model.safetensors").read_bytes()
    assert weights == Path("run/adapter_model.safetensors").read_bytes()
    assert Path("polite/adapter/adapter_config.json").is_file()
    assert lines_of(result)["next"] == "ollama create p -f polite/Modelfile"
    assert "not measured" in lines_of(result)["note"]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("base/config.json", {"model_type": "qwen3"}, "model type `qwen3`; it takes LoRA of llama"),
        ("run/adapter_config.json", {"use_dora": True}, r"\(DoRA;"),
        ("run/adapter_config.json", {"use_rslora": True}, r"\(rank-stabilized LoRA;"),
        ("run/adapter_config.json", {"rank_pattern": {"x": 4}}, r"\(several ranks;"),
    ],
)
def test_an_adapter_that_ollama_would_apply_wrongly_is_refused(workplace, file, change, message):
    edit(file, **change)
    result = run("--to", "ollama", "-o", "polite", "--ollama-base", "llama3.2")
    assert result.exit_code == 1 and not Path("polite").exists()
    assert re.search(message, result.stderr), result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-o", "x", "--name", "y"), "`--name` has no effect with `--to mlx`"),
        (("-o", "x", "--gguf-type", "f16"), "`--gguf-type` has no effect"),
        (("-o", "x", "--to", "ollama", "--bits", "4"), "with `--to ollama`: use --gguf-type"),
        (("-o", "x", "--to", "hf", "--ollama-base", "m"), "`--ollama-base` has no effect"),
        (
            ("-o", "x", "--to", "ollama", "--ollama-base", "m", "--gguf-type", "f16"),
            "`--gguf-type` has no effect with --ollama-base",
        ),
        (("--to", "lmstudio", "-o", "x", "--name", "y"), "`--name` has no effect with --output"),
        (("--to", "ollama"), "missing --output"),
    ],
)
def test_options_without_effect_are_refused(workplace, words, message):
    result = run(*words)
    assert result.exit_code in (1, 2) and message in result.stderr
