"""What holds of every public function and module at any shape, number of heads, bank size and dtype, drawn at random."""
import itertools
import random

import pytest
import torch
import torch.nn.functional as F

import dydilit
from dydilit import GaussianDiffusion, ModelConfig
from lab import cost
from lab.eq8 import Divided

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
many = pytest.mark.parametrize("seed", range(12))


class Draw(random.Random):
    """One random case: sizes, and tensors of them."""

    def __init__(self, seed):
        super().__init__(seed)
        torch.manual_seed(seed)
        self.heads, self.batch, self.side = self.randint(1, 4), self.randint(1, 3), self.choice([1, 2, 3, 5, 8])
        self.n, self.dim = self.side ** 2, 4 * self.heads * self.randint(1, 3)
        self.banks = dict(n_projectors=self.randint(1, 5), n_gammas=self.randint(1, 6), n_lambdas=self.randint(1, 6))
        self.dtype = DTYPES[seed % 3]
        self.close = dict(zip(DTYPES, [dict(rtol=1e-9, atol=1e-9), dict(rtol=1e-4, atol=1e-5),
                                       dict(rtol=0.05, atol=0.05)]))[self.dtype]

    def tokens(self, dim=None, dtype=None):
        return torch.randn(self.batch, self.n, dim or self.dim, dtype=dtype or self.dtype)

    def config(self, **fields):
        return ModelConfig(**{**dict(dim=self.dim, n_heads=self.heads, depth=self.randint(1, 2)), **self.banks, **fields})

    def attention(self):
        """Any attention module of the ladder, in float32 or float64."""
        fields = dict(self.choice(dydilit.LADDER)[1])
        if "differential" not in fields:
            fields.update(differential=self.choice(["token", "map"]))
        module, _ = dydilit.block_parts(self.config(**fields), 0)
        if fields.get("differential") == "token":
            Divided.of(module.differential, self.choice(["none", "length", "rms", "mass"]))
        return module.to(torch.float64 if self.dtype == torch.float64 else torch.float32)


def at_least_float32(dtype):
    return torch.float32 if dtype == torch.bfloat16 else dtype


# ---- functions ----

@many
def test_linear_attention_averages_the_values_in_any_order_of_the_keys(seed):
    draw = Draw(seed)
    q, k, v = draw.tokens().abs(), draw.tokens().abs(), draw.tokens(draw.randint(1, 9))
    out, order = dydilit.linear_attention(q, k, v), torch.randperm(draw.n)
    assert out.shape == v.shape and out.dtype == at_least_float32(draw.dtype)
    slack = 1e-4 * v.abs().max()
    assert (out <= v.amax(1, keepdim=True) + slack).all() and (out >= v.amin(1, keepdim=True) - slack).all()
    torch.testing.assert_close(dydilit.linear_attention(q, k[:, order], v[:, order]), out, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(dydilit.linear_attention(q[:, order], k, v), out[:, order], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(dydilit.linear_attention(4 * q, k, v), out, rtol=1e-3, atol=1e-4)
    assert (dydilit.attention_mass(q, k) > 0).all()


@many
def test_focused_kernel_sharpens_and_keeps_norm_order_and_scale(seed):
    draw = Draw(seed)
    z, gamma = draw.tokens(), 1 + 4 * torch.rand(draw.batch, draw.n, 1)
    out, relu = dydilit.focused_kernel(z, gamma), F.relu(z).to(at_least_float32(draw.dtype))
    assert out.shape == z.shape and out.dtype == relu.dtype and (out >= 0).all()
    torch.testing.assert_close(out.norm(dim=-1), relu.norm(dim=-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dydilit.focused_kernel(z, 1.0), relu, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dydilit.focused_kernel(4 * z, gamma), 4 * out, rtol=1e-5, atol=1e-6)
    assert (out.amax(-1) >= relu.amax(-1) * (1 - 1e-5)).all()               # gamma >= 1: the largest entry grows
    assert (out.gather(-1, z.argsort(dim=-1)).diff(dim=-1) >= -1e-6).all()  # and the order stays


# ---- modules ----

@many
def test_attention_modules_treat_images_alone_and_tokens_alike(seed):
    draw = Draw(seed)
    attn = draw.attention()
    x = draw.tokens(dtype=attn.proj.weight.dtype).requires_grad_()
    out = attn(x)
    assert out.shape == x.shape and out.dtype == x.dtype
    close = draw.close if draw.dtype != torch.bfloat16 else dict(rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.cat([attn(image[None]) for image in x]), out, **close)
    out.square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in attn.parameters())
    attn.dwc = None                             # the only part that knows where a token lies
    order = torch.randperm(draw.n)
    torch.testing.assert_close(attn(x[:, order]), attn(x)[:, order], **close)
    with torch.autocast("cpu", torch.bfloat16):
        assert attn.float()(x.float()).isfinite().all()


@many
def test_models_of_any_configuration(seed):
    """Shapes, images independent of their batch, guidance, fusing, the count of operations, and a way through a file."""
    draw = Draw(seed)
    patch, channels = draw.randint(1, 4), draw.randint(1, 4)
    fields = dict(dim=draw.dim, n_heads=draw.heads, depth=draw.randint(1, 3), patch_size=patch, in_channels=channels,
                  image_size=patch * draw.side, vae_factor=1, n_classes=draw.randint(1, 5))
    if seed % 4 == 0:
        fields.update(attention="softmax")
    model = dydilit.DyDiLiT(draw.config(**fields)).double().eval()
    for p in model.parameters():
        if p.requires_grad and p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    side, c = patch * draw.side, channels
    x, t = torch.randn(draw.batch, c, side, side, dtype=torch.float64), torch.randint(1000, (draw.batch,))
    y = torch.randint(fields["n_classes"], (draw.batch,))
    with torch.no_grad():
        out = model(x, t, y)
        assert out.shape == (draw.batch, 2 * c, side, side) and out.isfinite().all()
        for i in range(draw.batch):
            torch.testing.assert_close(model(x[i:i + 1], t[i:i + 1], y[i:i + 1]), out[i:i + 1])
        torch.testing.assert_close(model.forward_with_cfg(x, t, y, 1 + 1e-9), out, rtol=1e-6, atol=1e-6)
        twin = dydilit.DyDiLiT(model.cfg).double().eval()
        twin.load_state_dict(model.state_dict())
        torch.testing.assert_close(twin.fuse()(x, t, y), out)
        assert model.float()(x.float(), t, y).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x.float(), t, y).isfinite().all()
    counts = cost.count_macs(model)
    assert all(value >= 0 for parts in counts.values() for value in parts.values())
    assert sum(counts["honest"].values()) > 0 and set(counts["honest"]) == set(counts["paper"])


@many
def test_embedders_keep_patches_steps_and_classes_apart(seed):
    draw = Draw(seed)
    cfg = draw.config(image_size=8 * draw.side, vae_factor=1, patch_size=8, in_channels=3, n_classes=draw.randint(2, 9))
    patches, x = dydilit.PatchEmbed(cfg), torch.randn(1, 3, cfg.image_size, cfg.image_size, requires_grad=True)
    token = draw.randrange(draw.n)
    patches(x)[0, token].sum().backward()
    row, column = divmod(token, draw.side)
    assert x.grad[0, 0].nonzero().amin(0).tolist() == [8 * row, 8 * column] and (x.grad != 0).sum() == 3 * 64
    assert len(dydilit.TimestepEmbedder(draw.dim)(torch.arange(1000)).unique(dim=0)) == 1000
    assert len(dydilit.LabelEmbedder(cfg).eval()(torch.arange(cfg.n_classes + 1)).unique(dim=0)) == cfg.n_classes + 1
    assert len(dydilit.position_embedding(draw.dim, draw.side)[0].unique(dim=0)) == draw.n
    x, c = torch.randn(2, draw.n, draw.dim), torch.randn(2, draw.dim)
    assert dydilit.FinalLayer(cfg)(x, c).shape == (2, draw.n, 8 * 8 * 6)
    torch.testing.assert_close(dydilit.modulate(x, c, c), x + x * c[:, None] + c[:, None])
    for module in (dydilit.Mlp(draw.dim), dydilit.MixFFN(draw.dim), dydilit.SoftmaxAttention(draw.dim, draw.heads)):
        torch.testing.assert_close(torch.cat([module(image[None]) for image in x]), module(x), rtol=1e-4, atol=1e-5)


# ---- diffusion ----

@many
def test_diffusion_of_any_shape_and_length(seed):
    draw = Draw(seed)
    length, shape = draw.choice([2, 10, 1000]), (draw.batch, draw.randint(1, 4), draw.side, draw.side)
    diffusion = GaussianDiffusion(torch.linspace(1e-3, 0.2, length, dtype=torch.float64))
    x0, noise, t = torch.randn(shape), torch.randn(shape), torch.randint(length, (draw.batch,))
    x_t = diffusion.q_sample(x0, t, noise)
    if length < 1000:                           # at the end of a long one nothing of the image is left
        torch.testing.assert_close(diffusion.predict_x0(x_t, t, noise), x0, rtol=1e-3, atol=1e-3)

    def model(x, t, *_):
        return torch.cat([0.1 * x, torch.zeros_like(x)], dim=1)
    losses = diffusion.losses(model, x0.clamp(-1, 1), torch.zeros(draw.batch), t, noise)
    assert all(v.shape == (draw.batch,) and v.isfinite().all() for v in losses.values()) and (losses["simple"] >= 0).all()
    torch.testing.assert_close(losses["loss"], losses["simple"] + losses["variational"])
    for sampler, steps in itertools.product(["ddpm", "ddim"], {1, 2, length}):
        if steps <= 50:
            one, other = (diffusion.sample(model, noise, steps, sampler, True, torch.Generator().manual_seed(0), False)
                          for _ in range(2))
            assert one.shape == shape and one.isfinite().all() and torch.equal(one, other)
    steps = draw.randint(1, length)
    spaced = dydilit.respaced_timesteps(length, steps)
    assert len(set(spaced)) == steps and spaced == sorted(spaced) and spaced[-1] == length - 1
