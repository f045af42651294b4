"""The diffusion against closed forms, brute force, and the formulas of DDPM and improved DDPM in plain float64."""
import math

import matplotlib.cbook
import pytest
import torch

import dydilit
import train
from dydilit import GaussianDiffusion

T = 1000
BETA = [1e-4 + (2e-2 - 1e-4) * t / (T - 1) for t in range(T)]
ALPHA_BAR = [math.prod(1 - b for b in BETA[:t + 1]) for t in range(T)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(*shape):
    return torch.randn(*(shape or (1, 2, 3, 3)))


def at(t):
    return torch.tensor([t])


def step_variances(t):
    """Posterior variance and beta; at t = 0 the posterior's is that of t = 1, as in improved DDPM."""
    s = max(t, 1)
    return BETA[s] * (1 - ALPHA_BAR[s - 1]) / (1 - ALPHA_BAR[s]), BETA[t]


def test_schedule_is_dits():
    diffusion = GaussianDiffusion()
    assert diffusion.n_timesteps == T and diffusion.timesteps.tolist() == list(range(T))
    got = [diffusion.sqrt_alpha_bar[t].item() ** 2 for t in range(T)]
    assert got == pytest.approx(ALPHA_BAR, rel=1e-5)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_q_sample_is_the_chain_of_single_steps(t):
    """x_t built by t + 1 single noisings has the mean and variance that q_sample gives at once."""
    scale, variance = 1.0, 0.0
    for s in range(t + 1):
        scale, variance = scale * math.sqrt(1 - BETA[s]), variance * (1 - BETA[s]) + BETA[s]
    x0, noise = images(), images()
    got = GaussianDiffusion().q_sample(x0, at(t), noise)
    torch.testing.assert_close(got, scale * x0 + math.sqrt(variance) * noise, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_posterior_is_bayes_rule(t):
    """q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0), a product of two Gaussians in x_{t-1}."""
    x0, xt = 0.3, -0.7
    precision = (1 - BETA[t]) / BETA[t] + 1 / (1 - ALPHA_BAR[t - 1])
    mean = (math.sqrt(1 - BETA[t]) * xt / BETA[t] + math.sqrt(ALPHA_BAR[t - 1]) * x0 / (1 - ALPHA_BAR[t - 1])) / precision
    diffusion = GaussianDiffusion()
    got = diffusion.posterior_mean(torch.full((1, 1, 1, 1), x0), torch.full((1, 1, 1, 1), xt), at(t))
    assert got.item() == pytest.approx(mean, rel=1e-4)
    assert diffusion.log_posterior[t].exp().item() == pytest.approx(1 / precision, rel=1e-4)


@pytest.mark.parametrize("t", [0, 1, 400, 999])
@pytest.mark.parametrize("place", [-1.0, 0.25, 1.0])
def test_model_step_is_improved_ddpm(t, place):
    noise, x_t = images(), images()
    output = torch.cat([noise, torch.full_like(noise, place)], dim=1)
    mean, log_variance, x0 = GaussianDiffusion().p_mean_variance(output, x_t, at(t))
    a_bar = ALPHA_BAR[t]
    want_x0 = (x_t - math.sqrt(1 - a_bar) * noise) / math.sqrt(a_bar)
    # DDPM Eq. 11: the same mean written in the noise
    want_mean = (x_t - BETA[t] / math.sqrt(1 - a_bar) * noise) / math.sqrt(1 - BETA[t])
    low, high = map(math.log, step_variances(t))
    torch.testing.assert_close(x0, want_x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mean, want_mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_variance, torch.full_like(noise, low + (place + 1) / 2 * (high - low)),
                               rtol=1e-4, atol=1e-4)


def test_clipping_bounds_the_predicted_image_and_moves_the_mean():
    output, x_t = 5 * images(1, 4, 3, 3), images()
    diffusion = GaussianDiffusion()
    mean, _, x0 = diffusion.p_mean_variance(output, x_t, at(500), clip_x0=True)
    assert x0.abs().max() == 1
    torch.testing.assert_close(mean, diffusion.posterior_mean(x0, x_t, at(500)))


def test_gaussian_kl_against_numerical_integration():
    m1, s1, m2, s2 = 0.3, 0.8, -0.5, 1.7
    x = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    p, q = torch.distributions.Normal(m1, s1), torch.distributions.Normal(m2, s2)
    want = torch.trapezoid(p.log_prob(x).exp() * (p.log_prob(x) - q.log_prob(x)), x)
    got = dydilit.gaussian_kl(*(torch.tensor(v, dtype=torch.float64) for v in (m1, 2 * math.log(s1), m2, 2 * math.log(s2))))
    torch.testing.assert_close(got, want)


def test_decoder_likelihood_is_a_distribution_over_256_levels():
    levels = (torch.arange(256, dtype=torch.float64) - 127.5) / 127.5
    for mean, log_std in [(0.1, -3.0), (-0.98, -2.0), (1.4, -1.0)]:
        log_p = dydilit.discretized_gaussian_log_likelihood(levels, torch.tensor(mean), torch.tensor(log_std))
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)
        normal = torch.distributions.Normal(mean, math.exp(log_std))    # the tanh form is within 1e-3 of the true one
        want = normal.cdf(levels + 1 / 255) - normal.cdf(levels - 1 / 255)
        assert (log_p.exp() - want)[1:-1].abs().max() < 1e-3


class Model:
    """Says the same about every input, and remembers at which timesteps it was asked."""

    def __init__(self, output):
        self.output, self.asked = output, []

    def __call__(self, x, t, y=None):
        self.asked += t.tolist()
        return self.output


@pytest.mark.parametrize("t", [0, 1, 700])
def test_losses_by_hand(t):
    x0, noise, output = images().clamp(-1, 1), images(), images(1, 4, 3, 3)
    losses = GaussianDiffusion().losses(Model(output), x0, None, at(t), noise)
    simple = sum((float(a) - float(b)) ** 2 for a, b in zip(output[:, :2].flatten(), noise.flatten())) / 18
    x_t = math.sqrt(ALPHA_BAR[t]) * x0 + math.sqrt(1 - ALPHA_BAR[t]) * noise
    low, high = step_variances(t)
    previous, total = ALPHA_BAR[t - 1] if t else 1.0, 0.0
    for xt, x, e, place in zip(*(v.flatten().tolist() for v in (x_t, x0, output[:, :2], output[:, 2:]))):
        predicted = (xt - math.sqrt(1 - ALPHA_BAR[t]) * e) / math.sqrt(ALPHA_BAR[t])

        def posterior(z):
            return (BETA[t] * math.sqrt(previous) * z + (1 - previous) * math.sqrt(1 - BETA[t]) * xt) / (1 - ALPHA_BAR[t])
        log_variance = math.log(low) + (place + 1) / 2 * (math.log(high) - math.log(low))
        if t > 0:
            ratio = low / math.exp(log_variance)
            total += 0.5 * (ratio - 1 - math.log(ratio) + (posterior(x) - posterior(predicted)) ** 2
                            / math.exp(log_variance))
        else:
            likelihood = dydilit.discretized_gaussian_log_likelihood(*(torch.tensor(v, dtype=torch.float64) for v in (
                x, posterior(predicted), log_variance / 2)))
            total -= likelihood.item()
    assert losses["simple"].item() == pytest.approx(simple, rel=1e-4)
    assert losses["variational"].item() == pytest.approx(total / 18 / math.log(2), rel=2e-3)
    assert losses["loss"].item() == pytest.approx(losses["simple"].item() + losses["variational"].item())


def test_the_variational_loss_trains_the_variance_alone():
    output = images(1, 4, 3, 3).requires_grad_()
    losses = GaussianDiffusion().losses(Model(output), images(), None, at(300), images())
    noise_part, variance_part = torch.autograd.grad(losses["variational"].sum(), output)[0].chunk(2, dim=1)
    assert (noise_part == 0).all() and (variance_part != 0).all()


def test_a_perfect_model_has_no_loss():
    noise = images()
    output = torch.cat([noise, -torch.ones_like(noise)], dim=1)         # the posterior's own variance
    losses = GaussianDiffusion().losses(Model(output), images(), None, at(300), noise)
    assert losses["simple"].item() == 0 and losses["variational"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 250, 1000])
def test_respacing_is_even_and_keeps_both_ends(steps):
    timesteps = dydilit.respaced_timesteps(1000, steps)
    assert len(timesteps) == steps == len(set(timesteps)) and timesteps == sorted(timesteps)
    assert timesteps[-1] == 999 and (timesteps[0] == 0 or steps == 1)
    gaps = {b - a for a, b in zip(timesteps, timesteps[1:])}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert dydilit.respaced_timesteps(11, 4) == [0, 3, 7, 10]           # rounded, not cut


def test_respaced_process_has_the_same_marginals():
    spaced = GaussianDiffusion().respace(50)
    timesteps = spaced.timesteps.tolist()
    assert timesteps == dydilit.respaced_timesteps(1000, 50)
    assert (spaced.sqrt_alpha_bar ** 2).tolist() == pytest.approx([ALPHA_BAR[t] for t in timesteps], rel=1e-5)


@pytest.mark.parametrize("steps", [0, 1001, -3])
def test_impossible_step_counts_are_named(steps):
    with pytest.raises(ValueError, match=f"sampling steps: {steps} is not in 1..1000"):
        GaussianDiffusion().respace(steps)


def test_sampling_asks_the_model_at_the_original_timesteps_from_the_end():
    model = Model(torch.zeros(1, 4, 3, 3))
    GaussianDiffusion().sample(model, images(), steps=7, progress=False)
    assert model.asked == dydilit.respaced_timesteps(1000, 7)[::-1]


@pytest.mark.parametrize("sampler, steps", [("ddim", 250), ("ddim", 1000), ("ddpm", 1000)])
def test_samplers_recover_a_known_gaussian(sampler, steps):
    """For data N(mu, s^2) the ideal noise prediction is known in closed form: samples must have that mean and spread."""
    mu, s = 0.5, 0.2

    def ideal(x, t):
        a_bar = torch.tensor([ALPHA_BAR[i] for i in t.tolist()]).view(-1, 1, 1, 1)
        noise = (1 - a_bar).sqrt() * (x - a_bar.sqrt() * mu) / (a_bar * s * s + 1 - a_bar)
        return torch.cat([noise, -torch.ones_like(noise)], dim=1)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 3, 8, 8, generator=generator)
    out = GaussianDiffusion().sample(ideal, x, steps, sampler, progress=False)
    assert out.mean().item() == pytest.approx(mu, abs=0.01)
    assert out.std().item() == pytest.approx(s, abs=0.02)


def test_ddpm_step_by_hand():
    output, x = images(1, 4, 3, 3), images()
    got = GaussianDiffusion().sample(Model(output), x, 2, "ddpm", randn_like=lambda x: torch.randn(x.shape, generator=torch.Generator().manual_seed(3)),
                                     progress=False)
    spaced, noise = GaussianDiffusion().respace(2), torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    mean, log_variance, _ = spaced.p_mean_variance(output, x, at(1))
    want, _, _ = spaced.p_mean_variance(output, mean + (0.5 * log_variance).exp() * noise, at(0))
    torch.testing.assert_close(got, want)


def test_ddim_follows_eq_12_of_its_paper():
    output, x = images(1, 4, 3, 3), images()
    got = GaussianDiffusion().sample(Model(output), x, 3, "ddim", progress=False)
    bars, noise = [ALPHA_BAR[t] for t in dydilit.respaced_timesteps(1000, 3)], output[:, :2]
    for now, before in [(bars[2], bars[1]), (bars[1], bars[0]), (bars[0], 1.0)]:
        x = math.sqrt(before) * (x - math.sqrt(1 - now) * noise) / math.sqrt(now) + math.sqrt(1 - before) * noise
    torch.testing.assert_close(got, x, rtol=1e-3, atol=1e-3)


def test_unknown_sampler_is_named():
    with pytest.raises(ValueError, match="sampler 'euler' is not one of ddpm, ddim"):
        GaussianDiffusion().sample(Model(None), images(), sampler="euler")


@pytest.mark.slow
def test_a_thousand_bfloat16_steps_on_a_photograph():
    """The small model with half the width and depth, batches of 8 crops that say which quarter they are from."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        photo = train.pixels(train.read_image(file.name, 256)[None])[0]
    torch.manual_seed(0)
    model, diffusion = dydilit.build_model("DyDi-LiT-XS/4", dim=48, depth=2, n_classes=4), dydilit.GaussianDiffusion()
    optimizer, norms, losses = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0), [], []
    for _ in range(1000):
        corners = torch.randint(225, (8, 2))
        x = torch.stack([photo[:, top:top + 32, left:left + 32] for top, left in corners.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = diffusion.losses(model, x, (corners >= 112).long() @ torch.tensor([2, 1]))["loss"].mean()
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    norms, losses = torch.stack(norms), torch.stack(losses)
    # Timesteps differ: a batch of 8 has up to 10 times the usual norm in float32, too. A spike is beyond that.
    assert norms.isfinite().all() and norms[100:].max() < 20 * norms[100:].median()
    assert losses[-100:].mean() < 0.4 * losses[:100].mean()
