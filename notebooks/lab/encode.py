"""Encodes a folder of images into Stable Diffusion's latents, on which train.py trains.

    pip install diffusers
    python notebooks/lab/encode.py --data IMAGENET/train --classes 100 --out DIR
    python train.py --data DIR --model DyDi-LiT-S/2

--classes 100 picks 100 random classes, as the paper's Sub-IN does. A command that was
stopped goes on when it is repeated.
"""
import argparse
import hashlib
import json
import pathlib
import sys

import numpy as np
import torch
from tqdm import tqdm

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import train  # noqa: E402
from train import Problem, read_images  # noqa: E402


def pick_classes(root, count=None, seed=0):
    """A folder's images, or those of so many random classes: paths, labels (M,), classes' names."""
    paths, labels, names = train.image_folder(root)
    if (count := count or len(names)) > len(names):
        raise Problem(f"--classes {count}: {root} has {len(names)}")
    picked = np.sort(np.random.default_rng(seed).choice(len(names), count, replace=False))
    inside = np.isin(labels, picked)
    return ([path for path, kept in zip(paths, inside) if kept],
            np.searchsorted(picked, labels[inside]), [names[c] for c in picked])


def encoded_so_far(out, about):
    """How many images `out` holds already. A folder of anything else is a Problem."""
    state = out / "latents.json"
    if not state.exists():
        if any(out.glob("[!.]*")):      # anything but the hidden leftovers of an interrupted write
            raise Problem(f"{out}: not empty; choose another --out")
        return 0
    with train.blaming(state, "choose another --out"):
        before = json.loads(state.read_text())
        different = ", ".join(key for key, value in about.items() if before[key] != value)
        if before["done"] and different:
            raise Problem(f"{out}: another encoding ({different} differ); choose another --out")
        return before["done"]


def reserve(path, shape):
    """Writes zeros: to write through a memory map where a disk is full would kill the process."""
    one = np.zeros(shape[1:], np.float16)
    header = dict(descr=one.dtype.str, fortran_order=False, shape=shape)
    with train.replacing(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(shape[0]):
            file.write(one.tobytes())


@torch.no_grad()
def encode(args):
    """Latents of every image and of its mirror image, float16 and scaled, one sample of each."""
    out, device = pathlib.Path(args.out), train.pick_device()
    paths, labels, names = pick_classes(args.data, args.classes, args.seed)
    files = "\n".join(str(path.relative_to(args.data)) for path in paths)
    files = hashlib.sha256(files.encode("utf-8", "surrogateescape")).hexdigest()
    about = dict(files_sha256=files, total=len(paths), names=names, seed=args.seed,
                 image_size=args.image_size, vae=args.vae)

    def note(done):
        with train.replacing(out / "latents.json", "w") as file:
            json.dump(dict(about, done=done), file, indent=1)

    out.mkdir(parents=True, exist_ok=True)
    done = encoded_so_far(out, about)
    vae = train.load_vae(args.vae, device)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if args.image_size % factor:
        raise Problem(f"--image-size: not a multiple of the VAE's factor, {factor}")
    shape = (2, vae.config.latent_channels, *2 * [args.image_size // factor])
    if done == 0:
        note(0)                     # from here on the folder is this encoding's
        with train.replacing(out / "labels.npy") as file:
            np.save(file, labels)
        reserve(out / "latents.npy", (len(paths), *shape))
    store = np.load(out / "latents.npy", mmap_mode="r+")
    for start in tqdm(range(done, len(paths), args.batch_size), "encoding", disable=None):
        some = range(start, min(start + args.batch_size, len(paths)))
        chunk = read_images([paths[i] for i in some], args.image_size, disable=True)
        x = train.pixels(chunk).to(device)
        noise = [np.random.default_rng((args.seed, i)).standard_normal(shape, np.float32)
                 for i in some]                 # an image's own, whatever the size of its batch
        noise = torch.from_numpy(np.stack(noise)).to(device)
        for view, image in enumerate((x, x.flip(3))):
            z = vae.encode(image).latent_dist
            z = (z.mean + z.std * noise[:, view]) * vae.config.scaling_factor
            store[start:some.stop, view] = z.half().cpu().numpy()
        store.flush()
        note(some.stop)
    print(f"{out}: {len(paths)} images of {len(names)} classes, encoded")


def main(argv=None):
    parser = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="a folder of class folders, such as ImageNet's train/")
    add("--out", required=True, help="the folder to write")
    add("--classes", type=train.positive, help="how many classes to pick at random; default: all")
    add("--image-size", type=train.positive, default=256, help="in pixels; default: %(default)s")
    add("--seed", type=int, default=0, help="of everything random")
    add("--vae", default="stabilityai/sd-vae-ft-ema", help="AutoencoderKL: hub name or folder")
    add("--batch-size", type=train.positive, default=16, help="images per pass of the VAE")
    encode(parser.parse_args(argv))


if __name__ == "__main__":
    train.explained(main)
