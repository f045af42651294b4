"""Recall: tasks that need attention, the arms that are compared on them, and their training.

A set has tokens of two kinds. A pair is a key and one of 16 values. A query is a key alone, and the
model must say which value its pair has. Keys are fresh random vectors in every set, so nothing can
be memorized. Tokens have no positions and there is no convolution, so attention alone can bring a
query to its pair. Each task is hard in the way that one part is meant for. See experiment.py.
"""
import functools
import zlib

import torch
import torch.nn as nn
import torch.nn.functional as F

import dydilit
from lab.eq8 import Divided
from lab.neighbours import NEIGHBOURS

KEY, VALUES, TYPES, WIDTH = 16, 16, 3, 32           # numbers of a key; values; token types; d
PAIRS = dict(sharpness=16, interference=8, heterogeneity=16)                # of each task's sets


# ---- The tasks --------------------------------------------------------------------------------

def rotations():
    """A rotation of keys for each token type, (TYPES, KEY, KEY). They belong to the task."""
    noise = torch.randn(TYPES, KEY, KEY, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(noise)[0]


def make_sets(task, sets, pairs, generator):
    """Random sets of a task. Each has its pairs first, then one query for each pair.

    sharpness: a query is its key with noise of half the key's size. Near keys must be told apart.
    interference: all keys of a set share a vector as long as themselves, a new one for each set.
    heterogeneity: tokens have one of three types. Each type's keys are turned by its own rotation.

    Returns tokens (sets, 2 pairs, KEY + VALUES + TYPES) and the queries' values (sets, pairs)."""
    device = torch.get_default_device()
    with torch.device("cpu"):                               # the same sets everywhere
        keys = torch.randn(sets, pairs, KEY, generator=generator)
        queries = keys
        if task == "sharpness":
            queries = keys + 0.5 * torch.randn(sets, pairs, KEY, generator=generator)
        keys = torch.cat([keys, queries], dim=1)                            # (sets, 2 pairs, KEY)
        types = torch.zeros(sets, 2 * pairs, TYPES)
        if task == "interference":
            keys = keys + torch.randn(sets, 1, KEY, generator=generator)
        elif task == "heterogeneity":
            drawn = torch.randint(TYPES, (sets, 2 * pairs), generator=generator)
            types = F.one_hot(drawn, TYPES).float()
            keys = (keys.unsqueeze(-2) @ rotations()[drawn]).squeeze(-2)
        values = torch.randint(VALUES, (sets, pairs), generator=generator)
        shown = torch.cat([F.one_hot(values, VALUES), torch.zeros(sets, pairs, VALUES)], dim=1)
        tokens = torch.cat([keys, shown, types], dim=-1)
    return tokens.to(device), values.to(device)


# ---- The arms ---------------------------------------------------------------------------------

def average(q, k, v):
    """Linear attention without Eq. 4's denominator, divided by N like Eq. 8 in dydilit.py."""
    return dydilit.attention_product(q, k, v) / k.shape[-2]


class Each(nn.Module):
    """A function of each token set by itself, in the place of a measure kernel."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *sets):
        return [self.function(z) for z in sets]


class Plain(nn.Module):
    """Attention without a differential between projections, (B, N, d) -> (B, N, d).

    kernel: a module, (Q, K) -> (Q, K). mix: the attention itself, of Q, K and V. routed: Q and K
    come from a dynamic projection. inner: their width and that of V."""

    def __init__(self, kernel, mix=average, heads=1, routed=False, inner=WIDTH):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * inner, bias=False)
        self.projection = dydilit.DynamicProjection(WIDTH, 3) if routed else None
        self.kernel, self.mix, self.heads = kernel, mix, heads
        self.proj = nn.Linear(inner, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.projection is not None:
            q, k = self.projection(x)
        q, k, v = (dydilit.split_heads(z, self.heads) for z in (*self.kernel(q, k), v))
        return self.proj(dydilit.merge_heads(self.mix(q, k, v)))


def dynamic(n_gammas=9, width=WIDTH):
    return dydilit.DynamicMeasureKernel(width, n_gammas, 2)


def differential(n_projectors=3, form="length", held=None, kernel=None):
    """DyDiLA without its convolution. form: of Eq. 8, see eq8.py. held: a fixed lambda."""
    config = dydilit.ModelConfig(dim=WIDTH, n_projectors=n_projectors, dwc=False)
    attention = dydilit.DyDiLA(config)
    Divided.of(attention.differential, form)
    attention.kernel = kernel or attention.kernel
    if held is not None:
        attention.differential.lambdas.requires_grad_(False).fill_(held)
    return attention


class Negative(nn.Module):
    def forward(self, x):
        return -x.abs()


def adding():
    """The differential with lambda kept negative, so that it adds and no weight is negative."""
    attention = differential()
    nn.utils.parametrize.register_parametrization(attention.differential, "lambdas", Negative())
    return attention


def random_routes():
    attention = Plain(dynamic(), routed=True)
    for router in (attention.projection.router_q, attention.projection.router_k):
        router.requires_grad_(False)
    return attention


class Shuffled(nn.Module):
    """An attention that gets its tokens in a new random order each time, (B, N, d) -> (B, N, d).

    Otherwise a convolution or a scan would find a query's pair by its place."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        order = torch.rand(x.shape[:2], device=x.device).argsort(dim=1).unsqueeze(-1)   # (B, N, 1)
        out = self.attention(torch.take_along_dim(x, order, dim=1))
        return torch.take_along_dim(out, order.argsort(dim=1), dim=1)


def neighbour(parts):
    """The attention of one of notebook 12's systems. Its tokens lie on a square, row by row.

    PixArt-Sigma's is that of its last blocks, which make one key of four tokens."""
    config = dydilit.ModelConfig(image_size=128, dim=WIDTH,
                                 n_heads=8 if parts is NEIGHBOURS["moh"] else 1)
    block = config.depth - 1 if parts is NEIGHBOURS["pixart"] else 0
    return Shuffled(parts(config, block)[0])


ARMS = {    # the name of each arm, and what makes its attention, (B, N, d) -> (B, N, d)
    "no attention": lambda: dydilit.Mlp(WIDTH),
    "softmax": lambda: Plain(Each(nn.Identity()), dydilit.softmax_attention),
    "softmax, 4 heads": lambda: Plain(Each(nn.Identity()), dydilit.softmax_attention, heads=4),
    "Sana": lambda: Plain(Each(F.relu), dydilit.linear_attention),          # with the denominator
    "ReLU": lambda: Plain(Each(F.relu)),                                    # from here on without
    "signed": lambda: Plain(Each(nn.Identity())),
    "fixed power": lambda: Plain(Each(lambda z: dydilit.focused_kernel(z, 3.0))),
    "one power": lambda: Plain(dynamic(1)),
    "dynamic": lambda: Plain(dynamic()),
    "dynamic, equal cost": lambda: Plain(dynamic(width=51), inner=51),      # as DyDiLA's
    "routed": lambda: Plain(dynamic(), routed=True),
    "random routes": random_routes,
    "one projector": lambda: differential(1),
    "DyDiLA": differential,
    "ReLU differential": lambda: differential(kernel=Each(F.relu)),
    "lambda 0": lambda: differential(held=0.0),
    "adding": adding,
    "RMS": lambda: differential(form="rms"),
    "RMS, lambda 0": lambda: differential(form="rms", held=0.0),
    **{name: functools.partial(neighbour, parts) for name, parts in NEIGHBOURS.items()},
}


# ---- The model, its training and its measures -------------------------------------------------

class Model(nn.Module):
    """One block: LayerNorm, attention, residual. A linear map then reads off the value's scores.

    Matrices are drawn by their names and the seed, so arms share those that they have in common."""

    def __init__(self, arm, seed):
        super().__init__()
        torch.manual_seed(seed)                             # for the biases
        self.embed = nn.Linear(KEY + VALUES + TYPES, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attention, self.head = ARMS[arm](), nn.Linear(WIDTH, VALUES)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                for matrix in weight.data.view(-1, *weight.shape[-2:]):     # a bank has several
                    nn.init.xavier_uniform_(matrix)

    def forward(self, tokens):
        """tokens: of make_sets. Returns scores for the queries' values, (sets, pairs, VALUES)."""
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x))
        return self.head(x[:, x.shape[1] // 2:])


def train_model(task, arm, seed, rate, steps=800):
    """A Model trained on 32 fresh sets in each step, while the rate falls to zero."""
    model, generator = Model(arm, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        tokens, values = make_sets(task, 32, PAIRS[task], generator)
        loss = F.cross_entropy(model(tokens).transpose(1, 2), values)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model, task, seed, pairs, sets=256):
    """The share of queries whose value has the largest score, on sets not seen in training."""
    generator = torch.Generator().manual_seed(10 ** 6 + seed)
    tokens, values = make_sets(task, sets, pairs, generator)
    return (model(tokens).argmax(dim=-1) == values).float().mean().item()


@torch.no_grad()
def weight_on_target(model, task, seed):
    """The share of a query's |attention| that its pair has, a mean. nan where there is no one map.

    Attention is linear in V. With the identity as V, its output is the map of its weights."""
    attention, n = model.attention, 2 * PAIRS[task]
    if not isinstance(attention, (Plain, dydilit.DyDiLA)) or getattr(attention, "heads", 1) > 1:
        return float("nan")
    seen = []

    def identity_as_v(module, inputs, out):
        q, k, v = out.chunk(3, dim=-1)
        return torch.cat([q, k, torch.eye(n, v.shape[-1]).expand_as(v)], dim=-1)

    hooks = [attention.qkv.register_forward_hook(identity_as_v),
             attention.proj.register_forward_pre_hook(lambda module, x: seen.append(x[0]))]
    model(make_sets(task, 256, n // 2, torch.Generator().manual_seed(10 ** 6 + seed))[0])
    for hook in hooks:
        hook.remove()
    maps = seen[0][:, n // 2:, :n].abs()                                    # (sets, pairs, n)
    return (maps.diagonal(dim1=1, dim2=2) / maps.sum(dim=-1)).nanmean().item()
