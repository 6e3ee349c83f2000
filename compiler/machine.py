"""The machine that latencies are taken on; ``edgec.targets.machine`` asks it."""

from edgec.targets.machine import absent_providers, cpu_name, is_kind_of
from edgec_runtime.machine import Machine, this_machine

__all__ = ["Machine", "absent_providers", "cpu_name", "is_kind_of", "this_machine"]
