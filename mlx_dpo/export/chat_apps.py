"""Fuse a run for programs that people chat with: LM Studio and Ollama."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.config.model import DEFAULT_GGUF_TYPE
from mlx_dpo.data.chat_templates.template_date import set_day
from mlx_dpo.data.tokenization.special_tokens import stop_tokens
from mlx_dpo.errors import ConfigError, ModelError, RunError
from mlx_dpo.export.fuse import FusedModel, fuse_run
from mlx_dpo.export.gguf import (
    find_gguf_converter,
    find_quantizer,
    quantize_gguf,
    write_gguf,
    write_rounded_checkpoint,
)
from mlx_dpo.export.lmstudio import model_folder
from mlx_dpo.export.modelfile import make_modelfile, translate_chat_template
from mlx_dpo.export.options import FuseOptions
from mlx_dpo.export.retention import Retention, RetentionError, check_retention
from mlx_dpo.io.atomic import write_file
from mlx_dpo.io.bounded import read_json
from mlx_dpo.models.download import resolve_model
from mlx_dpo.models.files import CONFIG
from mlx_dpo.models.load import load_model, load_tokenizer
from mlx_dpo.models.output_folder import check_output_folder, disk_errors, new_output_folder
from mlx_dpo.phases import phase
from mlx_dpo.saved_runs.open import OpenRun, open_run

LMSTUDIO_BITS = 8  # tried first
GGUF, MODELFILE, ADAPTER = "model.gguf", "Modelfile", "adapter"
F16 = "f16"
PLAIN_TEXT = f'FROM ./{GGUF}\nTEMPLATE """{{{{ .Prompt }}}}"""\n'  # without a chat template
# Model types whose LoRA adapters Ollama converts (its source, convert/convert.go, August 2026).
OLLAMA_ADAPTERS = ("llama", "mistral", "gemma2")
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Ollama looks for `model*.safetensors` in the folder of an adapter, so PEFT's name is not found.
OLLAMA_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class OllamaModel:
    """A folder for `ollama create`."""

    folder: Path
    name: str  # of the model in Ollama
    kind: str  # GGUF type, or `adapter`
    bytes: int
    fused: FusedModel | None  # what the GGUF file was made of; None for an adapter
    retention: Retention | None  # of the quantized weights; None if they were not measured

    @property
    def command(self) -> str:
        """The command that brings the model into Ollama."""
        return f"ollama create {self.name} -f {self.folder / MODELFILE}"


def fuse_for_lmstudio(folder: str, output: Path | None, options: FuseOptions) -> FusedModel:
    """Fuse a run into LM Studio's models folder, in 8 bits if that retains enough of the training.

    Args:
        folder: the run.
        output: folder to write; by default `PUBLISHER/NAME` in LM Studio's models folder.
        options: if `bits` is None, 8 bits are tried first, then the dtype of the model.

    Raises:
        ConfigError: LM Studio's models folder is not found, or an option has no effect.
        Further errors are those of `fuse_run`.
    """
    if output is None:
        output = model_folder(options.name or _run_name(folder))
    elif options.name is not None:
        raise ConfigError("`--name` has no effect with --output; the folder's name is used")
    options = replace(options, to="mlx", name=None)
    if options.bits is not None or options.dtype is not None:
        return fuse_run(folder, output, options)
    try:
        return fuse_run(folder, output, replace(options, bits=LMSTUDIO_BITS))
    except RetentionError as error:
        note = f"not quantized, because 8 bits do not keep the training ({error})"
    fused = fuse_run(folder, output, options)
    return replace(fused, notes=(*fused.notes, note))


def fuse_for_ollama(folder: str, output: Path, options: FuseOptions) -> OllamaModel:
    """Write a folder with a GGUF file and a Modelfile, from which Ollama creates a model.

    The Hugging Face checkpoint is fused, converted to GGUF in float16 and quantized by llama.cpp.
    The quantized weights are measured like any fused model.

    Raises:
        ConfigError: llama.cpp's programs are not found, or an option has no effect.
        ModelError: the chat template cannot be translated, llama.cpp refuses the model, or too
            little of the training is retained and `force` is not set.
    """
    opened = open_run(folder)
    name = options.name or _run_name(folder)
    if options.ollama_base is not None:
        return _write_ollama_adapter(opened, output, name, options.ollama_base)
    converter = find_gguf_converter(options.converter)
    gguf_type = options.gguf_type or DEFAULT_GGUF_TYPE
    quantizer = None if gguf_type == F16 else find_quantizer(options.quantizer)
    check_output_folder(output, 0)
    modelfile = _modelfile(opened)
    to_hf = replace(
        options, to="hf", name=None, gguf_type=None, quantizer=None, converter=None, gguf=None
    )
    with new_output_folder(output) as partial, TemporaryDirectory(dir=partial) as work:
        checkpoint, plain = Path(work) / "checkpoint", Path(work) / "f16.gguf"
        fused = fuse_run(folder, checkpoint, to_hf)
        with phase(f"Writing {output / GGUF}"):
            write_gguf(converter, checkpoint, plain, outtype=F16)
            if quantizer is None:
                shutil.move(plain, partial / GGUF)
            else:
                quantize_gguf(quantizer, plain, partial / GGUF, gguf_type)
        retention = fused.retention
        if quantizer is not None:
            rounded = Path(work) / "rounded"
            rounded.mkdir()
            write_rounded_checkpoint(rounded, checkpoint, plain, partial / GGUF)
            written = load_model(str(rounded), trust_remote_code=opened.config.trust_remote_code)
            retention = fused.meter.measure(written)
            if not options.force:
                check_retention(
                    output,
                    retention,
                    min_retained=options.min_retained,
                    advice="use a --gguf-type with more bits",
                )
        write_file(partial / MODELFILE, modelfile)
        size = (partial / GGUF).stat().st_size
    return OllamaModel(output, name, gguf_type, size, fused, retention)


def _modelfile(opened: OpenRun) -> str:
    """Return the Modelfile for a run's merged model.

    Raises:
        ModelError: the chat template cannot be translated.
    """
    config = opened.config
    path = _base_folder(config)
    tokenizer = load_tokenizer(path, config.model, trust_remote_code=config.trust_remote_code)
    set_day(tokenizer, opened.day)
    if opened.trained_on_text:
        return PLAIN_TEXT
    marks = translate_chat_template(tokenizer, config.model, thinking=bool(config.thinking))
    stop = tokenizer.convert_ids_to_tokens(sorted(stop_tokens(tokenizer)))
    return make_modelfile(f"./{GGUF}", marks, system=config.system, stop=stop)


def _write_ollama_adapter(opened: OpenRun, output: Path, name: str, base: str) -> OllamaModel:
    """Write the run's PEFT adapter and a Modelfile that applies it to Ollama's model `base`.

    Raises:
        ModelError: Ollama does not convert such an adapter.
        RunError: the run has no files in PEFT's format.
    """
    folder = opened.paths.folder
    kind = read_json(_base_folder(opened.config) / CONFIG, ModelError).get("model_type")
    if not (folder / PEFT_WEIGHTS).is_file():
        raise RunError(
            f"{folder}: the adapter is not in PEFT's format, which Ollama reads; run "
            f"`mlx-dpo export {folder}`"
        )
    settings = read_json(folder / PEFT_CONFIG, RunError)
    refused = [
        text
        for is_so, text in (
            (kind not in OLLAMA_ADAPTERS, f"model type `{kind}`"),
            (settings.get("use_dora"), "DoRA"),
            (settings.get("use_rslora"), "rank-stabilized LoRA"),
            (settings.get("rank_pattern") or settings.get("alpha_pattern"), "several ranks"),
        )
        if is_so
    ]
    if refused:
        raise ModelError(
            f"{folder}: Ollama does not apply this adapter ({', '.join(refused)}; it takes LoRA of "
            f"{', '.join(OLLAMA_ADAPTERS)}); leave out --ollama-base to merge it"
        )
    modelfile = make_modelfile(
        base, None, system=opened.config.system, stop=(), adapter=f"./{ADAPTER}"
    )
    size = (folder / PEFT_WEIGHTS).stat().st_size
    check_output_folder(output, size)
    with new_output_folder(output) as partial, disk_errors(output):
        (partial / ADAPTER).mkdir()
        shutil.copyfile(folder / PEFT_CONFIG, partial / ADAPTER / PEFT_CONFIG)
        shutil.copyfile(folder / PEFT_WEIGHTS, partial / ADAPTER / OLLAMA_WEIGHTS)
        write_file(partial / MODELFILE, modelfile)
    return OllamaModel(output, name, "adapter", size, None, None)


def _base_folder(config: DPOConfig) -> Path:
    return resolve_model(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )


def _run_name(folder: str) -> str:
    """Return the name of the model in the program: that of the run's folder."""
    return Path(folder).resolve().name
