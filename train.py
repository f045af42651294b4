"""Trains DyDi-LiT, samples from it, and prepares data. `python train.py COMMAND --help` lists a command's knobs.

    python train.py                                          ten minutes on two CPU cores: built-in shapes, small model
    python train.py --data cifar10 --model DyDi-LiT-S/2      CIFAR-10, for a GPU; --data DIR: class folders, or latents
    torchrun --nproc_per_node=4 train.py --data ...          data-parallel, the same global batch
    python train.py encode --data IMAGENET/train --classes 100 --out DIR     Stable Diffusion latents of Sub-IN
    python train.py sample --run runs/shapes                 a grid, or --num 50000 --out samples.npz for evaluation
    python train.py reference --data ... --out ref.npz       the same layout from the data itself
"""
import argparse
import concurrent.futures
import contextlib
import copy
import csv
import ctypes
import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import sys
import tarfile
import time
import urllib.request

import matplotlib.image
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure    # not pyplot: no window system is asked for
from tqdm.auto import tqdm

import dydilit

# ---- Knobs ----------------------------------------------------------------------------------------------------------

SMALL_MODEL = "DyDi-LiT-XS/4"
KNOBS = {   # of training: default of the small model (minutes on a CPU), of the others (the paper's Sub-IN runs), meaning
    "steps": (4000, 100_600, "optimizer steps"),
    "batch_size": (16, 256, "images per step, over all processes"),
    "lr": (2e-3, 1e-4, "learning rate of AdamW (without weight decay)"),
    "cooldown": (1.0, 0.0, "last share of the steps over which the learning rate falls to zero; 0: constant"),
    "snr_cap": (0.5, 0.0, "weighs losses by min(1, cap / signal-to-noise ratio) (Hang et al. 2023); 0: all weigh 1"),
    "ema": (0.998, 0.9999, "decay of the weights' moving average, which is what gets sampled"),
    "cfg": (4.0, 4.0, "guidance scale of the sample grids"),
    "sampling_steps": (50, 250, "denoising steps of the sample grids"),
    "log_every": (50, 50, "steps between lines of log.csv"),
    "save_every": (300, 1000, "steps between checkpoints"),
    "sample_every": (2000, 10_000, "steps between sample grids"),
}


class Problem(Exception):
    """Something the user can put right: one line that names the thing and the remedy."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Problem(f"{message}; {self.prog} --help lists what there is")


def number(kind, low, high):
    """A type for argparse: an int or a float between two bounds."""
    def parse(text):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low}..{high}")
        return value
    parse.__name__ = kind.__name__
    return parse


positive = number(int, 1, 2 ** 31)
amount = number(float, 0, 1e6)


def arguments(argv):
    """The parsed command line. `python train.py` and `python train.py --flag` mean `python train.py train`."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    train, encode, sample, reference = (commands.add_parser(c) for c in ("train", "encode", "sample", "reference"))
    train.add_argument("--data", default="shapes", help="shapes (built in), cifar10, a folder of class folders of "
                       "images, or what encode wrote")
    encode.add_argument("--data", required=True, help="a folder of class folders, such as ImageNet's train/")
    reference.add_argument("--data", required=True, help="shapes, cifar10, or a folder of class folders")
    for add in (train.add_argument, reference.add_argument):
        add("--data-dir", default="data", help="where cifar10 lies, or is downloaded to")
    for add in (encode.add_argument, reference.add_argument):
        add("--classes", type=positive, help="how many classes to pick at random by --seed (Sub-IN: 100); default: all")
        add("--out", required=True, help="the folder, or the .npz, to write")
    for add, size in ((train.add_argument, None), (encode.add_argument, 256), (reference.add_argument, None)):
        add("--image-size", type=positive, default=size, help="side to which a folder's images are cropped, in pixels; "
            f"default: {size or 32}")
    for add in (train.add_argument, encode.add_argument, sample.add_argument, reference.add_argument):
        add("--seed", type=number(int, 0, 2 ** 31), default=0, help="of everything random")

    add = train.add_argument
    add("--model", default=SMALL_MODEL, help=f"one of {', '.join(dydilit.MODELS)}")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of dydilit.ModelConfig: --set n_heads=4")
    add("--run", help="folder of the run; default: runs/ and the data's name (torchrun wants -- before train.py then)")
    for name, (small, paper, text) in KNOBS.items():
        kind = positive if isinstance(paper, int) else amount
        add("--" + name.replace("_", "-"), type=kind, help=f"{text}; default: {small:g} ({SMALL_MODEL}), {paper:g}")
    add("--accumulate", type=positive, default=1, help="micro-batches per step, if a whole batch exceeds the memory")
    add("--init", choices=["own", "full"], default="own", help="full: weights that --model without --set has, too, start as "
        "they do there, so that a comparison is not one of initial values; default: %(default)s")
    add("--no-flip", action="store_true", help="no horizontal flips (where left and right differ: text)")
    add("--compile", action="store_true", help="torch.compile the model")

    encode.add_argument("--vae", default="stabilityai/sd-vae-ft-ema", help="AutoencoderKL: hub name or local folder")
    encode.add_argument("--batch-size", type=positive, default=16, help="images per pass of the VAE")

    add = sample.add_argument
    add("--run", required=True, help="folder of a run")
    add("--out", help="the .png to write, or with --num the .npz; default: grid.png or samples.npz in the run's folder")
    add("--num", type=positive, help="write so many samples, evenly over the classes, in ADM's evaluator layout")
    add("--classes", help="comma-separated class names or numbers; default: ten for a grid, all for --num")
    add("--steps", type=positive, help="denoising steps; default: as in the run's grids")
    add("--cfg", type=amount, help="guidance scale; default: as in the run's grids")
    add("--sampler", choices=["ddpm", "ddim"], default="ddpm", help="ancestral or deterministic")
    add("--raw-weights", action="store_true", help="the trained weights themselves, not their moving average")
    add("--batch-size", type=positive, default=100, help="images per pass")

    reference.add_argument("--num", type=positive, help="how many images, drawn at random; default: all")
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["train", *argv]
    return parser.parse_args(argv)


# ---- Files ----------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def replacing(path):
    """A temporary name beside path that takes its place when the block ends well: never half a file at `path`."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def write(path, content):
    with replacing(path) as part:
        part.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_npz(path, images, labels):
    """ADM's evaluator layout. images: (M, H, W, 3) uint8; labels: (M,)."""
    with replacing(path) as part:
        np.savez(part, arr_0=images, arr_1=np.asarray(labels, np.int64))


def occupied(folder):
    """Whether a folder holds anything but the hidden leftovers of an interrupted write."""
    return folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())


@contextlib.contextmanager
def claimed(folder):
    """Keeps a folder to this process until the block, or the process, ends in whatever way. Problem if it is taken."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:                                     # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)                   # the folder itself is locked: no file to leave behind
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"{folder}: another process is at work in it; wait until it ends, or choose another "
                          "folder") from None
        except OSError:                                     # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
        if made:
            with contextlib.suppress(OSError):              # nothing came of it
                folder.rmdir()


def load_checkpoint(path):
    """What train saved, on the CPU. Problem if it is missing, damaged or another program's."""
    if not path.exists():
        raise Problem(f"{path}: no such checkpoint; give --run the folder of a training run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != "dydilit":
            raise KeyError("format")
        with torch.device("meta"):                          # do the parts fit together? It takes no memory
            model = dydilit.DyDiLiT(dydilit.ModelConfig(**state["model"]))
            for weights in ("ema", "weights"):              # a dict() of them: assign=True leaves a mark in its input
                model.load_state_dict(dict(state[weights]), assign=True)
            torch.optim.AdamW(model.parameters()).load_state_dict(state["optimizer"])
        data, knobs = state["data"], state["knobs"]
        if (len(data["names"]) != model.cfg.n_classes or type(data["vae"]) not in (str, type(None))
                or state["window"].shape != (5,) or type(state["step"]) is not int or type(state["identity"]) is not dict
                or not {"sampling_steps", "cfg"} <= knobs.keys()):
            raise ValueError
        return state
    except (OSError, MemoryError):
        raise
    except Exception as error:                              # the errors of pickle and zip are many
        raise Problem(f"{path}: not a dydilit checkpoint, or a damaged one ({type(error).__name__}); move it away, or "
                      "choose another --run") from None


def trained_model(state, device, weights="ema"):
    """The model of load_checkpoint's state, ready for sampling. weights: "ema", their moving average, or "weights"."""
    model = dydilit.DyDiLiT(dydilit.ModelConfig(**state["model"])).to(device).eval()
    model.load_state_dict(state[weights])
    return model


# ---- Data -----------------------------------------------------------------------------------------------------------

def pixels(images):
    """(B, H, W, 3) uint8 as floats (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclasses.dataclass
class Data:
    """images: (M, H, W, 3) uint8, or latents (M, 2, C, S, S) float16 with each image's mirror second; labels: (M,)."""
    images: np.ndarray
    labels: np.ndarray
    names: list                     # of the classes
    image_size: int                 # in pixels
    flip: bool = True               # whether mirrored images are as good as these
    vae: str = None                 # for latents: what decodes them

    def model_shape(self):
        """The ModelConfig fields that fit a model to this data."""
        channels, side = (self.images.shape[2], self.images.shape[-1]) if self.vae else (3, self.image_size)
        return dict(image_size=self.image_size, vae_factor=self.image_size // side, in_channels=channels,
                    n_classes=len(self.names))

    def batch(self, index, mirror):
        """Images `index` as floats (B, C, S, S), pixels in [-1, 1], those marked in `mirror` flipped; and labels."""
        mirror, index = mirror & self.flip, index.numpy()
        if self.vae:
            x = torch.from_numpy(self.images[index, mirror.long().numpy()]).float()
        else:
            x = pixels(self.images[index])
            x = torch.where(mirror[:, None, None, None], x.flip(3), x)
        return x, torch.from_numpy(self.labels[index])


SHAPES = ["circle", "ring", "triangle", "star", "heart", "moon", "cross", "smiley", "stripes", "checkers"]


def shapes(n=20_000, seed=0, size=32):
    """n coloured pictures of ten shapes: position, size, tilt, colours and background vary from one to the next."""
    rng = np.random.default_rng(seed)

    def draw(label, x, y):
        """The shape's outline as a signed distance, negative inside, on coordinates of about [-1, 1]."""
        r, a = np.hypot(x, y), np.abs(x)
        if label == "circle":
            return r - 0.9
        if label == "ring":
            return np.abs(r - 0.72) - 0.2
        if label == "triangle":
            return np.maximum(-y, 0.866 * a + 0.5 * y) - 0.55
        if label == "star":                                             # five mirrored wedges around the upright
            angle = np.abs((np.arctan2(x, y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
            return 0.35 * r * np.cos(angle) + 0.937 * r * np.sin(angle) - 0.35
        if label == "heart":                                            # a tilted square under two half discs
            return np.minimum((a + np.abs(y + 0.1) - 0.75) / 1.414, np.hypot(a - 0.375, y - 0.275) - 0.53)
        if label == "moon":
            return np.maximum(r - 0.9, 0.75 - np.hypot(x - 0.42, y - 0.12))
        if label == "cross":
            return np.minimum(np.maximum(a - 0.28, np.abs(y) - 0.88), np.maximum(a - 0.88, np.abs(y) - 0.28))
        if label == "smiley":
            eyes, mouth = np.hypot(a - 0.35, y - 0.3) - 0.19, np.maximum(np.abs(r - 0.55) - 0.12, y + 0.1)
            return np.maximum(r - 0.95, -np.minimum(eyes, mouth))
        field = np.maximum(a, np.abs(y)) - 0.87                         # a square that three bars or four cells fill
        if label == "stripes":
            return np.maximum(field, np.abs((y + 0.87) % 0.696 - 0.174) - 0.174)
        return np.maximum(field, -np.where(x * y > 0, -1, 1) * np.minimum(a, np.abs(y)))

    def colours(value):
        """One RGB colour per brightness, of random hue and saturation."""
        hue, saturation = rng.uniform(0, 1, (len(value), 1)), rng.uniform(0.2, 1, (len(value), 1))
        wheel = np.clip(np.abs((hue + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1, 0, 1)
        return value[:, None] * (1 - saturation + saturation * wheel)

    labels = rng.permutation(n) % len(SHAPES)
    images = np.empty((n, size, size, 3), np.uint8)
    axis = (np.arange(size) + 0.5) * 32 / size - 16                     # in 32nds of the picture, centre 0
    for c, label in enumerate(SHAPES):
        which = np.flatnonzero(labels == c)
        m = len(which)
        radius, tilt = rng.uniform(12, 14.5, (m, 1, 1)), np.radians(rng.uniform(-8, 8, (m, 1, 1)))
        x, y = (axis.reshape(s) - rng.uniform(-1, 1, (m, 1, 1)) * (16 - radius) * 0.5 for s in ((1, 1, -1), (1, -1, 1)))
        u, v = np.cos(tilt) * x + np.sin(tilt) * y, np.sin(tilt) * x - np.cos(tilt) * y
        cover = np.clip(0.5 - draw(label, u / radius, v / radius) * radius * size / 32, 0, 1)[..., None]
        front, back = colours(rng.uniform(0.75, 1, m)), colours(rng.uniform(0, 0.3, m))          # bright on dark
        slope = rng.uniform(-0.25, 0.25, (m, 2, 1, 1))                  # the background's light falls from one side
        light = 1 + slope[:, 0] * axis.reshape(1, 1, -1) / 16 + slope[:, 1] * axis.reshape(1, -1, 1) / 16
        picture = cover * front[:, None, None] + (1 - cover) * back[:, None, None] * light[..., None]
        images[which] = np.clip(picture * 255 + 0.5, 0, 255)
    return Data(images, labels, list(SHAPES), size, flip=False)


CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_FILES, CIFAR_TEST = [f"data_batch_{k}.bin" for k in range(1, 6)], ["test_batch.bin"]


def download(url, path):
    """url to path with a progress bar."""
    try:
        with replacing(path) as part, urllib.request.urlopen(url, timeout=60) as answer, open(part, "wb") as out, tqdm(
                total=int(answer.headers.get("Content-Length", 0)), unit="B", unit_scale=True, desc=path.name) as bar:
            while chunk := answer.read(1 << 20):
                out.write(chunk)
                bar.update(len(chunk))
    except OSError as error:
        raise Problem(f"{url}: download failed ({error}); fetch it by other means and put it at {path}") from None


def cifar10(data_dir, files=CIFAR_FILES):
    """Images of CIFAR-10's binary version in data_dir, by default those for training; downloaded and checked first if
    they are not there."""
    data_dir = pathlib.Path(data_dir)
    folder = next((d for d in (data_dir, data_dir / "cifar-10-batches-bin") if (d / CIFAR_FILES[0]).exists()), None)
    if folder is None:
        archive, folder = data_dir / "cifar-10-binary.tar.gz", data_dir / "cifar-10-batches-bin"
        if not archive.exists():
            download(CIFAR_URL, archive)
        if hashlib.md5(archive.read_bytes()).hexdigest() != CIFAR_MD5:
            raise Problem(f"{archive}: not CIFAR-10's binary version (its md5 is not {CIFAR_MD5}); delete it and run "
                          "again to download it anew")
        with tarfile.open(archive) as tar:      # the known members, by name: no path in the archive is ever used
            for name in ["batches.meta.txt", *CIFAR_TEST, *reversed(CIFAR_FILES)]:  # the file looked for comes last
                write(folder / name, tar.extractfile(f"cifar-10-batches-bin/{name}").read())
    records = []
    for path in (folder / name for name in files):
        raw = np.fromfile(path, np.uint8) if path.exists() else np.empty(0, np.uint8)
        if raw.size == 0 or raw.size % 3073 or raw[::3073].max() > 9:
            raise Problem(f"{path}: missing, truncated or not a CIFAR-10 binary batch (3,073 bytes an image, the first "
                          "its label 0..9); replace it, or delete the folder to have CIFAR-10 downloaded anew")
        records.append(raw.reshape(-1, 3073))
    records, meta = np.concatenate(records), folder / "batches.meta.txt"
    names = meta.read_text().split() if meta.exists() else []
    images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Data(images, records[:, 0].astype(np.int64), names if len(names) == 10 else list("0123456789"), 32)


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def image_folder(root, n_classes=None, seed=0):
    """The image files under root/CLASS/, all classes or n_classes random ones. Returns paths, labels and class names."""
    root = pathlib.Path(root)
    if not root.is_dir():
        raise Problem(f"--data {root}: no such folder; give shapes, cifar10, a folder of class folders of images, or "
                      "what encode wrote")
    names = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    if len(names) < 2:
        raise Problem(f"--data {root}: {len(names)} class folders; at least two are needed, as ROOT/CLASS/IMAGE.png")
    if n_classes is not None:
        if not 2 <= n_classes <= len(names):
            raise Problem(f"--classes {n_classes}: {root} has {len(names)} class folders; give 2..{len(names)}")
        names = sorted(np.random.default_rng(seed).choice(names, n_classes, replace=False).tolist())
    files = [sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != ".")
             for name in names]
    if [] in files:
        raise Problem(f"{root / names[files.index([])]}: no images in this class folder; add some or remove it")
    return [path for found in files for path in found], np.repeat(np.arange(len(names)), [len(f) for f in files]), names


def read_image(path, size):
    """An image file of any mode, on white where transparent, cropped as ADM does. Returns (size, size, 3) uint8."""
    try:
        with open(path, "rb") as file:
            image = matplotlib.image.imread(file, format="any")     # told by content, not by suffix
    except Exception as error:                                      # a decoder may raise anything
        raise Problem(f"{path}: unreadable image ({type(error).__name__}); replace or remove it") from None
    scale = 255 if image.dtype.kind == "f" else 255 / np.iinfo(image.dtype).max
    image = torch.from_numpy(np.atleast_3d(image).astype(np.float32) * scale).permute(2, 0, 1)
    if len(image) == 4:
        image = image[:3] * (image[3] / 255) + (255 - image[3])
    return center_crop(image.expand(3, -1, -1), size)


def center_crop(image, size):
    """ADM's crop: halve by box filter while twice too large, then bicubic to the shorter side, then the centre square.

    image: (3, H, W), 0..255. Returns (size, size, 3) uint8.
    """
    image = image.unsqueeze(0)
    while min(image.shape[2:]) >= 2 * size:
        for axis in (2, 3):                                 # box: the mean of the pixels whose centres lie in the new one
            count = image.shape[axis] // 2
            edges = np.floor(np.arange(count + 1) * image.shape[axis] / count + 0.5).astype(int)
            sums, shape = np.add.reduceat(image.numpy(), edges[:-1], axis=axis), [1, 1, -1, 1] if axis == 2 else [-1]
            image = torch.from_numpy(sums / np.diff(edges).reshape(shape)).float().round()
    height, width = (max(size, round(s * size / min(image.shape[2:]))) for s in image.shape[2:])
    image = F.interpolate(image, (height, width), mode="bicubic", antialias=True).clamp(0, 255).round()
    top, left = (height - size) // 2, (width - size) // 2
    return image[0, :, top:top + size, left:left + size].permute(1, 2, 0).to(torch.uint8).numpy()


def read_images(paths, size, desc="reading images"):
    """All images, (M, size, size, 3) uint8, decoded by threads."""
    images = np.empty((len(paths), size, size, 3), np.uint8)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        try:
            decoded = pool.map(read_image, paths, [size] * len(paths))
            for i, image in enumerate(tqdm(decoded, total=len(paths), desc=desc, disable=desc is None, leave=False)):
                images[i] = image
        except Problem:
            pool.shutdown(cancel_futures=True)
            raise
    return images


def latents(root):
    """What encode wrote, memory-mapped."""
    try:
        about = json.loads((root / "latents.json").read_text())
        done, total = about["done"], about["total"]
        if done == total:
            images, labels = np.load(root / "latents.npy", mmap_mode="r"), np.load(root / "labels.npy")
            data = Data(images, labels, about["names"], about["image_size"], vae=about["vae"])
            if (images.shape[:2] != (total, 2) or images.ndim != 5 or images.shape[3] != images.shape[4]
                    or images.dtype != np.float16 or data.image_size % images.shape[4] or labels.shape != (total,)
                    or labels.dtype.kind != "i" or not 0 <= labels.min() <= labels.max() < len(data.names)
                    or type(data.vae) is not str):
                raise ValueError("their parts do not fit together")
            return data
    except Exception as error:                              # the errors of numpy's format are many
        raise Problem(f"{root}: damaged latents ({error}); encode again into another folder") from None
    raise Problem(f"{root}: only {done} of {total} images are encoded; run the encode command again")


def load_data(args):
    """The data that --data names."""
    encoded = (pathlib.Path(args.data) / "latents.json").exists()
    if args.image_size and (encoded or args.data in ("shapes", "cifar10")):
        raise Problem(f"--image-size {args.image_size}: only a folder's images are cropped; leave it away")
    if args.data == "shapes":
        return shapes()
    if args.data == "cifar10":
        return cifar10(args.data_dir)
    if encoded:
        return latents(pathlib.Path(args.data))
    paths, labels, names = image_folder(args.data)
    return Data(read_images(paths, args.image_size or 32), labels, names, args.image_size or 32)


def reference(args):
    """The data in the layout of `sample --num`: the reference batch that FID on one's own data needs."""
    if pathlib.Path(args.out).suffix != ".npz":
        raise Problem(f"--out {args.out}: give a name that ends in .npz")
    if (pathlib.Path(args.data) / "latents.json").exists():
        raise Problem(f"--data {args.data}: latents are not images; give the folder that was encoded, with the same "
                      "--classes, --seed and --image-size")
    built_in = args.data in ("shapes", "cifar10")
    if built_in:
        if args.classes:
            raise Problem(f"--classes {args.classes}: only a folder's classes can be picked; leave it away")
        data = load_data(args)
        source, labels = data.images, data.labels
    else:
        source, labels, _ = image_folder(args.data, args.classes, args.seed)
    if args.num and args.num > len(labels):
        raise Problem(f"--num {args.num}: the data has {len(labels)} images")
    pick = np.sort(np.random.default_rng(args.seed).permutation(len(labels))[:args.num])
    images = source[pick] if built_in else read_images([source[i] for i in pick], args.image_size or 32)
    write_npz(args.out, images, labels[pick])
    print(f"{args.out}: {len(images)} images of {images.shape[1]}x{images.shape[2]}")


# ---- Latents --------------------------------------------------------------------------------------------------------

def load_vae(name, device):
    """Stable Diffusion's autoencoder, by hub name or from a folder."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise Problem("latents need the VAE of the diffusers package: pip install diffusers") from None
    try:
        return AutoencoderKL.from_pretrained(name).to(device).eval().requires_grad_(False)
    except Exception as error:                              # the errors of the hub and of its file formats are many
        raise Problem(f"--vae {name}: cannot load an AutoencoderKL ({type(error).__name__}); give a hub name, or a "
                      "folder with its config.json and weights") from None


@torch.no_grad()
def encode(args):
    """Latents of every image and of its mirror, float16, already scaled; goes on where it was stopped."""
    paths, labels, names = image_folder(args.data, args.classes, args.seed)
    out, state, done = pathlib.Path(args.out), pathlib.Path(args.out) / "latents.json", 0
    files = "\n".join(str(p.relative_to(args.data)) for p in paths)
    about = dict(files_sha256=hashlib.sha256(files.encode("utf-8", "surrogateescape")).hexdigest(), total=len(paths),
                 names=names, seed=args.seed, image_size=args.image_size, vae=args.vae)
    with claimed(out):
        if state.exists():
            try:
                before = dict(json.loads(state.read_text()))
                done = int(before["done"])
            except (ValueError, TypeError, KeyError):
                raise Problem(f"{state}: damaged; choose another --out") from None
            different = [key for key, value in about.items() if before.get(key) != value]
            if different:
                raise Problem(f"{out}: holds another encoding ({', '.join(different)} differ); choose another --out")
        elif occupied(out):
            raise Problem(f"{out}: not empty; choose another --out")
        device = pick_device()
        vae = load_vae(args.vae, device)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if args.image_size % factor:
            raise Problem(f"--image-size {args.image_size}: not a multiple of the VAE's factor {factor}")
        about["scaling_factor"] = vae.config.scaling_factor
        if done == 0:
            write(state, json.dumps(dict(about, done=0), indent=1))     # from here on the folder is this encoding's
            np.save(out / "labels.npy", labels)
            shape = (len(paths), 2, vae.config.latent_channels, *[args.image_size // factor] * 2)
            np.lib.format.open_memmap(out / "latents.npy", "w+", np.float16, shape)
        store = np.load(out / "latents.npy", mmap_mode="r+")
        for start in tqdm(range(done, len(paths), args.batch_size), desc="encoding", unit="batch"):
            chunk = paths[start:start + args.batch_size]
            x = pixels(read_images(chunk, args.image_size, None)).to(device)
            torch.manual_seed(args.seed + start)                # the same latents wherever an earlier run was stopped
            pair = [vae.encode(view).latent_dist.sample() * vae.config.scaling_factor for view in (x, x.flip(3))]
            store[start:start + len(chunk)] = torch.stack(pair, dim=1).half().cpu().numpy()
            store.flush()
            write(state, json.dumps(dict(about, done=start + len(chunk)), indent=1))
    print(f"{out}: {len(paths)} images of {len(names)} classes, encoded")


# ---- Sampling -------------------------------------------------------------------------------------------------------

def pick_device():
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@torch.no_grad()
def generate(model, labels, steps, cfg, sampler="ddpm", seed=0, vae=None, batch_size=100):
    """One sample per label as uint8 (M, H, W, 3). vae decodes latents; without one the model makes pixels."""
    device, shape = model.pos_embed.device, (model.cfg.in_channels, model.cfg.input_size, model.cfg.input_size)
    diffusion, generator = dydilit.GaussianDiffusion().to(device), torch.Generator(device).manual_seed(seed)
    images = []
    for y in tqdm(torch.tensor(labels, device=device).split(batch_size), desc="batches", leave=False,
                  disable=len(labels) <= batch_size):
        noise = torch.randn((len(y), *shape), generator=generator, device=device)
        x = diffusion.sample(lambda x, t: model.forward_with_cfg(x, t, y, cfg), noise, steps, sampler,
                             clip_x0=vae is None, generator=generator)
        if vae is not None:
            x = torch.cat([vae.decode(part / vae.config.scaling_factor).sample for part in x.split(8)])
        images.append(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(images)


def save_grid(path, images, labels, names):
    """One row of images per class, the class's name at its left. images: (M, H, W, 3), grouped by label."""
    rows, size = list(dict.fromkeys(labels)), images.shape[1] + 2
    columns = max(labels.count(c) for c in rows)
    canvas = np.full((len(rows) * size + 2, columns * size + 2, 3), 255, np.uint8)
    for r, c in enumerate(rows):
        for k, image in enumerate(images[np.array(labels) == c]):
            canvas[r * size + 2:(r + 1) * size, k * size + 2:(k + 1) * size] = image
    figure = Figure(figsize=(0.62 * columns + 1.1, 0.62 * len(rows) + 0.1), layout="constrained")
    axes = figure.subplots()
    axes.imshow(canvas, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([size * (r + 0.5) for r in range(len(rows))],       # as they are: a folder's name may be anything
                    [names[c].encode("utf-8", "replace").decode() for c in rows], parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    with replacing(path) as part:
        figure.savefig(part, dpi=150)


def save_curve(path, log):
    """The loss and its two terms against the step."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, style in [("loss", "-"), ("simple", "--"), ("variational", ":")]:
        axes.plot([int(row["step"]) for row in log], [float(row[name]) for row in log], style, label=name)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as part:
        figure.savefig(part, dpi=150)


def sample(args):
    """Samples of a run: a labelled grid, or with --num an .npz with arr_0 (M, H, W, 3) uint8 and arr_1 labels."""
    run, device = pathlib.Path(args.run), pick_device()
    out = pathlib.Path(args.out or run / ("samples.npz" if args.num else "grid.png"))
    if out.suffix != (".npz" if args.num else ".png"):
        raise Problem(f"--out {out}: with --num give a name that ends in .npz, without it one in .png")
    state = load_checkpoint(run / "checkpoint.pt")
    names, knobs = state["data"]["names"], state["knobs"]
    classes = list(range(len(names) if args.num else min(len(names), 10)))
    if args.classes:
        numbers = {**{str(c): c for c in range(len(names))}, **{name: c for c, name in enumerate(names)}}
        for name in args.classes.split(","):
            if name not in numbers:
                raise Problem(f"--classes {name}: this run knows 0..{len(names) - 1}, or {', '.join(names[:10])} ...")
        classes = [numbers[name] for name in args.classes.split(",")]
    model = trained_model(state, device, "weights" if args.raw_weights else "ema")
    vae = load_vae(state["data"]["vae"], device) if state["data"]["vae"] else None
    count, k = args.num or 10 * len(classes), len(classes)
    labels = [c for i, c in enumerate(classes) for _ in range(count // k + (i < count % k))]
    steps, cfg = args.steps or knobs["sampling_steps"], knobs["cfg"] if args.cfg is None else args.cfg
    images = generate(model.fuse(), labels, steps, cfg, args.sampler, args.seed, vae, args.batch_size)
    write_npz(out, images, labels) if args.num else save_grid(out, images, labels, names)
    print(f"{out}: {len(images)} samples, step {state['step']}, {steps} {args.sampler} steps, guidance {cfg:g}")


# ---- Training -------------------------------------------------------------------------------------------------------

def keep_freed_memory():
    """Has glibc keep freed memory: handing it back and forth costs a CPU's training step a quarter, in page faults."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)                                 # M_MMAP_MAX: large blocks, too, come from the heap,
        libc.mallopt(-1, -1)                                # M_TRIM_THRESHOLD: which never shrinks


def overrides(pairs):
    """{"n_heads": 4} from ["n_heads=4"]: fields of ModelConfig, their values in JSON or as plain words."""
    fields, parsed = {f.name for f in dataclasses.fields(dydilit.ModelConfig)}, {}
    for name, equals, value in (pair.partition("=") for pair in pairs):
        if not equals or name not in fields:
            raise Problem(f"--set {name}{equals}{value}: give FIELD=VALUE with a field of dydilit.ModelConfig")
        try:
            parsed[name] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name] = value
    return parsed


def batch_indices(total, batch_size, step, seed):
    """The images of a step: consecutive slices of a fresh random order of the data per epoch."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: torch.randperm(total, generator=torch.Generator().manual_seed(seed * 2 ** 32 + epoch))
              for epoch in (positions // total).unique().tolist()}
    return torch.stack([orders[p // total][p % total] for p in positions.tolist()])


def save_log(path, log):
    with replacing(path) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in log for name in row))
        writer.writeheader()
        writer.writerows(log)


def train(args):
    """Trains until --steps, from the run's last checkpoint if there is one."""
    for name, (small, paper, _) in KNOBS.items():
        if getattr(args, name) is None:
            setattr(args, name, small if args.model == SMALL_MODEL else paper)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % (world * args.accumulate):
        raise Problem(f"--batch-size {args.batch_size}: not a multiple of {world} processes x --accumulate "
                      f"{args.accumulate}")
    if not (args.lr > 0 and args.ema < 1 and args.cooldown <= 1):
        raise Problem(f"--lr {args.lr:g}, --ema {args.ema:g}, --cooldown {args.cooldown:g}: the first must be positive, the "
                      "second in [0, 1), the third in [0, 1]")
    dydilit.respaced_timesteps(1000, args.sampling_steps)   # may these be?
    device, main = pick_device(), rank == 0
    run = pathlib.Path(args.run or pathlib.Path("runs") / pathlib.Path(args.data).resolve().name)
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)                   # or every process's barrier would sit on the first card
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if not main:
            dist.barrier()                                  # the first process may have to download
    data = load_data(args)
    if world > 1 and main:
        dist.barrier()
    data.flip &= not args.no_flip
    if len(data.labels) < args.batch_size:
        raise Problem(f"--data {args.data}: {len(data.labels)} images are fewer than one batch; add images or lower "
                      f"--batch-size {args.batch_size}")
    with claimed(run) if main else contextlib.nullcontext():
        fit(args, data, run, device, rank, world)
    if world > 1:
        dist.destroy_process_group()


def fit(args, data, run, device, rank, world):
    """train's work, in a folder that is its own."""
    main, local, checkpoint = rank == 0, args.batch_size // world, run / "checkpoint.pt"
    torch.manual_seed(args.seed)
    given, changed = data.model_shape(), overrides(args.set)
    for name in given.keys() & changed.keys():
        raise Problem(f"--set {name}={changed[name]}: the data decide this, they have {given[name]}; leave it away")
    model = dydilit.build_model(args.model, **given, **changed).to(device)
    if args.init == "full":
        torch.manual_seed(args.seed)
        full = dydilit.build_model(args.model, **given).state_dict()
        for name, weight in model.state_dict().items():     # but gammas and lambdas, which are chosen, not drawn
            other = full.get(name, weight)[-len(weight):]   # of Q, K, V, a module that routes Q and K has the last rows, V
            if other.shape == weight.shape and not name.endswith(("gammas", "lambdas")):
                weight.copy_(other)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0)
    diffusion = dydilit.GaussianDiffusion().to(device)
    snr = (diffusion.sqrt_alpha_bar / diffusion.sqrt_one_minus).square().cpu()      # signal-to-noise ratio of timesteps
    shape = (model.cfg.in_channels, model.cfg.input_size, model.cfg.input_size)
    # What makes a run what it is may not change when it resumes; how long it runs and how it reports may.
    identity = dict(dataclasses.asdict(model.cfg), names=data.names, images=len(data.labels), flip=data.flip,
                    images_sha256=hashlib.sha256(data.images[::-(-len(data.images) // 64)].tobytes()).hexdigest(),
                    batch_size=args.batch_size, lr=args.lr, cooldown=args.cooldown, snr_cap=args.snr_cap, ema=args.ema,
                    seed=args.seed, init=args.init)
    knobs = {name: value for name, value in vars(args).items() if name != "run"}
    step, window = 0, torch.zeros(5, dtype=torch.float64)   # since the last log: sums of three losses, images, max norm
    if checkpoint.exists():
        state = load_checkpoint(checkpoint)
        for name, value in identity.items():
            if state["identity"].get(name) != value:
                raise Problem(f"{checkpoint}: this run has {name} {state['identity'].get(name)!s:.60}, not "
                              f"{value!s:.60}; repeat its flags, or choose another --run")
        model.load_state_dict(state["weights"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, window = state["step"], state["window"]
        del state                                           # a second copy of everything
        if main:
            print(f"{run}: resuming at step {step} of {args.steps}")
    elif main and occupied(run):
        raise Problem(f"{run}: not empty, and no checkpoint in it; choose another --run")

    def check():
        if not window.isfinite().all():
            raise Problem(f"the loss or its gradient is no longer finite at step {step}; {checkpoint} keeps the last "
                          "good weights: start another --run with a lower --lr")

    def save():
        check()
        if main:
            state = dict(format="dydilit", step=step, window=window, identity=identity, knobs=knobs,
                         data=dict(names=data.names, vae=data.vae), model=dataclasses.asdict(model.cfg),
                         weights=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())
            try:
                with replacing(checkpoint) as part:
                    torch.save(state, part)
            except RuntimeError as error:                   # what torch.save makes of a full disk
                raise Problem(f"{checkpoint}: cannot be written ({str(error).splitlines()[0]:.80}); free some space, and "
                              "the same command goes on from the last one, which is kept") from None

    def grid(path):
        classes = range(min(len(data.names), 10))
        labels = [c for c in classes for _ in range(10)]
        save_grid(path, generate(copy.deepcopy(ema).fuse(), labels, args.sampling_steps, args.cfg, vae=vae), labels,
                  data.names)

    log, vae = [], None
    if main:
        vae = load_vae(data.vae, device) if data.vae else None          # now, rather than at the first grid
        if not checkpoint.exists():
            save()                                          # from here on the folder is this run's
        write(run / "config.json", json.dumps(dict(knobs, model_config=dataclasses.asdict(model.cfg)), indent=1))
        if (run / "log.csv").exists():
            try:
                with open(run / "log.csv", newline="") as file:
                    log = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
                [float(row[name]) for row in log for name in ("loss", "simple", "variational", "seconds")]
            except (ValueError, TypeError, KeyError, csv.Error):
                raise Problem(f"{run / 'log.csv'}: damaged; move it away, and the same command goes on") from None
    parallel = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    forward = torch.compile(parallel) if args.compile else parallel
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):          # the first asks, the second insists
        signal.signal(number, lambda n, frame: (stop.append(n), signal.signal(n, signal.SIG_DFL)))
    before, started = float(log[-1]["seconds"]) if log else 0.0, time.time()
    bar = tqdm(total=args.steps, initial=min(step, args.steps), desc="training", disable=not main, unit="step")
    while step < args.steps:
        if main and step and step % args.sample_every == 0 and not (run / f"samples-{step:07d}.png").exists():
            grid(run / f"samples-{step:07d}.png")           # also of a run that was stopped before it came to that
        # Everything random in a step comes from (seed, step): a resumed run needs no generator's state, and any number
        # of processes sees the same images, timesteps and noise.
        seed = (args.seed * 2 ** 32 + step) % 2 ** 62
        generator = torch.Generator().manual_seed(seed)
        index = batch_indices(len(data.labels), args.batch_size, step, args.seed)
        mirror = torch.rand(args.batch_size, generator=generator) < 0.5
        t = torch.randint(diffusion.n_timesteps, (args.batch_size,), generator=generator)
        noise = torch.randn(args.batch_size, *shape, generator=generator)
        weight = (args.snr_cap / snr[t]).clamp(max=1) if args.snr_cap else torch.ones(args.batch_size)
        torch.manual_seed((seed * world + rank) % 2 ** 63)  # for the label dropout
        model.train()
        totals = torch.zeros(5, device=device)              # sums of the three losses, images, signals to stop
        micro = torch.arange(rank * local, (rank + 1) * local).chunk(args.accumulate)
        for part in micro:
            x, y = data.batch(index[part], mirror[part])
            wait = world > 1 and part is not micro[-1]      # processes exchange gradients once per step
            with parallel.no_sync() if wait else contextlib.nullcontext():
                with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                    losses = diffusion.losses(forward, x.to(device), y.to(device), t[part].to(device),
                                              noise[part].to(device))
                ((losses["loss"] * weight[part].to(device)).sum() / local).backward()
            totals[:3] += torch.stack([losses[name].detach().sum() for name in ("loss", "simple", "variational")])
        totals[3:] = torch.tensor([local, len(stop)])
        if world > 1:                                       # one process's signal stops them all at the same step
            dist.all_reduce(totals)
        totals = totals.cpu().double()
        window[:4] += totals[:4]
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        window[4] = torch.maximum(window[4], norm.cpu().double())
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (args.steps - step) / (args.cooldown * args.steps) if args.cooldown else 1)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - args.ema)
        step += 1
        bar.update()
        if step % args.log_every == 0 or step == args.steps:
            check()
            loss, simple, variational = (window[:3] / window[3]).tolist()
            row = dict(loss=loss, simple=simple, variational=variational, grad_norm=window[4].item(),
                       seconds=before + time.time() - started)
            log.append(dict(step=step, images=step * args.batch_size, **{k: f"{v:.6g}" for k, v in row.items()}))
            if main:
                save_log(run / "log.csv", log)
            rate = bar.format_dict["rate"] or 0
            bar.set_postfix_str(f"loss {loss:.4f}, {rate * args.batch_size:.0f} images/s")
            window.zero_()
        if step % args.save_every == 0 or step == args.steps or totals[4] > 0:
            save()
        if totals[4] > 0:
            bar.close()
            if main:
                print(f"{checkpoint}: saved at step {step}; the same command goes on from here")
            sys.exit(130)
    bar.close()
    if main:
        save_curve(run / "loss.png", log)
        grid(run / "samples.png")
        print(f"{run}: {step} steps done; look at samples.png and loss.png")


def main():
    try:
        args = arguments(sys.argv[1:])
        keep_freed_memory()
        {"train": train, "encode": encode, "sample": sample, "reference": reference}[args.command](args)
    except (Problem, ValueError) as error:
        sys.exit(f"train.py: {error}")
    except (RuntimeError, MemoryError) as error:
        if type(error).__module__.startswith("torch._inductor"):
            sys.exit(f"train.py: --compile: {str(error).splitlines()[0]:.90}; install a C++ compiler, or leave the flag away")
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        sys.exit("train.py: out of memory; train with a larger --accumulate, sample with a smaller --batch-size, or take "
                 "fewer or smaller images")
    except OSError as error:
        sys.exit(f"train.py: {error.filename or 'file'}: {error.strerror or error}; check the path, its permissions and "
                 "the free space")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
