"""The model that the server serves, with mlx-lm's provider of it, which switches adapters."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.server import ModelProvider

from mlx_dpo.adapters.switch import AdapterState, AdapterSwitch, evaluate_arrays
from mlx_dpo.chat.requests import DEFAULT_MODEL
from mlx_dpo.chat.response_generator import PROMPT_CACHE_SIZE
from mlx_dpo.chat.served_feedback import ServedFeedback
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.generation.batch import is_batching_exact

PROBE_LENGTHS = (3, 40)  # prompt lengths in tokens on which exact batching is checked


@dataclass(frozen=True)
class ServedModel:
    """A model to serve, the names by which clients request it, and default request settings."""

    model: Any
    tokenizer: Any
    switch: AdapterSwitch
    names: Mapping[str, AdapterState]  # the first entry serves requests that name no model
    vocab_size: int  # larger token ids must not reach the model
    context: int | None  # in tokens; None for no limit
    sampling: Sampling
    thinking: bool = False
    system: str | None = None  # for conversations without a system message
    origins: Sequence[str] = ()  # origins of web pages that may send requests; `*` means any
    digests: Mapping[str, str] = field(default_factory=dict)  # by name, of what answers depend on
    feedback: ServedFeedback | None = None  # where judgements of answers are written


class SwitchingModelProvider(ModelProvider):
    """mlx-lm's model provider, which here switches adapters instead of loading another model."""

    def __init__(self, served: ServedModel) -> None:
        super().__init__(_mlx_lm_arguments(served))
        self.served = served
        self.batches = is_batching_exact(
            served.model,
            [[n % 7 for n in range(length)] for length in PROBE_LENGTHS],
            context=served.context,
        )
        # The server's thread cannot evaluate arrays whose computation began on this thread.
        for state in dict.fromkeys(served.names.values()):
            with served.switch.activated(state):
                evaluate_arrays(served.model)

    def load_default(self) -> None:
        """Switch to the default model, which answers requests that name no model."""
        self.load(DEFAULT_MODEL)

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[Any, Any]:
        """Switch the adapters for the served name `model_path`; return model and tokenizer."""
        names = self.served.names
        adapter_state = names[next(iter(names)) if model_path == DEFAULT_MODEL else model_path]
        self.served.switch.activate(adapter_state)
        self.model_key = (adapter_state, None, None)  # mlx-lm keeps one prompt cache per key
        self.model, self.tokenizer = self.served.model, self.served.tokenizer
        self.is_batchable = self.batches
        return self.model, self.tokenizer


def _mlx_lm_arguments(served: ServedModel) -> Namespace:
    """Return the settings of the served model as arguments of mlx-lm's server."""
    sampling = served.sampling
    return Namespace(
        model=None,
        adapter_path=None,
        draft_model=None,
        num_draft_tokens=3,
        trust_remote_code=False,
        chat_template="",
        use_default_chat_template=False,
        chat_template_args={"enable_thinking": served.thinking},
        temp=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=sampling.max_tokens,
        decode_concurrency=32,
        prompt_concurrency=8,
        prefill_step_size=2048,
        prompt_cache_size=PROMPT_CACHE_SIZE,
        prompt_cache_bytes=None,
        kv_bits=None,
        kv_group_size=64,
        quantized_kv_start=0,
        pipeline=False,
        allowed_origins=list(served.origins),
    )
