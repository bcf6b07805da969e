"""Generate answers to prompts with a run or a model, and record their provenance."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_dpo.adapters.adapter_files import adapter_digest, load_adapter
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.config.sampling import SEEDS, Sampling
from mlx_dpo.data.prompts import Prompt, prepend_system_prompt
from mlx_dpo.errors import ConfigError
from mlx_dpo.generation.batch import (
    GeneratedText,
    decode_answers,
    generate_replies,
    generate_tokens,
)
from mlx_dpo.generation.context import clip_note, context_length, max_answer_tokens
from mlx_dpo.generation.decode import strip_thinking
from mlx_dpo.generation.prompt import check_thinking, encode_prompt
from mlx_dpo.generation.responder import Responder
from mlx_dpo.models.files import model_fingerprint
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.openai_client.address import is_address
from mlx_dpo.openai_client.connection import Connection
from mlx_dpo.openai_client.responder import open_api_responder
from mlx_dpo.runs.inputs import load_trainable_base
from mlx_dpo.runs.stages.find import has_run
from mlx_dpo.saved_runs.open import load_policy, open_run
from mlx_dpo.types import Message

SEED_STRIDE = 1_000_003  # between the seeds of chunks; a prime, so that seeds rarely coincide


@dataclass(frozen=True)
class ModelResponder:
    """A loaded model that answers prompts, with the chat settings of its run."""

    base: LoadedModel
    provenance: dict[str, Any]  # name and digest of the model, and of the adapter of a run
    thinking: bool | None = None
    system: str | None = None  # the system message of the training run

    def reply(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[GeneratedText]:
        """Generate one answer per prompt; each result says whether it was cut.

        An answer ends at the latest at the end of the model's context.

        Raises:
            ConfigError: a prompt leaves no room in the model's context.
        """
        rows = self._encode(prompts)
        for row, prompt in zip(rows, prompts, strict=True):
            max_answer_tokens(prompt.location, len(row), sampling.max_tokens, self.context)
        model, tokenizer = self.base.model, self.base.tokenizer
        answers = generate_tokens(
            model, tokenizer.eos_token_ids, rows, sampling, context=self.context
        )
        return decode_answers(tokenizer, answers)

    def answer(
        self, conversations: Sequence[Sequence[Message]], sampling: Sampling, *, name: str
    ) -> list[str]:
        """Return the text of one answer per conversation, which errors call by `name` and number.

        Raises:
            ConfigError: a conversation leaves no room in the model's context.
        """
        replies = generate_replies(
            self.base.model,
            self.base.tokenizer,
            conversations,
            sampling=sampling,
            context=self.context,
            thinking=self.thinking,
            name=name,
        )
        return [reply.text for reply in replies]

    def strip_thinking(self, conversation: Sequence[Message], reply: str) -> str:
        """Return a reply to `conversation` without its thinking."""
        prompt = encode_prompt(self.base.tokenizer, conversation, thinking=self.thinking)
        return strip_thinking(self.base.tokenizer, prompt, reply)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes of loading, for the user."""
        return tuple(self.base.notes)

    @property
    def context(self) -> int | None:
        """Context length of the model in tokens; None if the model has none."""
        return context_length(self.base.config)

    def clip_note(self, prompts: Sequence[Prompt], max_tokens: int) -> str | None:
        """Return a note if answers of `max_tokens` tokens do not fit into the model's context."""
        return clip_note([len(row) for row in self._encode(prompts)], max_tokens, self.context)

    def _encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        if self.thinking is not None:
            check_thinking(self.base.tokenizer)
        return [
            encode_prompt(self.base.tokenizer, prompt.messages, thinking=self.thinking)
            for prompt in prompts
        ]


def open_any_responder(
    spec: str, connection: Connection | None = None, *, sends: str = "prompts"
) -> Responder:
    """Open whatever `spec` names to answer prompts: an address, a run folder or a model.

    Args:
        spec: address of an OpenAI-compatible server (`http://127.0.0.1:1234/v1#model`), a run
            folder, or a model (a folder or a Hub id).
        connection: settings of the connection to an address; by default only this machine.
        sends: what the requests to an address will contain, such as `prompts and answers`; it is
            shown before anything is sent to another machine.

    Raises:
        ConfigError: the address may not be used, or a model has no chat template.
        ModelError: the server cannot be reached, or the model cannot be read.
        RunError: the run has no adapters yet, or its model has changed.
    """
    if is_address(spec):
        return open_api_responder(spec, connection, sends=sends)
    if has_run(spec):
        return open_responder(spec)
    return open_responder(None, model=spec)


def open_responder(
    run: str | None, *, model: str | None = None, reference: bool = False
) -> ModelResponder:
    """Load a run's policy, a run's reference or a model without a run, to answer prompts.

    Raises:
        ConfigError: the tokenizer has no chat template, or the run was trained on plain text.
    """
    base = load_policy(run, model=model, reference=reference)
    _check_chat_template(base)
    provenance: dict[str, Any] = {"model": base.source}
    if run is None:
        return ModelResponder(base, provenance | {"model_digest": model_fingerprint(base.path)})
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
    return ModelResponder(base, provenance, config.thinking, config.system)


def open_untrained_responder(config: DPOConfig) -> ModelResponder:
    """Load the untrained policy from which a run with these settings would start.

    Raises:
        ConfigError: the tokenizer has no chat template, or `max_length` is beyond the positions
            that the model has learned.
    """
    base = load_trainable_base(config)
    _check_chat_template(base)
    provenance: dict[str, Any] = {
        "model": base.source,
        "model_digest": model_fingerprint(base.path),
    }
    if config.start_adapter is not None:
        folder = Path(config.start_adapter)
        load_adapter(base.model, folder)
        provenance |= {"adapter": config.start_adapter, "adapter_digest": adapter_digest(folder)}
    return ModelResponder(base, provenance, config.thinking, config.system)


def _check_chat_template(base: LoadedModel) -> None:
    if not base.tokenizer.has_chat_template:
        raise ConfigError(f"{base.source}: its tokenizer has no chat template; use a chat model")


def check_system_prompt(responder: Responder, prompt: Prompt, system: str, name: str) -> None:
    """Raise `ConfigError` if the model's chat template leaves out a system prompt.

    The templates of models at addresses are not known.

    Args:
        responder: what answers the prompt.
        prompt: a prompt without the system prompt.
        system: the system prompt.
        name: of the setting, for the error.
    """
    if not isinstance(responder, ModelResponder):
        return
    before, after = (
        encode_prompt(responder.base.tokenizer, given.messages, thinking=responder.thinking)
        for given in (prompt, prepend_system_prompt(prompt, system))
    )
    if before == after:
        raise ConfigError(
            f"{responder.base.source}: its chat template leaves out system messages, so `{name}` "
            "has no effect"
        )


def derive_seed(seed: int, chunk: int, position: int) -> int:
    """Return the sampling seed for answer number `position` to the prompts of chunk `chunk`."""
    return (seed + SEED_STRIDE * chunk + position) % SEEDS


def with_chunk_seed(sampling: Sampling, chunk: int, position: int) -> Sampling:
    """Return the sampling settings with `derive_seed`; without a seed, as they are."""
    if sampling.seed is None:
        return sampling
    return replace(sampling, seed=derive_seed(sampling.seed, chunk, position))


def reply_without_thinking(
    responder: Responder, prompts: Sequence[Prompt], sampling: Sampling
) -> list[GeneratedText]:
    """Generate one answer per prompt, without its thinking.

    Raises:
        ConfigError: a prompt leaves no room in the model's context.
    """
    return [
        reply._replace(text=responder.strip_thinking(prompt.messages, reply.text))
        for prompt, reply in zip(prompts, responder.reply(prompts, sampling), strict=True)
    ]


def response_provenance(responder: Responder, sampling: Sampling) -> dict[str, Any]:
    """Return the model, adapter and sampling settings, to be stored with an answer."""
    settings = {name: value for name, value in asdict(sampling).items() if value is not None}
    return responder.provenance | {"sampling": settings}
