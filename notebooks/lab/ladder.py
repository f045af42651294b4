"""Trains, samples and measures the variants that the paper's tables compare, with seeds: the data of notebook 11.

    python notebooks/lab/ladder.py --data shapes                                            the built-in set
    python notebooks/lab/ladder.py --data cifar10 --data-dir DIR                            CIFAR-10, or files in its layout
    python notebooks/lab/ladder.py --data cifar10 --model DyDi-LiT-S/2 --steps 50000        for a GPU
    python notebooks/lab/ladder.py --data shapes --variants rung6 rung6:n_heads=4,lr=1e-3   other questions
    python notebooks/lab/ladder.py --data cifar10 --first-seed 100 --variants lambda0:normalizer=none ...   notebook 11's
    python notebooks/lab/ladder.py --data cifar10 --first-seed 100 --variants pixart edit dig moh lit ...   notebook 12's

Variants: rung1 .. rung6 of Table 4 (rung1 is Sana, rung6 DyDi-LiT); map of Table 5 and increasing of Table 6, both
without the convolution, as rung5 is, with which those tables compare them; sana and dit, of Table 1, at rung6's honest
MACs; only if they are named, lambda0, which is rung5 with lambda held at 0, and pixart, edit, dig, moh and lit, the
other systems of Tables 1 to 3 at rung6's honest MACs. normalizer=NAME after a colon is a denominator of eq8.py. Images,
timesteps and noise are the same for all variants of a seed. OUT/runs.csv gets a line per run, blocks.csv a line per run
and block, routers.csv a line per run and router, real.csv a line per data set: what real images would score in place of
the generated ones. Stopped at any moment, the same command goes on. A line's `commit` is that of the code at the start.
"""
import argparse
import concurrent.futures
import contextlib
import csv
import json
import math
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import dydilit  # noqa: E402
import train  # noqa: E402
from lab import cost, eq8, measures  # noqa: E402
from lab.measures import commit, read  # noqa: E402
from lab.neighbours import NEIGHBOURS, lit_heads  # noqa: E402

RECIPE = "2"                    # the guidance of the small model's recipe when the experiment was made
GUIDANCES = ("1", RECIPE, "4")  # 1 and 4 are Table 1's scales; Tables 4 to 6 are at 4
BANDS = 10                      # of timesteps
KEY = ("data", "model", "variant", "seed", "steps", "samples", "sampling_steps", "network")


# ---- What is compared -----------------------------------------------------------------------------------------------

def honest_macs(model, **overrides):
    """Multiply-accumulates of a forward pass, all that run. overrides: what build_model takes, also parts."""
    with torch.device("meta"):
        return sum(cost.count_macs(dydilit.build_model(model, **overrides))["honest"].values())


def equal_macs(model, base, parts=dydilit.block_parts, multiple=4, **overrides):
    """overrides with the width that brings another architecture closest to the honest MACs of `model` with `base`.

    parts: its blocks' parts; multiple: of what its widths must be, besides 4 and n_heads.
    """
    target, step = honest_macs(model, **base), math.lcm(4, multiple, overrides.get("n_heads", 1))
    widths = range(step, 2 * dydilit.MODELS[model]["dim"], step)
    dim = min(widths, key=lambda dim: abs(honest_macs(model, parts=parts, **base, **overrides, dim=dim) - target))
    return dict(overrides, dim=dim)


def variants(model, base):
    """{variant: overrides of `model`}; base: the data's fields of ModelConfig."""
    out = {f"rung{i}": dict(overrides) for i, (_, overrides) in enumerate(dydilit.LADDER, 1)}
    out["lambda0"] = dict(out["rung5"])                 # and eq8.py in place of train.py
    out["map"] = dict(out["rung5"], differential="map")
    out["increasing"] = dict(out["rung5"], lambda_init=[0.2, 0.8])
    with torch.device("meta"):
        cfg = dydilit.build_model(model, **base).cfg
    out["sana"] = equal_macs(model, base, **out["rung1"])
    depth, heads = round(cfg.depth * 12 / 9), cfg.dim // 64         # the paper's ratio of depths
    out["dit"] = equal_macs(model, base, attention="softmax", depth=depth, n_heads=max(4, heads))
    for name, multiple, overrides in [                              # ratios of 9 and 15 to 9: see cost.NEIGHBOUR_GFLOPS
            ("pixart", 4, dict(depth=depth, n_heads=max(4, heads))),
            ("edit", 8, dict(depth=cfg.depth)),                     # half the width in four groups
            ("dig", 2 * max(2, heads), dict(depth=round(cfg.depth * 15 / 9), n_heads=max(2, heads))),   # half in heads
            ("moh", 4, dict(depth=depth, n_heads=max(6, heads))),   # as many as its S model has: a router needs a choice
            ("lit", lit_heads(cfg.dim), dict(depth=depth))]:
        out[name] = equal_macs(model, base, NEIGHBOURS[name], multiple, **overrides)
    return out


def form(variant):
    """The word of eq8.py for a variant: lambda0, and what has normalizer=NAME after its colon. "" for any other."""
    name, _, changes = variant.partition(":")
    chosen = [pair.partition("=")[2] for pair in changes.split(",") if pair.startswith("normalizer=")]
    if name == "lambda0":
        return "lambda0-" + (chosen or ["length"])[-1]
    return chosen[-1] if chosen else ""


def trainer(variant):
    """What trains a variant, and samples from it: a script, and perhaps a first word after it."""
    name = variant.partition(":")[0]
    if name in NEIGHBOURS:
        return "notebooks/lab/neighbours.py", name
    return ("notebooks/lab/eq8.py", form(variant)) if form(variant) else ("train.py",)


def blocks_of(variant):
    """What build_model takes as parts for a variant."""
    if form(variant):
        return eq8.parts_with(form(variant))
    return NEIGHBOURS.get(variant.partition(":")[0], dydilit.block_parts)


def flags(text, known):
    """train.py's flags for a variant: a name, and after a colon fields of ModelConfig or train.py's knobs to change.

    Also after the colon, normalizer=NAME is a denominator of Eq. 8. No flag says it, but the script, see form.
    """
    name, _, changes = text.partition(":")
    if name not in known:
        raise train.Problem(f"--variants {name}: choose from {', '.join(known)}")
    out, fields = [], dict(known[name])
    if form(text) not in ["", *eq8.WORDS]:
        raise train.Problem(f"--variants {text}: choose the normalizer from {', '.join(eq8.Divided.DENOMINATORS)}")
    for pair in filter(None, changes.split(",")):
        field, _, value = pair.partition("=")
        if field == "normalizer":
            continue
        if field in train.KNOBS:
            out += ["--" + field.replace("_", "-"), value]
        else:
            with train.blaming("--variants", "see train.py train --help", argparse.ArgumentTypeError):
                fields.update([train.override(pair)])
    return out + (["--set", *(f"{k}={json.dumps(v)}" for k, v in fields.items())] if fields else [])


# ---- What is measured on a trained model ----------------------------------------------------------------------------

def noisy_band(data, band):
    """The held-out images with noise of timesteps within a band, the same in every call. x_0, x_t, noise, labels, t."""
    width, generator = 1000 // BANDS, torch.Generator().manual_seed(band)
    t = band * width + torch.randint(width, (len(data.labels),), generator=generator)
    return *eq8.noisy(data, t, seed=1000 + band), t


@torch.no_grad()
def held_out_losses(model, data, batch=100):
    """Losses on held-out images with noise that is always the same, a number per band of timesteps.

    Returns two lists: the mean squared error of the predicted noise, and the mean logarithm of an image's loss, which is
    what training minimizes.
    """
    device, plain, logs = model.pos_embed.device, [], []
    diffusion = dydilit.GaussianDiffusion().to(device)
    for band in range(BANDS):
        x, _, noise, y, t = noisy_band(data, band)
        batches = zip(*(a.to(device).split(batch) for a in (x, y, t, noise)))
        found = [diffusion.losses(model, *inputs) for inputs in batches]
        plain.append(torch.cat([losses["simple"] for losses in found]).mean().item())
        logs.append(torch.cat([losses["loss"] for losses in found]).log().mean().item())
    return plain, logs


def attention_map(attn, x):
    """The N x N map that weighs the values, per head, convolution left out: what attention makes of unit vectors."""
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    if isinstance(attn, dydilit.SoftmaxAttention):
        q, k, _ = (dydilit.split_heads(t, attn.n_heads) for t in attn.qkv(x).chunk(3, dim=-1))
        return dydilit.softmax_attention(q, k, eye.unsqueeze(1).expand(-1, attn.n_heads, -1, -1))
    if isinstance(attn, dydilit.DyDiLA):
        (q, k, _), (q_red, k_red) = attn.qkv(x).chunk(3, dim=-1), attn.projection(x)
        out = attn.differential(*attn.kernel(q, q_red, k, k_red), eye.repeat(1, 1, attn.n_heads), attn.n_heads)
        return dydilit.split_heads(out, attn.n_heads)
    cfg = attn.cfg
    q, k = attn.projection(x) if cfg.dynamic_projection else attn.qkv(x).chunk(3, dim=-1)[:2]
    if cfg.kernel == "dynamic":
        q, k = attn.kernel(q, k)
    else:
        q, k = (dydilit.focused_kernel(z, cfg.gamma_init) if cfg.kernel == "focused" else z.relu() for z in (q, k))
    q, k = (dydilit.split_heads(z, cfg.n_heads) for z in (q, k))
    return dydilit.linear_attention(q, k, eye.unsqueeze(1).expand(-1, cfg.n_heads, -1, -1))


def similarity(tokens):
    """Mean cosine between two different tokens of an image, (B, N, d) -> a number."""
    unit, n = torch.nn.functional.normalize(tokens, dim=-1), tokens.shape[1]
    return ((unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))).mean() / (n * (n - 1))).item()


def mutual_information(counts):
    """Bits that a class tells of a token's choice. counts: (..., classes, choices)."""
    p = counts / counts.sum((-2, -1), keepdims=True)
    independent = p.sum(-1, keepdims=True) * p.sum(-2, keepdims=True)
    return (p * np.log2(np.where(p > 0, p, 1) / np.where(p > 0, independent, 1))).sum((-2, -1))


@torch.no_grad()
def look_inside(model, data, n=200, shuffles=200):
    """Lines for blocks.csv and routers.csv, from n held-out images at all noise levels.

    Of a neighbour's attention only the tokens are looked at, but for the full softmax attention that some of its blocks have.
    """
    t = torch.randint(1000, (n,), generator=torch.Generator().manual_seed(0))
    _, x_t, _, y = eq8.noisy(data, t, seed=0)
    blocks, chosen, hooks, subtracted = [], {}, [], []

    def attention(module, inputs, output):
        line = dict(block=len(blocks), row_entropy="", row_variance="", similarity_in=similarity(inputs[0]),
                    similarity_out=similarity(output))
        if isinstance(module, (dydilit.DyDiLA, dydilit.SoftmaxAttention)):
            weights = attention_map(module, inputs[0])
            weights = weights.abs() / weights.abs().sum(-1, keepdim=True).clamp_min(1e-12)      # some may be negative
            line["row_entropy"] = measures.row_entropy(weights).mean().item()
            line["row_variance"] = measures.row_variance(weights).mean().item()
        line["subtracted_q"] = subtracted.pop() if subtracted else ""
        subtracted.clear()
        for name, bank in (("gamma", getattr(getattr(module, "kernel", None), "gammas", None)),
                           ("lambda", getattr(getattr(module, "differential", None), "lambdas", None))):
            for f in ("mean", "min", "max"):
                line[f"{name}_{f}"] = "" if bank is None else getattr(bank, f)().item()
        blocks.append(line)

    def difference(module, inputs, output):
        q, q_red = inputs[:2]
        lambda_q = module.choose(module.router_q, q, q_red).squeeze(1)
        subtracted.append(((lambda_q * q_red).norm(dim=-1).mean() / q.norm(dim=-1).mean()).item())

    def choices(module, inputs, output):
        chosen[names[module]] = output.sum(1).round().long().cpu().numpy()

    names = {module: name for name, module in model.named_modules()}
    hooks += [block.attn.register_forward_hook(attention) for block in model.blocks]
    for module in names:
        if isinstance(module, dydilit.TokenDifferential):
            hooks.append(module.register_forward_hook(difference))
        if isinstance(module, dydilit.Router):
            hooks.append(module.register_forward_hook(choices))
    model(*(a.to(model.pos_embed.device) for a in (x_t, t, y)))
    for hook in hooks:
        hook.remove()
    rng, routers = np.random.default_rng(0), []
    for name, counts in chosen.items():                     # (n, choices): each image's tokens by choice
        classes = np.eye(len(data.names))[y.numpy()]
        by_class = np.stack([classes[order].T @ counts for order in (np.arange(n), *map(rng.permutation, [n] * shuffles))])
        (information, *shuffled), share = mutual_information(by_class), counts.sum(0) / counts.sum()
        favourites, *favourites_shuffled = [len(set(table.argmax(1))) for table in by_class]
        _, block, _, router = name.split(".", 3)
        banks = dict(model.blocks[int(block)].attn.named_parameters())
        bank = banks.get({"kernel": "kernel.gammas", "differential": "differential.lambdas"}.get(router.split(".")[0]))
        routers.append(dict(
            block=block, router=router, choices=len(share), perplexity=1 / np.prod(share[share > 0] ** share[share > 0]),
            unused=(share == 0).sum(), value="" if bank is None else float(share @ bank.cpu().numpy()),
            class_bits=information, class_bits_shuffled=np.mean(shuffled),
            shuffles_as_high=np.mean(shuffled >= information), favourites=favourites,
            favourites_shuffled=np.mean(favourites_shuffled)))
    return blocks, routers


# ---- A run ----------------------------------------------------------------------------------------------------------

called = []                     # the process that this one waits for


def call(log, script, *command):
    """Runs a script of this repository with these words after it, its output in `log`. Problem if it fails."""
    with open(log, "a") as out:
        called[:] = [subprocess.Popen([sys.executable, ROOT / script, *map(str, command)], stdout=out, stderr=out)]
        if called[0].wait():
            raise train.Problem(f"{log.read_text().strip().splitlines()[-1]} (all of it in {log})")


def data_folder(args, data):
    return pathlib.Path(args.out) / f"{data}-{args.model.replace('/', '-')}"


def run_folder(args, data, variant, steps, seed):
    return data_folder(args, data) / f"{variant.replace(':', '-')}-{steps}-{seed}"


def sample_count(args, guidance):
    """--samples at the recipe's guidance, a quarter of them at the others, which are looked at for exploration only."""
    return args.samples if guidance == RECIPE else -(-args.samples // 4)


def sample_file(args, run, guidance):
    return run / f"samples-cfg{guidance}-{sample_count(args, guidance)}-{args.sampling_steps}.npz"


def one_run(args, key, train_flags, known_network, made_by):
    """Trains, samples and measures. Returns its line of runs.csv, and its lines of blocks.csv and routers.csv."""
    train.keep_freed_memory()
    started, run = time.time(), run_folder(args, *(key[k] for k in ("data", "variant", "steps", "seed")))
    log = run.with_name(run.name + ".log")
    script, parts = trainer(key["variant"]), blocks_of(key["variant"])
    call(log, *script, "train", "--data", key["data"], "--data-dir", args.data_dir, "--model", args.model, "--run", run, "--seed",
         key["seed"], "--steps", key["steps"], "--sampling-steps", 20, "--sample-every", key["steps"], *train_flags)
    device = train.pick_device()
    model = dydilit.load_model(run / "checkpoint.pt", parts)[0].to(device)
    data = eq8.held_out_images(key["data"], args.data_dir)
    losses, logs = held_out_losses(model, data)
    blocks, routers = look_inside(model, data)
    last = list(csv.DictReader((run / "log.csv").read_text().splitlines()))
    row = dict(key, commit=made_by, dim=model.cfg.dim, depth=model.cfg.depth, parameters=sum(p.numel() for p in model.parameters()),
               honest_gmacs=sum(cost.count_macs(model)["honest"].values()) / 1e9, images=last[-1]["images"],
               train_loss=float(last[-1]["loss"]), max_grad_norm=max(float(line["grad_norm"]) for line in last),
               held_out_loss=float(np.mean(losses)), **{f"band{b}": loss for b, loss in enumerate(losses)},
               held_out_log=float(np.mean(logs)), **{f"log_band{b}": log for b, log in enumerate(logs)})
    network, real = known_network
    if args.network:                                        # TorchScript does not travel between processes
        network = measures.load_network(args.network)
    for guidance in GUIDANCES:
        out = sample_file(args, run, guidance)
        if not out.exists():
            call(log, *script, "sample", "--run", run, "--num", sample_count(args, guidance), "--steps", args.sampling_steps, "--cfg", guidance,
                 "--sampler", "ddim", "--seed", key["seed"], "--out", out)
        images, labels = measures.load_npz(out)
        generated = measures.extract(images, network)
        values = measures.compare(generated, real)
        if not args.network:
            right = generated["logits"].argmax(1).cpu().numpy() == labels
            values["recognized"] = right.mean()
            values["recognized_by_class"] = " ".join(f"{right[labels == c].mean():.3f}" for c in np.unique(labels))
        row.update({f"cfg{guidance}_{name}": value for name, value in values.items()})
    row.update(train_seconds=float(last[-1]["seconds"]), seconds=time.time() - started,
               threads=torch.get_num_threads(), device=device.type)
    return [row], [dict(key, **line) for line in blocks], [dict(key, **line) for line in routers]


def prepare(args, data):
    """The feature network and the features of 10,000 real images; the classifier is trained once and kept."""
    folder = data_folder(args, data)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "reference.npz").exists():
        call(folder / "reference.log", "notebooks/lab/measures.py", "reference", "--data", data, "--data-dir",
             args.data_dir, "--num", 10_000, "--out", folder / "reference.npz")
    images, labels = measures.load_npz(folder / "reference.npz")
    if args.network:
        return None, measures.extract(images, measures.load_network(args.network))
    kept = folder / "classifier.pt"
    if kept.exists():
        network = measures.Classifier(labels.max() + 1)
        try:
            network.load_state_dict(torch.load(kept, weights_only=True))
        except Exception as error:                          # the errors of pickle and zip are many
            raise train.Problem(f"{kept}: damaged ({type(error).__name__}); delete it, or choose another --out") \
                from None
        network = network.to(train.pick_device()).eval()
    else:
        source = train.shapes() if data == "shapes" else train.cifar10(args.data_dir)
        network = measures.train_classifier(source.images, source.labels, len(source.names))
        with train.replacing(kept) as part:
            torch.save(network.state_dict(), part)
    return network, measures.extract(images, network)


def yardstick(args, data, known_network):
    """The line of real.csv: held-out real images, as many as a run generates, measured as those are."""
    network, real = known_network
    test = eq8.held_out_images(data, args.data_dir, 10_000)
    found = measures.extract(test.images, network or measures.load_network(args.network))
    line = dict(data=data, samples=args.samples, network=args.network or "classifier",
                **measures.compare({name: f[:args.samples] for name, f in found.items()}, real))
    if not args.network:
        line["recognized"] = (found["logits"].argmax(1).cpu().numpy() == test.labels).mean()
    return line


def keep_features(args, data, known_network, per_class=30):
    """The features of some real and generated images, for notebook 10's t-SNE: features.npz in the data's folder, of
    the first seed and the recipe's guidance."""
    test, out, at = eq8.held_out_images(data, args.data_dir, 10_000), {}, RECIPE
    source = {"real": (test.images, test.labels)}
    for variant in ("dit", "sana", "rung6"):
        path = sample_file(args, run_folder(args, data, variant, args.steps, args.first_seed), at)
        if not path.exists():
            return
        source[variant] = measures.load_npz(path)
    for name, (images, labels) in source.items():
        pick = np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(len(test.names))])
        out[name] = measures.extract(images[pick], known_network[0])["pool"].cpu().numpy().astype(np.float16)
        out["labels"] = labels[pick]                        # the same for all: class by class
    np.savez_compressed(data_folder(args, data) / "features.npz", names=np.array(test.names), **out)


def stop(*_):
    raise KeyboardInterrupt


def leave(*_):
    """A worker's way out. After an exception it would begin the next run."""
    for process in called:
        process.terminate()
        with contextlib.suppress(ChildProcessError):        # not its wait(), whose lock is taken by the one interrupted
            os.waitpid(process.pid, 0)
    os._exit(1)


def rounded(line):
    return {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in line.items()}


def main():
    parser = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", default=["shapes"], choices=["shapes", "cifar10"])
    add("--data-dir", default="data", help="where cifar10 lies, or is downloaded to; other files there, another --out")
    add("--model", default=train.SMALL_MODEL, help="the full method, of which the variants are made; default: %(default)s")
    add("--variants", nargs="+", help="NAME, or NAME:FIELD=VALUE,... with something changed; default: all ten of Tables 1 and 4 to 6")
    add("--seeds", type=train.positive, default=3, help="how many; default: %(default)s")
    add("--first-seed", type=train.number(int, 0, 2 ** 31), default=0, help="default: %(default)s")
    add("--steps", type=train.positive, default=3000, help="of training; default: %(default)s")
    add("--samples", type=train.positive, default=500, help="per run at guidance " + RECIPE + ", a quarter at the others; default: %(default)s")
    add("--sampling-steps", type=train.positive, default=20, help="DDIM steps; default: %(default)s")
    add("--network", help="TorchScript file of a feature network, see measures.py; default: a classifier of the data")
    add("--workers", type=train.positive, default=1 if torch.cuda.is_available() else os.cpu_count(),
        help="runs at a time, which share the processor cores; default: %(default)s")
    add("--out", default="runs/ladder", help="folder; default: %(default)s")
    args = parser.parse_args()
    with train.claimed(pathlib.Path(args.out)):
        climb(args)


def climb(args):
    """Makes the runs that OUT's tables lack."""
    out, todo, made_by = pathlib.Path(args.out), [], commit()
    tables = {name: read(out / f"{name}.csv") for name in ("runs", "blocks", "routers", "real")}
    done = {tuple(line[k] for k in KEY) for line in tables["runs"]}

    def add(name, lines):
        tables[name] += map(rounded, lines)
        if tables[name]:
            measures.save_log(out / f"{name}.csv", tables[name])

    known = variants(args.model, dict(image_size=32, vae_factor=1, in_channels=3, n_classes=10))
    for seed in range(args.first_seed, args.first_seed + args.seeds):       # the first seed of everything comes first
        for data in args.data:
            for variant in args.variants or [name for name in known if name != "lambda0" and name not in NEIGHBOURS]:
                extra = flags(variant, known)
                steps = extra[extra.index("--steps") + 1] if "--steps" in extra else args.steps
                key = dict(data=data, model=args.model, variant=variant, seed=seed, steps=steps, samples=args.samples,
                           sampling_steps=args.sampling_steps, network=args.network or "classifier")
                if tuple(str(key[k]) for k in KEY) not in done:
                    todo.append((key, extra))
    print(f"{len(done)} runs are in {out / 'runs.csv'}, {len(todo)} are to do")
    unmeasured = set(args.data) - {line["data"] for line in tables["real"] if
                                   (line["samples"], line["network"]) == (str(args.samples), args.network or "classifier")}
    networks = {data: prepare(args, data) for data in unmeasured | {key["data"] for key, _ in todo}}
    for data in sorted(unmeasured):
        add("real", [yardstick(args, data, networks[data])])
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.workers))
    signal.signal(signal.SIGTERM, stop)
    pool = concurrent.futures.ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), signal.signal,
                                                  (signal.SIGTERM, leave))
    futures, failed = {pool.submit(one_run, args, key, extra, networks[key["data"]], made_by): key for key, extra in todo}, 0
    try:
        for future in tqdm(concurrent.futures.as_completed(futures), total=len(futures), desc="runs"):
            try:
                run, *parts = zip(("runs", "blocks", "routers"), future.result())
                for name, lines in (*parts, run):           # runs.csv last: its line says that the others are there
                    tables[name] = [line for line in tables[name]       # what a kill had left there of this run
                                    if any(line[k] != str(futures[future][k]) for k in KEY)]
                    add(name, lines)
            except train.Problem as problem:
                failed += 1
                tqdm.write(f"{futures[future]['data']} {futures[future]['variant']}: {problem}")
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)       # once is enough
        for worker in multiprocessing.active_children():    # and each ends what it has called
            worker.terminate()
        pool.shutdown(cancel_futures=True)
        raise
    if not args.network:
        for data, known_network in networks.items():
            keep_features(args, data, known_network)
    if failed:
        raise train.Problem(f"{failed} runs failed; put right what they say and give the same command again")


if __name__ == "__main__":
    try:
        main()
    except (train.Problem, ValueError, OSError) as error:
        sys.exit(f"ladder.py: {error}")
    except KeyboardInterrupt:
        sys.exit("ladder.py: stopped; the same command goes on from here")
