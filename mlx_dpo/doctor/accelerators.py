"""Tell whether MLX can use the neural accelerators (NAX) in the GPU of newer Apple chips.

NAX are matrix units in the cores of Apple GPUs from the M5 on. MLX has kernels for them since 0.30,
and no function in Python that tells whether it takes them. The rules here are read from MLX's
sources and issues; no machine with NAX was at hand to test them.

Sources: `is_nax_available` in mlx/backend/metal/device.cpp; `use_nax` in matmul.cpp;
MLX_METAL_NO_NAX in kernels/CMakeLists.txt; ml-explore/mlx#3622 and #4525 (build for macOS 26.2).
"""

import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_dpo.models.device import DeviceKind, device_kind

FIRST_MACOS = (26, 2)
FIRST_WHEEL = 26  # macOS version in the tag of the first wheel that is built for macOS 26.2
FIRST_GENERATION, FIRST_PHONE_GENERATION = 17, 18  # of the GPU; phones' names end with `p`
WHEEL = "mlx-metal"


class NeuralAccelerators(NamedTuple):
    """Whether MLX can use neural accelerators, and why; None if it is not known."""

    usable: bool | None
    reason: str

    def describe(self) -> str:
        """Return the answer and its reason as one line."""
        answer = {True: "yes", False: "no", None: "unknown"}[self.usable]
        return f"{answer}: {self.reason}"


def find_neural_accelerators() -> NeuralAccelerators:
    """Tell whether MLX can use neural accelerators on this machine."""
    return judge_neural_accelerators(
        device_kind(),
        mx.device_info(mx.default_device()),
        macos=platform.mac_ver()[0],
        wheel=_read_wheel_tags(),
        variables=os.environ,
    )


def judge_neural_accelerators(
    kind: DeviceKind,
    info: Mapping[str, Any],
    *,
    macos: str,
    wheel: str | None,
    variables: Mapping[str, str],
) -> NeuralAccelerators:
    """Tell whether MLX can use neural accelerators on a device.

    Args:
        kind: kind of MLX's device.
        info: what `mx.device_info` returns for it; only `architecture` is read.
        macos: version of macOS, such as `26.2`; empty on another system.
        wheel: metadata of the installed wheel with its tags, such as `macosx_26_0_arm64`; None if
            MLX was not installed from a wheel.
        variables: environment variables.
    """
    if kind != "metal":
        return NeuralAccelerators(False, f"only Apple GPUs have them; the device is {kind.upper()}")
    name = variables.get("MLX_METAL_GPU_ARCH") or str(info.get("architecture", ""))
    generation = re.fullmatch(r".*?(\d{2})([a-z])", name)
    if generation is None:
        return NeuralAccelerators(None, f"the GPU's architecture is `{name}`, without a generation")
    is_phone = generation[2] == "p"
    first = FIRST_PHONE_GENERATION if is_phone else FIRST_GENERATION
    if int(generation[1]) < first:
        return NeuralAccelerators(
            False,
            f"GPU generation {generation[1]} ({name}) has none; they came with {first} (M5)",
        )
    if _version(macos) < FIRST_MACOS:
        return NeuralAccelerators(False, f"they need macOS 26.2, found {macos}; update macOS")
    return _judge_build(name, wheel, variables)


def _judge_build(name: str, wheel: str | None, variables: Mapping[str, str]) -> NeuralAccelerators:
    """Tell whether the installed MLX has kernels for the neural accelerators of a GPU."""
    built_for = re.search(r"macosx_(\d+)_", wheel or "")
    if built_for is None:
        return NeuralAccelerators(
            None, "MLX is not from a wheel; a build has them if its target was macOS 26.2 or later"
        )
    if int(built_for[1]) < FIRST_WHEEL:
        return NeuralAccelerators(
            False,
            f"MLX's wheel is built for macOS {built_for[1]}; reinstall it "
            "(`pip install --force-reinstall mlx mlx-metal`)",
        )
    reason = f"{name}, macOS 26.2 or later, MLX's wheel for macOS {built_for[1]}"
    if variables.get("MLX_ENABLE_TF32") == "0":
        reason += "; not for float32 (MLX_ENABLE_TF32=0)"
    return NeuralAccelerators(True, f"{reason} (by MLX's rules, unmeasured)")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _read_wheel_tags() -> str | None:
    """Return the metadata of the wheel from which MLX's Metal backend was installed, or None."""
    try:
        return distribution(WHEEL).read_text("WHEEL")
    except PackageNotFoundError:
        return None
