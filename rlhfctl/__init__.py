"""rlhfctl: RLHF post-training that refuses to start a run that would silently train wrong."""

__version__ = "0.1.0"
