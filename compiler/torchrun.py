"""Builds that several processes share: ``torchrun --nproc-per-node 2 -m edgec build ...``.

Process 0 builds as it does alone: it alone measures, writes and prints. The others wait for
its trainings and take their share of them (`edgec.passes.workers`).
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgec.passes.workers import Workers

_LAUNCHED = "TORCHELASTIC_RUN_ID"  # set by torchrun
_PATIENCE = datetime.timedelta(days=7)  # the others wait while process 0 exports and measures


@contextlib.contextmanager
def other_processes() -> Iterator[Workers | None]:
    """The processes that torchrun started, seen from process 0; None without torchrun.

    In the others the block is given workers of a rank above 0, with nothing left to do. After
    an error nothing is said to them: torchrun ends them when this process ends.
    """
    if _LAUNCHED not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield None
        return
    # a warning about what we know: some parameters may have no gradient
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch.distributed as distributed

    from edgec.passes.lesson import join_trainings
    from edgec.passes.workers import Workers

    distributed.init_process_group("gloo", timeout=_PATIENCE)
    workers = Workers(distributed.get_rank(), distributed.get_world_size())
    if workers.rank:
        join_trainings(workers)
    yield workers
    if not workers.rank:
        workers.hand_out(None)
    distributed.destroy_process_group()
