"""The neighbours' attention against slow float64 loops written from their papers, and their cost."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from lab import cost, neighbours
from lab.neighbours import NEIGHBOURS
from test_equations import dot, linear_attention_loop, softmax_attention_loop
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dydilit
from dydilit import GaussianDiffusion, ModelConfig

SIDE, D, H = 4, 16, 2
N = SIDE * SIDE


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def plain(name, i=3, **fields):
    heads = 8 if name == "moh" else H                       # in the last of its blocks, all are shared
    return NEIGHBOURS[name](ModelConfig(**{**dict(dim=D, n_heads=heads, depth=4), **fields}), i)[0]


def attention(name, i=0, **fields):
    """The attention of block i in float64, every weight random: a start at 1 or 0 would hide a mistake."""
    module = plain(name, i, **fields).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module.requires_grad_(False)


def tokens(n=N, d=D):
    return torch.randn(1, n, d, dtype=torch.float64)


def linear_loop(x, layer):
    """x (N, d), row by row."""
    weight, bias = layer.weight.tolist(), len(layer.weight) * [0.0] if layer.bias is None else layer.bias.tolist()
    return torch.tensor([[dot(row, w) + b for w, b in zip(weight, bias)] for row in x.tolist()], dtype=torch.float64)


def conv_loop(x, conv):
    """x (N, C) on its grid, pixel by pixel: any kernel, stride, zero padding and groups."""
    side, stride, pad, size = math.isqrt(len(x)), conv.stride[0], conv.padding[0], conv.kernel_size[0]
    inputs, outputs = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    pixels, weight, bias = x.tolist(), conv.weight.tolist(), conv.out_channels * [0.0]
    bias, out = bias if conv.bias is None else conv.bias.tolist(), []
    for row in range(-pad, side + pad - size + 1, stride):
        for column in range(-pad, side + pad - size + 1, stride):
            pixel = []
            for o in range(conv.out_channels):
                total = bias[o]
                for a, b, c in itertools.product(range(size), range(size), range(inputs)):
                    if 0 <= row + a < side and 0 <= column + b < side:
                        source = pixels[(row + a) * side + column + b][o // outputs * inputs + c]
                        total += weight[o][c][a][b] * source
                pixel.append(total)
            out.append(pixel)
    return torch.tensor(out, dtype=torch.float64)


def by_head(attend, q, k, v):
    """attend on every head's share of the channels."""
    return torch.cat([attend(*part) for part in zip(*(t.chunk(H, dim=1) for t in (q, k, v)))], dim=1)


# ---- each module is its paper's equation ----

@pytest.mark.parametrize("pixels, n", [(256, 256), (128, 64)])             # of the images, and how many tokens they have
def test_pixart_compresses_keys_and_values_in_the_later_half(pixels, n):
    module, x = attention("pixart", i=2, dim=8, image_size=pixels), tokens(n, 8)
    q, k, v = linear_loop(x[0], module.qkv).chunk(3, dim=1)
    k, v = (conv_loop(t, module.compress) for t in (k, v))
    assert k.shape == (16, 8)                                               # 256 / 16, and 64 / 4
    for t in (k, v):
        for row in t:
            mean, variance = row.mean(), ((row - row.mean()) ** 2).mean()
            row.copy_((row - mean) / (variance + 1e-5).sqrt() * module.norm.weight + module.norm.bias)
    want = linear_loop(by_head(softmax_attention_loop, q, k, v), module.proj)
    torch.testing.assert_close(module(x)[0], want)


def test_pixart_starts_as_the_mean_and_leaves_the_first_half_alone():
    cfg = ModelConfig(dim=D, n_heads=H, depth=5)
    kinds = [type(NEIGHBOURS["pixart"](cfg, i)[0]).__name__ for i in range(5)]
    assert kinds == 3 * ["SoftmaxAttention"] + 2 * ["KVCompressedAttention"]
    x, module = torch.randn(1, 64, D), NEIGHBOURS["pixart"](cfg, 4)[0]
    mean = neighbours.as_tokens(F.avg_pool2d(neighbours.as_image(x), 4))
    torch.testing.assert_close(neighbours.as_tokens(module.compress(neighbours.as_image(x))), mean)


def test_edits_keys_and_values_start_as_means():
    compress, image = plain("edit").compress, torch.randn(1, 2 * D, SIDE, SIDE)
    torch.testing.assert_close(compress(image), F.avg_pool2d(image, 3, stride=2, padding=1))


def test_edit_is_its_papers_equations():
    module, x = attention("edit"), tokens()
    narrow = conv_loop(x[0], module.narrow)                                 # (N, d / 2)
    for group in narrow.split(D // 2 // 4, dim=1):                          # 4 groups, each over all tokens
        mean, variance = group.mean(), ((group - group.mean()) ** 2).mean()
        group.copy_((group - mean) / (variance + 1e-5).sqrt())
    narrow = narrow * module.norm.weight + module.norm.bias
    narrow = torch.where(narrow > 0, narrow, 0.01 * narrow)
    q = linear_loop(x[0] + conv_loop(narrow, module.widen), module.q).clamp(min=0)
    k, v = conv_loop(linear_loop(x[0], module.kv), module.compress).chunk(2, dim=1)
    assert k.shape == (N // 4, D)
    want = linear_loop(by_head(linear_attention_loop, q, k.clamp(min=0), v), module.proj)
    torch.testing.assert_close(module(x)[0], want)


def recurrence(q, k, v, log_decay):
    """S_t = diag(decay_t) S_{t-1} + k_t^T v_t, o_t = q_t S_t, one token, then one channel at a time."""
    memory, out = [torch.zeros(v.shape[1], dtype=v.dtype) for _ in range(k.shape[1])], []
    for t in range(len(q)):
        memory = [math.e ** log_decay[t, c] * row + k[t, c] * v[t] for c, row in enumerate(memory)]
        out.append(sum(q[t, c] * row for c, row in enumerate(memory)))
    return torch.stack(out)


@pytest.mark.parametrize("n", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("fastest", [0.1, 5.0])
def test_the_chunked_form_is_the_recurrence_with_its_gradients(n, fastest):
    q, k, v = (torch.randn(n, d, dtype=torch.float64, requires_grad=True) for d in (3, 3, 4))
    log_decay = (-fastest * torch.rand(n, 3, dtype=torch.float64)).requires_grad_()
    got, want = neighbours.gated_linear_attention(q, k, v, log_decay), recurrence(q, k, v, log_decay)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(got)
    for g, w in zip(*(torch.autograd.grad(out, (q, k, v, log_decay), upstream) for out in (got, want))):
        torch.testing.assert_close(g, w)


def test_the_scan_is_computed_in_float32_under_autocast():
    q, k, v, log_decay = (torch.randn(40, 3).bfloat16() for _ in range(4))
    log_decay = -log_decay.abs()
    with torch.autocast("cpu", torch.bfloat16):
        got = neighbours.gated_linear_attention(q, k, v, log_decay)
    want = neighbours.gated_linear_attention(q.float(), k.float(), v.float(), log_decay.float())
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("direction", range(4))
def test_dig_scans_in_its_blocks_direction(direction):
    """With the order written out by hand, and the output gate and norm after the recurrence."""
    rows = [r * SIDE + c for r in range(SIDE) for c in range(SIDE)]
    columns = [r * SIDE + c for c in range(SIDE) for r in range(SIDE)]
    order = [rows, rows[::-1], columns, columns[::-1]][direction]
    assert neighbours.scan_order(N, direction).tolist() == order
    module, x = attention("dig", i=4 + direction), tokens()
    scanned = x[0][order]
    q, k, v, gate = (linear_loop(scanned, layer) for layer in (module.q, module.k, module.v, module.gate))
    decay = torch.sigmoid(linear_loop(linear_loop(scanned, module.decay[0]), module.decay[1])) ** (1 / 16)
    heads = [recurrence(a / math.sqrt(D // 2 // H), b, w, g.log())
             for a, b, w, g in zip(*(t.chunk(H, dim=1) for t in (q, k, v, decay)))]
    heads = [out / ((out ** 2).mean(dim=1, keepdim=True) + 1e-6).sqrt() * module.norm.weight for out in heads]
    want = torch.zeros(N, D, dtype=torch.float64)
    want[order] = linear_loop(torch.cat(heads, dim=1) * gate * torch.sigmoid(gate), module.proj)
    torch.testing.assert_close(module(x)[0], want)


def test_a_convolution_that_starts_as_the_identity_follows_each_of_digs_blocks():
    after, x = NEIGHBOURS["dig"](ModelConfig(dim=D, n_heads=H), 0)[2].double(), tokens()
    torch.testing.assert_close(after(x), x)
    torch.nn.init.normal_(after.conv.weight)
    torch.testing.assert_close(after(x)[0], conv_loop(x[0], after.conv.requires_grad_(False)))
    block = dydilit.build_model("DyDi-LiT-XS/4", NEIGHBOURS["dig"], dim=D, n_heads=H).blocks[0].double()
    torch.nn.init.normal_(block.after.conv.weight)          # a new block's branches give 0, and its result is x
    torch.testing.assert_close(block(x, x[:, 0]), block.after(x))


def test_a_token_reaches_only_later_ones_in_one_block_of_dig_and_all_in_two():
    x = torch.randn(1, N, D, requires_grad=True, dtype=torch.float64)
    blocks = [attention("dig", i) for i in range(2)]
    reached = [torch.autograd.grad(out[0, 5].sum(), x)[0][0].abs().sum(1) > 0
               for out in (blocks[0](x), blocks[1](x), blocks[1](blocks[0](x)))]
    assert [r.tolist() for r in reached] == [[i <= 5 for i in range(N)], [i >= 5 for i in range(N)], [True] * N]


def test_swiglu_is_its_equation_and_its_width_a_multiple_of_256():
    module, x = NEIGHBOURS["dig"](ModelConfig(dim=D), 0)[1].double().requires_grad_(False), tokens()
    gate, up = linear_loop(x[0, :3], module.expand).chunk(2, dim=1)
    torch.testing.assert_close(module(x)[0, :3], linear_loop(gate / (1 + (-gate).exp()) * up, module.contract))
    widths = {d: NEIGHBOURS["dig"](ModelConfig(dim=d), 0)[1].contract.in_features for d in (96, 384, 512, 768)}
    assert widths == {96: 256, 384: 1024, 512: 1536, 768: 2048}


@pytest.mark.parametrize("n_heads, shared, chosen", [(5, 2, 2), (6, 3, 2), (8, 4, 3), (12, 6, 4)])
def test_moh_weighs_shared_heads_and_the_chosen_ones_of_the_others(n_heads, shared, chosen):
    module, x = attention("moh", dim=4 * n_heads, n_heads=n_heads), tokens(9, 4 * n_heads)
    assert (module.shared, module.top) == (shared, chosen)

    def softmax(scores):
        return [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
    weights = []
    for row in x[0]:
        kinds, p_shared, p = (softmax([dot(row, w) for w in layer.weight])
                              for layer in (module.kinds, module.shared_router, module.router))
        best = sorted(range(len(p)), key=lambda i: -p[i])[:chosen]
        total = sum(p[i] for i in best)
        weights.append([2 * kinds[0] * shared * g for g in p_shared]
                       + [2 * kinds[1] * chosen * g / total if i in best else 0.0 for i, g in enumerate(p)])
    weights = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(module.weights(x)[0], weights)
    q, k, v = (t.chunk(n_heads, dim=1) for t in linear_loop(x[0], module.qkv).chunk(3, dim=1))
    heads = [softmax_attention_loop(*part) * weights[:, i:i + 1] for i, part in enumerate(zip(q, k, v))]
    torch.testing.assert_close(module(x)[0], linear_loop(torch.cat(heads, dim=1), module.proj))


def test_moh_without_preferences_has_the_weights_of_as_many_heads_as_are_on():
    on = []
    for i in range(12):
        module = attention("moh", i, dim=24, n_heads=6, depth=12)
        for name in ("kinds", "shared_router", "router"):
            if hasattr(module, name):
                torch.nn.init.zeros_(getattr(module, name).weight)
        weights = module.weights(tokens(9, 24))
        assert torch.isin(weights, torch.tensor([0.0, 1.0])).all()
        on.append(weights.sum(-1).unique().tolist())        # the same for all tokens
    assert on == 8 * [[5]] + 4 * [[6]]                      # the released S/2 with 90 % of its heads
    with pytest.raises(ValueError, match="n_heads=4"):
        attention("moh", n_heads=4)


def test_moh_with_shared_heads_alone_weighs_them_all():
    module, x = attention("moh", 3, dim=24, n_heads=6), tokens(9, 24)
    scores = linear_loop(x[0], module.shared_router).exp()
    torch.testing.assert_close(module.weights(x)[0], 6 * scores / scores.sum(dim=1, keepdim=True))


def test_lit_is_relu_attention_and_a_convolution_of_each_heads_values():
    module, x = attention("lit"), tokens()
    q, k, v = linear_loop(x[0], module.qkv).chunk(3, dim=1)
    local = torch.cat([conv_loop(head, module.dwc) for head in v.chunk(H, dim=1)], dim=1)
    out = by_head(linear_attention_loop, q.clamp(min=0), k.clamp(min=0), v) + local
    torch.testing.assert_close(module(x)[0], linear_loop(out, module.proj))
    heads = {d: NEIGHBOURS["lit"](ModelConfig(dim=d), 0)[0].n_heads for d in (96, 384, 512, 768, 1024, 1152)}
    assert heads == {96: 2, 384: 2, 512: 2, 768: 3, 1024: 4, 1152: 4}


# ---- they are numerically well behaved ----

@pytest.mark.parametrize("name", NEIGHBOURS)
def test_every_parameter_gets_a_finite_gradient_also_in_bfloat16(name):
    module = plain(name)
    for scale in (0, 1e-4, 1, 1e3):
        for autocast in (False, True):
            x = (torch.randn(2, 64, D) * scale).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = module(x)
            gradients = torch.autograd.grad(out.float().square().mean(), [x, *module.parameters()])
            assert out.isfinite().all() and all(g.isfinite().all() for g in gradients)
            if scale == 1:
                assert all((g != 0).any() for g in gradients)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_bfloat16_is_close_to_float32(name):
    module, x = plain(name), torch.randn(2, 64, D)
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x).float()
    assert (half - module(x)).abs().mean() < 0.05 * module(x).abs().mean()


@pytest.mark.parametrize("decay", [-1e4, 1e4])
def test_dig_survives_the_fastest_and_the_slowest_decay(decay):
    module, x = NEIGHBOURS["dig"](ModelConfig(dim=D, n_heads=H), 0)[0], torch.randn(2, 64, D, requires_grad=True)
    torch.nn.init.constant_(module.decay[1].bias, decay)
    out = module(10 * x)
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_images_do_not_see_each_other(name):
    module, x = attention(name, i=3), tokens(64).repeat(2, 1, 1) * torch.tensor([1.0, 2.0])[:, None, None]
    torch.testing.assert_close(torch.cat([module(image[None]) for image in x]), module(x))


# ---- their cost ----

def operations(name, n, **fields):
    module, x = plain(name, **{**dict(dim=64, n_heads=1), **fields}), torch.zeros(1, n, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(x)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", ["edit", "dig", "lit"])
def test_linear_systems_cost_the_same_per_token_at_any_length(name):
    """From the length on at which q (k^T v) is the cheaper order: EDiT's keys are N / 4."""
    short, long = (operations(name, n) / n for n in (1024, 2304))
    assert short == pytest.approx(long, rel=1e-3)


def test_pixarts_products_are_a_sixteenth_and_mohs_are_all_there():
    products = [operations("pixart", n) / n - operations("pixart", 64) / 64 for n in (1024, 4096)]
    assert products == [2 * 64 * (1024 - 64) / 16, 2 * 64 * (4096 - 64) / 16]
    full = operations("moh", 1024, n_heads=8) / 1024 - operations("moh", 64, n_heads=8) / 64
    assert full == 2 * 64 * (1024 - 64)


def model_of(system, size="S", **overrides):
    return dydilit.build_model(f"DyDi-LiT-{size}/2", parts=NEIGHBOURS[system], **overrides)


@pytest.mark.parametrize("system, size, overrides, printed", cost.NEIGHBOUR_GFLOPS)
def test_gflops_of_the_papers_neighbours(system, size, overrides, printed):
    with torch.device("meta"):
        model = model_of(system, size, **overrides)
    assert sum(cost.count_macs(model)["paper"].values()) / 1e9 == pytest.approx(printed, rel=0.0015)


@pytest.mark.parametrize("system, heads", [("pixart", 6), ("edit", 1), ("edit", 6), ("dig", 6), ("dig", 1), ("moh", 6),
                                           ("lit", 1)])
@pytest.mark.parametrize("pixels", [256, 512])
def test_honest_count_is_what_runs(system, heads, pixels):
    """Against PyTorch's own count, but for the normalizer's sums of keys: additions, which it does not count."""
    model = model_of(system, depth=2, dim=96, n_heads=heads, image_size=pixels)
    x, t, y = torch.zeros(1, 4, pixels // 8, pixels // 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(x, t, y)
    honest = cost.count_macs(model)["honest"]
    sums = honest.get("normalizer", 0) * {"edit": 1 / 5, "lit": 1 / 2}.get(system, 0)
    assert sum(honest.values()) - sums == pytest.approx(counter.get_total_flops() / 2, rel=1e-9)


# ---- whole models ----

@pytest.mark.parametrize("system", NEIGHBOURS)
def test_whole_models_train(system):
    """Every gradient is finite once the gates that start at zero have opened, and a few steps help."""
    model = dydilit.build_model("DyDi-LiT-XS/4", parts=NEIGHBOURS[system], n_heads=6)
    x, y, diffusion = torch.rand(4, 3, 32, 32) * 2 - 1, torch.randint(10, (4,)), GaussianDiffusion()
    t, noise = torch.randint(1000, (4,)), torch.randn(4, 3, 32, 32)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for step in range(3):
        losses.append(diffusion.losses(model, x, y, t, noise)["loss"].mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert all(loss.isfinite() for loss in losses) and losses[-1] < losses[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert diffusion.losses(model, x, y, t, noise)["loss"].isfinite().all()
