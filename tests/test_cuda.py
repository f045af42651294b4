"""What a GPU does differently: bfloat16, its own kernels, compilation for it, and the two commands on it."""
import csv
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import dydilit
import train
from lab import eq8

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
DEVICE = torch.device("cuda", 0)
ROOT = pathlib.Path(train.__file__).resolve().parent
RUN = ["--batch-size", "32", "--sampling-steps", "4", "--log-every", "5", "--lr", "1e-3", "--cooldown", "0"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def far(a, b):
    """How far a is from b, as a share of b's size."""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def run(*argv, code=0):
    done = subprocess.run([sys.executable, ROOT / "train.py", *map(str, argv)], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("index", ["all", "some", "one"])
@pytest.mark.parametrize("d, e", [(96, 96), (64, 128), (20, 12)])
def test_routed_projection_in_bfloat16_both_ways(d, e, index):
    """Against float32, with groups that are empty: in the middle, at the ends, or all but one."""
    n, tokens = 5, 200
    chosen = torch.tensor({"all": range(n), "some": [1, 3], "one": [2]}[index], device=DEVICE)
    index = chosen[torch.randint(len(chosen), (tokens,), device=DEVICE)]
    x = torch.randn(tokens, d, device=DEVICE, requires_grad=True)
    weight = (torch.randn(n, d, e, device=DEVICE) / d ** 0.5).requires_grad_()
    upstream = torch.randn(tokens, e, device=DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        y = dydilit.routed_linear(x, weight, index)
    assert y.dtype == torch.bfloat16
    got = y, *torch.autograd.grad(y, (x, weight), upstream.to(y.dtype))
    want = torch.einsum("td,tde->te", x, weight[index])
    want = want, *torch.autograd.grad(want, (x, weight), upstream)
    for a, b in zip(got, want):
        assert far(a, b) < 0.02
    unused = [u for u in range(n) if u not in chosen.tolist()]
    assert not got[2][unused].any() and got[2].isfinite().all()


@pytest.mark.parametrize("fields", [dict(), dict(differential="map"), dict(denominator="mass"), dict(n_heads=4),
                                    dict(attention="softmax", n_heads=4)], ids=str)
def test_model_under_autocast_is_near_float32(fields):
    """Near, not equal: a router whose two best scores nearly tie may choose otherwise."""
    parts = eq8.parts_with(fields["denominator"]) if "denominator" in fields else dydilit.block_parts
    fields = {name: value for name, value in fields.items() if name != "denominator"}
    model = dydilit.build_model("DyDi-LiT-XS/4", parts, **fields).to(DEVICE)
    for p in model.parameters():                            # gates and the last layer start at zero, which would prove nothing
        if p.requires_grad and p.dim() > 1:
            torch.nn.init.normal_(p, std=0.05)
    x, y = torch.randn(8, 3, 32, 32, device=DEVICE), torch.randint(10, (8,), device=DEVICE)
    t = torch.randint(1000, (8,), device=DEVICE)
    model.eval()
    want = model(x, t, y)
    with train.autocast(DEVICE):
        got = model(x, t, y)
    assert far(got, want) < 0.1
    got.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    cpu = model.cpu()(x.cpu(), t.cpu(), y.cpu())
    assert far(want.cpu(), cpu) < 0.02                      # TF32 or not


def losses_of(steps, compiled=False):
    """The losses of so many steps as train.py makes them, on one batch."""
    torch.manual_seed(0)
    model = dydilit.build_model("DyDi-LiT-XS/4", label_dropout=0.0).to(DEVICE)
    forward = torch.compile(model) if compiled else model
    diffusion = dydilit.GaussianDiffusion().to(DEVICE)
    optimizer, found = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0, fused=True), []
    data = train.shapes(32)
    x, y = (v.to(DEVICE) for v in data.batch(torch.arange(32), torch.zeros(32, dtype=torch.bool)))
    t, noise = torch.arange(32, device=DEVICE) * 31, torch.randn(x.shape, device=DEVICE)
    for _ in range(steps):
        with train.autocast(DEVICE):
            loss = diffusion.losses(forward, x, y, t, noise)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_twenty_steps_and_the_loss_falls():
    losses = losses_of(20)
    assert np.isfinite(losses).all() and losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_compiled_steps_are_those_of_the_model_as_it_stands():
    assert losses_of(3, compiled=True) == pytest.approx(losses_of(3), rel=0.02)


def test_samples_of_pixels_are_images_and_repeat():
    model = dydilit.build_model("DyDi-LiT-XS/4").to(DEVICE).eval()
    for sampler in ("ddpm", "ddim"):
        one, other = (train.generate(model, [0, 1, 2, 3, 4], 4, 4.0, sampler, batch_size=2) for _ in range(2))
        assert one.shape == (5, 32, 32, 3) and one.dtype == np.uint8 and one.std() > 5
        assert abs(one.astype(int) - other).mean() < 1


def test_a_card_without_bfloat16_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with train.autocast(DEVICE):
        assert (torch.ones(2, 2, device=DEVICE) @ torch.ones(2, 2, device=DEVICE)).dtype == torch.float32


def test_the_two_commands_and_a_resumed_run(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert "20 steps done" in run(*RUN, "--steps", 20, "--run", whole)
    assert {p.name for p in whole.iterdir()} == {"checkpoint.pt", "log.csv", "loss.png", "model.pt", "samples.png"}
    losses = [float(row["loss"]) for row in log(whole)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    run(*RUN, "--steps", 10, "--run", stopped)
    assert "resuming at step 10 of 20" in run(*RUN, "--steps", 20, "--run", stopped)
    for one, other in zip(log(whole), log(stopped), strict=True):       # a GPU's sums need not repeat to the bit
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=0.02)
    run("sample", "--run", whole)
    run("sample", "--run", whole, "--num", 12, "--steps", 3, "--batch-size", 5)
    samples = np.load(whole / "samples.npz")
    assert samples["arr_0"].shape == (12, 32, 32, 3) and (whole / "grid.png").exists()
    assert "resuming at step 20 of 21" in run(*RUN, "--steps", 21, "--run", whole, "--device", "cpu")


def test_accumulation_gives_the_same_gradient(tmp_path):
    for k in (1, 4):
        run(*RUN, "--steps", 2, "--log-every", 1, "--accumulate", k, "--run", tmp_path / str(k), "--set", "label_dropout=0")
    one, four = log(tmp_path / "1"), log(tmp_path / "4")
    assert float(one[0]["loss"]) == pytest.approx(float(four[0]["loss"]), rel=0.02)
    assert float(one[0]["grad_norm"]) == pytest.approx(float(four[0]["grad_norm"]), rel=0.05)


def test_a_full_memory_is_named(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--batch-size", "16384", "--run", tmp_path / "run", "--set",
                           "dim=384", "patch_size=1"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "out of memory; train with a larger --accumulate" in done.stderr
