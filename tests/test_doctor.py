"""Each fault a device could have is seen by the check that is there for it."""

import json
import platform
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from click.testing import CliRunner

from mlx_dpo.cli.doctor import doctor
from mlx_dpo.doctor import checks
from mlx_dpo.doctor.checks import Check, self_test
from mlx_dpo.doctor.machine import anonymous

LOGPS = {"log-probabilities, float32 base", "log-probabilities, 4-bit base"}
GRADIENTS = {"adapter gradients, float32 base", "adapter gradients, 4-bit base"}
FIRST, LOWERS, SAVED = (
    "first loss is log 2",
    "an update lowers the loss",
    "saved adapters give the same logits",
)


def failed() -> set[str]:
    return {check.name for check in self_test() if not check.ok}


def test_this_machine_passes():
    done = list(self_test())
    assert [check for check in done if not check.ok] == []
    assert {check.name for check in done} == LOGPS | GRADIENTS | {FIRST, LOWERS, SAVED}


def test_products_a_few_hundredths_off_are_seen(monkeypatch):
    exact = nn.Linear.__call__
    monkeypatch.setattr(nn.Linear, "__call__", lambda self, x: exact(self, x) * 1.02)
    assert failed() == {"log-probabilities, float32 base", "adapter gradients, float32 base"}


def test_a_wrong_quantised_product_is_seen_on_the_quantised_base_only(monkeypatch):
    exact = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", lambda *a, **k: exact(*a, **k) * 1.02)
    assert failed() == {"log-probabilities, 4-bit base", "adapter gradients, 4-bit base"}


def test_attention_that_sees_the_future_is_seen(monkeypatch):
    exact = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(
        mx.fast,
        "scaled_dot_product_attention",
        lambda *args, mask, **more: exact(*args, mask=None, **more),
    )
    assert failed() == LOGPS | GRADIENTS


def test_a_gradient_that_is_lost_is_seen_though_every_value_is_right(monkeypatch):
    exact = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(
        mx.fast,
        "scaled_dot_product_attention",
        lambda q, k, v, **more: exact(q, mx.stop_gradient(k), v, **more),
    )
    assert failed() == GRADIENTS


def test_positions_that_are_off_are_seen(monkeypatch):
    exact = mx.fast.rope
    monkeypatch.setattr(mx.fast, "rope", lambda *a, base, **more: exact(*a, base=1000.0, **more))
    assert failed() == LOGPS | GRADIENTS


def test_attention_that_depends_on_being_differentiated_is_seen_in_the_first_loss(monkeypatch):
    """The reference is scored without gradients: another kernel there is another model."""
    exact = checks.score_pairs

    def scored(policy, pairs, **more):
        with monkeypatch.context() as patch:
            kernel = mx.fast.scaled_dot_product_attention
            patch.setattr(
                mx.fast,
                "scaled_dot_product_attention",
                lambda *args, scale, **more: kernel(*args, scale=scale * 0.9, **more),
            )
            return exact(policy, pairs, **more)

    monkeypatch.setattr(checks, "score_pairs", scored)
    assert failed() == {FIRST}


def test_an_update_that_does_not_arrive_is_seen(monkeypatch):
    monkeypatch.setattr(optim.AdamW, "apply_single", lambda self, g, p, state: p)
    assert failed() == {LOWERS}


def test_weights_rounded_when_saved_are_seen(monkeypatch):
    exact = mx.save_safetensors

    def rounded(path, weights, *metadata):
        half = {k: v.astype(mx.float16).astype(v.dtype) for k, v in weights.items()}
        exact(path, half, *metadata)

    monkeypatch.setattr(mx, "save_safetensors", rounded)
    assert failed() == {SAVED}


def test_a_device_fault_fails_its_checks_and_the_command(monkeypatch):
    def fault(*args, **more):
        raise RuntimeError("[metal] Command buffer execution failed\nand more")

    monkeypatch.setattr(mx, "quantized_matmul", fault)
    result = CliRunner().invoke(doctor)
    assert result.exit_code == 1
    lines = [line for line in result.output.splitlines() if "FAILED" in line]
    assert len(lines) == 2
    assert all("[metal] Command buffer execution failed and more (limit" in line for line in lines)


def test_what_is_not_a_number_is_not_ok():
    assert not Check("some check", float("nan"), 1.0).ok
    assert not Check("some check", 2.0, 1.0).ok
    assert Check("some check", 1.0, 1.0).ok


def test_json_is_whole_and_names_nobody(monkeypatch, tmp_path):
    home = tmp_path / "home-of-alice"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "caches"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(checks, "logps_error", lambda bits: float("nan"))
    result = CliRunner().invoke(doctor, ["--json"])
    assert result.exit_code == 1

    def refuse(constant):
        raise AssertionError(f"`{constant}` is not JSON")

    report = json.loads(result.output, parse_constant=refuse)
    assert report["ok"] is False
    assert report["hub_token"] is True
    assert report["folders"]["reference_cache"]["path"] == "~/caches/mlx-dpo"
    assert report["versions"]["mlx"] and report["device"]["gflops"] > 0
    for private in ("alice", str(tmp_path), "hf_secret", str(Path.cwd()), platform.node()):
        assert private not in result.output


def test_people_see_the_token_only_as_present(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("mlx_dpo.doctor.checks.self_test", lambda: iter(()))
    result = CliRunner().invoke(doctor)
    assert result.exit_code == 0
    assert "Hub token  yes" in result.output
    assert "hf_secret" not in result.output


def test_paths_keep_what_is_below_home_and_no_more(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    assert anonymous(tmp_path / "alice" / ".cache" / "models") == "~/.cache/models"
    assert anonymous(tmp_path / "bob" / "models") == "models"
    assert anonymous(tmp_path / "alice-and-bob" / "models") == "models"
