"""Other forms of Eq. 8, and train.py with them. The library divides it by N, which is the form `length`.

    python notebooks/lab/eq8.py none train ...              train.py's commands and flags, but with Eq. 8 as printed
    python notebooks/lab/eq8.py lambda0-mass train ...      and nothing is subtracted: lambda is held at 0
    python notebooks/lab/eq8.py mass sample --run RUN ...   a run's samples need the word that it was trained with

Words: none, length, scaled, rms, mass and differenced, see Divided, each also with lambda0- in front. The weights have the names
and the first values of the library's model.

Which scale should Eq. 8 have? The plan and the runs that decided it, and the measure of whether attention is used.

    python notebooks/lab/eq8.py train --data-dir DIR           the small model with every form, 44 runs of 1,000 steps
    python notebooks/lab/eq8.py stability                      DyDi-LiT-S/2, BF16, and four times as many tokens
    python notebooks/lab/eq8.py full --data-dir DIR --forms length none        the whole recipe, 4,000 steps
    python notebooks/lab/eq8.py kid --data-dir DIR             KID of the finished runs' samples
    python notebooks/lab/eq8.py table                          the measures of all runs, and what the rule asks for

DIR has Fashion-MNIST in CIFAR-10's layout. Results go to notebooks/results/gate/. Stopped at any moment, the same
command goes on; several processes share the work. The plan was fixed before the first run.

The plan. Forms of Eq. 8, from the nearest to the print to the farthest: none, which is the print, length, scaled, rms
and mass, see Divided. Data: the shapes and Fashion-MNIST. Seeds 0 and 1, the same images, noise and initial
values for all forms. Rates: 4e-3, which is the recipe's, for all forms; 1e-3 for all forms, with seed 0 alone for those
other than none; 3e-4 for none. Everything else is the small model's recipe, cut to 1,000 steps. Measured on 250 images
that were not trained on, always with the same timesteps and noise, in four bands of timesteps, with the weights of the
last step: see `use`.

A form is *alive* if, on both sets and with both seeds, the attention's output is longer than a tenth of V in at least
three of the four blocks, and permuting the keys costs more than 5 % of the loss. It is *stable* if the loss and all
gradients of DyDi-LiT-S/2 stay finite at 1e-4 and at 1e-3, 75 steps of 4 images each (300 of 8 would take a
CPU four hours), the mean loss of the last 25 steps is below 1, and the small model's 300 steps in BF16 and
its output on 256 tokens are finite.

The rule. Of the forms that are alive at the recipe's rate and stable, the one nearest to the print is chosen, unless
another such form has, on both sets, a lower squared error or a lower KID (200 samples, 20 DDIM steps), by paired 95 %
intervals over the two seeds, with Student's t of one degree of freedom. If the print is not alive at the recipe's rate
but is at a lower one, with a squared error within 5 % of the chosen form's on both sets, the rate is the finding, and the
print stays. The chosen form and the print then train through the recipe's 4,000 steps on both sets with both seeds,
because fading shows late. If the chosen form is not alive after them, the next in the order takes its place.

What was run of it, on two CPU cores: at 4e-3 everything, at 1e-3 the print with seed 0, at 3e-4 nothing. The 4,000 steps
were made with seed 0. DyDi-LiT-S/2 was trained at 1e-3 with every form, and at 1e-4 with `length` only. So `length` alone
has passed all that the plan calls stable. The other forms were stable in what they were given.
"""
import argparse
import contextlib
import dataclasses
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
from lab import measures  # noqa: E402
from lab.measures import add_lines, commit, read  # noqa: E402



class Divided(dydilit.TokenDifferential):
    """Eq. 7-8, and then a division by what `denominator` names.

    none: nothing, which is Eq. 8 as printed. length: N. scaled: N sqrt(d). rms: each output token's root mean square. mass: Eq. 4's
    denominator of Q and K, see floored_mass. differenced: the sum of the used weights, which may be anything, zero included.
    """
    DENOMINATORS = ("none", "length", "scaled", "rms", "mass", "differenced")

    @classmethod
    def of(cls, differential, denominator):
        """Makes one of a TokenDifferential, in place. A new one would draw random numbers and change all that follow."""
        if not isinstance(differential, dydilit.TokenDifferential) or differential.router_k is None:
            raise ValueError("eq8.py: the model has no token differential, so there is nothing to divide")
        differential.__class__, differential.denominator = cls, denominator
        return differential

    def forward(self, q, q_red, k, k_red, v, n_heads=1):
        lambda_q, lambda_k = self.choose(self.router_q, q, q_red), self.choose(self.router_k, k, k_red)
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
        elif self.denominator == "differenced":
            keys = (k - lambda_k * k_red).sum(dim=-2, keepdim=True)
            used = (q - lambda_q * q_red) @ keys.transpose(-2, -1)
            out = out / torch.where(used.abs() < 1e-6, 1e-6, used)
        return dydilit.merge_heads(out)

    def floored_mass(self, q, k, q_red, k_red, lambda_q, lambda_k):
        """Eq. 4's denominator for Q and K, but at least a tenth of the one with Q', K' added. Returns (B, h, N, 1).

        The tenth is our choice. It matters where Q is near zero and Q' is not.
        """
        with torch.no_grad():
            keys = (k + lambda_k.abs() * k_red).sum(dim=-2, keepdim=True)           # (B, h, 1, d/h)
            total = dydilit.attention_mass(q + lambda_q.abs() * q_red, keys)
        return torch.maximum(dydilit.attention_mass(q, k), total / 10)


WORDS = [prefix + name for prefix in ("", "lambda0-") for name in Divided.DENOMINATORS]


def parts_with(word):
    """dydilit.block_parts with the form of Eq. 8 that a word of WORDS names."""
    def parts(cfg, i):
        attention, mlp = dydilit.block_parts(cfg, i)
        Divided.of(getattr(attention, "differential", None), word.removeprefix("lambda0-"))
        if word.startswith("lambda0-"):
            attention.differential.lambdas.requires_grad_(False).zero_()
        return attention, mlp
    return parts


# ---- The gate ----

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results" / "gate"
FORMS = ("none", "length", "scaled", "rms", "mass")
BANDS = (0, 100, 400, 700, 1000)
WATCHED = (0, 50, 100, 200, 400, 700, 1000, 1500, 2000, 3000, 4000)
N_HELD_OUT = 250
KEY = ("data", "form", "lr", "seed", "steps")           # what tells a run from the others


def held_out_images(data, data_dir, n=500):
    """n images that were not trained on."""
    found = train.shapes(n, seed=1) if data == "shapes" else train.cifar10(data_dir, ["test_batch.bin"])
    found.images, found.labels = found.images[:n], found.labels[:n]
    return found


def noisy(data, t, seed):
    """The held-out images with the noise of timesteps t (M,): always the same noise. Returns x_0, x_t, noise, labels."""
    x, y = data.batch(torch.arange(len(t)), torch.zeros(len(t), dtype=torch.bool))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return x, dydilit.GaussianDiffusion().q_sample(x, t, noise), noise, y


# ---- Is the attention used? -----------------------------------------------------------------------------------------

def permuted(inputs):
    """The inputs of TokenDifferential with the keys of each picture in a random order: each now brings another's value."""
    q, q_red, k, k_red, v, *rest = inputs
    order = torch.rand(k.shape[:2], generator=torch.Generator().manual_seed(0)).argsort(dim=1).to(k.device)
    k, k_red = (torch.take_along_dim(x, order.unsqueeze(-1), dim=1) for x in (k, k_red))
    return (q, q_red, k, k_red, v, *rest)


WITHOUT = dict(     # what is done to the token differential of every block, as a hook before it or after it
    whole=None,
    permuted=("pre", lambda module, inputs: permuted(inputs)),
    mean=("post", lambda module, inputs, out: out.mean(dim=1, keepdim=True).expand_as(out)),
    zero=("post", lambda module, inputs, out: torch.zeros_like(out)))


@contextlib.contextmanager
def hooked(model, pre=None, post=None):
    """Within it, every block's token differential has these hooks."""
    handles = []
    for block in model.blocks:
        if pre:
            handles.append(block.attn.differential.register_forward_pre_hook(pre))
        if post:
            handles.append(block.attn.differential.register_forward_hook(post))
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def use(model, data):
    """How large the attention's output is, and what the model loses without what only attention can do.

    Returns a dictionary. For each block b from 1 on: size_b, the mean length of the output beside that of V; zero_q_b
    and zero_k_b, the share of kernelized queries and keys that are zero. For each way in WITHOUT: log_WAY, the mean
    logarithm of an image's loss, and square_WAY, the squared error of the noise, both also with _LOW for the band of
    timesteps that begins at LOW. `permuted` and `mean` take away what only attention can do. `zero` also takes a bias.
    """
    device, n, found, seen = model.pos_embed.device, len(data.labels), {}, []
    diffusion = dydilit.GaussianDiffusion().to(device)
    t = (torch.arange(n) * 1000 // n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    x, _, noise, y = noisy(data, t, seed=0)

    def look(module, inputs, out):
        q, _, k, _, v = inputs[:5]
        seen.append([(out.norm(dim=-1).mean() / v.norm(dim=-1).mean()).item(),
                     *((z == 0).all(dim=-1).float().mean().item() for z in (q, k))])

    for way, hook in WITHOUT.items():
        hooks = {hook[0]: hook[1]} if hook else {"post": look}
        losses = []
        with hooked(model, **hooks):
            for part in torch.arange(n).split(50):
                inputs = (a[part].to(device) for a in (x, y, t, noise))
                losses.append(diffusion.losses(model, *inputs))
        for name, key, change in [("log", "loss", torch.log), ("square", "simple", lambda values: values)]:
            values = change(torch.cat([part[key] for part in losses]).cpu())
            found[f"{name}_{way}"] = values.mean().item()
            for low, high in itertools.pairwise(BANDS):
                found[f"{name}_{way}_{low}"] = values[(t >= low) & (t < high)].mean().item()
    sizes = np.array(seen).reshape(-1, len(model.blocks), 3).mean(0)
    for b, block in enumerate(sizes, 1):
        found.update(zip([f"size_{b}", f"zero_q_{b}", f"zero_k_{b}"], block))
    return found


def cost(row, way="permuted", band=""):
    """By how much the loss grows without something: 0.05 is 5 %. row: of `use`, numbers or text."""
    return math.exp(float(row[f"log_{way}{band}"]) - float(row[f"log_whole{band}"])) - 1


def alive(row):
    """The gate's word for it: an output longer than a tenth of V in all blocks but one, and keys that matter by 5 %."""
    sizes = [float(value) for name, value in row.items() if name.startswith("size_")]
    return sum(size > 0.1 for size in sizes) >= len(sizes) - 1 and cost(row) > 0.05


# ---- Runs -----------------------------------------------------------------------------------------------------------

def train_one(args, data, form, lr, seed, steps):
    """A run of train.py with a form of Eq. 8, measured at the steps of WATCHED: a line for each in its watched.csv."""
    key = dict(zip(KEY, (data, form, f"{lr:g}", seed, steps)))
    folder = pathlib.Path(args.runs) / "-".join(map(str, key.values()))
    if (folder / "samples.npz").exists():
        return
    held_out = held_out_images(data, args.data_dir, N_HELD_OUT)

    class Watched(train.Training):
        def train_step(self):
            self.watch()
            super().train_step()

        def watch(self):
            if self.step in WATCHED and self.step not in [int(row["step"]) for row in read(folder / "watched.csv")]:
                self.model.eval()
                largest = max((float(row["grad_norm"]) for row in self.log), default=0)
                add_lines(folder / "watched.csv", [dict(key, commit=commit(), step=self.step,
                          largest_gradient_norm=largest, **use(self.model, held_out))])

        def grid(self, path):
            if self.step == steps:
                self.watch()
                samples(folder, self.model.eval(), self.data.names)

    original, train.Training = train.Training, Watched
    try:
        train.main(["train", "--data", data, "--data-dir", args.data_dir, "--run", str(folder), "--lr", str(lr),
                    "--seed", str(seed), "--steps", str(steps)], parts_with(form))
    finally:
        train.Training = original


def samples(folder, model, names, n=200):
    """Writes samples of a model that has just been trained, evenly over the classes, for KID."""
    labels = [i * len(names) // n for i in range(n)]
    measures.write_npz(folder / "samples.npz", train.generate(model, labels, 20, 2.0, "ddim"), labels)


def classifier(args, data):
    """The network whose features KID compares, trained once for each data set, and its features of 5,000 real images."""
    path = pathlib.Path(args.runs) / f"classifier-{data}.pt"
    real = train.shapes() if data == "shapes" else train.cifar10(args.data_dir)
    if not path.exists():
        network = measures.train_classifier(real.images, real.labels, 10)
        torch.jit.script(network).save(path)
    network = measures.load_network(path)
    return network, measures.extract(real.images[:5000], network)["pool"]


def kid(args, lines):
    """Adds KID to the last line of each run that has samples."""
    done = {tuple(line[k] for k in KEY) for line in read(RESULTS / "kid.csv")}
    for data in ("shapes", "cifar10"):
        network, real = classifier(args, data)
        for line in lines:
            key = {k: line[k] for k in KEY}
            if line["data"] == data and line["step"] == line["steps"] and tuple(key.values()) not in done:
                images = np.load(pathlib.Path(args.runs) / "-".join(key.values()) / "samples.npz")["arr_0"]
                made = measures.extract(images, network)["pool"]
                add_lines(RESULTS / "kid.csv", [dict(key, kid=measures.kernel_distance(made, real))])


def train_all(args, jobs):
    """All jobs (the fields of KEY) that no process has done or is doing; then the lines of all go to runs.csv."""
    torch.set_num_threads(1)
    train.keep_freed_memory()
    for job in jobs:
        try:
            train_one(args, *job)
        except train.Problem as problem:                # another process is at it, or the loss is not finite
            print(f"{job}: {problem}")
    lines = [line for path in sorted(pathlib.Path(args.runs).glob("*/watched.csv")) for line in read(path)]
    measures.save_log(RESULTS / "runs.csv", lines)


def gate_jobs():
    """In the order in which they are needed."""
    sets, seeds = ("shapes", "cifar10"), (0, 1)
    first = [(data, form, 4e-3, seed, 1000) for seed in seeds for form in FORMS for data in sets]
    lower = [(data, "none", lr, seed, 1000) for lr in (1e-3, 3e-4) for seed in seeds for data in sets]
    return first + lower + [(data, form, 1e-3, 0, 1000) for form in FORMS[1:] for data in sets]


# ---- Stability ------------------------------------------------------------------------------------------------------

def steps_of(model, data, steps, batch, lr, autocast=False):
    """Trains with a constant rate. Returns the loss of each step and the largest gradient norm, inf if any is not finite."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.999), weight_decay=0)
    diffusion, losses, largest = dydilit.GaussianDiffusion(), [], 0.0
    for step in range(steps):
        torch.manual_seed(step)
        x, y = data.batch(train.batch_indices(len(data.labels), batch, step, 0), torch.rand(batch) < 0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = diffusion.losses(model, x, y)["loss"].mean()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
        largest = max(largest, norm) if math.isfinite(norm) else math.inf
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, largest


@torch.no_grad()
def output_on_more_tokens(model, form):
    """The largest entry of the output for noise in four times as many tokens."""
    cfg = dataclasses.replace(model.cfg, image_size=2 * model.cfg.image_size)
    larger = dydilit.DyDiLiT(cfg, parts_with(form)).eval()
    larger.load_state_dict({**model.state_dict(), "pos_embed": larger.pos_embed})
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return larger(x, torch.tensor([500]), torch.tensor([0])).abs().max().item()


def stability(args):
    torch.set_num_threads(1)
    train.keep_freed_memory()
    data = train.shapes()
    jobs = [(form, "DyDi-LiT-S/2", lr, "float32", 75, 4) for lr in (1e-3, 1e-4) for form in FORMS]
    jobs = [(form, train.SMALL_MODEL, 4e-3, "bfloat16", 300, 16) for form in FORMS] + jobs
    for form, name, lr, dtype, steps, batch in jobs:
        key = dict(form=form, model=name, lr=f"{lr:g}", dtype=dtype, steps=str(steps), batch=str(batch))
        path = pathlib.Path(args.runs) / "claims" / "-".join(key.values()).replace("/", "_")
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), open(path, "x"):
            torch.manual_seed(0)
            model = dydilit.build_model(name, parts_with(form), **data.model_shape())
            losses, largest = steps_of(model, data, steps, batch, lr, dtype == "bfloat16")
            more = output_on_more_tokens(model, form) if name == train.SMALL_MODEL else ""
            add_lines(RESULTS / "stability.csv", [dict(key, largest_loss=max(losses), last_loss=np.mean(losses[-25:]),
                      largest_gradient_norm=largest, output_on_more_tokens=more)])


# ---- The rule -------------------------------------------------------------------------------------------------------

def interval(differences):
    """Mean and 95 % interval of paired differences of two seeds: Student's t with one degree of freedom."""
    a, b = differences
    half = math.tan(0.475 * math.pi) * abs(a - b) / 2
    return (a + b) / 2, (a + b) / 2 - half, (a + b) / 2 + half


def is_stable(form, lines):
    """Whether a form has passed all three runs of `stability`. One that lacks a run has not."""
    mine = [line for line in lines if line["form"] == form]
    numbers = [float(line[k] or 0) for line in mine for k in ("largest_loss", "largest_gradient_norm", "output_on_more_tokens")]
    return len(mine) == 3 and all(map(math.isfinite, numbers)) and all(
        float(line["last_loss"]) < 1 for line in mine if line["model"] == "DyDi-LiT-S/2")


def table(args):
    """Prints a line per run, which forms are alive and stable, and the differences of all pairs that are alive."""
    lines = [line for line in read(RESULTS / "runs.csv") if line["step"] == line["steps"]]
    kids = {tuple(line[k] for k in KEY): float(line["kid"]) for line in read(RESULTS / "kid.csv")}
    print("data form lr seed steps | output beside V by block | zero q, k | squared error | permuted mean zero | KID | alive")
    at = {}
    for line in lines:
        key = tuple(line[k] for k in KEY)
        at[key] = line
        sizes, zq, zk = ([float(line[f"{what}_{b}"]) for b in range(1, 5)] for what in ("size", "zero_q", "zero_k"))
        print(*key, "|", *(f"{size:.3f}" for size in sizes), "|", f"{max(zq):.2f} {max(zk):.2f}", "|",
              f"{float(line['square_whole']):.4f}", "|", *(f"{cost(line, way):+.1%}" for way in ("permuted", "mean", "zero")),
              "|", f"{kids.get(key, math.nan):.3f}", "|", alive(line))
    keys = {form: [(data, form, "0.004", seed, "1000") for data in ("shapes", "cifar10") for seed in "01"] for form in FORMS}
    recipe = [form for form in FORMS if all(key in at and alive(at[key]) for key in keys[form])]
    stable = [form for form in FORMS if is_stable(form, read(RESULTS / "stability.csv"))]
    print("alive at the recipe's rate:", *recipe, "| stable:", *stable)
    for a, b in itertools.combinations(recipe, 2):
        for name, value in [("squared error", lambda key: math.log(float(at[key]["square_whole"]))), ("KID", kids.get)]:
            for data in ("shapes", "cifar10"):
                keys = [[(data, form, "0.004", seed, "1000") for seed in "01"] for form in (a, b)]
                if all(value(key) is not None for pair in keys for key in pair):
                    mean, low, high = interval([value(y) - value(x) for x, y in zip(*keys)])
                    print(f"{b} - {a}, {name}, {data}: {mean:+.4f} ({low:+.4f} to {high:+.4f})")


def main():
    parser = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "stability", "full", "kid", "table"])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--runs", default="runs/gate", help="folder of checkpoints; default: %(default)s")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="for full")
    args = parser.parse_args()
    if args.command == "train":
        train_all(args, gate_jobs())
    elif args.command == "full":
        train_all(args, [(data, form, 4e-3, seed, 4000) for form in args.forms for seed in (0, 1) for data in ("shapes", "cifar10")])
    elif args.command == "kid":
        kid(args, read(RESULTS / "runs.csv"))
    else:
        {"stability": stability, "table": table}[args.command](args)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in WORDS:
        train.explained(train.main, sys.argv[2:], parts_with(sys.argv[1]))
    else:
        train.explained(main)
