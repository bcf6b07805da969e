"""Generate answers to prompts with a run or a model, and record their provenance."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_dpo.adapters.adapter_files import adapter_digest, load_adapter
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.config.sampling import SEEDS, Sampling
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.errors import ConfigError
from mlx_dpo.generation.batch import GeneratedText, generate_replies
from mlx_dpo.generation.context import context_length
from mlx_dpo.generation.prompt import encode_prompt
from mlx_dpo.models.files import model_fingerprint
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.runs.inputs import load_configured_base
from mlx_dpo.saved_runs.open import load_policy, open_run
from mlx_dpo.types import Message

SEED_STRIDE = 1_000_003  # between the seeds of chunks; a prime, so that seeds rarely coincide


@dataclass(frozen=True)
class Responder:
    """A loaded model that answers prompts, with the chat settings of its run."""

    base: LoadedModel
    provenance: dict[str, Any]  # name and digest of the model, and of the adapter of a run
    thinking: bool | None = None
    system: str | None = None  # the system message of the training run

    def respond(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
        """Return the text of one answer per prompt; raise the same errors as `reply`."""
        return [reply.text for reply in self.reply(prompts, sampling)]

    def reply(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[GeneratedText]:
        """Generate one answer per prompt; each result says whether it was cut at the token limit.

        Raises:
            ConfigError: a prompt leaves no room in the model's context.
        """
        room = context_length(self.base.config)
        for prompt in prompts:
            tokens = len(encode_prompt(self.base.tokenizer, prompt.messages))
            if room is not None and tokens >= room:
                raise ConfigError(
                    f"{prompt.location}: {tokens} tokens leave no room for an answer (the model's "
                    f"context is {room}); leave the prompt out"
                )
        return self._replies([prompt.messages for prompt in prompts], sampling)

    def answer(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[str]:
        """Return the text of one answer per conversation; do not check that it fits the context."""
        return [reply.text for reply in self._replies(conversations, sampling)]

    def _replies(
        self, conversations: Sequence[Sequence[Message]], sampling: Sampling
    ) -> list[GeneratedText]:
        model, tokenizer = self.base.model, self.base.tokenizer
        return generate_replies(
            model, tokenizer, conversations, sampling=sampling, thinking=self.thinking
        )


def open_responder(
    run: str | None, *, model: str | None = None, reference: bool = False
) -> Responder:
    """Load a run's policy, a run's reference or a model without a run, to answer prompts.

    Raises:
        ConfigError: the tokenizer has no chat template, or the run was trained on plain text.
    """
    base = load_policy(run, model=model, reference=reference)
    _check_chat_template(base)
    provenance: dict[str, Any] = {"model": base.source}
    if run is None:
        return Responder(base, provenance | {"model_digest": model_fingerprint(base.path)})
    opened = open_run(run)
    if opened.trained_on_text:
        raise ConfigError(
            f"{run}: trained on plain text, but answers need the chat template; train on "
            "messages, or use `mlx-dpo generate`"
        )
    config = opened.config
    adapter = config.start_adapter if reference else str(opened.adapter)
    provenance |= {"model_digest": opened.record["provenance"]["model"]}
    if adapter is not None:
        provenance |= {"run": run, "adapter_digest": adapter_digest(Path(adapter))}
    return Responder(base, provenance, config.thinking, config.system)


def open_untrained_responder(config: DPOConfig) -> Responder:
    """Load the untrained policy from which a run with these settings would start.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """
    base = load_configured_base(config)
    _check_chat_template(base)
    provenance: dict[str, Any] = {
        "model": base.source,
        "model_digest": model_fingerprint(base.path),
    }
    if config.start_adapter is not None:
        folder = Path(config.start_adapter)
        load_adapter(base.model, folder)
        provenance |= {"adapter": config.start_adapter, "adapter_digest": adapter_digest(folder)}
    return Responder(base, provenance, config.thinking, config.system)


def _check_chat_template(base: LoadedModel) -> None:
    if not base.tokenizer.has_chat_template:
        raise ConfigError(f"{base.source}: its tokenizer has no chat template; use a chat model")


def derive_seed(seed: int, chunk: int, position: int) -> int:
    """Return the sampling seed for answer number `position` to the prompts of chunk `chunk`."""
    return (seed + SEED_STRIDE * chunk + position) % SEEDS


def response_provenance(responder: Responder, sampling: Sampling) -> dict[str, Any]:
    """Return the model, adapter and sampling settings, to be stored with an answer."""
    settings = {name: value for name, value in asdict(sampling).items() if value is not None}
    return responder.provenance | {"sampling": settings}
