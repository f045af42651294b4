"""Trains DyDi-LiT and samples from it. It needs nothing else of this repository than dydilit.py.

    python train.py                                         shapes, in ten minutes on two CPU cores
    python train.py --data cifar10 --model DyDi-LiT-S/2     CIFAR-10, for a GPU
    python train.py --data DIR --model DyDi-LiT-S/2         class folders of images, or latents
    torchrun --nproc_per_node=4 -- train.py --data DIR      four GPUs share every batch
    python train.py sample --run runs/shapes                a labelled grid of samples
    python train.py sample --run runs/shapes --num 50000    an .npz of samples, to be measured
    python train.py sample --help                           its options; and train --help
"""
import argparse
import contextlib
import copy
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import sys
import zlib

import numpy as np
import torch
import torch.distributed as dist
from matplotlib import style            # the default, and not the user's own
from matplotlib.figure import Figure    # not pyplot, which would ask for a window system
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm.auto import tqdm
from tqdm.contrib.concurrent import thread_map

import dydilit


# ---- Errors and files ---------------------------------------------------------------------------

class Problem(SystemExit):
    """Something the user can put right. It ends the program with a line that says how."""


@contextlib.contextmanager
def blaming(what, remedy, *kinds):
    """Makes a Problem of an error of these kinds, or of any: it lies in what the user gave."""
    try:
        yield
    except kinds or Exception as error:
        line = str(error).strip().partition("\n")[0]
        raise Problem(f"{what}: {line} ({type(error).__name__}); {remedy}") from error


def explained(function, *arguments):
    """Calls a program's main function. What the user can put right ends it in one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")   # a terminal may lack a name's letters
    try:
        return function(*arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(str(error))
    except (MemoryError, torch.OutOfMemoryError):       # other mistakes keep their tracebacks
        sys.exit("out of memory; train with a larger --accumulate, sample with less --batch-size")


@contextlib.contextmanager
def replacing(path, mode="wb", **options):
    """Opens a file that takes path's place when the block ends well: path is never half a file."""
    part = pathlib.Path(path).with_name(f".{pathlib.Path(path).name}.part")
    with blaming(path, "check the path and the free space", OSError):
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, mode, **options) as file:
                yield file
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


# ---- Command line -------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Problem(f"{message}; {self.prog} --help lists what there is")


def up_to(most):
    """A type for argparse: a whole number from 1 to the most that there may be."""
    def number(text):
        if not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not in 1..{most}")
        return int(text)
    return number


def override(text):
    """A type for argparse: ("n_heads", 4) from "n_heads=4". The value is JSON or a plain word."""
    name, _, value = text.partition("=")
    with contextlib.suppress(json.JSONDecodeError):
        value = json.loads(value)
    return name, value


SMALL_MODEL, positive, thousand = "DyDi-LiT-XS/4", up_to(2**31), up_to(1000)
KNOBS = {   # default of the small model (minutes on a CPU), of the others (the paper's), type, help
    "steps": (4000, 100_600, positive, "optimizer steps"),
    "batch_size": (16, 256, positive, "images per step, over all processes"),
    "lr": (4e-3, 1e-4, float, "learning rate of AdamW, which runs without weight decay"),
    "warmup": (100, 0, int, "first steps, in which the learning rate rises"),
    "cooldown": (1.0, 0.0, float, "last share of the steps, in which it falls"),
    "beta2": (0.99, 0.999, float, "decay of AdamW's second moment"),
    "log_loss": (1, 0, int, "1: minimize the log of each image's loss, 0: the loss"),
    "ema": (0.998, 0.9999, float, "decay of the weights' average, which gets sampled; less early"),
    "cfg": (1.5, 4.0, float, "guidance scale of the sample grids"),
    "sampling_steps": (50, 250, thousand, "denoising steps of the sample grids"),
    "log_every": (50, 50, positive, "steps between lines of log.csv, at most"),
    "save_every": (300, 1000, positive, "steps between checkpoints"),
    "sample_every": (2000, 10_000, positive, "steps between sample grids"),
}
LOSSES = ("loss", "simple", "variational")


def arguments(argv):
    """The parsed command line. Without a command it means `train`."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    train, sample = commands.add_parser("train"), commands.add_parser("sample")
    for add in (train.add_argument, sample.add_argument):
        add("--seed", type=int, default=0, help="of everything random")
        add("--device", choices=["cuda", "mps", "cpu"], help="default: the first that there is")
        add("--vae", help="hub name or folder of the latents' VAE; default: as when encoded")
    add = train.add_argument
    add("--data", default="shapes", help="shapes, cifar10, or a folder of images or latents")
    add("--data-dir", default="data", help="where cifar10 lies, or is downloaded to")
    add("--image-size", type=positive, help="side of a folder's images, cropped; default: 32")
    add("--model", default=SMALL_MODEL, choices=[*dydilit.MODELS], help="default: %(default)s")
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
    add("--classes", type=int, nargs="+", help="numbers; default: ten for a grid, all for --num")
    add("--steps", type=thousand, help="denoising steps; default: as in training")
    add("--cfg", type=float, help="guidance scale; default: as in training")
    add("--sampler", choices=["ddpm", "ddim"], default="ddpm", help="ancestral or deterministic")
    add("--batch-size", type=positive, default=50, help="images per pass; default: %(default)s")
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["train", *argv]
    args = parser.parse_args(argv)
    for name, defaults in KNOBS.items() if args.command == "train" else ():
        if getattr(args, name) is None:
            setattr(args, name, defaults[args.model != SMALL_MODEL])
    return args


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

    def batch(self, index, mirror):
        """Images `index` as floats (B, C, S, S), those in `mirror` flipped, and their labels."""
        mirror, index = mirror & self.flip, index.numpy()
        if self.vae:
            x = torch.from_numpy(self.images[index, mirror.long().numpy()]).float()
        else:
            x = pixels(self.images[index])
            x = torch.where(mirror[:, None, None, None], x.flip(3), x)
        return x, torch.from_numpy(self.labels[index])


def star(x, y):                                             # five mirrored wedges
    angle = abs((np.arctan2(x, y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    return 0.35 * np.hypot(x, y) * np.cos(angle) + 0.937 * np.hypot(x, y) * np.sin(angle) - 0.35


# The distance to each shape's outline, negative inside, for x and y from about -1 to 1. A minimum
# joins two shapes, a maximum leaves what they share, and a minus turns a shape inside out.
SHAPES = {
    "circle": lambda x, y: np.hypot(x, y) - 0.9,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.72) - 0.2,
    "triangle": lambda x, y: np.maximum(-y, 0.866 * abs(x) + 0.5 * y) - 0.55,
    "star": star,
    "heart": lambda x, y: np.minimum((abs(x) + abs(y + 0.1) - 0.75) / 1.414,    # a tilted square
                                     np.hypot(abs(x) - 0.375, y - 0.275) - 0.53),   # and two discs
    "moon": lambda x, y: np.maximum(np.hypot(x, y) - 0.9, 0.75 - np.hypot(x - 0.42, y - 0.12)),
    "cross": lambda x, y: np.minimum(np.maximum(abs(x) - 0.28, abs(y) - 0.88),
                                     np.maximum(abs(x) - 0.88, abs(y) - 0.28)),
    "smiley": lambda x, y: np.maximum(np.hypot(x, y) - 0.95, -np.minimum(       # without eyes,
        np.hypot(abs(x) - 0.35, y - 0.3) - 0.19,                                # without mouth
        np.maximum(abs(np.hypot(x, y) - 0.55) - 0.12, y + 0.1))),
    "stripes": lambda x, y: np.maximum(np.maximum(abs(x), abs(y)) - 0.87,
                                       abs((y + 0.87) % 0.696 - 0.174) - 0.174),
    "checkers": lambda x, y: np.maximum(np.maximum(abs(x), abs(y)) - 0.87,
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
        if "RANK" in os.environ:
            raise Problem(f"{folder} is not there; download it by a start without torchrun")
        with blaming(archive, f"delete it, and fetch {CIFAR_URL} by other means"):
            archive.parent.mkdir(parents=True, exist_ok=True)
            if not archive.exists():
                torch.hub.download_url_to_file(CIFAR_URL, str(archive), CIFAR_SHA256)
            shutil.unpack_archive(archive, data_dir)
    with blaming(folder, "give CIFAR-10's files, or an empty --data-dir", OSError, ValueError):
        records = np.concatenate([np.fromfile(folder / name, np.uint8) for name in files])
        records = records.reshape(-1, 3073)                 # a label, and three planes of 32 x 32
        names = (folder / "batches.meta.txt").read_text().strip().splitlines()
    images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Data(images, records[:, 0].astype(np.int64), names, 32)


def image_folder(root):
    """The images in a folder's class folders: paths, labels (M,), the classes' names.

    Prints what is taken and what is left out. A folder without class folders is one class."""
    root = pathlib.Path(root)
    files = [p.relative_to(root) for p in sorted(root.rglob("*")) if p.is_file()]
    files = [p for p in files if not any(part.startswith(".") for part in p.parts)]
    runs = {p.parts[0] for p in files if p.name == "checkpoint.pt"}         # they are no classes
    readable = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images = [p for p in files if p.suffix.lower() in readable and p.parts[0] not in runs]
    images = [p for p in images if len(p.parts) > 1] or images
    if not images:
        raise Problem(f"--data {root}: no images; give shapes, cifar10 or a folder that has some")
    classes = [p.parts[0] if len(p.parts) > 1 else root.resolve().name for p in images]
    names, labels = np.unique(classes, return_inverse=True)
    kinds = sorted({p.suffix or p.name for p in {*files} - {*images}})
    print(f"{root}: {len(images)} images, {len(names)} class{'es' * (len(names) > 1)} "
          f"({', '.join(names):.60})"
          + f"; {len(files) - len(images)} files skipped: {', '.join(kinds):.60}" * bool(kinds))
    return [root / p for p in images], labels, names.tolist()


def read_image(path, size):
    """An image's middle square, scaled as ADM does, on white: (size, size, 3) uint8."""
    with Image.open(path) as file:
        file.draft(None, (2 * size, 2 * size))      # decodes no more of a large JPEG than it needs
        if file.mode[0] in "IF":
            raise ValueError(f"its mode {file.mode} has more than 8 bits, of a range of its own")
        image = ImageOps.exif_transpose(file)       # upright
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    while image.width >= 2 * size:
        image = image.convert("RGB").resize((image.width // 2, image.width // 2), Image.BOX)
    return np.array(image.convert("RGB").resize((size, size), Image.BICUBIC))


def read_images(paths, size, disable=None):
    """All images, (M, size, size, 3) uint8, decoded by several threads."""
    images, bad = np.empty((len(paths), size, size, 3), np.uint8), []

    def read(i):
        try:
            images[i] = read_image(paths[i], size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            bad.append(f"\n  {paths[i]}: {error}")
    thread_map(read, range(len(paths)), desc="reading images", disable=disable)
    if bad:
        raise Problem(f"{len(bad)} images are unreadable; mend or remove them" + "".join(bad))
    return images


def latents(root):
    """What encode.py wrote, memory-mapped."""
    with blaming(root, "encode again into another folder", OSError, ValueError, LookupError):
        about = json.loads((root / "latents.json").read_text())
        labels, names = np.load(root / "labels.npy"), about["names"]
        images = np.load(root / "latents.npy", mmap_mode="r")           # (M, 2, C, S, S)
        if about["done"] < len(labels):
            raise Problem(f"{root}: only {about['done']} images are encoded; run encode.py again")
        if images.shape[:2] != (len(labels), 2) or labels.max() >= len(names):
            raise ValueError("its latents, labels and names do not fit together")
        return Data(images, labels, names, about["image_size"], vae=about["vae"])


def load_vae(name, device):
    """Stable Diffusion's autoencoder, by hub name or from a folder."""
    with blaming(f"VAE {name}", "pip install diffusers, or give a hub name or folder"):
        from diffusers import AutoencoderKL
        return AutoencoderKL.from_pretrained(name).to(device).eval().requires_grad_(False)


def load_data(args):
    """The data that --data names. A folder's images are paths, to be read once the flags fit."""
    if args.data == "shapes":
        data = shapes()
    elif args.data == "cifar10":
        data = cifar10(args.data_dir)
    elif (folder := pathlib.Path(args.data)).joinpath("latents.json").exists():
        data = latents(folder)
    else:
        data = Data(*image_folder(folder), args.image_size or 32)
    if args.image_size not in (None, data.image_size):
        raise Problem(f"--image-size: these images have {data.image_size}; leave the flag away")
    return data


# ---- Pictures -----------------------------------------------------------------------------------

def save_grid(file, images, labels, names):
    """A row of images per class, its name at the left. images: (M, H, W, 3), as many of each."""
    rows, scale = list(dict.fromkeys(labels)), max(1, 64 // images.shape[1])    # small ones grow
    tiles = np.pad(images.repeat(scale, 1).repeat(scale, 2), ((0, 0), (2, 2), (2, 2), (0, 0)),
                   constant_values=255)
    side, font = tiles.shape[1], ImageFont.load_default(20)
    tiles = tiles.reshape(len(rows), -1, side, side, 3).swapaxes(1, 2)
    tiles = Image.fromarray(tiles.reshape(len(rows) * side, -1, 3))
    words = [f"{names[c]:.20}".encode("utf-8", "replace").decode() for c in rows]   # or no UTF-8
    margin = 16 + int(max(font.getlength(word) for word in words))
    grid = Image.new("RGB", (margin + tiles.width, tiles.height), "white")
    grid.paste(tiles, (margin, 0))
    for r, word in enumerate(words):
        ImageDraw.Draw(grid).text((margin - 8, side * (r + 0.5)), word, "black", font, "rm")
    grid.save(file, "png")


def pick_device(name=None):
    """The device of that name; without one this process's GPU, else Apple's, else the CPU."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = name or max(there, key=there.get)        # the first that is there
    if not there[name]:
        raise Problem(f"--device {name}: this torch finds none; leave the flag away")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


def autocast(device):
    """Mixed precision where bfloat16 makes it fast. A T4, for one, only emulates it, slowly."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16, enabled=fast)


# ---- Sampling -----------------------------------------------------------------------------------

def mixed(*numbers):
    """A seed that depends on all these numbers. torch's CPU generator heeds 32 bits of a seed."""
    return zlib.crc32(str(numbers).encode())


@torch.no_grad()
def generate(model, labels, steps, cfg, sampler="ddpm", seed=0, vae=None, batch_size=50, first=0):
    """One sample per label, (M, H, W, 3) uint8. vae: what decodes them, if they are latents.

    Image i has its own noise, from the seed and its number first + i, whatever batch_size is."""
    device, images = model.pos_embed.device, []
    diffusion, shape = dydilit.GaussianDiffusion().to(device), 2 * [model.cfg.input_size]
    for y in torch.tensor(labels, device=device).split(batch_size):
        numbers = range(first + len(images), first + len(images) + len(y))
        own = [torch.Generator(device).manual_seed(mixed(seed, number)) for number in numbers]

        def randn_like(x):
            return torch.stack([torch.randn(x.shape[1:], generator=g, device=device) for g in own])
        with autocast(device):
            x = randn_like(torch.empty(len(y), model.cfg.in_channels, *shape))
            x = diffusion.sample(lambda x, t: model.forward_with_cfg(x, t, y, cfg), x, steps,
                                 sampler, vae is None, randn_like, sys.stderr.isatty())
        if vae is not None:
            x = (x / vae.config.scaling_factor).split(4)        # a decoder takes much memory
            x = torch.cat([vae.decode(part).sample for part in x])
        x = ((x + 1) * 127.5).round().clamp(0, 255).byte()
        images.extend(x.permute(0, 2, 3, 1).cpu().numpy())
    return np.stack(images)


def sample(args, parts):
    """Samples of a run: a labelled grid, or with --num an .npz."""
    run, device = pathlib.Path(args.run), pick_device(args.device)
    if "RANK" in os.environ:
        raise Problem("sample runs in one process; start it without torchrun")
    path = run / ("checkpoint.pt" if (run / "checkpoint.pt").exists() else "model.pt")
    with blaming("--run", "give it the folder of a run", ValueError, OSError):
        model, state = dydilit.load_model(path, parts)
    names, vae = state["data"]["names"], args.vae or state["data"]["vae"]
    known = range(len(names))
    classes = args.classes or known[:len(names) if args.num else 10]
    if not {*classes} <= {*known}:
        raise Problem("--classes: there are " + ", ".join(f"{c} {names[c]}" for c in known))
    count, steps = args.num or 10 * len(classes), args.steps or state["knobs"]["sampling_steps"]
    labels = [classes[i * len(classes) // count] for i in range(count)]
    cfg = state["knobs"]["cfg"] if args.cfg is None else args.cfg
    model, vae = model.to(device).fuse(), vae and load_vae(vae, device)
    how = steps, cfg, args.sampler, args.seed
    out = pathlib.Path(args.out or run / ("samples.npz" if args.num else "grid.png"))
    if not args.num:
        with replacing(out) as file:
            images = generate(model, labels, *how, vae, args.batch_size)
            save_grid(file, images, labels, names)
    else:       # They are kept as they come: the same command goes on where it was stopped.
        size, about = model.cfg.image_size, mixed(path.stat().st_mtime_ns, labels, *how)
        kept = out.with_name(f".{out.name}.{about}")
        with blaming(kept, "check the path and the free space", OSError), open(kept, "ab") as file:
            starts = range(file.tell() // (size * size * 3), count, args.batch_size)
            for i in tqdm(starts, "batches", disable=None):
                some = labels[i:i + args.batch_size]
                file.truncate(i * size * size * 3)
                file.write(generate(model, some, *how, vae, args.batch_size, i).tobytes())
        images = np.memmap(kept, np.uint8, "r").reshape(count, size, size, 3)
        with replacing(out) as file:                            # the layout of ADM's evaluator
            np.savez(file, arr_0=images, arr_1=np.array(labels))
        kept.unlink()
    print(f"{out}: {count} samples, step {state['step']}, {steps} steps, guidance {cfg:g}")


# ---- Training -----------------------------------------------------------------------------------

class Training:
    """A run: what it trains, on what data, and how far it is."""

    def __init__(self, args, parts, folder):
        self.args, self.folder, self.checkpoint = args, folder, folder / "checkpoint.pt"
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device, self.main = pick_device(args.device), self.rank == 0
        if args.batch_size % (self.world * args.accumulate):
            raise Problem(f"--batch-size: no multiple of --accumulate x {self.world} processes")
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.data = data = load_data(args)
        channels, side = data.images.shape[-3:-1] if data.vae else (3, data.image_size)
        torch.manual_seed(args.seed)
        with blaming("--image-size, --set", "see dydilit.ModelConfig", TypeError, ValueError):
            ours = dict(image_size=data.image_size, vae_factor=data.image_size // side,
                        in_channels=channels, n_classes=len(data.names), **dict(args.set))
            cfg = dydilit.ModelConfig(**{**dydilit.MODELS[args.model], **ours})
        if isinstance(data.images, list):
            data.images = read_images(data.images, data.image_size)
        self.model = dydilit.DyDiLiT(cfg, parts).to(self.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        with blaming("--lr, --beta2", "see train --help", ValueError):
            self.optimizer = torch.optim.AdamW(self.model.parameters(), args.lr, (0.9, args.beta2),
                                               weight_decay=0, fused=True)
        self.diffusion = dydilit.GaussianDiffusion().to(self.device)
        self.step, self.log, self.window = 0, [], []    # lines of log.csv; losses since the last
        self.stop, self.stops = False, torch.zeros(())  # whether this process, or any, must stop
        # What makes a run what it is may not change when it resumes.
        fixed = ("seed", "batch_size", "lr", "warmup", "cooldown", "beta2", "log_loss", "ema")
        some = data.images[::len(data.images) // 64 + 1].tobytes()
        self.identity = dict(
            dataclasses.asdict(cfg), **{name: getattr(args, name) for name in fixed},
            names=data.names, data_crc32=zlib.crc32(data.labels.tobytes(), zlib.crc32(some)))
        if not self.checkpoint.exists():
            self.save()                                     # from here on the folder is this run's
            return
        with blaming(self.checkpoint, "choose another --run, or move it away"):
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            for name, value in self.identity.items():
                if (before := state["identity"].get(name)) != value:
                    raise ValueError(f"this run has {name} {before!s:.60}, not {value!s:.60}")
            self.model.load_state_dict(state["weights"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.log = state["step"], state["log"]
        if self.main:
            print(f"{self.folder}: resuming at step {self.step} of {self.args.steps}")

    def run(self):
        """Trains until --steps or until a signal."""
        args, stop = self.args, False

        def on_signal(number, frame):       # Ctrl-C: the first asks to stop, the second insists
            self.stop = True
            signal.signal(number, signal.SIG_DFL)

        names = {"SIGINT", "SIGTERM", "SIGHUP"} & {*dir(signal)}            # a closed terminal, too
        for name in names:
            signal.signal(getattr(signal, name), on_signal)
        parallel = torch.nn.parallel.DistributedDataParallel
        self.forward = parallel(self.model) if self.world > 1 else self.model
        self.forward = torch.compile(self.forward) if args.compile else self.forward
        hidden = None if self.main else True                    # None: shown in a terminal only
        with tqdm(None, "training", args.steps, initial=self.step, disable=hidden) as bar:
            while self.step < args.steps and not stop:
                if self.main and self.step > 0 and self.step % args.sample_every == 0:
                    self.grid(f"samples-{self.step:07d}.png")
                stops = self.stops          # those of the step before, for which nobody waits now
                self.train_step()
                self.step += 1
                bar.update()
                stop = self.stop if self.world == 1 else stops.item() > 0
                save = stop or self.step % args.save_every == 0 or self.step == args.steps
                if save or self.step % args.log_every == 0:
                    self.report()
                    bar.set_postfix(loss=self.log[-1][2])
                if save:
                    self.save()
        for name in names:                  # nothing is lost from here on
            signal.signal(getattr(signal, name), signal.default_int_handler)

    def train_step(self):
        """One step of the optimizer; it does not wait for the GPU.

        Everything random in it comes from the seed and the step's number. So a resumed run needs no
        generator's state, and any number of processes sees the same images and the same noise."""
        args, size = self.args, self.args.batch_size
        generator = torch.Generator().manual_seed(mixed(args.seed, self.step))
        index = torch.randint(len(self.data.labels), (size,), generator=generator)
        x, y = self.data.batch(index, torch.rand(size, generator=generator) < 0.5)
        # A batch's timesteps are spread evenly, one in each of `size` equal parts of 0..999.
        t = torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)
        t = (t / size * 1000).long().clamp(max=999)
        noise = torch.randn(x.shape, generator=generator)
        torch.manual_seed(mixed(args.seed, self.step, self.rank))           # for the label dropout
        self.model.train()
        sums = torch.zeros(4, device=self.device)
        sums[3] = self.stop
        mine = [v.chunk(self.world)[self.rank].chunk(args.accumulate) for v in (x, y, t, noise)]
        for part in zip(*mine):
            with autocast(self.device):
                losses = self.diffusion.losses(self.forward, *(v.to(self.device) for v in part))
            # With the logarithm, every noise level counts alike, however small its loss is.
            objective = losses["loss"].log() if args.log_loss else losses["loss"]
            (objective.sum() * self.world / size).backward()
            sums[:3] += torch.stack([losses[name].detach().sum() for name in LOSSES])
        if self.world > 1:
            dist.all_reduce(sums)
        self.stops = sums[3]                    # the processes that got a signal
        self.window.append(sums[:3] / size)
        rise = (self.step + 1) / max(1, args.warmup)
        fall = (1 - self.step / args.steps) / args.cooldown if args.cooldown else 1
        self.optimizer.param_groups[0]["lr"] = args.lr * min(1, rise, fall)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # An early average is a short one, which soon forgets the first weights.
        decay = min(args.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_([*self.ema.parameters()], [*self.model.parameters()], 1 - decay)

    def report(self):
        """Adds the mean losses since the last report to log.csv."""
        means, self.window = torch.stack(self.window).mean(0).tolist(), []
        if not np.isfinite(means).all():
            raise Problem(f"step {self.step}: the loss is no longer finite; start another --run "
                          f"with a lower --lr, or resume from {self.checkpoint}")
        self.log.append([self.step, self.step * self.args.batch_size, *means])
        if self.main:
            with replacing(self.folder / "log.csv") as file:
                np.savetxt(file, self.log, "%.9g", ",", comments="",
                           header=",".join(["step", "images", *LOSSES]))

    def write(self, path, ema, **more):
        """Writes what sampling needs, with these averaged weights, and more."""
        state = dict(step=self.step, ema=ema.state_dict(), model=dataclasses.asdict(ema.cfg),
                     data=dict(names=self.data.names, vae=self.data.vae), knobs=vars(self.args))
        # On a full disk torch.save raises a RuntimeError.
        with replacing(path) as file, blaming(path, "check the free space", RuntimeError):
            torch.save(state | more, file)

    def save(self):
        """Replaces the checkpoint."""
        if self.main:
            self.write(self.checkpoint, self.ema, identity=self.identity, log=self.log,
                       weights=self.model.state_dict(), optimizer=self.optimizer.state_dict())

    def grid(self, name):
        """Draws samples of the average, ten of each of up to ten classes."""
        labels = [c for c in range(min(len(self.data.names), 10)) for _ in range(10)]
        try:
            vae = self.data.vae and load_vae(self.args.vae or self.data.vae, self.device)
            images = generate(copy.deepcopy(self.ema).fuse(), labels, self.args.sampling_steps,
                              self.args.cfg, vae=vae)
            with replacing(self.folder / name) as file:
                save_grid(file, images, labels, self.data.names)
        except (Problem, torch.OutOfMemoryError) as error:
            print(f"{name} is left out: {error}")


def train(args, parts):
    """Trains until --steps, from the run's last checkpoint if there is one."""
    folder = pathlib.Path(args.run or "runs/" + pathlib.Path(args.data).resolve().name)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(ImportError):          # Windows has no such locks
                import fcntl
                with blaming(folder, "another process is at work in it", BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (folder / "checkpoint.pt").exists() and any(folder.glob("[!.]*")):
                raise Problem(f"{folder}: files, but no checkpoint; choose another --run")
            if folder.resolve().is_relative_to(pathlib.Path(args.data).resolve()):
                print(f"{folder} lies in --data; it is no class")
        run = Training(args, parts, folder)
        run.run()
        if run.main and run.step < args.steps:
            print(f"{run.checkpoint}: saved at step {run.step}; repeat the command")
        elif run.main:
            run.write(folder / "model.pt", copy.deepcopy(run.ema).half())
            run.grid("samples.png")
            with style.context("default"), replacing(folder / "loss.png") as file:
                axes = Figure(figsize=(6, 3.6), layout="constrained").subplots()
                axes.plot([row[0] for row in run.log], [row[2:5] for row in run.log], label=LOSSES)
                axes.set(xlabel="step", ylabel="training loss", yscale="log")
                axes.legend()
                axes.figure.savefig(file, dpi=150, format="png")
            print(f"{folder}: trained for {run.step} steps; look at samples.png and loss.png")
    if run.world > 1:
        dist.destroy_process_group()
    if run.step < args.steps:
        sys.exit(130)


def main(argv=None, parts=dydilit.block_parts):
    args = arguments(sys.argv[1:] if argv is None else argv)
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else "highest")
    {"train": train, "sample": sample}[args.command](args, parts)


if __name__ == "__main__":
    explained(main)
