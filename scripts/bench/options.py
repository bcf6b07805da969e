"""Command-line options of `bench_peers.py`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml

from mlx_dpo.errors import ConfigError
from mlx_dpo.paths import cache_folder
from mlx_dpo.profiling.bench.shapes import SHAPES
from scripts.bench import machine
from scripts.bench.trainers import TRAINERS, Setting

PAIRS_COUNT = {"short": 64, "long": 16, "ranked": 48, "system": 16, "memory": 1}
CSV = machine.ROOT / "docs" / "bench" / "peers.csv"


def _parser(description: str) -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        prog="bench_peers", description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--pairs", type=Path, required=True, help="preference pairs: a JSONL or JSON file")
    add("--pairs-count", type=int, help="pairs in an epoch (default: 64; fewer for long ones)")
    kind = parser.add_mutually_exclusive_group()
    for name, help_text in (
        ("long", "pairs of 900 to 1000 + 2 × 200 to 300 tokens"),
        (
            "ranked",
            "prompts of 80 to 120 tokens, 4 completions of 30 to 60, all 6 pairs",
        ),
        ("system", "a system prompt of 600 tokens before prompts of 40 to 60 + 2 × 40 to 60"),
        ("memory", "peak of one step on one pair of 1024 + 2 × 256 tokens"),
    ):
        kind.add_argument(
            f"--{name}", dest="kind", action="store_const", const=name, help=help_text
        )
    add("--shape", choices=SHAPES, default="smollm2-135m", help="shape of the model")
    add("--peers", default=",".join(TRAINERS), help="trainers to run (default: %(default)s)")
    add("--search", type=int, default=8, help="pairs on which settings are compared (default: 8)")
    add("--setting", action="append", default=[], metavar="TRAINER=NAME", help="skip the search")
    add("--ours", action="append", default=[], metavar="KEY=VALUE", help="a setting of our run")
    add("--repeats", type=int, default=1, help="rounds; medians are taken (default: 1)")
    add("--threads", type=int, default=2, help="threads of every trainer (default: 2)")
    add("--timeout", type=float, default=7200, help="seconds a run may take (default: 7200)")
    add("--trl-python", type=Path, help="a Python that has trl and peft, instead of a new one")
    add("--cache", type=Path, default=cache_folder() / "bench", help="models and environments")
    add("--csv", type=Path, default=CSV, help="file to append rows to")
    return parser


def parse(arguments: Sequence[str] | None = None, description: str = "") -> argparse.Namespace:
    """Parse the command line and fill in dependent defaults.

    Raises:
        ConfigError: a trainer or a setting is unknown, or named twice.
    """
    options = _parser(description).parse_args(arguments)
    options.kind = options.kind or "short"
    if options.pairs_count is None:
        options.pairs_count = PAIRS_COUNT[options.kind]
    options.peers = options.peers.split(",")
    for name in options.peers:
        if name not in TRAINERS:
            raise ConfigError(f"`--peers`: unknown `{name}`; there are {', '.join(TRAINERS)}")
    pinned = [_parse_setting(text) for text in options.setting]
    if options.ours:
        pinned.append(("ours", _parse_own_setting(options.ours)))
    options.setting = dict(pinned)
    if len(options.setting) < len(pinned):
        raise ConfigError("`--setting`, `--ours`: name a trainer once")
    return options


def _parse_own_setting(pieces: Sequence[str]) -> Setting:
    """Return settings of this project given as KEY=VALUE, with values as in its YAML file."""
    values = {}
    for piece in pieces:
        key, is_pair, value = piece.partition("=")
        if not is_pair:
            raise ConfigError(f"`--ours {piece}`: is not KEY=VALUE")
        values[key] = yaml.safe_load(value)
    return Setting(name=", ".join(pieces), options=values)


def _parse_setting(text: str) -> tuple[str, Setting]:
    """Return the trainer and the setting named by TRAINER=NAME."""
    name, _, setting_name = text.partition("=")
    trainer = TRAINERS.get(name)
    settings = (*trainer.settings, *trainer.memory_settings) if trainer else ()
    for setting in settings:
        if setting.name == setting_name:
            return name, setting
    known = "; ".join(setting.name for setting in settings) or "no such trainer"
    raise ConfigError(f"`--setting {text}`: is not one of its settings ({known})")


def settings(options: argparse.Namespace, name: str) -> tuple[Setting, ...]:
    """Return the settings to try for a trainer, or the one given on the command line."""
    if name in options.setting:
        return (options.setting[name],)
    trainer = TRAINERS[name]
    return trainer.memory_settings if options.kind == "memory" else trainer.settings
