"""Twins: pictures that need attention, for the model and the diffusion of dydilit.py.

A picture of 16x16 pixels has eight random textures of 4x4 pixels, each twice. The upper half has
each once, and the lower half has them again in another order. All pixels are -1 or 1, each with the
same chance. Under noise, a pixel tells something about itself and about the same pixel of its twin.
experiment.py makes the runs.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import dydilit
from lab import eq8

TILES, TILE = 4, 4                              # tiles along a side, pixels along a tile's side
STEPS, BATCH, RATE = 3000, 16, 0.008
TIMESTEPS = (100, 200, 300, 400)                # of the score; later there is little to gain
PROCESS = dydilit.GaussianDiffusion()


def to_tiles(x):
    """(B, 3, 16, 16) -> (B, 16, 3, 4, 4)."""
    x = x.unflatten(2, (TILES, TILE)).unflatten(4, (TILES, TILE))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def to_picture(tiles):
    """(B, 16, 3, 4, 4) -> (B, 3, 16, 16)."""
    return tiles.unflatten(1, (TILES, TILES)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def make_twins(n, generator):
    """n random pictures (n, 3, 16, 16) of -1 and 1, and the number of each tile's twin, (n, 16)."""
    half = TILES * TILES // 2
    cpu = dict(generator=generator, device="cpu")
    textures = torch.randint(2, (n, half, 3, TILE, TILE), **cpu) * 2.0 - 1
    order = torch.rand(n, half, **cpu).argsort(dim=1)
    lower = torch.take_along_dim(textures, order.view(n, half, 1, 1, 1), dim=1)
    twin = torch.cat([half + order.argsort(dim=1), order], dim=1)
    return to_picture(torch.cat([textures, lower], dim=1)), twin


def swapped(x, twin):
    """Each tile of x in the place of its twin."""
    tiles = torch.take_along_dim(to_tiles(x), twin.view(*twin.shape, 1, 1, 1), dim=1)
    return to_picture(tiles)


def best_denoisers(x_t, twin, t):
    """The expected picture given x_t, by whoever sees one twin and by whoever sees both.

    A pixel that is -1 or 1 with the same chance has the mean tanh(a x / s^2) under q(x_t | x_0)
    with scale a and noise s. Independent sights add up inside the tanh."""
    gain = PROCESS._at("sqrt_alpha_bar", t) / PROCESS._at("sqrt_one_minus", t) ** 2
    return torch.tanh(gain * x_t), torch.tanh(gain * (x_t + swapped(x_t, twin)))


def no_attention(cfg, i):
    return dydilit.Mlp(cfg.dim), dydilit.MixFFN(cfg.dim)


ARMS = {        # overrides of the small model, and what makes its blocks
    "no attention": ({}, no_attention),
    "Sana": (dydilit.LADDER[0][1], dydilit.block_parts),
    "dynamic": (dydilit.LADDER[2][1], dydilit.block_parts),
    "lambda 0": ({}, eq8.parts_with("lambda0-length")),
    "DyDiLA": ({}, dydilit.block_parts),
    "DyDiLA without convolution": (dict(dwc=False), dydilit.block_parts),
    "DiT": (dict(attention="softmax", n_heads=4), dydilit.block_parts),
}


class Denoiser(nn.Module):
    """A small transformer whose output is the logit of each pixel, halved: its tanh is the mean."""

    def __init__(self, arm, seed):
        super().__init__()
        torch.manual_seed(seed)
        overrides, parts = ARMS[arm]
        shape = dict(image_size=TILES * TILE, patch_size=TILE, dim=64, depth=2, n_classes=1)
        self.model = dydilit.build_model("DyDi-LiT-XS/4", parts, **shape, **overrides)

    def half_logit(self, x_t, t):
        return self.model(x_t, t, torch.zeros_like(t))[:, :3]

    def forward(self, x_t, t, y):
        """The noise that leads from the mean picture to x_t, for the sampler. (B, 6, 16, 16)."""
        mean = torch.tanh(self.half_logit(x_t, t))
        noise = x_t - PROCESS._at("sqrt_alpha_bar", t) * mean
        noise = noise / PROCESS._at("sqrt_one_minus", t)
        return torch.cat([noise, torch.zeros_like(noise)], dim=1)


def train_model(arm, seed, steps=STEPS):
    """A Denoiser, trained by the pixels' cross entropy. The rate rises, then falls to zero."""
    denoiser, generator = Denoiser(arm, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(denoiser.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * (1 - step / steps))
    for _ in range(steps):
        x, _ = make_twins(BATCH, generator)
        t = (1000 * torch.rand(BATCH, generator=generator) ** 2).long()     # more with little noise
        x_t = PROCESS.q_sample(x, t, torch.randn(x.shape, generator=generator))
        loss = F.softplus(-2 * x * denoiser.half_logit(x_t, t)).mean()      # -log p(x)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return denoiser.eval()


@torch.no_grad()
def score(denoiser, seed, n=128):
    """Where a model's squared error lies between the best with one twin (0) and with both (1)."""
    generator, errors = torch.Generator().manual_seed(10 ** 6 + seed), torch.zeros(3)
    for timestep in TIMESTEPS:
        x, twin = make_twins(n, generator)
        t = torch.full((n,), timestep)
        x_t = PROCESS.q_sample(x, t, torch.randn(x.shape, generator=generator))
        means = [*best_denoisers(x_t, twin, t), torch.tanh(denoiser.half_logit(x_t, t))]
        errors += torch.stack([(mean - x).square().mean() for mean in means])
    one, both, model = errors.tolist()
    return (one - model) / (one - both)


def sample(denoiser, n=64, seed=0):
    """n samples, (n, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, TILES * TILE, TILES * TILE, generator=generator)
    y = torch.zeros(n, dtype=torch.long)
    return PROCESS.sample(lambda x, t: denoiser(x, t, y), x, 100, "ddim", progress=False)
