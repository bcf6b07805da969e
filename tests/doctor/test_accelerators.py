"""Neural accelerators: MLX's rules for GPU, macOS and the installed wheel, on faked devices."""

import platform
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_dpo.cli.doctor import doctor
from mlx_dpo.doctor import accelerators
from mlx_dpo.doctor.accelerators import find_neural_accelerators, judge_neural_accelerators

WHEEL_26, WHEEL_15 = (f"Tag: py3-none-macosx_{n}_0_arm64\n" for n in (26, 15))


def judge(architecture="applegpu_g17g", macos="26.2", wheel=WHEEL_26, kind="metal", **variables):
    info = {"architecture": architecture}
    return judge_neural_accelerators(kind, info, macos=macos, wheel=wheel, variables=variables)


@pytest.mark.parametrize(
    ("machine", "usable", "reason"),
    [
        ({}, True, "applegpu_g17g, macOS 26.2 or later, MLX's wheel for macOS 26"),
        ({"architecture": "applegpu_g17s", "macos": "27.0.1"}, True, "unmeasured"),
        ({"architecture": "applegpu_g16s"}, False, "GPU generation 16 (applegpu_g16s) has none"),
        ({"architecture": "applegpu_g17p"}, False, "they came with 18"),
        ({"architecture": "applegpu_g18p"}, True, "applegpu_g18p"),
        ({"macos": "26.1"}, False, "they need macOS 26.2, found 26.1"),
        ({"macos": "26.10"}, True, "unmeasured"),
        ({"macos": "15.7.1"}, False, "found 15.7.1"),
        ({"wheel": WHEEL_15}, False, "MLX's wheel is built for macOS 15; reinstall it"),
        ({"wheel": None}, None, "MLX is not from a wheel"),
        ({"architecture": "Apple M5"}, None, "`Apple M5`, without a generation"),
        ({"kind": "cpu"}, False, "the device is CPU"),
        ({"kind": "cuda"}, False, "the device is CUDA"),
        ({"MLX_METAL_GPU_ARCH": "applegpu_g13s"}, False, "generation 13"),
        ({"MLX_ENABLE_TF32": "0"}, True, "not for float32 (MLX_ENABLE_TF32=0)"),
        ({"MLX_ENABLE_TF32": "1"}, True, "wheel for macOS 26 (by"),
    ],
)
def test_mlx_s_rules(machine, usable, reason):
    found = judge(**machine)
    assert found.usable is usable
    assert reason in found.reason


def test_facts_come_from_the_device_the_system_and_the_wheel(monkeypatch):
    info = {"architecture": "applegpu_g17s"}
    monkeypatch.setattr(mx, "device_info", lambda device: info)
    monkeypatch.setattr(platform, "mac_ver", lambda: ("26.3", ("", "", ""), "arm64"))
    monkeypatch.setattr(accelerators, "device_kind", lambda: "metal")
    wheel = SimpleNamespace(read_text={"WHEEL": WHEEL_26}.get)
    monkeypatch.setattr(accelerators, "distribution", {"mlx-metal": wheel}.get)
    assert find_neural_accelerators().usable is True
    info["architecture"] = "applegpu_g15s"
    assert find_neural_accelerators().usable is False


def test_without_the_wheel_nothing_fails(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(accelerators, "distribution", absent)
    monkeypatch.setattr(accelerators, "device_kind", lambda: "metal")
    monkeypatch.setattr(mx, "device_info", lambda device: {"architecture": "applegpu_g17s"})
    monkeypatch.setattr(platform, "mac_ver", lambda: ("26.3", ("", "", ""), "arm64"))
    assert find_neural_accelerators().usable is None


def test_doctor_shows_the_answer_in_one_line(monkeypatch):
    monkeypatch.setattr("mlx_dpo.doctor.checks.self_test", lambda: iter(()))
    monkeypatch.setattr(accelerators, "device_kind", lambda: "cpu")
    lines = CliRunner().invoke(doctor).output.splitlines()
    [line] = [line for line in lines if line.startswith("NAX")]
    assert line == "NAX        no: only Apple GPUs have them; the device is CPU"
