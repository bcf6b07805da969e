"""The card of a run: facts from its record and its base, and answers before and after."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError

from mlx_dpo.adapters.files import CONFIG, adapter_digest
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.hf_datasets import parse_hub_name
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.evaluation.compare import compare_runs
from mlx_dpo.hub.model_card import CardFacts, Sample
from mlx_dpo.hub.model_card import card as make_card
from mlx_dpo.io.atomic import write_file
from mlx_dpo.models.download import resolve_model
from mlx_dpo.models.license import CARD, inherited_metadata, read_card_metadata
from mlx_dpo.runs.save_peft import LOADS_IN_PEFT
from mlx_dpo.runs.summary import describe_loss
from mlx_dpo.saved_runs.export_peft import hub_id_of_run, open_finished
from mlx_dpo.saved_runs.open import OpenRun
from mlx_dpo.saved_runs.report import write_curves

SAMPLES = 3
ANSWER = Sampling(max_tokens=200)  # the likeliest words


def card_of_run(
    folder: str,
    name: str,
    *,
    base: str | None = None,
    prompts: str | None = None,
    samples: int | None = None,
    online: bool = False,
) -> tuple[ModelCard, tuple[str, ...]]:
    """The card of a finished run that is to be known as `name`, and notes for its owner.

    Args:
        base: Hub id of the base, where the run was trained on a folder.
        prompts: File of prompts to be answered before and after.
        samples: How many of them; 0 for none. Without `prompts` and `samples` only prompts that
            are public already, as those of a Hub dataset, are taken from the held-out pairs.
        online: The Hub may be asked for the licence of the base.

    Raises:
        RunError, ConfigError, DataError, ModelError: as `compare`; or the run is unfinished.
    """
    opened = open_finished(folder)
    datasets = hub_datasets(opened)
    shown, notes = _samples(folder, opened, prompts, samples, datasets)
    hub_id = base or hub_id_of_run(opened)
    inherited = _inherited(opened, hub_id, online=online)
    if not inherited.get("license"):
        asked = ", and the Hub did not tell it" if online and hub_id else ""
        more = "" if online else ", or let `mlx-dpo card --online` ask the Hub"
        notes += (f"the base's licence is not known here{asked}: add `license` to the card{more}",)
    if hub_id is None:
        notes += ("the base has no Hub id: name it with --base, so that others find it",)
    facts = _facts(opened, name, hub_id, inherited, datasets or [])
    return make_card(CardFacts(**facts, samples=shown)), notes


def hub_datasets(opened: OpenRun) -> list[str] | None:
    """The Hub ids of the run's pairs, None where some of them are of this machine."""
    sources = [report["source"] for report in opened.record["pairs"]]
    found = []
    for source in sources:
        named, split = source.rpartition(":")[::2]
        dataset = parse_hub_name(named)
        given = {str(parse_hub_name(pairs)) for pairs in _given(opened.config)}
        if dataset is None or not split or named not in given:
            return None
        found.append(dataset.path)
    return list(dict.fromkeys(found))


def _given(config: DPOConfig) -> list[str]:
    return [*config.pairs, *([config.valid] if config.valid else [])]


def _facts(
    opened: OpenRun, name: str, hub_id: str | None, base: Mapping[str, Any], datasets: Sequence[str]
) -> dict[str, Any]:
    config, record = opened.config, opened.record
    given = DPOConfig.from_dict(record["settings"])
    adapter = json.loads((opened.paths.folder / CONFIG).read_text())
    loads = record.get("adapter", "") if "peft_type" not in adapter else LOADS_IN_PEFT
    named = datasets and ", ".join(f"[{d}](https://huggingface.co/datasets/{d})" for d in datasets)
    count = record["counts"]["train"]
    return {
        "name": name,
        "base_model": hub_id,
        "license": {k: v for k, v in base.items() if k.startswith("license")},
        "language": base.get("language"),
        "datasets": datasets,
        "pairs": f"{count:,} {'judged answers' if config.labelled else 'preference pairs'}"
        + (f" of {named}" if named else ", which are not public"),
        "loss": describe_loss(config),
        "losses": config.loss_type,
        "rewarded": config.reward_kind,
        "labelled": config.labelled,
        "reference": _reference(config),
        "adapter": _sizes(adapter),
        "steps": _steps(record),
        "evaluation": record["evaluation"] or {},
        "held_out": record["counts"]["valid"],
        "settings": given.get_public_settings()
        | dict.fromkeys(given.list_private_settings(), "not shown"),
        "versions": record["versions"],
        "digest": adapter_digest(opened.paths.folder),
        "way": adapter["fine_tune_type"],
        "not_in_peft": None if loads == LOADS_IN_PEFT else _why(loads),
        "peft_base": adapter.get("base_model_name_or_path"),
        "bits": config.bits,
        "warnings": record["warnings"],
        "curves": write_curves(opened.paths.folder),
    }


def steps_of(record: Mapping[str, Any]) -> int:
    """How many steps its adapters were trained for: fewer than it made if the best were kept."""
    kept = record["best_checkpoint"] or {}
    return int(kept.get("step") or record["stopped_early_at"] or record["steps"])


def _steps(record: Mapping[str, Any]) -> str:
    made, kept = record["stopped_early_at"] or record["steps"], record["best_checkpoint"]
    if kept is None:
        return f"{made:,} step{'s' * (made != 1)}"
    by = next(name for name in kept if name != "step")
    return f"{kept['step']:,} of {made:,} steps, kept for their `{by}` on the pairs held out"


def _why(loads: str) -> str:
    """Why an adapter does not load in PEFT; what its owner may do about it is not for a card."""
    return loads.partition(": ")[2].partition(";")[0] or "its run is older"


def _reference(config: DPOConfig) -> str:
    if not config.needs_reference:
        return "none"
    if config.reference_model is not None:
        return "another model"
    start = "the base with an adapter that it started from" if config.start_adapter else "the base"
    return start + (", which followed the policy" if config.sync_ref_model else "")


def _sizes(adapter: Mapping[str, Any]) -> str:
    if adapter["fine_tune_type"] == "full":
        return "the weights of the model itself (full fine-tuning)"
    sizes = adapter["lora_parameters"]
    kind = "DoRA" if adapter["fine_tune_type"] == "dora" else "LoRA"
    return f"{kind}, rank {sizes['rank']}, scale {sizes['scale']:g}"


def _inherited(opened: OpenRun, hub_id: str | None, *, online: bool) -> dict[str, Any]:
    """Licence and language, as the base's own card says."""
    found = inherited_metadata(_base_card(opened) or (_card_on_the_hub(hub_id) if online else {}))
    link = found.get("license_link")
    if link and "://" not in link:  # a file beside the base, which does not go along
        found["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
        if hub_id is None:
            del found["license_link"]
    return found


def _base_card(opened: OpenRun) -> dict[str, Any]:
    try:
        return read_card_metadata(
            resolve_model(opened.config.model, revision=opened.config.revision)
        )
    except (ModelError, ConfigError):
        return {}  # its folder is gone; the Hub may know it


def _card_on_the_hub(hub_id: str | None) -> dict[str, Any]:
    try:
        found = HfApi().model_info(hub_id).card_data if hub_id else None
        return dict(found.to_dict()) if found else {}
    except (HTTPError, OSError, ValueError):
        return {}  # said: the licence is not known


def _samples(
    folder: str,
    opened: OpenRun,
    prompts: str | None,
    samples: int | None,
    datasets: list[str] | None,
) -> tuple[list[Sample], tuple[str, ...]]:
    wanted = SAMPLES if samples is None else samples
    if wanted == 0:
        if prompts is not None:
            raise ConfigError("`--prompts` has no effect with `--samples` 0")
        return [], ()
    if prompts is None and samples is None and datasets is None:
        return [], ("no samples: the pairs are yours; --prompts FILE or --samples N shows some",)
    if prompts is None and not opened.record["counts"]["valid"]:
        return [], ("no samples: no pairs were held out",)
    found = compare_runs([folder], prompts, ANSWER, limit=wanted)
    before, after = (column.answers for column in found.columns)
    said = [
        Sample(_asked(prompt), one.text, other.text)
        for prompt, one, other in zip(found.prompts, before, after, strict=True)
    ]
    return said, ()


def _asked(prompt: Prompt) -> str:
    return "\n\n".join(str(message["content"]) for message in prompt.messages)


def refuse_card(folder: Path) -> None:
    """Leave a card alone that somebody may have written on.

    Raises:
        ConfigError: there is one.
    """
    if (path := folder / CARD).exists():
        raise ConfigError(f"{path}: is there already; add --overwrite to make it anew")


def write_card(folder: Path, made: ModelCard, *, overwrite: bool) -> Path:
    """Put the card into the run folder.

    Raises:
        ConfigError: there is one.
    """
    if not overwrite:
        refuse_card(folder)
    path = folder / CARD
    write_file(path, str(made).rstrip() + "\n")
    return path
