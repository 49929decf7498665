"""Search at test time: best of n, and beams of reasoning steps guided by a value function."""
