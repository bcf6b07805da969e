"""What ranks are told before a run begins."""

import logging
from types import SimpleNamespace

import pytest

from mlx_dpo import DPOConfig
from mlx_dpo.runs.distributed.handshake import check_run_settings
from mlx_dpo.runs.distributed.peers import Peers


def equal_ranks(size):
    """Return ranks that all have the values of this one."""
    return SimpleNamespace(
        is_alone=False, is_main=True, size=size, all_gather_json=lambda name, value: [value] * size
    )


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (4, []),
        (5, ["5 ranks are more than the 4 pairs of a step (--batch-size), so that in each step "
             "some of them compute no gradient"]),
    ],
)  # fmt: skip
def test_ranks_without_work_are_named(caplog, size, expected):
    config = DPOConfig(model="model", pairs="pairs.jsonl", output="run", batch_size=4)
    run = SimpleNamespace(
        config=config, resume=False, overwrite=False, force=False,
        datasets=SimpleNamespace(splits=[]),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="mlx_dpo"):
        check_run_settings(Peers(equal_ranks(size), [{"host": "mac"}] * size), run)
    assert caplog.messages == expected
