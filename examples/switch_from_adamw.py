"""A run that AdamW of torch began and Muon ends: its averages are taken over by the names of the parameters.

``match_rms_adamw`` gives Muon's updates the size of AdamW's, so that the learning rate and its schedule stay.
"""

import torch
from torch.nn import functional as F

import normopt

torch.manual_seed(0)
model = normopt.nn.GPT(vocab_size=64, d_model=32, n_layers=2, n_heads=2)


def train(optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Sequences that count up in threes; returns the last loss."""
    for _ in range(steps):
        tokens = (torch.randint(64, (16, 1)) + 3 * torch.arange(33)) % 64
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


adamw = torch.optim.AdamW(model.named_parameters(), lr=3e-3, weight_decay=0.1)
half_way = train(adamw, 60)
muon = normopt.create("muon", model, lr=3e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
anew = normopt.from_torch_state(muon, adamw.state_dict(), model)
print(f"what starts anew: {anew or 'nothing'}")
end = train(muon, 60)
print(f"loss {half_way:.3f} when AdamW stopped, {end:.3f} at the end")
assert end < half_way and not anew
