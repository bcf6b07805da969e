"""mlx-lm's response generator, whose thread here survives every failure of a request."""

import sys
import traceback
from collections.abc import Callable, Sequence
from queue import Queue
from time import sleep
from typing import Any

import mlx.core as mx
from jinja2.exceptions import TemplateError
from mlx_lm.generate import make_stop_sequences
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.server import (
    CompletionRequest,
    GenerationContext,
    ModelProvider,
    Response,
    ResponseGenerator,
    _format_top_logprobs,
    _make_logits_processors,
    _make_sampler,
)

from mlx_dpo.chat.requests import RequestError
from mlx_dpo.data.chat_templates.render import TEMPLATE_EXCEPTIONS
from mlx_dpo.data.chat_templates.sandbox import install_limits
from mlx_dpo.data.chat_templates.tool_calls import fit_tool_calls
from mlx_dpo.errors import ConfigError, reason, shows_tracebacks
from mlx_dpo.generation.context import max_answer_tokens
from mlx_dpo.terminal_text import escape_controls, escape_line
from mlx_dpo.types import Message

PROMPT_CACHE_SIZE = 10
RECOVERY_SECONDS = 0.5  # before generation starts again after a failure without requests
MAX_TOKEN_CHARACTERS = 128  # of long runs of spaces; words have fewer
CONTEXT_EXCEEDED = "context_length_exceeded"  # OpenAI's code


class GenerationFailed(BaseException):
    """A request failed before its answer began.

    The base class is `BaseException` because mlx-lm's handler answers every `Exception` with 404.
    """

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause


class _Replies:
    """Replies of the generation thread to one request, in a queue.

    If generation starts again after a failure, the handler must not see a second context.
    """

    def __init__(self, queue: Queue[Any], request: CompletionRequest, args: Any) -> None:
        self.queue, self.request, self.args = queue, request, args
        self.has_begun = self.is_finished = self.is_alone = False
        self._context: GenerationContext | None = None

    @property
    def is_over(self) -> bool:
        """Whether the request is finished, or its client has left."""
        return self.is_finished or (self._context is not None and self._context._should_stop)

    def put(self, item: Any) -> None:
        """Pass on a context, the progress of the prompt, a token, an exception or None (end)."""
        self.has_begun |= isinstance(item, Response)
        self.is_finished |= item is None or isinstance(item, Exception)
        if not isinstance(item, GenerationContext):
            self.queue.put(item)
        elif self._context is None:
            self._context = item
            self.queue.put(item)
        else:
            self._context.stop = item.stop


class TemplateTokenizer:
    """A tokenizer that gives tool calls to its chat template as training does."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, messages: Sequence[Message], **kwargs: Any) -> Any:
        """Return the text or the token ids of a conversation in the chat template."""
        install_limits()
        fitted = fit_tool_calls(self._tokenizer, messages)
        return self._tokenizer.apply_chat_template(fitted, **kwargs)


class FaultTolerantResponseGenerator(ResponseGenerator):
    """mlx-lm's response generator, with a thread that continues after any failure.

    If generation for several requests at once fails, it is not known which of them is the cause.
    Those whose answer has not begun are then served again, each alone, so that the cause fails
    by itself.
    """

    def __init__(
        self, provider: ModelProvider, *, vocab_size: int, context: int | None = None
    ) -> None:
        self._vocab_size, self._context = vocab_size, context
        self._in_progress: list[_Replies] = []
        self._alone: set[int] = set()  # ids of arguments of requests that are served alone
        super().__init__(provider, LRUPromptCache(PROMPT_CACHE_SIZE))

    def _run_generate(self) -> None:
        while not self._stop:
            try:
                self._generate()
            except Exception as error:
                self._recover(error)
        # A computation still running when the thread ends would abort the program.
        mx.synchronize()
        mx.clear_streams()

    def _recover(self, error: Exception) -> None:
        """Serve or end the requests in progress after a failure of generation."""
        print_failure(f"{type(error).__name__}: {reason(error)}", error)
        self.prompt_cache = LRUPromptCache(PROMPT_CACHE_SIZE)  # caches may be incomplete
        in_progress, self._in_progress, self._alone = self._in_progress, [], set()
        if not in_progress:  # not even a request was the cause: end all that wait
            while (taken := super()._next_request()) is not None:
                taken[0].put(error)
            sleep(RECOVERY_SECONDS)
        for replies in in_progress:
            if replies.is_over:
                continue
            if replies.has_begun or replies.is_alone:
                replies.put(error)
            else:
                replies.is_alone = True
                self._alone.add(id(replies.args))
                self.requests.put((replies, replies.request, replies.args))

    def _next_request(self, timeout: float | None = None) -> Any:
        taken = super()._next_request(timeout)
        if taken is None:
            return None
        replies, request, args = taken
        if not isinstance(replies, _Replies):
            replies = _Replies(replies, request, args)
        self._in_progress = [r for r in self._in_progress if not r.is_over]
        self._in_progress.append(replies)
        return replies, request, args

    def _is_batchable(self, args: Any) -> bool:
        return id(args) not in self._alone and super()._is_batchable(args)

    def _tokenize(self, tokenizer: Any, request: CompletionRequest, args: Any) -> Any:
        """Tokenize a request, and check all that could fail later and end other requests.

        Raises:
            RequestError: the request cannot be served.
        """
        param = "messages" if request.request_type == "chat" else "prompt"
        self._check_text(request, param)
        try:
            tokenized = super()._tokenize(TemplateTokenizer(tokenizer), request, args)
        except (TemplateError, *TEMPLATE_EXCEPTIONS) as error:
            what = "conversation" if request.request_type == "chat" else "text"
            raise RequestError(f"the {what} cannot be tokenized ({reason(error)})") from error
        prompt = tokenized[0]
        if not prompt:
            raise RequestError("the prompt is empty", param)
        if max(prompt) >= self._vocab_size:  # would read other memory in the model
            raise RequestError(
                f"the prompt contains the token id {max(prompt)}, but the vocabulary has "
                f"{self._vocab_size} tokens",
                param,
            )
        try:
            args.max_tokens = max_answer_tokens(
                "the prompt", len(prompt), args.max_tokens, self._context
            )
        except ConfigError as error:
            raise RequestError(str(error), param, code=CONTEXT_EXCEEDED) from None
        self._check_stop(tokenizer, args.stop_words)
        self._check_sampling(tokenizer, prompt, args)
        return tokenized

    def _check_text(self, request: CompletionRequest, param: str) -> None:
        """Raise `RequestError` if a text cannot fit into the context, however it is tokenized.

        Tokenizing millions of characters takes long, and all other requests would wait.
        """
        texts = [request.prompt] + [str(message.get("content", "")) for message in request.messages]
        characters = sum(map(len, texts))
        if self._context is not None and characters > self._context * MAX_TOKEN_CHARACTERS:
            raise RequestError(
                f"the prompt: {characters:,} characters leave no room for an answer (the context "
                f"is {self._context:,} tokens); shorten it",
                param,
                code=CONTEXT_EXCEEDED,
            )

    def _check_stop(self, tokenizer: Any, stop_words: list[str]) -> None:
        for text in stop_words:
            if not tokenizer.encode(text, add_special_tokens=False):
                raise RequestError(f"`stop` contains {text!r}, which the tokenizer drops", "stop")
        make_stop_sequences(tokenizer, stop_words)

    def _check_sampling(self, tokenizer: Any, prompt: list[int], args: Any) -> None:
        """Sample a token from equal logits, so that what fails here fails for this request only."""
        logits = mx.zeros((1, self._vocab_size))
        for process in _make_logits_processors(args):
            logits = process(mx.array(prompt), logits)
        mx.eval(_make_sampler(args, tokenizer)(logits))
        _format_top_logprobs(logits[0], args.top_logprobs, tokenizer)

    def generate(
        self,
        request: CompletionRequest,
        generation_args: Any,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> Any:
        """Begin to generate; return the context and an iterator over the tokens of the answer.

        Raises:
            GenerationFailed: the request cannot be served, or generation failed.
        """
        try:
            return super().generate(request, generation_args, progress_callback)
        except Exception as error:
            raise GenerationFailed(error) from error


def print_failure(message: str, error: BaseException) -> None:
    """Print on stderr that a request failed, on one line; MLX_DPO_DEBUG=1 adds the traceback."""
    print(f"A request failed: {escape_line(message)}", file=sys.stderr)
    if shows_tracebacks():
        sys.stderr.write(escape_controls("".join(traceback.format_exception(error))))
