"""Measures of generated images: FID, sFID, KID, sKID, Inception Score, improved precision and recall.

    python notebooks/lab/measures.py SAMPLES.npz REFERENCE.npz                  features of a classifier trained on REFERENCE
    python notebooks/lab/measures.py SAMPLES.npz REFERENCE.npz --network FILE   features of a network that you bring
    python notebooks/lab/measures.py reference --data cifar10 --out REFERENCE.npz       the data to compare with

`train.py sample --num` writes SAMPLES. Both files have arr_0, images uint8 (M, H, W, 3), and arr_1, labels (M,).

FILE is a TorchScript module. It takes uint8 images (B, 3, H, W), 0..255, and returns features (B, D), or a tuple of
features (B, D), spatial features (B, S) and logits (B, K). Of Inception-v3, as ADM's evaluator takes them: the 2,048 of
the last pooling, the first 7 channels of mixed_6's first convolution (7 x 17 x 17 = 2,023) and the 1,008 logits. With
features alone, sFID, sKID and IS are left out. Figures compare only for the same network, reference and image count.
"""
import argparse
import contextlib
import csv
import fcntl
import pathlib
import subprocess
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import train  # noqa: E402
from lab.encode import pick_classes  # noqa: E402

# ---- The measures, on features --------------------------------------------------------------------------------------


def frechet_distance(x, y):
    """FID (Heusel et al. 2017): |m_x - m_y|^2 + Tr(C_x + C_y - 2 (C_x C_y)^1/2), in float64. sFID on spatial features.

    x: (M, D); y: (L, D). (C_x C_y)^1/2 has the trace of the symmetric (C_x^1/2 C_y C_x^1/2)^1/2: no complex root.
    """
    (mean_x, cov_x), (mean_y, cov_y) = ((f.mean(0), f.T.cov()) for f in (x.double(), y.double()))
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ cov_y @ root).clamp_min(0).sqrt().sum()
    return ((mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * overlap).item()


def kernel_distance(x, y, subset=1000, n_subsets=100, seed=0):
    """KID (Binkowski et al. 2018): squared MMD of the kernel (a b^T / D + 1)^3, unbiased, mean over random subsets.

    x: (M, D); y: (L, D). subset: images of each side in a subset, at most M and L. May be negative. sKID on spatial
    features.
    """
    generator, n = np.random.default_rng(seed), min(subset, len(x), len(y))

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    total = 0
    for _ in range(n_subsets):
        a, b = (f[torch.as_tensor(generator.choice(len(f), n, replace=False)).to(f.device)].double() for f in (x, y))
        within = sum((k.sum() - k.trace()) / (n * (n - 1)) for k in (kernel(a, a), kernel(b, b)))
        total += (within - 2 * kernel(a, b).mean()).item()
    return total / n_subsets


def inception_score(logits, split=5000):
    """IS (Salimans et al. 2016): exp of the mean KL(p(class | image) || p(class)), mean over splits of so many images.

    logits: (M, K). 1..K, larger is better. Every split has its own p(class): shuffle images that lie class by class.
    """
    scores = []
    for part in logits.double().log_softmax(1).split(split):
        log_marginal = part.logsumexp(0) - np.log(len(part))
        scores.append((part.exp() * (part - log_marginal)).sum(1).mean().exp().item())
    return float(np.mean(scores))


def precision_recall(x, y, k=3, chunk=1000):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of generated x (M, D) against real y (L, D).

    Precision: the share of x that lies within the k-th neighbour's distance of some y. Recall: roles exchanged.
    """
    def covered(points, centres):
        # k + 1: the nearest of a centre's neighbours is the centre itself
        radius = torch.cat([torch.cdist(part, centres).kthvalue(k + 1).values for part in centres.split(chunk)])
        inside = [(torch.cdist(part, centres) <= radius).any(1) for part in points.split(chunk)]
        return torch.cat(inside).double().mean().item()

    x, y = x.double(), y.double()
    return covered(x, y), covered(y, x)


def compare(generated, reference):
    """Every measure of generated against real features, both from extract(). Returns {name: value}."""
    out = {"FID": frechet_distance(generated["pool"], reference["pool"])}
    if "spatial" in generated:
        out["sFID"] = frechet_distance(generated["spatial"], reference["spatial"])
    out["KID"] = kernel_distance(generated["pool"], reference["pool"])
    if "spatial" in generated:
        out["sKID"] = kernel_distance(generated["spatial"], reference["spatial"])
        order = np.random.default_rng(0).permutation(len(generated["logits"]))
        out["IS"] = inception_score(generated["logits"][order])
    out["precision"], out["recall"] = precision_recall(generated["pool"], reference["pool"])
    return out


def row_entropy(attention):
    """Entropy of each row of an attention map as a share of the largest one, log N: 1 is uniform, 0 a single key."""
    return torch.special.entr(attention).sum(-1) / np.log(attention.shape[-1])


def row_variance(attention):
    """Variance of each row's weights in units of their mean 1/N, squared: 0 is uniform, N - 1 a single key."""
    return attention.var(-1, correction=0) * attention.shape[-1] ** 2


def tsne(x, perplexity=30, steps=750):
    """t-SNE (van der Maaten & Hinton 2008), exact: a map in which x's near neighbours are near. (M, D) -> (M, 2)."""
    x = x.double()
    d2 = torch.cdist(x, x).square().fill_diagonal_(float("inf"))
    low, high = (x.new_full((len(x), 1), end) for end in (-40, 40))
    for _ in range(50):                                     # each point's bandwidth, by bisection of its row's entropy
        middle = (low + high) / 2
        p = torch.softmax(-d2 * middle.exp(), dim=1)
        wide = torch.special.entr(p).sum(1, keepdim=True) > np.log(perplexity)
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    p = (p + p.T) / (2 * len(x))
    u, _, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    y = u[:, :2] / u[:, :2].std() * 1e-4                    # starts from the principal components: the same map each time
    speed, gain = torch.zeros_like(y), torch.ones_like(y)
    rate = max(len(x) / 48, 50)
    for step in range(steps):
        w = 1 / (1 + torch.cdist(y, y).square())
        w.fill_diagonal_(0)
        pull = ((12 if step < 250 else 1) * p - w / w.sum()) * w            # exaggerated first, so that clusters form
        grad = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        gain = torch.where((grad > 0) == (speed > 0), gain * 0.8, gain + 0.2).clamp_min(0.01)
        speed = (0.5 if step < 250 else 0.8) * speed - rate * gain * grad
        y = y + speed
    return y


# ---- The features ---------------------------------------------------------------------------------------------------

class Classifier(nn.Module):
    """A small convolutional classifier, for features where no Inception can be had.

    uint8 (B, 3, H, W) -> features (B, 128), spatial features (B, 7 x 8 x 8), logits (B, n_classes). On real images
    their means are 0 (the spatial ones' over each channel) and their variances 1 on average.
    """

    def __init__(self, n_classes):
        super().__init__()
        layers, width = [], 3
        for out in (32, 64, 128):
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
            width = out
        self.early, self.late = nn.Sequential(*layers[:8]), nn.Sequential(*layers[8:])
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("centre_spatial", torch.zeros(7, 1, 1))
        self.register_buffer("scale", torch.ones(2))        # one number each: features keep their relative weights
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3),
                                  nn.Linear(16 * width, n_classes))

    def forward(self, images):
        x = self.early(images.float() / 127.5 - 1)
        spatial = F.adaptive_avg_pool2d(x[:, :7], 8)        # as it is for images of 32 x 32; large ones would have
        spatial, x = (spatial - self.centre_spatial) * self.scale[1], self.late(x)     # covariances of many GB
        return (x.mean((2, 3)) - self.centre) * self.scale[0], spatial.flatten(1), self.head(x)


def train_classifier(images, labels, n_classes, epochs=4, seed=0):
    """A Classifier of uint8 images (M, H, W, 3), trained with shifts of up to two pixels; a minute on two cores."""
    torch.manual_seed(seed)
    device = train.pick_device()
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device), torch.from_numpy(labels).to(device)
    height, width = x.shape[2:]
    model = Classifier(n_classes).to(device, memory_format=torch.channels_last)
    steps = max(epochs * (len(x) // 128), 200)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        pick = torch.randint(len(x), (128,))
        dx, dy = torch.randint(0, 5, (2,)).tolist()
        batch = F.pad(x[pick].float(), (2, 2, 2, 2), mode="replicate")[:, :, dy:dy + height, dx:dx + width]
        F.cross_entropy(model(batch)[2], y[pick]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    real = extract(images[:5000], model.eval())
    model.centre, model.centre_spatial = real["pool"].mean(0), real["spatial"].mean(0).view(7, -1, 1).mean(1, True)
    model.scale = torch.stack([1 / real[name].var(0).mean().sqrt() for name in ("pool", "spatial")])
    return model.to(device)


@torch.no_grad()
def extract(images, network, batch=500):
    """What a network says of uint8 images (M, H, W, 3): {"pool": (M, D)}, "spatial" and "logits" if it gives them."""
    parts, device = [], train.pick_device()
    keep = "cpu" if device.type == "mps" else device        # the measures are taken in float64, which MPS lacks
    for start in range(0, len(images), batch):
        try:
            out = network(torch.from_numpy(images[start:start + batch]).permute(0, 3, 1, 2).to(device))
            parts.append([part.flatten(1).to(keep) for part in (out if isinstance(out, tuple) else (out,))])
        except (RuntimeError, AttributeError, IndexError) as error:
            raise train.Problem(f"the feature network fails on these images ({str(error).strip().splitlines()[-1]:.80}); see "
                                "measures.py --help for what it must take and give") from None
    return dict(zip(("pool", "spatial", "logits"), map(torch.cat, zip(*parts))))


def load_npz(path):
    """Images uint8 (M, H, W, 3) and labels (M,) of an .npz in ADM's layout. Problem if it is anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["arr_0"], file["arr_1"]
        if (images.dtype != np.uint8 or images.shape[3:] != (3,) or min(images.shape[1:3]) < 8 or len(labels) < 5
                or labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0):
            raise ValueError
    except Exception:                                       # the errors of zip and of numpy's format are many
        raise train.Problem(f"{path}: not five images or more in ADM's layout; give an .npz that train.py sample "
                            "--num, or measures.py reference, wrote") from None
    return images, labels.astype(np.int64)


def write_npz(path, images, labels):
    """Writes what load_npz reads. images: (M, H, W, 3) uint8; labels: (M,)."""
    with train.replacing(path) as file:
        np.savez(file, arr_0=images, arr_1=np.asarray(labels, np.int64))


def save_log(path, log):
    """Writes a list of dictionaries as a table."""
    with train.replacing(path, "w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in log for name in row))
        writer.writeheader()
        writer.writerows(log)


def add_lines(path, lines):
    """Appends lines (dictionaries with the same keys) to a table. Several processes may do so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, lines[0])
        if not file.tell():
            writer.writeheader()
        writer.writerows(lines)


def read(path):
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def commit():
    """The commit of this code, with a + if files that it tracks have changed since; "" where there is no git."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"], cwd=pathlib.Path(__file__).parent, check=True,
                              capture_output=True, text=True).stdout.strip()
    return ""


def load_network(path):
    """A TorchScript module, see above. Problem if the file is none."""
    try:
        return torch.jit.load(path, map_location=train.pick_device()).eval()
    except Exception as error:
        raise train.Problem(f"--network {path}: cannot be loaded ({type(error).__name__}); give a TorchScript "
                            "file") from None


def reference(argv):
    """Writes the data in the layout of `train.py sample --num`: what FID on one's own data needs."""
    parser = train.Parser(prog="measures.py reference", description=reference.__doc__)
    add = parser.add_argument
    add("--data", required=True, help="shapes, cifar10, or a folder of class folders")
    add("--data-dir", default="data", help="where cifar10 lies, or is downloaded to")
    add("--classes", type=train.positive, help="how many classes to pick at random, as encode.py does; default: all")
    add("--image-size", type=train.positive, help="side to which a folder's images are cropped; default: 32")
    add("--num", type=train.positive, help="how many images, drawn at random; default: all")
    add("--seed", type=train.number(int, 0, 2 ** 31), default=0, help="of everything random")
    add("--out", required=True, help="the .npz to write")
    args = parser.parse_args(argv)
    if pathlib.Path(args.out).suffix != ".npz":
        raise train.Problem(f"--out {args.out}: give a name that ends in .npz")
    if (pathlib.Path(args.data) / "latents.json").exists():
        raise train.Problem(f"--data {args.data}: latents are not images; give the folder that was encoded, with the same "
                            "--classes, --seed and --image-size")
    built_in = args.data in ("shapes", "cifar10")
    if built_in:
        if args.classes:
            raise train.Problem(f"--classes {args.classes}: only a folder's classes can be picked; leave it away")
        data = train.load_data(args)
        source, labels = data.images, data.labels
    else:
        source, labels = train.image_folder(args.data, pick_classes(args.data, args.classes, args.seed))
    if args.num and args.num > len(labels):
        raise train.Problem(f"--num {args.num}: the data has {len(labels)} images")
    pick = np.sort(np.random.default_rng(args.seed).permutation(len(labels))[:args.num])
    images = source[pick] if built_in else train.read_images([source[i] for i in pick], args.image_size or 32)
    write_npz(args.out, images, labels[pick])
    print(f"{args.out}: {len(images)} images of {images.shape[1]}x{images.shape[2]}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["reference"]:
        return reference(argv[1:])
    parser = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples")
    parser.add_argument("reference")
    parser.add_argument("--network", help="TorchScript file of a feature network")
    args = parser.parse_args(argv)
    (x, x_labels), (y, y_labels) = load_npz(args.samples), load_npz(args.reference)
    if x.shape[1:] != y.shape[1:]:
        raise train.Problem(f"{args.samples}: images of {x.shape[1]}x{x.shape[2]}, the reference's are {y.shape[1]}x"
                            f"{y.shape[2]}; make both of one size")
    if args.network:
        network = load_network(args.network)
    else:
        order, held_out = np.random.default_rng(0).permutation(len(y)), len(y) // 10
        network = train_classifier(y[order[held_out:]], y_labels[order[held_out:]], y_labels.max() + 1)
    generated, real = extract(x, network), extract(y, network)
    print(f"{len(x)} generated images against {len(y)} real ones")
    for name, value in compare(generated, real).items():
        print(f"{name:10} {value:.4f}")
    if not args.network:
        verdict = [np.asarray(f["logits"].argmax(1).cpu()) for f in (generated, real)]
        share = (verdict[1] == y_labels)[order[:held_out]].mean()
        right = verdict[0] == x_labels
        print(f"recognized as their class: {right.mean():.1%}; of real images it has not seen: {share:.1%}")
        by_class = [f"{c} {right[x_labels == c].mean():.0%}" for c in np.unique(x_labels)]
        print("by class: " + ", ".join(by_class))


if __name__ == "__main__":
    train.explained(main)
