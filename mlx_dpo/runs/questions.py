"""The prompts that a run held out, as they stood in its files."""

from mlx_dpo.errors import ConfigError
from mlx_dpo.policy.load import Base
from mlx_dpo.preferences.columns import prompts as prompts_of_pairs
from mlx_dpo.preferences.prompts import Prompt, as_prompt, prompts_of, refuse_given
from mlx_dpo.preferences.reading import told
from mlx_dpo.preferences.report import PairsReport
from mlx_dpo.preferences.schemas import asked
from mlx_dpo.preferences.sources import find
from mlx_dpo.runs.inputs import read_inputs, row_rules
from mlx_dpo.runs.policies import Opened


def prompts_held_out(run: Opened, base: Base) -> list[Prompt]:
    """Each prompt once, in the order of the pairs; `base` is the run's model, however adapted.

    Raises:
        ConfigError: the run held none out.
        RunError, DataError: its pairs are gone, cannot be read any more, or ask with tools.
    """
    config = run.config
    wanted = set(prompts_of_pairs(read_inputs(config, read=lambda _: base).valid))
    if not wanted:
        raise ConfigError(f"{run.paths.folder}: the run held no pairs out; name a file of prompts")
    sources = find(config.pairs, config.valid, config.split)
    prompts = []
    for source in (*sources.train, *sources.valid):
        report = PairsReport(source.name, config.max_length, judged=config.labelled)
        for one in told(source.rows(), row_rules(config), report, bad_pairs="drop"):
            if bytes.fromhex(asked(one.said)) in wanted:
                refuse_given(one.said.given, one.said.where)
                prompts.append(as_prompt(one.said.prompt, one.said.where, whole=one.said.whole))
    return prompts_of(prompts, str(run.paths.folder))
