"""Recall: tasks that need attention, and the experiment of notebook 10.

    python notebooks/lab/recall.py pilot        three learning rates for each arm, two seeds
    python notebooks/lab/recall.py main         then twenty fresh seeds, each arm at its best rate

A set has tokens of two kinds. A pair is a key and one of 16 values. A query is a key alone, and the
model must say which value its pair has. Keys are fresh random vectors in every set, so nothing can
be memorized. Tokens have no positions and there is no convolution, so attention alone can bring a
query to its pair. Each task makes this hard in the way that one part of DyDiLA is meant for.

Each run adds a line to notebooks/results/recall/runs.csv. A run that is there already is not made
again. With --part 0 2 and --part 1 2, two processes share the work.
"""
import argparse
import pathlib
import sys
import time
import zlib

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import dydilit  # noqa: E402
from lab import gate, ladder  # noqa: E402
from lab.eq8 import Divided  # noqa: E402

RESULTS = pathlib.Path(__file__).parents[1] / "results/recall"
KEY, VALUES, TYPES, WIDTH = 16, 16, 3, 32           # numbers of a key; values; token types; d
PAIRS = dict(sharpness=16, interference=8, heterogeneity=16)                # of each task's sets
STEPS, SETS, RATES = 800, 32, (0.003, 0.01, 0.03)
PILOT_SEEDS, SEEDS = (100, 101), tuple(range(20))
OTHER_PAIRS = (2, 4, 8, 16, 32, 64)                 # a trained model is measured on these, too


# ---- The tasks --------------------------------------------------------------------------------

def rotations():
    """A rotation of keys for each token type, (TYPES, KEY, KEY). They belong to the task."""
    noise = torch.randn(TYPES, KEY, KEY, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(noise)[0]


def make_sets(task, sets, pairs, generator):
    """Random sets of a task. Each has its pairs first, then one query for each pair.

    sharpness: a query is its key with noise of half the key's size, so near keys must be told apart.
    interference: all keys of a set share a vector as long as themselves, a new one for each set.
    heterogeneity: tokens have one of three types. Each type's keys are turned by its own rotation.

    Returns tokens (sets, 2 pairs, KEY + VALUES + TYPES) and the queries' values (sets, pairs)."""
    def normal(*shape):
        return torch.randn(*shape, generator=generator)
    keys = normal(sets, pairs, KEY)
    queries = keys + 0.5 * normal(sets, pairs, KEY) if task == "sharpness" else keys
    keys = torch.cat([keys, queries], dim=1)                                # (sets, 2 pairs, KEY)
    types = torch.zeros(sets, 2 * pairs, TYPES)
    if task == "interference":
        keys = keys + normal(sets, 1, KEY)
    elif task == "heterogeneity":
        drawn = torch.randint(TYPES, (sets, 2 * pairs), generator=generator)
        types = F.one_hot(drawn, TYPES).float()
        keys = (keys.unsqueeze(-2) @ rotations()[drawn]).squeeze(-2)
    values = torch.randint(VALUES, (sets, pairs), generator=generator)
    shown = torch.cat([F.one_hot(values, VALUES), torch.zeros(sets, pairs, VALUES)], dim=1)
    return torch.cat([keys, shown, types], dim=-1), values


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


def differential(n_projectors=3, form="length", held=None):
    """DyDiLA without its convolution. form: of Eq. 8, see eq8.py. held: a fixed lambda."""
    config = dydilit.ModelConfig(dim=WIDTH, n_projectors=n_projectors, dwc=False)
    attention = dydilit.DyDiLA(config)
    Divided.of(attention.differential, form)
    if held is not None:
        attention.differential.lambdas.requires_grad_(False).fill_(held)
    return attention


def with_relu():
    attention = differential()
    attention.kernel = Each(F.relu)
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
    "dynamic, equal cost": lambda: Plain(dynamic(width=51), inner=51),      # as DyDiLA's, routers too
    "routed": lambda: Plain(dynamic(), routed=True),
    "random routes": random_routes,
    "one projector": lambda: differential(1),
    "DyDiLA": differential,
    "ReLU differential": with_relu,
    "lambda 0": lambda: differential(held=0.0),
    "adding": adding,
    "RMS": lambda: differential(form="rms"),
    "RMS, lambda 0": lambda: differential(form="rms", held=0.0),
}


# ---- The model, its training and its measures -------------------------------------------------

class Model(nn.Module):
    """One block: LayerNorm, attention, residual. A linear map then reads off the value's scores.

    Matrices are drawn by their names and the seed, so arms share those that they have in common."""

    def __init__(self, arm, seed):
        super().__init__()
        self.embed = nn.Linear(KEY + VALUES + TYPES, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attention, self.head = ARMS[arm](), nn.Linear(WIDTH, VALUES)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                for matrix in weight.data.view(-1, *weight.shape[-2:]):     # a bank has several
                    nn.init.xavier_uniform_(matrix)

    def forward(self, tokens):
        """tokens: of make_sets. Returns the scores of the queries' values, (sets, pairs, VALUES)."""
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x))
        return self.head(x[:, x.shape[1] // 2:])


def train_model(task, arm, seed, rate, steps=STEPS):
    """A Model trained on fresh sets in each step, while the rate falls to zero."""
    model, generator = Model(arm, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        tokens, values = make_sets(task, SETS, PAIRS[task], generator)
        loss = F.cross_entropy(model(tokens).transpose(1, 2), values)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model, task, seed, pairs, sets=256):
    """The share of queries whose value has the largest score, on sets that training has not seen."""
    generator = torch.Generator().manual_seed(10 ** 6 + seed)
    tokens, values = make_sets(task, sets, pairs, generator)
    return (model(tokens).argmax(dim=-1) == values).float().mean().item()


@torch.no_grad()
def weight_on_target(model, task, seed):
    """The share of a query's |attention| that its pair has, a mean. nan where there is no one map.

    Attention is linear in V. With the identity as V, its output is the map of its weights."""
    attention, n = model.attention, 2 * PAIRS[task]
    if isinstance(attention, dydilit.Mlp) or getattr(attention, "heads", 1) > 1:
        return float("nan")
    seen = []

    def identity_as_v(module, inputs, out):
        q, k, v = out.chunk(3, dim=-1)
        return torch.cat([q, k, torch.eye(n, v.shape[-1]).expand_as(v)], dim=-1)

    hooks = [attention.qkv.register_forward_hook(identity_as_v),
             attention.proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))]
    model(make_sets(task, 256, n // 2, torch.Generator().manual_seed(10 ** 6 + seed))[0])
    for hook in hooks:
        hook.remove()
    maps = seen[0][:, n // 2:, :n].abs()                                    # (sets, pairs, n)
    return (maps.diagonal(dim1=1, dim2=2) / maps.sum(dim=-1)).nanmean().item()


# ---- The experiment ---------------------------------------------------------------------------

def best_rate(lines, task, arm):
    """The rate with the best mean accuracy of the pilot seeds, a number."""
    found = {}
    for line in lines:
        if (line["task"], line["arm"]) == (task, arm) and int(line["seed"]) in PILOT_SEEDS:
            found.setdefault(float(line["rate"]), []).append(float(line[f"accuracy_{PAIRS[task]}"]))
    if sorted(found) != sorted(RATES) or any(len(v) < len(PILOT_SEEDS) for v in found.values()):
        raise SystemExit(f"recall.py: {arm} lacks pilot runs on {task}; run the pilot first")
    return max(found, key=lambda rate: sum(found[rate]))


def run(task, arm, seed, rate):
    start = time.time()
    model = train_model(task, arm, seed, rate)
    seconds = time.time() - start
    line = dict(task=task, arm=arm, seed=seed, rate=rate, commit=ladder.commit())
    line |= {f"accuracy_{n}": round(accuracy(model, task, seed, n), 6) for n in OTHER_PAIRS}
    line |= dict(on_target=weight_on_target(model, task, seed), seconds=round(seconds, 1))
    gate.add_lines(RESULTS / "runs.csv", [line])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["pilot", "main"])
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = gate.read(RESULTS / "runs.csv")
    done = {(line["task"], line["arm"], line["seed"], line["rate"]) for line in lines}
    jobs = [(task, arm, seed, rate) for seed in PILOT_SEEDS for task in PAIRS for arm in ARMS
            for rate in RATES]
    if args.stage == "main":
        rates = {(task, arm): best_rate(lines, task, arm) for task in PAIRS for arm in ARMS}
        jobs = [(task, arm, seed, rates[task, arm]) for seed in SEEDS for task in PAIRS
                for arm in ARMS]
    for job in jobs[args.part[0]::args.part[1]]:
        if tuple(map(str, job)) not in done:
            run(*job)


if __name__ == "__main__":
    main()
