"""Trains, samples and measures the variants that the paper's tables compare, with several seeds.

    python notebooks/lab/ladder.py --data shapes                    the built-in set
    python notebooks/lab/ladder.py --data cifar10 --data-dir DIR    CIFAR-10, or files in its layout
    python notebooks/lab/ladder.py --model DyDi-LiT-S/2 --steps 50000               for a GPU
    python notebooks/lab/ladder.py --variants rung6 rung6:n_heads=4,lr=1e-3         other questions

Variants: rung1 to rung6 of Table 4, where rung1 is Sana and rung6 is DyDi-LiT. map of Table 5 and
increasing of Table 6, both without the convolution, as rung5 is, with which those tables compare
them. sana and dit of Table 1, as wide as gives them rung6's honest MACs. The next ones train only
if they are named: lambda0, which is rung5 with lambda held at 0, and pixart, edit, dig, moh and
lit, the other systems of Tables 1 to 3, again at rung6's MACs. After a colon come fields of
ModelConfig, knobs of train.py, or normalizer=NAME, a form of Eq. 8 in eq8.py.

Images, timesteps and noise are the same for all variants of a seed. OUT/runs.csv gets a line per
run, whose `commit` is that of the code at the start. Stopped at any moment, the same command goes
on. Once rung6, sana and dit are there, OUT gets the features.npz that lesson 10 shows, too.
"""
import argparse
import bisect
import concurrent.futures
import fcntl
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import torch
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import dydilit  # noqa: E402
import train  # noqa: E402
from lab import cost, eq8, measures  # noqa: E402
from lab.cost import honest_macs  # noqa: E402
from lab.neighbours import NEIGHBOURS, lit_heads  # noqa: E402

RECIPE = "2"        # the guidance of the small model's recipe when the experiments were made
BANDS = 10          # of timesteps
KEY = ("data", "model", "variant", "seed", "steps", "samples", "sampling_steps", "network")
SHAPE = dict(image_size=32, vae_factor=1, in_channels=3, n_classes=10)      # of both data sets


# ---- What is compared -------------------------------------------------------------------------

def equal_macs(model, base, parts=dydilit.block_parts, multiple=4, **overrides):
    """overrides with the width that brings a system closest to the honest MACs of `model`.

    base: the data's fields of ModelConfig. parts: its blocks' parts. multiple: of what its width
    must be one, besides 4 and n_heads."""
    def macs(dim):
        return honest_macs(model, parts=parts, **base, **overrides, dim=dim)
    target, step = honest_macs(model, **base), math.lcm(4, multiple, overrides.get("n_heads", 1))
    widths = range(step, 2 * dydilit.MODELS[model]["dim"], step)
    i = bisect.bisect(widths, target, lo=1, hi=len(widths) - 1, key=macs)
    return dict(overrides, dim=min(widths[i - 1:i + 1], key=lambda dim: abs(macs(dim) - target)))


def variants(model, base):
    """{variant: overrides of `model`}; base: the data's fields of ModelConfig."""
    out = {f"rung{i}": dict(overrides) for i, (_, overrides) in enumerate(dydilit.LADDER, 1)}
    out["lambda0"] = dict(out["rung5"])                             # and eq8.py holds lambda
    out["map"] = dict(out["rung5"], differential="map")
    out["increasing"] = dict(out["rung5"], lambda_init=[0.2, 0.8])
    with torch.device("meta"):
        cfg = dydilit.build_model(model, **base).cfg
    out["sana"] = equal_macs(model, base, **out["rung1"])
    depth, heads = round(cfg.depth * 12 / 9), cfg.dim // 64         # the paper's ratio of depths
    out["dit"] = equal_macs(model, base, attention="softmax", depth=depth, n_heads=max(4, heads))
    for name, multiple, overrides in [      # depths of 9 and 15 to 9: see cost.NEIGHBOUR_GFLOPS
            ("pixart", 4, dict(depth=depth, n_heads=max(4, heads))),
            ("edit", 8, dict(depth=cfg.depth)),                     # half the width in four groups
            ("dig", 2 * max(2, heads),                              # half the width in heads
             dict(depth=round(cfg.depth * 15 / 9), n_heads=max(2, heads))),
            ("moh", 4, dict(depth=depth, n_heads=max(6, heads))),   # six, as its S model has
            ("lit", lit_heads(cfg.dim), dict(depth=depth))]:
        out[name] = equal_macs(model, base, NEIGHBOURS[name], multiple, **overrides)
    return out


def split(variant):
    """A variant's name, and what it changes as {field: value}, both texts."""
    name, _, changes = variant.partition(":")
    pairs = [pair.partition("=") for pair in changes.split(",") if pair]
    return name, {field: value for field, _, value in pairs}


def trainer(variant):
    """What trains a variant and samples from it: its script and words, and build_model's parts."""
    name, changes = split(variant)
    if name in NEIGHBOURS:
        return ["notebooks/lab/neighbours.py", name], NEIGHBOURS[name]
    if name == "lambda0" or "normalizer" in changes:
        word = "lambda0-" * (name == "lambda0") + changes.get("normalizer", "length")
        return ["notebooks/lab/eq8.py", word], eq8.parts_with(word)
    return ["train.py"], dydilit.block_parts


def flags(variant, known):
    """train.py's flags for a variant. known: of `variants`."""
    name, changes = split(variant)
    if name not in known:
        raise train.Problem(f"--variants {name}: choose from {', '.join(known)}")
    if changes.pop("normalizer", "length") not in eq8.Divided.DENOMINATORS:
        words = ", ".join(eq8.Divided.DENOMINATORS)
        raise train.Problem(f"--variants {variant}: choose the normalizer from {words}")
    knobs = {field: value for field, value in changes.items() if field in train.KNOBS}
    out = [word for field in knobs for word in ("--" + field.replace("_", "-"), knobs[field])]
    fields = {field: json.dumps(value) for field, value in known[name].items()} | changes
    fields = [f"{field}={value}" for field, value in fields.items() if field not in knobs]
    return out + ["--set", *fields] * bool(fields)


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


# ---- A run ------------------------------------------------------------------------------------

running, stopping = set(), threading.Event()        # the scripts that threads wait for


def call(log, script, *command):
    """Runs a script with these words, its output in `log`. Problem if it fails or all end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as out:
        words = [sys.executable, str(ROOT / script), *map(str, command)]
        process = subprocess.Popen(words, stdout=out, stderr=out)
    running.add(process)
    if stopping.is_set():
        process.terminate()
    code = process.wait()
    running.discard(process)
    if code:
        says = log.read_text().strip().rpartition("\n")[2]
        raise train.Problem(f"{says} (all of it in {log})")


def data_folder(args, data):
    return pathlib.Path(args.out) / f"{data}-{args.model.replace('/', '-')}"


def run_folder(args, data, variant, steps, seed):
    return data_folder(args, data) / f"{variant.replace(':', '-')}-{steps}-{seed}"


def sample_file(args, run):
    return run / f"samples-cfg{RECIPE}-{args.samples}-{args.sampling_steps}.npz"


def one_run(args, key, train_flags, network, real):
    """Trains, samples and measures. Returns the run's line of runs.csv."""
    start, steps, seed = time.time(), key["steps"], key["seed"]
    run = run_folder(args, key["data"], key["variant"], steps, seed)
    log, (script, parts) = run.with_name(run.name + ".log"), trainer(key["variant"])
    call(log, *script, "train", "--data", key["data"], "--data-dir", args.data_dir,
         "--model", args.model, "--run", run, "--seed", seed, "--steps", steps,
         "--sampling-steps", 20, "--sample-every", steps, *train_flags)
    model = dydilit.load_model(run / "checkpoint.pt", parts)[0].to(train.pick_device())
    plain, logs = held_out_losses(model, eq8.held_out_images(key["data"], args.data_dir))
    out = sample_file(args, run)
    if not out.exists():
        call(log, *script, "sample", "--run", run, "--num", args.samples, "--cfg", RECIPE,
             "--steps", args.sampling_steps, "--sampler", "ddim", "--seed", seed, "--out", out)
    images, _ = measures.load_npz(out)
    values = measures.compare(measures.extract(images, network), real)
    return dict(key, dim=model.cfg.dim, depth=model.cfg.depth,
                honest_gmacs=sum(cost.count_macs(model)["honest"].values()) / 1e9,
                held_out_loss=np.mean(plain), held_out_log=np.mean(logs),
                **{f"band{b}": v for b, v in enumerate(plain)},
                **{f"cfg{RECIPE}_{name}": value for name, value in values.items()},
                seconds=time.time() - start)


def prepare(args, data):
    """The feature network, and the features of 10,000 training images."""
    source = train.shapes() if data == "shapes" else train.cifar10(args.data_dir)
    kept = data_folder(args, data) / "classifier.pt"
    if args.network:
        network = measures.load_network(args.network)
    elif kept.exists():
        network = measures.Classifier(len(source.names))
        network.load_state_dict(torch.load(kept, map_location="cpu", weights_only=True))
        network = network.to(train.pick_device()).eval()
    else:
        network = measures.train_classifier(source.images, source.labels, len(source.names))
        with train.replacing(kept) as file:
            torch.save(network.state_dict(), file)
    pick = np.sort(np.random.default_rng(0).permutation(len(source.labels))[:10_000])
    return network, measures.extract(source.images[pick], network)


def keep_features(args, data, network):
    """Writes the features of some real and generated images, of the first seed, for a t-SNE."""
    test = eq8.held_out_images(data, args.data_dir, 10_000)
    source, out = {"real": (test.images, test.labels)}, {}
    for variant in ("dit", "sana", "rung6"):
        path = sample_file(args, run_folder(args, data, variant, args.steps, args.first_seed))
        if not path.exists():
            return
        source[variant] = measures.load_npz(path)
    for name, (images, labels) in source.items():
        pick = np.concatenate([np.flatnonzero(labels == c)[:30] for c in range(10)])
        out[name] = measures.extract(images[pick], network)["pool"].cpu().numpy().astype("float16")
        out["labels"] = labels[pick]                        # the same for all: class by class
    np.savez_compressed(data_folder(args, data) / "features.npz", names=test.names, **out)


# ---- All runs ---------------------------------------------------------------------------------

def climb(args):
    """Makes the runs that OUT's table lacks."""
    table, todo = pathlib.Path(args.out) / "runs.csv", []
    lines, commit = measures.read(table), measures.commit()
    done = {tuple(line[k] for k in KEY) for line in lines}
    known = variants(args.model, SHAPE)
    usual = [name for name in known if name != "lambda0" and name not in NEIGHBOURS]
    for seed in range(args.first_seed, args.first_seed + args.seeds):   # the first of all first
        for data in args.data:
            for variant in args.variants or usual:
                extra, steps = flags(variant, known), split(variant)[1].get("steps", args.steps)
                key = (data, args.model, variant, seed, steps, args.samples, args.sampling_steps,
                       args.network or "classifier")
                if tuple(map(str, key)) not in done:
                    todo.append((dict(zip(KEY, key), commit=commit), extra))
    print(f"{len(done)} runs are in {table}, {len(todo)} are to do")
    networks = {data: prepare(args, data) for data in {key["data"] for key, _ in todo}}
    threads, failed = max(1, os.cpu_count() // args.workers), 0
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)                        # of the scripts
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        futures = {pool.submit(one_run, args, key, extra, *networks[key["data"]]): key
                   for key, extra in todo}
        try:
            for future in tqdm(concurrent.futures.as_completed(futures), "runs", len(futures)):
                try:
                    line = future.result().items()
                    lines.append({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line})
                    measures.save_log(table, lines)
                except train.Problem as problem:
                    failed += 1
                    tqdm.write(f"{futures[future]['data']} {futures[future]['variant']}: {problem}")
        except BaseException as error:
            stopping.set()
            for process in list(running):
                process.terminate()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                error = train.Problem("stopped; the same command goes on from here")
            raise error
    if not args.network:
        for data, (network, _) in networks.items():
            keep_features(args, data, network)
    if failed:
        raise train.Problem(f"{failed} runs failed; mend what they say and repeat the command")


def main():
    parser = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", default=["shapes"], choices=["shapes", "cifar10"])
    add("--data-dir", default="data", help="where cifar10 lies; other files there, other --out")
    add("--model", default=train.SMALL_MODEL, help="the full method; default: %(default)s")
    add("--variants", nargs="+", help="NAME or NAME:FIELD=VALUE,...; default: the first ten")
    add("--seeds", type=train.positive, default=3, help="how many; default: %(default)s")
    add("--first-seed", type=int, default=0, help="default: %(default)s")
    add("--steps", type=train.positive, default=3000, help="of training; default: %(default)s")
    add("--samples", type=train.positive, default=500, help="per run; default: %(default)s")
    add("--sampling-steps", type=train.positive, default=20, help="of DDIM; default: %(default)s")
    add("--network", help="a feature network, see measures.py; default: a classifier of the data")
    add("--workers", type=train.positive, help="runs at a time; default: %(default)s",
        default=1 if torch.cuda.is_available() else os.cpu_count())
    add("--out", default="runs/ladder", help="folder; default: %(default)s")
    args = parser.parse_args()
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    with open(f"{args.out}/.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise train.Problem(f"{args.out}: another process is at work in it") from None
        climb(args)


if __name__ == "__main__":
    train.explained(main)
