"""How a training runs, apart from what it learns: rate over time, memory, precision.

The learning rate climbs linearly and falls by a cosine to nothing (Loshchilov and Hutter
2017, arXiv:1608.03983, section 3, without restarts; the warm-up is that of Goyal et al. 2017,
arXiv:1706.02677, section 2.2). It is a function of the step alone, so a training that goes on
from a checkpoint needs no more than its step.

Left out: restarts, other schedules, a search for the rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from edgec.passes.contract import PassError
from edgec_runtime.errors import suggestion

Precision = Literal["float32", "bf16"]


@dataclass(frozen=True)
class TrainingSettings:
    """The parameters that every pass with a training has; a base of their dataclasses."""

    name: ClassVar[str]
    version: ClassVar[int]

    steps: int = 80  # optimizer steps
    batch: int = 8  # samples a step
    warmup: float = 0.3  # share of the steps in which the rate climbs to its peak
    judgements: int = 10  # times that held-out samples are judged, evenly spread
    patience: int = 0  # judgements without a better one after which it ends; 0: never early
    micro_batch: int = 0  # samples on top of each other, gradients are summed; 0: the batch
    segments: int = 1  # parts of the graph that are computed again backwards, to save memory
    precision: Precision = "float32"  # of products while training; bf16: bfloat16 autocast
    threads: int = 1  # of each process; the bytes of the result depend on it
    save_every: int = 20  # steps after which a training can go on when it was killed

    def check(self) -> None:
        """Raise PassError for a value out of range."""
        name = self.name
        if self.precision not in get_args(Precision):
            near = suggestion(self.precision, get_args(Precision))
            raise PassError(f"{name}: no precision '{self.precision}'{near}")
        if not 0.0 <= self.warmup < 1.0:
            raise PassError(f"{name}: warmup is {self.warmup}, expected 0 or more and below 1")
        for field in ("steps", "batch", "judgements", "segments", "threads", "save_every"):
            if not getattr(self, field) > 0:
                raise PassError(f"{name}: {field} is {getattr(self, field)}, expected above 0")
        for field in ("patience", "micro_batch"):
            if getattr(self, field) < 0:
                raise PassError(f"{name}: {field} is {getattr(self, field)}, expected 0 or more")
        if self.micro_batch > self.batch:
            raise PassError(
                f"{name}: micro_batch is {self.micro_batch}, more than the batch of {self.batch}, "
                "so it would change nothing; lower it, or leave it out"
            )
        judged = -(-self.steps // self.judged_every)
        if self.patience >= judged:
            raise PassError(
                f"{name}: patience is {self.patience}, but held-out samples are judged {judged} "
                "times, so nothing would end early; lower it, raise judgements, or leave it out"
            )

    @property
    def judged_every(self) -> int:
        """Steps from one judgement to the next; the last step is judged in any case."""
        return max(self.steps // self.judgements, 1)


def rate_share(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate that a step has, above 0 and at most 1.

    step: 0 for the first of ``steps``. warmup: share of the steps that climb.
    """
    climbing = round(warmup * steps)
    if step < climbing:
        return (step + 1) / (climbing + 1)
    return (1.0 + math.cos(math.pi * (step - climbing) / max(steps - climbing, 1))) / 2.0
