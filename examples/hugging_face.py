"""Hugging Face's Trainer with Muon, on a GPT-2 that is made from a config.

``for_trainer`` hands Trainer a factory, so that the optimizer sees the model with its roles; the learning rate and the
decay are its arguments, not those of TrainingArguments. Needs ``pip install transformers accelerate``.
"""

import tempfile

import torch
import transformers

import normopt
from normopt.integrations import for_trainer

torch.manual_seed(0)
config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2)
model = transformers.GPT2LMHeadModel(config)
# Every sequence counts up from a random token: easy to learn, nothing to download.
tokens = (torch.randint(0, 32, (256, 1)) + torch.arange(16)) % 32

trainer = transformers.Trainer(
    model,
    transformers.TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=60,
        per_device_train_batch_size=16,
        lr_scheduler_type="linear",
        warmup_steps=5,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=20,
        disable_tqdm=True,
    ),
    train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
    optimizer_cls_and_kwargs=for_trainer("muon", lr=0.02, weight_decay=0.1),
)
trainer.train()
print(normopt.describe(trainer.optimizer.optimizer))
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert losses[-1] < losses[0] / 2, losses
