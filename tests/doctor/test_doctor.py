"""Each fault a device could have is seen by the check that is there for it."""

import json
import platform
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_dpo.cli.doctor import _print_check, doctor
from mlx_dpo.doctor import checks, float64
from mlx_dpo.doctor.checks import Check, self_test
from mlx_dpo.doctor.machine import anonymous
from mlx_dpo.scoring.score_pairs import score_pairs

PLAIN = {f"log-probabilities, {base} base" for base in ("float32", "bfloat16", "float16")}
PACKED = {f"log-probabilities, {base} base" for base in ("4-bit", "8-bit")}
LOGPS = PLAIN | PACKED
ROUNDED_MOST = {"log-probabilities, bfloat16 base"}  # where an error of 2 % is lost in rounding
PLAIN_GRADIENTS = {"adapter gradients, float32 base"}
PACKED_GRADIENTS = {f"adapter gradients, {bits}-bit base" for bits in (4, 8)}
GRADIENTS = PLAIN_GRADIENTS | PACKED_GRADIENTS
FIRST, LOWERS, SAVED = (
    "first loss is log 2",
    "an update lowers the loss",
    "saved adapters give the same logits",
)


def failed() -> set[str]:
    return {check.name for check in self_test() if not check.ok}


RESULTS = {}


@pytest.fixture(autouse=True)
def cached_float64_model(monkeypatch):
    """Cache the NumPy model's results, which most tests share; they took half of the time."""
    exact = float64.completion_logps

    def cached(weights, args, scale, batch):
        arrays = [*weights.values(), np.array(batch.tokens), np.array(batch.completion_mask)]
        key = hash(tuple(array.tobytes() for array in arrays))
        if key not in RESULTS:
            RESULTS[key] = exact(weights, args, scale, batch)
        return RESULTS[key]

    monkeypatch.setattr(float64, "completion_logps", cached)


def test_this_machine_passes():
    done = list(self_test())
    assert [check for check in done if not check.ok] == []
    assert {check.name for check in done} == LOGPS | GRADIENTS | {FIRST, LOWERS, SAVED}


def test_matrix_products_with_small_errors_fail(monkeypatch):
    exact = nn.Linear.__call__
    monkeypatch.setattr(nn.Linear, "__call__", lambda self, x: exact(self, x) * 1.02)
    assert failed() == PLAIN - ROUNDED_MOST | PLAIN_GRADIENTS


def test_a_wrong_quantized_product_fails_on_quantized_bases_only(monkeypatch):
    exact = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", lambda *a, **k: exact(*a, **k) * 1.02)
    assert failed() == PACKED | PACKED_GRADIENTS


def test_a_product_that_is_wrong_with_8_bits_only_fails(monkeypatch):
    exact = mx.quantized_matmul

    def product(*args, bits, **more):
        return exact(*args, bits=bits, **more) * (1.2 if bits == 8 else 1)

    monkeypatch.setattr(mx, "quantized_matmul", product)
    assert failed() == {"log-probabilities, 8-bit base", "adapter gradients, 8-bit base"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_attention_that_is_wrong_in_one_16_bit_dtype_fails(monkeypatch, dtype):
    exact = mx.fast.scaled_dot_product_attention

    def attention(q, *args, **more):
        wrong = q.dtype == getattr(mx, dtype)
        return exact(q, *args, **more) * (1.3 if wrong else 1)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    assert failed() == {f"log-probabilities, {dtype} base"}


def test_attention_that_is_wrong_beyond_32_positions_fails_on_every_device(monkeypatch):
    exact = mx.fast.scaled_dot_product_attention

    def attention(q, *args, **more):
        far = (mx.arange(q.shape[-2]) >= 32)[:, None]
        out = exact(q, *args, **more)
        return mx.where(far, out * 1.3, out)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(checks, "LOGPS_LIMITS", {"cpu": max(checks.LOGPS_LIMITS.values())})
    assert failed() == LOGPS


def test_the_long_row_needs_several_blocks_of_every_kernel():
    assert max(len(pair) for pair in checks.LONG_PAIRS) > 128


def test_attention_without_a_causal_mask_fails(monkeypatch):
    exact = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(
        mx.fast,
        "scaled_dot_product_attention",
        lambda *args, mask, **more: exact(*args, mask=None, **more),
    )
    assert failed() == LOGPS | GRADIENTS


def test_a_lost_gradient_fails(monkeypatch):
    exact = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(
        mx.fast,
        "scaled_dot_product_attention",
        lambda q, k, v, **more: exact(q, mx.stop_gradient(k), v, **more),
    )
    assert failed() == GRADIENTS


def test_wrong_positions_fail(monkeypatch):
    exact = mx.fast.rope
    monkeypatch.setattr(mx.fast, "rope", lambda *a, base, **more: exact(*a, base=1000.0, **more))
    assert failed() == LOGPS | GRADIENTS


def test_attention_that_differs_under_differentiation_fails_the_first_loss(monkeypatch):
    """The reference is scored without gradients: another kernel there is another model."""
    exact = score_pairs

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


def test_a_missing_update_fails(monkeypatch):
    monkeypatch.setattr(optim.AdamW, "apply_single", lambda self, g, p, state: p)
    assert failed() == {LOWERS}


def test_weights_that_are_rounded_when_saved_fail(monkeypatch):
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
    assert len(lines) == len(PACKED | PACKED_GRADIENTS)
    assert all("[metal] Command buffer execution failed and more (limit" in line for line in lines)


@pytest.mark.parametrize(("measured", "state"), [(1.0, "ok    "), (3.0, "FAILED")])
def test_a_check_is_printed_without_escape_codes_in_a_log(capsys, measured, state):
    _print_check(Check("some check", measured, 2.0))
    shown = capsys.readouterr().out
    assert shown == f"  {state} {'some check':<40} {measured:.1e} (limit 2)\n"


def test_nan_is_not_ok():
    assert not Check("some check", float("nan"), 1.0).ok
    assert not Check("some check", 2.0, 1.0).ok
    assert Check("some check", 1.0, 1.0).ok


def test_json_is_complete_and_has_no_personal_data(monkeypatch, tmp_path):
    home = tmp_path / "home-of-alice"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "caches"))
    monkeypatch.delenv("MLX_DPO_CACHE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(checks, "measure_logps_error", lambda *base: float("nan"))
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


def test_the_hub_token_is_only_shown_as_present(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("mlx_dpo.doctor.checks.self_test", lambda: iter(()))
    result = CliRunner().invoke(doctor)
    assert result.exit_code == 0
    assert "Hub token  yes" in result.output
    assert "hf_secret" not in result.output


def test_paths_are_shown_relative_to_home_or_by_their_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    assert anonymous(tmp_path / "alice" / ".cache" / "models") == "~/.cache/models"
    assert anonymous(tmp_path / "bob" / "models") == "models"
    assert anonymous(tmp_path / "alice-and-bob" / "models") == "models"
