"""Models: `GPT`, `anGPT` and `nGPT`; QK-clip for their attention logits, and SigmaReparam for spectral norms."""

from normopt.nn.angpt import anGPT
from normopt.nn.clip import qk_clip_, record_logits
from normopt.nn.gpt import GPT
from normopt.nn.ngpt import nGPT
from normopt.nn.reparam import sigma_reparam

__all__ = ["GPT", "anGPT", "nGPT", "qk_clip_", "record_logits", "sigma_reparam"]
