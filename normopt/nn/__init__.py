"""Models to train: `GPT`, the transformer that the benchmarks stand on; and a bound on its attention logits."""

from normopt.nn.clip import qk_clip_, record_logits
from normopt.nn.gpt import GPT

__all__ = ["GPT", "qk_clip_", "record_logits"]
