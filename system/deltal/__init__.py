"""deltal: reinforcement learning with verifiable rewards, on Ray, with ΔL-normalized updates.

Importing this package loads neither ray, torch nor vllm.
"""

__version__ = "0.1.0"
