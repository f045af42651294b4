"""Which scale should Eq. 8 have? Its other forms, training with them, and what decided it.

    python notebooks/lab/eq8.py train --data-dir DIR        36 runs of 1,000 steps, 8 of 4,000
    python notebooks/lab/eq8.py table                       all measures, and what the rule asks for

DIR has Fashion-MNIST in CIFAR-10's layout. Lines go to notebooks/results/gate/runs.csv, and one
that is there already is not made again. Stopped at any moment, the same command goes on.

The plan was fixed before the first run. The forms, from the nearest to the print to the farthest,
are none, which is the print, length, scaled, rms and mass. The small model trains with each on the
shapes and on Fashion-MNIST by its recipe, but for 1,000 steps, with seeds 0 and 1. The rates are
the recipe's 4e-3, then 1e-3, with seed 0 alone for others than none, and 3e-4 for none. 250 unseen
images are measured as `use` says.

A form is alive if, on both sets and with both seeds, the attention's output is longer than a tenth
of V in three of the four blocks or more, and permuting the keys costs more than 5 % of the loss. It
is stable if DyDi-LiT-S/2 keeps a finite loss and finite gradients through 75 steps of 4 images at
1e-4 and at 1e-3, with a mean loss below 1 in the last 25, and if the small model's 300 steps in
BF16 and its output on 256 tokens are finite.

The rule. Of the forms that are alive at 4e-3 and stable, the nearest to the print is chosen, unless
another has, on both sets, a lower squared error or a lower KID (200 samples, 20 DDIM steps) by
paired 95 % intervals over the seeds. If the print is alive at a lower rate only, with a squared
error within 5 % of the chosen form's on both sets, the rate is the finding, and the print stays.
The chosen form and the print then train for the recipe's 4,000 steps, because fading shows late. If
the chosen form is not alive after them, the next takes its place.

What was run of it, on two CPU cores: at 4e-3 everything, at 1e-3 the print with seed 0, at 3e-4
nothing, and the 4,000 steps with seed 0. DyDi-LiT-S/2 was trained at 1e-3 with every form, and at
1e-4 with `length` only, which alone has passed all that the plan calls stable. Commit 4d88880's
gate.py made kid.csv and stability.csv. Both seeds saw the same images and noise, since a CPU's
generator heeds the low 32 bits of its seed alone, and train.py then put the seed above them.
"""
import argparse
import itertools
import math
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import dydilit  # noqa: E402
import train  # noqa: E402
from lab.measures import add_lines, commit, read  # noqa: E402

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results" / "gate"
SETS, SEEDS, RATE = ("shapes", "cifar10"), (0, 1), 4e-3
KEY = ("data", "form", "lr", "seed", "steps")           # what tells a run from the others
WATCHED = (0, 50, 100, 200, 400, 700, 1000, 1500, 2000, 3000, 4000)     # steps that are measured


# ---- The forms --------------------------------------------------------------------------------

class Divided(dydilit.TokenDifferential):
    """Eq. 7-8, and then a division by what `denominator` names.

    none: nothing, which is Eq. 8 as printed. length: N. scaled: N sqrt(d). rms: each output token's
    root mean square. mass: Eq. 4's denominator of Q and K, see floored_mass."""
    DENOMINATORS = ("none", "length", "scaled", "rms", "mass")

    @classmethod
    def of(cls, differential, denominator):
        """Makes one of a TokenDifferential, in place: a new one would draw random numbers."""
        if getattr(differential, "router_k", None) is None:
            raise ValueError("eq8.py: the model has no token differential, so nothing to divide")
        differential.__class__, differential.denominator = cls, denominator
        return differential

    def forward(self, q, q_red, k, k_red, v, n_heads=1):
        lambda_q = self.choose(self.router_q, q, q_red)
        lambda_k = self.choose(self.router_k, k, k_red)
        q, k, q_red, k_red, v = (dydilit.split_heads(x, n_heads) for x in (q, k, q_red, k_red, v))
        out = dydilit.token_differential(q, q_red, k, k_red, v, lambda_q, lambda_k)
        if self.denominator == "length":
            out = out / q.shape[-2]
        elif self.denominator == "scaled":
            out = out / (q.shape[-2] * q.shape[-1] ** 0.5)
        elif self.denominator == "rms":
            out = F.rms_norm(out, out.shape[-1:], eps=dydilit.EPS)
        elif self.denominator == "mass":
            out = out / self.floored_mass(q, k, q_red, k_red, lambda_q, lambda_k)
        return dydilit.merge_heads(out)

    def floored_mass(self, q, k, q_red, k_red, lambda_q, lambda_k):
        """Eq. 4's denominator for Q and K, at least a tenth of that with Q', K' added. (B, h, N, 1)

        The tenth is our choice. It matters where Q is near zero and Q' is not."""
        with torch.no_grad():
            keys = (k + lambda_k.abs() * k_red).sum(dim=-2, keepdim=True)           # (B, h, 1, d/h)
            total = dydilit.attention_mass(q + lambda_q.abs() * q_red, keys)
        return torch.maximum(dydilit.attention_mass(q, k), total / 10)


FORMS = Divided.DENOMINATORS


def parts_with(word):
    """dydilit.block_parts with a form of Eq. 8, one of FORMS; lambda0-FORM also holds lambda."""
    def parts(cfg, i):
        attention, mlp = dydilit.block_parts(cfg, i)
        Divided.of(getattr(attention, "differential", None), word.removeprefix("lambda0-"))
        if word.startswith("lambda0-"):
            attention.differential.lambdas.requires_grad_(False).zero_()
        return attention, mlp
    return parts


# ---- Is the attention used? -------------------------------------------------------------------

def held_out_images(data, data_dir, n=500):
    """n images that were not trained on."""
    if data == "shapes":
        return train.shapes(n, seed=1)
    found = train.cifar10(data_dir, ["test_batch.bin"])
    found.images, found.labels = found.images[:n], found.labels[:n]
    return found


def noisy(data, n, seed):
    """The first n images, noise for them that is always the same, and their labels."""
    x, y = data.batch(torch.arange(n), torch.zeros(n, dtype=torch.bool))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return x, noise, y


def permuted(inputs):
    """TokenDifferential's inputs with each picture's keys in a random order: they change values."""
    q, q_red, k, k_red, v, *rest = inputs
    order = torch.rand(k.shape[:2], generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    order = order.unsqueeze(-1).to(k.device)
    k, k_red = (torch.take_along_dim(x, order, dim=1) for x in (k, k_red))
    return (q, q_red, k, k_red, v, *rest)


WITHOUT = dict(     # a hook of every block's token differential, before it or after it
    whole=("", None),
    permuted=("pre_", lambda module, inputs: permuted(inputs)),
    mean=("", lambda module, inputs, out: out.mean(dim=1, keepdim=True).expand_as(out)),
    zero=("", lambda module, inputs, out: torch.zeros_like(out)))


@torch.no_grad()
def use(model, data):
    """How large the attention's output is, and what the model loses without it. A dictionary.

    size_B, of block B from 1 on: the mean length of the output beside that of V. log_WAY, for each
    way in WITHOUT: the mean logarithm of an image's loss. square_WAY: the noise's squared error.
    `permuted` and `mean` take away what only attention can do. `zero` also takes a bias."""
    device, n, found, seen = model.pos_embed.device, len(data.labels), {}, []
    diffusion = dydilit.GaussianDiffusion().to(device)
    t = (torch.arange(n) * 1000 // n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    x, noise, y = noisy(data, n, seed=0)

    def look(module, inputs, out):
        seen.append((out.norm(dim=-1).mean() / inputs[4].norm(dim=-1).mean()).item())   # 4: V

    for way, (when, hook) in WITHOUT.items():
        hooks = [getattr(block.attn.differential, f"register_forward_{when}hook")(hook or look)
                 for block in model.blocks]
        losses = [diffusion.losses(model, *(a[part].to(device) for a in (x, y, t, noise)))
                  for part in torch.arange(n).split(50)]
        for handle in hooks:
            handle.remove()
        found[f"log_{way}"] = torch.cat([part["loss"] for part in losses]).log().mean().item()
        found[f"square_{way}"] = torch.cat([part["simple"] for part in losses]).mean().item()
    sizes = np.reshape(seen, (-1, len(model.blocks))).mean(0)
    return found | {f"size_{b}": size for b, size in enumerate(sizes, 1)}


def cost(row, way="permuted"):
    """By how much the loss grows without something: .05 is 5 %. row: of `use`, numbers or text."""
    return math.exp(float(row[f"log_{way}"]) - float(row["log_whole"])) - 1


def alive(row):
    """The plan's word, for one run."""
    sizes = [float(value) for name, value in row.items() if name.startswith("size_")]
    return sum(size > 0.1 for size in sizes) >= len(sizes) - 1 and cost(row) > 0.05


# ---- The runs ---------------------------------------------------------------------------------

def planned():
    """The fields of KEY for all runs, in the order in which they are needed."""
    runs = [(form, RATE, seed, 1000) for seed in SEEDS for form in FORMS]
    runs += [("none", lr, seed, 1000) for lr in (1e-3, 3e-4) for seed in SEEDS]
    runs += [(form, 1e-3, 0, 1000) for form in FORMS[1:]]
    runs += [(form, RATE, seed, 4000) for form in ("length", "none") for seed in SEEDS]
    return [(data, *run) for run in runs for data in SETS]


def train_one(args, data, form, lr, seed, steps):
    """A run of train.py with a form of Eq. 8. runs.csv gets a line for each of WATCHED."""
    key = dict(zip(KEY, map(str, (data, form, lr, seed, steps))))
    folder = pathlib.Path(args.runs) / "-".join(key.values())
    held_out = held_out_images(data, args.data_dir, 250)

    def is_watched(step):
        line = dict(key, step=str(step)).items()
        return any(line <= row.items() for row in read(RESULTS / "runs.csv"))

    class Watched(train.Training):
        def train_step(self):
            self.watch()
            super().train_step()

        def grid(self, name):               # after the last step, too
            self.watch()

        def watch(self):
            if self.step in WATCHED and not is_watched(self.step):
                line = dict(key, commit=commit(), step=self.step)
                add_lines(RESULTS / "runs.csv", [line | use(self.model.eval(), held_out)])

    if is_watched(steps):
        return
    original, train.Training = train.Training, Watched
    try:
        train.main(["train", "--data", data, "--data-dir", args.data_dir, "--run", str(folder),
                    "--lr", str(lr), "--seed", str(seed), "--steps", str(steps)], parts_with(form))
    finally:
        train.Training = original


# ---- The rule ---------------------------------------------------------------------------------

def print_table():
    """Prints a line per run, which forms are alive, and how those differ."""
    at = {tuple(row[k] for k in KEY): row for row in read(RESULTS / "runs.csv")
          if row["step"] == row["steps"]}                   # the last line of each finished run
    kids = {tuple(row[k] for k in KEY): float(row["kid"]) for row in read(RESULTS / "kid.csv")}
    errors = {key: math.log(float(row["square_whole"])) for key, row in at.items()}
    print("data form lr seed steps | output / V | squared error | permuted mean zero | KID")
    for key, row in at.items():
        sizes = (f"{float(row[f'size_{b}']):.3f}" for b in range(1, 5))
        costs = (f"{cost(row, way):+.1%}" for way in ("permuted", "mean", "zero"))
        print(*key, "|", *sizes, "|", f"{math.exp(errors[key]):.4f}", "|", *costs, "|",
              f"{kids.get(key, math.nan):.3f}", "|", "alive" * alive(row))
    keys = {(form, data): [(data, form, f"{RATE:g}", str(seed), "1000") for seed in SEEDS]
            for form in FORMS for data in SETS}
    living = [form for form in FORMS
              if all(key in at and alive(at[key]) for data in SETS for key in keys[form, data])]
    print("alive at the recipe's rate:", *living)
    for a, b in itertools.combinations(living, 2):
        for name, values in ("log of the squared error", errors), ("KID", kids):
            for data in SETS:
                one, two = ([values.get(key, math.nan) for key in keys[x, data]] for x in (a, b))
                d = np.subtract(two, one)
                half = 12.706 * abs(d[0] - d[1]) / 2        # Student's t, one degree of freedom
                print(f"{b} - {a}, {name}, {data}: {d.mean():+.4f} +- {half:.4f}")


def main():
    parser = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "table"])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--runs", default="runs/gate", help="of checkpoints; default: %(default)s")
    args = parser.parse_args()
    if args.command == "table":
        return print_table()
    torch.set_num_threads(1)
    for job in planned():
        try:
            train_one(args, *job)
        except train.Problem as problem:                    # the loss is not finite
            print(f"{job}: {problem}")


if __name__ == "__main__":
    train.explained(main)
