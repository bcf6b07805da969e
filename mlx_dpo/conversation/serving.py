"""mlx-lm's OpenAI-compatible server over one set of weights: each side of it a model by name.

mlx-lm finishes what it is answering before it asks for another model, so a side can be put on then.
"""

import socket
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.server import (
    CompletionRequest,
    ModelProvider,
    ResponseGenerator,
    get_system_fingerprint,
)

from mlx_dpo.conversation.answering import DEFAULT, Handler
from mlx_dpo.errors import ConfigError, reason
from mlx_dpo.policy.batched import batches_exactly
from mlx_dpo.policy.sampling import Sampling
from mlx_dpo.policy.sides import Side, Sides, evaluated

PROBES = (3, 40)  # lengths of the prompts on which batching is tried
PROMPT_CACHES = 10


@dataclass(frozen=True)
class Service:
    """What is served, and how where a request does not say."""

    model: Any
    tokenizer: Any
    sides: Sides
    names: Mapping[str, Side]  # the first one is for requests that name none
    vocab_size: int  # ids at or above it must not reach the model
    sampling: Sampling
    thinking: bool = False
    system: str | None = None  # for conversations that have none
    origins: Sequence[str] = ()  # web pages that may ask; `*` is any


class Provider(ModelProvider):
    """Puts on the side that a request names, where mlx-lm would load another model."""

    def __init__(self, service: Service) -> None:
        super().__init__(_arguments(service))
        self.service = service
        self.batches = batches_exactly(
            service.model, [[n % 7 for n in range(length)] for length in PROBES]
        )
        # The server's thread could compute nothing that was begun on this one.
        evaluated(service.model)

    def load_default(self) -> None:
        """The side that is for requests that name none."""
        self.load(DEFAULT)

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[Any, Any]:
        """Put on the side of that name."""
        names = self.service.names
        side = names[next(iter(names)) if model_path == DEFAULT else model_path]
        self.service.sides.put(side)
        self.model_key = (side, None, None)  # prompt caches are kept apart by it
        self.model, self.tokenizer = self.service.model, self.service.tokenizer
        self.is_batchable = self.batches
        return self.model, self.tokenizer


class Generator(ResponseGenerator):
    """mlx-lm's, whose thread leaves nothing running behind it."""

    def _tokenize(self, tokenizer: Any, request: CompletionRequest, args: Any) -> Any:
        found = super()._tokenize(tokenizer, request, args)
        if not found[0]:  # the model cannot begin with nothing, and the thread would end there
            raise ValueError("the prompt is empty")
        return found

    def _run_generate(self) -> None:
        super()._run_generate()
        # Work that is still under way when the thread ends would abort the program.
        mx.synchronize()
        mx.clear_streams()


class Server(ThreadingHTTPServer):
    """Bound when it is made, so that a port that is taken is known before a model is loaded."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        try:
            [(self.address_family, *_), *_] = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            super().__init__((host, port), Handler)
        except OSError as error:
            raise ConfigError(
                f"{host}:{port}: cannot be listened at ({reason(error)}); choose another --port or "
                "--host"
            ) from error

    @property
    def url(self) -> str:
        """What clients are given as their base."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"

    def answer(self, service: Service) -> None:
        """Answer requests until Ctrl-C."""
        generator = Generator(Provider(service), LRUPromptCache(PROMPT_CACHES))
        fingerprint = get_system_fingerprint()
        handler = partial(Handler, generator, system_fingerprint=fingerprint)
        self.RequestHandlerClass = handler
        try:
            self.serve_forever()
        finally:
            self.server_close()
            generator.stop_and_join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave in the middle are no errors."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _arguments(service: Service) -> Namespace:
    """What mlx-lm's server reads of its command line."""
    sampling = service.sampling
    return Namespace(
        model=None,
        adapter_path=None,
        draft_model=None,
        num_draft_tokens=3,
        trust_remote_code=False,
        chat_template="",
        use_default_chat_template=False,
        chat_template_args={"enable_thinking": service.thinking},
        temp=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=sampling.max_tokens,
        decode_concurrency=32,
        prompt_concurrency=8,
        prefill_step_size=2048,
        prompt_cache_size=PROMPT_CACHES,
        prompt_cache_bytes=None,
        kv_bits=None,
        kv_group_size=64,
        quantized_kv_start=0,
        pipeline=False,
        allowed_origins=list(service.origins),
    )
