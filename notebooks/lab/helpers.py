"""What the notebooks share: the check of answers, and the course's one example.

The example is a photograph cut into tokens, with one query on the face. Q and K share a random
projection, so that q k^T measures how alike two patches look. What lessons 2 to 5 add is trained
for seconds on a small version of the model's own task: clean tokens from noisy ones.
"""
import functools
import hashlib
import pathlib
import sys
import types
import weakref

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib import cbook
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import dydilit  # noqa: E402
import train  # noqa: E402, F401
from lab import cost  # noqa: E402, F401
from lab.benchmark import median_ms  # noqa: E402, F401
from lab.measures import row_entropy, row_variance  # noqa: E402, F401

if torch.cuda.is_available():
    torch.set_default_device("cuda")        # every tensor that a notebook makes is made there
torch.manual_seed(0)                        # a notebook run from the top draws the same numbers


def fingerprint(number):
    """What a check stores in place of a number, three digits of which count."""
    return "#" + hashlib.sha256(f"{float(number):.3g}".encode()).hexdigest()[:6]


def check(number, answer, expected, tolerance=1e-3):
    """Says whether an exercise's answer is right.

    answer, expected: numbers, tensors or lists. An answer of ... is none. expected may be a
    fingerprint, so that the cell doesn't give the answer away."""
    try:
        if answer is ...:
            verdict = "not answered yet. Put your answer in place of the ... above."
        elif isinstance(expected, str):
            verdict = "right." if fingerprint(answer) == expected else "not right yet."
        else:
            answer, expected = (torch.as_tensor(x).cpu() for x in (answer, expected))
            same = np.allclose(answer, expected, rtol=tolerance, atol=tolerance * 1e-2)
            verdict = "right." if same else "not right yet."
    except (TypeError, ValueError):         # another shape, or no number at all
        verdict = "not right yet."
    print(f"Exercise {number}: {verdict}")


class Allocations(TorchDispatchMode):
    """Bytes of the tensors made within this context and still alive: now, and at the peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.known.update(storages((args, kwargs)))     # were there before, or are counted already
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


# ---- The example ---------------------------------------------------------------------------------

SIDE, WIDTH = 16, 64                        # patches along a side; d
QUERY = (5, 7)                              # row and column of the query, on the face by the nose
TRAINED = ["dynamic", "projected"]          # projected: routed projections as Q and K themselves
NAMES = ["softmax", "ReLU", "focused", *TRAINED]


def photo(size):
    """Rear Admiral Grace Hopper, whom matplotlib brings along. (1, 3, size, size) in [-1, 1]."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        image = Image.open(file).convert("RGB")             # 512 x 600
    while image.width > size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    top = (image.height - size) // 2
    return torch.tensor(np.array(image)[None, top:top + size]).permute(0, 3, 1, 2) / 127.5 - 1


def features(picture):
    """Twelve numbers for each of 256 patches, as in lesson 1. (1, 3, 64, 64) -> (256, 12)."""
    patches = F.unfold(picture, kernel_size=4, stride=4).view(3, 16, SIDE, SIDE)
    own = torch.cat([patches.mean(dim=1), patches.std(dim=1)])              # (6, 16, 16)
    around = F.avg_pool2d(F.pad(own[None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0]
    x = torch.cat([own, around]).flatten(1).T                               # (256, 12)
    return x.shape[1] ** 0.5 * F.normalize((x - x.mean(dim=0)) / x.std(dim=0), dim=1)


def example():
    """The photograph as tokens, with random weights, always the same. A namespace of

    picture (3, 128, 128) in [-1, 1], to look at; features (256, 12) and tokens (256, 64), to
    compute with; embed (12, 64), w_qk and w_v (64, 64), the projections of Q and K (one for both)
    and of V; q, k, v (256, 64); query, its number; face, sky (256,) bool, the tokens on either."""
    with torch.device("cpu"), torch.random.fork_rng():      # the same everywhere, no seed disturbed
        torch.manual_seed(0)
        embed = torch.randn(12, WIDTH) / 12 ** 0.5
        w_qk, w_v = (torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0] for _ in range(2))   # rotations
        face, sky = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
        face[3:9, 5:11], sky[:9, 12:] = True, True
        face[8, [5, 10]] = False                            # the corners of the chin
    seen = features(photo(64))
    embed, w_qk, w_v, face, sky = (t.to(seen.device) for t in (embed, w_qk, w_v, face, sky))
    x = seen @ embed
    return types.SimpleNamespace(
        picture=photo(128)[0], features=seen, tokens=x, embed=embed, w_qk=w_qk, w_v=w_v, q=x @ w_qk,
        k=x @ w_qk, v=x @ w_v, query=QUERY[0] * SIDE + QUERY[1], face=face.flatten(),
        sky=sky.flatten())


def noisy(ex, copies):
    """The example's tokens with noise on their features. (copies, 256, 64)."""
    return (ex.features + 0.5 * torch.randn(copies, *ex.features.shape)) @ ex.embed


class Attention(nn.Module):
    """One kind of attention on the example's projections. name: of NAMES."""

    def __init__(self, name, ex):
        super().__init__()
        self.name, self.w_qk = name, ex.w_qk
        if name in TRAINED:
            self.kernel = dydilit.DynamicMeasureKernel(WIDTH, 5, 2)
        if name == "projected":
            self.projection = dydilit.DynamicProjection(WIDTH, 3)

    def forward(self, x, v):
        """x: (B, N, d) tokens; v: (B, N, e) values. Returns (B, N, e)."""
        q = k = x @ self.w_qk
        if self.name == "softmax":
            return dydilit.softmax_attention(q, k, v)
        if self.name == "ReLU":
            q = k = q.relu()
        elif self.name == "focused":
            q = k = dydilit.focused_kernel(q, 3.0)
        elif self.name == "dynamic":
            q, k = self.kernel(q, k)
        else:
            q, k = self.kernel(*self.projection(x))
        return dydilit.linear_attention(q, k, v)


@functools.cache
def attention(name):
    """An Attention, trained if it has weights to train; always the same one."""
    ex = example()
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        module = Attention(name, ex)
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2) if name in TRAINED else None
        for _ in range(200 if optimizer else 0):
            x = noisy(ex, copies=2)
            loss = (module(x, x @ ex.w_v) - ex.v).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return module.requires_grad_(False)


def attention_maps(*names):
    """{name: (256, 256)}, a row per query. With the identity as V, attention returns its map."""
    tokens, identity = example().tokens[None], torch.eye(SIDE * SIDE)[None]
    return {name: attention(name)(tokens, identity)[0] for name in names}


def shares(row, ex):
    """The strip's numbers of one query's weights, row (256,), a namespace of

    face, sky: what they have of all weight above zero; negative: the part of |weight| below zero;
    entropy: of |weight|, from 0 to 1."""
    above, size = row.clamp_min(0) / row.clamp_min(0).sum(), row.abs() / row.abs().sum()
    return types.SimpleNamespace(
        face=above[ex.face].sum().item(), sky=above[ex.sky].sum().item(),
        negative=size[row < 0].sum().item(), entropy=row_entropy(size).item())
