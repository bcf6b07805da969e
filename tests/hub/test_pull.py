"""Adapters pulled from a fake Hub with the real `huggingface_hub`."""

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from mlx_dpo.adapters.adapter_files import read_adapter
from mlx_dpo.adapters.hf_checkpoint import hub_checkpoint, local_checkpoint
from mlx_dpo.errors import ModelError
from mlx_dpo.hub.pull import pull_adapter
from mlx_dpo.io.checksums import DIGEST, EDITED
from tests.hub.test_push import NAME, UPLOADED, push_run, run_with_card

__all__ = ["run_with_card"]


def test_a_pushed_adapter_can_be_pulled_and_read(run_with_card, fake_hub):
    push_run()
    fake_hub.repos[NAME]["commits"][-1][1]["evil.py"] = b"print('hello')"
    fake_hub.repos[NAME]["commits"][-1][1]["model.safetensors"] = b"large"
    pulled = pull_adapter(NAME, Path("pulled"))
    assert pulled.base_model == "org/base"
    assert sorted(path.name for path in Path("pulled").iterdir()) == sorted(UPLOADED)
    for name in UPLOADED:
        assert Path("pulled", name).read_bytes() == (run_with_card / "run" / name).read_bytes()
    assert read_adapter(Path("pulled")).fine_tune_type == "lora"
    assert fake_hub.downloaded == set(UPLOADED)


@pytest.mark.parametrize(
    "page",
    [b"no card", b"", b"\xff\xfe", b"---\nbase_model: [\n---\n", b"---\n- a\n---\n",
     b"---\nbase_model: {a: b}\n---\n", b"---\nbase_model: a\ntags: 5\n---\n"],
)  # fmt: skip
def test_an_adapter_with_an_invalid_card_can_be_pulled(run_with_card, fake_hub, page):
    push_run()
    files = fake_hub.repos[NAME]["commits"][-1][1]
    entries = json.loads(files["adapter_config.json"]) | {
        "base_model_name_or_path": "org/other", DIGEST: EDITED,
    }  # fmt: skip
    fake_hub.repos[NAME]["commits"].append(
        ("m", files | {"README.md": page, "adapter_config.json": json.dumps(entries).encode()})
    )
    assert pull_adapter(NAME, Path("pulled")).base_model == "org/other"


def test_an_adapter_that_cannot_be_pulled_is_an_error_without_a_folder(
    run_with_card, fake_hub, monkeypatch
):
    with pytest.raises(ModelError, match="no such repository on the Hub, or no access to it"):
        pull_adapter(NAME, Path("pulled"))
    push_run()
    commits = fake_hub.repos[NAME]["commits"]
    commits.append(("m", commits[0][1] | {"adapters.safetensors": b"not safetensors"}))
    with pytest.raises(ModelError, match=r"^org/adapter/adapters\.safetensors: .*cannot be read"):
        pull_adapter(NAME, Path("pulled"))
    commits.append(("n", {"config.json": b"{}"}))
    with pytest.raises(ModelError, match="org/adapter: not an adapter"):
        pull_adapter(NAME, Path("pulled"))
    Path("taken").mkdir()
    Path("taken/file").touch()
    with pytest.raises(ModelError, match="taken: is not empty"):
        pull_adapter(NAME, Path("taken"))
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ModelError, match=r"the Hub refuses \(401: "):
        pull_adapter(NAME, Path("pulled"))
    assert not Path("pulled").exists() and not list(run_with_card.glob(".pulled*"))


def test_tensor_names_on_the_hub_are_read_from_headers_only(workplace, fake_hub):
    HfApi().create_repo("org/base", private=True)
    data = (workplace / "base/model.safetensors").read_bytes()
    fake_hub.repos["org/base"]["commits"].append(("m", {"model.safetensors": data}))
    found = hub_checkpoint("org/base")
    assert found.shapes == local_checkpoint(workplace / "base", "base").shapes
    assert found.folder is None
    with pytest.raises(ModelError, match="org/none: the names of its tensors cannot be read"):
        hub_checkpoint("org/none")
