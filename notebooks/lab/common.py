"""What train.py and the tools in notebooks/lab share: errors, files, data, checkpoints, pictures.

The data are built-in shapes, CIFAR-10, folders of images, or latents of such a folder.
"""
import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tarfile
import urllib.request

import numpy as np
import torch
from matplotlib.figure import Figure    # not pyplot, which would ask for a window system
from PIL import Image
from tqdm.auto import tqdm

import dydilit


# ---- Errors -------------------------------------------------------------------------------------

class Problem(Exception):
    """Something the user can put right: one line that names the thing and the remedy."""


def explain(error):
    """One line for an error that a user can put right, None for any other."""
    first = str(error).strip().partition("\n")[0]
    if isinstance(error, (Problem, ValueError)):
        return first
    if isinstance(error, OSError):
        return (f"{error.filename or 'file'}: {error.strerror or first}; check the path, its "
                "permissions and the free space")
    if isinstance(error, MemoryError) or "out of memory" in first or "allocate memory" in first:
        return ("out of memory; train with a larger --accumulate, sample with a smaller "
                "--batch-size, or take fewer or smaller images")
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return f"--compile: {first:.90}; install a C++ compiler, or leave the flag away"


def explained(function, *arguments):
    """Calls a program's main function and ends it in one line if the user can put things right."""
    try:
        function(*arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if (line := explain(error)) is None:
            raise
        sys.exit(f"{pathlib.Path(sys.argv[0]).name}: {line}")


# ---- Command lines ------------------------------------------------------------------------------

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


positive, amount = number(int, 1, 2 ** 31), number(float, 0, 1e6)


# ---- Files --------------------------------------------------------------------------------------

@contextlib.contextmanager
def replacing(path, mode="wb", **options):
    """Opens a file that takes path's place when the block ends well: path is never half a file."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        error.filename = error.filename or str(path)        # for the message
        raise
    except RuntimeError as error:                           # what torch.save makes of a full disk
        reason = str(error).partition("\n")[0]
        raise Problem(f"{path}: cannot be written ({reason:.60}); free some space, and the same "
                      "command goes on from what was there before") from None
    finally:
        part.unlink(missing_ok=True)


def write_npz(path, images, labels):
    """The layout of ADM's evaluator. images: (M, H, W, 3) uint8; labels: (M,)."""
    with replacing(path) as file:
        np.savez(file, arr_0=images, arr_1=np.asarray(labels, np.int64))


def save_log(path, log):
    """A list of dictionaries as a table."""
    with replacing(path, "w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in log for name in row))
        writer.writeheader()
        writer.writerows(log)


def occupied(folder):
    """Whether a folder holds anything but the hidden leftovers of an interrupted write."""
    return folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())


@contextlib.contextmanager
def claimed(folder):
    """Keeps a folder to this process until the block ends, or the process, even by kill -9."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:                         # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)       # the folder itself is locked: no file stays behind
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise Problem(f"{folder}: another process is at work in it; wait until it ends, or choose "
                      "another folder") from None
    except OSError:
        pass                                    # a file system without locks
    try:
        yield
    finally:
        os.close(handle)


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


# ---- Shapes -------------------------------------------------------------------------------------

SHAPES = ["circle", "ring", "triangle", "star", "heart", "moon", "cross", "smiley", "stripes",
          "checkers"]


def outline(shape, x, y):
    """Distance to a shape's outline, negative inside, for x and y from about -1 to 1."""
    r, a, b = np.hypot(x, y), np.abs(x), np.abs(y)
    if shape == "circle":
        return r - 0.9
    if shape == "ring":
        return np.abs(r - 0.72) - 0.2
    if shape == "triangle":
        return np.maximum(-y, 0.866 * a + 0.5 * y) - 0.55
    if shape == "star":                                     # five mirrored wedges
        angle = np.abs((np.arctan2(x, y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        return 0.35 * r * np.cos(angle) + 0.937 * r * np.sin(angle) - 0.35
    if shape == "heart":                                    # a tilted square under two half discs
        square = (a + np.abs(y + 0.1) - 0.75) / 1.414
        return np.minimum(square, np.hypot(a - 0.375, y - 0.275) - 0.53)
    if shape == "moon":
        return np.maximum(r - 0.9, 0.75 - np.hypot(x - 0.42, y - 0.12))
    if shape == "cross":
        return np.minimum(np.maximum(a - 0.28, b - 0.88), np.maximum(a - 0.88, b - 0.28))
    if shape == "smiley":
        eyes = np.hypot(a - 0.35, y - 0.3) - 0.19
        mouth = np.maximum(np.abs(r - 0.55) - 0.12, y + 0.1)
        return np.maximum(r - 0.95, -np.minimum(eyes, mouth))
    square = np.maximum(a, b) - 0.87                        # filled by three bars or by two cells
    if shape == "stripes":
        return np.maximum(square, np.abs((y + 0.87) % 0.696 - 0.174) - 0.174)
    return np.maximum(square, -np.where(x * y > 0, -1, 1) * np.minimum(a, b))


def shapes(n=20_000, seed=0, size=32):
    """n pictures of ten shapes: place, size, tilt, colours and background vary between them."""
    rng = np.random.default_rng(seed)

    def colours(value):
        """One RGB colour per brightness, of random hue and saturation."""
        hue, saturation = rng.uniform(0, 1, (len(value), 1)), rng.uniform(0.2, 1, (len(value), 1))
        wheel = np.clip(np.abs((hue + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1, 0, 1)
        return value[:, None] * (1 - saturation + saturation * wheel)

    labels = rng.permutation(n) % len(SHAPES)
    images = np.empty((n, size, size, 3), np.uint8)
    axis = (np.arange(size) + 0.5) * 32 / size - 16         # 0 in the middle, 16 at the border
    for c, shape in enumerate(SHAPES):
        which = np.flatnonzero(labels == c)
        m = len(which)
        radius = rng.uniform(12, 14.5, (m, 1, 1))
        tilt = np.radians(rng.uniform(-8, 8, (m, 1, 1)))
        x = axis.reshape(1, 1, -1) - rng.uniform(-1, 1, (m, 1, 1)) * (16 - radius) * 0.5
        y = axis.reshape(1, -1, 1) - rng.uniform(-1, 1, (m, 1, 1)) * (16 - radius) * 0.5
        u, v = np.cos(tilt) * x + np.sin(tilt) * y, np.sin(tilt) * x - np.cos(tilt) * y
        distance = outline(shape, u / radius, v / radius) * radius * size / 32
        cover = np.clip(0.5 - distance, 0, 1)[..., None]    # the share of a pixel that is covered
        front, back = colours(rng.uniform(0.75, 1, m)), colours(rng.uniform(0, 0.3, m))
        slope = rng.uniform(-0.25, 0.25, (m, 2, 1, 1))      # light falls in from one side
        light = (1 + slope[:, 0] * axis.reshape(1, 1, -1) / 16
                 + slope[:, 1] * axis.reshape(1, -1, 1) / 16)
        front, back = front[:, None, None], back[:, None, None] * light[..., None]
        images[which] = np.clip((cover * front + (1 - cover) * back) * 255 + 0.5, 0, 255)
    return Data(images, labels, list(SHAPES), size, flip=False)


# ---- CIFAR-10 -----------------------------------------------------------------------------------

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_FILES = [f"data_batch_{k}.bin" for k in range(1, 6)]
CIFAR_TEST = ["test_batch.bin"]


def fetch_cifar10(archive, folder):
    """Downloads CIFAR-10's archive if it is not there, checks it, and unpacks it into a folder."""
    if not archive.exists():
        try:
            answer = urllib.request.urlopen(CIFAR_URL, timeout=60)
            size = int(answer.headers.get("Content-Length", 0))
            with replacing(archive) as file, tqdm.wrapattr(answer, "read", total=size) as source:
                shutil.copyfileobj(source, file)
        except OSError as error:
            raise Problem(f"{CIFAR_URL}: download failed ({error}); fetch it by other means and "
                          f"put it at {archive}") from None
    if hashlib.md5(archive.read_bytes()).hexdigest() != CIFAR_MD5:
        raise Problem(f"{archive}: not CIFAR-10's binary version (its md5 is not {CIFAR_MD5}); "
                      "delete it and run again to download it anew")
    with tarfile.open(archive) as tar:          # by names that we know, never the archive's own
        for name in ["batches.meta.txt", *CIFAR_TEST, *reversed(CIFAR_FILES)]:
            with replacing(folder / name) as file:
                shutil.copyfileobj(tar.extractfile(f"cifar-10-batches-bin/{name}"), file)


def cifar10(data_dir, files=CIFAR_FILES):
    """Images of CIFAR-10's binary version in data_dir; downloaded first if they are not there."""
    folder = data_dir = pathlib.Path(data_dir)
    if not (folder / CIFAR_FILES[0]).exists():
        folder = data_dir / "cifar-10-batches-bin"
    if not (folder / CIFAR_FILES[0]).exists():              # it was unpacked last
        fetch_cifar10(data_dir / "cifar-10-binary.tar.gz", folder)
    records = []
    for path in (folder / name for name in files):
        raw = np.fromfile(path, np.uint8) if path.exists() else np.empty(0, np.uint8)
        if raw.size == 0 or raw.size % 3073 or raw[::3073].max() > 9:
            raise Problem(f"{path}: missing, truncated or not a CIFAR-10 binary batch (3,073 bytes "
                          "an image, the first its label 0..9); replace it, or delete the folder "
                          "to have CIFAR-10 downloaded anew")
        records.append(raw.reshape(-1, 3073))
    records, meta = np.concatenate(records), folder / "batches.meta.txt"
    names = meta.read_text().split() if meta.exists() else []
    names = names if len(names) == 10 else list("0123456789")
    images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Data(images, records[:, 0].astype(np.int64), names, 32)


# ---- Folders of images --------------------------------------------------------------------------

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def class_folders(root):
    """The names of the class folders in a folder."""
    root = pathlib.Path(root)
    if not root.is_dir():
        raise Problem(f"--data {root}: no such folder; give shapes, cifar10, a folder of class "
                      "folders of images, or a folder that encode.py wrote")
    names = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    if len(names) < 2:
        raise Problem(f"--data {root}: {len(names)} class folders; at least two are needed, as "
                      "ROOT/CLASS/IMAGE.png")
    return names


def image_folder(root, names):
    """The paths of all images in these class folders, and their labels, (M,)."""
    paths, labels = [], []
    for c, folder in enumerate(pathlib.Path(root) / name for name in names):
        found = sorted(path for path in folder.rglob("*")
                       if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))
        if not found:
            raise Problem(f"{folder}: no images in this class folder; add some or remove it")
        paths += found
        labels += [c] * len(found)
    return paths, np.array(labels)


def read_image(path, size):
    """An image, on white where it is transparent, cropped as ADM does: (size, size, 3) uint8."""
    try:
        with Image.open(path) as file:
            if file.mode.startswith("I"):                   # 16 bits of grey
                file = Image.fromarray((np.asarray(file) >> 8).astype(np.uint8))
            image = file.convert("RGBA")
    except Exception as error:                              # a decoder may raise anything
        raise Problem(f"{path}: unreadable image ({type(error).__name__}); replace or remove "
                      "it") from None
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


# ---- Latents ------------------------------------------------------------------------------------

def latents(root):
    """What encode.py wrote, memory-mapped."""
    try:
        about = json.loads((root / "latents.json").read_text())
        done, total, names = about["done"], about["total"], about["names"]
        if done == total:
            labels = np.load(root / "labels.npy")
            images = np.load(root / "latents.npy", mmap_mode="r")       # (M, 2, C, S, S)
            fit = (images.shape[:2] == (total, 2) and images.shape[3] == images.shape[4]
                   and images.dtype == np.float16 and about["image_size"] % images.shape[4] == 0
                   and labels.shape == (total,) and labels.dtype.kind == "i"
                   and 0 <= labels.min() <= labels.max() < len(names) and about["vae"])
            if not fit:
                raise ValueError("their parts do not fit together")
            return Data(images, labels, names, about["image_size"], vae=str(about["vae"]))
    except Exception as error:                  # numpy's format has many kinds of error
        raise Problem(f"{root}: damaged latents ({error}); encode again into another "
                      "folder") from None
    raise Problem(f"{root}: only {done} of {total} images are encoded; run the encode command "
                  "again")


def load_vae(name, device):
    """Stable Diffusion's autoencoder, by hub name or from a folder."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise Problem("latents need the VAE of the diffusers package: pip install "
                      "diffusers") from None
    try:
        return AutoencoderKL.from_pretrained(name).to(device).eval().requires_grad_(False)
    except Exception as error:      # the hub and its file formats have many kinds of error
        raise Problem(f"--vae {name}: cannot load an AutoencoderKL ({type(error).__name__}); give "
                      "a hub name, or a folder with its config.json and weights") from None


# ---- All of them --------------------------------------------------------------------------------

def load_data(args):
    """The data that --data names."""
    folder, size = pathlib.Path(args.data), getattr(args, "image_size", None)
    encoded = (folder / "latents.json").exists()
    if size and (encoded or args.data in ("shapes", "cifar10")):
        raise Problem(f"--image-size {size}: only a folder's images are cropped; leave it away")
    if args.data == "shapes":
        return shapes()
    if args.data == "cifar10":
        return cifar10(args.data_dir)
    if encoded:
        return latents(folder)
    names = class_folders(folder)
    paths, labels = image_folder(folder, names)
    return Data(read_images(paths, size or 32), labels, names, size or 32)


# ---- Checkpoints --------------------------------------------------------------------------------

def load_checkpoint(path, parts=dydilit.block_parts):
    """What a run saved, on the CPU. A file that is missing, damaged or foreign is a Problem."""
    if not path.exists():
        raise Problem(f"{path}: no such checkpoint; give --run the folder of a training run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):              # do its parts fit together? This takes no memory
            model = dydilit.DyDiLiT(dydilit.ModelConfig(**state["model"]), parts)
        for weights in ("ema", "weights"):
            model.load_state_dict(dict(state[weights]), assign=True)
        torch.optim.AdamW(model.parameters()).load_state_dict(state["optimizer"])
        if not (len(state["data"]["names"]) == model.cfg.n_classes and "vae" in state["data"]
                and state["window"].shape == (5,) and type(state["step"]) is int
                and {"sampling_steps", "cfg"} <= state["knobs"].keys()
                and type(state["identity"]) is dict and type(state["log"]) is list):
            raise ValueError
        return state
    except (OSError, MemoryError):
        raise
    except Exception as error:                  # pickle and zip have many kinds of error
        raise Problem(f"{path}: not a dydilit checkpoint, or a damaged one "
                      f"({type(error).__name__}); move it away, or choose another --run") from None


# ---- Pictures -----------------------------------------------------------------------------------

def save_grid(path, images, labels, names):
    """A row of images per class, its name at the left. images: (M, H, W, 3), grouped by label."""
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
    axes.set_yticks([size * (r + 0.5) for r in range(len(rows))],   # a folder may be named "$a^b$"
                    [names[c].encode("utf-8", "replace").decode() for c in rows], parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    with replacing(path) as file:
        figure.savefig(file, dpi=150)


def save_curve(path, log):
    """The loss and its two terms against the step."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, style in [("loss", "-"), ("simple", "--"), ("variational", ":")]:
        values = [float(row[name]) for row in log]
        axes.plot([row["step"] for row in log], values, style, label=name)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, dpi=150)
