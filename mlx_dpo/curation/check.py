"""Run all checks on the configured data sets (`mlx-dpo data check`)."""

from mlx_dpo.config.dpo_config import DPOConfig, get_settings
from mlx_dpo.data.inspect.results import CheckResults, run_checks
from mlx_dpo.data.inspect.scan import ProgressCallback, ScanSettings
from mlx_dpo.data.load import check_settings_used
from mlx_dpo.data.sources import SplitSources, find_sources
from mlx_dpo.data.tokenization.tokenize import check_token_rules
from mlx_dpo.errors import ConfigError
from mlx_dpo.runs.inputs import load_configured_base, row_rules, token_rules, with_max_length

MODEL_SETTINGS = (  # settings without effect unless there is a model
    "chat_template", "thinking", "system", "max_length", "truncation", "revision",
    "trust_remote_code",
)  # fmt: skip


def check_pairs(
    config: DPOConfig, progress: ProgressCallback = lambda new_rows: None
) -> tuple[SplitSources, CheckResults]:
    """Run all checks on the configured data; return the data sources and the results.

    Checks that need tokens are skipped if no model is configured.

    Raises:
        DataError: a source cannot be read to its end.
        ConfigError: a setting has no effect.
    """
    sources = find_sources(config.pairs, config.valid, config.split)
    settings = make_scan_settings(config)
    results = run_checks(sources, settings, progress)
    if settings.tokens is not None:
        reports = [report for split in results.splits.values() for report in split.reports]
        check_settings_used(settings.tokens, settings.rows, reports)
    return sources, results


def make_scan_settings(config: DPOConfig) -> ScanSettings:
    """Return the settings for the data checks.

    If a model is configured, its tokenizer is loaded, but not its weights.

    Raises:
        ConfigError: a setting needs a model and none is configured, or it has no effect on this
            model.
    """
    if not config.model:
        known = get_settings()
        for name in MODEL_SETTINGS:
            if getattr(config, name) != known[name].default:
                raise ConfigError(f"`{name}` has no effect without --model")
        return ScanSettings(rows=row_rules(config))

    from mlx_dpo.generation.context import context_length
    from mlx_dpo.models.empty_weights import load_empty_model

    base = load_configured_base(config, load_empty_model)
    config = with_max_length(config, base)
    rules = token_rules(config, base)
    check_token_rules(base.tokenizer, rules)
    return ScanSettings(
        rows=row_rules(config),
        tokens=rules,
        tokenizer=base.tokenizer,
        context_length=context_length(base.config),
    )
