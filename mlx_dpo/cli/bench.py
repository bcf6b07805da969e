"""`mlx-dpo bench`: measure how fast this machine trains, as a table for an issue."""

import os
from datetime import date
from typing import Any

import click

from mlx_dpo.cli.command import Command
from mlx_dpo.cli.output import echo, echo_json
from mlx_dpo.config.model import BITS
from mlx_dpo.errors import ConfigError

SHAPES = ("smollm2-135m", "tiny")  # importing their sizes imports MLX
BUSY_LOAD = 0.3  # load average per CPU core above which other programs slow the machine down
DEFAULT_SECONDS = 120.0


@click.command(
    cls=Command,
    examples=(
        "mlx-dpo bench",
        "mlx-dpo bench mlx-community/SmolLM2-135M-Instruct",
        "mlx-dpo bench --json > bench.json",
    ),
)
@click.argument("source", metavar="[MODEL]", required=False)
@click.option(
    "--shape",
    type=click.Choice(SHAPES),
    help="Shape of the model with random weights, if MODEL is not given.",
    show_default=SHAPES[0],
)
@click.option(
    "--bits",
    type=click.Choice([str(bits) for bits in BITS]),
    help="Quantize the weights to this many bits.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=DEFAULT_SECONDS,
    metavar="SECONDS",
    help="Approximate duration of the benchmark.",
    show_default=True,
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(
    source: str | None, shape: str | None, bits: str | None, seconds: float, as_json: bool
) -> None:
    """Measure how fast this machine trains, and print a table for an issue.

    MODEL is a folder, or a Hub id in the Hub's cache; nothing is downloaded. Without it, a model
    with random weights is measured. All passes go through the scorer and the loop of `train`.
    `products` are matrix products in the model's dtype: their speed is the limit that passes are
    compared with. Close other programs first.
    """
    if source is not None and shape is not None:
        raise ConfigError("`shape` has no effect together with MODEL")
    machine = machine_facts()

    from mlx_dpo.config.dpo_config import DPOConfig
    from mlx_dpo.models.device import device_kind
    from mlx_dpo.profiling.bench.measure import BenchSettings, measure
    from mlx_dpo.profiling.bench.table import bench_table
    from mlx_dpo.runs.auto_batch_size import SIZES
    from mlx_dpo.runs.build import make_dataset_scorer

    settings = BenchSettings(
        source, shape or SHAPES[0], None if bits is None else int(bits), seconds
    )
    config = DPOConfig(micro_batch_size=SIZES[device_kind()][0])
    figures = measure(settings, config=config, make_scorer=make_dataset_scorer)
    if as_json:
        echo_json({**machine, **figures.to_dict()}, indent=2)
        return
    echo(bench_table(machine, figures.to_dict()))


def machine_facts() -> dict[str, Any]:
    """Return date, versions, device, memory and load of this machine, without personal data."""
    load = os.getloadavg()[0]

    import mlx.core as mx

    from mlx_dpo.doctor.accelerators import find_neural_accelerators
    from mlx_dpo.doctor.machine import memory, versions
    from mlx_dpo.models.device import device_kind

    cores = os.cpu_count() or 1
    return {
        "date": date.today().isoformat(),
        "versions": versions(),
        "machine": {
            "device": device_kind(),
            "name": mx.device_info(mx.default_device()).get("device_name"),
            "cores": cores,
            "memory": memory()["physical"],
            "neural_accelerators": find_neural_accelerators().usable,
            "load": round(load, 2),
            "is_busy": load > BUSY_LOAD * cores,
        },
    }
