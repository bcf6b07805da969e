"""Import mlx-lm where the number of open files has a low hard limit.

mlx-lm sets the limit to 2048 (hard limit 4096) when it is imported. Where the hard limit is lower,
the system refuses to raise it, and the import would fail.
"""

import resource

MLX_LM_HARD_LIMIT = 4096


def keep_low_file_limit() -> None:
    """Make requests for more open files than the hard limit allows stop at the hard limit.

    Call it before mlx-lm is imported. Nothing changes where the hard limit is high enough.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY or hard >= MLX_LM_HARD_LIMIT:
        return
    set_limit = resource.setrlimit

    def set_allowed_limit(kind: int, limits: tuple[int, int]) -> None:
        if kind == resource.RLIMIT_NOFILE:
            soft, upper = (hard if n == resource.RLIM_INFINITY else min(n, hard) for n in limits)
            limits = soft, upper
        set_limit(kind, limits)

    resource.setrlimit = set_allowed_limit
