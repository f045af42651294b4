"""Trains DyDi-LiT and samples from it. `python train.py COMMAND --help` lists a command's options.

    python train.py                                         shapes, in ten minutes on two CPU cores
    python train.py --data cifar10 --model DyDi-LiT-S/2     CIFAR-10, for a GPU
    python train.py --data DIR --model DyDi-LiT-S/2         class folders of images, or latents
    torchrun --nproc_per_node=4 -- train.py --data DIR      four GPUs share every batch
    python train.py sample --run runs/shapes                a labelled grid of samples
    python train.py sample --run runs/shapes --num 50000    an .npz of samples, to be measured

Of this repository it needs dydilit.py alone. notebooks/lab/encode.py makes latents, and
notebooks/lab/measures.py compares samples with data."""
import argparse
import concurrent.futures
import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import shutil
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from matplotlib import style
from matplotlib.figure import Figure    # not pyplot, which would ask for a window system
from PIL import Image
from tqdm.auto import tqdm

import dydilit


# ---- Errors and files ---------------------------------------------------------------------------

class Problem(Exception):
    """Something the user can put right: one line that names the thing and the remedy."""


@contextlib.contextmanager
def blaming(what, remedy, kinds=Exception):
    """Makes a Problem of an error of these kinds: it lies in what the user gave."""
    try:
        yield
    except (Problem, MemoryError):
        raise
    except kinds as error:
        line = str(error).strip().partition("\n")[0]
        raise Problem(f"{what}: {line} ({type(error).__name__}); {remedy}") from error


def explained(function, *arguments):
    """Calls a program's main function and ends it in one line if the user can put things right."""
    try:
        function(*arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        if isinstance(error, MemoryError) or "out of memory" in line or "allocate memory" in line:
            line = "out of memory; train with a larger --accumulate, sample with less --batch-size"
        elif not (isinstance(error, (Problem, OSError))
                  or type(error).__module__.startswith("torch._")):     # what --compile raises
            raise                               # a mistake of the program's keeps its traceback
        sys.exit(f"{pathlib.Path(sys.argv[0]).name}: {line}")


@contextlib.contextmanager
def replacing(path, mode="wb", **options):
    """Opens a file that takes path's place when the block ends well: path is never half a file."""
    path = pathlib.Path(path)
    part = path.with_name(f".{path.name}.part")
    # On a full disk torch.save raises a RuntimeError, everything else an OSError.
    with blaming(path, "check the path and the free space", (OSError, RuntimeError)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, mode, **options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(folder):
    """Keeps a folder to this process until the block ends, or the process, even by kill -9."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):     # Windows; a file system without locks
            import fcntl
            handle = os.open(folder, os.O_RDONLY)       # it locks the folder: no file stays behind
            stack.callback(os.close, handle)
            with blaming(folder, "another process is at work in it", BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


# ---- Command line -------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Problem(f"{message}; {self.prog} --help lists what there is")


def number(kind, low, high):
    """A type for argparse: an int or a float from low to high."""
    def parse(text):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low}..{high}")
        return value
    parse.__name__ = kind.__name__      # argparse's messages show it
    return parse


def override(text):
    """A type for argparse: ("n_heads", 4) from "n_heads=4". The value is JSON or a plain word."""
    name, _, value = text.partition("=")
    if name not in FIELDS:
        raise argparse.ArgumentTypeError(f"{text}: no FIELD=VALUE; fields: {', '.join(FIELDS)}")
    with contextlib.suppress(json.JSONDecodeError):
        value = json.loads(value)
    return name, value


SMALL_MODEL = "DyDi-LiT-XS/4"
FIELDS = sorted(dydilit.ModelConfig.__dataclass_fields__.keys()
                - {"image_size", "vae_factor", "in_channels", "n_classes"})     # the data's matter
positive, amount, decay = number(int, 1, 2**31), number(float, 0, 1e6), number(float, 0, 0.9999999)
KNOBS = {   # default of the small model (minutes on a CPU), of the others (the paper's), type, help
    "steps": (4000, 100_600, positive, "optimizer steps"),
    "batch_size": (16, 256, positive, "images per step, over all processes"),
    "lr": (4e-3, 1e-4, amount, "learning rate of AdamW, which runs without weight decay"),
    "warmup": (100, 0, number(int, 0, 2**31), "first steps, in which the learning rate rises"),
    "cooldown": (1.0, 0.0, number(float, 0, 1), "last share of the steps, in which it falls"),
    "beta2": (0.99, 0.999, decay, "decay of AdamW's second moment"),
    "log_loss": (1, 0, number(int, 0, 1), "1: minimize the log of each image's loss, 0: the loss"),
    "ema": (0.998, 0.9999, decay, "decay of the weights' moving average, which gets sampled"),
    "cfg": (1.5, 4.0, amount, "guidance scale of the sample grids"),
    "sampling_steps": (50, 250, number(int, 1, 1000), "denoising steps of the sample grids"),
    "log_every": (50, 50, positive, "steps between lines of log.csv"),
    "save_every": (300, 1000, positive, "steps between checkpoints"),
    "sample_every": (2000, 10_000, positive, "steps between sample grids"),
}
LOSSES = ("loss", "simple", "variational")      # the logged ones


def arguments(argv):
    """The parsed command line. Without a command it means `train`."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    train, sample = commands.add_parser("train"), commands.add_parser("sample")
    for add in (train.add_argument, sample.add_argument):
        add("--seed", type=number(int, 0, 2**31), default=0, help="of everything random")
        add("--device", choices=["cuda", "mps", "cpu"], help="default: the first that there is")
    add = train.add_argument
    add("--data", default="shapes", help="shapes, cifar10, or a folder of class folders or latents")
    add("--data-dir", default="data", help="where cifar10 lies, or is downloaded to")
    add("--image-size", type=positive, help="side of a folder's images, cropped; default: 32")
    add("--model", default=SMALL_MODEL, help=f"one of {', '.join(dydilit.MODELS)}")
    add("--set", nargs="+", type=override, default=[], metavar="FIELD=VALUE", help="of the model")
    add("--run", help="folder of the run; default: runs/ and the data's name")
    for name, (small, paper, kind, meaning) in KNOBS.items():
        add("--" + name.replace("_", "-"), type=kind,
            help=f"{meaning}; default: {small:g} ({SMALL_MODEL}), {paper:g}")
    add("--accumulate", type=positive, default=1, help="parts of a batch, if it exceeds the memory")
    add("--compile", action="store_true", help="torch.compile the model")
    add = sample.add_argument
    add("--run", required=True, help="folder of a run")
    add("--out", help="the .png to write, or with --num the .npz; default: in the run's folder")
    add("--num", type=positive, help="write so many samples, evenly over the classes, as an .npz")
    add("--classes", help="names or numbers, with commas; default: ten for a grid, all for --num")
    add("--steps", type=number(int, 1, 1000), help="denoising steps; default: as in training")
    add("--cfg", type=amount, help="guidance scale; default: as in training")
    add("--sampler", choices=["ddpm", "ddim"], default="ddpm", help="ancestral or deterministic")
    add("--batch-size", type=positive, default=50, help="images per pass; default: %(default)s")
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["train", *argv]
    return parser.parse_args(argv)


# ---- Data ---------------------------------------------------------------------------------------

def pixels(images):
    """(B, H, W, 3) uint8 as floats (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclasses.dataclass
class Data:
    """Images with labels. Latents hold each image and its mirror image."""
    images: np.ndarray              # (M, H, W, 3) uint8, or latents (M, 2, C, S, S) float16
    labels: np.ndarray              # (M,)
    names: list                     # of the classes
    image_size: int                 # in pixels
    flip: bool = True               # whether mirrored images are as good as these
    vae: str = None                 # for latents: what decodes them

    def model_shape(self):
        """The fields of ModelConfig that fit a model to this data."""
        channels, side = self.images.shape[-3:-1] if self.vae else (3, self.image_size)
        return dict(image_size=self.image_size, vae_factor=self.image_size // side,
                    in_channels=channels, n_classes=len(self.names))

    def batch(self, index, mirror):
        """Images `index` as floats (B, C, S, S), those in `mirror` flipped, and their labels."""
        mirror, index = mirror & self.flip, index.numpy()
        if self.vae:
            x = torch.from_numpy(self.images[index, mirror.long().numpy()]).float()
        else:
            x = pixels(self.images[index])
            x = torch.where(mirror[:, None, None, None], x.flip(3), x)
        return x, torch.from_numpy(self.labels[index])


def disc(x, y, radius, right=0, up=0):
    return np.hypot(x - right, y - up) - radius


def box(x, y, width, height):
    return np.maximum(abs(x) - width, abs(y) - height)


def star(x, y):                                             # five mirrored wedges
    angle = abs((np.arctan2(x, y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    return 0.35 * np.hypot(x, y) * np.cos(angle) + 0.937 * np.hypot(x, y) * np.sin(angle) - 0.35


# The distance to each shape's outline, negative inside, for x and y from about -1 to 1. A minimum
# joins two shapes, a maximum leaves what they share, and a minus turns a shape inside out.
SHAPES = {
    "circle": lambda x, y: disc(x, y, 0.9),
    "ring": lambda x, y: abs(disc(x, y, 0.72)) - 0.2,
    "triangle": lambda x, y: np.maximum(-y, 0.866 * abs(x) + 0.5 * y) - 0.55,
    "star": star,
    "heart": lambda x, y: np.minimum((abs(x) + abs(y + 0.1) - 0.75) / 1.414,    # a tilted square
                                     disc(abs(x), y, 0.53, 0.375, 0.275)),      # and two discs
    "moon": lambda x, y: np.maximum(disc(x, y, 0.9), -disc(x, y, 0.75, 0.42, 0.12)),
    "cross": lambda x, y: np.minimum(box(x, y, 0.28, 0.88), box(x, y, 0.88, 0.28)),
    "smiley": lambda x, y: np.maximum(disc(x, y, 0.95), -np.minimum(            # without eyes,
        disc(abs(x), y, 0.19, 0.35, 0.3),                                       # without mouth
        np.maximum(abs(disc(x, y, 0.55)) - 0.12, y + 0.1))),
    "stripes": lambda x, y: np.maximum(box(x, y, 0.87, 0.87),
                                       abs((y + 0.87) % 0.696 - 0.174) - 0.174),
    "checkers": lambda x, y: np.maximum(box(x, y, 0.87, 0.87),
                                        np.where(x * y > 0, 1, -1) * np.minimum(abs(x), abs(y))),
}


def shapes(n=20_000, seed=0, size=32):
    """n pictures of ten shapes: place, size, tilt, colours and background vary between them."""
    rng = np.random.default_rng(seed)

    def colours(value):
        """One RGB colour per brightness, of random hue and saturation."""
        hue, saturation = rng.uniform(0, 1, (len(value), 1)), rng.uniform(0.2, 1, (len(value), 1))
        wheel = np.clip(abs((hue + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1, 0, 1)
        return (value[:, None] * (1 - saturation + saturation * wheel))[:, None, None]

    labels, images = rng.permutation(n) % len(SHAPES), np.empty((n, size, size, 3), np.uint8)
    axis = (np.arange(size) + 0.5) * 32 / size - 16         # 0 in the middle, 16 at the border
    column, row = axis.reshape(1, 1, -1), axis.reshape(1, -1, 1)
    for c, outline in enumerate(SHAPES.values()):
        which = np.flatnonzero(labels == c)
        m = len(which)
        radius = rng.uniform(12, 14.5, (m, 1, 1))
        tilt = np.radians(rng.uniform(-8, 8, (m, 1, 1)))
        x = column - rng.uniform(-1, 1, (m, 1, 1)) * (16 - radius) * 0.5
        y = row - rng.uniform(-1, 1, (m, 1, 1)) * (16 - radius) * 0.5
        u, v = np.cos(tilt) * x + np.sin(tilt) * y, np.sin(tilt) * x - np.cos(tilt) * y
        distance = outline(u / radius, v / radius) * radius * size / 32
        cover = np.clip(0.5 - distance, 0, 1)[..., None]    # the share of a pixel that is covered
        front, back = colours(rng.uniform(0.75, 1, m)), colours(rng.uniform(0, 0.3, m))
        slope = rng.uniform(-0.25, 0.25, (m, 2, 1, 1))      # light falls in from one side
        light = (1 + slope[:, 0] * column / 16 + slope[:, 1] * row / 16)[..., None]
        images[which] = np.clip((cover * front + (1 - cover) * (back * light)) * 255 + 0.5, 0, 255)
    return Data(images, labels, list(SHAPES), size, flip=False)


CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR_FILES = [f"data_batch_{k}.bin" for k in range(1, 6)]


def cifar10(data_dir, files=CIFAR_FILES):
    """Images of CIFAR-10's binary version in data_dir; downloaded first if they are not there."""
    folder, archive = pathlib.Path(data_dir), pathlib.Path(data_dir, "cifar-10-binary.tar.gz")
    if not (folder / files[0]).exists():
        folder = folder / "cifar-10-batches-bin"
    if not folder.exists():
        with blaming(archive, f"delete it, and fetch {CIFAR_URL} by other means"):
            archive.parent.mkdir(parents=True, exist_ok=True)
            if not archive.exists():
                torch.hub.download_url_to_file(CIFAR_URL, str(archive))
            if hashlib.sha256(archive.read_bytes()).hexdigest() != CIFAR_SHA256:
                raise ValueError("it is not CIFAR-10's binary version")
            shutil.unpack_archive(archive, data_dir)
    with blaming(folder, "replace these files, or choose an empty --data-dir for a download"):
        records = np.concatenate([np.fromfile(folder / name, np.uint8) for name in files])
        records = records.reshape(-1, 3073)                 # a label, and three planes of 32 x 32
        if records[:, 0].max() > 9:
            raise ValueError("there are labels beyond 9")
    meta = folder / "batches.meta.txt"
    names = meta.read_text().split() if meta.exists() else []
    images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Data(images, records[:, 0].astype(np.int64),
                names if len(names) == 10 else list("0123456789"), 32)


def class_folders(root):
    """The names of the class folders in a folder."""
    names = sorted(path.name for path in pathlib.Path(root).glob("[!.]*") if path.is_dir())
    if len(names) < 2:
        raise Problem(f"--data {root}: neither shapes, cifar10 nor a folder of two classes or more")
    return names


def image_folder(root, names):
    """The paths of all images in these class folders, and their labels, (M,)."""
    paths, labels, suffixes = [], [], Image.registered_extensions()
    for c, folder in enumerate(pathlib.Path(root, name) for name in names):
        found = sorted(p for p in folder.rglob("[!.]*") if p.suffix.lower() in suffixes)
        if not found:
            raise Problem(f"{folder}: no images in this class folder; add some or remove it")
        paths += found
        labels += [c] * len(found)
    return paths, np.array(labels)


def read_image(path, size):
    """An image, on white where it is transparent, cropped as ADM does: (size, size, 3) uint8."""
    with blaming(path, "replace or remove this image"), Image.open(path) as file:
        if file.mode.startswith("I"):                       # 16 bits of grey
            file = Image.fromarray((np.asarray(file) >> 8).astype(np.uint8))
        image = file.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image)[top:top + size, left:left + size]


def read_images(paths, size, **progress):
    """All images, (M, size, size, 3) uint8, decoded by several threads."""
    images = np.empty((len(paths), size, size, 3), np.uint8)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        decoded = pool.map(read_image, paths, [size] * len(paths))
        for i, image in enumerate(tqdm(decoded, "reading images", len(paths), **progress)):
            images[i] = image
    return images


def latents(root):
    """What encode.py wrote, memory-mapped."""
    with blaming(root, "encode again into another folder"):
        about = json.loads((root / "latents.json").read_text())
        if about["done"] < about["total"]:
            raise Problem(f"{root}: only {about['done']} of {about['total']} images are encoded; "
                          "run the encode command again")
        labels, names = np.load(root / "labels.npy"), about["names"]
        images = np.load(root / "latents.npy", mmap_mode="r")           # (M, 2, C, S, S)
        if images.shape[:2] != (len(labels), 2) or labels.max() >= len(names):
            raise ValueError("its latents, labels and names do not fit together")
        return Data(images, labels, names, about["image_size"], vae=about["vae"])


def load_vae(name, device):
    """Stable Diffusion's autoencoder, by hub name or from a folder."""
    with blaming(f"VAE {name}", "pip install diffusers, and give a hub name or a VAE's folder"):
        from diffusers import AutoencoderKL
        return AutoencoderKL.from_pretrained(name).to(device).eval().requires_grad_(False)


def load_data(args):
    """The data that --data names."""
    folder, size = pathlib.Path(args.data), args.image_size or 32
    if args.data == "shapes":
        data = shapes()
    elif args.data == "cifar10":
        data = cifar10(args.data_dir)
    elif (folder / "latents.json").exists():
        data = latents(folder)
    else:
        names = class_folders(folder)
        paths, labels = image_folder(folder, names)
        data = Data(read_images(paths, size), labels, names, size)
    if args.image_size not in (None, data.image_size):
        raise Problem(f"--image-size {size}: these images have {data.image_size}; leave it away")
    return data


# ---- Pictures -----------------------------------------------------------------------------------

@contextlib.contextmanager
def picture(path, width, height):
    """Axes to draw a picture on, with matplotlib's own settings and not those of its user."""
    with style.context("default"), replacing(path) as file:
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.subplots()
        figure.savefig(file, dpi=150)


def save_grid(path, images, labels, names):
    """A row of images per class, its name at the left. images: (M, H, W, 3), as many of each."""
    rows, side = list(dict.fromkeys(labels)), images.shape[1] + 2
    framed = np.pad(images, ((0, 0), (2, 0), (2, 0), (0, 0)), constant_values=255)
    framed = framed.reshape(len(rows), -1, side, side, 3).swapaxes(1, 2)
    canvas = framed.reshape(len(rows) * side, -1, 3)
    with picture(path, 0.62 * canvas.shape[1] / side + 1.1, 0.62 * len(rows) + 0.1) as axes:
        axes.imshow(canvas, interpolation="nearest")
        axes.axis("off")
        for r, c in enumerate(rows):            # a folder may be named "$a^b$", or not be UTF-8
            axes.text(-4, side * (r + 0.5), names[c].encode("utf-8", "replace").decode(),
                      ha="right", va="center", parse_math=False)


def save_curve(path, log):
    """The loss and its two terms against the step."""
    with picture(path, 6, 3.6) as axes:
        for name in LOSSES:
            axes.plot([row["step"] for row in log], [float(row[name]) for row in log], label=name)
        axes.set(xlabel="step", ylabel="training loss", yscale="log")
        axes.legend()


# ---- Devices ------------------------------------------------------------------------------------

def pick_device(name=None):
    """The device of that name; without one this process's GPU, else Apple's, else the CPU."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = name or next(name for name in there if there[name])
    if not there[name]:
        raise Problem(f"--device {name}: this torch finds none; leave the flag away")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(name)


def autocast(device):
    """Mixed precision where bfloat16 makes it fast. A T4, for one, only emulates it, slowly."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16, enabled=fast)


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
        x = torch.randn((len(y), *shape), generator=generator, device=device)
        with autocast(device):
            x = diffusion.sample(lambda x, t: model.forward_with_cfg(x, t, y, cfg), x, steps,
                                 sampler, clip_x0=vae is None, randn_like=lambda x: torch.randn(
                                     x.shape, generator=generator, device=device))
        if vae is not None:
            x = (x / vae.config.scaling_factor).split(4)        # a decoder takes much memory
            x = torch.cat([vae.decode(part).sample for part in x])
        x = ((x + 1) * 127.5).round().clamp(0, 255).byte()
        images.append(x.permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(images)


def sample(args, parts):
    """Samples of a run: a labelled grid, or with --num an .npz."""
    run, device = pathlib.Path(args.run), pick_device(args.device)
    out = pathlib.Path(args.out or run / ("samples.npz" if args.num else "grid.png"))
    if out.suffix != (".npz" if args.num else ".png"):
        raise Problem(f"--out {out}: give a name in .npz with --num, and one in .png without it")
    path = run / ("checkpoint.pt" if (run / "checkpoint.pt").exists() else "model.pt")
    with blaming("--run", "give it the folder of a run", ValueError):
        model, state = dydilit.load_model(path, parts)
    names, vae = state["data"]["names"], state["data"]["vae"]
    known = {**{str(c): c for c in range(len(names))}, **{n: c for c, n in enumerate(names)}}
    wanted = args.classes.split(",") if args.classes else names if args.num else names[:10]
    if unknown := [name for name in wanted if name not in known]:
        raise Problem(f"--classes {unknown[0]}: this run knows 0..{len(names) - 1} and names")
    classes = list(dict.fromkeys(known[name] for name in wanted))
    count = args.num or 10 * len(classes)
    labels = [classes[i * len(classes) // count] for i in range(count)]
    steps = args.steps or state["knobs"]["sampling_steps"]
    cfg = state["knobs"]["cfg"] if args.cfg is None else args.cfg
    images = generate(model.to(device).fuse(), labels, steps, cfg, args.sampler, args.seed,
                      load_vae(vae, device) if vae else None, args.batch_size)
    if args.num:
        with replacing(out) as file:            # the layout of ADM's evaluator
            np.savez(file, arr_0=images, arr_1=np.array(labels))
    else:
        save_grid(out, images, labels, names)
    print(f"{out}: {len(images)} samples, step {state['step']}, {steps} steps, guidance {cfg:g}")


# ---- Training -----------------------------------------------------------------------------------

def batch_indices(total, batch_size, step, seed):
    """The images of a step: the next slice of the epochs' random orders, one after the other."""
    start, random = step * batch_size, torch.Generator()
    epochs = range(start // total, (start + batch_size - 1) // total + 1)
    orders = [torch.randperm(total, generator=random.manual_seed(seed * 2**32 + epoch))
              for epoch in epochs]
    return torch.cat(orders)[start % total:][:batch_size]


class Training:
    """A run: what it trains, on what data, and how far it is."""

    def __init__(self, args, parts):
        for name, (small, paper, *_) in KNOBS.items():
            if getattr(args, name) is None:
                setattr(args, name, small if args.model == SMALL_MODEL else paper)
        self.args, self.device = args, pick_device(args.device)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if args.batch_size % (self.world * args.accumulate):
            raise Problem(f"--batch-size: no multiple of --accumulate x {self.world} processes")
        self.folder = pathlib.Path(args.run or "runs/" + pathlib.Path(args.data).resolve().name)
        self.checkpoint = self.folder / "checkpoint.pt"
        if self.world > 1:                  # the others wait for the first one's grids, at times
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
        if self.rank > 0:                   # and for its download
            dist.barrier()
        self.data = data = load_data(args)
        if self.world > 1 and self.rank == 0:
            dist.barrier()
        torch.manual_seed(args.seed)
        with blaming("--model, --set", "see dydilit.MODELS and ModelConfig", ValueError):
            fields = dict(data.model_shape(), **dict(args.set))
            self.model = dydilit.build_model(args.model, parts, **fields).to(self.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), args.lr, (0.9, args.beta2),
                                           weight_decay=0, fused=True)
        self.diffusion = dydilit.GaussianDiffusion().to(self.device)
        self.step, self.log, self.stop = 0, [], False
        # Since the last line of the log: sums of three losses, images, and the largest gradient.
        self.window = torch.zeros(5, device=self.device)
        # What makes a run what it is may not change when it resumes.
        some = hashlib.sha256(data.images[::-(-len(data.images) // 64)].tobytes()).hexdigest()
        fixed = ("seed", "batch_size", "lr", "warmup", "cooldown", "beta2", "log_loss", "ema")
        self.identity = dict(
            dataclasses.asdict(self.model.cfg), **{name: getattr(args, name) for name in fixed},
            names=data.names, images=len(data.labels), images_sha256=some)

    def resume(self):
        """Goes on from the folder's checkpoint, or else makes sure that the folder is empty."""
        if not self.checkpoint.exists():
            if self.rank == 0 and any(self.folder.glob("[!.]*")):
                raise Problem(f"{self.folder}: files, but no checkpoint; choose another --run")
            return
        with blaming(self.checkpoint, "move it away if it is damaged, or choose another --run"):
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
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

    def run(self):
        """Trains until --steps or until a signal."""
        args, main, stop = self.args, self.rank == 0, False

        def on_signal(number, frame):       # Ctrl-C: the first asks to stop, the second insists
            self.stop = True
            signal.signal(number, signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
        self.vae = load_vae(self.data.vae, self.device) if self.data.vae and main else None
        if not self.checkpoint.exists():
            self.save()                                     # from here on the folder is this run's
        parallel = torch.nn.parallel.DistributedDataParallel
        self.wrapped = parallel(self.model) if self.world > 1 else self.model
        self.forward = torch.compile(self.wrapped) if args.compile else self.wrapped
        started = time.time() - (float(self.log[-1]["seconds"]) if self.log else 0)
        with tqdm(None, "training", args.steps, initial=self.step, disable=not main) as bar:
            while self.step < args.steps and not stop:
                path = self.folder / f"samples-{self.step:07d}.png"
                due = main and self.step > 0 and self.step % args.sample_every == 0
                if due and not path.exists():
                    self.grid(path)
                self.train_step()
                self.step += 1
                bar.update()
                at_log = self.step % args.log_every == 0 or self.step == args.steps
                # Processes heed each other's signals only where they wait for the GPU anyway.
                stop = self.stop if self.world == 1 else at_log and self.stops.item() > 0
                at_save = stop or self.step % args.save_every == 0 or self.step == args.steps
                if (at_log or at_save) and not self.window.isfinite().all():
                    raise Problem(f"the loss is no longer finite at step {self.step}; go on with a "
                                  f"lower --lr in another --run ({self.checkpoint} is still good)")
                if at_log:
                    self.report(time.time() - started)
                    bar.set_postfix_str("loss " + self.log[-1]["loss"])
                if at_save:
                    self.save()

    def train_step(self):
        """One step of the optimizer; it does not wait for the GPU.

        Everything random in it comes from the seed and the step's number. So a resumed run needs no
        generator's state, and any number of processes sees the same images and the same noise."""
        args, size, cfg = self.args, self.args.batch_size, self.model.cfg
        cuda = self.device.type == "cuda"
        seed = (args.seed * 2**32 + self.step) % 2**62
        generator = torch.Generator().manual_seed(seed)
        index = batch_indices(len(self.data.labels), size, self.step, args.seed)
        mirror = torch.rand(size, generator=generator) < 0.5
        # A batch's timesteps are spread evenly, one in each of `size` equal parts of 0..999.
        parts = torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)
        t = (parts / size * 1000).long().clamp(max=999)
        side = cfg.input_size
        noise = torch.randn(size, cfg.in_channels, side, side, generator=generator)
        torch.manual_seed((seed * self.world + self.rank) % 2**63)          # for the label dropout
        self.model.train()
        mine = torch.arange(size).chunk(self.world)[self.rank]
        sums = torch.zeros(4, device=self.device)
        sums[3] = self.stop
        for part in (micro := mine.chunk(args.accumulate)):
            batch = *self.data.batch(index[part], mirror[part]), t[part], noise[part]
            x, y, t_part, noise_part = (        # out of pinned memory, nobody waits for the copy
                (v.pin_memory() if cuda else v).to(self.device, non_blocking=cuda) for v in batch)
            wait = self.world > 1 and part is not micro[-1]         # gradients travel once a step
            with self.wrapped.no_sync() if wait else contextlib.nullcontext():
                with autocast(self.device):
                    losses = self.diffusion.losses(self.forward, x, y, t_part, noise_part)
                # With the logarithm, every noise level counts alike, however small its loss is.
                objective = losses["loss"].log() if args.log_loss else losses["loss"]
                (objective.sum() / len(mine)).backward()
            sums[:3] += torch.stack([losses[name].detach().sum() for name in LOSSES])
        if self.world > 1:
            dist.all_reduce(sums)
        self.stops = sums[3]                    # the processes that got a signal
        self.window[:3] += sums[:3]
        self.window[3] += size
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.window[4] = torch.maximum(self.window[4], torch.nn.utils.get_total_norm(gradients))
        rise = (self.step + 1) / max(1, args.warmup)
        fall = (1 - self.step / args.steps) / args.cooldown if args.cooldown else 1
        self.optimizer.param_groups[0]["lr"] = args.lr * min(1, rise, fall)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()),
                                 1 - args.ema)

    def report(self, seconds):
        """Writes what happened since the last report into log.csv."""
        means = (self.window[:3] / self.window[3]).tolist()
        row = dict(zip(LOSSES, means), grad_norm=self.window[4].item(), seconds=seconds)
        self.log.append(dict(step=self.step, images=self.step * self.args.batch_size,
                             **{name: f"{value:.6g}" for name, value in row.items()}))
        self.window.zero_()
        if self.rank == 0:
            with replacing(self.folder / "log.csv", "w", newline="") as file:
                rows = [self.log[0].keys(), *(row.values() for row in self.log)]
                csv.writer(file).writerows(rows)

    def about(self, dtype):
        """What sampling needs, with the averaged weights in this precision."""
        return dict(step=self.step, knobs=vars(self.args), model=dataclasses.asdict(self.model.cfg),
                    data=dict(names=self.data.names, vae=self.data.vae),
                    ema={name: value.to(dtype) for name, value in self.ema.state_dict().items()})

    def save(self):
        """Replaces the checkpoint."""
        if self.rank == 0:
            with replacing(self.checkpoint) as file:
                torch.save(dict(self.about(torch.float32), identity=self.identity, log=self.log,
                                window=self.window, weights=self.model.state_dict(),
                                optimizer=self.optimizer.state_dict()), file)

    def grid(self, path):
        """Samples of the moving average, ten of each of up to ten classes."""
        labels = [c for c in range(min(len(self.data.names), 10)) for _ in range(10)]
        micro = self.args.batch_size // (self.world * self.args.accumulate)     # what fits
        images = generate(copy.deepcopy(self.ema).fuse(), labels, self.args.sampling_steps,
                          self.args.cfg, vae=self.vae, batch_size=micro)
        save_grid(path, images, labels, self.data.names)


def train(args, parts):
    """Trains until --steps, from the run's last checkpoint if there is one."""
    run = Training(args, parts)
    with claimed(run.folder) if run.rank == 0 else contextlib.nullcontext():
        run.resume()
        run.run()
        finished = run.step >= args.steps
        if finished and run.rank == 0:
            with replacing(run.folder / "model.pt") as file:
                torch.save(run.about(torch.half), file)
            save_curve(run.folder / "loss.png", run.log)
            run.grid(run.folder / "samples.png")
            print(f"{run.folder}: {args.steps} steps done; look at samples.png and loss.png")
        elif run.rank == 0:
            print(f"{run.checkpoint}: saved at step {run.step}; repeat the command")
    if run.world > 1:
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
