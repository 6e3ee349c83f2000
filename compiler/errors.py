"""Every error that edgec raises on purpose, in one tree.

    EdgecError
    ├── BundleError               the bundle file (runtime)
    ├── TargetMismatchError       bundle for another device (runtime)
    ├── InputError                a feed at run time (runtime)
    ├── AdapterError              an adapter at run time (runtime)
    ├── TargetError               unknown target, or a target file with a mistake
    ├── PassError                 a pass cannot do what it was asked to
    ├── SourceError               what the user gave is no model
    ├── ExportError               the model cannot be exported, or its export is not equal to it
    ├── RecipeError               an unknown pass or parameter, or a wrong order
    ├── DataError                 calibration or evaluation data: missing, empty, NaN, shape
    ├── LockError                 the lock file belongs to another model, recipe or target
    ├── PlanError                 a pruning plan cannot be read, or has nothing to be applied to
    ├── OutputError               where the result should be written
    └── DeviceError               a device cannot be installed or reached, or fails a run
        └── DeviceMissingError    what the device needs has not been installed

The command line prints the message of an EdgecError as one line and exits with code 1
(2 for usage). A broken promise is no error: the report is written, the exit code is 3.
"""

from edgec.passes.contract import PassError
from edgec.targets import TargetError
from edgec_runtime.errors import (
    AdapterError,
    BundleError,
    EdgecError,
    InputError,
    TargetMismatchError,
    suggestion,
)

__all__ = [
    "AdapterError",
    "BundleError",
    "DataError",
    "DeviceError",
    "DeviceMissingError",
    "EdgecError",
    "ExportError",
    "InputError",
    "LockError",
    "OutputError",
    "PassError",
    "PlanError",
    "RecipeError",
    "SourceError",
    "TargetError",
    "TargetMismatchError",
    "suggestion",
]


class SourceError(EdgecError):
    """What the user gave is not a model that edgec can read."""


class ExportError(EdgecError):
    """The model cannot be exported, or the exported graph computes something else."""


class RecipeError(EdgecError):
    """A recipe names an unknown pass or parameter, or orders passes wrongly."""


class DataError(EdgecError):
    """Calibration or evaluation data is missing, empty, not finite or of the wrong shape."""


class LockError(EdgecError):
    """A lock file was made for another model, recipe or target."""


class PlanError(EdgecError):
    """A pruning plan cannot be read, or the recipe has no pass to apply it."""


class OutputError(EdgecError):
    """The result cannot be written where it should go."""


class DeviceError(EdgecError):
    """A device cannot be installed or reached, or it fails while it runs a bundle."""


class DeviceMissingError(DeviceError):
    """What the device needs has not been installed; the message says how to get it."""
