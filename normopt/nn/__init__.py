"""Models to train: `GPT`, the transformer that the benchmarks stand on."""

from normopt.nn.gpt import GPT

__all__ = ["GPT"]
