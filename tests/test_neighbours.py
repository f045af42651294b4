"""The neighbours' attention against slow float64 loops written from their papers; their cost."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dydilit
from dydilit import GaussianDiffusion, ModelConfig
from lab import cost, neighbours
from lab.neighbours import NEIGHBOURS
from test_equations import eq_3, eq_4

SIDE, D, H = 4, 16, 2
N = SIDE * SIDE


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def parts(name, i=3, **fields):
    heads = 8 if name == "moh" else H                   # in the last of its blocks, all are shared
    return NEIGHBOURS[name](ModelConfig(**{**dict(dim=D, n_heads=heads, depth=4), **fields}), i)


def attention(name, i=0, **fields):
    """The attention of block i in float64, all weights random: 1 or 0 would hide a mistake."""
    module = parts(name, i, **fields)[0].double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module.requires_grad_(False)


def tokens(n=N, d=D):
    """Two images, so that one might see the other."""
    return torch.randn(2, n, d, dtype=torch.float64)


def linear(x, layer):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def conv_loop(x, conv):
    """x (N, C) on its grid, pixel by pixel: any kernel, stride, zero padding and groups."""
    side, pad, size, out = math.isqrt(len(x)), conv.padding[0], conv.kernel_size[0], []
    corners = range(-pad, side + pad - size + 1, conv.stride[0])
    for row, column in itertools.product(corners, repeat=2):
        out.append(conv.bias.clone())
        for a, b in itertools.product(range(size), repeat=2):
            if 0 <= row + a < side and 0 <= column + b < side:
                source = x[(row + a) * side + column + b].view(conv.groups, -1, 1)
                weight = conv.weight[:, :, a, b].reshape(conv.groups, -1, source.shape[1])
                out[-1] += (weight @ source).flatten()
    return torch.stack(out)


def by_head(attend, q, k, v, heads=H):
    """attend on every head's share of the channels."""
    return torch.cat([attend(*part) for part in zip(*(t.chunk(heads, 1) for t in (q, k, v)))], 1)


def normalized(x):
    return (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-5).sqrt()


# ---- each module is its paper's equation ----

@pytest.mark.parametrize("pixels, n", [(256, 256), (128, 64)])      # and their number of tokens
def test_pixart_compresses_keys_and_values_in_the_later_half(pixels, n):
    module, x = attention("pixart", i=2, dim=8, image_size=pixels), tokens(n, 8)
    q, k, v = linear(x[0], module.qkv).chunk(3, dim=1)
    k, v = (torch.stack([normalized(row) for row in conv_loop(t, module.compress)])
            * module.norm.weight + module.norm.bias for t in (k, v))
    assert k.shape == (16, 8)                                       # 256 / 16, and 64 / 4
    want = linear(by_head(eq_3, q, k, v), module.proj)
    torch.testing.assert_close(module(x)[0], want)
    kinds = [type(NEIGHBOURS["pixart"](ModelConfig(depth=5), i)[0]) for i in range(5)]
    assert kinds == 3 * [dydilit.SoftmaxAttention] + 2 * [neighbours.KVCompressedAttention]


@pytest.mark.parametrize("name, pooling", [("pixart", (4,)), ("edit", (3, 2, 1))])
def test_compression_starts_as_the_mean(name, pooling):
    compress = parts(name)[0].compress
    image = torch.randn(1, compress.in_channels, 8, 8)
    torch.testing.assert_close(compress(image), F.avg_pool2d(image, *pooling))


def test_edit_is_its_papers_equations():
    module, x = attention("edit"), tokens()
    narrow = conv_loop(x[0], module.narrow)                         # (N, d / 2)
    assert narrow.shape == (N, D // 2)
    narrow = torch.cat([normalized(group) for group in narrow.chunk(4, dim=1)], 1)
    narrow = narrow * module.norm.weight + module.norm.bias
    narrow = torch.where(narrow > 0, narrow, 0.01 * narrow)
    q = linear(x[0] + conv_loop(narrow, module.widen), module.q).clamp(min=0)
    k, v = conv_loop(linear(x[0], module.kv), module.compress).chunk(2, dim=1)
    assert k.shape == (N // 4, D)
    want = linear(by_head(eq_4, q, k.clamp(min=0), v), module.proj)
    torch.testing.assert_close(module(x)[0], want)


def recurrence(q, k, v, log_decay):
    """S_t = diag(decay_t) S_{t-1} + k_t^T v_t, o_t = q_t S_t, token by token, row by row."""
    memory, out = [torch.zeros(v.shape[1], dtype=v.dtype) for _ in range(k.shape[1])], []
    for t in range(len(q)):
        memory = [math.e ** log_decay[t, c] * row + k[t, c] * v[t] for c, row in enumerate(memory)]
        out.append(sum(q[t, c] * row for c, row in enumerate(memory)))
    return torch.stack(out)


@pytest.mark.parametrize("n, fastest", [(1, 5.0), (16, 0.1), (17, 5.0), (40, 0.1), (40, 5.0)])
def test_the_chunked_form_is_the_recurrence_with_its_gradients(n, fastest):
    q, k, v = (torch.randn(n, d, dtype=torch.float64, requires_grad=True) for d in (3, 3, 4))
    log_decay = (-fastest * torch.rand(n, 3, dtype=torch.float64)).requires_grad_()
    inputs = (q, k, v, log_decay)
    got, want = neighbours.gated_linear_attention(*inputs), recurrence(*inputs)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(got)
    torch.testing.assert_close(*(torch.autograd.grad(out, inputs, upstream) for out in (got, want)))


def test_the_scan_is_computed_in_float32_under_autocast():
    inputs = [torch.randn(40, 3).bfloat16() for _ in range(4)]
    inputs[3] = -inputs[3].abs()
    with torch.autocast("cpu", torch.bfloat16):
        got = neighbours.gated_linear_attention(*inputs)
    want = recurrence(*(t.double() for t in inputs))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direction", range(4))
def test_dig_scans_in_its_blocks_direction(direction):
    rows = [r * SIDE + c for r in range(SIDE) for c in range(SIDE)]
    columns = [r * SIDE + c for c in range(SIDE) for r in range(SIDE)]
    order = [rows, rows[::-1], columns, columns[::-1]][direction]
    module, x = attention("dig", i=4 + direction), tokens()
    scanned = x[0][order]
    q, k, v, gate = (linear(scanned, layer)
                     for layer in (module.q, module.k, module.v, module.gate))
    decay = torch.sigmoid(linear(linear(scanned, module.decay[0]), module.decay[1]))
    heads = [recurrence(a / math.sqrt(D // 2 // H), b, w, g.log() / 16)
             for a, b, w, g in zip(*(t.chunk(H, dim=1) for t in (q, k, v, decay)))]
    heads = [out / (out.square().mean(1, keepdim=True) + 1e-6).sqrt() * module.norm.weight
             for out in heads]
    want = torch.zeros(N, D, dtype=torch.float64)
    want[order] = linear(torch.cat(heads, dim=1) * gate * torch.sigmoid(gate), module.proj)
    torch.testing.assert_close(module(x)[0], want)


def test_digs_other_parts():
    """SwiGLU, whose width is a multiple of 256, and a convolution that starts as the identity."""
    (_, module, after), x = (parts("dig"), tokens())
    module, after = module.double().requires_grad_(False), after.double().requires_grad_(False)
    gate, up = linear(x[0, :3], module.expand).chunk(2, dim=1)
    want = linear(gate / (1 + (-gate).exp()) * up, module.contract)
    torch.testing.assert_close(module(x)[0, :3], want)
    widths = [parts("dig", dim=d)[1].contract.in_features for d in (96, 384, 512, 768)]
    assert widths == [256, 1024, 1536, 2048]
    torch.testing.assert_close(after(x), x)
    torch.nn.init.normal_(after.conv.weight)
    torch.testing.assert_close(after(x)[0], conv_loop(x[0], after.conv))
    block = dydilit.build_model("DyDi-LiT-XS/4", NEIGHBOURS["dig"]).blocks[0].float()
    torch.nn.init.normal_(block.after.conv.weight)      # a new block's branches give 0
    x = torch.randn(1, 64, 96)
    torch.testing.assert_close(block(x, x[:, 0]), block.after(x))


@pytest.mark.parametrize("n_heads, i, shared, chosen", [
    (5, 0, 2, 2), (6, 7, 3, 2), (8, 0, 4, 3), (12, 0, 6, 4), (6, 8, 6, 0)])
def test_moh_weighs_shared_heads_and_the_chosen_ones_of_the_others(n_heads, i, shared, chosen):
    module = attention("moh", i, dim=4 * n_heads, n_heads=n_heads, depth=12)
    x = tokens(9, 4 * n_heads)

    def softmax(x, layer):
        scores = linear(x, layer).exp()
        return scores / scores.sum(dim=1, keepdim=True)

    weights = shared * softmax(x[0], module.shared_router)
    assert weights.shape == (9, shared)
    if shared < n_heads:
        kinds, p = softmax(x[0], module.kinds), softmax(x[0], module.router)
        for row in p:
            row[row < sorted(row)[-chosen]] = 0
        p = chosen * p / p.sum(dim=1, keepdim=True)
        weights = torch.cat([2 * kinds[:, :1] * weights, 2 * kinds[:, 1:] * p], 1)
    q, k, v = (t.chunk(n_heads, dim=1) for t in linear(x[0], module.qkv).chunk(3, dim=1))
    heads = [eq_3(*part) * g[:, None] for *part, g in zip(q, k, v, weights.T)]
    torch.testing.assert_close(module(x)[0], linear(torch.cat(heads, dim=1), module.proj))


def test_moh_with_too_few_heads_to_learn_a_choice():
    with pytest.raises(ValueError, match="n_heads=4 is not at least 5"):
        parts("moh", n_heads=4)


def test_lit_is_relu_attention_and_a_convolution_of_each_heads_values():
    module, x = attention("lit"), tokens()
    q, k, v = linear(x[0], module.qkv).chunk(3, dim=1)
    local = torch.cat([conv_loop(head, module.dwc) for head in v.chunk(H, dim=1)], dim=1)
    out = by_head(eq_4, q.clamp(min=0), k.clamp(min=0), v) + local
    torch.testing.assert_close(module(x)[0], linear(out, module.proj))
    assert module.dwc.kernel_size == (5, 5)
    heads = [parts("lit", dim=d)[0].n_heads for d in (96, 384, 512, 768, 1152)]
    assert heads == [2, 2, 2, 3, 4]


# ---- they are numerically well behaved ----

@pytest.mark.parametrize("name", NEIGHBOURS)
def test_every_parameter_gets_a_finite_gradient_also_in_bfloat16(name):
    module = parts(name)[0]
    for scale, autocast in itertools.product((0, 1, 1e3), (False, True)):
        x = (torch.randn(2, 64, D) * scale).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(x)
        gradients = torch.autograd.grad(out.float().square().mean(), [x, *module.parameters()])
        assert out.isfinite().all() and all(g.isfinite().all() for g in gradients)
        if scale == 1:
            assert all((g != 0).any() for g in gradients)
            assert (out - module(x)).abs().mean() < 0.05 * out.abs().mean()


@pytest.mark.parametrize("decay", [-1e4, 1e4])
def test_dig_survives_the_fastest_and_the_slowest_decay(decay):
    module, x = parts("dig")[0], torch.randn(2, 64, D, requires_grad=True)
    torch.nn.init.constant_(module.decay[1].bias, decay)
    out = module(10 * x)
    gradients = torch.autograd.grad(out.sum(), [x, *module.parameters()])
    assert out.isfinite().all() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("system", NEIGHBOURS)
def test_whole_models_train(system):
    model = dydilit.build_model("DyDi-LiT-XS/4", parts=NEIGHBOURS[system], n_heads=6)
    x, y, diffusion = torch.rand(4, 3, 32, 32) * 2 - 1, torch.arange(4), GaussianDiffusion()
    t, noise = torch.randint(1000, (4,)), torch.randn(4, 3, 32, 32)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for _ in range(3):
        losses.append(diffusion.losses(model, x, y, t, noise)["loss"].mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[0]


# ---- their cost ----

@pytest.mark.parametrize("system, size, overrides, printed", cost.NEIGHBOUR_GFLOPS)
def test_gflops_of_the_papers_neighbours(system, size, overrides, printed):
    with torch.device("meta"):
        model = dydilit.build_model(f"DyDi-LiT-{size}/2", NEIGHBOURS[system], **overrides)
    macs = sum(cost.count_macs(model)["paper"].values())
    assert macs / 1e9 == pytest.approx(printed, rel=0.0015)


@pytest.mark.parametrize("system, heads", [("pixart", 6), ("edit", 1), ("edit", 6), ("dig", 6),
                                           ("dig", 1), ("moh", 6), ("lit", 1)])
@pytest.mark.parametrize("pixels", [256, 512])
def test_honest_count_is_what_runs(system, heads, pixels):
    """Against PyTorch's own count, which leaves out additions: the normalizer's sums of keys."""
    model = dydilit.build_model("DyDi-LiT-S/2", NEIGHBOURS[system], depth=2, dim=96, n_heads=heads,
                                image_size=pixels).eval()
    x, t = torch.zeros(1, 4, pixels // 8, pixels // 8), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(x, t, t)
    honest = cost.count_macs(model)["honest"]
    sums = honest.get("normalizer", 0) * {"edit": 1 / 5, "lit": 1 / 2}.get(system, 0)
    assert sum(honest.values()) - sums == pytest.approx(counter.get_total_flops() / 2, rel=1e-9)
