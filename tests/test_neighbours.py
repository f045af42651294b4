"""The neighbours' attention against slow float64 loops written from their papers; their cost."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dydilit
from lab import cost, neighbours
from lab.neighbours import NEIGHBOURS
from test_equations import eq_3, eq_4

SIDE, N, D, H = 4, 16, 16, 2


def parts(name, i=3, **fields):
    fields = dict(dim=D, n_heads=8 if name == "moh" else H, depth=4) | fields
    return NEIGHBOURS[name](dydilit.ModelConfig(**fields), i)


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


def convolve(x, conv):
    """conv on the square grid of the tokens x, (N, C)."""
    image = x.T.unflatten(1, (math.isqrt(len(x)), -1))
    out = F.conv2d(image, conv.weight, conv.bias, conv.stride, conv.padding, 1, conv.groups)
    return out.flatten(1).T


def by_head(attend, *inputs):
    """attend on every head's share of the channels."""
    return torch.cat([attend(*part) for part in zip(*(t.chunk(H, 1) for t in inputs))], 1)


@pytest.mark.parametrize("pixels, n", [(256, 256), (128, 64)])      # and their number of tokens
def test_pixart_compresses_keys_and_values_in_the_later_half(pixels, n):
    module, x = attention("pixart", i=2, dim=8, image_size=pixels), tokens(n, 8)
    q, k, v = linear(x[0], module.qkv).chunk(3, dim=1)
    k, v = (F.layer_norm(convolve(t, module.compress), (8,), module.norm.weight, module.norm.bias)
            for t in (k, v))
    assert k.shape == (16, 8)                                       # 256 / 16, and 64 / 4
    torch.testing.assert_close(module(x)[0], linear(by_head(eq_3, q, k, v), module.proj))
    kinds = [type(NEIGHBOURS["pixart"](dydilit.ModelConfig(depth=5), i)[0]) for i in range(5)]
    assert kinds == 3 * [dydilit.SoftmaxAttention] + 2 * [neighbours.KVCompressedAttention]
    image = torch.randn(1, D, 8, 8)                     # the compression starts as a mean
    torch.testing.assert_close(parts("pixart")[0].compress(image), F.avg_pool2d(image, 4))


def test_edit_is_its_papers_equations():
    module, x = attention("edit"), tokens()
    narrow = convolve(x[0], module.narrow)                          # (N, d / 2)
    narrow = F.group_norm(narrow.T[None], 4, module.norm.weight, module.norm.bias)[0].T
    narrow = torch.where(narrow > 0, narrow, 0.01 * narrow)
    q = linear(x[0] + convolve(narrow, module.widen), module.q).clamp(min=0)
    k, v = convolve(linear(x[0], module.kv), module.compress).chunk(2, dim=1)
    assert narrow.shape == (N, D // 2) and k.shape == (N // 4, D)
    want = linear(by_head(eq_4, q, k.clamp(min=0), v), module.proj)
    torch.testing.assert_close(module(x)[0], want)
    image = torch.randn(1, 2 * D, 8, 8)
    torch.testing.assert_close(parts("edit")[0].compress(image), F.avg_pool2d(image, 3, 2, 1))


def recurrence(q, k, v, log_decay):
    """S_t = diag(decay_t) S_{t-1} + k_t^T v_t, o_t = q_t S_t, token by token."""
    memory, out = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype), []
    for t in range(len(q)):
        memory = log_decay[t].exp()[:, None] * memory + torch.outer(k[t], v[t])
        out.append(q[t] @ memory)
    return torch.stack(out)


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-9), (torch.bfloat16, 1e-4)])
@pytest.mark.parametrize("n, fastest", [(1, 5), (16, 0.1), (17, 5), (40, 0.1)])
def test_the_chunked_form_is_the_recurrence_and_never_in_bfloat16(n, fastest, dtype, close):
    q, k, v, decay = (torch.randn(n, d).to(dtype) for d in (3, 3, 4, 3))
    inputs = q, k, v, -fastest * torch.sigmoid(decay)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        got = neighbours.gated_linear_attention(*inputs)
    want = recurrence(*(t.double() for t in inputs))
    torch.testing.assert_close(got.double(), want, rtol=close, atol=close)


@pytest.mark.parametrize("direction", range(4))
def test_dig_scans_in_its_blocks_direction(direction):
    rows, columns = [*range(N)], [r * SIDE + c for c in range(SIDE) for r in range(SIDE)]
    order = [rows, rows[::-1], columns, columns[::-1]][direction]
    module, x = attention("dig", i=4 + direction), tokens()
    scanned = x[0][order]
    q, k, v, gate = (linear(scanned, layer)
                     for layer in (module.q, module.k, module.v, module.gate))
    decay = linear(linear(scanned, module.decay[0]), module.decay[1])

    def attend(q, k, v, decay):
        out = recurrence(q / math.sqrt(D // 2 // H), k, v, decay.sigmoid().log() / 16)
        return out / (out.square().mean(1, keepdim=True) + 1e-6).sqrt() * module.norm.weight

    want = torch.zeros(N, D, dtype=torch.float64)
    want[order] = linear(by_head(attend, q, k, v, decay) * gate * gate.sigmoid(), module.proj)
    torch.testing.assert_close(module(x)[0], want)


def test_digs_swiglu_and_convolution():
    (_, module, after), x = (part and part.double() for part in parts("dig")), tokens()
    gate, up = linear(x[0], module.expand).chunk(2, dim=1)
    torch.testing.assert_close(module(x)[0], linear(gate * gate.sigmoid() * up, module.contract))
    widths = [parts("dig", dim=d)[1].contract.in_features for d in (96, 384, 512, 768)]
    assert widths == [256, 1024, 1536, 2048]
    torch.testing.assert_close(after(x), x)             # it starts as the identity
    torch.nn.init.normal_(after.conv.weight)
    torch.testing.assert_close(after(x)[0], convolve(x[0], after.conv))
    block = dydilit.Block(D, torch.zeros_like, torch.zeros_like, after).double()
    torch.testing.assert_close(block(x, x[:, 0]), after(x))


@pytest.mark.parametrize("n_heads, i, shared, top", [(5, 0, 2, 2), (6, 7, 3, 2), (6, 8, 6, 0)])
def test_moh_weighs_shared_heads_and_the_chosen_ones_of_the_others(n_heads, i, shared, top):
    module = attention("moh", i, dim=4 * n_heads, n_heads=n_heads, depth=12)
    x = tokens(9, 4 * n_heads)
    weights = shared * linear(x[0], module.shared_router).softmax(1)
    assert weights.shape == (9, shared)
    if shared < n_heads:
        kinds, p = (linear(x[0], layer).softmax(1) for layer in (module.kinds, module.router))
        for row in p:
            row[row < sorted(row)[-top]] = 0
        p = top * p / p.sum(dim=1, keepdim=True)
        weights = torch.cat([2 * kinds[:, :1] * weights, 2 * kinds[:, 1:] * p], 1)
    q, k, v = (t.chunk(n_heads, dim=1) for t in linear(x[0], module.qkv).chunk(3, dim=1))
    heads = [eq_3(*part) * g[:, None] for *part, g in zip(q, k, v, weights.T)]
    torch.testing.assert_close(module(x)[0], linear(torch.cat(heads, dim=1), module.proj))
    with pytest.raises(ValueError, match="n_heads=4 is not at least 5"):
        parts("moh", n_heads=4)                         # these could not learn a choice


def test_lit_is_relu_attention_and_a_convolution_of_each_heads_values():
    module, x = attention("lit"), tokens()
    q, k, v = linear(x[0], module.qkv).chunk(3, dim=1)
    local = torch.cat([convolve(head, module.dwc) for head in v.chunk(H, dim=1)], dim=1)
    out = by_head(eq_4, q.clamp(min=0), k.clamp(min=0), v) + local
    torch.testing.assert_close(module(x)[0], linear(out, module.proj))
    assert module.dwc.kernel_size == (5, 5)
    heads = [parts("lit", dim=d)[0].n_heads for d in (96, 384, 512, 768, 1152)]
    assert heads == [2, 2, 2, 3, 4]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_every_parameter_gets_a_finite_gradient_also_in_bfloat16(name, autocast):
    module = parts(name)[0]
    for scale in (0, 1, 1e3):
        x = (torch.randn(2, 64, D) * scale).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(x)
        gradients = torch.autograd.grad(out.float().square().mean(), [x, *module.parameters()])
        assert out.isfinite().all() and all(g.isfinite().all() for g in gradients)
        if scale == 1:
            assert all((g != 0).any() for g in gradients)
            assert (out - module(x)).abs().mean() < 0.05 * out.abs().mean()


@pytest.mark.parametrize("system, size, overrides, printed", cost.NEIGHBOUR_GFLOPS)
def test_gflops_of_the_papers_neighbours(system, size, overrides, printed):
    with torch.device("meta"):
        model = dydilit.build_model(f"DyDi-LiT-{size}/2", NEIGHBOURS[system], **overrides)
    macs = sum(cost.count_macs(model)["paper"].values()) / 1e9
    assert printed is None or macs == pytest.approx(printed, rel=0.0015)


@pytest.mark.parametrize("system, heads", [*zip(NEIGHBOURS, (6, 1, 6, 6, 1))])
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
