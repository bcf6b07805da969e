"""The faster scan of transformers' models finds what transformers' own scan finds."""

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import transformers
from transformers.utils import import_utils

from mlx_dpo.startup.transformers_scan import change_scan, names_reader

MODELS = Path(transformers.__file__).parent / "models"


@pytest.fixture(scope="module")
def unchanged():
    """A second copy of the module, as transformers ships it."""
    spec = spec_from_file_location("transformers.utils.import_utils_copy", import_utils.__file__)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "text",
    [
        "",
        "import os\n",
        '__all__ = ["A"]',
        'import os\n\n__all__ = ["A", "B"]\n\ndef f():\n    return 1\n',
        'import os\n__all__ = [\n    "A",\n    "B",\n]\nx = 1\n',
        'x = 1\n__all__ = ["A"]\n__all__ += ["B"]\n',  # the last one counts
        "x = 1  # __all__\n",
        '    __all__ = ["A"]\n',
        '__all__ = ["A"]\nprint("""\n__all__ of""")\n',
    ],
)
def test_names_are_read_from_the_same_line(text, unchanged):
    try:
        expected = unchanged.fetch__all__(text)
    except IndexError as error:
        with pytest.raises(type(error)):
            names_reader(unchanged.fetch__all__)(text)
    else:
        assert names_reader(unchanged.fetch__all__)(text) == expected


def test_the_scan_of_all_models_is_the_same(unchanged):
    expected = unchanged.define_import_structure(MODELS, prefix="models")
    change_scan(unchanged)
    unchanged.define_import_structure.cache_clear()
    assert unchanged.define_import_structure(MODELS, prefix="models") == expected
    assert len(expected[frozenset()]) > 100


def test_other_versions_of_transformers_are_left_alone():
    module = type(sys)("import_utils")
    change_scan(module)
    assert not hasattr(module, "fetch__all__")


def test_transformers_is_changed_when_it_is_imported():
    program = (
        "import mlx_dpo, sys; assert 'transformers' not in sys.modules; import transformers; "
        "from transformers.utils import import_utils as module; import inspect; "
        "print(module.fetch__all__.__module__, inspect.getsource(module)[:3] != '', "
        "module.create_import_structure_from_path.cache_parameters()['maxsize'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["mlx_dpo.startup.transformers_scan", "True", "None"], done.stderr
