"""The table of a benchmark, as Markdown of at most 80 columns that can be pasted into an issue."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from mlx_dpo.units import format_bytes

LABEL, TEXT = 10, 62  # characters of the columns
DEVICES = {"cpu": "CPU", "metal": "Metal", "cuda": "CUDA"}
PASSES = {"step": "training", "reference": "reference", "evaluation": "evaluation"}

Json = Mapping[str, Any]
Line = tuple[str, str]  # label, text


def bench_table(machine: Json, figures: Json) -> str:
    """Return the table of a benchmark's results.

    Args:
        machine: date, versions and facts of the machine, as in `mlx-dpo bench --json`.
        figures: the other keys of that object.
    """
    lines = [("bench", f"mlx-dpo {machine['versions']['mlx-dpo']}, {machine['date']}")]
    lines += [("-" * LABEL, "-" * TEXT)]
    lines += [*_machine_lines(machine), *_model_lines(figures), *_pass_lines(figures)]
    lines += [*_device_lines(figures), *_share_lines(figures)]
    return "\n".join(row for label, text in lines for row in _rows(label, text))


def _rows(label: str, text: str) -> Iterator[str]:
    """Yield the rows of the table for a line; long texts go on in rows without a label."""
    for part in textwrap.wrap(text, TEXT, break_on_hyphens=False) or [""]:
        yield f"| {label:<{LABEL}} | {part:<{TEXT}} |"
        label = ""


def _machine_lines(machine: Json) -> Iterator[Line]:
    facts, versions = machine["machine"], machine["versions"]
    name = facts["name"] or "name unknown"
    yield "machine", f"{name}, {facts['cores']} CPU cores, {format_bytes(facts['memory'])}"
    yield (
        "system",
        f"{versions['system']}, Python {versions['python']}, mlx {versions['mlx']}, "
        f"mlx-lm {versions['mlx-lm']}",
    )
    accelerators = {True: "with", False: "without", None: "perhaps with"}
    suffix = f", {accelerators[facts['neural_accelerators']]} neural accelerators"
    yield "device", DEVICES[facts["device"]] + suffix * (facts["device"] == "metal")
    busy = ": other programs were running, so the speeds are too low" * facts["is_busy"]
    yield "load", f"{facts['load']:.1f} before the start{busy}"


def _model_lines(figures: Json) -> Iterator[Line]:
    model, shape = figures["model"], figures["pass"]
    bits = "" if model["bits"] is None else f", {model['bits']}-bit weights"
    yield (
        "model",
        f"{model['name']}, {model['parameters'] / 1e6:,.3g} M parameters, "
        f"{model['layers']} layers, {model['dtype']}{bits}",
    )
    at_once = f", {shape['passes_at_once']} passes at once" * (shape["passes_at_once"] > 1)
    if model["notes"]:
        yield "", "; ".join(model["notes"])
    yield "scorer", model["scorer"]
    yield (
        "pairs",
        f"{shape['pairs_per_step']} a step, {shape['pairs_per_pass']} a pass{at_once}; "
        f"prompt {shape['prompt_tokens']}, chosen {shape['chosen_tokens']}, "
        f"rejected {shape['rejected_tokens']} tokens; {shape['layer_tokens_per_step']:,} tokens "
        "through the layers in a step",
    )


def _pass_lines(figures: Json) -> Iterator[Line]:
    for name, label in PASSES.items():
        speed = figures[name]
        seconds = speed["seconds"]
        yield (
            label,
            f"{_number(speed['tokens_per_second'])} tokens/s, "
            f"{_number(speed['pairs_per_second'])} pairs/s, "
            f"{_flops(speed['flops_per_second'])}, "
            f"{speed['share_of_products']:.0%} of products",
        )
        yield "", f"{_number(seconds['median'])} s{_describe_spread(seconds, figures['rounds'])}"
    yield (
        "generation",
        f"{_number(figures['generation']['tokens_per_second'])} tokens/s, one answer",
    )


def _device_lines(figures: Json) -> Iterator[Line]:
    dtype = figures["model"]["dtype"]
    for label, product in zip(("products", ""), figures["products"], strict=True):
        sizes = f"{product['rows']} × {product['inner']} × {product['columns']}"
        yield label, f"{_flops(product['flops'])}: {sizes} in {dtype}"
    copy = figures["copy"]
    yield (
        "copy",
        f"{_number(copy['bytes_per_second'] / 1e9)} GB/s read and written, array of "
        f"{format_bytes(copy['size'])}",
    )
    yield "memory", f"{format_bytes(figures['peak_bytes'])}, the peak of MLX's arrays"


def _share_lines(figures: Json) -> Iterator[Line]:
    shares = figures["time_shares"]
    parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    yield "time", f"{parts} of an epoch"
    label = "sharing"
    for each in figures["sharing"]:
        yield label, f"{each['saved']:.0%} of {each['whole']:,} tokens saved: {each['name']}"
        label = ""


def _describe_spread(seconds: Json, rounds: int) -> str:
    if rounds == 1:
        return ", measured once"
    low, high = _number(seconds["low"]), _number(seconds["high"])
    return f" ({low} to {high}), median of {rounds}"


def _flops(per_second: float) -> str:
    unit, name = (1e12, "TFLOP/s") if per_second >= 1e12 else (1e9, "GFLOP/s")
    return f"{_number(per_second / unit)} {name}"


def _number(value: float) -> str:
    """Format a number with three significant digits, without an exponent."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:.6f}".rstrip("0").rstrip(".")
