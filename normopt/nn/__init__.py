"""Models to train, `GPT`, `anGPT` and `nGPT`; a bound on their attention logits, and one on spectral norms."""

from normopt.nn.angpt import anGPT
from normopt.nn.clip import qk_clip_, record_logits
from normopt.nn.gpt import GPT
from normopt.nn.ngpt import nGPT
from normopt.nn.reparam import sigma_reparam

__all__ = ["GPT", "anGPT", "nGPT", "qk_clip_", "record_logits", "sigma_reparam"]
