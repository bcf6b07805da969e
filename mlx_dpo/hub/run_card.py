"""Write the model card of a finished run from its run record and from sampled completions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError

from mlx_dpo.adapters.adapter_files import CONFIG, adapter_digest
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.hf_datasets import parse_hub_name
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.evaluation.compare import compare_runs
from mlx_dpo.hub.errors import check_repository_name
from mlx_dpo.hub.model_card import CardContent, Sample, make_model_card
from mlx_dpo.io.atomic import write_file
from mlx_dpo.io.checksums import read_checked_json
from mlx_dpo.io.hub_token import check_hub_token
from mlx_dpo.models.download import resolve_model
from mlx_dpo.models.license import CARD, inherited_metadata, read_card_metadata
from mlx_dpo.reporting.evaluations.shown_result import ShownResult
from mlx_dpo.runs.folder import hub_model_id
from mlx_dpo.runs.save_peft import LOADS_IN_PEFT
from mlx_dpo.runs.summary import describe_loss
from mlx_dpo.saved_runs.export_peft import open_finished
from mlx_dpo.saved_runs.open import OpenRun
from mlx_dpo.saved_runs.report import write_curves
from mlx_dpo.saved_runs.stored_evaluations import read_present_evaluations, show_evaluation
from mlx_dpo.training.monitor.verdict import Verdict

DEFAULT_SAMPLES = 3  # of --prompts
NO_SAMPLES = (
    "not on the card: prompts and answers; `mlx-dpo card --samples N` shows held-out prompts, "
    "--prompts FILE others"
)
TIMEOUT = 10.0  # seconds to wait for the Hub
SAMPLING = Sampling(max_tokens=200)  # greedy


def make_run_card(
    folder: str,
    name: str,
    *,
    base: str | None = None,
    prompts: str | None = None,
    samples: int | None = None,
    online: bool = False,
    show_private: bool = False,
) -> tuple[ModelCard, tuple[str, ...]]:
    """Return the model card of a finished run, and notes for the run's owner.

    Args:
        name: repository that the adapter is going to be uploaded to.
        base: Hub id of the base model, if the run was trained on a local folder.
        prompts: file of prompts to show with completions from before and after training.
        samples: number of prompts to show; held-out prompts if there are no `prompts`. Without
            both, no text of the data is on the card.
        online: look up on the Hub the license of the base model, and which datasets are public.
        show_private: name datasets of the Hub that are not known to be public.

    Raises:
        RunError: the run is unfinished.
        ConfigError: `name` or `base` cannot be the name of a repository, or the login of this
            machine cannot be sent.
        RunError, ConfigError, DataError, ModelError: completions cannot be sampled, as in
            `compare_runs`.
    """
    for repository in (name, *([base] if base is not None else [])):
        check_repository_name(repository)
    if online:
        check_hub_token()
    opened = open_finished(folder)
    sources = list_data_sources(opened, online=online)
    shown, notes = _make_samples(folder, opened, prompts, samples)
    if sources.private and not show_private:
        notes += (_private_note(sources.private, online=online),)
    hub_id = base or hub_model_id(opened.record)
    inherited = _inherited_metadata(opened, hub_id, online=online)
    if not inherited.get("license"):
        notes += (_license_note(online=online, was_requested=online and hub_id is not None),)
    if hub_id is None:
        notes += ("the Hub id of the base is unknown: name it with --base-model",)
    named = [*sources.public, *(sources.private if show_private else ())]
    facts = _collect_facts(opened, name, hub_id, inherited, named)
    facts["results"] = _eval_results(opened, show_private=show_private)
    facts["pairs"] = _describe_data(opened, named, is_complete=sources.count == len(named))
    return make_model_card(CardContent(**facts, samples=shown)), notes


def _license_note(*, online: bool, was_requested: bool) -> str:
    failed = ", and the Hub's answer did not include it" if was_requested else ""
    hint = "" if online else ", or let `mlx-dpo card --online` ask the Hub"
    return f"the license of the base is unknown{failed}: add `license` to the card{hint}"


@dataclass(frozen=True)
class DataSources:
    """Data sources of a run: datasets of the Hub, and files of this machine."""

    public: tuple[str, ...]  # Hub ids of datasets that the Hub says are public
    private: tuple[str, ...]  # other Hub ids: private, gated, or not asked for
    has_files: bool

    @property
    def count(self) -> int:
        """Return the number of datasets; all files together count as one."""
        return len(self.public) + len(self.private) + self.has_files


def list_data_sources(opened: OpenRun, *, online: bool) -> DataSources:
    """Return where a run's pairs are from; without `online`, no dataset counts as public."""
    config = opened.config
    given = [*config.pairs, *([config.valid] if config.valid else [])]
    given_names = {str(parse_hub_name(source)) for source in given}
    paths, has_files = [], False
    for report in opened.record["pairs"]:
        name, split = report["source"].rpartition(":")[::2]
        dataset = parse_hub_name(name)
        if dataset is None or not split or name not in given_names:
            has_files = True
        elif dataset.path not in paths:
            paths.append(dataset.path)
    public = tuple(path for path in paths if online and is_public(path))
    return DataSources(public, tuple(path for path in paths if path not in public), has_files)


def is_public(dataset: str) -> bool:
    """Return whether the Hub says, without a login, that everyone can read a dataset."""
    try:
        info = HfApi(token=False).dataset_info(dataset, timeout=TIMEOUT)
    except (HTTPError, OSError, ValueError):
        return False  # private, gone, or the Hub cannot be reached
    return info.private is False and not info.gated and not info.disabled


def _private_note(datasets: Sequence[str], *, online: bool) -> str:
    names = ", ".join(datasets)
    question = "" if online else "`mlx-dpo card --online` asks the Hub whether it is public, "
    return (
        f"not on the card: the name of the training data ({names}), which is not known to be "
        f"public; {question}`mlx-dpo card --show-private` names it"
    )


def _collect_facts(
    opened: OpenRun, name: str, hub_id: str | None, base: Mapping[str, Any], datasets: Sequence[str]
) -> dict[str, Any]:
    """Return the facts that the model card shows, except samples, as fields of `CardContent`."""
    config, record = opened.config, opened.record
    settings = DPOConfig.from_dict(record["settings"])
    adapter = read_checked_json(opened.paths.folder / CONFIG)[0]
    loads_in = record.get("adapter", "") if "peft_type" not in adapter else LOADS_IN_PEFT
    return {
        "name": name,
        "base_model": hub_id,
        "license": {key: value for key, value in base.items() if key.startswith("license")},
        "language": base.get("language"),
        "datasets": datasets,
        "loss": describe_loss(config),
        "losses": config.loss_type,
        "rewarded": config.reward_kind,
        "labelled": config.labelled,
        "supervised": config.supervised,
        "reference": _describe_reference(config),
        "adapter": _describe_adapter(adapter),
        "steps": _describe_steps(record),
        "evaluation": record["evaluation"] or {},
        "held_out": record["counts"]["valid"],
        "settings": settings.get_public_settings()
        | dict.fromkeys(settings.list_private_settings(), "not shown"),
        "versions": record["versions"],
        "digest": adapter_digest(opened.paths.folder),
        "fine_tune_type": adapter["fine_tune_type"],
        "peft_problem": None if loads_in == LOADS_IN_PEFT else _peft_problem(loads_in),
        "peft_base": adapter.get("base_model_name_or_path"),
        "bits": config.bits,
        "warnings": _findings(record),
        "curves": write_curves(opened.paths.folder),
    }


def _eval_results(opened: OpenRun, *, show_private: bool) -> list[ShownResult]:
    """Return what `mlx-dpo eval` stored on the run's adapter.

    A file or dataset is named only with `show_private`; held-out pairs and tasks are public names.
    """
    shown = []
    for stored in read_present_evaluations(opened):
        is_public = stored.subject.startswith("held-out") or stored.measurement == "tasks"
        subject = stored.subject if is_public or show_private else "data that is not named here"
        shown.append(show_evaluation(opened, stored, subject))
    return [result for result in shown if result is not None]


def _findings(record: Mapping[str, Any]) -> list[str]:
    """Return what a card says went wrong: warnings of the training, and the verdict."""
    verdict = Verdict.from_record(record)
    return [*record["warnings"], *([] if verdict is None else [verdict.text])]


def _describe_data(opened: OpenRun, named: Sequence[str], *, is_complete: bool) -> str:
    links = [f"[{name}](https://huggingface.co/datasets/{name})" for name in named]
    config = opened.config
    unit = "rows with answers" if config.supervised else "preference pairs"
    unit = "labelled completions" if config.labelled else unit
    text = f"{opened.record['counts']['train']:,} {unit}"
    if not links:
        return f"{text}, which are not named on this card"
    return f"{text} of {', '.join(links)}" + (
        "" if is_complete else " and of data that this card does not name"
    )


def trained_steps(record: Mapping[str, Any]) -> int:
    """Return the number of optimizer steps that produced the adapter.

    The run may have taken more steps: it can end with the adapter of its best evaluation.
    """
    best = record["best_checkpoint"] or {}
    return int(best.get("step") or record["stopped_early_at"] or record["steps"])


def _describe_steps(record: Mapping[str, Any]) -> str:
    taken, best = record["stopped_early_at"] or record["steps"], record["best_checkpoint"]
    if best is None:
        return f"{taken:,} step{'s' * (taken != 1)}"
    metric = next(name for name in best if name != "step")
    return f"{best['step']:,} of {taken:,} steps, selected by the best `{metric}` on held-out data"


def _peft_problem(loads_in: str) -> str:
    """Return why PEFT cannot load an adapter, from the text `loads_in` of the run record."""
    return loads_in.partition(": ")[2].partition(";")[0] or "the run was made by an older version"


def _describe_reference(config: DPOConfig) -> str:
    if not config.needs_reference:
        return "none"
    if config.reference_model is not None:
        return "another model"
    start = "the base with its initial adapter" if config.start_adapter else "the base"
    return start + (", synchronized with the policy" if config.sync_ref_model else "")


def _describe_adapter(adapter: Mapping[str, Any]) -> str:
    if adapter["fine_tune_type"] == "full":
        return "all weights of the trained layers (full fine-tuning)"
    sizes = adapter["lora_parameters"]
    kind = "DoRA" if adapter["fine_tune_type"] == "dora" else "LoRA"
    return f"{kind}, rank {sizes['rank']}, scale {sizes['scale']:g}"


def _inherited_metadata(opened: OpenRun, hub_id: str | None, *, online: bool) -> dict[str, Any]:
    """Return the license and the language that the base model's card names."""
    local = _read_local_card(opened)
    metadata = inherited_metadata(local or (_read_hub_card(hub_id) if online else {}))
    link = metadata.get("license_link")
    if link and "://" not in link:  # a file in the base's folder, which is not uploaded
        metadata["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
        if hub_id is None:
            del metadata["license_link"]
    return metadata


def _read_local_card(opened: OpenRun) -> dict[str, Any]:
    """Return the metadata of the base model's card; empty if the model is not on this machine."""
    try:
        folder = resolve_model(opened.config.model, revision=opened.config.revision)
    except (ModelError, ConfigError):
        return {}  # the Hub may have it
    return read_card_metadata(folder)


def _read_hub_card(hub_id: str | None) -> dict[str, Any]:
    """Return the metadata of a model card on the Hub; empty if it cannot be read."""
    try:
        data = HfApi().model_info(hub_id).card_data if hub_id else None
        return dict(data.to_dict()) if data else {}
    except (HTTPError, OSError, ValueError):
        return {}  # a note says that the license is unknown


def _make_samples(
    folder: str, opened: OpenRun, prompts: str | None, samples: int | None
) -> tuple[list[Sample], tuple[str, ...]]:
    if prompts is None and samples is None:
        return [], (NO_SAMPLES,)
    limit = DEFAULT_SAMPLES if samples is None else samples
    if limit == 0:
        if prompts is not None:
            raise ConfigError("`--prompts` has no effect with `--samples` 0")
        return [], ()
    if prompts is None and not opened.record["counts"]["valid"]:
        return [], (f"no samples: no {opened.config.unit} were held out",)
    comparison = compare_runs([folder], prompts, SAMPLING, limit=limit)
    before, after = (policy.answers for policy in comparison.policies)
    return [
        Sample(_prompt_text(prompt), base.text, aligned.text)
        for prompt, base, aligned in zip(comparison.prompts, before, after, strict=True)
    ], ()


def _prompt_text(prompt: Prompt) -> str:
    return "\n\n".join(str(message["content"]) for message in prompt.messages)


def check_no_card(folder: Path) -> None:
    """Raise `ConfigError` if the folder already has a model card, which may have been edited."""
    if (path := folder / CARD).exists():
        raise ConfigError(f"{path}: already exists; add --overwrite to replace it")


def write_card(folder: Path, card: ModelCard, *, overwrite: bool) -> Path:
    """Write the model card into the run folder and return its path.

    Raises:
        ConfigError: the folder already has a model card, and `overwrite` is False.
    """
    if not overwrite:
        check_no_card(folder)
    path = folder / CARD
    write_file(path, str(card).rstrip() + "\n")
    return path
