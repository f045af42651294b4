"""Trains, samples and measures the systems that the paper's tables compare, with several seeds.

    python notebooks/lab/ladder.py --data cifar10 --data-dir DIR    CIFAR-10, or files in its layout
    python notebooks/lab/ladder.py --model DyDi-LiT-S/2 --steps 50000               for a GPU
    python notebooks/lab/ladder.py --variants rung6 rung6:n_heads=4,lr=1e-3         other questions

Variants: rung1 to rung6 of Table 4, where rung1 is Sana and rung6 is DyDi-LiT. map of Table 5 and
increasing of Table 6, both without the convolution, as rung5 is, with which those tables compare
them. sana and dit of Table 1, as wide as gives them rung6's honest MACs. The next ones train only
if they are named: lambda0, which is rung5 with lambda held at 0, and pixart, edit, dig, moh and
lit, the other systems of Tables 1 to 3, again at rung6's MACs. After a colon come fields of
ModelConfig, knobs of train.py, or normalizer=NAME, a form of Eq. 8 in eq8.py.

Images, timesteps and noise are the same for all variants of a seed. Each run adds a line to
OUT/runs.csv, and one that is there already is not made again. Stopped at any moment, the same
command goes on. With --part 0 2 and --part 1 2, two processes share the work. OUT also gets lesson
12's floors and, from one process that has run rung6, sana and dit, lesson 10's features.
"""
import argparse
import bisect
import fcntl
import json
import math
import pathlib
import sys
import time

import numpy as np
import torch

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import dydilit  # noqa: E402
import train  # noqa: E402
from lab import cost, eq8, measures  # noqa: E402
from lab.cost import honest_macs  # noqa: E402
from lab.neighbours import NEIGHBOURS, lit_heads  # noqa: E402

RECIPE = "2"        # the guidance of the small model's recipe when the experiments were made
BANDS = 10          # of timesteps
KEY = ("data", "model", "variant", "seed", "steps", "samples")      # what tells runs apart
SHAPE = dict(image_size=32, vae_factor=1, in_channels=3, n_classes=10)      # of both data sets


# ---- What is compared -------------------------------------------------------------------------

def equal_macs(model, parts=dydilit.block_parts, multiple=4, **overrides):
    """overrides with the width that brings a system closest to the honest MACs of `model`.

    parts: its blocks' parts. multiple: of what its width must be one, besides 4 and n_heads."""
    def macs(dim):
        return honest_macs(model, parts=parts, **SHAPE, **overrides, dim=dim)
    target, step = honest_macs(model, **SHAPE), math.lcm(4, multiple, overrides.get("n_heads", 1))
    widths = range(step, 2 * dydilit.MODELS[model]["dim"], step)
    i = bisect.bisect(widths, target, lo=1, hi=len(widths) - 1, key=macs)
    return dict(overrides, dim=min(widths[i - 1:i + 1], key=lambda dim: abs(macs(dim) - target)))


def variants(model):
    """{variant: overrides of `model`}."""
    out = {f"rung{i}": dict(overrides) for i, (_, overrides) in enumerate(dydilit.LADDER, 1)}
    out["lambda0"] = dict(out["rung5"])                             # and eq8.py holds lambda
    out["map"] = dict(out["rung5"], differential="map")
    out["increasing"] = dict(out["rung5"], lambda_init=[0.2, 0.8])
    with torch.device("meta"):
        cfg = dydilit.build_model(model, **SHAPE).cfg
    out["sana"] = equal_macs(model, **out["rung1"])
    depth, heads = round(cfg.depth * 12 / 9), cfg.dim // 64         # the paper's ratio of depths
    out["dit"] = equal_macs(model, attention="softmax", depth=depth, n_heads=max(4, heads))
    for name, multiple, overrides in [      # depths of 9 and 15 to 9: see cost.NEIGHBOUR_GFLOPS
            ("pixart", 4, dict(depth=depth, n_heads=max(4, heads))),
            ("edit", 8, dict(depth=cfg.depth)),                     # half the width in four groups
            ("dig", 2 * max(2, heads),                              # half the width in heads
             dict(depth=round(cfg.depth * 15 / 9), n_heads=max(2, heads))),
            ("moh", 4, dict(depth=depth, n_heads=max(6, heads))),   # six, as its S model has
            ("lit", lit_heads(cfg.dim), dict(depth=depth))]:
        out[name] = equal_macs(model, NEIGHBOURS[name], multiple, **overrides)
    return out


def settings(variant, known):
    """train.py's flags for a variant, and what makes its blocks' parts. known: of `variants`."""
    name, _, changes = variant.partition(":")
    changes = dict(pair.partition("=")[::2] for pair in changes.split(",") if pair)
    form = changes.pop("normalizer", "length")
    if name not in known:
        raise train.Problem(f"--variants {name}: choose from {', '.join(known)}")
    has_eq8 = name in ("rung5", "rung6", "lambda0", "increasing")
    if form not in eq8.FORMS or form != "length" and not has_eq8:
        raise train.Problem(f"--variants {variant}: the normalizers of rung5, rung6, lambda0 and "
                            f"increasing are {', '.join(eq8.FORMS)}")
    parts = NEIGHBOURS.get(name, dydilit.block_parts)
    if name == "lambda0" or form != "length":
        parts = eq8.parts_with("lambda0-" * (name == "lambda0") + form)
    knobs = {field: value for field, value in changes.items() if field in train.KNOBS}
    flags = [word for field in knobs for word in ("--" + field.replace("_", "-"), knobs[field])]
    fields = {field: json.dumps(value) for field, value in known[name].items()} | changes
    fields = [f"{field}={value}" for field, value in fields.items() if field not in knobs]
    return flags + ["--set", *fields] * bool(fields), parts


# ---- What is measured on a trained model ------------------------------------------------------

def noisy_band(data, band):
    """The held-out images, noise, their labels and a band's timesteps, the same in every call."""
    width, generator = 1000 // BANDS, torch.Generator().manual_seed(band)
    t = band * width + torch.randint(width, (len(data.labels),), generator=generator)
    return *eq8.noisy(data, len(t), seed=1000 + band), t


@torch.no_grad()
def held_out_losses(model, data, batch=100):
    """Losses on held-out images, a number per band of timesteps.

    Returns two lists: the mean squared error of the predicted noise, and the mean logarithm of an
    image's loss, which is what training minimizes."""
    device, plain, logs = model.pos_embed.device, [], []
    diffusion = dydilit.GaussianDiffusion().to(device)
    for band in range(BANDS):
        x, noise, y, t = noisy_band(data, band)
        batches = zip(*(a.to(device).split(batch) for a in (x, y, t, noise)))
        found = [diffusion.losses(model, *inputs) for inputs in batches]
        plain.append(torch.cat([losses["simple"] for losses in found]).mean().item())
        logs.append(torch.cat([losses["loss"] for losses in found]).log().mean().item())
    return plain, logs


def write_floors(args, data):
    """Writes the squared error, by band, of always predicting the class's mean picture.

    The noise cancels. The error of the predicted noise is that of the picture, times a ratio."""
    held_out = eq8.held_out_images(args.data, args.data_dir)
    pixels, labels = train.pixels(data.images), torch.as_tensor(data.labels)
    means = torch.stack([pixels[labels == c].mean(0) for c in range(10)])
    diffusion, lines = dydilit.GaussianDiffusion(), []
    ratio = diffusion.sqrt_alpha_bar / diffusion.sqrt_one_minus
    for band in range(BANDS):
        x, _, y, t = noisy_band(held_out, band)
        error = (ratio[t].view(-1, 1, 1, 1) * (x - means[y])).square().mean().item()
        lines.append(dict(timesteps_from=band * 1000 // BANDS, squared_error=error))
    measures.save_log(pathlib.Path(args.out) / f"{args.data}-floors.csv", lines)


# ---- The runs ---------------------------------------------------------------------------------

def run_folder(args, variant, seed):
    words = args.data, args.model.replace("/", "-"), variant.replace(":", "-"), args.steps, seed
    return pathlib.Path(args.out) / "-".join(map(str, words))


def prepare(args, data):
    """The classifier that measures all runs, and its features of 10,000 training images."""
    kept = pathlib.Path(args.out) / f"{args.data}-classifier.pt"
    if not kept.exists():
        network = measures.train_classifier(data.images, data.labels, len(data.names))
        with train.replacing(kept) as file:
            torch.save(network.state_dict(), file)
    network = measures.Classifier(len(data.names))
    network.load_state_dict(torch.load(kept, map_location="cpu", weights_only=True))
    network = network.to(train.pick_device()).eval()
    pick = np.sort(np.random.default_rng(0).permutation(len(data.labels))[:10_000])
    return network, measures.extract(data.images[pick], network)


def one_run(args, known, network, real, variant, seed):
    """Trains, samples and measures. Returns what runs.csv gets besides the fields of KEY."""
    start, run = time.time(), run_folder(args, variant, seed)
    flags, parts = settings(variant, known)
    train.main(["train", "--data", args.data, "--data-dir", args.data_dir, "--model", args.model,
                "--run", str(run), "--seed", str(seed), "--steps", str(args.steps),
                "--sampling-steps", "20", "--sample-every", str(args.steps), *flags], parts)
    train.main(["sample", "--run", str(run), "--num", str(args.samples), "--cfg", RECIPE,
                "--steps", "20", "--sampler", "ddim", "--seed", str(seed)], parts)
    model = dydilit.load_model(run / "checkpoint.pt", parts)[0].to(train.pick_device())
    plain, logs = held_out_losses(model, eq8.held_out_images(args.data, args.data_dir))
    images, _ = measures.load_npz(run / "samples.npz")
    values = measures.compare(measures.extract(images, network), real)
    return dict(dim=model.cfg.dim, depth=model.cfg.depth,
                honest_gmacs=sum(cost.count_macs(model)["honest"].values()) / 1e9,
                held_out_loss=np.mean(plain), held_out_log=np.mean(logs),
                **{f"band{b}": v for b, v in enumerate(plain)},
                **{f"cfg{RECIPE}_{name}": value for name, value in values.items()},
                seconds=time.time() - start)


def keep_features(args, network):
    """Writes the features of some real and generated images, of the first seed, for a t-SNE."""
    test = eq8.held_out_images(args.data, args.data_dir, 10_000)
    source, out = {"real": (test.images, test.labels)}, {}
    for v in ("dit", "sana", "rung6"):
        source[v] = measures.load_npz(run_folder(args, v, args.first_seed) / "samples.npz")
    for name, (images, labels) in source.items():
        pick = np.concatenate([np.flatnonzero(labels == c)[:30] for c in range(10)])
        out[name] = measures.extract(images[pick], network)["pool"].cpu().numpy().astype("float16")
        out["labels"] = labels[pick]                        # the same for all: class by class
    np.savez_compressed(f"{args.out}/{args.data}-features.npz", names=test.names, **out)


def main():
    parser = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="shapes", choices=["shapes", "cifar10"])
    add("--data-dir", default="data", help="where cifar10 lies; other files there, other --out")
    add("--model", default=train.SMALL_MODEL, choices=[*dydilit.MODELS], help="the full method")
    add("--variants", nargs="+", help="NAME or NAME:FIELD=VALUE,...; default: the first ten")
    add("--seeds", type=train.positive, default=3, help="how many; default: %(default)s")
    add("--first-seed", type=int, default=0, help="default: %(default)s")
    add("--steps", type=train.positive, default=3000, help="of training; default: %(default)s")
    add("--samples", type=train.positive, default=500, help="per run; default: %(default)s")
    add("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    add("--out", default="runs/ladder", help="folder; default: %(default)s")
    parser.set_defaults(image_size=None)                    # which train.load_data asks for
    args = parser.parse_args()
    known = variants(args.model)
    named = args.variants or [v for v in known if v != "lambda0" and v not in NEIGHBOURS]
    for variant in named:
        settings(variant, known)                            # refuses what it does not know
    torch.set_num_threads(max(1, torch.get_num_threads() // max(1, args.part[1])))
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    with open(pathlib.Path(args.out) / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)                    # one process after the other
        data = train.load_data(args)
        write_floors(args, data)
        network, real = prepare(args, data)
    commit = measures.commit()

    def run(*job):
        line = dict(zip(KEY, job), commit=commit)
        return line | one_run(args, known, network, real, line["variant"], line["seed"])
    jobs = [(args.data, args.model, variant, seed, args.steps, args.samples)
            for seed in range(args.first_seed, args.first_seed + args.seeds) for variant in named]
    with open(pathlib.Path(args.out) / f".lock-{args.part[0]}", "w") as lock:
        with train.blaming(args.out, "another process is at work on this part", BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        measures.make(run, jobs, pathlib.Path(args.out) / "runs.csv", args.part)
    if {"dit", "sana", "rung6"} <= {*named} and args.part[1] == 1:
        keep_features(args, network)


if __name__ == "__main__":
    train.explained(main)
