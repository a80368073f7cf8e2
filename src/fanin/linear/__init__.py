"""A fixed fan-in layer for anyone's model and optimiser; it needs nothing of this project's pipeline. See docs/linear.md."""

from fanin.linear.layer import FixedFanInLinear
from fanin.linear.rewire import Captured

__all__ = ["Captured", "FixedFanInLinear"]
