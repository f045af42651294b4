"""Five other answers to the question what to do about N^2, in the parts of a dydilit.Block.

build_model("DyDi-LiT-S/2", parts=NEIGHBOURS["edit"]) builds EDiT in the shell that all models
share, which initializes every linear layer as DiT does. Every attention maps tokens (B, N, d) to
tokens (B, N, d): B images, N patches row by row, h heads. ladder.py trains these systems.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import dydilit


def as_image(x):
    """Tokens on their square grid. (B, N, C) -> (B, C, side, side)."""
    side = math.isqrt(x.shape[1])
    return x.unflatten(1, (side, side)).permute(0, 3, 1, 2)         # fails where N is no square


def as_tokens(x):
    """A grid's tokens, row by row. (B, C, rows, columns) -> (B, rows x columns, C)."""
    return x.flatten(2).transpose(1, 2)


# ---- PixArt-Sigma (Chen et al. 2024, arXiv 2403.04692): softmax attention to fewer keys ----------

class KVCompressedAttention(nn.Module):
    """softmax(Q f(K)^T / sqrt(d)) f(V). f makes one token of a square of tokens, ratio x ratio.

    f is a depth-wise convolution, which starts as the square's mean, and a LayerNorm. Source:
    AttentionKVCompress of the released code, which compresses 2 x 2 and a trained model. That the
    DyDi-LiT paper compresses 4 x 4 follows from its GFLOPs, see cost.py."""

    def __init__(self, dim, n_heads, ratio):
        super().__init__()
        self.n_heads = n_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.compress = nn.Conv2d(dim, dim, ratio, stride=ratio, groups=dim)
        nn.init.constant_(self.compress.weight, 1 / ratio ** 2)
        nn.init.zeros_(self.compress.bias)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)                              # (B, N, d) each
        k, v = (self.norm(as_tokens(self.compress(as_image(t)))) for t in (k, v))
        q, k, v = (dydilit.split_heads(t, self.n_heads) for t in (q, k, v))     # (B, h, ., d/h)
        return self.proj(dydilit.merge_heads(dydilit.softmax_attention(q, k, v)))   # (B, N, d)


# ---- EDiT (Becker et al. 2025, arXiv 2503.16726): linear attention, local queries, fewer keys ----

class LinearCompressedAttention(nn.Module):
    """Linear attention (Eq. 4). Conv_K and Conv_V, of stride 2, make N / 4 keys and values.

        Q = ReLU(W_Q (X + Conv_1x1(LeakyReLU(GroupNorm(Conv_3x3(X))))))     "ConvFusion"
        K = ReLU(Conv_K(W_K X)),  V = Conv_V(W_V X)                         "spatial compressor"

    Source: the paper's equations as a published summary (papernotes.org) prints them; no code was
    released. That ConvFusion is d / 2 wide inside follows from the DyDi-LiT paper's GFLOPs. Our
    choices: GroupNorm has 4 groups, Q, K, V no bias, and Conv_K and Conv_V start as means."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.narrow = nn.Conv2d(dim, dim // 2, 3, padding=1)
        self.norm = nn.GroupNorm(4, dim // 2)
        self.widen = nn.Conv2d(dim // 2, dim, 1)
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.compress = nn.Conv2d(2 * dim, 2 * dim, 3, stride=2, padding=1, groups=2 * dim)  # K, V
        nn.init.constant_(self.compress.weight, 1 / 9)
        nn.init.zeros_(self.compress.bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        local = self.widen(F.leaky_relu(self.norm(self.narrow(as_image(x)))))   # (B, d, side, .)
        q = F.relu(self.q(x + as_tokens(local)))                                # (B, N, d)
        k, v = as_tokens(self.compress(as_image(self.kv(x)))).chunk(2, dim=-1)  # (B, N/4, d) each
        q, k, v = (dydilit.split_heads(t, self.n_heads) for t in (q, F.relu(k), v))
        return self.proj(dydilit.merge_heads(dydilit.linear_attention(q, k, v)))    # (B, N, d)


# ---- DiG (Zhu et al. 2024, arXiv 2405.18428): gated linear attention, four directions ------------

def gated_linear_attention(q, k, v, log_decay, chunk=16):
    """A memory that forgets (Yang et al. 2024, arXiv 2312.06635), token after token:

        S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t,    o_t = q_t S_t

    With b_t the sum of log_decay from a chunk's first token to token t, and S the memory before the
    chunk, N / chunk steps are enough:

        o_t = (q_t exp(b_t)) S + sum over j <= t of ((q_t exp(b_t)) (k_j exp(-b_j))^T) v_j

    exp(-b_j) must stay finite, so -log_decay may be at most 80 / chunk.
    q, k, log_decay: (..., N, d_k); v: (..., N, d_v). Returns (..., N, d_v), at least float32."""
    with torch.autocast(q.device.type, enabled=False):
        n, parts = q.shape[-2], [dydilit.at_least_float32(t) for t in (q, k, v, log_decay)]
        q, k, v, log_decay = (F.pad(t, (0, 0, 0, -n % chunk)).unflatten(-2, (-1, chunk))
                              for t in parts)                       # (..., N/chunk, chunk, d)
        b = log_decay.cumsum(dim=-2)                                # how much token t forgot
        last = b[..., -1:, :]                                       # (..., N/chunk, 1, d_k)
        q = q * b.exp()
        within = (q @ (k * (-b).exp()).transpose(-2, -1)).tril() @ v    # (..., chunk, d_v)
        learned = (k * (last - b).exp()).transpose(-2, -1) @ v      # (..., N/chunk, d_k, d_v)
        kept = last.exp().transpose(-2, -1)                         # (..., N/chunk, d_k, 1)
        memory, memories = torch.zeros_like(learned[..., 0, :, :]), []
        for i in range(learned.shape[-3]):
            memories.append(memory)                                 # as it is before chunk i
            memory = kept[..., i, :, :] * memory + learned[..., i, :, :]
        out = within + q @ torch.stack(memories, dim=-3)
        return out.flatten(-3, -2)[..., :n, :]                      # (..., N, d_v)


def scan_order(n, direction):
    """The order, (n,), in which a square grid is read: 0 by rows, 2 by columns, 1 and 3 back."""
    grid = torch.arange(n).view(math.isqrt(n), -1)
    order = (grid.T if direction >= 2 else grid).flatten()
    return order.flip(0) if direction % 2 else order


class GatedLinearAttention(nn.Module):
    """gated_linear_attention, then RMSNorm(O) * SiLU(X W_G), read in one of four directions.

    The decay is sigmoid(X W_1 W_2 + b)^(1/16), with W_1 only 16 wide, but at least exp(-80 / 16).
    Source: models_dig.py and module_dig.py of hustvl/DiG. There, tokens stay flipped or transposed
    between blocks and after the last one, and the linear layers start smaller (gain 2^-2.5)."""

    def __init__(self, dim, n_heads, direction):
        super().__init__()
        self.n_heads, self.direction = n_heads, direction
        self.q, self.k = (nn.Linear(dim, dim // 2, bias=False) for _ in range(2))
        self.v, self.gate = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.decay = nn.Sequential(nn.Linear(dim, 16, bias=False), nn.Linear(16, dim // 2))
        self.norm = nn.RMSNorm(dim // n_heads, eps=1e-6)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        order = scan_order(x.shape[1], self.direction).to(x.device)                 # (N,)
        x = x[:, order]                                                             # (B, N, d)
        log_decay = (F.logsigmoid(self.decay(x)) / 16).clamp_min(-80 / 16)          # (B, N, d/2)
        q, k, v, log_decay = (dydilit.split_heads(t, self.n_heads)                  # (B, h, N, .)
                              for t in (self.q(x), self.k(x), self.v(x), log_decay))
        q = q / math.sqrt(q.shape[-1])
        out = self.norm(gated_linear_attention(q, k, v, log_decay))             # (B, h, N, d/h)
        out = dydilit.merge_heads(out) * F.silu(self.gate(x))                       # (B, N, d)
        return self.proj(out)[:, order.argsort()]                                   # row by row


class LocalConv(nn.Module):
    """What follows each of DiG's blocks: a depth-wise convolution that starts as the identity."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        nn.init.dirac_(self.conv.weight, groups=dim)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        return as_tokens(self.conv(as_image(x)))


class SwiGLU(nn.Module):
    """DiG's feed-forward network, (SiLU(X W_1) * X W_2) W_3."""

    def __init__(self, dim):
        super().__init__()
        hidden = math.ceil(dim * 8 // 3 / 256) * 256        # rounded up as in the released code
        self.expand = nn.Linear(dim, 2 * hidden, bias=False)
        self.contract = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        gate, x = self.expand(x).chunk(2, dim=-1)                           # (B, N, 8/3 d) each
        return self.contract(F.silu(gate) * x)


# ---- MoH-DiT (Jin et al. 2024, arXiv 2410.11842): heads as experts -------------------------------

class MixtureOfHeadAttention(nn.Module):
    """Softmax attention whose heads H_i are added with weights that each token chose:

        O = sum_i g_i H_i W_i,  with  g = [2 a_1 s p_S, 2 a_2 r p_R]

    a = softmax(X W_0) shares the weight out between two kinds of heads. All s shared heads are on,
    weighted by p_S = softmax(X W_S). Of the routed heads those r with the largest entries of
    softmax(X W_R) are on; p_R is these entries, divided by their sum. Where all heads are shared,
    g = s p_S. Source: models.py of SkyworkAI/MoH, without the loss that balances the load."""

    def __init__(self, dim, n_heads, shared, top):
        super().__init__()
        self.n_heads, self.shared, self.top = n_heads, shared, top
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.shared_router = nn.Linear(dim, shared, bias=False)             # W_S
        if shared < n_heads:
            self.kinds = nn.Linear(dim, 2, bias=False)                      # W_0
            self.router = nn.Linear(dim, n_heads - shared, bias=False)      # W_R

    def weights(self, x):
        """g, what each token makes of each head. (B, N, d) -> (B, N, h), at least float32."""
        p_shared = self.shared_router(x).softmax(dim=-1) * self.shared      # (B, N, s)
        if self.shared == self.n_heads:
            return p_shared
        a = 2 * self.kinds(x).softmax(dim=-1)                               # (B, N, 2)
        p = self.router(x).softmax(dim=-1)                                  # (B, N, h - s)
        on = torch.zeros_like(p).scatter(-1, p.topk(self.top, dim=-1).indices, 1)
        p = p * on / (p * on).sum(dim=-1, keepdim=True) * self.top
        return torch.cat([a[..., :1] * p_shared, a[..., 1:] * p], dim=-1)

    def forward(self, x):
        q, k, v = (dydilit.split_heads(t, self.n_heads) for t in self.qkv(x).chunk(3, dim=-1))
        heads = dydilit.softmax_attention(q, k, v)                          # (B, h, N, d/h)
        heads = heads * self.weights(x).transpose(1, 2).unsqueeze(-1)       # (B, h, N, 1) each
        return self.proj(dydilit.merge_heads(heads))                        # (B, N, d)


# ---- LiT (Wang et al. 2025, arXiv 2501.12976): linear attention with few heads -------------------

class FewHeadLinearAttention(nn.Module):
    """Linear attention (Eq. 4) with ReLU and few heads, plus a depth-wise 5x5 convolution of V.

    The heads share the convolution's kernels. Sources: a published summary of the paper
    (papernotes.org), and vision_transformer_linear1.py of techmonsterwang/LINA, a later project of
    its first author. LiT learns from a trained DiT. Ours is its row without that, as in Table 3."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads, width = n_heads, dim // n_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(width, width, 5, padding=2, groups=width)

    def forward(self, x):
        q, k, v = (dydilit.split_heads(t, self.n_heads) for t in self.qkv(x).chunk(3, dim=-1))
        out = dydilit.linear_attention(F.relu(q), F.relu(k), v)             # (B, h, N, d/h)
        local = as_tokens(self.dwc(as_image(v.flatten(0, 1))))              # (B h, N, d/h)
        return self.proj(dydilit.merge_heads(out + local.view_as(out)))


def lit_heads(dim):
    """LiT's number of heads, instead of the configuration's: 2 in its S, 4 in its XL."""
    return max(2, dim // 256)


# ---- The blocks' parts: (configuration, number of the block) -> dydilit.Block's parts -----------

def pixart(cfg, i):
    """DiT's attention in the first half of the blocks, fewer keys in the second: at least 16."""
    if i < cfg.depth / 2:
        return dydilit.SoftmaxAttention(cfg.dim, cfg.n_heads), dydilit.Mlp(cfg.dim)
    ratio = 4 if cfg.input_size // cfg.patch_size >= 16 else 2
    return KVCompressedAttention(cfg.dim, cfg.n_heads, ratio), dydilit.Mlp(cfg.dim)


def moh(cfg, i):
    """As in the released S/2 with 90 % of its heads on: in two thirds of the blocks half of the
    heads are shared, and of the others two thirds are on. In the last third all are shared."""
    if cfg.n_heads < 5:                 # of a single head that is on, p_R is 1, and nothing learns
        raise ValueError(f"MoH-DiT: n_heads={cfg.n_heads} is not at least 5")
    shared = cfg.n_heads // 2 if i < round(cfg.depth * 2 / 3) else cfg.n_heads
    top = round((cfg.n_heads - shared) * 2 / 3)
    return MixtureOfHeadAttention(cfg.dim, cfg.n_heads, shared, top), dydilit.Mlp(cfg.dim)


NEIGHBOURS = {
    "pixart": pixart,
    "edit": lambda cfg, i: (LinearCompressedAttention(cfg.dim, cfg.n_heads), dydilit.Mlp(cfg.dim)),
    "dig": lambda cfg, i: (GatedLinearAttention(cfg.dim, cfg.n_heads, i % 4), SwiGLU(cfg.dim),
                           LocalConv(cfg.dim)),
    "moh": moh,
    "lit": lambda cfg, i: (FewHeadLinearAttention(cfg.dim, lit_heads(cfg.dim)),
                           dydilit.Mlp(cfg.dim)),
}
