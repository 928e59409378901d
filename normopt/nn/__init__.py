"""Models: `GPT`, `anGPT` and `nGPT`; QK-clip for their attention logits, SigmaReparam, and 1-Lipschitz layers."""

from normopt.nn.angpt import anGPT
from normopt.nn.centred import to_rmsnorm
from normopt.nn.clip import qk_clip_, record_logits
from normopt.nn.gpt import GPT
from normopt.nn.lipschitz import SLL, AOLLinear, orthogonal_
from normopt.nn.ngpt import nGPT
from normopt.nn.reparam import sigma_reparam

__all__ = [
    "GPT",
    "SLL",
    "AOLLinear",
    "anGPT",
    "nGPT",
    "orthogonal_",
    "qk_clip_",
    "record_logits",
    "sigma_reparam",
    "to_rmsnorm",
]
