"""An adapter as it was read from disk, whatever its layout there."""

from dataclasses import dataclass
from pathlib import Path

from mlx_dpo.arrays import Arrays, read_arrays
from mlx_dpo.errors import ModelError, reason
from mlx_dpo.policy.adapters import Way


@dataclass(frozen=True)
class Saved:
    """An adapter that lies in memory; arrays are named as in a policy that has it attached."""

    where: Path  # of the weights
    way: Way
    weights: Arrays
    rank: int = 0
    scale: float = 0.0
    dropout: float = 0.0
    tables: tuple[str, ...] = ()  # whose adapters leave a head that is tied to them alone


def read_weights(path: Path) -> Arrays:
    """The arrays of a file of adapters.

    Raises:
        ModelError: there is no such file, or it is damaged.
    """
    try:
        return read_arrays(path)[0]
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path}: adapters cannot be read ({reason(error)})") from error
