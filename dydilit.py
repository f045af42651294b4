"""DyDi-LiT: diffusion transformers with Dynamic Differential Linear Attention (DyDiLA), in one file.

Read it from top to bottom: it follows "Dynamic Differential Linear Attention: Enhancing Linear Diffusion Transformer
for High-Quality Image Generation" (Cao et al.), and "Eq. n" and "Table n" are that paper's numbers.

    attention         Eq. 3-4    softmax_attention, linear_attention
    routing           Eq. 1      Router
    projection        Eq. 1-2    grouped_mm, routed_linear, DynamicProjection
    measure kernel    Eq. 5-6    focused_kernel, DynamicMeasureKernel
    differential      Eq. 7-8,10 token_differential, map_differential, TokenDifferential
    convolution       Eq. 9      ReparamDWConv
    the module        Fig. 2(b)  DyDiLA
    the transformer   Fig. 2(a)  MixFFN, Block, DyDiLiT, MODELS, LADDER, build_model
    the diffusion     Sec. 4.1   GaussianDiffusion
    the cost          Table 1-2  count_macs; `python dydilit.py` prints the table of models

Shapes: B images, N tokens (an image's patches, row by row), d the model's width, h heads. An equation without weights is
a function, an equation with weights is a module that calls it. The transformer's shell (patches, embeddings, AdaLN-Zero,
softmax attention, final layer) has the parameter names and conventions of facebookresearch/DiT (Peebles & Xie 2023), so
DiT's checkpoints load into the DiT-* models; the Mix-FFN and the ReLU baseline follow Sana (Xie et al. 2025).
"""
import dataclasses
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm.auto import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Attention (Eq. 3-4)
# ---------------------------------------------------------------------------------------------------------------------

EPS = 1e-12  # a token without a positive entry attends to nothing: 0 / EPS instead of 0 / 0


def softmax_attention(q, k, v):
    """Eq. 3 with Sim(q, k) = exp(q k^T / sqrt(d)): every query averages the values by softmax weights, O(N^2 d).

    q, k, v: (..., N, d). Returns (..., N, d).
    """
    return F.scaled_dot_product_attention(q, k, v)


def _upcast(*tensors):
    """bfloat16 and float16 tensors in float32, the others as they are: sums over N tokens need the digits."""
    return [t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors]


def attention_product(q, k, v):
    """q k^T v by the cheaper of its two associations, at least in float32, also under autocast.

    (q k^T) v costs 2 N^2 d multiply-accumulates and q (k^T v) costs 2 N d^2: the right one is cheaper once N > d.

    q, k: (..., N, d); v: (..., N, e). Returns (..., N, e).
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = _upcast(q, k, v)
        if k.shape[-2] <= k.shape[-1]:
            return (q @ k.transpose(-2, -1)) @ v    # (..., N, N) in between
        return q @ (k.transpose(-2, -1) @ v)        # (..., d, e) in between


def attention_mass(q, k):
    """The denominator of Eq. 4: the sum of a query's similarities to all keys, floored at EPS.

    q, k: (..., N, d), kernelized. Returns (..., N, 1), at least float32.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = _upcast(q, k)
        return (q @ k.sum(dim=-2, keepdim=True).transpose(-2, -1)).clamp_min(EPS)


def linear_attention(q, k, v):
    """Eq. 4: attention whose similarity is a plain dot product of kernelized tokens, O(N) in the number of tokens.

    q, k: (..., N, d), non-negative (a kernel's output); v: (..., N, e). Returns (..., N, e), at least float32.
    """
    return attention_product(q, k, v) / attention_mass(q, k)


# ---------------------------------------------------------------------------------------------------------------------
# Routing (Eq. 1; the same choice serves Eq. 6 and Eq. 7)
# ---------------------------------------------------------------------------------------------------------------------

class Router(nn.Module):
    """Eq. 1: sends each token to the one of n choices with the largest score X_i R. weight (n, d) holds R^T.

    The forward pass is the exact top-1 choice. arg max has no gradient and the paper names no estimator; this one is
    the straight-through softmax (Bengio et al. 2013): backward treats the one-hot choice as softmax(X_i R). Scores are
    computed in float32 under autocast, so that near ties do not flip with the precision.
    """

    def __init__(self, dim, n):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, *parts):
        """parts: one (..., d) tensor, or several whose concatenation along d is meant (their products just add up).

        Returns index (...), the choice as int64, and choice (..., n), the same as a one-hot that carries gradients.
        """
        with torch.autocast(parts[0].device.type, enabled=False):
            weights = self.weight.split([part.shape[-1] for part in parts], dim=1)
            scores = sum(F.linear(x, w) for x, w in zip(_upcast(*parts), weights))  # (..., n)
            index = scores.argmax(dim=-1)
            one_hot = F.one_hot(index, scores.shape[-1]).to(scores.dtype)
            soft = scores.softmax(dim=-1)
            return index, one_hot + (soft - soft.detach())                  # the bracket is exactly zero


# ---------------------------------------------------------------------------------------------------------------------
# Dynamic projection module (Eq. 1-2)
# ---------------------------------------------------------------------------------------------------------------------

@torch.library.custom_op("dydilit::grouped_mm", mutates_args=())
def grouped_mm(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Products of groups of rows, in one call; group u ends before row ends[u], (n,) int32.

    With b (n, d, e), each group of a, (T, d), times its own matrix: returns (T, e). With b (T, e), each group of a,
    transposed, times the same rows of b: returns (n, d, e), the gradient of those matrices.
    """
    # What PyTorch documents of its grouped_mm: rows of whole 16-byte units; on CUDA bfloat16 from Ampere on; no
    # float64, no MPS. Elsewhere: slice by slice. An operator of our own: torch.compile traces theirs in bfloat16 only.
    documented = (a.dtype != torch.float64 if a.device.type == "cpu" else a.device.type == "cuda" and
                  a.dtype == torch.bfloat16 and torch.cuda.get_device_capability(a.device) >= (8, 0))
    if documented and a.shape[1] % 8 == b.shape[-1] % 8 == 0:
        return F.grouped_mm(a if b.dim() == 3 else a.mT, b, offs=ends)
    ends = ends[:-1].tolist()
    if b.dim() == 3:
        return torch.cat([part @ matrix for part, matrix in zip(a.tensor_split(ends), b)])
    return torch.stack([part.mT @ other for part, other in zip(a.tensor_split(ends), b.tensor_split(ends))])


@grouped_mm.register_fake
def _(a, b, ends):
    return a.new_empty((len(a), b.shape[2]) if b.dim() == 3 else (len(ends), a.shape[1], b.shape[1]))


def _grouped_mm_backward(ctx, grad):
    (a, b, ends), grad = ctx.saved_tensors, grad.contiguous()
    return grouped_mm(grad, b.mT, ends) if b.dim() == 3 else grouped_mm(b, grad.mT, ends), grouped_mm(a, grad, ends), None


grouped_mm.register_autograd(_grouped_mm_backward,
                             setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def routed_linear(x, weight, index):
    """Eq. 2: y_i = x_i W_{index_i}. Each token meets its own projector only: T d e multiply-accumulates for any n.

    Tokens are sorted by projector, so that every projector sees one contiguous group, and sorted back.

    x: (T, d); weight: (n, d, e); index: (T,) in 0..n-1. Returns (T, e), in autocast's dtype under autocast.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    order = index.argsort(stable=True)
    ends = torch.searchsorted(index[order], torch.arange(len(weight), device=index.device), right=True, out_int32=True)
    y = grouped_mm(x.to(dtype).index_select(0, order), weight.to(dtype), ends)
    return y.index_select(0, order.argsort())


class Gate(torch.autograd.Function):
    """y times a gate (..., 1) that is exactly 1: nothing to compute forward, and a gradient for the gate backward."""

    @staticmethod
    def forward(ctx, y, gate):
        ctx.save_for_backward(y)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        y, = ctx.saved_tensors
        return grad, (grad * y).sum(dim=-1, keepdim=True)


class DynamicProjection(nn.Module):
    """Eq. 1-2: two banks of n_projectors d x d projectors and a router for each; every token gets its own pair.

    On rung 5 of Table 4 and above the pair is the redundancy Q', K'; on rung 4 it is Q and K themselves.
    """

    def __init__(self, dim, n_projectors):
        super().__init__()
        self.router_q, self.router_k = Router(dim, n_projectors), Router(dim, n_projectors)
        self.weight_q = nn.Parameter(torch.empty(n_projectors, dim, dim))
        self.weight_k = nn.Parameter(torch.empty(n_projectors, dim, dim))
        for projector in [*self.weight_q, *self.weight_k]:
            nn.init.xavier_uniform_(projector)

    def forward(self, x):
        """x: (B, N, d). Returns the routed pair, (B, N, d) each."""
        pair = []
        for router, weight in [(self.router_q, self.weight_q), (self.router_k, self.weight_k)]:
            index, choice = router(x)
            y = routed_linear(x.flatten(0, 1), weight, index.flatten()).view(x.shape)
            # The one-hot's chosen entry gates the token and so brings the router its gradient. The other entries'
            # gradients would need the projectors that were not computed.
            pair.append(Gate.apply(y, choice.gather(-1, index.unsqueeze(-1)).to(y.dtype)))
        return pair


# ---------------------------------------------------------------------------------------------------------------------
# Dynamic measure kernel (Eq. 5-6)
# ---------------------------------------------------------------------------------------------------------------------

class FocusedKernel(torch.autograd.Function):
    """Eq. 5 with its derivative by hand: left to autograd, it would keep nine (N, d) tensors where this keeps none but
    its input and output.

    The kernel is homogeneous, f(z) = m f(z / m), so each token is first divided by its largest entry m: powers then lie
    in [0, 1] and the norm below the line is at least 1, whatever the input.
    """

    @staticmethod
    def forward(ctx, z, gamma):
        limits = torch.finfo(z.dtype)
        ctx.ceiling, ctx.floor = limits.max * 1e-6, limits.tiny ** 0.5  # floor: for logarithms; to the gamma, it is 0
        y = z.clamp(0, ctx.ceiling)                                     # ReLU; the ceiling keeps norms finite
        m = y.amax(dim=-1, keepdim=True).clamp_min(limits.tiny)
        y /= m                                                          # in [0, 1], largest entry 1
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        power = y.clamp_min_(ctx.floor).log2_().mul_(gamma).exp2_()     # y^gamma
        power_norm = torch.linalg.vector_norm(power, dim=-1, keepdim=True).clamp_min_(1)    # below 1 for zeros only
        out = power.mul_(m * (norm / power_norm))
        ctx.save_for_backward(z, gamma, out, m, norm)
        return out

    @staticmethod
    def backward(ctx, grad):
        z, gamma, out, m, norm = ctx.saved_tensors
        y = z.clamp(0, ctx.ceiling).div_(m)
        u = out / m                                                     # f(z) / m = norm y^gamma / power_norm
        grad_log = grad * u                                             # by log y^gamma, the norm below held fixed
        total = grad_log.sum(dim=-1, keepdim=True)
        u /= norm.clamp_min(ctx.floor)                                  # y^gamma / power_norm
        grad_log -= u.square_().mul_(total)                             # and the norm below not held
        y_safe = torch.clamp_min(y, ctx.floor, out=u)
        grad_z = y.mul_(total / norm.square().clamp_min(ctx.floor))     # by z through the norm above
        grad_z += (grad_log / y_safe).mul_(gamma)                       # and through the power; m has cancelled
        grad_gamma = (y_safe.log_() * grad_log).sum(dim=-1, keepdim=True) * m
        return grad_z, grad_gamma.sum_to_size(gamma.shape)


def focused_kernel(z, gamma):
    """Eq. 5: raises ReLU(z) to the power gamma and gives it back the norm it had; the direction sharpens, no more.

    Zero tokens stay zero.

    z: (..., d), any finite values; gamma: a float, or a tensor (..., 1) with one positive power per token.
    Returns (..., d), at least float32.
    """
    z, = _upcast(z)
    return FocusedKernel.apply(z, torch.as_tensor(gamma, dtype=z.dtype, device=z.device))


class DynamicMeasureKernel(nn.Module):
    """Eq. 6: a bank of learnable powers gamma; each token of each of Q, K, Q', K' picks one through that set's router.

    The bank is shared by the sets of a block; kernels act on whole d-wide tokens, before any split into heads.
    """

    def __init__(self, dim, n_gammas, n_sets, gamma_init=3.0):
        super().__init__()
        self.gammas = nn.Parameter(torch.full((n_gammas,), float(gamma_init)))
        self.routers = nn.ModuleList(Router(dim, n_gammas) for _ in range(n_sets))

    def forward(self, *sets):
        """sets: n_sets tensors (B, N, d). Returns a list of as many, non-negative and norm-preserving, float32."""
        out = []
        for router, z in zip(self.routers, sets, strict=True):
            _, choice = router(z)
            out.append(focused_kernel(z, (choice @ self.gammas).unsqueeze(-1)))
        return out


# ---------------------------------------------------------------------------------------------------------------------
# Token differential operator (Eq. 7-8) and the map-wise alternative (Eq. 10)
# ---------------------------------------------------------------------------------------------------------------------

def token_differential(q, q_red, k, k_red, v, lambda_q, lambda_k):
    """Eq. 8 as printed: (Q - lambda^Q Q') ((K - lambda^K K')^T V). Every token loses a share of its redundancy.

    q, q_red, k, k_red: (..., N, d), kernelized; v: (..., N, e); lambda_q, lambda_k: floats or (..., N, 1).
    Returns (..., N, e), at least float32.
    """
    return attention_product(q - lambda_q * q_red, k - lambda_k * k_red, v)


def map_differential(q, q_red, k, k_red, v, lambda_map):
    """Eq. 10 without its convolution: Q (K^T V) - lambda_map Q' (K'^T V), the difference of two attention maps.

    q, q_red, k, k_red: (..., N, d), kernelized; v: (..., N, e); lambda_map: a float or (..., N, 1).
    Returns (..., N, e), at least float32.
    """
    return attention_product(q, k, v) - lambda_map * attention_product(q_red, k_red, v)


class TokenDifferential(nn.Module):
    """Eq. 7-8: routes every query and key token to a factor lambda and attends with the differences.

    One bank of n_lambdas factors and two routers on concat(Q, Q') and concat(K, K'). paradigm="map" is Eq. 10 instead:
    its maps have one row per query, so the query router alone picks lambda_map.

    normalizer: Eq. 8 prints no denominator. "none" is Eq. 8 as printed; "length" divides by N; "rms" brings every
    output token to root mean square 1; "mass" divides by the undifferenced sum Q (sum_j K_j)^T as Eq. 4 does, or by a
    tenth of that sum with the redundancy added, if it is larger. (The sum over *differenced* tokens crosses zero and is
    not offered: notebook 04 shows it.)
    """

    def __init__(self, dim, n_lambdas, lambda_init=0.01, paradigm="token", normalizer="mass"):
        super().__init__()
        self.paradigm, self.normalizer = paradigm, normalizer
        self.lambdas = nn.Parameter(torch.full((n_lambdas,), float(lambda_init)))
        self.router_q = Router(2 * dim, n_lambdas)
        self.router_k = Router(2 * dim, n_lambdas) if paradigm == "token" else None

    def forward(self, q, k, q_red, k_red, v, n_heads=1):
        """q, k, q_red, k_red: (B, N, d), kernelized; v: (B, N, d). Returns (B, N, d), at least float32."""
        lambda_q = (self.router_q(q, q_red)[1] @ self.lambdas)[:, None, :, None]            # Eq. 7, (B, 1, N, 1)
        if self.paradigm == "token":
            lambda_k = (self.router_k(k, k_red)[1] @ self.lambdas)[:, None, :, None]
        q, k, q_red, k_red, v = (split_heads(t, n_heads) for t in (q, k, q_red, k_red, v))  # (B, h, N, d/h)
        if self.paradigm == "token":
            out = token_differential(q, q_red, k, k_red, v, lambda_q, lambda_k)
        else:
            out = map_differential(q, q_red, k, k_red, v, lambda_q)
        if self.normalizer == "mass":
            mass = attention_mass(q, k)
            # A query that is nearly zero while its redundancy is not would be divided by nearly nothing. So the mass
            # counts as a tenth, at least, of what it would be with that added: |out| is at most 10 max |v|.
            with torch.no_grad():
                if self.paradigm == "token":                # addcmul: q + |lambda_q| q_red, in one pass
                    total = attention_mass(torch.addcmul(q, lambda_q.abs(), q_red), torch.addcmul(k, lambda_k.abs(), k_red))
                else:
                    total = mass + lambda_q.abs() * attention_mass(q_red, k_red)
            out = out / torch.maximum(mass, total / 10)
        elif self.normalizer == "length":
            out = out / q.shape[-2]
        elif self.normalizer == "rms":
            out = F.rms_norm(out, out.shape[-1:], eps=EPS)
        return merge_heads(out)


def split_heads(x, n_heads):
    """(B, N, d) -> (B, h, N, d/h)."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def merge_heads(x):
    """(B, h, N, d/h) -> (B, N, d)."""
    return x.transpose(1, 2).flatten(2)


# ---------------------------------------------------------------------------------------------------------------------
# Re-parameterized depth-wise convolution (the second term of Eq. 9)
# ---------------------------------------------------------------------------------------------------------------------

def depthwise(x, weight, bias=None):
    """Depth-wise 3x3 convolution of tokens on their square grid, zero-padded. x: (B, N, C) -> (B, N, C)."""
    b, n, c = x.shape
    side = math.isqrt(n)
    if side * side != n:
        raise ValueError(f"depthwise: {n} tokens do not form a square grid")
    x = x.view(b, side, side, c).permute(0, 3, 1, 2)        # a channels-last image: the tokens' memory as it lies
    x = F.conv2d(x, weight, bias, padding=1, groups=c)
    return x.permute(0, 2, 3, 1).reshape(b, n, c)


class ReparamDWConv(nn.Module):
    """DWC(V) of Eq. 9: depth-wise 3x3, 1x3 and 3x1 branches that add up (ACNet, Ding et al. 2019), one 3x3 once fused.

    The branches have no normalization in between (batch statistics would mix noise levels), so convolving with the sum
    of their kernels gives the same outputs and gradients as summing three convolutions, at a third of the passes.
    No bias: the output projection that follows has one.
    """

    def __init__(self, dim):
        super().__init__()
        self.weight_3x3, self.weight_1x3, self.weight_3x1 = (
            nn.Parameter(nn.Conv2d(dim, dim, size, groups=dim).weight.detach()) for size in [(3, 3), (1, 3), (3, 1)])

    def kernel(self):
        """The single 3x3 kernel that equals the branches, (d, 1, 3, 3)."""
        if self.weight_1x3 is None:
            return self.weight_3x3
        return self.weight_3x3 + F.pad(self.weight_1x3, (0, 0, 1, 1)) + F.pad(self.weight_3x1, (1, 1, 0, 0))

    def fuse(self):
        """Replaces the branches by their one 3x3 kernel, in place, for inference."""
        self.weight_3x3 = nn.Parameter(self.kernel().detach())
        self.weight_1x3 = self.weight_3x1 = None

    def forward(self, v):
        """v: (B, N, d), N a square. Returns (B, N, d)."""
        return depthwise(v, self.kernel())


# ---------------------------------------------------------------------------------------------------------------------
# The configuration, and the DyDiLA module (Fig. 2(b))
# ---------------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class ModelConfig:
    """Everything that defines a model. The defaults are DyDi-LiT-S/2 on 256x256 ImageNet latents."""
    image_size: int = 256               # pixels of an image's side
    vae_factor: int = 8                 # pixels per latent entry: 8 for Stable Diffusion's VAE, 1 for pixel models
    in_channels: int = 4                # channels of what is denoised: 4 for latents, 3 for pixels
    n_classes: int = 1000
    label_dropout: float = 0.1          # share of training labels replaced by "no class", for guidance
    patch_size: int = 2
    dim: int = 384                      # d, width of a token
    depth: int = 9                      # L, number of blocks
    n_heads: int = 1                    # 1 for linear attention, as the paper's cost columns show
    attention: str = "linear"           # "softmax": DiT's attention and MLP; "linear": what follows, with Mix-FFN
    kernel: str = "dynamic"             # "relu": Sana; "focused": Eq. 5 with gamma_init for all; "dynamic": Eq. 6
    dynamic_projection: bool = True     # Eq. 1-2: for Q', K' if there is a differential, for Q, K themselves if not
    differential: str = "token"         # "none"; "token": Eq. 8; "map": Eq. 10
    normalizer: str = "mass"            # of the differential: see TokenDifferential
    dwc: bool = True                    # the convolution on V, Eq. 9
    n_projectors: int = 3               # n_P
    n_gammas: int = 9                   # n_F
    n_lambdas: int = 9                  # n_D
    gamma_init: float = 3.0
    lambda_init: tuple = (0.01, 0.01)   # first and last block, linear in between; (0.2, 0.8) for Table 6

    @property
    def input_size(self):
        """Side of the latent or image that the model denoises."""
        return self.image_size // self.vae_factor

    def __post_init__(self):
        def need(name, good, what):
            if not good:
                raise ValueError(f"ModelConfig: {name}={getattr(self, name)!r} is not {what}")
        choices = dict(attention=("softmax", "linear"), kernel=("relu", "focused", "dynamic"),
                       differential=("none", "token", "map"), normalizer=("none", "length", "rms", "mass"))
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is str:
                need(name, value in choices[name], f"one of {', '.join(choices[name])}")
            elif field.type is bool:
                need(name, type(value) is bool, "true or false")
            elif field.type is int:
                need(name, type(value) is int and 0 < value < 2 ** 31, "a positive integer")
        need("gamma_init", type(self.gamma_init) in (int, float) and 0 < self.gamma_init < 1e6, "a positive number")
        need("label_dropout", type(self.label_dropout) in (int, float) and 0 <= self.label_dropout <= 1, "in 0..1")
        need("lambda_init", type(self.lambda_init) in (list, tuple) and len(self.lambda_init) == 2
             and all(type(x) in (int, float) and abs(x) < 1e6 for x in self.lambda_init), "two numbers")
        if self.image_size % (self.vae_factor * self.patch_size):
            raise ValueError(f"ModelConfig: image_size {self.image_size} is not a multiple of vae_factor x patch_size "
                             f"= {self.vae_factor} x {self.patch_size}")
        if self.dim % 4 or self.dim % self.n_heads:
            raise ValueError(f"ModelConfig: dim {self.dim} must be a multiple of 4 (2-D sin-cos positions) and of "
                             f"n_heads {self.n_heads}")
        if self.differential != "none" and not self.dynamic_projection:
            raise ValueError(f"ModelConfig: differential={self.differential!r} needs dynamic_projection=True, which "
                             "predicts the redundancy that it subtracts")
        self.lambda_init = tuple(self.lambda_init)      # a list after a trip through JSON


class DyDiLA(nn.Module):
    """Eq. 9, O = TDO(.) + DWC(V), then the output projection. By configuration, every rung of Table 4 down to Sana's.

    lambda_init: the differential factors' start in this block; None takes the configuration's first.
    """

    def __init__(self, cfg, lambda_init=None):
        super().__init__()
        self.n_heads, self.dim, d = cfg.n_heads, cfg.dim, cfg.dim
        redundancy = cfg.differential != "none"
        shared = 3 if redundancy or not cfg.dynamic_projection else 1           # Q, K, V, or V alone on rung 4
        self.qkv = nn.Linear(d, shared * d, bias=False)                         # W_0; no bias, as in Sana
        self.projection = DynamicProjection(d, cfg.n_projectors) if cfg.dynamic_projection else None
        if cfg.kernel == "dynamic":
            self.kernel = DynamicMeasureKernel(d, cfg.n_gammas, 4 if redundancy else 2, cfg.gamma_init)
        elif cfg.kernel == "focused":
            self.kernel = lambda *sets: [focused_kernel(z, cfg.gamma_init) for z in sets]
        else:
            self.kernel = lambda *sets: [F.relu(z) for z in sets]
        self.differential = TokenDifferential(
            d, cfg.n_lambdas, cfg.lambda_init[0] if lambda_init is None else lambda_init, cfg.differential,
            cfg.normalizer) if redundancy else None
        self.dwc = ReparamDWConv(d) if cfg.dwc else None
        self.proj = nn.Linear(d, d)

    def forward(self, x):
        """x: (B, N, d). Returns (B, N, d)."""
        *sets, v = self.qkv(x).split(self.dim, dim=-1)      # Q, K, V
        if self.projection is not None:
            sets += self.projection(x)                      # Q, K, Q', K'
        sets = self.kernel(*sets)
        if self.differential is not None:
            out = self.differential(*sets, v, self.n_heads)
        else:
            out = merge_heads(linear_attention(*(split_heads(t, self.n_heads) for t in (*sets, v))))
        if self.dwc is not None:
            out = out + self.dwc(v)
        return self.proj(out)


# ---------------------------------------------------------------------------------------------------------------------
# The transformer (Fig. 2(a)): DiT's shell around either attention
# ---------------------------------------------------------------------------------------------------------------------

class SoftmaxAttention(nn.Module):
    """DiT's multi-head self-attention, Eq. 3."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (split_heads(t, self.n_heads) for t in self.qkv(x).chunk(3, dim=-1))
        return self.proj(merge_heads(softmax_attention(q, k, v)))


class Mlp(nn.Module):
    """DiT's feed-forward network."""

    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class MixFFN(nn.Module):
    """Sana's feed-forward network: expand, look at the 3x3 neighbours, gate one half with the other, contract.

    Expansion 4, which the paper's GFLOPs settle (Sana's released models have 2.5).
    """

    def __init__(self, dim):
        super().__init__()
        self.expand = nn.Linear(dim, 8 * dim)
        self.depthwise = nn.Conv2d(8 * dim, 8 * dim, 3, padding=1, groups=8 * dim)
        self.contract = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x):
        """x: (B, N, d), N a square. Returns (B, N, d)."""
        x = depthwise(F.silu(self.expand(x)), self.depthwise.weight, self.depthwise.bias)
        x, gate = x.chunk(2, dim=-1)
        return self.contract(x * F.silu(gate))


def modulate(x, shift, scale):
    """AdaLN: x (B, N, d) scaled and shifted by its image's condition, (B, d) each."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """AdaLN-Zero block: timestep and class set shift, scale and gate of both branches; the gates start at zero."""

    def __init__(self, cfg, lambda_init=None):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(cfg.dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        softmax = cfg.attention == "softmax"
        self.attn = SoftmaxAttention(cfg.dim, cfg.n_heads) if softmax else DyDiLA(cfg, lambda_init)
        self.mlp = Mlp(cfg.dim) if softmax else MixFFN(cfg.dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))

    def forward(self, x, c):
        """x: (B, N, d) tokens; c: (B, d) condition. Returns (B, N, d)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class PatchEmbed(nn.Module):
    """Cuts the input into patches and maps each to a token. (B, C, S, S) -> (B, N, d)."""

    def __init__(self, cfg):
        super().__init__()
        self.proj = nn.Conv2d(cfg.in_channels, cfg.dim, cfg.patch_size, stride=cfg.patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep, 256 wide, and a two-layer MLP. (B,) -> (B, d)."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        angles = t[:, None].float() * frequencies                                           # (B, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """One vector per class; the last row stands for "no class". (B,) -> (B, d)."""

    def __init__(self, cfg):
        super().__init__()
        self.n_classes, self.dropout = cfg.n_classes, cfg.label_dropout
        self.embedding_table = nn.Embedding(cfg.n_classes + 1, cfg.dim)

    def forward(self, y):
        if self.training and self.dropout > 0:
            y = torch.where(torch.rand(y.shape, device=y.device) < self.dropout, self.n_classes, y)
        return self.embedding_table(y)


class FinalLayer(nn.Module):
    """Modulated norm and a linear map from tokens to patches of noise and variance. (B, N, d) -> (B, N, p p 2C)."""

    def __init__(self, cfg):
        super().__init__()
        self.norm_final = nn.LayerNorm(cfg.dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(cfg.dim, cfg.patch_size ** 2 * 2 * cfg.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 2 * cfg.dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def position_embedding(dim, side):
    """Fixed 2-D sin-cos positions, half the width for the column and half for the row, (1, side^2, dim)."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)                                   # (side, dim/2)
    return torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, 0)], dim=1).float().unsqueeze(0)


class DyDiLiT(nn.Module):
    """The diffusion transformer: predicts, for a noisy input, its noise and where its variance lies (learned sigma).

    Its weights are float32 or float64; for half precision, call it under autocast.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.x_embedder = PatchEmbed(cfg)
        self.t_embedder = TimestepEmbedder(cfg.dim)
        self.y_embedder = LabelEmbedder(cfg)
        side = cfg.input_size // cfg.patch_size
        self.pos_embed = nn.Parameter(position_embedding(cfg.dim, side), requires_grad=False)
        first, last = cfg.lambda_init
        self.blocks = nn.ModuleList(
            Block(cfg, first + (last - first) * i / max(cfg.depth - 1, 1)) for i in range(cfg.depth))
        self.final_layer = FinalLayer(cfg)
        self.initialize_weights()

    def initialize_weights(self):
        """DiT's initialization. Routers, projector banks and convolutions have theirs where they are defined."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.cfg.dim, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for zeroed in [*(block.adaLN_modulation[1] for block in self.blocks),
                       self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(zeroed.weight)
            nn.init.zeros_(zeroed.bias)

    def forward(self, x, t, y):
        """x: (B, C, S, S) noisy input; t: (B,) timesteps 0..999; y: (B,) classes, n_classes meaning "no class".

        Returns (B, 2C, S, S): predicted noise, then the variance's place between its bounds, in [-1, 1] when trained.
        """
        expected = (self.cfg.in_channels, self.cfg.input_size, self.cfg.input_size)
        if x.shape[1:] != expected:
            raise ValueError(f"DyDiLiT: input of shape {tuple(x.shape[1:])}, the model was built for {expected}")
        x = self.x_embedder(x) + self.pos_embed                                 # (B, N, d)
        c = self.t_embedder(t) + self.y_embedder(y)                             # (B, d)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)                                              # (B, N, p p 2C)
        p, side = self.cfg.patch_size, self.cfg.input_size // self.cfg.patch_size
        x = x.view(-1, side, side, p, p, 2 * self.cfg.in_channels)              # (B, rows, columns, p, p, 2C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, 2 * self.cfg.in_channels, p * side, p * side)

    def forward_with_cfg(self, x, t, y, scale):
        """Classifier-free guidance (Ho & Salimans 2022): noise = none + scale (class - none), variance from the class.

        scale 1 is the plain model; larger trades variety for fidelity. Both passes run as one batch of 2B.
        """
        if scale == 1:
            return self(x, t, y)
        both = self(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, torch.full_like(y, self.cfg.n_classes)]))
        with_class, without = both.chunk(2)
        c = self.cfg.in_channels
        return torch.cat([without[:, :c] + scale * (with_class[:, :c] - without[:, :c]), with_class[:, c:]], dim=1)

    def fuse(self):
        """Fuses every re-parameterized convolution in place, for inference. Returns the model."""
        for module in self.modules():
            if isinstance(module, ReparamDWConv):
                module.fuse()
        return self


# Table 4's rungs in its order, as overrides of a DyDi-LiT model: each adds one part to the one before.
LADDER = [
    ("Sana", dict(kernel="relu", dynamic_projection=False, differential="none", dwc=False)),
    ("+ focused kernel", dict(kernel="focused", dynamic_projection=False, differential="none", dwc=False)),
    ("+ dynamic measure kernel", dict(dynamic_projection=False, differential="none", dwc=False)),
    ("+ dynamic projection module", dict(differential="none", dwc=False)),     # Q and K themselves are routed here
    ("+ token differential operator", dict(dwc=False)),                         # from here on Q' and K' are
    ("+ re-parameterization", dict()),
]

MODELS = {}
for _size, _dim, _n_projectors in [("S", 384, 3), ("B", 512, 5), ("L", 768, 7)]:
    _banks = dict(n_projectors=_n_projectors, n_gammas=3 * _n_projectors, n_lambdas=3 * _n_projectors)
    MODELS[f"DiT-{_size}/2"] = dict(attention="softmax", dim=_dim, depth=12, n_heads=_dim // 64)
    MODELS[f"Sana-{_size}/2"] = dict(dim=_dim, **LADDER[0][1])
    MODELS[f"DyDi-LiT-{_size}/2"] = dict(dim=_dim, **_banks)
# A model that two CPU cores train in minutes, on 32x32 pixels.
MODELS["DyDi-LiT-XS/4"] = dict(dim=96, depth=4, patch_size=4, image_size=32, vae_factor=1, in_channels=3, n_classes=10)


def build_model(name, **overrides):
    """A DyDiLiT by its name in MODELS, with any field of ModelConfig overridden. ValueError for an unknown name."""
    if name not in MODELS:
        raise ValueError(f"no model {name!r}; choose one of {', '.join(MODELS)}")
    return DyDiLiT(ModelConfig(**{**MODELS[name], **overrides}))


# ---------------------------------------------------------------------------------------------------------------------
# The diffusion (Ho et al. 2020; learned variance and respacing: Nichol & Dhariwal 2021; DDIM: Song et al. 2021)
# ---------------------------------------------------------------------------------------------------------------------

def respaced_timesteps(n_timesteps, steps):
    """`steps` of the timesteps 0..n_timesteps-1, evenly spaced, both ends included (the last alone for one step)."""
    if not 1 <= steps <= n_timesteps:
        raise ValueError(f"sampling steps: {steps} is not in 1..{n_timesteps}")
    return [round(i * (n_timesteps - 1) / (steps - 1)) for i in range(steps)] if steps > 1 else [n_timesteps - 1]


def gaussian_kl(mean1, log_var1, mean2, log_var2):
    """KL(N(mean1, var1) || N(mean2, var2)) per entry, in nats."""
    return 0.5 * (log_var2 - log_var1 - 1 + (log_var1 - log_var2).exp() + (mean1 - mean2) ** 2 * (-log_var2).exp())


def discretized_gaussian_log_likelihood(x, mean, log_std):
    """Log probability per entry that a Gaussian puts into x's bin of width 2/255, the end bins reaching to infinity.

    x: images of 256 levels in [-1, 1]. The distribution function is the reference's tanh approximation.
    """
    def cdf(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))

    upper, lower = (cdf((x - mean + half) * (-log_std).exp()) for half in (1 / 255, -1 / 255))
    p = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return p.clamp_min(1e-12).log()


class GaussianDiffusion(nn.Module):
    """The noising process q, the loss that trains a model to undo it, and two samplers.

    betas: (T,) float64 variances; the default is DiT's, 1,000 from 1e-4 to 2e-2. timesteps: for a respaced process, the
    model's timestep for each of its own. A module only so that `.to(device)` carries its tables; it has no parameters.
    """

    def __init__(self, betas=None, timesteps=None):
        super().__init__()
        betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64) if betas is None else betas
        self.n_timesteps = len(betas)
        alpha_bar = (1 - betas).cumprod(0)
        alpha_bar_prev = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)               # of the posterior q(x_{t-1} | x_t, x_0)
        variance[0] = variance[1] if len(betas) > 1 else betas[0]               # zero at t = 0, where a log is taken
        tables = dict(
            sqrt_alpha_bar=alpha_bar.sqrt(), sqrt_one_minus=(1 - alpha_bar).sqrt(), alpha_bar_prev=alpha_bar_prev,
            posterior_x0=betas * alpha_bar_prev.sqrt() / (1 - alpha_bar),
            posterior_xt=(1 - alpha_bar_prev) * (1 - betas).sqrt() / (1 - alpha_bar),
            log_beta=betas.log(), log_posterior=variance.log())
        for name, table in tables.items():                                      # made in float64, kept in float32
            self.register_buffer(name, table.float(), persistent=False)
        self.register_buffer("timesteps", torch.as_tensor(
            range(len(betas)) if timesteps is None else timesteps), persistent=False)
        self._alpha_bar = alpha_bar

    def respace(self, steps):
        """The process that visits only `steps` of the timesteps and has the same marginals there."""
        timesteps = respaced_timesteps(self.n_timesteps, steps)
        alpha_bar = self._alpha_bar[timesteps]
        betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        return GaussianDiffusion(betas, self.timesteps[timesteps]).to(self.timesteps.device)

    def _at(self, name, t):
        return getattr(self, name)[t].view(-1, 1, 1, 1)

    def q_sample(self, x0, t, noise):
        """q(x_t | x_0): x0 (B, C, S, S) with the noise of timestep t (B,) added."""
        return self._at("sqrt_alpha_bar", t) * x0 + self._at("sqrt_one_minus", t) * noise

    def posterior_mean(self, x0, x_t, t):
        """Mean of q(x_{t-1} | x_t, x_0)."""
        return self._at("posterior_x0", t) * x0 + self._at("posterior_xt", t) * x_t

    def predict_x0(self, x_t, t, noise):
        """The x_0 from which this noise leads to x_t."""
        return (x_t - self._at("sqrt_one_minus", t) * noise) / self._at("sqrt_alpha_bar", t)

    def p_mean_variance(self, output, x_t, t, clip_x0=False):
        """The model's step p(x_{t-1} | x_t). output: (B, 2C, S, S), what the model said at x_t.

        Returns mean, log variance and the predicted x_0, (B, C, S, S) each; clip_x0 keeps the latter in [-1, 1].
        """
        noise, place = output.chunk(2, dim=1)
        low, high = self._at("log_posterior", t), self._at("log_beta", t)       # the variance's bounds
        log_variance = low + (place + 1) / 2 * (high - low)
        x0 = self.predict_x0(x_t, t, noise)
        x0 = x0.clamp(-1, 1) if clip_x0 else x0
        return self.posterior_mean(x0, x_t, t), log_variance, x0

    def variational_term(self, output, x0, x_t, t, clip_x0=False):
        """The term of the variational bound that belongs to timestep t, in bits per dimension, (B,)."""
        mean, log_variance, _ = self.p_mean_variance(output, x_t, t, clip_x0)
        kl = gaussian_kl(self.posterior_mean(x0, x_t, t), self._at("log_posterior", t), mean, log_variance)
        decoder = -discretized_gaussian_log_likelihood(x0, mean, log_variance / 2)
        return torch.where(t == 0, decoder.mean((1, 2, 3)), kl.mean((1, 2, 3))) / math.log(2)

    def losses(self, model, x0, y, t=None, noise=None):
        """The hybrid loss of improved DDPM: "simple", the noise's mean squared error, trains the noise;
        "variational" trains the variance alone (the noise is held fixed in it); "loss" is their sum.

        model(x_t, t, y) -> (B, 2C, S, S); x0: (B, C, S, S); y: (B,); t: (B,), random if None; noise: like x0, random if
        None. Returns a dictionary of (B,) tensors.
        """
        t = torch.randint(self.n_timesteps, (len(x0),), device=x0.device) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        x_t = self.q_sample(x0, t, noise)
        output = model(x_t, self.timesteps[t], y).float()
        predicted, place = output.chunk(2, dim=1)
        simple = (predicted - noise).square().mean((1, 2, 3))
        variational = self.variational_term(torch.cat([predicted.detach(), place], dim=1), x0, x_t, t)
        return dict(loss=simple + variational, simple=simple, variational=variational)

    @torch.no_grad()
    def sample(self, model, x, steps=250, sampler="ddpm", clip_x0=False, generator=None, progress=True):
        """Turns noise into samples.

        model(x_t, t) -> (B, 2C, S, S), its class labels bound already; x: (B, C, S, S) standard normal noise;
        steps: 1..T, evenly spaced; sampler: "ddpm", ancestral with the learned variance, or "ddim", deterministic;
        clip_x0: for pixels in [-1, 1]. generator draws "ddpm"'s noise. Returns (B, C, S, S).
        """
        if sampler not in ("ddpm", "ddim"):
            raise ValueError(f"sampler {sampler!r} is not one of ddpm, ddim")
        spaced = self.respace(steps)
        for i in tqdm(range(steps - 1, -1, -1), desc="sampling", disable=not progress, leave=False):
            t = torch.full((len(x),), i, device=x.device)
            mean, log_variance, x0 = spaced.p_mean_variance(model(x, spaced.timesteps[t]).float(), x, t, clip_x0)
            if sampler == "ddim":
                noise = (x - spaced._at("sqrt_alpha_bar", t) * x0) / spaced._at("sqrt_one_minus", t)
                prev = spaced._at("alpha_bar_prev", t)
                x = prev.sqrt() * x0 + (1 - prev).sqrt() * noise
            elif i > 0:
                noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                x = mean + (log_variance / 2).exp() * noise
            else:
                x = mean
        return x
