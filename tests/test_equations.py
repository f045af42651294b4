"""Every equation of dydilit.py against slow loops in float64, written from the paper."""
import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dydilit
from dydilit import ModelConfig
from lab.eq8 import Divided

N, D = 7, 5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tensors(count, *shape):
    return [torch.randn(*(shape or (N, D)), dtype=torch.float64) for _ in range(count)]


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b))


def softmax_attention_loop(q, k, v):
    out = torch.zeros(len(q), v.shape[1], dtype=torch.float64)
    for i in range(len(q)):
        similarity = [math.exp(dot(q[i], k[j]) / math.sqrt(q.shape[1])) for j in range(len(k))]
        for j in range(len(k)):
            out[i] += similarity[j] / sum(similarity) * v[j]
    return out


def product_loop(q, k, v, weights=None):
    """sum_j (q_i . k_j) v_j, one scalar at a time."""
    out = torch.zeros(len(q), v.shape[1], dtype=torch.float64)
    for i, j in itertools.product(range(len(q)), range(len(k))):
        out[i] += dot(q[i], k[j]) * v[j]
    return out


def linear_attention_loop(q, k, v):
    mass = [sum(dot(q[i], k[m]) for m in range(len(k))) for i in range(len(q))]
    return product_loop(q, k, v) / torch.tensor(mass, dtype=torch.float64)[:, None]


def focused_loop(z, gamma):
    out = torch.zeros_like(z)
    for i in range(len(z)):
        relu = [max(float(x), 0.0) for x in z[i]]
        g = float(gamma[i]) if torch.is_tensor(gamma) else gamma
        power = [x ** g if x > 0 else 0.0 for x in relu]
        norm, power_norm = math.sqrt(sum(x * x for x in relu)), math.sqrt(sum(x * x for x in power))
        for c in range(len(relu)):
            out[i, c] = power[c] / power_norm * norm if power_norm > 0 else 0.0
    return out


def argmax_loop(scores):
    best = 0
    for c in range(len(scores)):
        if scores[c] > scores[best]:
            best = c
    return best


def route_loop(x, router):
    """Eq. 1 for every token of (N, d): the column of R with the largest product."""
    r = router.weight.detach().double().T
    return [argmax_loop([dot(x[i], r[:, u]) for u in range(r.shape[1])]) for i in range(len(x))]


# ---- Eq. 3-4 ----

def test_softmax_attention_is_eq_3():
    q, k, v = tensors(3)
    torch.testing.assert_close(dydilit.softmax_attention(q, k, v), softmax_attention_loop(q, k, v))


@pytest.mark.parametrize("n, d", [(3, 8), (8, 8), (20, 4)])
def test_linear_attention_is_eq_4_on_either_side_of_n_equal_d(n, d):
    q, k, v = tensors(3, n, d)
    q, k = q.abs(), k.abs()
    torch.testing.assert_close(dydilit.linear_attention(q, k, v), linear_attention_loop(q, k, v), rtol=1e-9, atol=1e-9)


def test_both_associations_agree():
    q, k, v = tensors(3, 2, 3, 33, 16)
    left, right = (q @ k.mT) @ v, q @ (k.mT @ v)
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(dydilit.attention_product(q, k, v), left)


def test_operations_grow_as_n_squared_below_d_and_as_n_above():
    def operations(n, d=32):
        with FlopCounterMode(display=False) as counter:
            dydilit.attention_product(*(torch.zeros(n, d) for _ in range(3)))
        return counter.get_total_flops() / 2
    assert operations(8) == 2 * 8 * 8 * 32
    assert operations(32) == 2 * 32 ** 3
    for n in (64, 128, 4096):
        assert operations(n) == 2 * n * 32 * 32


def test_a_token_that_attends_to_nothing_gets_zero_and_finite_gradients():
    q, k, v = (t.requires_grad_() for t in tensors(3))
    out = dydilit.linear_attention(q * 0, k.relu(), v)
    out.sum().backward()
    assert (out == 0).all() and all(t.grad.isfinite().all() for t in (q, k, v))


# ---- Eq. 1-2 ----

def test_router_is_exactly_top_1():
    router = dydilit.Router(D, 4)
    x = torch.randn(N, D)
    index = route_loop(x, router)
    for i, row in enumerate(router(x)):
        assert row.tolist() == [float(c == index[i]) for c in range(4)]
    torch.testing.assert_close(router(x[:, :3], x[:, 3:]), router(x))      # parts stand for their concatenation


def test_router_gradient_is_straight_through_softmax():
    router = dydilit.Router(D, 4).double()
    x, upstream = tensors(2, N, D)[0].requires_grad_(), torch.randn(N, 4, dtype=torch.float64)
    router(x).backward(upstream)
    expected = torch.zeros(4, D, dtype=torch.float64)
    for i in range(N):
        scores = [dot(x[i].detach(), w) for w in router.weight.detach()]
        p = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
        for a, b in itertools.product(range(4), range(4)):      # softmax Jacobian p_a (delta_ab - p_b)
            expected[b] += float(upstream[i, a]) * p[a] * ((a == b) - p[b]) * x[i].detach()
    torch.testing.assert_close(router.weight.grad, expected)


@pytest.mark.parametrize("dtype, d", [(torch.float32, 8), (torch.float64, 8), (torch.float32, 5)])
@pytest.mark.parametrize("index", [[2, 0, 2, 1, 0, 2, 2], [1] * 7, [2] * 7], ids=["all", "one", "last"])
def test_routed_linear_uses_each_tokens_own_projector(dtype, d, index):
    x, weight = torch.randn(7, d, dtype=dtype, requires_grad=True), torch.randn(3, d, d, dtype=dtype, requires_grad=True)
    y = dydilit.routed_linear(x, weight, torch.tensor(index))
    expected = torch.stack([x[i] @ weight[u] for i, u in enumerate(index)])
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    for got, want in zip(torch.autograd.grad(y, (x, weight), upstream), torch.autograd.grad(expected, (x, weight), upstream)):
        torch.testing.assert_close(got, want)


def test_routed_linear_costs_one_projector_per_token_and_no_matrix_per_token():
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.largest = max(self.largest, out.numel())
            return out
    x, index = torch.randn(64, 16), torch.randint(0, 5, (64,))
    with FlopCounterMode(display=False) as counter:
        dydilit.routed_linear(x, torch.randn(5, 16, 16), index)
    assert counter.get_total_flops() / 2 == 64 * 16 * 16
    with Watch() as watch:
        dydilit.routed_linear(x, torch.randn(5, 16, 16), index)
    assert watch.largest <= max(64 * 16, 5 * 16 * 16)


def test_dynamic_projection_is_eq_2():
    projection = dydilit.DynamicProjection(8, 3)
    x = torch.randn(2, N, 8)
    q_red, k_red = projection(x)
    for b in range(2):
        for out, router, weight in [(q_red, projection.router_q, projection.weight_q),
                                    (k_red, projection.router_k, projection.weight_k)]:
            for i, u in enumerate(route_loop(x[b], router)):
                torch.testing.assert_close(out[b, i], x[b, i] @ weight[u])


def test_dynamic_projection_router_learns_from_the_chosen_projector():
    """dL/d gate_i = <dL/dy_i, y_i> for the chosen entry, through the softmax Jacobian."""
    projection = dydilit.DynamicProjection(8, 3).double()
    x, upstream = tensors(2, 1, N, 8)
    projection(x)[0].backward(upstream)
    expected = torch.zeros(3, 8, dtype=torch.float64)
    router, weight = projection.router_q.weight.detach(), projection.weight_q.detach()
    for i, u in enumerate(route_loop(x[0], projection.router_q)):
        p = (router @ x[0, i]).softmax(0)
        gate = dot(upstream[0, i], x[0, i] @ weight[u])
        for b in range(3):
            expected[b] += gate * p[u] * (float(u == b) - p[b]) * x[0, i]
    torch.testing.assert_close(projection.router_q.weight.grad, expected)


# ---- Eq. 5-6 ----

GAMMAS = [0.2, 0.5, 0.9, 1.0, 1.45, 3.0, 5.0]


def printed_eq_5(z, gamma):
    """The formula as printed, entry by entry, in operations that autograd differentiates. z: (N, d); gamma: (N, 1)."""
    rows = []
    for token, g in zip(z, gamma[:, 0]):
        entries = [x if x > 0 else x * 0 for x in token]                # ReLU
        powers = [x ** g if x > 0 else x for x in entries]
        norm = sum(x * x for x in entries if x > 0) ** 0.5
        power_norm = sum(x * x for x in powers if x > 0) ** 0.5
        rows.append(torch.stack([x / power_norm * norm if x > 0 else x for x in powers]))
    return torch.stack(rows)


def test_printed_eq_5_is_the_loop():
    z, gamma = tensors(1)[0], torch.full((N, 1), 2.5, dtype=torch.float64)
    torch.testing.assert_close(printed_eq_5(z, gamma), focused_loop(z, gamma))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_focused_kernel_and_its_gradients_are_those_of_eq_5(gamma):
    for dtype, close in [(torch.float64, dict(rtol=1e-9, atol=1e-12)), (torch.float32, dict(rtol=2e-4, atol=1e-5))]:
        z = torch.randn(N, D, dtype=torch.float64)
        z[0, :2], z[1] = torch.tensor([-1.0, 0.0]), -z[1].abs()         # an exact zero, and a token without a positive entry
        gammas, upstream = torch.full((N, 1), gamma, dtype=torch.float64), torch.randn(N, D, dtype=torch.float64)
        results = []
        for function, kind in [(printed_eq_5, torch.float64), (dydilit.focused_kernel, dtype)]:
            leaves = [t.to(kind).requires_grad_() for t in (z, gammas)]
            out = function(*leaves)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream.to(kind))])
        for want, got in zip(*results):
            torch.testing.assert_close(got.double(), want, **close)
        assert (results[1][1][z <= 0] == 0).all() and (results[1][0][z <= 0] == 0).all()


def test_focused_kernel_takes_a_power_per_token():
    z, gamma = tensors(1)[0], torch.rand(N, 1, dtype=torch.float64) * 5 + 0.2
    torch.testing.assert_close(dydilit.focused_kernel(z, gamma), focused_loop(z, gamma))
    assert torch.autograd.gradcheck(dydilit.focused_kernel, (z.requires_grad_(), gamma.requires_grad_()))


@pytest.mark.parametrize("scale", [1e30, 1e4, 1, 1e-4, 1e-30])
def test_focused_kernel_is_finite_and_norm_preserving_at_any_scale(scale):
    z = torch.randn(len(GAMMAS), 64).clamp(-1, 1) * scale
    z[:, 0], z[:, 1] = 1e-30, 0
    z, gamma = z.requires_grad_(), torch.tensor(GAMMAS).unsqueeze(1).requires_grad_()
    out = dydilit.focused_kernel(z, gamma)
    out.backward(torch.randn_like(out))
    assert out.isfinite().all() and z.grad.isfinite().all() and gamma.grad.isfinite().all()
    assert (z.grad[z <= 0] == 0).all()
    torch.testing.assert_close(out.double().norm(dim=1), z.double().relu().norm(dim=1), rtol=1e-5, atol=0)


def test_gamma_and_lambda_keep_their_digits_under_autocast():
    """3.005 is 3.0 in bfloat16, and a factor that is rounded cannot be learned in small steps."""
    z = torch.rand(1, N, 8)
    kernel, differential = dydilit.DynamicMeasureKernel(8, 2, 1), dydilit.TokenDifferential(8, 2)
    torch.nn.init.constant_(kernel.gammas, 3.005)
    torch.nn.init.constant_(differential.lambdas, 0.01003)
    with torch.autocast("cpu", torch.bfloat16):
        out, = kernel(z)
        difference = differential(z, z, z, z, z)
    torch.testing.assert_close(out, dydilit.focused_kernel(z, 3.005), rtol=1e-6, atol=1e-7)
    want = dydilit.token_differential(z, z, z, z, z, 0.01003, 0.01003) / N
    torch.testing.assert_close(difference, want, rtol=1e-6, atol=1e-7)


def test_focused_kernel_keeps_zero_tokens_zero():
    z = torch.tensor([[0.0, 0, 0], [-1, -2, 0], [1, 2, 3]], requires_grad=True)
    out = dydilit.focused_kernel(z, 3.0)
    out.sum().backward()
    assert (out[:2] == 0).all() and (out[2] > 0).all() and (z.grad[:2] == 0).all()


def test_dynamic_measure_kernel_is_eq_6():
    kernel = dydilit.DynamicMeasureKernel(D, 4, 3)
    with torch.no_grad():
        kernel.gammas.copy_(torch.tensor([0.7, 1.5, 3.0, 6.0]))
    sets = [torch.randn(1, N, D) for _ in range(3)]
    for z, router, out in zip(sets, kernel.routers, kernel(*sets)):
        gamma = torch.stack([kernel.gammas[f].detach() for f in route_loop(z[0], router)]).unsqueeze(1)
        torch.testing.assert_close(out[0].double(), focused_loop(z[0].double(), gamma), rtol=1e-5, atol=1e-6)


def test_dynamic_measure_kernel_starts_at_gamma_3():
    assert dydilit.DynamicMeasureKernel(D, 4, 2).gammas.tolist() == [3.0] * 4


# ---- Eq. 7-8, 10-11 ----

def test_token_differential_is_eq_8():
    q, q_red, k, k_red, v = tensors(5)
    lambda_q, lambda_k = tensors(2, N, 1)
    dq = torch.stack([q[i] - lambda_q[i] * q_red[i] for i in range(N)])
    dk = torch.stack([k[i] - lambda_k[i] * k_red[i] for i in range(N)])
    got = dydilit.token_differential(q, q_red, k, k_red, v, lambda_q, lambda_k)
    torch.testing.assert_close(got, product_loop(dq, dk, v))


def test_map_differential_is_the_first_two_terms_of_eq_10():
    q, q_red, k, k_red, v = tensors(5)
    lambda_map, = tensors(1, N, 1)
    want = product_loop(q, k, v) - lambda_map * product_loop(q_red, k_red, v)
    torch.testing.assert_close(dydilit.map_differential(q, q_red, k, k_red, v, lambda_map), want)


def test_eq_11_expands_eq_8():
    q, q_red, k, k_red, v = tensors(5)
    lambda_q, lambda_k = tensors(2, N, 1)
    maps = (q @ k.T - q @ (lambda_k * k_red).T - lambda_q * (q_red @ k.T) + lambda_q * (q_red @ (lambda_k * k_red).T))
    torch.testing.assert_close(maps @ v, dydilit.token_differential(q, q_red, k, k_red, v, lambda_q, lambda_k))


@pytest.mark.parametrize("paradigm, denominator", [("token", "library"), ("map", "library"),
                                                   *(("token", name) for name in Divided.DENOMINATORS)])
@pytest.mark.parametrize("heads", [1, 2])
def test_token_differential_module_is_eq_7_and_8(paradigm, denominator, heads):
    module = dydilit.TokenDifferential(4, 3, paradigm=paradigm).double()
    if denominator != "library":
        Divided.of(module, denominator)
    with torch.no_grad():
        module.lambdas.copy_(torch.tensor([0.1, -0.4, 0.9]))
    module.requires_grad_(False)
    q, k, q_red, k_red, v = (t.abs() for t in tensors(5, 1, N, 4))
    lambda_q = [float(module.lambdas[c]) for c in route_loop(torch.cat([q, q_red], -1)[0], module.router_q)]
    want = torch.zeros(N, 4, dtype=torch.float64)
    for h in range(heads):
        part = slice(h * 4 // heads, (h + 1) * 4 // heads)
        a, ar, b, br, w = (t[0, :, part] for t in (q, q_red, k, k_red, v))
        factor = torch.tensor(lambda_q, dtype=torch.float64)[:, None]
        if paradigm == "token":
            lambda_k = [float(module.lambdas[c]) for c in route_loop(torch.cat([k, k_red], -1)[0], module.router_k)]
            dq, dk = a - factor * ar, b - torch.tensor(lambda_k, dtype=torch.float64)[:, None] * br
            out, used = product_loop(dq, dk, w), [sum(dot(dq[i], dk[j]) for j in range(N)) for i in range(N)]
            total = [sum(dot(a[i] + abs(lambda_q[i]) * ar[i], b[j] + abs(lambda_k[j]) * br[j]) for j in range(N))
                     for i in range(N)]
            mass = [max(sum(dot(a[i], b[j]) for j in range(N)), total[i] / 10) for i in range(N)]
            mass = torch.tensor(mass, dtype=torch.float64)[:, None]
            rms = torch.stack([(row ** 2).mean().sqrt() for row in out])[:, None]
        else:
            out = product_loop(a, b, w) - factor * product_loop(ar, br, w)
        denominators = {"library": N}
        if paradigm == "token":
            denominators |= {"none": 1, "length": N, "scaled": N * (4 / heads) ** 0.5, "rms": rms, "mass": mass}
            denominators["differenced"] = torch.tensor(used, dtype=torch.float64)[:, None]
        want[:, part] = out / denominators[denominator]
    torch.testing.assert_close(module(q, q_red, k, k_red, v, heads)[0], want)


def test_no_output_divided_by_the_mass_exceeds_ten_times_the_values():
    """Where the queries' own mass vanishes, as it may in a narrow head, and their redundancy's does not."""
    module = Divided.of(dydilit.TokenDifferential(8, 3, lambda_init=0.5), "mass")
    q, k, q_red, k_red = (torch.rand(1, N, 8, requires_grad=True) for _ in range(4))
    v = torch.randn(1, N, 8)
    for tiny in (0, 1e-30, 1e-6, 1):
        out = module(q * tiny, q_red, k, k_red, v)
        assert (out.abs() <= 10 * v.abs().amax(1, keepdim=True)).all()
        assert all(g.abs().max() < 1e3 for g in torch.autograd.grad(out.sum(), (k, q_red, k_red)))


# ---- Eq. 9 ----

def convolution_loop(x, kernel):
    """Depth-wise, zero-padded; x: (S, S, C), kernel: (C, h, w)."""
    s, height, width = x.shape[0], kernel.shape[1], kernel.shape[2]
    out = torch.zeros_like(x)
    for r, c, i, j in itertools.product(range(s), range(s), range(height), range(width)):
        rr, cc = r + i - height // 2, c + j - width // 2
        if 0 <= rr < s and 0 <= cc < s:
            out[r, c] += kernel[:, i, j] * x[rr, cc]
    return out


def test_dwc_is_the_sum_of_three_branches_before_and_after_fusing():
    dwc = dydilit.ReparamDWConv(D).double()
    v = torch.randn(2, 16, D, dtype=torch.float64)
    branches = [w.detach()[:, 0] for w in (dwc.weight_3x3, dwc.weight_1x3, dwc.weight_3x1)]
    assert [tuple(b.shape[1:]) for b in branches] == [(3, 3), (1, 3), (3, 1)]
    want = torch.stack([sum(convolution_loop(x.view(4, 4, D), b) for b in branches).view(16, D) for x in v])
    torch.testing.assert_close(dwc(v), want)
    dwc.fuse()
    assert [tuple(p.shape) for p in dwc.parameters()] == [(D, 1, 3, 3)]
    torch.testing.assert_close(dwc(v), want)
    dwc.fuse()
    torch.testing.assert_close(dwc(v), want)


def test_dwc_branches_all_learn():
    dwc = dydilit.ReparamDWConv(D)
    dwc(torch.randn(2, 16, D)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in dwc.parameters()) and len(list(dwc.parameters())) == 3


def test_dwc_refuses_tokens_off_the_grid():
    with pytest.raises(ValueError, match="15 tokens do not form a square"):
        dydilit.ReparamDWConv(D)(torch.randn(1, 15, D))


def test_dydila_is_its_parts_put_together():
    module = dydilit.DyDiLA(ModelConfig(dim=16, n_projectors=2, n_gammas=3, n_lambdas=4)).double()
    x = torch.randn(2, 16, 16, dtype=torch.float64)
    q, k, v = (x @ w.T for w in module.qkv.weight.split(16))
    q_red, k_red = module.projection(x)
    q, q_red, k, k_red = module.kernel(q, q_red, k, k_red)
    out = module.differential(q, q_red, k, k_red, v) + module.dwc(v)
    torch.testing.assert_close(module(x), out @ module.proj.weight.T + module.proj.bias)


# ---- precision ----

def attention(n_heads=1, denominator=None, **fields):
    cfg = ModelConfig(dim=32, n_heads=n_heads, n_projectors=2, n_gammas=3, n_lambdas=3, **fields)
    module, _ = dydilit.block_parts(cfg, 0)
    if denominator:
        Divided.of(module.differential, denominator)
    return module


VARIANTS = [dict(), *(dict(denominator=name) for name in ("mass", "length", "rms")), dict(differential="map"), dict(n_heads=4),
            dict(differential="none", dwc=False), dict(kernel="relu", differential="none", dynamic_projection=False, dwc=False)]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("n", [16, 256, 16_384])
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_outputs_and_gradients_are_finite_for_any_tokens(fields, n, precision):
    module, noise = attention(**fields), torch.randn(1, n, 32)
    one_large = torch.zeros(1, n, 32)
    one_large[0, n // 2] = 1e4
    kinds = [noise * 1e4, one_large]                        # of 16,384 tokens these two, the slowest, do
    if n < 16_384:
        kinds += [noise * 1e-4, noise, one_large * 0, one_large * 0 + 1, noise[:, :1].repeat(1, n, 1)]
    for x in kinds:
        x = x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            out = module(x)
        out.float().square().mean().backward()
        assert out.isfinite().all() and x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in module.parameters())
        module.zero_grad()


@pytest.mark.parametrize("function", ["focused_kernel", "linear_attention", "attention_product", "token_differential"])
def test_sums_and_powers_run_in_float32_under_autocast(function):
    """65,536 ones: a bfloat16 sum of them would stall at 256."""
    ones = torch.ones(65_536, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        if function == "focused_kernel":
            out = dydilit.focused_kernel(torch.full((1, 4), 1.0078125, dtype=torch.bfloat16), 3.0)
            assert out.dtype == torch.float32
            torch.testing.assert_close(out, torch.full((1, 4), 1.0078125))
        elif function == "token_differential":
            out = dydilit.token_differential(ones, ones, ones, ones, ones, 0.5, 0.0)
            assert (out == 65_536).all() and out.dtype == torch.float32
        else:
            out = getattr(dydilit, function)(ones, ones, ones)
            assert (out == (1 if function == "linear_attention" else 2 * 65_536)).all() and out.dtype == torch.float32
