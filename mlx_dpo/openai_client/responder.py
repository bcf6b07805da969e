"""A model at an OpenAI-compatible address that answers prompts."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_dpo.config.sampling import SEEDS, Sampling
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.generation.batch import GeneratedText, GeneratedTokens
from mlx_dpo.io.notices import notify, notify_once
from mlx_dpo.openai_client.address import Address
from mlx_dpo.openai_client.client import ApiClient, Body
from mlx_dpo.openai_client.connection import Connection, RequestCounts
from mlx_dpo.openai_client.reply import Reply, strip_thinking
from mlx_dpo.openai_client.reply_cache import ReplyCache, request_key
from mlx_dpo.paths import CACHE_VARIABLE, reply_cache_folder
from mlx_dpo.phases import phase
from mlx_dpo.types import Message
from mlx_dpo.units import format_bytes

UNKNOWN_TOKEN = -1  # stands for the token that ended an answer, which a server does not name
# Sampling settings that OpenAI's API does not have; servers name them differently or ignore them.
NOT_IN_API = ("top_k", "min_p", "repetition_penalty")
LISTED_MODELS = 20  # in an error
# What identifies a model in a server's list. Other fields, such as the time, change by themselves.
IDENTITY = ("id", "owned_by", "root", "parent", "meta", "digest")


@dataclass
class ApiResponder:
    """A model at an address that answers prompts over OpenAI's chat API.

    `sends` names what the requests contain, for the note about another machine.
    """

    address: Address  # with its model
    client: ApiClient
    cache: ReplyCache
    counts: RequestCounts
    sends: str
    model: dict[str, Any]  # what the server says about the model, as part of the cache's keys
    notes: tuple[str, ...] = ()
    system: str | None = None
    _is_noted: bool = field(default=False, init=False, repr=False)  # that text leaves this machine

    @property
    def provenance(self) -> dict[str, Any]:
        """Address and model of what answers, with its digest if the server has one."""
        digest = self.model.get("digest")
        digests = {"model_digest": digest} if isinstance(digest, str) else {}
        return {"model": str(self.address)} | digests

    def reply(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[GeneratedText]:
        """Return one answer per prompt, without thinking; each result says whether it was cut.

        A prompt that is given several times gets as many answers, each with a seed of its own.

        Raises:
            ModelError: the server cannot be reached, refuses a request or sends no answers.
        """
        replies = self._complete([prompt.messages for prompt in prompts], sampling)
        return [
            GeneratedText(
                strip_thinking(reply.text),
                GeneratedTokens([], UNKNOWN_TOKEN if reply.finish_reason == "stop" else None),
            )
            for reply in replies
        ]

    def answer(
        self, conversations: Sequence[Sequence[Message]], sampling: Sampling, *, name: str
    ) -> list[str]:
        """Return the text of one answer per conversation, without thinking.

        Raises:
            ModelError: the server cannot be reached, refuses a request or sends no answers.
        """
        return [strip_thinking(reply.text) for reply in self._complete(conversations, sampling)]

    def clip_note(self, prompts: Sequence[Prompt], max_tokens: int) -> str | None:
        """Return None: a server does not state the length of the model's context."""
        return None

    def strip_thinking(self, conversation: Sequence[Message], reply: str) -> str:
        """Return a reply without its thinking."""
        return strip_thinking(reply)

    def _complete(
        self, conversations: Sequence[Sequence[Message]], sampling: Sampling
    ) -> list[Reply]:
        bodies = self._bodies(conversations, sampling)
        keys = [request_key(self.model, body) for body in bodies]
        wanted = dict(zip(keys, bodies, strict=True))  # greedy answers may be wanted twice
        stored = {key: reply for key in wanted if (reply := self.cache.get(key)) is not None}
        missing = {key: body for key, body in wanted.items() if key not in stored}
        self._note_remote(list(missing.values()))
        replies = stored | self._ask(missing)
        self.counts.add(
            cached=len(stored),
            cut=sum(reply.finish_reason == "length" for reply in replies.values()),
            filtered=sum(reply.is_filtered for reply in replies.values()),
        )
        return [replies[key] for key in keys]

    def _ask(self, bodies: Mapping[str, Body]) -> dict[str, Reply]:
        """Send requests by their keys; store each reply when it arrives.

        Raises:
            ModelError: the server cannot be reached, refuses a request or sends no answers.
        """
        keys, replies = list(bodies), dict[str, Reply]()
        if not keys:
            return replies
        with phase("Waiting for replies", len(keys), unit="replies") as count:

            def save(number: int, reply: Reply) -> None:
                replies[keys[number]] = reply
                if reply.is_usable:
                    self.cache.add(keys[number], reply)
                    self.counts.add(replies=1)
                count(1)

            try:
                self.client.complete(list(bodies.values()), save)
            except ModelError as error:
                if not self.cache.is_stored or not self.counts.replies:
                    raise
                raise ModelError(
                    f"{error}; what it has answered is stored, and the same command continues"
                ) from None
        return replies

    def _bodies(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Body]:
        """Return the requests for the conversations; equal ones differ in their seeds."""
        for name in NOT_IN_API:
            if getattr(sampling, name) != getattr(Sampling(), name):
                notify_once(
                    f"{self.address}: `{name}` is not in OpenAI's API, and is not sent; the "
                    "server's own value is used"
                )
        sampling = sampling.with_seed()  # without one, an earlier reply would be taken for random
        settings: Body = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
        if sampling.top_p != 1:
            settings["top_p"] = sampling.top_p
        bodies: list[Body] = []
        repeats = Counter[str]()
        for conversation in conversations:
            messages = [dict(message) for message in conversation]
            body: Body = {"model": self.address.model, "messages": messages, **settings}
            if sampling.seed is not None:
                text = json.dumps(messages, sort_keys=True)
                body["seed"] = (sampling.seed + repeats[text]) % SEEDS
                repeats[text] += 1
            bodies.append(body)
        return bodies

    def _note_remote(self, bodies: Sequence[Body]) -> None:
        """Say once what another machine gets, before anything is sent to it."""
        if self.address.is_loopback or self._is_noted or not bodies:
            return
        self._is_noted = True
        size = sum(len(json.dumps(body)) for body in bodies)
        notify(
            f"{self.address.host} is another machine and gets {self.sends}: "
            f"{len(bodies):,} request{'s' * (len(bodies) != 1)} ({format_bytes(size)}) now, and "
            "more with further prompts"
        )


def open_api_responder(
    spec: str, connection: Connection | None = None, *, sends: str = "prompts"
) -> ApiResponder:
    """Return the model at an address such as `http://127.0.0.1:1234/v1#model`.

    Without `#model`, the server's only model answers.

    Args:
        spec: address of the server, with the model.
        connection: settings of the connection.
        sends: what the requests will contain, for the note about another machine.

    Raises:
        ConfigError: the address may not be used, or does not name one of several models.
        ModelError: the server cannot be reached.
    """
    connection = connection or Connection()
    address = connection.open(spec)
    client = ApiClient(address, connection)
    listed = client.list_models() or []
    names = [row["id"] for row in listed]
    if address.model is None:
        address = _choose_model(address, names)
        client = ApiClient(address, connection)
    folder, notes = reply_cache_folder(), []
    if names and address.model not in names:
        notes.append(f"{address}: the server does not list this model (found {_shown(names)})")
    if folder is None:
        notes.append(
            f"{address}: its replies are not stored, because no cache folder is known; set HOME or "
            f"{CACHE_VARIABLE}"
        )
    model = next((row for row in listed if row["id"] == address.model), {})
    return ApiResponder(
        address,
        client,
        ReplyCache(folder, str(address)),
        connection.counts,
        sends,
        {name: model[name] for name in IDENTITY if name in model},
        tuple(notes),
    )


def _choose_model(address: Address, names: Sequence[str]) -> Address:
    if len(names) == 1:
        return Address(address.url, address.host, names[0])
    found = f"found {_shown(names)}" if names else "the server lists none"
    if not names and not address.url.endswith("/v1"):
        found += ", and most addresses end in /v1"
    raise ConfigError(f"{address}: name one of its models ({found}), as in {address.url}#MODEL")


def _shown(names: Sequence[str]) -> str:
    more = ", …" if len(names) > LISTED_MODELS else ""
    return ", ".join(names[:LISTED_MODELS]) + more
