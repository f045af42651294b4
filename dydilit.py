"""DyDi-LiT, a diffusion transformer with Dynamic Differential Linear Attention, in one file.

Read it from top to bottom. It follows the order of "Dynamic Differential Linear Attention:
Enhancing Linear Diffusion Transformer for High-Quality Image Generation" (Cao et al., arXiv
2601.13683). "Eq. n" and "Table n" are that paper's numbers.

    attention           Eq. 3-4       softmax_attention, linear_attention
    routing             Eq. 1         Router
    projection          Eq. 1-2       routed_linear, DynamicProjection
    measure kernel      Eq. 5-6       focused_kernel, DynamicMeasureKernel
    differential        Eq. 7-8, 10   token_differential, map_differential, TokenDifferential
    convolution         Eq. 9         ReparamDWConv
    the module          Fig. 2(b)     ModelConfig, DyDiLA, LinearAttention (Sana's)
    the transformer     Fig. 2(a)     MixFFN, Block, DyDiLiT, LADDER, MODELS, build_model
    the diffusion       Sec. 4.1      GaussianDiffusion

Shapes: B images, N tokens (the patches of an image, row by row), d the width of a token, h heads.
An equation without weights is a function. An equation with weights is a module that calls it.

The transformer's shell (patches, embeddings, AdaLN-Zero, softmax attention, final layer) has the
parameter names and conventions of facebookresearch/DiT (Peebles & Xie 2023). DiT-XL/2's checkpoint
loads at dim=1152, depth=28, n_heads=16. Mix-FFN and the ReLU baseline are Sana's (Xie et al. 2025).
"""
import dataclasses
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm.auto import tqdm

# ---- Attention (Eq. 3-4) -------------------------------------------------------------------------

EPS = 1e-12  # A query without any similarity attends to nothing: 0 / EPS is 0, and 0 / 0 is not.


def softmax_attention(q, k, v):
    """Eq. 3 with Sim(q, k) = exp(q k^T / sqrt(d)), O(N^2 d). q, k, v, result: (..., N, d)."""
    return F.scaled_dot_product_attention(q, k, v)


def at_least_float32(x):
    """x in float32 if it is in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def precise_matmul(a, b):
    """a @ b, at least in float32, also under autocast. Sums over N tokens need the digits."""
    with torch.autocast(a.device.type, enabled=False):
        return at_least_float32(a) @ at_least_float32(b)


def attention_product(q, k, v):
    """q k^T v, at least in float32, also under autocast. The cheaper order is taken.

    With e = d, (q k^T) v costs 2 N^2 d multiply-accumulates and q (k^T v) costs 2 N d^2.
    q, k: (..., N, d); v: (..., N, e). Returns (..., N, e)."""
    n, d = k.shape[-2:]
    if n <= d:
        return precise_matmul(precise_matmul(q, k.transpose(-2, -1)), v)    # (..., N, N) in between
    return precise_matmul(q, precise_matmul(k.transpose(-2, -1), v))        # (..., d, e) in between


def attention_mass(q, k):
    """The denominator of Eq. 4, at least EPS. q, k: (..., N, d), non-negative -> (..., N, 1)."""
    return precise_matmul(q, at_least_float32(k).sum(dim=-2).unsqueeze(-1)).clamp_min(EPS)


def linear_attention(q, k, v):
    """Eq. 4, attention whose similarity is a dot product of kernelized tokens. O(N) for N > d.

    q, k: (..., N, d), non-negative; v: (..., N, e). Returns (..., N, e), at least in float32."""
    return attention_product(q, k, v) / attention_mass(q, k)


def split_heads(x, n_heads):
    """(B, N, d) -> (B, h, N, d/h)."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def merge_heads(x):
    """(B, h, N, d/h) -> (B, N, d)."""
    return x.transpose(1, 2).flatten(2)


# ---- Routing (Eq. 1). Eq. 6 and Eq. 7 route in the same way, with routers of their own. ----------

class Router(nn.Module):
    """Eq. 1. Each token takes the one of n choices whose score in X_i R is the largest.

    arg max has no gradient, and the paper names no estimator. This one is the straight-through
    softmax (Bengio et al. 2013). Scores are computed in float32 also under autocast, because in
    bfloat16 near ones would tie. weight: (n, d), the transpose of the paper's R."""

    def __init__(self, dim, n):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, *parts):
        """parts: (..., d_i), which stand for their concatenation (..., d), so the scores add up.

        Returns each token's choice as a one-hot (..., n)."""
        columns = self.weight.split([part.shape[-1] for part in parts], dim=-1)
        scores = sum(precise_matmul(x, w.T) for x, w in zip(parts, columns))        # (..., n)
        one_hot = F.one_hot(scores.argmax(dim=-1), scores.shape[-1]).to(scores.dtype)
        soft = scores.softmax(dim=-1)
        # Forward, the bracket is exactly zero and the one-hot is what remains.
        # Backward, the one-hot is a constant and the gradient is that of the softmax.
        return one_hot + (soft - soft.detach())


# ---- Dynamic projection module (Eq. 1-2) ---------------------------------------------------------

def routed_linear(x, weight, index):
    """Eq. 2, y_i = x_i W_{index_i}. Each token meets its own projector only.

    The tokens are sorted by projector, each projector sees its group, and the results are put back
    in order. That is T d e multiply-accumulates, however many projectors there are.

    x: (T, d); weight: (n, d, e); index: (T,) in 0..n-1. Returns (T, e)."""
    order = index.argsort(stable=True)                      # the tokens of projector 0 come first
    groups = x.index_select(0, order).split(index.bincount(minlength=len(weight)).tolist())
    y = torch.cat([group @ projector for group, projector in zip(groups, weight)])
    return y.index_select(0, order.argsort())               # argsort inverts the permutation


class DynamicProjection(nn.Module):
    """Eq. 1-2. Two routed banks of n_projectors d x d projectors, one for Q' and one for K'."""

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
            choice = router(x)                                              # (B, N, n)
            index = choice.argmax(dim=-1)                                   # (B, N)
            y = routed_linear(x.flatten(0, 1), weight, index.flatten()).view(x.shape)
            # The gate is 1 forward. Backward, it brings the router the gradient of the chosen entry
            # alone, because the others would need the outputs of projectors that did not run.
            gate = choice.gather(-1, index.unsqueeze(-1))                   # (B, N, 1)
            pair.append(y * gate.to(y.dtype))
        return pair


# ---- Dynamic measure kernel (Eq. 5-6) ------------------------------------------------------------

def focused_kernel(z, gamma):
    """Eq. 5, ReLU(z)^gamma / |ReLU(z)^gamma| * |ReLU(z)|: another direction, the same norm.

    z: (..., d), finite; gamma: a number, or a tensor (..., 1) with one positive power per token.
    Returns (..., d), at least in float32. A token without a positive entry becomes zero."""
    z = at_least_float32(z)
    # Eq. 5 scales with its token, so a constant scale cancels out. It keeps powers from overflow.
    largest = z.detach().amax(dim=-1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1)
    z = F.relu(z / scale)
    # z^gamma as z z^(gamma - 1), which is 0 where z is 0. The logarithm never sees that zero.
    power = z * ((gamma - 1) * (z + 1e-30).log2()).exp2()
    norm, power_norm = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (z, power))
    return power * (norm / power_norm.clamp_min(1) * scale)         # power_norm < 1 only if z is 0


class DynamicMeasureKernel(nn.Module):
    """Eq. 6. A bank of learnable powers gamma, from which each token picks one.

    Each set (Q, K, Q', K') has its own router, and all share one bank. The powers start equal, so
    a router has no gradient before they differ. Kernels act on whole tokens, before any heads."""

    def __init__(self, dim, n_gammas, n_sets, gamma_init=3.0):
        super().__init__()
        self.gammas = nn.Parameter(torch.full((n_gammas,), float(gamma_init)))
        self.routers = nn.ModuleList(Router(dim, n_gammas) for _ in range(n_sets))

    def forward(self, *sets):
        """sets: n_sets tensors (B, N, d). Returns a list of as many, non-negative, in float32."""
        choices = [router(z) for router, z in zip(self.routers, sets, strict=True)]
        return [focused_kernel(z, pick(choice, self.gammas)) for z, choice in zip(sets, choices)]


def pick(choice, bank):
    """The factor that each token chose. choice: (..., n), one-hot; bank: (n,). Returns (..., 1)."""
    # A matrix product would say the same, but autocast would round the factors to bfloat16.
    return (choice * bank).sum(dim=-1, keepdim=True)


# ---- Token differential operator (Eq. 7-8), and the map-wise alternative (Eq. 10) ----------------

def token_differential(q, q_red, k, k_red, v, lambda_q, lambda_k):
    """Eq. 8 as printed, (Q - lambda^Q Q') ((K - lambda^K K')^T V). Returns (..., N, e).

    q, q_red, k, k_red: (..., N, d); v: (..., N, e); lambda_q, lambda_k: numbers or (..., N, 1)."""
    return attention_product(q - lambda_q * q_red, k - lambda_k * k_red, v)


def map_differential(q, q_red, k, k_red, v, lambda_map):
    """Eq. 10 without its convolution, Q (K^T V) - lambda_map Q' (K'^T V). Returns (..., N, e).

    q, q_red, k, k_red: (..., N, d); v: (..., N, e); lambda_map: a number or (..., N, 1)."""
    return attention_product(q, k, v) - lambda_map * attention_product(q_red, k_red, v)


class TokenDifferential(nn.Module):
    """Eq. 7-8, divided by N. Each query and key picks a factor lambda; attention uses differences.

    paradigm="map" is Eq. 10, where only queries pick a factor."""

    def __init__(self, dim, n_lambdas, lambda_init=0.01, paradigm="token"):
        super().__init__()
        self.lambdas = nn.Parameter(torch.full((n_lambdas,), float(lambda_init)))
        self.router_q = Router(2 * dim, n_lambdas)
        self.router_k = Router(2 * dim, n_lambdas) if paradigm == "token" else None

    def forward(self, q, q_red, k, k_red, v, n_heads=1):
        """q, q_red, k, k_red: (B, N, d), kernelized; v: (B, N, d). Returns (B, N, d)."""
        lambda_q = self.choose(self.router_q, q, q_red)                     # Eq. 7, (B, 1, N, 1)
        heads = [split_heads(x, n_heads) for x in (q, q_red, k, k_red, v)]
        if self.router_k is None:
            out = map_differential(*heads, lambda_q)                        # Eq. 10
        else:
            lambda_k = self.choose(self.router_k, k, k_red)
            out = token_differential(*heads, lambda_q, lambda_k)            # Eq. 8
        # Eq. 8 is a sum over N keys. Undivided, it starts tens to hundreds of times as long as V,
        # and a high learning rate then fades it. Divided by N it starts near V, whatever N is.
        return merge_heads(out / q.shape[-2])

    def choose(self, router, x, x_red):
        """Eq. 7. x, x_red: (B, N, d). Returns each token's factor, (B, 1, N, 1) for all heads."""
        return pick(router(x, x_red), self.lambdas).unsqueeze(1)


# ---- Re-parameterized depth-wise convolution (the second term of Eq. 9) --------------------------

def depthwise(x, weight, bias=None):
    """Depth-wise 3x3 convolution of tokens (B, N, C) on a square grid. ValueError for another N."""
    b, n, c = x.shape
    side = math.isqrt(n)
    if side * side != n:
        raise ValueError(f"depthwise: {n} tokens do not form a square grid")
    x = x.view(b, side, side, c).permute(0, 3, 1, 2)                        # (B, C, side, side)
    x = F.conv2d(x, weight, bias, padding=1, groups=c)
    return x.permute(0, 2, 3, 1).reshape(b, n, c)


class ReparamDWConv(nn.Module):
    """DWC(V) of Eq. 9. Depth-wise 3x3, 1x3 and 3x1 branches that add up (ACNet, Ding et al. 2019).

    Convolution is linear, so the sum of the branches is one convolution with the sum of their
    kernels. Unlike ACNet, there is no batch normalization, since a batch has many noise levels."""

    def __init__(self, dim):
        super().__init__()
        self.weight_3x3, self.weight_1x3, self.weight_3x1 = (
            nn.Parameter(nn.Conv2d(dim, dim, size, groups=dim).weight.detach())
            for size in [(3, 3), (1, 3), (3, 1)])

    def kernel(self):
        """The single 3x3 kernel that equals the branches, (d, 1, 3, 3)."""
        if self.weight_1x3 is None:
            return self.weight_3x3
        wide, tall = F.pad(self.weight_1x3, (0, 0, 1, 1)), F.pad(self.weight_3x1, (1, 1, 0, 0))
        return self.weight_3x3 + wide + tall

    def fuse(self):
        """Replaces the branches by their 3x3 kernel, in place. It changes the state dict."""
        self.weight_3x3 = nn.Parameter(self.kernel().detach())
        self.weight_1x3 = self.weight_3x1 = None

    def forward(self, v):
        """v: (B, N, d), N a square. Returns (B, N, d)."""
        return depthwise(v, self.kernel())


# ---- The configuration, and the DyDiLA module (Fig. 2(b)) ----------------------------------------

@dataclasses.dataclass
class ModelConfig:
    """Everything that defines a model. The defaults are DyDi-LiT-S/2 on ImageNet latents."""
    image_size: int = 256               # pixels of an image's side
    vae_factor: int = 8                 # pixels per latent entry: 8 for Stable Diffusion, 1: pixels
    in_channels: int = 4                # of what is denoised: 4 for latents, 3 for pixels
    n_classes: int = 1000
    label_dropout: float = 0.1          # share of training labels replaced by "no class"
    patch_size: int = 2
    dim: int = 384                      # d, width of a token
    depth: int = 9                      # L, number of blocks
    n_heads: int = 1                    # 1 for linear attention, read off the GFLOPs
    attention: str = "linear"           # "softmax": DiT's attention and MLP; "linear": the rest
    kernel: str = "dynamic"             # "relu": Sana; "focused": Eq. 5; "dynamic": Eq. 6
    dynamic_projection: bool = True     # Eq. 1-2, for Q', K'; without a differential for Q, K
    differential: str = "token"         # "none"; "token": Eq. 8; "map": Eq. 10
    dwc: bool = True                    # the convolution on V, Eq. 9
    n_projectors: int = 3               # n_P
    n_gammas: int = 9                   # n_F
    n_lambdas: int = 9                  # n_D
    gamma_init: float = 3.0
    lambda_init: tuple = (0.01, 0.01)   # of the first and the last block, linear in between

    def __post_init__(self):
        choices = dict(attention=("softmax", "linear"), kernel=("relu", "focused", "dynamic"),
                       differential=("none", "token", "map"), dynamic_projection=(True, False),
                       dwc=(True, False))
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in choices and value not in choices[name]:
                raise ValueError(f"ModelConfig: {name}={value!r} is not one of {choices[name]}")
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"ModelConfig: {name}={value!r} is not a positive integer")
            top = 1 if name == "label_dropout" else 1000
            if field.type is float and not (type(value) in (int, float) and 0 <= value <= top):
                raise ValueError(f"ModelConfig: {name}={value!r} is not a number in 0..{top}")
        pair = self.lambda_init if isinstance(self.lambda_init, (list, tuple)) else ()
        if len(pair) != 2 or not all(type(x) in (int, float) and abs(x) <= 1000 for x in pair):
            raise ValueError(f"ModelConfig: lambda_init={self.lambda_init!r} is not two numbers")
        self.lambda_init = tuple(map(float, pair))                          # JSON makes it a list
        self.input_size = self.image_size // self.vae_factor                # of what is denoised
        if self.image_size % (self.vae_factor * self.patch_size):
            raise ValueError(f"ModelConfig: image_size={self.image_size} is not a multiple of "
                             f"vae_factor x patch_size = {self.vae_factor} x {self.patch_size}")
        if self.dim % 4 or self.dim % self.n_heads:                         # 4 for the positions
            raise ValueError(f"dim={self.dim} is not a multiple of 4 and n_heads={self.n_heads}")
        fits = not self.dwc
        if self.differential != "none":
            fits = self.kernel == "dynamic" and self.dynamic_projection
        if not fits:
            raise ValueError("ModelConfig: a differential needs kernel='dynamic' and "
                             "dynamic_projection=True; dwc=True needs a differential")


class DyDiLA(nn.Module):
    """Fig. 2(b): O = TDO(.) + DWC(V), then an output projection. (B, N, d) -> (B, N, d).

    cfg.differential="map" takes Eq. 10 in place of Eq. 8, and cfg.dwc=False leaves DWC(V) out."""

    def __init__(self, cfg, lambda_init=0.01):
        super().__init__()
        self.n_heads, d = cfg.n_heads, cfg.dim
        self.qkv = nn.Linear(d, 3 * d, bias=False)                          # W_0, no bias (Sana)
        self.projection = DynamicProjection(d, cfg.n_projectors)
        self.kernel = DynamicMeasureKernel(d, cfg.n_gammas, 4, cfg.gamma_init)
        self.differential = TokenDifferential(d, cfg.n_lambdas, lambda_init, cfg.differential)
        self.dwc = ReparamDWConv(d) if cfg.dwc else None
        self.proj = nn.Linear(d, d)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q_red, k_red = self.projection(x)                                   # Eq. 1-2
        q, q_red, k, k_red = self.kernel(q, q_red, k, k_red)                # Eq. 5-6
        out = self.differential(q, q_red, k, k_red, v, self.n_heads)        # Eq. 7-8
        if self.dwc is not None:
            out = out + self.dwc(v)                                         # Eq. 9
        return self.proj(out)


class LinearAttention(nn.Module):
    """Eq. 4 between projections: Sana, and rungs 2 to 4 of Table 4. (B, N, d) -> (B, N, d).

    cfg.kernel is ReLU (Sana), Eq. 5 or Eq. 6. cfg.dynamic_projection routes Q and K themselves."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, d = cfg, cfg.dim
        self.projection = DynamicProjection(d, cfg.n_projectors) if cfg.dynamic_projection else None
        self.qkv = nn.Linear(d, d if cfg.dynamic_projection else 3 * d, bias=False)     # or V alone
        if cfg.kernel == "dynamic":
            self.kernel = DynamicMeasureKernel(d, cfg.n_gammas, 2, cfg.gamma_init)
        self.proj = nn.Linear(d, d)

    def forward(self, x):
        if self.projection is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            (q, k), v = self.projection(x), self.qkv(x)                     # Eq. 1-2
        if self.cfg.kernel == "relu":
            q, k = F.relu(q), F.relu(k)
        elif self.cfg.kernel == "focused":
            q, k = (focused_kernel(z, self.cfg.gamma_init) for z in (q, k))                 # Eq. 5
        else:
            q, k = self.kernel(q, k)                                        # Eq. 6
        q, k, v = (split_heads(z, self.cfg.n_heads) for z in (q, k, v))
        return self.proj(merge_heads(linear_attention(q, k, v)))


# ---- The transformer (Fig. 2(a)): DiT's shell around either attention ----------------------------

class SoftmaxAttention(nn.Module):
    """DiT's multi-head self-attention, Eq. 3. (B, N, d) -> (B, N, d)."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (split_heads(t, self.n_heads) for t in self.qkv(x).chunk(3, dim=-1))
        return self.proj(merge_heads(softmax_attention(q, k, v)))


class Mlp(nn.Module):
    """DiT's feed-forward network. (B, N, d) -> (B, N, d)."""

    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class MixFFN(nn.Module):
    """Sana's feed-forward network: expand, mix with the 3x3 neighbours, gate, contract.

    The paper's GFLOPs settle that the expansion is 4. (B, N, d) -> (B, N, d)."""

    def __init__(self, dim):
        super().__init__()
        self.expand = nn.Linear(dim, 8 * dim)
        self.depthwise = nn.Conv2d(8 * dim, 8 * dim, 3, padding=1, groups=8 * dim)
        self.contract = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x):
        x = depthwise(F.silu(self.expand(x)), self.depthwise.weight, self.depthwise.bias)
        x, gate = x.chunk(2, dim=-1)                                        # (B, N, 4d) each
        return self.contract(x * F.silu(gate))


def modulate(x, shift, scale):
    """AdaLN. It scales and shifts the tokens x (B, N, d) by their image's condition (B, d)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """AdaLN-Zero block. The condition sets shift, scale and gate of both branches.

    The gates start at zero, so a new block is the identity. attn, mlp: (B, N, d) -> (B, N, d), and
    so is `after`, a part that sees the block's result. DyDi-LiT has none."""

    def __init__(self, dim, attn, mlp, after=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn, self.mlp, self.after = attn, mlp, after or nn.Identity()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        """x: (B, N, d), tokens; c: (B, d), condition. Returns (B, N, d)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return self.after(x)


def block_parts(cfg, i):
    """Attention and feed-forward network of block i, and perhaps a part after them, see Block.

    build_model(parts=...) takes another function like this one, for other attentions."""
    if cfg.attention == "softmax":
        return SoftmaxAttention(cfg.dim, cfg.n_heads), Mlp(cfg.dim)
    first, last = cfg.lambda_init
    lambda_init = first + (last - first) * i / max(cfg.depth - 1, 1)
    attention = LinearAttention(cfg) if cfg.differential == "none" else DyDiLA(cfg, lambda_init)
    return attention, MixFFN(cfg.dim)


class PatchEmbed(nn.Module):
    """Cuts the input into patches and maps each patch to a token. (B, C, S, S) -> (B, N, d)."""

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
        exponents = torch.arange(128, dtype=torch.float32, device=t.device) / 128
        angles = t[:, None].float() * torch.exp(-math.log(10000) * exponents)   # (B, 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)                 # (B, 256)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """One vector per class. The last row stands for "no class". (B,) -> (B, d)."""

    def __init__(self, cfg):
        super().__init__()
        self.n_classes, self.dropout = cfg.n_classes, cfg.label_dropout
        self.embedding_table = nn.Embedding(cfg.n_classes + 1, cfg.dim)

    def forward(self, y):
        if self.training and self.dropout > 0:
            y = torch.where(torch.rand(y.shape, device=y.device) < self.dropout, self.n_classes, y)
        return self.embedding_table(y)


class FinalLayer(nn.Module):
    """Modulated norm, then a linear map from tokens to patches. (B, N, d) -> (B, N, p p 2C)."""

    def __init__(self, cfg):
        super().__init__()
        self.norm_final = nn.LayerNorm(cfg.dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(cfg.dim, cfg.patch_size ** 2 * 2 * cfg.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 2 * cfg.dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def position_embedding(dim, side):
    """Fixed 2-D sin-cos positions, half the width the column, half the row. (1, side^2, dim)."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies # (side, d/4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)                   # (side, d/2)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)       # (N, d/2)
    return torch.cat([columns, rows], dim=1).float().unsqueeze(0)


class DyDiLiT(nn.Module):
    """The diffusion transformer. It predicts a noisy input's noise, and a variance (learned sigma).

    For half precision, call it under autocast. parts: what makes the blocks, see block_parts."""

    def __init__(self, cfg, parts=block_parts):
        super().__init__()
        self.cfg = cfg
        self.x_embedder = PatchEmbed(cfg)
        self.t_embedder = TimestepEmbedder(cfg.dim)
        self.y_embedder = LabelEmbedder(cfg)
        side = cfg.input_size // cfg.patch_size
        self.pos_embed = nn.Parameter(position_embedding(cfg.dim, side), requires_grad=False)
        self.blocks = nn.ModuleList(Block(cfg.dim, *parts(cfg, i)) for i in range(cfg.depth))
        self.final_layer = FinalLayer(cfg)
        self.initialize_weights()

    def initialize_weights(self):
        """DiT's initialization of every nn.Linear. Banks and convolutions define their own."""
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
        zeroed = [block.adaLN_modulation[1] for block in self.blocks]
        for linear in [*zeroed, self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x, t, y):
        """x: (B, C, S, S), noisy input; t: (B,), timesteps 0..999; y: (B,), classes.

        The class n_classes means "no class". Returns (B, 2C, S, S): the noise, then the variance's
        place between its two bounds, from -1 to 1. ValueError for an input of another size."""
        expected = (self.cfg.in_channels, self.cfg.input_size, self.cfg.input_size)
        if x.shape[1:] != expected:
            raise ValueError(f"DyDiLiT: the input is {tuple(x.shape[1:])} and not {expected}")
        x = self.x_embedder(x) + self.pos_embed                             # (B, N, d)
        c = self.t_embedder(t) + self.y_embedder(y)                         # (B, d)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)                                          # (B, N, p p 2C)
        p, side, channels = self.cfg.patch_size, math.isqrt(x.shape[1]), 2 * self.cfg.in_channels
        x = x.view(-1, side, side, p, p, channels)                          # a grid of patches
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, p * side, p * side)

    def forward_with_cfg(self, x, t, y, scale):
        """Classifier-free guidance (Ho & Salimans 2022), noise = none + scale (class - none).

        A larger scale trades variety for fidelity, and 1 is the plain model. The variance is that
        of the class. All C channels are guided, whereas facebookresearch/DiT guides only the first
        three of its four latent channels. x, t, y as in forward. Returns (B, 2C, S, S)."""
        if scale == 1:
            return self(x, t, y)
        y = torch.cat([y, torch.full_like(y, self.cfg.n_classes)])          # with class, without
        both = at_least_float32(self(x.repeat(2, 1, 1, 1), t.repeat(2), y))
        with_class, without = both.chunk(2)                                 # (B, 2C, S, S) each
        c = self.cfg.in_channels
        noise = without[:, :c] + scale * (with_class[:, :c] - without[:, :c])
        return torch.cat([noise, with_class[:, c:]], dim=1)

    def fuse(self):
        """Fuses every re-parameterized convolution in place, for inference. Returns the model."""
        for module in self.modules():
            if isinstance(module, ReparamDWConv):
                module.fuse()
        return self


# The rungs of Table 4 in its order, as overrides of a DyDi-LiT model. Each adds one part.
LADDER = [
    ("Sana", dict(kernel="relu", dynamic_projection=False, differential="none", dwc=False)),
    ("+ focused kernel", dict(kernel="focused", dynamic_projection=False, differential="none",
                              dwc=False)),
    ("+ dynamic measure kernel", dict(dynamic_projection=False, differential="none", dwc=False)),
    ("+ dynamic projection module", dict(differential="none", dwc=False)),  # routes Q, K themselves
    ("+ token differential operator", dict(dwc=False)),                     # routes Q', K'
    ("+ re-parameterization", dict()),
]

MODELS = {  # The paper's sizes. Its DiT-B/2 and DiT-L/2 are smaller than facebookresearch's.
    "DiT-S/2": dict(attention="softmax", dim=384, depth=12, n_heads=6),
    "DiT-B/2": dict(attention="softmax", dim=512, depth=12, n_heads=8),
    "DiT-L/2": dict(attention="softmax", dim=768, depth=12, n_heads=12),
    "Sana-S/2": dict(dim=384, **LADDER[0][1]),
    "Sana-B/2": dict(dim=512, **LADDER[0][1]),
    "Sana-L/2": dict(dim=768, **LADDER[0][1]),
    "DyDi-LiT-S/2": dict(dim=384, n_projectors=3, n_gammas=9, n_lambdas=9),
    "DyDi-LiT-B/2": dict(dim=512, n_projectors=5, n_gammas=15, n_lambdas=15),
    "DyDi-LiT-L/2": dict(dim=768, n_projectors=7, n_gammas=21, n_lambdas=21),
    # A model that two CPU cores train in minutes, on 32x32 pixels.
    "DyDi-LiT-XS/4": dict(dim=96, depth=4, patch_size=4, image_size=32, vae_factor=1, in_channels=3,
                          n_classes=10),
}


def build_model(name, parts=block_parts, **overrides):
    """A DyDiLiT by its name in MODELS, any field of ModelConfig overridden. Else ValueError."""
    if name not in MODELS:
        raise ValueError(f"no model {name!r}; choose one of {', '.join(MODELS)}")
    return DyDiLiT(ModelConfig(**{**MODELS[name], **overrides}), parts)


def load_model(path, parts=block_parts):
    """The averaged model in train.py's model.pt or checkpoint.pt, in eval mode and on the CPU.

    Also returns all else in it, like about["data"]["names"]. ValueError for any other file."""
    try:
        about = torch.load(path, map_location="cpu", weights_only=True)
        model = DyDiLiT(ModelConfig(**about["model"]), parts).eval()
        model.load_state_dict(about.pop("ema"))
        if len(about["data"]["names"]) != model.cfg.n_classes:
            raise ValueError
        return model, about
    except OSError:
        raise
    except Exception:                   # pickle and zip have many kinds of error
        raise ValueError(f"{path}: not a model of train.py, or a damaged one") from None


# ---- The diffusion (Sec. 4.1) --------------------------------------------------------------------

def respaced_timesteps(n_timesteps, steps):
    """steps of 0..n_timesteps-1, evenly spaced with both ends; 1 is the last. Else ValueError."""
    if not 1 <= steps <= n_timesteps:
        raise ValueError(f"sampling steps: {steps} is not in 1..{n_timesteps}")
    if steps == 1:
        return [n_timesteps - 1]
    return [round(i * (n_timesteps - 1) / (steps - 1)) for i in range(steps)]


def gaussian_kl(mean1, log_var1, mean2, log_var2):
    """KL(N(mean1, var1) || N(mean2, var2)) per entry, in nats."""
    squared = (mean1 - mean2) ** 2 * (-log_var2).exp()
    return 0.5 * (log_var2 - log_var1 - 1 + (log_var1 - log_var2).exp() + squared)


def discretized_gaussian_log_likelihood(x, mean, log_std):
    """Log probability per entry that a Gaussian puts into x's bin, for 256 levels in [-1, 1].

    The end bins reach to infinity. The distribution function is DiT's tanh approximation."""
    def cdf(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
    upper = cdf((x - mean + 1 / 255) * (-log_std).exp())
    lower = cdf((x - mean - 1 / 255) * (-log_std).exp())
    p = torch.where(x < -0.999, upper, upper - lower)
    p = torch.where(x > 0.999, 1 - lower, p)
    return p.clamp_min(1e-12).log()


class GaussianDiffusion(nn.Module):
    """The noising process q, the loss that trains a model to undo it, and two samplers.

    Ho et al. 2020, with the learned variance and respacing of Nichol & Dhariwal 2021 and DDIM (Song
    et al. 2021). It is a module only so that `.to(device)` carries its tables.

    betas: (T,) float64, by default DiT's 1,000 from 1e-4 to 2e-2; timesteps: (T,), the model's
    timestep for each step of a respaced process."""

    def __init__(self, betas=None, timesteps=None):
        super().__init__()
        if betas is None:
            betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
        self.n_timesteps = len(betas)
        alpha_bar = (1 - betas).cumprod(0)
        alpha_bar_prev = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)   # of q(x_{t-1} | x_t, x_0)
        variance[0] = variance[1] if len(betas) > 1 else betas[0]   # it is 0, which has no log
        tables = dict(
            sqrt_alpha_bar=alpha_bar.sqrt(), sqrt_one_minus=(1 - alpha_bar).sqrt(),
            alpha_bar_prev=alpha_bar_prev, log_beta=betas.log(), log_posterior=variance.log(),
            posterior_x0=betas * alpha_bar_prev.sqrt() / (1 - alpha_bar),
            posterior_xt=(1 - alpha_bar_prev) * (1 - betas).sqrt() / (1 - alpha_bar))
        for name, table in tables.items():                          # from float64 to float32
            self.register_buffer(name, table.float(), persistent=False)
        timesteps = torch.arange(len(betas)) if timesteps is None else timesteps
        self.register_buffer("timesteps", timesteps, persistent=False)
        self._alpha_bar = alpha_bar

    def respace(self, steps):
        """The process that visits only `steps` of the timesteps, with the same marginals there."""
        timesteps = respaced_timesteps(self.n_timesteps, steps)
        alpha_bar = self._alpha_bar[timesteps]
        betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        return GaussianDiffusion(betas, self.timesteps[timesteps]).to(self.timesteps.device)

    def _at(self, name, t):
        """The table's entries at t (B,), (B, 1, 1, 1)."""
        return getattr(self, name)[t].view(-1, 1, 1, 1)

    def q_sample(self, x0, t, noise):
        """q(x_t | x_0): x0 (B, C, S, S) with the noise of timestep t (B,) added."""
        return self._at("sqrt_alpha_bar", t) * x0 + self._at("sqrt_one_minus", t) * noise

    def posterior_mean(self, x0, x_t, t):
        """The mean of q(x_{t-1} | x_t, x_0), (B, C, S, S)."""
        return self._at("posterior_x0", t) * x0 + self._at("posterior_xt", t) * x_t

    def predict_x0(self, x_t, t, noise):
        """The x_0 from which this noise leads to x_t, (B, C, S, S)."""
        return (x_t - self._at("sqrt_one_minus", t) * noise) / self._at("sqrt_alpha_bar", t)

    def p_mean_variance(self, output, x_t, t, clip_x0=False):
        """The model's step p(x_{t-1} | x_t), from its output (B, 2C, S, S) at x_t.

        Returns mean, log variance and predicted x_0, (B, C, S, S) each. clip_x0: to [-1, 1]."""
        noise, place = output.chunk(2, dim=1)
        low, high = self._at("log_posterior", t), self._at("log_beta", t)   # the variance's bounds
        log_variance = low + (place + 1) / 2 * (high - low)
        x0 = self.predict_x0(x_t, t, noise)
        x0 = x0.clamp(-1, 1) if clip_x0 else x0
        return self.posterior_mean(x0, x_t, t), log_variance, x0

    def variational_term(self, output, x0, x_t, t, clip_x0=False):
        """Timestep t's term of the variational bound, in bits per dimension, (B,)."""
        mean, log_variance, _ = self.p_mean_variance(output, x_t, t, clip_x0)
        true_mean, true_log_variance = self.posterior_mean(x0, x_t, t), self._at("log_posterior", t)
        kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance).mean((1, 2, 3))
        decoder = -discretized_gaussian_log_likelihood(x0, mean, log_variance / 2).mean((1, 2, 3))
        return torch.where(t == 0, decoder, kl) / math.log(2)

    def losses(self, model, x0, y, t=None, noise=None):
        """The hybrid loss of improved DDPM, and its two terms, a dictionary of (B,) tensors.

        "simple" is the mean squared error of the noise. "variational" trains the variance alone,
        because the predicted noise is held fixed in it. "loss" is their sum.

        model(x_t, t, y) -> (B, 2C, S, S); x0: (B, C, S, S); y: (B,); t, noise: random if None."""
        t = torch.randint(self.n_timesteps, (len(x0),), device=x0.device) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        x_t = self.q_sample(x0, t, noise)
        output = model(x_t, self.timesteps[t], y).float()
        predicted, place = output.chunk(2, dim=1)
        simple = (predicted - noise).square().mean((1, 2, 3))
        variational = self.variational_term(torch.cat([predicted.detach(), place], 1), x0, x_t, t)
        return dict(loss=simple + variational, simple=simple, variational=variational)

    @torch.no_grad()
    def sample(self, model, x, steps=250, sampler="ddpm", clip_x0=False,
               randn_like=torch.randn_like, progress=True):
        """Turns noise into samples.

        model(x_t, t) -> (B, 2C, S, S), its classes bound already; x: (B, C, S, S), standard normal;
        steps: 1..T; sampler: "ddpm", ancestral with the learned variance, or "ddim", deterministic;
        clip_x0: for pixels in [-1, 1]; randn_like: draws the noise of "ddpm", (B, C, S, S).
        Returns (B, C, S, S). ValueError for another sampler or number of steps."""
        if sampler not in ("ddpm", "ddim"):
            raise ValueError(f"sampler {sampler!r} is not one of ddpm, ddim")
        spaced = self.respace(steps)
        for i in tqdm(reversed(range(steps)), "sampling", steps, leave=False, disable=not progress):
            t = torch.full((len(x),), i, device=x.device)
            output = model(x, spaced.timesteps[t]).float()
            mean, log_variance, x0 = spaced.p_mean_variance(output, x, t, clip_x0)
            if sampler == "ddim":
                prev = spaced._at("alpha_bar_prev", t)
                noise = (x - spaced._at("sqrt_alpha_bar", t) * x0) / spaced._at("sqrt_one_minus", t)
                x = prev.sqrt() * x0 + (1 - prev).sqrt() * noise
            elif i > 0:
                x = mean + (log_variance / 2).exp() * randn_like(x)
            else:
                x = mean
        return x
