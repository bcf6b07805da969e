"""Write tests/goldens/trl_losses.json and trl_loss_runs.json: what TRL's own code makes of losses.

    trl/bin/python scripts/tools/goldens/trl_losses.py      (the environment of make_goldens.py)

Of fixed random logits the value of every loss and its slopes; of every documented sum, every
divergence, LD-DPO and WPO as well. TRL's trainers are asked themselves: they see a model that
gives these logits. Then, for some losses, whole steps as in make_goldens.py.
"""

import itertools
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # run as a file

from scripts.tools.goldens import trl_sigmoid as steps

GOLDEN = steps.GOLDEN.with_name("trl_losses.json")
RUNS_GOLDEN = steps.GOLDEN.with_name("trl_loss_runs.json")
Settings = Mapping[str, Any]

# --- inputs that both implementations share ----------------------------------------------

VOCAB = 5
LENGTHS = ((4, 4), (1, 3), (6, 2), (2, 5), (3, 1))  # of chosen and rejected; prompts of one token
DESIRABLE = (True, False, True, True, False)  # of labelled rows
SEED = 3

SMOOTH = {"label_smoothing": 0.15}
DPO: dict[str, Settings] = {
    **{
        name: {"loss_type": [name]}
        for name in (
            "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
            "apo_zero", "apo_down", "discopop", "sigmoid_norm", "sft",
        )
    },
    "sppo_hard as published": {"loss_type": ["sppo_hard"], "beta": 0.001},
    "robust": {"loss_type": ["robust"], **SMOOTH},
    "exo_pair": {"loss_type": ["exo_pair"], **SMOOTH},
    "exo_pair as published": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "aot smoothed": {"loss_type": ["aot"], **SMOOTH},
    "aot_unpaired smoothed": {"loss_type": ["aot_unpaired"], **SMOOTH},
    "discopop, warmer": {"loss_type": ["discopop"], "discopop_tau": 0.7},
    "RPO": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    **{
        f"{name}, {divergence}": {
            "loss_type": [name], "f_divergence_type": divergence,
            **({"f_alpha_divergence_coef": 0.3} if divergence == "alpha_divergence" else {}),
            **(SMOOTH if name in ("exo_pair", "robust") else {}),
        }
        for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
        for divergence in ("forward_kl", "js_divergence", "alpha_divergence")
    },
    "LD-DPO": {"loss_type": ["sigmoid"], "ld_alpha": 0.4},
    "LD-DPO, cut": {"loss_type": ["apo_zero"], "ld_alpha": 0.0},
    "LD-DPO of averages": {"loss_type": ["ipo"], "ld_alpha": 0.4},
    "WPO": {"loss_type": ["sigmoid"], "use_weighting": True},
    # Not with `sft`: TRL 1.16 fails there, as it multiplies an expanded tensor in place.
    "WPO of a sum": {
        "loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2], "use_weighting": True,
    },
}  # fmt: skip
CPO: dict[str, Settings] = {
    "cpo": {"loss_type": "sigmoid"},
    "cpo, other weights": {"loss_type": "sigmoid", "cpo_alpha": 0.4, **SMOOTH},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0},
    "simpo, other margin": {
        "loss_type": "simpo", "cpo_alpha": 0.0, "beta": 1.5, "simpo_gamma": 1.2, **SMOOTH,
    },
}  # fmt: skip
ORPO: dict[str, Settings] = {"orpo": {}}
KTO: dict[str, Settings] = {
    "kto": {},
    "kto, weighed": {"desirable_weight": 1.3, "undesirable_weight": 0.6, "beta": 0.4},
    "kto, point at 0": {},  # the mismatched completions have become less likely
}
BETA = 0.25  # unless a case sets it; not the default, so that a loss that ignores beta fails


class Texts(NamedTuple):
    """Rows of one prompt token and a completion: every chosen one, then every rejected one."""

    tokens: np.ndarray  # (N, T) int64, padded on the right
    mask: np.ndarray  # (N, T) bool, True where a token of a completion stands
    policy: np.ndarray  # (N, T - 1, V) logits
    reference: np.ndarray  # (N, T - 1, V)
    direction: np.ndarray  # (N, T - 1, V): slopes are those of a row's logits along it


def labelled_rows(case: str) -> tuple[slice, slice]:
    """Return the indices of the labelled rows and of their mismatched completions."""
    half = len(LENGTHS)
    halves = slice(half, None), slice(0, half)
    return halves if "point at 0" not in case else halves[::-1]


def texts() -> Texts:
    """Return the inputs of both implementations, made by NumPy."""
    draw = np.random.default_rng(SEED)
    lengths = [*(c for c, _ in LENGTHS), *(r for _, r in LENGTHS)]
    width = 1 + max(lengths)
    mask = np.array([[1 <= place <= n for place in range(width)] for n in lengths])
    tokens = np.where(mask, draw.integers(1, VOCAB, mask.shape), 0)
    tokens[:, 0] = range(len(tokens))  # the prompt says which row it is
    shape = (len(lengths), width - 1, VOCAB)
    reference = draw.normal(0, 1, shape)
    policy = reference + draw.normal(0, 0.8, shape)
    return Texts(tokens, mask, policy, reference, draw.normal(0, 1, shape))


STEPS: dict[str, Settings] = {
    name: steps.PLAIN | {"loss": loss, **more}
    for name, loss, more in (
        ("ipo", {"loss_type": ["ipo"]}, {}),
        ("apo_zero", {"loss_type": ["apo_zero"]}, {}),
        ("robust", {"loss_type": ["robust"], "label_smoothing": 0.1}, {}),
        # TRL's mean over tokens is that of a pass: one pass a step, then.
        (
            "sigmoid and sft",
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
            {"pairs_per_pass": steps.BATCH},
        ),
    )
}


# --- TRL ---------------------------------------------------------------------------------


def main() -> None:
    """Compute the losses with TRL and write the results atomically."""
    import torch

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    cases = {
        **{name: case(ask_dpo, settings) for name, settings in DPO.items()},
        **{name: case(ask_cpo, settings) for name, settings in CPO.items()},
        **{name: case(ask_orpo, settings) for name, settings in ORPO.items()},
        **{name: case(ask_kto, {"case": name, **settings}) for name, settings in KTO.items()},
    }
    torch.set_default_dtype(torch.float32)
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft")}
    made = {"made_by": "scripts/tools/goldens/trl_losses.py", "versions": versions}
    write(GOLDEN, made | {"cases": cases})
    with tempfile.TemporaryDirectory() as scratch:
        write(RUNS_GOLDEN, made | {"runs": runs(scratch)})
    print(f"{len(cases)} cases, {len(STEPS)} runs")


def write(path: Path, golden: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(golden, indent=1) + "\n")
    os.replace(partial, path)


def case(ask: Any, settings: Settings) -> dict[str, Any]:
    """Loss, its slope along each row's direction, and rewards, as one trainer gives them."""
    import torch

    found = texts()
    along = torch.zeros(len(found.tokens), requires_grad=True)
    logits = torch.tensor(found.policy) + along[:, None, None] * torch.tensor(found.direction)
    loss, metrics = ask({"beta": BETA} | settings, logits, found)
    [slopes] = torch.autograd.grad(loss, along)
    rewards = {name: metrics[name] for name in ("rewards/chosen", "rewards/rejected")}
    return {"loss": loss.item(), "slopes": slopes.tolist(), **rewards}


class Stub:
    """An accelerator of one process, which also stands for what a trainer never asks."""

    device = "cpu"

    def gather(self, value: Any) -> Any:
        """Return the input unchanged."""
        return value

    gather_for_metrics = gather

    def unwrap_model(self, model: Any) -> Any:
        """Return the input unchanged."""
        return model


def bare(trainer: Any, **attributes: Any) -> Any:
    """Return a trainer of this class without calling its `__init__`."""
    made = object.__new__(trainer)
    made.__dict__.update(attributes, accelerator=Stub(), aux_loss_enabled=False)
    return made


def scoring_model(logits: Any) -> Any:
    """Return a model with the interface of TRL's fused head and the log-probs of `logits`."""
    import torch

    logp = torch.log_softmax(logits, -1)

    class Model(torch.nn.Module):
        is_gradient_checkpointing = False

        def forward(self, input_ids: Any, labels: Any, **kwargs: Any) -> Any:
            mine, after = logp[input_ids[:, 0]], labels[:, 1:]
            picked = mine.gather(-1, after.clamp(min=0)[..., None]).squeeze(-1)
            zeros = torch.zeros(picked.shape)
            return SimpleNamespace(
                log_probs=torch.where(after == -100, 0.0, picked),
                log_sum_sq_probs=torch.logsumexp(2 * mine, -1),
                entropy=zeros,
                mean_logits=zeros,
                is_top1=zeros.bool(),
            )

    return Model()


def batch_of(found: Texts) -> dict[str, Any]:
    """Token ids and masks as TRL's collators make them."""
    import torch

    mask = torch.tensor(found.mask)
    attention = mask.clone()
    attention[:, 0] = True
    ids = torch.tensor(found.tokens)
    return {
        "input_ids": ids,
        "attention_mask": attention.long(),
        "completion_mask": mask.long(),
    }


def means(trainer: Any) -> dict[str, float]:
    """Return the metrics that a trainer logged."""
    return {name: values[-1] for name, values in trainer._metrics["train"].items() if values}


def ask_dpo(settings: Settings, logits: Any, found: Texts) -> tuple[Any, dict[str, float]]:
    """DPOTrainer's loss; the reference is a model, too, so that LD-DPO acts on both."""
    import torch
    from trl import DPOTrainer

    batch, reference = batch_of(found), torch.tensor(found.reference)
    given = {
        "loss_weights": [1.0] * len(settings["loss_type"]), "label_smoothing": 0.0,
        "ld_alpha": None, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5,
        "use_weighting": False, "discopop_tau": 0.05,
    } | settings  # fmt: skip
    if given["f_divergence_type"] == "alpha_divergence":
        logits, reference = logits.float(), reference.float()  # TRL has no bound for float64
    trainer = bare(
        DPOTrainer,
        model=scoring_model(logits),
        ref_model=scoring_model(reference),
        loss_types=given["loss_type"],
        precompute_ref_logps=False,
        args=SimpleNamespace(discopop_tau=given["discopop_tau"], gradient_checkpointing_kwargs={}),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **{name: value for name, value in given.items() if name != "loss_type"},
    )
    return trainer._compute_loss(trainer.model, batch, False), means(trainer)


def halves_of(found: Texts) -> dict[str, Any]:
    """Return the batch in the format of CPO's and ORPO's collator."""
    import torch

    batch = batch_of(found)
    labels = torch.where(batch["completion_mask"] == 1, batch["input_ids"], -100)
    parts = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    parts["labels"] = labels
    pairs = len(found.tokens) // 2
    return {
        f"{side}_{name}": value[rows]
        for name, value in parts.items()
        for side, rows in (("chosen", slice(0, pairs)), ("rejected", slice(pairs, None)))
    }


def ask_halves(trainer: Any, logits: Any, found: Texts) -> tuple[Any, dict[str, float]]:
    """Return loss and metrics of a trainer that computes log-probs from logits itself."""
    import torch

    # The last token predicts nothing, but has logits.
    after = torch.cat([logits, torch.zeros(len(logits), 1, VOCAB)], dim=1)

    def model(input_ids: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=after[:, : input_ids.shape[1]])

    loss, metrics = trainer.get_batch_loss_metrics(model, halves_of(found))
    return loss, {name: float(value) for name, value in metrics.items()}


def ask_cpo(settings: Settings, logits: Any, found: Texts) -> tuple[Any, dict[str, float]]:
    """CPOTrainer's loss, of CPO and of SimPO."""
    from trl.experimental.cpo import CPOTrainer

    given = {"label_smoothing": 0.0, "simpo_gamma": 0.5, "cpo_alpha": 1.0, "alpha": 0.0} | settings
    trainer = bare(CPOTrainer, is_encoder_decoder=False, pad_token_id=0, **given)
    return ask_halves(trainer, logits, found)


def ask_orpo(settings: Settings, logits: Any, found: Texts) -> tuple[Any, dict[str, float]]:
    """ORPOTrainer's loss. With prompts of one token its likelihood is of completions alone."""
    from trl.experimental.orpo import ORPOTrainer

    trainer = bare(ORPOTrainer, is_encoder_decoder=False, padding_value=0, **settings)
    return ask_halves(trainer, logits, found)


def ask_kto(settings: Settings, logits: Any, found: Texts) -> tuple[Any, dict[str, float]]:
    """KTOTrainer's loss."""
    import torch
    from trl import KTOTrainer

    batch, reference = batch_of(found), torch.tensor(found.reference)
    rows, mismatched = labelled_rows(settings["case"])
    inputs = {name: value[rows] for name, value in batch.items()}
    inputs |= {f"KL_{name}": value[mismatched] for name, value in batch.items()}
    inputs["label"] = torch.tensor(DESIRABLE)
    trainer = bare(
        KTOTrainer,
        model=scoring_model(logits),
        ref_model=scoring_model(reference),
        loss_type="kto",
        calculate_KL=True,
        precompute_ref_logps=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs={}),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **{"desirable_weight": 1.0, "undesirable_weight": 1.0, **settings},
    )
    return trainer._compute_loss(trainer.model, inputs, False), means(trainer)


def runs(scratch: str) -> dict[str, Any]:
    """Steps of DPOTrainer with each of the losses."""
    lines = steps.first_lines(steps.BATCH * max(run["steps"] for run in STEPS.values()))
    made = {}
    for name, settings in STEPS.items():
        trainer = steps.make_trainer(settings, lines, scratch)
        steps.set_adapters(trainer.model, settings)
        logged = steps.steps(trainer)
        made[name] = {"settings": settings, "steps": logged}
        losses: Sequence[float] = [row["loss"] for row in itertools.islice(logged, 0, None, 19)]
        print(f"{name}: loss {losses[0]:.6f} to {losses[-1]:.6f}", flush=True)
    return made


if __name__ == "__main__":
    main()
