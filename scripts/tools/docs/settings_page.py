"""Write docs/settings.md from the declarations of `mlx_dpo.config`.

python scripts/tools/docs/settings_page.py
"""

import math
from pathlib import Path

from mlx_dpo.config.dpo_config import get_settings
from mlx_dpo.config.setting import Setting

PAGE = Path(__file__).parents[3] / "docs" / "settings.md"
SECTIONS = (  # in a reader's order
    *("Model", "Pairs", "LoRA", "Loss", "Reference", "Optimizer"),
    *("Training", "Evaluation", "Run", "Reporting"),
)
HEAD = """# Settings

<!-- made by scripts/tools/docs/settings_page.py from the declarations in mlx_dpo/config/ -->

Every setting is a flag of `mlx-dpo train` (`--learning-rate 1e-5`), a key of a YAML file
(`learning_rate: 1e-5`, read by `--config FILE`) and a keyword of `DPOConfig` in Python. A flag on
the command line overrides the YAML file. An unknown setting, or one that would have no effect, is
an error.

* **Repeatable** flags take one value each time. In YAML they are lists:
  `loss_type: [sigmoid, sft]`.
* **Switches** have no value on the command line: `--use-rslora`, `--no-caffeinate`. In YAML they
  are `true` or `false`.
* A resumed run must have the same settings. Those marked ↻ may change.
* An error for a setting of TRL, LLaMA-Factory, Axolotl or mlx-lm names the setting to use here.
  `mlx-dpo config from FILE` translates a whole configuration file.
"""


def page() -> str:
    """Return the page as Markdown."""
    settings = get_settings()
    if unknown := {spec.section for spec in settings.values()} - set(SECTIONS):
        raise ValueError(f"no place for the sections {sorted(unknown)}")
    parts = [HEAD]
    for section in SECTIONS:
        rows = [_row(name, spec) for name, spec in settings.items() if spec.section == section]
        head = "| setting | flag | default | values | meaning |\n|---|---|---|---|---|"
        parts.append("\n".join([f"\n## {section}\n", head, *rows, ""]))
    return "".join(parts)


def _row(name: str, spec: Setting) -> str:
    mark = "" if spec.changes_result else " ↻"
    cells = (f"`{name}`{mark}", _flag(name, spec), _default(spec), _values(spec), spec.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _flag(name: str, spec: Setting) -> str:
    if name == "pairs":
        return "PAIRS"
    flag = name.replace("_", "-")
    off = spec.type is bool and spec.default is not False
    return f"`--no-{flag}`" if off and spec.default else f"`--{flag}`"


def _default(spec: Setting) -> str:
    """Return the default: in words, or as a value."""
    if spec.required:
        return "(required)"
    shown = spec.shown_default or "off" * (spec.type is bool)
    return shown if spec.default_text or not shown else f"`{shown}`"


def _values(spec: Setting) -> str:
    if spec.choices:
        text = ", ".join(f"`{choice}`" for choice in spec.choices)
    elif spec.type is bool:
        text = "switch"
    elif spec.type in (int, float):
        kind = "integer" if spec.type is int else "number"
        text = f"{kind}{_bounds(spec)}"
    else:
        text = "text"
    return text + "; repeatable" * spec.is_list


def _bounds(spec: Setting) -> str:
    low = high = ""
    if math.isfinite(spec.minimum):
        low = f" {'>' if spec.exclusive_minimum else '≥'} {spec.minimum:g}"
    if math.isfinite(spec.maximum):
        high = f" {'<' if spec.exclusive_maximum else '≤'} {spec.maximum:g}"
    return low + "," * bool(low and high) + high


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
