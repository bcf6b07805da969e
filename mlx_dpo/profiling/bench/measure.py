"""Run the benchmark within a time budget, through the trainer's own scorer and loop."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlx_dpo.adapters.attach import disable_adapters
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.batches.token_counts import shares_prefixes
from mlx_dpo.generation.batch import generate_tokens
from mlx_dpo.models.device import device_kind
from mlx_dpo.optim.optimizers import build_optimizer
from mlx_dpo.parallel.second_process import (
    PASSES_AT_ONCE,
    can_compute_two_passes,
    peak_memory,
    reset_peak_memory,
)
from mlx_dpo.phases import phase
from mlx_dpo.profiling.bench.device_speed import (
    COPIED_BYTES,
    SQUARES,
    Clock,
    ProductSpeed,
    measure_copy,
    measure_product,
)
from mlx_dpo.profiling.bench.figures import Figures, ModelFacts, Round, Work
from mlx_dpo.profiling.bench.models import BenchModel, load_bench_model
from mlx_dpo.profiling.bench.shapes import PassShape
from mlx_dpo.profiling.bench.sharing import count_sharing
from mlx_dpo.profiling.bench.waiting_time import time_step
from mlx_dpo.profiling.device_memory import available_memory, limited_buffers
from mlx_dpo.profiling.flops import (
    TokenCounts,
    count_attended_keys,
    count_trie_tokens,
    model_flops,
    model_width,
)
from mlx_dpo.profiling.memory import base_parameters
from mlx_dpo.scoring.score_pairs import DatasetScorer
from mlx_dpo.scoring.scorers import memory_efficient_training
from mlx_dpo.scoring.select_scorer import ScorerChoice, select_scorer
from mlx_dpo.training.loop import Progress, train
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import TrainingPlan, make_micro_batches
from mlx_dpo.training.step import loss_and_gradients
from mlx_dpo.types import TokenizedPair

PAIR = PassShape(prompt=106, chosen=38, rejected=46, pairs=1)  # as in short dialogues
PAIRS_PER_STEP = (8, 4, 2, 1)  # the largest number for which the rounds fit into the time
LEARNING_RATE = 1e-6
MAX_ROUNDS, WANTED_ROUNDS, FEWEST_ROUNDS = 30, 5, 3
ROUND_PASSES = 2.5  # a round takes as long as so many passes with gradients
ROUNDS_SHARE = 0.7  # of the time, after which no round begins if there are FEWEST_ROUNDS
GENERATED, FEWEST_GENERATED = 32, 8  # tokens; fewer if the others do not fit into the time
SPEED_SHARE = 0.01  # of the time, for each product and for copies
PRODUCT_ROWS = 512  # tokens in the timed product of the model's own shape

MakeScorer = Callable[[DPOConfig, ScorerChoice], DatasetScorer]


@dataclass(frozen=True)
class BenchSettings:
    """What to measure, and for how long."""

    source: str | None = None  # folder or Hub id; None measures a random model
    shape: str = "smollm2-135m"
    bits: int | None = None
    seconds: float = 120.0


@dataclass(frozen=True)
class TimeBudget:
    """The time that a benchmark may take, and how much it measures in this time."""

    started: float
    seconds: float
    clock: Clock

    @property
    def left(self) -> float:
        """Seconds that are left for rounds."""
        return self.started + ROUNDS_SHARE * self.seconds - self.clock()

    def choose_pairs(self, seconds: float) -> int:
        """Return the most pairs in a step of which the wanted rounds fit into the time left.

        Args:
            seconds: that a pass with gradients takes over one pair.
        """
        per_pair = WANTED_ROUNDS * ROUND_PASSES * seconds
        left = self.left
        return next((n for n in PAIRS_PER_STEP if n * per_pair <= left), PAIRS_PER_STEP[-1])

    def has_time_for(self, seconds: float) -> bool:
        """Return whether so many seconds are left of all the time."""
        return self.clock() + seconds <= self.started + self.seconds

    def has_time(self, rounds: int, seconds: float) -> bool:
        """Return whether another round is to be measured, after `rounds` rounds.

        There is at least one, and fewer than FEWEST_ROUNDS only if all the time would be over.

        Args:
            seconds: that the last round took.
        """
        if rounds < FEWEST_ROUNDS:
            return rounds == 0 or self.has_time_for(seconds)
        return rounds < MAX_ROUNDS and seconds <= self.left


@dataclass(frozen=True)
class Workload:
    """Pairs of one step of a model, and everything that a run makes for them."""

    base: BenchModel
    choice: ScorerChoice
    plan: TrainingPlan
    optimizer: optim.Optimizer
    scorer: DatasetScorer  # without gradients

    def score(self) -> None:
        """Compute the log-probs of the pairs without gradients."""
        self.scorer(self.base.model, self.plan.pairs)

    def compute_gradients(self) -> None:
        """Compute loss and gradients of a step without an update."""
        plan, model = self.plan, self.base.model
        indices = plan.indices(1)
        batches = make_micro_batches(model, plan, indices, plan.groups(indices), step=1)
        model.train()
        with memory_efficient_training(model, recompute=plan.recompute):
            mx.eval(loss_and_gradients(model, plan.objective, batches, scorer=plan.scorer))


def measure(
    settings: BenchSettings,
    *,
    config: DPOConfig,
    make_scorer: MakeScorer,
    clock: Clock = time.perf_counter,
) -> Figures:
    """Measure this machine.

    Args:
        settings: what to measure.
        config: settings of a run: passes, optimizer and loss.
        make_scorer: makes the scorer without gradients of a run, from its settings and the choice.
        clock: function that returns a time in seconds.

    Raises:
        ConfigError: the model does not fit into memory.
        ModelError: the model cannot be found or read.
    """
    started = clock()
    with limited_buffers():
        base = load_bench_model(
            settings.source,
            shape=settings.shape,
            bits=settings.bits,
            pairs=PAIR.draw(2),
            room=available_memory(),
        )
        with phase("Measuring products and copies"):
            each = SPEED_SHARE * settings.seconds
            products = measure_products(base, each, clock)
            copied = measure_copy(COPIED_BYTES[device_kind()], seconds=each, clock=clock)
        with phase("Checking the scorer"), memory_efficient_training(base.model, recompute=False):
            choice = select_scorer(base.model, vocab_size=base.vocab_size)
        budget = TimeBudget(started, settings.seconds, clock)
        make = partial(make_workload, base, config, make_scorer)
        pairs = choose_pairs(make(choice, 1), budget)
        if fits_twice(config.pass_limit.pairs or pairs):
            choice = replace(choice, passes_at_once=PASSES_AT_ONCE)
        workload = make(choice, pairs)
        reset_peak_memory()
        rounds = measure_rounds(workload, budget)
        peak = peak_memory()
        generated = measure_generation(base, budget)
    return Figures(
        model=model_facts(base, choice),
        lengths=(PAIR.prompt, PAIR.chosen, PAIR.rejected),
        work=count_work(workload),
        rounds=rounds,
        products=products,
        copy=copied,
        generated_tokens_per_second=generated,
        sharing=count_sharing(base.vocab_size, choice.cost),
        peak_bytes=peak,
        held_out_fraction=config.held_out_fraction,
        seconds=clock() - started,
    )


def measure_products(base: BenchModel, seconds: float, clock: Clock) -> list[ProductSpeed]:
    """Measure a large square product, and one of the model's width, in the model's dtype."""
    dtype = getattr(mx, base.dtype)
    size, width = SQUARES[device_kind()], model_width(base.config) or 1
    inner = int(base.config.get("intermediate_size") or 4 * width)
    shapes = ((size, size, size), (PRODUCT_ROWS, width, inner))
    return [measure_product(*shape, dtype=dtype, seconds=seconds, clock=clock) for shape in shapes]


def choose_pairs(smallest: Workload, budget: TimeBudget) -> int:
    """Return the most pairs in a step of which enough rounds fit into the time.

    The time of a pair is that of the pass of `smallest`, after one that compiles kernels.
    """
    with phase("Trying a step"):
        smallest.compute_gradients()
        reset_peak_memory()
        seconds = time_call(smallest.compute_gradients, budget.clock)
    return budget.choose_pairs(seconds)


def fits_twice(pairs: int) -> bool:
    """Return whether two passes of `pairs` pairs at once are possible, and fit into memory.

    The peak must be that of a pass over one pair.
    """
    needed = PASSES_AT_ONCE * pairs * peak_memory()
    return can_compute_two_passes() and needed <= available_memory().bytes


def make_workload(
    base: BenchModel, config: DPOConfig, make_scorer: MakeScorer, choice: ScorerChoice, pairs: int
) -> Workload:
    """Return a workload of `pairs` pairs with the reference's log-probs and a new optimizer."""
    scorer = make_scorer(config, choice)
    drawn = PassShape(PAIR.prompt, PAIR.chosen, PAIR.rejected, pairs).draw(base.vocab_size)
    with disable_adapters(base.model):
        reference = scorer(base.model, drawn)
    plan = TrainingPlan(
        pairs=drawn,
        reference=reference,
        objective=Objective(config),
        learning_rate=lambda done: LEARNING_RATE,
        total_steps=MAX_ROUNDS + 1,
        batch_size=pairs,
        limit=config.pass_limit,
        max_grad_norm=config.max_grad_norm,
        seed=0,
        scorer=choice.scorer,
        cost=choice.cost,
        passes_at_once=choice.passes_at_once,
    )
    optimizer = build_optimizer(config.optim, base.model, LEARNING_RATE)
    return Workload(base, choice, plan, optimizer, scorer)


def measure_rounds(workload: Workload, budget: TimeBudget) -> list[Round]:
    """Measure rounds until the time for them is over."""
    rounds: list[Round] = []
    seconds = 0.0
    with ExitStack() as stack:
        steps = train(workload.base.model, workload.optimizer, workload.plan, start=Progress())
        stack.callback(steps.close)  # type: ignore[attr-defined]
        next(steps)  # compiles the kernels of the update, and starts the second process
        advance = stack.enter_context(phase("Measuring passes", unit="rounds"))
        while budget.has_time(len(rounds), seconds):
            began = budget.clock()
            rounds.append(_measure_round(workload, steps, budget.clock))
            seconds = budget.clock() - began
            advance(1)
    return rounds


def _measure_round(workload: Workload, steps: Iterator[Any], clock: Clock) -> Round:
    step = time_step(lambda: next(steps), clock)
    with disable_adapters(workload.base.model):
        reference = time_call(workload.score, clock)
    return Round(*step, reference, time_call(workload.score, clock))


def time_call(call: Callable[[], object], clock: Clock) -> float:
    """Return the seconds of a call that evaluates its results."""
    began = clock()
    call()
    return clock() - began


def measure_generation(base: BenchModel, budget: TimeBudget) -> float:
    """Return the tokens per second of one greedy answer, its prompt included."""
    [pair] = PAIR.draw(base.vocab_size)
    base.model.eval()

    def generate(tokens: int) -> None:
        sampling = Sampling(max_tokens=tokens)
        generate_tokens(
            base.model, frozenset(), [pair.prompt], sampling, context=None, is_batched=False
        )

    first = time_call(lambda: generate(FEWEST_GENERATED), budget.clock)  # compiles the kernels
    if not budget.has_time_for(GENERATED / FEWEST_GENERATED * first):
        return FEWEST_GENERATED / first
    return GENERATED / time_call(lambda: generate(GENERATED), budget.clock)


def count_work(workload: Workload) -> Work:
    """Return tokens and FLOPs of a step's passes, by the layout of the scorer."""
    plan, base, choice = workload.plan, workload.base, workload.choice
    groups = [[plan.pairs[i] for i in group] for group in plan.groups(range(len(plan.pairs)))]
    counts = _count_tokens(groups, choice)
    flops = model_flops(base.model, base.config, vocab_size=base.vocab_size)
    return Work(
        pairs=len(plan.pairs),
        pairs_per_pass=max(map(len, groups)),
        passes_at_once=min(plan.passes_at_once, len(groups)),
        tokens=counts.layer_tokens,
        step_flops=flops.training(counts, recompute=plan.recompute),
        reference_flops=flops.forward(counts, adapted=False),
        evaluation_flops=flops.forward(counts, adapted=True),
    )


def _count_tokens(groups: Sequence[Sequence[TokenizedPair]], choice: ScorerChoice) -> TokenCounts:
    if shares_prefixes(choice.cost):
        return count_trie_tokens(groups)
    tokens = sum(choice.cost(group).total for group in groups)
    pairs = [pair for group in groups for pair in group]
    is_plain = choice.name == "plain"
    scored = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    keys = count_attended_keys(pairs, shared=not is_plain)
    return TokenCounts(tokens, tokens if is_plain else scored, keys)


def model_facts(base: BenchModel, choice: ScorerChoice) -> ModelFacts:
    """Return name, size, dtype and scorer of the measured model."""
    return ModelFacts(
        base.name,
        base_parameters(base.model),
        len(base.model.layers),
        base.dtype,
        base.bits,
        choice.name,
        base.notes,
    )
