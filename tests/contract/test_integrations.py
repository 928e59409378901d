"""Trainers of other libraries; what is not installed is skipped (the extra `integrations` has it all)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt.integrations import for_trainer

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
BLOCKS = re.findall(r"```py\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
LIBRARIES = ("lightning", "transformers", "accelerate")


def library_of(block: str) -> str:
    return next(name for name in LIBRARIES if f"import {name}" in block)


theirs = pytest.mark.filterwarnings("ignore")  # of versions, of tiny data sets


class Net(nn.Module):
    """Something for every role."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.up = nn.Linear(6, 8)
        self.head = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.up(self.embed(tokens)).relu())

    def loss(self, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def batches(count: int) -> Tensor:
    return torch.randint(0, 8, (count, 4, 5), generator=torch.Generator().manual_seed(0))


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def by_hand(model: Net, name: str, steps: int, **options: Any) -> None:
    """A plain loop, with a scheduler and clipping, as the trainers are asked for."""
    optimizer = normopt.create(name, model, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for tokens in batches(steps):

        def closure(tokens: Tensor = tokens) -> Tensor:
            optimizer.zero_grad()
            loss = model.loss(tokens)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            return loss

        optimizer.step(closure)
        schedule.step()


# Closures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon", "soap", "prodigy", "stormplus"])
def test_gradients_that_a_closure_makes_are_checked(name: str) -> None:
    """There is none before the closure; what it makes is refused before anything has moved."""
    model = Net()
    model.embed.sparse = True
    optimizer = normopt.create(name, model)
    before = copy.deepcopy(model.state_dict())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(batches(1)[0])
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="sparse gradient"):
        optimizer.step(closure=closure)
    model.embed.sparse = False
    assert optimizer.step(closure=closure).item() == pytest.approx(model_loss(before))
    model.load_state_dict(before)
    optimizer = normopt.create(name, model)
    with torch.no_grad():
        model.up.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or Inf in the gradient"):
        optimizer.step(closure=closure)
    assert torch.equal(model.head.weight, before["head.weight"])


def model_loss(weights: dict[str, Tensor]) -> float:
    model = Net()
    model.load_state_dict(weights)
    return model.loss(batches(1)[0]).item()


# Hugging Face -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", normopt.list_optimizers())
def test_a_factory_called_as_trainer_calls_it_gives_every_role_its_norm(name: str) -> None:
    factory, options = for_trainer(name, lr=0.02, maximize=True)
    assert not isinstance(factory, type), "else Trainer takes it for an optimizer's class"
    model = Net()
    optimizer, expected = factory()(model, **options), normopt.create(name, model, lr=0.02, maximize=True)
    assert type(optimizer) is type(expected)
    assert [g["rule"] for g in optimizer.param_groups] == [g["rule"] for g in expected.param_groups]
    assert [g["role"] for g in optimizer.param_groups] == [g["role"] for g in expected.param_groups]


def test_an_unknown_optimizer_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'moun'; did you mean 'muon'"):
        for_trainer("moun", lr=0.02)


@pytest.mark.slow
@theirs
def test_trainer_trains_by_role_and_resumes_exactly(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = {"vocab_size": 32, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = torch.randint(0, 32, (32, 8))

    def trainer(folder: Path) -> Any:
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, **still))
        options = {"per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "disable_tqdm": True}
        arguments = transformers.TrainingArguments(str(folder), max_steps=4, save_steps=2, **options)
        data = [{"input_ids": row, "labels": row} for row in tokens]
        made = for_trainer("muon", lr=0.02)
        return transformers.Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=made)

    whole = trainer(tmp_path)
    before = copy.deepcopy(whole.model.state_dict())
    whole.train()
    groups = whole.optimizer.param_groups
    linear = [group for group in groups if group["role"] == "linear"]
    names = [name for group in linear for name in group["param_names"]]
    assert isinstance(whole.optimizer.optimizer, normopt.zoo.Muon)
    assert {group["role"] for group in groups} == {"embedding", "linear", "vector"}
    assert all(name.endswith(("attn.weight", "proj.weight", "fc.weight")) for name in names) and len(names) == 4
    assert all("transpose=True" in group["rule"] and group["initial_lr"] == 0.02 for group in linear)
    assert not any(group["lr"] for group in groups), "a linear schedule"
    assert not any(torch.equal(p, before[name]) for name, p in whole.model.named_parameters())
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same_weights(resumed.model, whole.model)


# Lightning ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@theirs
@pytest.mark.parametrize("name", ["muon", "soap", "stormplus"])
def test_lightning_takes_the_steps_of_a_plain_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its closure computes the gradients and clips them; schedulers and checks of gradients work as ever."""
    lightning = pytest.importorskip("lightning")
    # Each matrix has its turn by its name, which begins with "net." here.
    options = {"lr": 0.02, **({"staggered": False} if name == "soap" else {})}

    class Module(lightning.LightningModule):
        def __init__(self, net: Net) -> None:
            super().__init__()
            self.net = net

        def training_step(self, tokens: Tensor, _: int) -> Tensor:
            return self.net.loss(tokens)

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = normopt.create(name, self, **options)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    fit = partial(lightning.Trainer, accelerator="cpu", enable_checkpointing=False, gradient_clip_val=1.0, **quiet)
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    fit(max_steps=4).fit(Module(net), torch.utils.data.DataLoader(batches(4), batch_size=None))
    by_hand(twin, name, 4, **options)
    assert_same_weights(net, twin)
    monkeypatch.setattr(Net, "loss", lambda self, tokens: self(tokens).sum() * torch.nan)
    with pytest.raises(ValueError, match=r"NaN or Inf in the gradient of parameter 'net.embed.weight'"):
        fit(max_steps=1).fit(Module(net), torch.utils.data.DataLoader(batches(1), batch_size=None))
    assert_same_weights(net, twin)


@pytest.mark.slow
@theirs
@pytest.mark.parametrize("name", ["adamw", "muon", "scion", "prodigy"])
def test_lightning_unfreezes_a_backbone(name: str) -> None:
    """Frozen parameters are in the optimizer from the start, with their roles, and move once they have gradients."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import BackboneFinetuning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
            self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))

        def training_step(self, tokens: Tensor, _: int) -> Tensor:
            logits = self.head(self.backbone(tokens[:, :-1]))
            return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

        def configure_optimizers(self) -> normopt.SteepestDescent:
            return normopt.create(name, self, lr=0.02)

    module = Module()
    before = copy.deepcopy(module.state_dict())
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", callbacks=[thaw], enable_checkpointing=False, **quiet)
    with pytest.warns(UserWarning, match="already exist within another group of this optimizer"):
        trainer.fit(module, torch.utils.data.DataLoader(batches(4), batch_size=None))
    groups = trainer.optimizers[0].param_groups
    assert sorted(name for group in groups for name in group["param_names"]) == sorted(before)
    assert not any(torch.equal(p, before[name]) for name, p in module.named_parameters())


# accelerate ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@theirs
@pytest.mark.parametrize("name", ["adamw", "muon", "soap", "prodigy"])
def test_accelerate_steps_saves_and_loads(name: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    by_hand(twin, name, 4, lr=0.02)

    def prepared() -> tuple[Any, ...]:
        optimizer = normopt.create(name, net, lr=0.02)
        return accelerator.prepare(net, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))

    def train(model: Any, optimizer: Any, schedule: Any, some: Tensor) -> None:
        for tokens in some:
            optimizer.zero_grad()
            accelerator.backward(model.loss(tokens))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()

    first = prepared()
    train(*first, batches(4)[:2])
    accelerator.save_state(str(tmp_path))
    train(*first, batches(4)[2:])
    assert_same_weights(net, twin)
    accelerator.free_memory()
    second = prepared()
    accelerator.load_state(str(tmp_path))
    train(*second, batches(4)[2:])
    assert_same_weights(net, twin)
    assert second[1].optimizer is not first[1].optimizer and len(second[1].state) == len(list(net.parameters()))


# torch.compile ------------------------------------------------------------------------------------------------------


def test_a_compiled_model_has_the_same_roles() -> None:
    model = Net()
    named = {f"_orig_mod.{name}": role for name, role in normopt.infer_roles(model).items()}
    assert normopt.infer_roles(torch.compile(model)) == named


@pytest.mark.slow
@theirs
@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_a_compiled_step_is_the_eager_one_and_settles(name: str) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    optimizer, eager = normopt.create(name, model, lr=0.02), normopt.create(name, twin, lr=0.02)
    compiled: Callable[[], Any] = torch.compile(optimizer.step, backend="eager")
    compilations = []
    for tokens in batches(6):
        for net, opt, step in ((model, optimizer, compiled), (twin, eager, eager.step)):
            opt.zero_grad()
            net.loss(tokens).backward()
            step()
            for group in opt.param_groups:
                group["lr"] *= 0.9
        compilations.append(counters["frames"]["total"])
    torch._dynamo.reset()
    assert compilations[0] > 0 and compilations[-1] == compilations[2]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


# The documentation --------------------------------------------------------------------------------------------------


def test_every_library_has_a_block() -> None:
    assert {*map(library_of, BLOCKS)} == {*LIBRARIES}


@pytest.mark.slow
@theirs
@pytest.mark.parametrize("block", BLOCKS, ids=library_of)
def test_blocks_of_the_page_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LIBRARIES:
        if re.search(rf"^import {name}$", block, re.MULTILINE):
            pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # accelerate sets it for the whole process
    exec(compile(block, str(PAGE), "exec"), {"__name__": "page"})
