"""The generation thread survives what a request does to it."""

from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import mlx_lm
import pytest
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    LogitsProcessorArguments,
    ModelDescription,
    ResponseGenerator,
    SamplingArguments,
)

from mlx_dpo.adapters.attach import attach_adapters, detach_adapters
from mlx_dpo.adapters.switch import AdapterSwitch
from mlx_dpo.chat import response_generator
from mlx_dpo.chat.requests import RequestError
from mlx_dpo.chat.response_generator import FaultTolerantResponseGenerator, GenerationFailed
from mlx_dpo.chat.served_model import ServedModel, SwitchingModelProvider
from mlx_dpo.config.sampling import Sampling
from tests.checkpoints import VOCAB, make_checkpoint

TOKENS, CONTEXT = 6, 64


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model, tokenizer = mlx_lm.load(str(make_checkpoint(tmp_path_factory.mktemp("m"))))
    switch, names = AdapterSwitch(model), {"base": "base"}
    switch.save_state("base")
    return ServedModel(model, tokenizer, switch, names, VOCAB, CONTEXT, Sampling(max_tokens=TOKENS))


@pytest.fixture
def generator(served):
    generator = FaultTolerantResponseGenerator(
        SwitchingModelProvider(served), vocab_size=VOCAB, context=CONTEXT
    )
    yield generator
    generator.stop_and_join()


def test_both_models_are_served_whose_weights_are_lazy(tmp_path):
    """Lazy arrays belong to the thread that made them: the base has a start adapter of its own."""
    folder = str(make_checkpoint(tmp_path))
    model, tokenizer = mlx_lm.load(folder, lazy=True)
    switch, names = AdapterSwitch(model), {"aligned": "aligned", "base": "base"}
    for state in ("base", "aligned"):
        detach_adapters(model)
        attach_adapters(model, rank=2, scale=2.0)
        switch.save_state(state)
    served = ServedModel(model, tokenizer, switch, names, VOCAB, CONTEXT, Sampling())
    generator = FaultTolerantResponseGenerator(
        SwitchingModelProvider(served), vocab_size=VOCAB, context=CONTEXT
    )
    assert switch.active == "aligned"
    try:
        assert len(ask(generator)) == TOKENS
    finally:
        generator.stop_and_join()


def arguments(*, max_tokens=TOKENS, stop=(), bias=None, **sampling):
    return GenerationArguments(
        ModelDescription("base", "default_model", None),
        SamplingArguments(**{"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
                             "xtc_probability": 0.0, "xtc_threshold": 0.1} | sampling),
        LogitsProcessorArguments(bias, 0.0, 20, 0.0, 20, 0.0, 20),
        list(stop), max_tokens, 3, False, -1, None, None,
    )  # fmt: skip


def ask(generator, text="The cat", **settings):
    request = CompletionRequest("text", text, [], None, None)
    _, tokens = generator.generate(request, arguments(**settings))
    return [response.token for response in tokens]


def test_an_empty_tokenized_prompt_never_reaches_the_model(generator):
    class EmptyTokenizer:
        def encode(self, text):
            return []

    with pytest.raises(RequestError, match="the prompt is empty"):
        generator._tokenize(
            EmptyTokenizer(), CompletionRequest("text", "\u200b", [], None, None), arguments()
        )


def test_what_fails_in_sampling_costs_that_request_only(generator):
    """The checks of requests refuse this before; here it fails on the generation thread."""
    expected = ask(generator)
    for settings in ({"top_k": 10**6, "temperature": 1.0}, {"bias": {"a": 1.0}}):
        with pytest.raises(GenerationFailed):
            ask(generator, **settings)
        assert ask(generator) == expected


def test_requests_end_if_generation_cannot_even_begin(generator, monkeypatch, capfd):
    """Nothing is tried again and again, and generation goes on once it can."""
    expected = ask(generator)
    load = SwitchingModelProvider.load_default

    def fail(self):
        raise RuntimeError("no memory")

    monkeypatch.setattr(response_generator, "RECOVERY_SECONDS", 0.01)
    monkeypatch.setattr(SwitchingModelProvider, "load_default", fail)
    monkeypatch.setattr(SwitchingModelProvider, "load", fail)
    generator._make_state_machine = None  # fails outside of what mlx-lm catches
    with pytest.raises((GenerationFailed, RuntimeError)):
        ask(generator, "the hat")
    del generator._make_state_machine
    monkeypatch.undo()
    assert SwitchingModelProvider.load_default is load
    assert ask(generator) == expected


def test_an_answer_ends_at_the_end_of_the_context(generator, served):
    text = "The cat sat on the mat."
    room = CONTEXT - len(served.tokenizer.encode(text))
    assert len(ask(generator, text, max_tokens=10**6)) <= room
    with pytest.raises(GenerationFailed) as failed:
        ask(generator, "cat " * CONTEXT)
    assert isinstance(failed.value.cause, RequestError)
    assert failed.value.cause.code == "context_length_exceeded"


def test_a_text_that_cannot_fit_is_not_tokenized(generator, monkeypatch):
    """Megabytes take minutes, in which nobody else would get an answer."""
    monkeypatch.setattr(ResponseGenerator, "_tokenize", None)
    with pytest.raises(GenerationFailed) as failed:
        ask(generator, "word " * 10**6)
    assert "5,000,000 characters leave no room for an answer" in str(failed.value.cause)
    assert isinstance(failed.value.cause, RequestError)
    assert failed.value.cause.code == "context_length_exceeded"


def test_requests_beside_the_cause_of_a_failure_get_their_answers(generator, monkeypatch, capfd):
    """The whole batch fails when `poison` is in it; served alone, only `poison` itself fails."""
    texts = ["The cat", "the hat", "poison", "on the hill", "no"]
    expected = {text: ask(generator, text) for text in texts}
    insert, poisoned = response_generator.FaultTolerantResponseGenerator._tokenize, set()

    def tokenize(self, tokenizer, request, args):
        tokenized = insert(self, tokenizer, request, args)
        if request.prompt == "poison":
            poisoned.add(id(args))
        return tokenized

    def make_sampler(args, tokenizer):
        def fail(logprobs):
            raise RuntimeError("out of memory")

        return fail if id(args) in poisoned else original(args, tokenizer)

    import mlx_lm.server

    original = mlx_lm.server._make_sampler
    monkeypatch.setattr(response_generator.FaultTolerantResponseGenerator, "_tokenize", tokenize)
    monkeypatch.setattr(mlx_lm.server, "_make_sampler", make_sampler)

    def outcome(text):
        try:
            return ask(generator, text)
        except (GenerationFailed, RuntimeError) as error:
            return str(error)

    with ThreadPoolExecutor(len(texts)) as pool:
        outcomes = dict(zip(texts, pool.map(outcome, texts), strict=True))
    assert outcomes.pop("poison") == "out of memory"
    for text, tokens in outcomes.items():
        # An answer that had begun ends with the failure, and every other is complete.
        assert tokens in (expected[text], "out of memory")
    monkeypatch.undo()
    assert ask(generator) == expected["The cat"]
    assert capfd.readouterr().err.splitlines() == ["A request failed: RuntimeError: out of memory"]


def test_a_failure_is_told_to_no_client_that_has_left(generator):
    from queue import Queue

    queue = Queue()
    replies = response_generator._Replies(queue, None, None)
    context = Namespace(_should_stop=False)
    replies._context = context
    assert not replies.is_over
    context._should_stop = True
    assert replies.is_over


def test_the_context_of_a_second_attempt_stops_with_the_first():
    from queue import Queue

    from mlx_lm.server import GenerationContext

    queue = Queue()
    replies = response_generator._Replies(queue, None, None)
    first, second = (GenerationContext(False, False, None, None, "normal", [1]) for _ in range(2))
    replies.put(first)
    replies.put(second)
    assert [queue.get_nowait()] == [first] and queue.empty()
    first.stop()
    assert second._should_stop
