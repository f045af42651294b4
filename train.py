"""Trains DyDi-LiT and samples from it. `python train.py COMMAND --help` lists a command's options.

    python train.py                                         shapes, in ten minutes on two CPU cores
    python train.py --data cifar10 --model DyDi-LiT-S/2     CIFAR-10, for a GPU
    python train.py --data DIR --model DyDi-LiT-S/2         class folders of images, or latents
    torchrun --nproc_per_node=4 train.py --data DIR         four GPUs share every batch
    python train.py sample --run runs/shapes                a labelled grid of samples
    python train.py sample --run runs/shapes --num 50000    an .npz of samples, to be measured

notebooks/lab/encode.py makes latents; notebooks/lab/measures.py compares samples with data."""
import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import pathlib
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm.auto import tqdm

import dydilit

sys.path.insert(1, str(pathlib.Path(__file__).resolve().parent / "notebooks"))
from lab.common import (  # noqa: E402, F401
    Data, Parser, Problem, amount, cifar10, claimed, explained, load_checkpoint, load_data,
    load_vae, number, occupied, pixels, positive, read_image, replacing, save_curve, save_grid,
    save_log, shapes, write_npz)

# ---- Knobs --------------------------------------------------------------------------------------

SMALL_MODEL = "DyDi-LiT-XS/4"
KNOBS = {   # the small model's default (minutes on a CPU), the others' (the paper's), the meaning
    "steps": (4000, 100_600, "optimizer steps"),
    "batch_size": (16, 256, "images per step, over all processes"),
    "lr": (4e-3, 1e-4, "learning rate of AdamW, which runs without weight decay"),
    "warmup": (100, 0, "first steps, over which the learning rate rises to that"),
    "cooldown": (1.0, 0.0, "last share of the steps, over which the learning rate falls to zero"),
    "beta2": (0.99, 0.999, "decay of AdamW's second moment"),
    "log_loss": (1, 0, "1: minimize the logarithm of each image's loss, 0: the loss itself"),
    "ema": (0.998, 0.9999, "decay of the weights' moving average, which is what gets sampled"),
    "cfg": (1.5, 4.0, "guidance scale of the sample grids"),
    "sampling_steps": (50, 250, "denoising steps of the sample grids"),
    "log_every": (50, 50, "steps between lines of log.csv"),
    "save_every": (300, 1000, "steps between checkpoints"),
    "sample_every": (2000, 10_000, "steps between sample grids"),
}
LOSSES = ("loss", "simple", "variational")      # the logged ones
share = number(float, 0, 0.9999999)
LIMITS = dict(lr=number(float, 1e-30, 1e6), cooldown=number(float, 0, 1), ema=share, beta2=share,
              sampling_steps=number(int, 1, 1000), log_loss=number(int, 0, 1),
              warmup=number(int, 0, 2 ** 31))


def arguments(argv):
    """The parsed command line. Without a command it means `train`."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    train, sample = commands.add_parser("train"), commands.add_parser("sample")
    for add in (train.add_argument, sample.add_argument):
        add("--seed", type=number(int, 0, 2 ** 31), default=0, help="of everything random")
    add = train.add_argument
    add("--data", default="shapes", help="shapes (built in), cifar10, a folder of class folders of "
        "images, or what encode.py wrote")
    add("--data-dir", default="data", help="where cifar10 lies, or is downloaded to")
    add("--image-size", type=positive, help="side of a folder's images, cropped; default: 32")
    add("--model", default=SMALL_MODEL, help=f"one of {', '.join(dydilit.MODELS)}")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of ModelConfig")
    add("--run", help="folder of the run; default: runs/ and the data's name")
    for name, (small, paper, meaning) in KNOBS.items():
        kind = LIMITS.get(name) or (positive if isinstance(paper, int) else amount)
        add("--" + name.replace("_", "-"), type=kind,
            help=f"{meaning}; default: {small:g} ({SMALL_MODEL}), {paper:g}")
    add("--accumulate", type=positive, default=1, help="parts of a batch, if it exceeds the memory")
    add("--no-flip", action="store_true", help="no horizontal flips, for text and the like")
    add("--compile", action="store_true", help="torch.compile the model")
    add = sample.add_argument
    add("--run", required=True, help="folder of a run")
    add("--out", help="the .png to write, or with --num the .npz; default: in the run's folder")
    add("--num", type=positive, help="write so many samples, evenly over the classes, as an .npz")
    add("--classes", help="names or numbers, with commas; default: ten for a grid, all for --num")
    add("--steps", type=LIMITS["sampling_steps"], help="denoising steps; default: as in training")
    add("--cfg", type=amount, help="guidance scale; default: as in training")
    add("--sampler", choices=["ddpm", "ddim"], default="ddpm", help="ancestral or deterministic")
    add("--batch-size", type=positive, default=50, help="images per pass; default: %(default)s")
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["train", *argv]
    return parser.parse_args(argv)


# ---- Devices ------------------------------------------------------------------------------------

def pick_device():
    """This process's GPU, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def has_bfloat16(device):
    """Whether a device computes in bfloat16 itself. A T4, for one, only emulates it, slowly."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device):
    """A context of mixed precision, where bfloat16 makes it fast."""
    return torch.autocast("cuda", torch.bfloat16, enabled=has_bfloat16(device))


def send(tensor, device):
    """A copy on a device. Through pinned memory, the program need not wait for the GPU."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def keep_freed_memory():
    """Has glibc keep freed memory; otherwise page faults cost a CPU's training step a quarter."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)         # M_MMAP_MAX: large blocks, too, come from the heap,
        libc.mallopt(-1, -1)        # M_TRIM_THRESHOLD: which never shrinks


# ---- Sampling -----------------------------------------------------------------------------------

@torch.no_grad()
def generate(model, labels, steps, cfg, sampler="ddpm", seed=0, vae=None, batch_size=50):
    """One sample per label, (M, H, W, 3) uint8. vae: what decodes them, if they are latents."""
    device = model.pos_embed.device
    shape = (model.cfg.in_channels, model.cfg.input_size, model.cfg.input_size)
    generator, images = torch.Generator(device).manual_seed(seed), []
    diffusion = dydilit.GaussianDiffusion().to(device)
    batches = torch.tensor(labels, device=device).split(batch_size)
    for y in tqdm(batches, desc="batches", leave=False, disable=len(batches) == 1):
        def guided(x, t):
            with autocast(device):
                return model.forward_with_cfg(x, t, y, cfg)

        x = torch.randn((len(y), *shape), generator=generator, device=device)
        x = diffusion.sample(guided, x, steps, sampler, clip_x0=vae is None, generator=generator)
        if vae is not None:
            x = (x / vae.config.scaling_factor).split(4)        # a decoder takes much memory
            x = torch.cat([vae.decode(part).sample for part in x])
        x = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        images.append(x.permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(images)


def sample(args, parts):
    """Samples of a run: a labelled grid, or with --num an .npz."""
    run, device = pathlib.Path(args.run), pick_device()
    out = pathlib.Path(args.out or run / ("samples.npz" if args.num else "grid.png"))
    if out.suffix != (".npz" if args.num else ".png"):
        raise Problem(f"--out {out}: give a name in .npz with --num, and one in .png without it")
    checkpoint = run / "checkpoint.pt"
    model, state = dydilit.load_model(
        checkpoint if checkpoint.exists() else run / "model.pt", parts)
    names, vae = state["data"]["names"], state["data"]["vae"]
    classes = range(len(names) if args.num else min(len(names), 10))
    if args.classes:
        numbers = {**{str(c): c for c in range(len(names))}, **{n: c for c, n in enumerate(names)}}
        for name in args.classes.split(","):
            if name not in numbers:
                raise Problem(f"--classes {name}: this run knows 0..{len(names) - 1} and names")
        classes = [numbers[name] for name in args.classes.split(",")]
    count = args.num or 10 * len(classes)
    labels = [classes[i * len(classes) // count] for i in range(count)]
    steps = args.steps or state["knobs"]["sampling_steps"]
    cfg = state["knobs"]["cfg"] if args.cfg is None else args.cfg
    images = generate(model.to(device).fuse(), labels, steps, cfg, args.sampler, args.seed,
                      load_vae(vae, device) if vae else None, args.batch_size)
    write_npz(out, images, labels) if args.num else save_grid(out, images, labels, names)
    print(f"{out}: {len(images)} samples, step {state['step']}, {steps} steps, guidance {cfg:g}")


# ---- Training -----------------------------------------------------------------------------------

def overrides(pairs):
    """{"n_heads": 4} from ["n_heads=4"]: fields of ModelConfig, in JSON or as plain words."""
    fields, parsed = {field.name for field in dataclasses.fields(dydilit.ModelConfig)}, {}
    for name, equals, value in (pair.partition("=") for pair in pairs):
        if not equals or name not in fields:
            raise Problem(f"--set {name}{equals}{value}: give FIELD=VALUE with a field of "
                          "dydilit.ModelConfig")
        try:
            parsed[name] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name] = value
    return parsed


@functools.lru_cache(maxsize=2)
def epoch_order(total, epoch, seed):
    """The random order in which an epoch goes through the data."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed * 2 ** 32 + epoch))


def batch_indices(total, batch_size, step, seed):
    """The images of a step: the next slice of the epochs' orders, one after the other."""
    start, end = step * batch_size, (step + 1) * batch_size
    epochs = range(start // total, (end - 1) // total + 1)
    orders = torch.cat([epoch_order(total, epoch, seed) for epoch in epochs])
    return orders[start - epochs[0] * total:end - epochs[0] * total]


class Training:
    """A run: what it trains, on what data, and how far it is."""

    def __init__(self, args, data, folder, device, rank, world, parts):
        self.args, self.data, self.folder, self.device = args, data, folder, device
        self.rank, self.world, self.parts = rank, world, parts
        self.checkpoint = folder / "checkpoint.pt"
        torch.manual_seed(args.seed)
        given, changed = data.model_shape(), overrides(args.set)
        for name in given.keys() & changed.keys():
            raise Problem(f"--set {name}={changed[name]}: the data decide this, they have "
                          f"{given[name]}; leave it away")
        self.model = dydilit.build_model(args.model, parts, **given, **changed).to(device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), args.lr, (0.9, args.beta2),
                                           weight_decay=0, fused=True)
        self.diffusion = dydilit.GaussianDiffusion().to(device)
        self.step, self.log, self.stop = 0, [], False
        # Since the last line of the log: sums of three losses, images, and the largest gradient.
        self.window = torch.zeros(5, device=device)
        # What makes a run what it is may not change when it resumes.
        some = data.images[::-(-len(data.images) // 64)].tobytes()
        self.identity = dict(
            dataclasses.asdict(self.model.cfg), names=data.names, images=len(data.labels),
            images_sha256=hashlib.sha256(some).hexdigest(), flip=data.flip, seed=args.seed,
            **{name: getattr(args, name) for name in (
                "batch_size", "lr", "warmup", "cooldown", "beta2", "log_loss", "ema")})

    def resume(self):
        """Goes on from the folder's checkpoint, or else makes sure that the folder is empty."""
        if self.checkpoint.exists():
            state = load_checkpoint(self.checkpoint, self.parts)
            for name, value in self.identity.items():
                if (before := state["identity"].get(name)) != value:
                    raise Problem(f"{self.checkpoint}: this run has {name} {before!s:.60}, not "
                                  f"{value!s:.60}; repeat its flags, or choose another --run")
            self.model.load_state_dict(state["weights"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.window.copy_(state["window"])
            self.step, self.log = state["step"], state["log"]
            if self.rank == 0:
                print(f"{self.folder}: resuming at step {self.step} of {self.args.steps}")
        elif self.rank == 0 and occupied(self.folder):
            raise Problem(f"{self.folder}: it has files but no checkpoint; choose another --run")

    def on_signal(self, number, frame):
        """The first Ctrl-C asks the run to stop after its step, the second insists."""
        self.stop = True
        signal.signal(number, signal.SIG_DFL)

    def run(self):
        """Trains until --steps or until a signal. Returns whether it came to --steps."""
        args, main = self.args, self.rank == 0
        self.vae = load_vae(self.data.vae, self.device) if self.data.vae and main else None
        if not self.checkpoint.exists():
            self.save()                                     # from here on the folder is this run's
        if main:
            config = dict(vars(args), model_config=dataclasses.asdict(self.model.cfg))
            with replacing(self.folder / "config.json", "w") as file:
                json.dump(config, file, indent=1)
        if main and self.device.type == "cuda" and not has_bfloat16(self.device):
            print("This GPU does not compute in bfloat16; training runs in float32.")
        parallel = torch.nn.parallel.DistributedDataParallel
        self.wrapped = parallel(self.model) if self.world > 1 else self.model
        self.forward = torch.compile(self.wrapped) if args.compile else self.wrapped
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        self.earlier, self.started = float(self.log[-1]["seconds"]) if self.log else 0, time.time()
        with tqdm(desc="training", total=args.steps, initial=min(self.step, args.steps),
                  unit="step", disable=not main) as self.bar:
            while self.step < args.steps:
                picture = self.folder / f"samples-{self.step:07d}.png"
                due = self.step and self.step % args.sample_every == 0
                if main and due and not picture.exists():
                    self.grid(picture)
                self.train_step()
                self.step += 1
                self.bar.update()
                at_log = self.step % args.log_every == 0 or self.step == args.steps
                if at_log:
                    self.report()
                stop = self.all_agree_to_stop(at_log)
                if stop or self.step % args.save_every == 0 or self.step == args.steps:
                    self.save()
                if stop:
                    break
        return self.step >= args.steps

    def train_step(self):
        """One step of the optimizer; it does not wait for the GPU.

        Everything random in it comes from the seed and the step's number. So a resumed run needs no
        generator's state, and any number of processes sees the same images and the same noise.
        """
        args, size, cfg = self.args, self.args.batch_size, self.model.cfg
        seed = (args.seed * 2 ** 32 + self.step) % 2 ** 62
        generator = torch.Generator().manual_seed(seed)
        index = batch_indices(len(self.data.labels), size, self.step, args.seed)
        mirror = torch.rand(size, generator=generator) < 0.5
        # A batch's timesteps are spread evenly, one in each of `size` equal parts of 0..999.
        parts = torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)
        t = (parts / size * 1000).long().clamp(max=999)
        shape = (size, cfg.in_channels, cfg.input_size, cfg.input_size)
        noise = torch.randn(shape, generator=generator)
        torch.manual_seed((seed * self.world + self.rank) % 2 ** 63)        # for the label dropout
        self.model.train()
        mine = torch.arange(size).chunk(self.world)[self.rank]
        sums = torch.zeros(3, device=self.device)
        for part in (micro := mine.chunk(args.accumulate)):
            batch = *self.data.batch(index[part], mirror[part]), t[part], noise[part]
            x, y, t_part, noise_part = (send(tensor, self.device) for tensor in batch)
            wait = self.world > 1 and part is not micro[-1]         # gradients travel once a step
            with self.wrapped.no_sync() if wait else contextlib.nullcontext():
                with autocast(self.device):
                    losses = self.diffusion.losses(self.forward, x, y, t_part, noise_part)
                # With the logarithm, every noise level counts alike, however small its loss is.
                objective = losses["loss"].log() if args.log_loss else losses["loss"]
                (objective.sum() / len(mine)).backward()
            sums += torch.stack([losses[name].detach().sum() for name in LOSSES])
        if self.world > 1:
            dist.all_reduce(sums)
        self.window[:3] += sums
        self.window[3] += size
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.window[4] = torch.maximum(self.window[4], torch.nn.utils.get_total_norm(gradients))
        rise = (self.step + 1) / max(1, args.warmup)
        fall = (1 - self.step / args.steps) / args.cooldown if args.cooldown else 1
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * min(1, rise, fall)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()),
                                 1 - args.ema)

    def check_finite(self):
        """Stops a run whose loss or gradient is no number before it can spoil the checkpoint."""
        if not self.window.isfinite().all():
            raise Problem(f"the loss is no longer finite at step {self.step}; {self.checkpoint} "
                          "keeps the last good weights: start another --run with a lower --lr")

    def report(self):
        """Writes what happened since the last report into log.csv and the progress bar."""
        self.check_finite()
        means = (self.window[:3] / self.window[3]).tolist()
        row = dict(zip(LOSSES, means), grad_norm=self.window[4].item(),
                   seconds=self.earlier + time.time() - self.started)
        self.log.append(dict(step=self.step, images=self.step * self.args.batch_size,
                             **{name: f"{value:.6g}" for name, value in row.items()}))
        if self.rank == 0:
            save_log(self.folder / "log.csv", self.log)
        rate = (self.bar.format_dict["rate"] or 0) * self.args.batch_size
        self.bar.set_postfix_str(f"loss {means[0]:.4f}, {rate:.0f} images/s")
        self.window.zero_()

    def all_agree_to_stop(self, at_log):
        """Whether any process got a signal. Several ask each other only where they wait anyway."""
        if self.world == 1 or not at_log:
            return self.stop and self.world == 1
        stop = torch.tensor(float(self.stop), device=self.device)
        dist.all_reduce(stop)
        return stop.item() > 0

    def about(self):
        """What sampling needs besides weights."""
        return dict(step=self.step, knobs=vars(self.args), model=dataclasses.asdict(self.model.cfg),
                    data=dict(names=self.data.names, vae=self.data.vae))

    def save(self):
        """Replaces the checkpoint, unless the run has gone wrong."""
        self.check_finite()
        if self.rank == 0:
            with replacing(self.checkpoint) as file:
                torch.save(dict(
                    self.about(), format="dydilit", window=self.window, log=self.log,
                    identity=self.identity, weights=self.model.state_dict(),
                    ema=self.ema.state_dict(), optimizer=self.optimizer.state_dict()), file)

    def save_model(self, path):
        """Writes the averaged weights, in half precision, as a small file for load_model."""
        ema = {name: value.half() for name, value in self.ema.state_dict().items()}
        with replacing(path) as file:
            torch.save(dict(self.about(), ema=ema), file)

    def grid(self, path):
        """Samples of the moving average, ten of each of up to ten classes."""
        labels = [c for c in range(min(len(self.data.names), 10)) for _ in range(10)]
        micro = self.args.batch_size // (self.world * self.args.accumulate)     # what fits
        images = generate(copy.deepcopy(self.ema).fuse(), labels, self.args.sampling_steps,
                          self.args.cfg, vae=self.vae, batch_size=micro)
        save_grid(path, images, labels, self.data.names)


def train(args, parts):
    """Trains until --steps, from the run's last checkpoint if there is one."""
    for name, (small, paper, _) in KNOBS.items():
        if getattr(args, name) is None:
            setattr(args, name, small if args.model == SMALL_MODEL else paper)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % (world * args.accumulate):
        raise Problem(f"--batch-size {args.batch_size}: not a multiple of {world} processes x "
                      f"--accumulate {args.accumulate}")
    folder = pathlib.Path(args.run or pathlib.Path("runs") / pathlib.Path(args.data).resolve().name)
    device = pick_device()
    if world > 1:                       # the others wait for the first one's download and grids
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=1))
        if rank > 0:
            dist.barrier()
    data = load_data(args)
    if world > 1 and rank == 0:
        dist.barrier()
    data.flip &= not args.no_flip
    if len(data.labels) < args.batch_size:
        raise Problem(f"--data {args.data}: {len(data.labels)} images are fewer than one batch; "
                      f"add images or lower --batch-size {args.batch_size}")
    training = Training(args, data, folder, device, rank, world, parts)
    with claimed(folder) if rank == 0 else contextlib.nullcontext():
        training.resume()
        finished = training.run()
        if finished and rank == 0:
            training.save_model(folder / "model.pt")
            save_curve(folder / "loss.png", training.log)
            training.grid(folder / "samples.png")
            print(f"{folder}: {args.steps} steps done; look at samples.png and loss.png")
        elif rank == 0:
            print(f"{training.checkpoint}: saved at step {training.step}; repeat the command")
    if world > 1:
        dist.destroy_process_group()
    if not finished:
        sys.exit(130)


def main(argv=None, parts=dydilit.block_parts):
    args = arguments(sys.argv[1:] if argv is None else argv)
    keep_freed_memory()
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else "highest")
    {"train": train, "sample": sample}[args.command](args, parts)


if __name__ == "__main__":
    explained(main)
