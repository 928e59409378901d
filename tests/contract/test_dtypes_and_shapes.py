"""Every dtype, shape, memory format and device that torch has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.engine import batches
from tests.support.optimizers import COUPLED, LOCAL, LOOK_BACK, WHOLE, Make, every, everyone
from tests.support.steps import assert_equal, give_gradients, run, tensors


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_parameters_move_as_their_float32_copies(make: Make, dtype: torch.dtype) -> None:
    """State and arithmetic are float32: after each step the weights are the float32 result, rounded once.

    Those that have one of torch's kernels take it for the float32 copies alone.
    """
    params = tensors(dtype=dtype)
    twins = [nn.Parameter(p.detach().float()) for p in params]
    optimizer, twin = make(params, lr=0.1), make(twins, lr=0.1)
    for i in range(4):
        give_gradients(params, i)
        for p, q in zip(params, twins, strict=True):
            q.detach().copy_(p.detach())
            q.grad = p.grad.float()
        optimizer.step()
        twin.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p.detach().float(), q.detach(), rtol=torch.finfo(dtype).eps * 0.501, atol=1e-6)
    has_kernel = any(batch.kernel for batch in batches(twin))
    assert_equal(optimizer.state_dict()["state"], twin.state_dict()["state"], 1e-6 if has_kernel else 0.0)


@everyone
def test_memory_formats_do_not_matter(make: Make) -> None:
    shapes = [(6, 4), (5, 4, 3, 2), (4, 3, 2, 2, 3)]
    plain, strided = tensors(shapes), tensors(shapes)
    strided[0].data = strided[0].detach().mT.contiguous().mT
    strided[1].data = strided[1].detach().contiguous(memory_format=torch.channels_last)
    strided[2].data = torch.randn(*shapes[2], 2, dtype=torch.float64)[..., 0].copy_(strided[2].detach())
    first, second = make(plain, lr=0.1), make(strided, lr=0.1)
    for i in range(3):
        give_gradients(plain, i)
        for p, q in zip(plain, strided, strict=True):
            q.grad = torch.empty_like(q).copy_(p.grad)
        first.step(lambda: None)
        second.step(lambda: None)
    assert not any(p.is_contiguous() for p in strided)
    assert_equal([p.detach() for p in plain], [p.detach() for p in strided], 1e-13)  # sums run in another order


@everyone
@pytest.mark.parametrize("shape", [(), (3,), (3, 2), (2, 3, 4), (2, 3, 2, 4), (2, 2, 3, 2, 4)], ids=str)
def test_any_number_of_dimensions(make: Make, shape: tuple[int, ...]) -> None:
    for view in "View()", "View(flatten=True)", "View(flatten=False)":
        params = tensors([shape, shape])
        try:
            optimizer = make([{"params": params, "view": view}], lr=0.1)
        except ValueError as error:
            refusal = {0: "norm of matrices", 1: "norm of matrices", 3: "in two ways"}[len(shape)]
            assert refusal in str(error) and (len(shape) < 2 or view == "View()")
            continue
        before = [p.detach().clone() for p in params]
        run(optimizer, params, 3)
        assert all(torch.isfinite(p).all() and (p != q).any() for p, q in zip(params, before, strict=True))


@everyone
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (0, 0), (2, 0, 3), (0, 2, 3)], ids=str)
def test_empty_tensors_pass(make: Make, shape: tuple[int, ...]) -> None:
    params = tensors([shape, (4, 3), shape])
    try:
        optimizer = make([{"params": params, "view": "View(flatten=False)"}], lr=0.1)
    except ValueError as error:
        assert len(shape) < 2 and "norm of matrices" in str(error)
        return
    run(optimizer, params, 3)
    assert torch.isfinite(params[1]).all()
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, params, 1)


@every
def test_several_dtypes_in_one_group(make: Make) -> None:
    mixed = [p for dtype in (torch.float32, torch.bfloat16, torch.float64) for p in tensors(dtype=dtype)]
    pure = [tensors(dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    optimizer = make(mixed, lr=0.1)
    for i in range(2):
        for group in pure:
            give_gradients(group, i)
        for p, q in zip(mixed, [q for group in pure for q in group], strict=True):
            p.grad = q.grad.clone()
        optimizer.step()
    if make in LOCAL.values():
        for group in pure:
            run(make(group, lr=0.1), group, 2)
        assert_equal(mixed, [q for group in pure for q in group])


#: What reads numbers to know what to do: sums over all tensors, singular values, first gradients.
READS_NUMBERS = COUPLED | LOOK_BACK | {"asgo", "shampoo", "klshampoo", "soap", "splus", "muon+", "muonplusplus+"}
READS_NUMBERS |= {"cosmos", "moso"}


@pytest.mark.parametrize("name", WHOLE)
def test_several_devices_and_dtypes_in_one_group(name: str) -> None:
    """Tensors without data are counted, and keep nothing else from moving."""
    make = WHOLE[name]
    kinds = [("cpu", torch.float32), ("meta", torch.float32), ("meta", torch.bfloat16), ("cpu", torch.bfloat16)]
    params = [nn.Parameter(p.detach().to(*kind)) for p, kind in zip(tensors([(6, 4)] * 4), kinds, strict=True)]
    optimizer = make(params, lr=0.1)
    before = [p.detach().clone() for p in params]

    def closure() -> None:
        for p in params:
            p.grad = torch.ones_like(p)

    if name in READS_NUMBERS:
        with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
            optimizer.step(closure)
        return
    for _ in range(3):
        optimizer.step(closure)
    assert all(torch.isfinite(params[i]).all() and (params[i] != before[i]).any() for i in (0, 3))
    assert all(x.is_meta for i in (1, 2) for name, x in optimizer.state[params[i]].items() if name != "step")
