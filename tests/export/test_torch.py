"""What is written here, in torch: `scripts/test --torch PYTHON` says which Python has it.

The gate does without: there, test_layouts.py holds the same files against what PEFT wrote.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.adapters.adapter_files import add_peft_files, load_adapter, save_adapter
from mlx_dpo.adapters.hf_checkpoint import local_checkpoint
from mlx_dpo.adapters.hf_names import SAME_LAYOUT, make_peft_adapter
from mlx_dpo.adapters.targets import linear_names
from mlx_dpo.errors import ModelError
from mlx_dpo.export.model_folder import merged_tensors, write_hf
from mlx_dpo.hub.run_card import make_run_card
from mlx_dpo.models.load import load_lazy_model
from tests.adapters.test_hf_names import GOLDEN, TOKENS, opened
from tests.export.test_fuse import moved
from tests.scoring import architectures
from tests.trained_run import GOLDENS

PYTHON = os.environ.get("MLX_DPO_TORCH")
PROGRAM = Path(__file__).with_name("with_torch.py")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="MLX_DPO_TORCH names no Python with torch")

WAYS = {
    "lora": {},
    "rslora": {"scale": 3 / 2**0.5},
    "dora": {"kind": "dora"},
    "last-layers": {"num_layers": 2},
}
KINDS = list(GOLDEN["logits"])
LIKE = {"mistral": "llama"}  # as mlx-lm builds them
OTHERS = {"mixtral": {"target_modules": ["q_proj", "v_proj"]}}


@pytest.fixture(scope="module")
def torch():
    """Asks the other Python, which loads its libraries once."""
    with subprocess.Popen(
        [PYTHON, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def ask(*words):
            process.stdin.write(json.dumps(words, default=str) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            assert not (isinstance(answer, dict) and answer.keys() == {"error"}), answer
            return answer

        yield ask


def logits(torch, *words):
    return np.array(torch(*words, GOLDEN["tokens"]))


def trained(kind, way):
    model, entries, checkpoint = opened(kind)
    return moved(model, **(WAYS[way] | OTHERS.get(kind, {}))), entries, checkpoint


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_peft_computes_the_same_logits(torch, kind, way, tmp_path):
    model, entries, checkpoint = trained(kind, way)
    save_adapter(tmp_path, model, adapters.make_adapter_config(model))
    add_peft_files(tmp_path, *make_peft_adapter(model, entries, checkpoint, rslora=way == "rslora"))
    found = logits(torch, "adapter", GOLDENS / kind, tmp_path)
    np.testing.assert_allclose(found, model(TOKENS)[0], atol=1e-4)
    again, _, _ = opened(kind)
    assert np.abs(np.array(again(TOKENS)[0]) - found).max() > 1e-2
    (tmp_path / "adapters.safetensors").unlink()
    load_adapter(again, tmp_path)
    np.testing.assert_allclose(again(TOKENS)[0], found, atol=1e-4)


def test_a_head_and_a_table_of_its_own_too(torch, tmp_path):
    model, entries, checkpoint = opened("llama")
    model = moved(model, target_modules=["embed_tokens", "lm_head", "q_proj"])
    save_adapter(tmp_path, model, adapters.make_adapter_config(model))
    add_peft_files(tmp_path, *make_peft_adapter(model, entries, checkpoint))
    found = logits(torch, "adapter", GOLDENS / "llama", tmp_path)
    np.testing.assert_allclose(found, model(TOKENS)[0], atol=1e-4)


def built(torch, kind, folder):
    """A random model of an architecture, made by transformers, as mlx-lm opens it."""
    entries = architectures.config(LIKE.get(kind, kind)) | {"model_type": kind}
    if kind in ("llama", "mistral"):  # in transformers these know no windows by layer
        del entries["layer_types"], entries["sliding_window"]
    torch("make", entries, folder)
    written = json.loads((folder / "config.json").read_text())
    # Of what transformers leaves out mlx-lm wants some; positions are as transformers says.
    more = {name: value for name, value in entries.items() if "rop" not in name.lower()}
    (folder / "config.json").write_text(json.dumps(more | written))
    model, entries = load_lazy_model(folder, kind, trust_remote_code=False)
    return model, entries, local_checkpoint(folder, kind)


def with_counterparts(model, entries, checkpoint):
    """The names of the linear layers that are not refused."""
    for name in linear_names(model):
        adapters.attach_adapters(model, rank=2, scale=2.0, target_modules=[name])
        try:
            make_peft_adapter(model, entries, checkpoint)
        except ModelError:
            continue
        else:
            yield name
        finally:
            adapters.detach_adapters(model)


@pytest.mark.parametrize("kind", sorted(SAME_LAYOUT - {"gpt2"}))
def test_every_architecture_that_is_said_to_be_alike_is(torch, kind, tmp_path):
    model, entries, checkpoint = built(torch, kind, tmp_path / "base")
    names = list(with_counterparts(model, entries, checkpoint))
    assert len(names) >= 3
    model = moved(model, target_modules=names)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", model, adapters.make_adapter_config(model))
    add_peft_files(tmp_path / "adapter", *make_peft_adapter(model, entries, checkpoint))
    found = logits(torch, "adapter", tmp_path / "base", tmp_path / "adapter")
    expected = np.array(model(TOKENS)[0].astype(mx.float32))
    np.testing.assert_allclose(found, expected, atol=5e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["lora", "dora"])
def test_transformers_loads_the_fused_checkpoint(torch, kind, way, tmp_path):
    model, entries, checkpoint = trained(kind, way)
    expected = np.array(model(TOKENS)[0])
    (tmp_path / "fused").mkdir()
    write_hf(tmp_path / "fused", merged_tensors(model, entries, checkpoint), checkpoint)
    np.testing.assert_allclose(logits(torch, "model", tmp_path / "fused"), expected, atol=1e-4)


def test_the_program_of_the_card_runs(torch, workplace):
    made, _ = make_run_card("run", "org/adapter", base="org/base")
    [program] = re.findall(r"```python\n(from peft.*?)```", made.text, re.DOTALL)
    program = program.replace("org/base", "base").replace("org/adapter", "run")
    program = program.replace("max_new_tokens=100", "max_new_tokens=3")
    program = program.replace('"base"', repr(str(workplace / "base")))
    program = program.replace('"run"', repr(str(workplace / "run")))
    assert "<|assistant|>" in torch("run", program)
