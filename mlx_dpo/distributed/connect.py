"""Connect this process to the other ranks of its run, once."""

from functools import cache

from mlx_dpo.distributed.ranks import Ranks


@cache
def connect() -> Ranks:
    """Return this process's place among the ranks; the first call connects to the others.

    MLX cannot close a connection, so there is one per process.

    Raises:
        ConfigError: variables are missing, or the other ranks cannot be reached.
    """
    return Ranks.from_environment()
