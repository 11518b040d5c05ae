"""Interleaved timing: every contender once a round, so that a slow minute hits all of them."""

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Run = Callable[[], object]
FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU so far


@dataclass(frozen=True)
class Budget:
    """Rounds until the seconds are spent, but not fewer or more than these."""

    seconds: float
    min_rounds: int
    max_rounds: int

    def half(self) -> "Budget":
        return Budget(self.seconds / 2, (self.min_rounds + 1) // 2, self.max_rounds)


@dataclass(frozen=True)
class Times:
    """Milliseconds over the rounds: the median and the 20% and 80% quantiles."""

    median_ms: float
    low_ms: float
    high_ms: float
    rounds: int

    @classmethod
    def of(cls, times: list[float]) -> "Times":
        low, median, high = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        return cls(median, low, high, len(times))


def _clock_cpu(run: Run) -> Callable[[], float]:
    start = time.perf_counter()
    run()
    elapsed = time.perf_counter() - start
    return lambda: elapsed * 1e3


def _clock_gpu(run: Run) -> Callable[[], float]:
    """Read after the round's synchronisation: one after each run would let the queue drain, and
    the next run would wait for Python's launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    return lambda: start.elapsed_time(end)


def interleaved(
    runs: Mapping[str, Run], prepare: Run, device: torch.device, budget: Budget
) -> dict[str, Times]:
    """Time ``runs``; ``prepare`` comes, unmeasured, before each. The first round is a warm-up."""
    on_gpu = device.type == "cuda"
    clock = _clock_gpu if on_gpu else _clock_cpu
    flush = torch.empty(FLUSH_BYTES if on_gpu else 0, dtype=torch.int8, device=device)
    order = list(runs)
    shuffle = random.Random(0).shuffle  # no contender always follows the same other
    times = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for n_round in range(budget.max_rounds + 1):
            if n_round == 1:
                began = time.perf_counter()
            if n_round > budget.min_rounds and time.perf_counter() - began > budget.seconds:
                break
            shuffle(order)
            readings = {}
            for name in order:
                prepare()
                flush.zero_()
                readings[name] = clock(runs[name])
            if on_gpu:
                torch.cuda.synchronize()
            if n_round > 0:
                for name, reading in readings.items():
                    times[name].append(reading())
    finally:
        gc.enable()
    return {name: Times.of(its_times) for name, its_times in times.items()}
