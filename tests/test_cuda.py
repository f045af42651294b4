"""What a GPU does differently: bfloat16, its own kernels, compilation for it, and the commands."""
import numpy as np
import pytest
import torch

import dydilit
import train
from lab import eq8
from test_train import finish, rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
DEVICE = torch.device("cuda", 0)
RUN = "--batch-size 32 --sampling-steps 4 --log-every 5 --lr 1e-3 --cooldown 0".split()


def far(a, b):
    """How far a is from b, as a share of b's size."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def losses(folder):
    return [float(row["loss"]) for row in rows(folder)]


@pytest.mark.parametrize("used", [range(5), [1, 3], [2]])
@pytest.mark.parametrize("d, e", [(96, 96), (64, 128), (20, 12)])
def test_routed_projection_in_bfloat16_both_ways(d, e, used):
    """Against float32, with groups that are empty: in the middle, at the ends, or all but one."""
    index = torch.tensor(used, device=DEVICE)[torch.randint(len(used), (200,), device=DEVICE)]
    x = torch.randn(200, d, device=DEVICE, requires_grad=True)
    weight = (torch.randn(5, d, e, device=DEVICE) / d ** 0.5).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y = dydilit.routed_linear(x, weight, index)
    assert y.dtype == torch.bfloat16
    want = torch.einsum("td,tde->te", x, weight[index])
    upstream = torch.randn_like(want)
    got = [y, *torch.autograd.grad(y, (x, weight), upstream.bfloat16())]
    want = [want, *torch.autograd.grad(want, (x, weight), upstream)]
    assert all(far(a, b) < 0.02 for a, b in zip(got, want))
    assert not got[2][[u for u in range(5) if u not in used]].any() and got[2].isfinite().all()


@pytest.mark.parametrize("fields", [dict(), dict(differential="map"), dict(n_heads=4),
                                    dict(attention="softmax", n_heads=4),
                                    dict(parts=eq8.parts_with("mass"))])
def test_model_under_autocast_is_near_float32(fields):
    """Near, not equal: a router whose two best scores nearly tie may choose otherwise."""
    model = dydilit.build_model("DyDi-LiT-XS/4", **fields).to(DEVICE).eval()
    for p in model.parameters():                # gates and the last layer would start at zero
        if p.requires_grad and p.dim() > 1:
            torch.nn.init.normal_(p, std=0.05)
    x, t, y = torch.randn(8, 3, 32, 32), torch.randint(1000, (8,)), torch.randint(10, (8,))
    batch = [z.to(DEVICE) for z in (x, t, y)]
    want = model(*batch)
    with train.autocast(DEVICE):
        got = model(*batch)
    assert far(got, want) < 0.1
    got.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert far(want, model.cpu()(x, t, y)) < 0.02       # TF32 or not


@pytest.mark.slow
def test_compiled_steps_are_those_of_the_model_as_it_stands(tmp_path):
    every = [*RUN, "--steps", 3, "--log-every", 1, "--set", "label_dropout=0.0"]
    finish(*every, "--run", tmp_path / "plain")
    finish(*every, "--run", tmp_path / "compiled", "--compile")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=0.02)


def test_a_card_without_bfloat16_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation)
    with train.autocast(DEVICE):
        assert torch.eye(2, device=DEVICE).mm(torch.eye(2, device=DEVICE)).dtype == torch.float32


def test_the_two_commands_and_a_resumed_run(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert "trained for 20 steps" in finish(*RUN, "--steps", 20, "--run", whole)
    assert len(losses(whole)) == 4 and losses(whole)[-1] < losses(whole)[0]
    finish(*RUN, "--steps", 10, "--run", stopped)
    assert "resuming at step 10 of 20" in finish(*RUN, "--steps", 20, "--run", stopped)
    # A GPU's sums need not repeat to the bit.
    assert losses(stopped) == pytest.approx(losses(whole), rel=0.02)
    for sampler in ("ddpm", "ddim"):
        finish("sample", "--run", whole, "--num", 12, "--steps", 3, "--sampler", sampler,
               "--out", tmp_path / f"{sampler}.npz")
        samples = np.load(tmp_path / f"{sampler}.npz")["arr_0"]
        assert samples.shape == (12, 32, 32, 3) and samples.std() > 5
    assert "at step 20 of 21" in finish(*RUN, "--steps", 21, "--run", whole, "--device", "cpu")


def test_a_full_memory_is_named(tmp_path):
    assert "out of memory; train with a larger --accumulate" in finish(
        "--batch-size", "16384", "--run", tmp_path / "run", "--set", "dim=384", "patch_size=1",
        code=1)
