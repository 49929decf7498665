"""How a run is started: the plan, torchrun's command line, signals, and what is told about a failure."""

from rlhfctl.launch.run import Result, node_of, start

__all__ = ["Result", "node_of", "start"]
