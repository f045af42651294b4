"""What the notebooks share: the check of answers, timing, and the course's one example.

The example is a photograph cut into tokens, with one query on the face, and who attends to whom. Its
projections are random and shared by Q and K, so that q k^T measures how alike two patches look.
Nothing in softmax, ReLU and focused attention is trained. What lessons 2 to 5 add is trained here,
for a second or two, on a small version of the model's own task: clean tokens from noisy ones.
"""
import functools
import math  # noqa: F401
import pathlib
import statistics
import sys
import time
import types
import weakref

import matplotlib.pyplot as plt  # noqa: F401
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib import cbook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import dydilit  # noqa: E402
import train  # noqa: E402
from lab import cost  # noqa: E402, F401
from lab.eq8 import Divided  # noqa: E402
from lab.measures import row_entropy, row_variance  # noqa: E402, F401

if torch.cuda.is_available():
    torch.set_default_device("cuda")        # every tensor that a notebook makes is made there
torch.manual_seed(0)                        # a notebook run from the top draws the same numbers every time


def check(number, answer, expected, tolerance=1e-3):
    """Says whether an exercise's answer is right. answer, expected: numbers, tensors, strings or lists; ... is none."""
    if answer is ...:
        return print(f"Exercise {number}: not answered yet. Put your answer in place of the ... above.")
    try:
        right = (answer == expected if isinstance(expected, str) else
                 bool(np.allclose(*(torch.as_tensor(x).cpu() for x in (answer, expected)), rtol=tolerance, atol=tolerance * 1e-2)))
    except (TypeError, ValueError):         # another shape, or no number at all
        right = False
    print(f"Exercise {number}: " + ("right." if right else "not right yet."))


def median_ms(functions, repeats=7):
    """Median milliseconds of each of {name: function}, called in turn so that a busy machine slows all of them."""
    times = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:                           # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


class Allocations(TorchDispatchMode):
    """Bytes of the tensors made within this context and still alive: now, and at the peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for storage in storages((args, kwargs)):
            self.known.add(storage)         # was there before, or was counted when it was made
        out = operation(*args, **(kwargs or {}))
        for storage in storages(out):
            if storage not in self.known:   # neither a view nor an in-place result
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, nbytes):
        self.now -= nbytes


def storages(tree):
    """The memory of all tensors in nested lists and dictionaries."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


SIDE, WIDTH, NOISE = 16, 64, 0.5            # patches along a side; d; standard deviation of the noise on a feature
QUERY = (5, 7)                              # row and column of the query's patch, on the face beside the nose
NAMES = ["softmax", "ReLU", "focused", "dynamic", "differential", "convolution"]    # in the order of the lessons
TRAINED = [*NAMES[3:], "projected"]         # projected: routed projections as Q, K themselves, the differential's control


def photo(size=64):
    """A photograph that matplotlib brings along, Rear Admiral Grace Hopper. (1, 3, size, size) in [-1, 1]."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return train.pixels(train.read_image(file.name, size)[None]).to(torch.get_default_device())


def features(picture):
    """Twelve numbers for each of 256 patches: colour and contrast (3 channels each), of the patch and around it.

    picture: (1, 3, 64, 64). Returns (256, 12), each feature centred and scaled, then each token brought to one length.
    """
    patches = F.unfold(picture, kernel_size=4, stride=4).view(3, 16, SIDE, SIDE)
    own = torch.cat([patches.mean(dim=1), patches.std(dim=1)])                          # (6, 16, 16)
    around = F.avg_pool2d(F.pad(own[None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0]
    x = torch.cat([own, around]).flatten(1).T                                           # (256, 12)
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    return x.shape[1] ** 0.5 * F.normalize(x, dim=1)                                    # as after a LayerNorm


def example(seed=0):
    """The photograph as tokens, with random weights of the seed. A namespace of

    picture (3, 128, 128) in [-1, 1], to look at; features (256, 12) and tokens x (256, 64), to compute with;
    embed (12, 64), w_qk and w_v (64, 64): the embedding, and the projections of Q and K (one for both) and of V;
    q, k, v (256, 64); query, the query token's number; face, sky: (256,) bool, the tokens on either.
    """
    with torch.device("cpu"), torch.random.fork_rng():      # the same weights everywhere, and nobody's seed disturbed
        torch.manual_seed(seed)
        embed = torch.randn(12, WIDTH) / 12 ** 0.5
        w_qk, w_v = (torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0] for _ in range(2))   # they keep lengths and angles
        face, sky = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
        face[3:9, 5:11], sky[:9, 12:] = True, True
        face[8, [5, 10]] = False                            # the corners of the chin
    embed, w_qk, w_v, face, sky = (t.to(torch.get_default_device()) for t in (embed, w_qk, w_v, face, sky))
    seen = features(photo(64))
    x = seen @ embed
    return types.SimpleNamespace(picture=photo(128)[0], features=seen, tokens=x, embed=embed, w_qk=w_qk, w_v=w_v,
                                 q=x @ w_qk, k=x @ w_qk, v=x @ w_v, query=QUERY[0] * SIDE + QUERY[1],
                                 face=face.flatten(), sky=sky.flatten(), seed=seed)


class Attention(nn.Module):
    """One kind of attention on the example's projections, from the library's parts. name: of NAMES or TRAINED."""

    def __init__(self, name, ex):
        super().__init__()
        self.name, self.w_qk = name, ex.w_qk
        if name in TRAINED:
            self.kernel = dydilit.DynamicMeasureKernel(WIDTH, 5, 2 if name in ("dynamic", "projected") else 4)
        if name in TRAINED[1:]:
            self.projection = dydilit.DynamicProjection(WIDTH, 3)
        if name in ("differential", "convolution"):
            # Nothing follows that could learn the size of the output, so it has to be an average of the values.
            self.differential = Divided.of(dydilit.TokenDifferential(WIDTH, 5), "mass")
        if name == "convolution":
            self.dwc = dydilit.ReparamDWConv(WIDTH)
            for weight in self.dwc.parameters():            # small beside the attention, to begin with
                weight.data *= 0.1

    def forward(self, x, v):
        """x: (B, N, d) tokens; v: (B, N, e) values. Returns (B, N, e)."""
        q = k = x @ self.w_qk
        if self.name == "softmax":
            return dydilit.softmax_attention(q, k, v)
        if self.name == "ReLU":
            return dydilit.linear_attention(q.relu(), k.relu(), v)
        if self.name == "focused":
            return dydilit.linear_attention(dydilit.focused_kernel(q, 3.0), dydilit.focused_kernel(k, 3.0), v)
        if self.name == "dynamic":
            return dydilit.linear_attention(*self.kernel(q, k), v)
        if self.name == "projected":
            return dydilit.linear_attention(*self.kernel(*self.projection(x)), v)
        q_red, k_red = self.projection(x)
        out = self.differential(*self.kernel(q, q_red, k, k_red), v)
        if self.name == "convolution":
            weights = self.dwc.kernel()                     # (d, 1, 3, 3); the identity's columns get the channels' mean
            out = out + dydilit.depthwise(v, weights if v.shape[-1] == WIDTH else
                                          weights.mean(dim=0, keepdim=True).expand(v.shape[-1], -1, -1, -1))
        return out


def noisy(ex, copies, sigma=NOISE):
    """The example's tokens with noise on their features. (copies, 256, 64)."""
    return (ex.features + sigma * torch.randn(copies, *ex.features.shape, device=ex.features.device)) @ ex.embed


def attention(name, seed=0, steps=200):
    """An Attention, trained if it has weights to train. The same name gives the same module again."""
    return trained(name, seed, steps)


@functools.cache
def trained(name, seed, steps):
    """attention's work, done once for each of its arguments."""
    ex = example(seed)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        module = Attention(name, ex)
        if name in TRAINED:
            optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
            for _ in range(steps):
                x = noisy(ex, copies=2)
                loss = (module(x, x @ ex.w_v) - ex.v).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return module.requires_grad_(False)


def attention_maps(*names, seed=0):
    """{name: (256, 256)}, a row per query. With the identity as values, an attention's output is its map."""
    ex = example(seed)
    identity = torch.eye(SIDE * SIDE, device=ex.tokens.device)[None]
    with torch.no_grad():
        return {name: attention(name, seed)(ex.tokens[None], identity)[0] for name in names}


def shares(row, ex):
    """The strip's numbers of one query's weights, row (256,), a namespace of

    face, sky: what they have of all weight above zero; negative: the part of |weight| that lies below zero;
    net: what the face has of the sum of all weights; entropy: of |weight|, from 0 to 1.
    """
    above = row.clamp_min(0) / row.clamp_min(0).sum()
    negative = row.clamp_max(0).sum().abs() / row.abs().sum()
    return types.SimpleNamespace(face=above[ex.face].sum().item(), sky=above[ex.sky].sum().item(), negative=negative.item(),
                                 net=(row[ex.face].sum() / row.sum()).item(), entropy=row_entropy(row.abs() / row.abs().sum()).item())
