"""The processes that train together: who does what, and what they tell each other.

`torchrun` starts them (`edgec.torchrun`). Process 0 runs the build; the others wait for
trainings that it hands out. Each works on its share of every step's stacks, gradients are
summed by DistributedDataParallel, and all of them come to the same weights. With a sharded
student (fully_shard) each keeps a part of weights, gradients and optimizer state and fetches
the rest while it computes (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054, section 5).

Left out: tensor and pipeline parallelism; devices other than the CPU.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from edgec.passes.training_task import Task

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter

T = TypeVar("T")
_CHUNK = 1 << 26  # bytes of a file that are sent at once


@dataclass(frozen=True)
class Workers:
    """This process among those that train together. rank: 0 to size - 1."""

    rank: int = 0
    size: int = 1

    def share(self, stacks: Sequence[T]) -> list[tuple[T, bool]]:
        """Every ``size``-th of the stacks, from the rank on; as many for each process.

        The second of a pair is False for a stack that only fills up: another process has it.
        """
        count = -(-len(stacks) // self.size)
        mine = list(itertools.islice(stacks, self.rank, None, self.size))
        return [(s, True) for s in mine] + [(stacks[-1], False)] * (count - len(mine))

    def total(self, number: float) -> float:
        """The sum over the processes; the same on all of them."""
        if self.size == 1:
            return number
        import torch
        import torch.distributed as distributed

        tensor = torch.tensor(number, dtype=torch.float64)
        distributed.all_reduce(tensor)
        return float(tensor)

    def wrapped(self, module: Module, *, own: Iterable[Parameter], sharded: bool) -> Module:
        """The module as it is trained: alone, replicated, or with its parameters sharded.

        own: parameters that are never sharded, see ``sum_gradients``.
        """
        if self.size == 1:
            return module
        if not sharded:
            from torch.nn.parallel import DistributedDataParallel

            # an output of integers leaves what only it depends on without a gradient
            return DistributedDataParallel(module, find_unused_parameters=True)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (self.size,))
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=set(own))
        module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # as gloo has it
        return module

    @contextlib.contextmanager
    def accumulating(self, module: Module, *, last: bool) -> Iterator[None]:
        """Inside, gradients are summed up; the last pass of a step adds those of all."""
        if self.size == 1:
            yield
            return
        from torch.distributed.fsdp import FSDPModule
        from torch.nn.parallel import DistributedDataParallel

        if isinstance(module, DistributedDataParallel) and not last:
            with module.no_sync():
                yield
            return
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last)
        yield

    def average_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Average the gradients of parameters that no wrapper of torch looks after."""
        import torch.distributed as distributed

        for parameter in parameters if self.size > 1 else ():
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= self.size

    def fill(self, tensor: Tensor, source: Tensor | None) -> None:
        """Give a tensor, whole or a process's shard of it, the numbers of process 0's source.

        source: whole; only process 0 needs it.
        """
        import torch

        with torch.no_grad():
            if self.size == 1:
                tensor.copy_(source)  # type: ignore[arg-type]  # this is process 0
                return
            import torch.distributed as distributed
            from torch.distributed.tensor import DTensor, distribute_tensor

            given = torch.empty(tensor.shape, dtype=tensor.dtype)
            if source is not None:
                given.copy_(source)
            if isinstance(tensor, DTensor):
                tensor.copy_(distribute_tensor(given, tensor.device_mesh, tensor.placements))
            else:
                distributed.broadcast(given, 0)
                tensor.copy_(given)

    def whole(self, tensor: Tensor) -> Tensor:
        """A copy of all of a tensor that may be sharded; every process has to ask for it."""
        if self.size > 1:
            from torch.distributed.tensor import DTensor

            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
        return tensor.detach().clone()

    def said(self, text: str) -> str:
        """What process 0 says; the others' text is not used."""
        if self.size == 1:
            return text
        return _sent(text.encode() if self.rank == 0 else b"").decode()

    def hand_out(self, task: Task | None) -> None:
        """Process 0 to all others: join this training; None: there are no more."""
        if self.size == 1:
            return
        with tempfile.TemporaryDirectory(prefix="edgec-") as folder:
            path = pathlib.Path(folder)
            if task is not None:
                task.write(path)
            names = sorted(file.name for file in path.iterdir())
            self.said(json.dumps(names))
            for name in names:
                with open(path / name, "rb") as stream:
                    while chunk := stream.read(_CHUNK):
                        _sent(chunk)
                    _sent(b"")

    @contextlib.contextmanager
    def handed(self) -> Iterator[Task | None]:
        """The next training that process 0 hands out; None if there are no more."""
        with tempfile.TemporaryDirectory(prefix="edgec-") as folder:
            names: list[str] = json.loads(self.said(""))
            for name in names:
                with open(pathlib.Path(folder) / name, "wb") as stream:
                    while chunk := _sent(b""):
                        stream.write(chunk)
            yield Task.read(pathlib.Path(folder)) if names else None


ALONE = Workers()


def _sent(data: bytes) -> bytes:
    """Process 0's bytes on all processes; what the others give is not used."""
    import numpy as np
    import torch
    import torch.distributed as distributed

    first = distributed.get_rank() == 0
    length = torch.tensor(len(data))
    distributed.broadcast(length, 0)
    buffer = np.empty(int(length), np.uint8)
    if first:
        buffer[:] = np.frombuffer(data, np.uint8)
    if buffer.size:
        distributed.broadcast(torch.from_numpy(buffer), 0)
    return buffer.tobytes()
