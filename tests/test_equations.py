"""Every equation of dydilit.py and its gradients against slow float64 loops from the paper."""
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dydilit
from dydilit import LADDER, ModelConfig
from lab.eq8 import Divided

N, D = 9, 8                             # tokens, of a 3x3 grid, and their width
GAMMA = 2.5                             # of the second rung of Table 4, which has no bank
FINE = dict(rtol=1e-9, atol=1e-12)


def tensors(count, *shape):
    return [torch.randn(*(shape or (N, D)), dtype=torch.float64) for _ in range(count)]


def agree(library, loop, *inputs, parameters=(), dtype=torch.float64, close=FINE):
    """The library's values, and its gradients of all inputs and parameters, are the loop's."""
    results = []
    for function, kind in [(library, dtype), (loop, torch.float64)]:
        leaves = [t.detach().to(kind).requires_grad_() for t in inputs]
        out = function(*leaves)
        if not results:
            upstream = torch.randn(out.shape, dtype=torch.float64)
        leaves += parameters
        results.append([out, *torch.autograd.grad(out, leaves, upstream.to(kind))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want.double(), **close)


# ---- Eq. 3-4 ----

def average(similarities, v):
    """sum_j Sim_ij V_j / sum_m Sim_im for every row i of similarities, and 0 if all of them are."""
    return torch.stack([sum(s * v_j for s, v_j in zip(row, v)) / (sum(row) if any(row) else 1)
                        for row in similarities])


def eq_3(q, k, v):
    return average([[(q_i @ k_j / math.sqrt(q.shape[1])).exp() for k_j in k] for q_i in q], v)


def eq_4(q, k, v):
    return average([[q_i @ k_j for k_j in k] for q_i in q], v)


def test_softmax_attention_is_eq_3():
    agree(dydilit.softmax_attention, eq_3, *tensors(3))


@pytest.mark.parametrize("n, d, size", [(3, 8, 1), (8, 8, 1), (20, 4, 1), (20, 4, 1e-4)])
def test_linear_attention_is_eq_4_on_either_side_of_n_equal_d(n, d, size):
    q, k, v = tensors(3, n, d)
    agree(dydilit.linear_attention, eq_4, size * q.abs(), size * k.abs(), v)


def operations(function, *shapes, **fields):
    with FlopCounterMode(display=False) as counter:
        function(*(torch.zeros(shape, requires_grad=True) for shape in shapes), **fields)
    return counter.get_total_flops() / 2


def test_operations_grow_as_n_squared_below_d_and_as_n_above():
    found = [operations(dydilit.attention_product, *[(n, 32)] * 3) for n in (8, 32, 64, 4096)]
    assert found == [2 * 8 * 8 * 32, *(2 * n * 32 * 32 for n in (32, 64, 4096))]


# ---- Eq. 1-2 ----

def eq_1(x, r):
    """For every token its choice u, and a gate for each of the n: 1 for u, 0 for the others.

    r: (n, d). The gates carry the straight-through estimator's gradient, that of the softmax."""
    choices = []
    for x_i in x:
        scores = torch.stack([x_i @ r_u for r_u in r])
        u = max(range(len(r)), key=lambda c: scores[c].item())
        p = scores.exp() / scores.exp().sum()
        choices.append((u, torch.tensor([float(c == u) for c in range(len(r))]) + p - p.detach()))
    return choices


def eq_2(x, router, projectors):
    return torch.stack([gates[u] * (x_i @ projectors[u])
                        for x_i, (u, gates) in zip(x, eq_1(x, router.weight))])


def test_router_sees_float32_digits_under_autocast_and_in_half_precision():
    """In bfloat16 several of these 2,000 choices would be others."""
    router, x = dydilit.Router(64, 9), torch.randn(2000, 64)
    for tokens in (x, x.bfloat16()):
        want = (tokens.double() @ router.weight.double().T).argmax(1)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(router(tokens).argmax(1), want)
            assert torch.equal(router(tokens[:, :32], tokens[:, 32:]).argmax(1), want)
            assert dydilit.DynamicProjection(64, 3)(x[None])[0].dtype == torch.bfloat16     # gated


def test_routed_linear_costs_one_projector_per_token_and_keeps_no_matrix_per_token():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        assert operations(dydilit.routed_linear, (64, 16), (5, 16, 16),
                          index=torch.randint(5, (64,))) == 64 * 16 * 16
    assert max(kept) <= 5 * 16 * 16


# ---- Eq. 5-6 ----

def eq_5(z, gamma):
    """The formula as printed. An entry that ReLU stops is 0 with no gradient. gamma: (N, 1)."""
    rows = []
    for z_i, g in zip(z, gamma[:, 0]):
        norm = sum(x ** 2 for x in z_i if x > 0) ** 0.5
        power_norm = sum((x ** g) ** 2 for x in z_i if x > 0) ** 0.5
        rows.append(torch.stack([x ** g / power_norm * norm if x > 0 else 0 * x for x in z_i]))
    return torch.stack(rows)


def eq_6(z, router, gammas):
    return eq_5(z, torch.stack([gates @ gammas for _, gates in eq_1(z, router.weight)])[:, None])


@pytest.mark.parametrize("scale", [1e30, 1, 1e-30])
@pytest.mark.parametrize("dtype, close", [
    (torch.float64, FINE), (torch.float32, dict(rtol=2e-4, atol=1e-5))])
def test_focused_kernel_is_eq_5_at_any_scale(dtype, close, scale):
    """Eq. 5 scales with its token, and unlike the loop, the library must not overflow."""
    z, = tensors(1, 16, D)
    z[:, 0], z[8:] = 0, z[8:] - 9                   # an exact zero, and none that is positive
    gammas = torch.tensor([0.2, 0.5, 0.9, 1.0, 1.45, 3.0, 5.0, 20.0] * 2)[:, None]
    agree(lambda *args: dydilit.focused_kernel(scale * args[0], args[1]) / scale, eq_5, z, gammas,
          dtype=dtype, close=close)


# ---- Eq. 7-8, 10 ----

def eq_7(z, z_red, router, lambdas):
    gates = [gates for _, gates in eq_1(torch.cat([z, z_red], dim=1), router.weight)]
    return torch.stack([g @ lambdas for g in gates])[:, None]


def eq_8(q, q_red, k, k_red, v, lambda_q, lambda_k):
    differences = [k_j - l_j * r_j for k_j, l_j, r_j in zip(k, lambda_k, k_red)]
    return torch.stack([sum(((q_i - l_i * r_i) @ d_j) * v_j for d_j, v_j in zip(differences, v))
                        for q_i, l_i, r_i in zip(q, lambda_q, q_red)])


def eq_10(q, q_red, k, k_red, v, lambda_map):
    return torch.stack([sum((q_i @ k_j) * v_j - l_i * (r_i @ s_j) * v_j
                            for k_j, s_j, v_j in zip(k, k_red, v))
                        for q_i, l_i, r_i in zip(q, lambda_map, q_red)])


def divided(form, *sets_and_factors):
    """Eq. 8 or Eq. 10 over N, as in the library, or Eq. 8 over what a form of lab.eq8 names."""
    if form == "map":
        return eq_10(*sets_and_factors) / N
    *sets, v, lambda_q, lambda_k = sets_and_factors
    out, ones = eq_8(*sets, v, lambda_q, lambda_k), torch.ones_like(v[:, :1])
    mass = eq_8(*sets, ones, 0 * lambda_q, 0 * lambda_k)        # values of 1 make products sums
    floor = eq_8(*sets, ones, -lambda_q.abs(), -lambda_k.abs()).detach() / 10
    return out / dict(none=1, scaled=N * v.shape[1] ** 0.5, mass=torch.maximum(mass, floor),
                      rms=out.square().mean(1)[:, None].sqrt()).get(form, N)


# ---- Eq. 9, and the modules ----

def convolution(v, kernel):
    """Depth-wise and zero-padded. v: (N, d), a square grid row by row; kernel: (d, 1, h, w)."""
    side, (height, width) = math.isqrt(len(v)), kernel.shape[2:]
    grid = {(n // side, n % side): v_n for n, v_n in enumerate(v)}
    taps = [(i, j, i - height // 2, j - width // 2) for i in range(height) for j in range(width)]
    return torch.stack([sum(kernel[:, 0, i, j] * grid[row + down, column + right]
                            for i, j, down, right in taps if (row + down, column + right) in grid)
                        for row, column in grid])


def by_head(function, n_heads, *tokens):
    """function of each head's share of the columns, the results side by side."""
    shares = [t.split(t.shape[1] // n_heads, dim=1) for t in tokens]
    return torch.cat([function(*head) for head in zip(*shares)], dim=1)


def attention_loop(attn, rung, form, n_heads, x):
    """The attention of a rung of Table 4, for one image (N, D). 1 is Sana, and 6 is DyDiLA."""
    *sets, v = [x @ w.T for w in attn.qkv.weight.split(D)]
    if rung >= 4:
        bank = attn.projection
        sets += [eq_2(x, bank.router_q, bank.weight_q), eq_2(x, bank.router_k, bank.weight_k)]
    sets = sets[::2] + sets[1::2]                       # Q, Q', K, K', or Q and K alone
    if rung == 1:
        sets = [z.relu() for z in sets]
    elif rung == 2:
        sets = [eq_5(z, torch.full((N, 1), GAMMA)) for z in sets]
    else:
        sets = [eq_6(z, r, attn.kernel.gammas) for z, r in zip(sets, attn.kernel.routers)]
    if rung <= 4:
        out = by_head(eq_4, n_heads, *sets, v)
    else:
        part = attn.differential
        factors = [eq_7(*sets[:2], part.router_q, part.lambdas)]
        if form != "map":
            factors.append(eq_7(*sets[2:], part.router_k, part.lambdas))
        out = by_head(lambda *head: divided(form, *head, *factors), n_heads, *sets, v)
    if rung == 6:
        branches = attn.dwc.weight_3x3, attn.dwc.weight_1x3, attn.dwc.weight_3x1
        out = out + sum(convolution(v, kernel) for kernel in branches)
    return out @ attn.proj.weight.T + attn.proj.bias


@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize("rung, fields, form", [
    *((rung, fields, "library") for rung, (_, fields) in enumerate(LADDER, 1)),
    *((6, {}, form) for form in Divided.DENOMINATORS), (6, dict(differential="map"), "map")])
def test_attention_modules_are_the_loops(rung, fields, form, n_heads):
    cfg = ModelConfig(dim=D, n_heads=n_heads, n_projectors=2, n_gammas=3, n_lambdas=3,
                      gamma_init=GAMMA, **fields)
    attn = dydilit.block_parts(cfg, 0)[0].double()
    if form in Divided.DENOMINATORS:
        Divided.of(attn.differential, form)
    torch.nn.init.normal_(attn.proj.bias)
    for name, p in attn.named_parameters():         # banks start equal, and their routers unused
        if name.endswith(("gammas", "lambdas")):
            p.data = torch.tensor([0.7, 2, 3] if "gammas" in name else [0.4, -0.3, 1.2]).double()
    agree(attn, lambda x: torch.stack([attention_loop(attn, rung, form, n_heads, image)
                                       for image in x]),
          *tensors(1, 2, N, D), parameters=list(attn.parameters()),
          close=dict(rtol=1e-7, atol=1e-10))


# ---- Precision ----

@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_sums_over_tokens_have_float32_digits_in_half_precision(half):
    """No half-precision number is 70,001, and float16 has none so large."""
    ones = torch.ones(70_001, 2, dtype=half)
    with torch.autocast("cpu", torch.bfloat16):
        assert dydilit.attention_mass(ones, ones)[0].tolist() == [2 * 70_001]
        for out, value in [(dydilit.linear_attention(ones, ones, ones), 1),
                           (dydilit.attention_product(ones, ones, ones), 2 * 70_001),
                           (dydilit.token_differential(*[ones] * 5, 0.5, 0), 70_001),
                           (dydilit.map_differential(*[ones] * 5, 0.5), 70_001)]:
            assert out.dtype == torch.float32 and (out == value).all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_powers_norms_and_factors_have_float32_digits_in_half_precision(half):
    """3.005 is 3.0 in bfloat16, and a factor that is rounded cannot be learned in small steps."""
    z = torch.rand(1, N, D).to(half)
    kernel, module = dydilit.DynamicMeasureKernel(D, 2, 1, 3.005), dydilit.TokenDifferential(D, 2)
    torch.nn.init.constant_(module.lambdas, 0.01003)
    want = eq_5(z[0].double(), torch.full((N, 1), 3.005))
    with torch.autocast("cpu", torch.bfloat16):
        out, difference = kernel(z)[0], module(*[z.float()] * 5)
    torch.testing.assert_close(out[0], want.float(), rtol=1e-5, atol=1e-6)
    want = eq_8(*[z[0].double()] * 5, *[torch.full((N, 1), 0.01003)] * 2) / N
    torch.testing.assert_close(difference[0], want.float(), rtol=1e-5, atol=1e-6)
