"""A loaded model as a model of lm-eval (EleutherAI's LM Evaluation Harness).

Only `tasks.py` imports this module, after a check that lm-eval is installed.

Tokens, log-likelihoods and generated texts are those of `mlx_lm.evaluate` on the fused model, with
these exceptions: a text stays within the model's context; an empty context without a token that
begins texts is replaced by the end token, as in lm-eval; chat templates get `enable_thinking` as in
training.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2.exceptions import TemplateError
from lm_eval.api.model import LM

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.chat_templates.render import TemplateInput, call_template
from mlx_dpo.errors import ModelError, reason
from mlx_dpo.evaluation.measurements.perplexity import split_windows
from mlx_dpo.generation.batch import generate_tokens
from mlx_dpo.generation.context import context_length
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.phases import phase
from mlx_dpo.scoring.sequence_logps import continuation_scores, sequence_logps

MAX_LENGTH = 8192  # tokens of a text, and of an answer without a limit; mlx_lm.evaluate's
FIRST_ROUND = 256  # tokens of an answer before a look for a text that ends it
MIN_ANSWER = 256  # tokens that a prompt leaves for the answer, or half of a short context

LEFT_OUT = "contexts were truncated on the left to fit into the model's context"
TOO_LONG = "continuations were longer than the model's context: their log-likelihood is -inf"
SAMPLED = "answers were generated greedily, although the task asks for sampling"


class LmEvalModel(LM):
    """The model of a run in one state, for lm-eval.

    Args:
        base: the model and its tokenizer.
        as_chat: whether prompts come from the chat template, which writes the special tokens.
        thinking: whether the chat template enables thinking.
        max_tokens: limit of tokens per answer; None for that of the task.
        label: name of the state, for the display of phases.
    """

    def __init__(
        self,
        base: LoadedModel,
        *,
        as_chat: bool,
        thinking: bool,
        max_tokens: int | None,
        label: str,
    ) -> None:
        super().__init__()
        self.base, self.tokenizer = base, base.tokenizer
        self.as_chat, self.thinking = as_chat, thinking
        self.max_tokens, self.label = max_tokens, label
        self.max_length = min(MAX_LENGTH, context_length(base.config) or MAX_LENGTH)
        self.warnings: Counter[str] = Counter()
        self.is_computing = False  # an exception is then ours, and not of a task's code

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for lm-eval's caches."""
        return str(self.base.path.name)

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation in the chat template as text.

        Raises:
            ModelError: the template refuses the conversation.
        """
        template_input = TemplateInput(
            [dict(message) for message in chat_history],
            self.thinking,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return str(call_template(self.tokenizer, template_input, tokenize=False))
        except TemplateError as error:
            raise ModelError(
                f"the model's chat template refuses a task's conversation ({reason(error)}); use "
                "--no-apply-chat-template"
            ) from error

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each request's continuation, in nats.

        Args:
            requests: objects with `args`, a context and a continuation.
        """
        by_context: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            by_context[request.args[0]].append(index)
        scores: dict[int, tuple[float, bool]] = {}
        with self._computing("Scoring answers", len(requests)) as advance:
            for context, indices in by_context.items():
                texts = [requests[index].args[1] for index in indices]
                scores |= zip(indices, self._scores(context, texts), strict=True)
                advance(len(indices))
        return [scores[index] for index in range(len(requests))]

    def _scores(self, context: str, continuations: Sequence[str]) -> list[tuple[float, bool]]:
        """Return the scores of several continuations of a context."""
        prefix = self._encode(context)
        rows = [self._encode(context + text)[len(prefix) :] for text in continuations]
        rows = [  # a continuation that merges with the context has no token of its own
            row or self.tokenizer.encode(text, add_special_tokens=False)
            for row, text in zip(rows, continuations, strict=True)
        ]
        prefix = prefix or [self.tokenizer.eos_token_id]
        room = self.max_length + 1 - max(map(len, rows))
        if room < 1:
            self.warnings[TOO_LONG] += len(rows)
            return [(-float("inf"), False)] * len(rows)
        if len(prefix) > room:
            self.warnings[LEFT_OUT] += 1
        scored = [row for row in rows if row]  # an empty text has probability 1
        scores = iter(continuation_scores(self.base.model, prefix[-room:], scored))
        return [(*next(scores),) if row else (0.0, True) for row in rows]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log-likelihood of each request's text, in nats.

        The first token has no context and is not scored; it is the token that begins texts, if the
        tokenizer has one. Texts longer than the context are scored in windows.

        Args:
            requests: objects with `args`, a text.
        """
        parts = [
            (index, part)
            for index, request in enumerate(requests)
            for part in split_windows(
                self._encode(request.args[0]), self.max_length, max(1, self.max_length // 2)
            )
        ]
        sums = [0.0] * len(requests)
        with self._computing("Scoring texts", len(parts)) as advance:
            sequences = [part for _, part in parts]
            logps = sequence_logps(self.base.model, sequences, progress=advance)
        for (index, _), logp in zip(parts, logps, strict=True):
            sums[index] += logp
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return a greedy answer to each request, which ends before any of its texts `until`.

        Args:
            requests: objects with `args`, a context and settings of generation.
        """
        by_limit: dict[int, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            settings = request.args[1]
            if settings.get("do_sample") and settings.get("temperature"):
                self.warnings[SAMPLED] += 1
            limit = self.max_tokens or settings.get("max_gen_toks") or MAX_LENGTH
            by_limit[int(limit)].append(index)
        answers: dict[int, str] = {}
        self.is_computing = True
        for limit, indices in by_limit.items():
            prompts = [self._fit(self._encode(requests[index].args[0]), limit) for index in indices]
            untils = [_texts(requests[index].args[1].get("until")) for index in indices]
            answers |= zip(indices, self._generate(prompts, untils, limit), strict=True)
        self.is_computing = False
        return [answers[index] for index in range(len(requests))]

    def _generate(
        self, prompts: Sequence[list[int]], untils: Sequence[Sequence[str]], limit: int
    ) -> list[str]:
        """Return greedy answers of at most `limit` tokens.

        They are generated in rounds of growing length, because a base model that never ends its
        answer has often written one of the texts that end it.
        """
        tokens: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        unfinished = list(range(len(prompts)))
        context = context_length(self.base.config)
        done, size = 0, min(FIRST_ROUND, limit)
        while unfinished:
            rows = [prompts[i] + tokens[i] for i in unfinished]
            stops, sampling = self.tokenizer.eos_token_ids, Sampling(max_tokens=size)
            answers = generate_tokens(self.base.model, stops, rows, sampling, context=context)
            done += size
            remaining = []
            for i, answer in zip(unfinished, answers, strict=True):
                tokens[i] += answer.tokens
                texts[i] = self.tokenizer.decode(tokens[i])
                is_full = context is not None and len(prompts[i]) + len(tokens[i]) >= context
                is_cut = answer.stop_token is None and not is_full
                if is_cut and done < limit and not any(text in texts[i] for text in untils[i]):
                    remaining.append(i)
            unfinished, size = remaining, min(done, limit - done)
        return [self._strip(text, until) for text, until in zip(texts, untils, strict=True)]

    def _strip(self, text: str, until: Sequence[str]) -> str:
        """Return an answer up to the first text of `until`, and without its thinking."""
        ends = [position for end in until if (position := text.find(end)) >= 0]
        text = text[: min(ends, default=len(text))]
        if self.tokenizer.has_thinking:
            before, mark, after = text.partition(self.tokenizer.think_end)
            return after if mark else before
        return text

    def _fit(self, prompt: list[int], limit: int) -> list[int]:
        """Return the end of a prompt that leaves room for an answer in the model's context."""
        context = context_length(self.base.config)
        if context is None:
            return prompt
        room = context - min(limit, MIN_ANSWER, context // 2)
        if len(prompt) > room:
            self.warnings[LEFT_OUT] += 1
        return prompt[-room:]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=not self.as_chat))

    @contextmanager
    def _computing(self, title: str, total: int) -> Iterator[Any]:
        """Show a phase; an exception inside the block is ours."""
        self.is_computing = True
        with phase(f"{title} ({self.label})", total, unit="texts") as advance:
            yield advance
        self.is_computing = False


def _texts(until: str | Sequence[str] | None) -> list[str]:
    """Return the texts that end an answer; an empty text ends none."""
    texts = [until] if isinstance(until, str) else list(until or ())
    return [text for text in texts if text]
