"""The diffusion against formulas of DDPM, improved DDPM and DDIM, written from its alpha-bars."""
import math
from unittest.mock import Mock

import pytest
import torch

import dydilit
from dydilit import GaussianDiffusion

T = 1000
BETA = [1e-4 + (2e-2 - 1e-4) * t / (T - 1) for t in range(T)]
BARS = [math.prod(1 - b for b in BETA[:t + 1]) for t in range(T)]
STEPS = torch.tensor([0, 1, 400, 999])                      # one for each image of a batch
CLOSE = dict(rtol=1e-3, atol=1e-3)


def images(channels=2, batch=len(STEPS)):
    return torch.randn(batch, channels, 3, 3)


def posterior(bars, t, x0, x_t):
    """q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0), a product of two Gaussians.

    Its variance is 0 at t = 0, where improved DDPM takes that of t = 1."""
    if t == 0:
        return x0, posterior(bars, 1, x0, x_t)[1] if len(bars) > 1 else 1 - bars[0]
    alpha, before = bars[t] / bars[t - 1], bars[t - 1]
    precision = alpha / (1 - alpha) + 1 / (1 - before)
    mean = alpha ** 0.5 * x_t / (1 - alpha) + before ** 0.5 * x0 / (1 - before)
    return mean / precision, 1 / precision


def model_step(bars, t, output, x_t, clip=False):
    """p(x_{t-1} | x_t): mean, log variance between the posterior's and beta's, predicted x_0."""
    noise, place = output.chunk(2)
    x0 = (x_t - (1 - bars[t]) ** 0.5 * noise) / bars[t] ** 0.5
    x0 = x0.clamp(-1, 1) if clip else x0
    (mean, low), high = posterior(bars, t, x0, x_t), 1 - bars[t] / (bars[t - 1] if t else 1)
    return mean, (1 - place) / 2 * math.log(low) + (1 + place) / 2 * math.log(high), x0


# ---- Training ----

def bits(t, output, x0, x_t, clip):
    """The bound's term per dimension: a log-likelihood at t = 0, a KL of two Gaussians after it."""
    mean, log_variance, _ = model_step(BARS, t, output, x_t, clip)
    true_mean, true_variance = posterior(BARS, t, x0, x_t)
    ratio = true_variance / log_variance.exp()
    nats = 0.5 * (ratio - 1 - ratio.log() + (true_mean - mean) ** 2 / log_variance.exp())
    if t == 0:
        z = torch.stack([x0 + 1 / 255 - mean, x0 - 1 / 255 - mean]) / (log_variance / 2).exp()
        # DiT's approximation of the normal distribution function at both ends of a bin.
        above, below = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
        p = torch.where(x0 < 0.999, above, 1) - torch.where(x0 > -0.999, below, 0)
        nats = -p.clamp_min(1e-12).log()
    return nats.mean().item() / math.log(2)


def test_losses_by_hand_and_the_variational_trains_the_variance_alone():
    x0, noise, output, y = images().clamp(-1, 1), images(), images(4), object()
    output[:, 2:] -= 0.5
    x0[0, 0, 0, 0], output[0, 0, 0, 0] = 0, 9           # which the model holds for impossible
    diffusion, model = GaussianDiffusion(), Mock(return_value=output.requires_grad_())
    losses = diffusion.losses(model, x0, y, STEPS, noise)
    bars = torch.tensor(BARS)[STEPS].view(-1, 1, 1, 1)
    x_t = bars.sqrt() * x0 + (1 - bars).sqrt() * noise
    torch.testing.assert_close(model.call_args.args[0], x_t)
    assert model.call_args.args[1].equal(STEPS) and model.call_args.args[2] is y
    simple = (output[:, :2] - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(losses["simple"], simple)
    torch.testing.assert_close(losses["loss"], simple + losses["variational"])
    batch = list(zip(STEPS.tolist(), output.double(), x0.double(), x_t.double()))
    clipped = diffusion.variational_term(output, x0, x_t, STEPS, clip_x0=True)
    for found, clip in [(losses["variational"], False), (clipped, True)]:
        assert found.tolist() == pytest.approx([bits(*each, clip) for each in batch], rel=5e-4)
    gradient, = torch.autograd.grad(losses["variational"].sum(), output)
    assert not gradient[:, :2].any() and gradient[:, 2:].any((1, 2, 3)).all()


def test_timesteps_and_noise_are_drawn_anew_for_every_image():
    zero = torch.zeros(20_000, 2, 1, 1)
    model = Mock(return_value=zero.bfloat16())
    losses = GaussianDiffusion().respace(10).losses(model, zero[:, :1], None)
    x_t, t, _ = model.call_args.args
    counts = {int(n): (t == n).float().mean().item() for n in t.unique()}
    assert counts == pytest.approx({n: 0.1 for n in dydilit.respaced_timesteps(T, 10)}, abs=0.01)
    noise = x_t.flatten() / torch.tensor(BARS)[t].neg().add(1).sqrt()
    assert [noise.mean().item(), noise.std().item()] == pytest.approx([0, 1], abs=0.03)
    torch.testing.assert_close(losses["simple"], noise ** 2, rtol=1e-3, atol=1e-4)


# ---- Sampling ----

@pytest.mark.parametrize("steps", [1, 2, 7, 50, 250, 1000])
def test_respacing_is_even_and_keeps_both_ends(steps):
    spaced = GaussianDiffusion().respace(steps)
    timesteps = spaced.timesteps.tolist()
    even = [i * 999 / (steps - 1) for i in range(steps)] if steps > 1 else [999]
    assert timesteps == pytest.approx(even, abs=0.5)        # rounded, not cut
    assert (spaced.sqrt_alpha_bar ** 2).tolist() == pytest.approx([BARS[t] for t in timesteps])
    assert spaced.respace(1).timesteps.tolist() == [999]    # also of a process that was respaced


@pytest.mark.parametrize("clip, drawn", [
    (False, {}), (True, dict(randn_like=lambda x: torch.randn_like(x) / 2))])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples_are_those_of_the_formulas(steps, sampler, clip, drawn, capsys):
    """DDIM: Eq. 12 of its paper with sigma = 0."""
    def model(x, t):
        asked.append(t.tolist())
        wave = torch.sin(x + t.view(-1, 1, 1, 1))
        return torch.cat([weight * x + wave, wave], dim=1).bfloat16()
    asked, x, weight = [], images(), torch.tensor(0.3, requires_grad=True)
    torch.manual_seed(1)
    got = GaussianDiffusion().sample(model, x, steps, sampler, clip, progress=False, **drawn)
    assert got.dtype == torch.float32 and not got.requires_grad and not capsys.readouterr().err
    timesteps = dydilit.respaced_timesteps(T, steps)
    assert asked == [[t] * len(x) for t in timesteps[::-1]]
    bars, randn_like = [BARS[t] for t in timesteps], drawn.get("randn_like", torch.randn_like)
    torch.manual_seed(1)
    for i in reversed(range(steps)):
        outputs = model(x, torch.full((len(x),), timesteps[i])).float()
        found = [model_step(bars, i, *image, clip) for image in zip(outputs, x)]
        mean, log_variance, x0 = (torch.stack(part) for part in zip(*found))
        if sampler == "ddim":
            before = bars[i - 1] if i else 1.0
            noise = (x - bars[i] ** 0.5 * x0) / (1 - bars[i]) ** 0.5
            x = before ** 0.5 * x0 + (1 - before) ** 0.5 * noise
        else:
            x = mean
            if i > 0:
                x = x + (log_variance / 2).exp() * randn_like(x)
    torch.testing.assert_close(got, x, **CLOSE)


@pytest.mark.parametrize("steps", [0, 1001, -3])
def test_impossible_samplers_and_step_counts_are_named(steps):
    with pytest.raises(ValueError, match=f"sampling steps: {steps} is not in 1..1000"):
        GaussianDiffusion().sample(None, images(), steps)
    with pytest.raises(ValueError, match="sampler 'euler' is not one of ddpm, ddim"):
        GaussianDiffusion().sample(None, images(), sampler="euler")
