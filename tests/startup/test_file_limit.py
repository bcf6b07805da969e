"""mlx-lm is imported where the hard limit of open files is low."""

import resource
import subprocess
import sys

import pytest

from mlx_dpo.startup import file_limit


@pytest.mark.parametrize(
    ("requested", "expected"),
    [((2048, 4096), (64, 64)), ((32, 4096), (32, 64)), ((resource.RLIM_INFINITY,) * 2, (64, 64))],
)
def test_a_request_over_the_hard_limit_stops_at_it(monkeypatch, requested, expected):
    calls = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 64))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: calls.append((kind, limits)))
    file_limit.keep_low_file_limit()
    resource.setrlimit(resource.RLIMIT_NOFILE, requested)
    resource.setrlimit(resource.RLIMIT_CPU, (2048, 4096))
    assert calls == [(resource.RLIMIT_NOFILE, expected), (resource.RLIMIT_CPU, (2048, 4096))]


def test_nothing_changes_where_the_limit_is_high(monkeypatch):
    before = resource.setrlimit
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, resource.RLIM_INFINITY))
    file_limit.keep_low_file_limit()
    assert resource.setrlimit is before


def test_the_package_imports_mlx_lm_under_a_low_limit():
    program = (
        "import resource, mlx_dpo.startup.file_limit as f;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); f.keep_low_file_limit();"
        "import mlx_lm.utils; print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert output.strip() == "(64, 64)"
