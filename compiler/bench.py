"""Latency side by side; passes that measure use the same clockwork (``edgec.passes.timing``)."""

from edgec.passes.timing import Speedup, Timing, interleave, speedup_of

__all__ = ["Speedup", "Timing", "interleave", "speedup_of"]
