"""Where a training is, on disk: what it needs to go on as if it had never been killed.

One safetensors file, written beside its place and moved there in one rename, so that it is
whole at any moment; its header holds JSON with the numbers and with digests of all that the
training depends on. No pickle: reading one can run code. A training that has ended leaves
its best state, so that a build of several trainings does none of them twice.

The order of samples needs no state: it follows from the seed and the step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT = "1"


@dataclass
class Progress:
    """The numbers of a training.

    step: optimizer steps that are done. losses: of each. first, best: held-out distance before
    the training and in the best state, which is that after best_step. stale: judgements since.
    """

    step: int = 0
    first: float = 0.0
    best: float = 0.0
    best_step: int = 0
    stale: int = 0
    ended: bool = False
    losses: list[float] = field(default_factory=list)

    def to_json(self) -> str:
        """As JSON; floats keep every bit."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Progress:
        """What ``to_json`` gave. Raises ValueError or TypeError for anything else."""
        return Progress(**json.loads(text))


class Checkpoints:
    """The checkpoint of one training in a folder that others may share."""

    def __init__(self, folder: pathlib.Path | None, name: str, digests: Mapping[str, str]) -> None:
        """folder: None keeps nothing. digests: of what the training depends on, by name."""
        self._folder, self._name, self._digests = folder, name, dict(digests)
        key = hashlib.sha256(json.dumps(self._digests, sort_keys=True).encode()).hexdigest()
        self._path = None if folder is None else folder / f"{name}-{key[:16]}.safetensors"
        self.findings: list[str] = []

    @property
    def kept(self) -> bool:
        """True if there is a folder to write to."""
        return self._path is not None

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[Progress, Mapping[str, Tensor]] | None]:
        """The numbers and, one by one, the tensors of this training's checkpoint; None without.

        A checkpoint that is damaged, or of a training that differs, is not used; ``findings``
        says so.
        """
        import safetensors

        if self._path is None or not self._path.is_file():
            self._look_around()
            yield None
            return
        found: tuple[Progress, Mapping[str, Tensor]] | None = None
        with contextlib.ExitStack() as stack:
            try:
                archive = safetensors.safe_open(self._path, framework="pt")
                tensors = stack.enter_context(archive)
                header = _header(tensors)
                if json.loads(header["digests"]) != self._digests:
                    raise ValueError("it belongs to another training")
                found = Progress.from_json(header["progress"]), _Tensors(tensors)
            except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
                reason = " ".join(str(error).split())[:200]
                self.findings.append(
                    f"{self._path.name} cannot be read ({reason}): the training began anew"
                )
            yield found

    def write(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Put the state in the place of the one before; a full disk is only a finding."""
        import safetensors
        from safetensors.torch import save_file

        if self._path is None:
            return
        header = {
            "format": _FORMAT,
            "progress": progress.to_json(),
            "digests": json.dumps(self._digests, sort_keys=True),
        }
        fresh = self._path.with_name(f"{self._path.name}.new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            save_file({n: t.contiguous() for n, t in tensors.items()}, fresh, header)
            os.replace(fresh, self._path)
        except (OSError, safetensors.SafetensorError) as error:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            reason = " ".join(str(error).split())[:200]
            finding = f"no checkpoint could be written to {self._path.parent}: {reason}"
            if finding not in self.findings:
                self.findings.append(finding)

    def _look_around(self) -> None:
        """Note an unfinished training of other data or settings: it may be what was meant."""
        import safetensors

        others = sorted(self._folder.glob(f"{self._name}-*.safetensors")) if self._folder else []
        for path in others:
            # what is no checkpoint of ours is none of our business
            with contextlib.suppress(OSError, ValueError, KeyError, safetensors.SafetensorError):
                with safetensors.safe_open(path, framework="pt") as tensors:
                    found = _header(tensors)
                progress = Progress.from_json(found["progress"])
                known = json.loads(found["digests"])
                differs = [n for n, digest in self._digests.items() if known.get(n) != digest]
                if not progress.ended:
                    self.findings.append(
                        f"{path.name} holds step {progress.step} of a training that was "
                        f"interrupted; its {' and '.join(differs)} differ from this one's, so it "
                        "was not used"
                    )


class _Tensors(Mapping[str, "Tensor"]):
    """The tensors of an open file by name, read when they are asked for."""

    def __init__(self, archive: Any) -> None:
        self._archive = archive
        self._names = tuple(archive.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._archive.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _header(archive: Any) -> dict[str, str]:
    """The texts of a checkpoint. Raises ValueError if it is none of this format."""
    found: dict[str, str] | None = archive.metadata()
    if found is None or found.get("format") != _FORMAT:
        raise ValueError(f"not a checkpoint of format {_FORMAT}")
    return found
