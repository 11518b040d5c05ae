"""The numeric rule (semantics.md, section 13), measured on random configurations.

Truth is the reference in float64 on the logits as rounded to their dtype; eager is the reference
on the same logits in that dtype. Errors and units are norms: over tokens for the losses (one each
token), over all entries for the gradient of the losses' sum. A unit is that of the truth's own
entries: the distance from an entry to the next number in the dtype of the result, which is float32
for the loss and the logits' dtype for the gradient. Then, with nothing else allowed::

    ratio = max(0, our error - one unit) / eager's error      0 where the numerator is 0

The rule: over many configurations of a divergence, dtype and path the median ratio of each quantity
is at most MEDIAN and the worst at most WORST.

The total variation's gradient jumps where q = p. Where float32 cannot tell the sign of q - p, ours
and eager PyTorch's are each held against the gradient of the sign that they took (``signs.py``), and
how many of these are not float64's is counted for both: ours at most WORST times eager's. A wrong
sign in any other column is an error as large as it is.

A configuration has several tokens, drawn alike, because the error of a single loss is often one
rounding, and the ratio of two roundings has no bound, however good the kernel. The median is that
of the first FIRST tokens. Where their ratio is above DOUBTFUL, twice as many are drawn, and twice as
many again up to MOST, until it is not: what is left above WORST then is not chance.

Peaked rows (:func:`peaked`) have summaries of their own: of a path that rounds as eager PyTorch does
they show first where it loses more.

Student and teacher always differ by at least a unit of the logits' dtype: equal rows, for which
many losses are exactly 0 in eager PyTorch, are the business of the tests of properties.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from distill_ops import distillation_loss, reference
from distill_ops.divergences.base import Divergence
from distill_ops.divergences.built_in import (
    BUILT_IN,
    AlphaBeta,
    JensenShannon,
    SymmetricKL,
    TotalVariation,
)

from .signs import Signs

MEDIAN, WORST = 1.0, 1.5  # the largest ratios that the rule allows
FIRST, MOST = 8, 64  # tokens
DOUBTFUL = 1.2

VARIANTS = {  # other parameters than the default ones
    "symmetric_kl(0.3)": SymmetricKL(0.3),
    "jensen_shannon(0.1)": JensenShannon(0.1),
    "jensen_shannon(0.9)": JensenShannon(0.9),
    "alpha_beta(0.7, 0.2)": AlphaBeta(0.7, 0.2),
    "alpha_beta(1, 1)": AlphaBeta(1.0, 1.0),
}
DIVERGENCES: dict[str, Divergence] = {name: kind() for name, kind in BUILT_IN.items()} | VARIANTS
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
# How far student and teacher are apart: each is a common part and so much of its own
DISTANCES = (1e-3, 0.1, 1.0, math.inf)
OFFSETS = (0.0, 0.0, 300.0, -300.0, 3e4, -3e4)
LARGEST_OFFSET = {torch.float16: 300.0}  # 3e4 is half of the largest float16


class Configuration(NamedTuple):
    """What a seed decides."""

    seed: int
    n_cols: int
    scale: float  # standard deviation of the logits
    distance: float
    offsets: tuple[float, float]  # of the student's and the teacher's logits
    temperature: float
    heights: tuple[float, float] = (0.0, 0.0)  # of a column of each row above the others
    together: bool = True  # whether the student's and the teacher's such column is one


def configuration(seed: int) -> Configuration:
    """The configuration that a seed stands for.

    Vocabularies are odd and even, whole tiles and not; mostly small, since the interpreter's time
    goes by tiles, but one in 25 of several thousand columns."""
    rng = random.Random(seed)
    sizes = (
        rng.randint(5, 64), rng.randint(65, 512), rng.randint(513, 1500), 8 * rng.randint(8, 128),
        rng.choice((128, 256, 512, 1024)),
    )  # fmt: skip
    n_cols = rng.choice(sizes)
    if seed % 25 == 24:
        n_cols = rng.randint(2000, 5000)
    offset = rng.choice(OFFSETS)
    return Configuration(
        seed=seed,
        n_cols=n_cols,
        scale=0.5 * 20 ** rng.random(),
        distance=rng.choice(DISTANCES),
        offsets=(offset, rng.choice((offset, rng.choice(OFFSETS)))),
        temperature=rng.choice(TEMPERATURES),
    )


def peaked(seed: int) -> Configuration:
    """Peaked rows: student and teacher independent, of a large standard deviation; and, one in three,
    nearly one-hot. A gradient is small there against the terms that it is the sum of."""
    rng = random.Random(seed)
    n_cols = rng.choice((rng.randint(65, 512), rng.randint(513, 1500), rng.randint(2000, 5000)))
    offset = rng.choice((-1, 1)) * rng.uniform(8, 12)
    case = Configuration(
        seed=seed,
        n_cols=n_cols,
        scale=rng.choice((4.0, 8.0)),
        distance=math.inf,
        offsets=(offset, rng.choice((-1, 1)) * offset),
        temperature=rng.choice((1.0, 1.0, 2.0)),
    )
    if seed % 3:
        return case
    # above the sum of the other columns
    heights = [math.log(n_cols) + rng.choice((3, 6, 10, 20)) for _ in case.offsets]
    return case._replace(
        scale=1.0,
        heights=tuple(case.temperature * height for height in heights),
        together=rng.random() < 0.5,
    )


ROWS = {"ordinary": configuration, "peaked": peaked}


def spacing(value: float, dtype: torch.dtype) -> float:
    """Distance between neighbouring numbers of the dtype around ``value``."""
    return torch.finfo(dtype).eps * 2.0 ** (math.frexp(value)[1] - 1)


def make_logits(
    case: Configuration, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher logits ``[MOST, n_cols]``; MOST tokens of which the first are taken.

    Where the dtype would round the logits of an offset to one number, or student and teacher to
    the same, their scale or distance is one spacing of the dtype instead."""
    largest = LARGEST_OFFSET.get(dtype, math.inf)
    offsets = [max(-largest, min(largest, offset)) for offset in case.offsets]
    step = max(spacing(offset or case.scale, dtype) for offset in offsets)
    scale = max(case.scale, step)
    distance = max(case.distance, step / scale)
    generator = torch.Generator().manual_seed(case.seed)
    common, *own = torch.randn(3, MOST, case.n_cols, generator=generator, dtype=torch.float64)
    if math.isfinite(distance):
        own = [(common + distance * noise) / math.hypot(1.0, distance) for noise in own]
    high = torch.randint(case.n_cols, (2, MOST, 1), generator=generator)
    for noise, height, columns in zip(
        own, case.heights, high[[0, int(not case.together)]], strict=True
    ):
        noise.scatter_add_(-1, columns, torch.full_like(columns, height / scale, dtype=noise.dtype))
    student, teacher = (
        (scale * noise + offset).to(dtype).to(device)
        for noise, offset in zip(own, offsets, strict=True)
    )
    return student, teacher


class Quantities(NamedTuple):
    """What is held against the truth: of N tokens together, or a number for each quantity."""

    loss: torch.Tensor | float  # [N], where a gradient is wanted
    loss_alone: torch.Tensor | float  # [N], without a gradient, by another algorithm on some paths
    gradient: torch.Tensor | float  # [N, V], of the sum of losses


LossFunction = Callable[..., torch.Tensor]


def batched(function: LossFunction, student: torch.Tensor, teacher: torch.Tensor) -> Quantities:
    student = student.detach().requires_grad_()
    loss = function(student, teacher, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return Quantities(loss.detach(), loss.detach(), gradient)


def token_by_token(
    function: LossFunction, student: torch.Tensor, teacher: torch.Tensor, alone: bool
) -> Quantities:
    """A call for each token: the gradient is made in the forward only for a sum of losses.

    ``alone`` is whether the losses without a gradient are another algorithm's; else they are
    taken for the same, to save the interpreter's time."""
    losses, gradients = [], []
    for token, teacher_token in zip(student.detach(), teacher, strict=True):
        token.requires_grad_()
        loss = function(token, teacher_token, reduction="sum")
        gradients += torch.autograd.grad(loss, token)
        losses.append(loss.detach())
    losses = loss_alone = torch.stack(losses)
    if alone:
        with torch.no_grad():
            loss_alone = function(student, teacher, reduction="none")
    return Quantities(losses, loss_alone, torch.stack(gradients))


def units(truth: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The unit in the last place that each entry of ``truth`` has in ``dtype``, float64."""
    facts = torch.finfo(dtype)
    # below the smallest normal number the units stay what they are there
    exponents = torch.frexp(truth.double().abs().clamp(min=facts.tiny)).exponent
    return facts.eps * torch.exp2(exponents.double() - 1)


@dataclass
class Squares:
    """Sums of squares over the tokens so far: our error, eager's error, the units."""

    ours: float = 0.0
    eager: float = 0.0
    unit: float = 0.0

    def add(
        self,
        ours: torch.Tensor,
        eager: torch.Tensor,
        truth: torch.Tensor,
        eager_truth: torch.Tensor,
    ) -> None:
        self.ours += (ours.double() - truth).square().sum().item()
        self.eager += (eager.double() - eager_truth).square().sum().item()
        self.unit += units(truth, ours.dtype).square().sum().item()

    @property
    def ratio(self) -> float:
        """Infinite where ours is not finite, or wrong by more than a unit while eager is exact."""
        if not math.isfinite(self.ours):
            return math.inf
        excess = max(0.0, math.sqrt(self.ours) - math.sqrt(self.unit))
        if excess == 0:
            return 0.0
        return excess / math.sqrt(self.eager) if self.eager > 0 else math.inf


@dataclass(frozen=True)
class Measurement:
    """The ratios of one configuration: of its first tokens, and of all that were drawn."""

    seed: int
    tokens: int
    first: Quantities
    final: Quantities
    squares: Quantities  # what the final ratios are made of
    changed_signs: tuple[int, int]  # undecided ones that are not float64's: ours, eager's


def measure(
    ours: LossFunction,
    case: Configuration,
    divergence: Divergence,
    dtype: torch.dtype,
    device: torch.device,
) -> Measurement:
    """Hold a loss function, called like ``distillation_loss``, against truth and eager."""
    options = {"divergence": divergence, "temperature": case.temperature}
    student, teacher = make_logits(case, dtype, device)
    eager = partial(reference.distillation_loss, **options)
    sums = Quantities(Squares(), Squares(), Squares())
    done, tokens, first = 0, FIRST, None
    changed = (0, 0)
    while True:
        pair = student[done:tokens], teacher[done:tokens]
        results = (
            token_by_token(partial(ours, **options), *pair, alone=divergence.moment != "none"),
            batched(eager, *pair),
            batched(eager, *(logits.double() for logits in pair)),
        )
        truth = truth_of_eager = results[2]
        if isinstance(divergence, TotalVariation):
            signs = Signs(*pair, case.temperature)
            truths, counts = zip(*(signs.nearest(x.gradient) for x in results[:2]), strict=True)
            truth, truth_of_eager = (truth._replace(gradient=x) for x in truths)
            changed = tuple(map(sum, zip(changed, counts, strict=True)))
        for total, *of_each in zip(sums, *results[:2], truth, truth_of_eager, strict=True):
            total.add(*of_each)
        ratios = Quantities(*(total.ratio for total in sums))
        first = first or ratios
        if tokens == MOST or max(ratios) <= DOUBTFUL:
            return Measurement(case.seed, tokens, first, ratios, sums, changed)
        done, tokens = tokens, 2 * tokens


def loss_on(path: str) -> LossFunction:
    """``distillation_loss`` by a backend."""
    return partial(distillation_loss, backend=path)


def median(values: list[float]) -> float:
    """The upper median: no mean of two, of which one may be infinite."""
    return sorted(values)[len(values) // 2]


@dataclass(frozen=True)
class Summary:
    """One quantity of a divergence, dtype and path, over all configurations."""

    median: float
    worst: float
    worst_seed: int

    @property
    def passed(self) -> bool:
        return self.median <= MEDIAN and self.worst <= WORST


def summarise(measurements: list[Measurement]) -> dict[str, Summary]:
    """By quantity."""
    summaries = {}
    for i, quantity in enumerate(Quantities._fields):
        worst = max(measurements, key=lambda m: m.final[i])
        middle = median([m.first[i] for m in measurements])
        summaries[quantity] = Summary(middle, worst.final[i], worst.seed)
    return summaries
