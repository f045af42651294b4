"""Measures of generated images: FID, sFID, KID, sKID, Inception Score, improved precision, recall.

    python notebooks/lab/measures.py SAMPLES REFERENCE                  features of a classifier
    python notebooks/lab/measures.py SAMPLES REFERENCE --network FILE   features of your own network
    python notebooks/lab/measures.py reference --data cifar10 --out REFERENCE

`train.py sample --num` writes SAMPLES. Both are .npz files of arr_0, images uint8 (M, H, W, 3), and
arr_1, labels (M,). Only to train the classifier, on REFERENCE, takes labels.

FILE is a TorchScript module. It takes uint8 images (B, 3, H, W) and returns features (B, D), or a
tuple of features, spatial features (B, S) and logits (B, K); without these, sFID, sKID and IS are
left out. Of Inception-v3, as ADM's evaluator takes them: the 2,048 of the last pooling, the first 7
channels of mixed_6's first convolution (7 x 17 x 17 = 2,023) and the 1,008 logits. Figures compare
only for the same network, reference and image count.
"""
import argparse
import csv
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
from train import Problem  # noqa: E402


# ---- The measures, on features (M, D) of generated images and (L, D) of real ones ----------------

def frechet_distance(x, y):
    """FID (Heusel et al. 2017): |m_x - m_y|^2 + Tr(C_x + C_y - 2 (C_x C_y)^1/2), in float64.

    (C_x C_y)^1/2 has the trace of the symmetric (C_x^1/2 C_y C_x^1/2)^1/2: no complex root."""
    (mean_x, cov_x), (mean_y, cov_y) = ((f.mean(0), f.T.cov()) for f in (x.double(), y.double()))
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ cov_y @ root).clamp_min(0).sqrt().sum()
    distance = (mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * overlap
    return distance.clamp_min(0).item()         # rounding may leave less


def kernel_distance(x, y, subset=1000, n_subsets=100, seed=0):
    """KID (Binkowski et al. 2018): squared MMD of the kernel (a b^T / D + 1)^3, without bias.

    The mean over random subsets of so many images of each side. May be negative."""
    generator, n = np.random.default_rng(seed), min(subset, len(x), len(y))

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    total = 0
    for _ in range(n_subsets):
        a, b = (f[generator.choice(len(f), n, replace=False)].double() for f in (x, y))
        within = sum((k.sum() - k.trace()) / (n * (n - 1)) for k in (kernel(a, a), kernel(b, b)))
        total += (within - 2 * kernel(a, b).mean()).item()
    return total / n_subsets


def inception_score(logits, split=5000):
    """IS (Salimans et al. 2016): exp of the mean KL(p(class | image) || p(class)), of 1..K.

    The mean over splits, each with a p(class) of its own: shuffle images sorted by class."""
    scores = []
    for part in logits.double().log_softmax(1).split(split):
        log_marginal = part.logsumexp(0) - np.log(len(part))
        scores.append((part.exp() * (part - log_marginal)).sum(1).mean().exp().item())
    return float(np.mean(scores))


def precision_recall(x, y, k=3, chunk=1000):
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    Precision: the share of x within the k-th neighbour's distance of some y. Recall: exchanged."""
    def covered(points, centres):
        radius = torch.cat([torch.cdist(part, centres).kthvalue(k + 1).values   # + 1: itself
                            for part in centres.split(chunk)])
        inside = [(torch.cdist(part, centres) <= radius).any(1) for part in points.split(chunk)]
        return torch.cat(inside).double().mean().item()

    x, y = x.double(), y.double()
    return covered(x, y), covered(y, x)


def compare(generated, reference):
    """Every measure of generated against real features, both from extract(). {name: value}."""
    parts, out = {"": "pool", "s": "spatial"} if "spatial" in generated else {"": "pool"}, {}
    for s, part in parts.items():
        out[f"{s}FID"] = frechet_distance(generated[part], reference[part])
        out[f"{s}KID"] = kernel_distance(generated[part], reference[part])
    if "logits" in generated:
        order = np.random.default_rng(0).permutation(len(generated["logits"]))
        out["IS"] = inception_score(generated["logits"][order])
    out["precision"], out["recall"] = precision_recall(generated["pool"], reference["pool"])
    return out


def row_entropy(attention):
    """Entropy of an attention map's rows in units of log N: 1 is uniform, 0 a single key."""
    return torch.special.entr(attention).sum(-1) / np.log(attention.shape[-1])


def row_variance(attention):
    """Variance of a map's rows in units of (1/N)^2: 0 is uniform, N - 1 a single key."""
    return attention.var(-1, correction=0) * attention.shape[-1] ** 2


def tsne(x, perplexity=30, steps=750):
    """t-SNE (van der Maaten & Hinton 2008): a map (M, 2) where x's near neighbours are near."""
    x = x.double()
    d2 = torch.cdist(x, x).square().fill_diagonal_(float("inf"))
    low, high = (x.new_full((len(x), 1), end) for end in (-40, 40))
    for _ in range(50):                 # each point's bandwidth, by bisection of its row's entropy
        middle = (low + high) / 2
        p = torch.softmax(-d2 * middle.exp(), dim=1)
        wide = torch.special.entr(p).sum(1, keepdim=True) > np.log(perplexity)
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    p = (p + p.T) / (2 * len(x))
    u, _, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    y = u[:, :2] / u[:, :2].std() * 1e-4        # from the principal components: always the same map
    speed, gain = torch.zeros_like(y), torch.ones_like(y)
    for step in range(steps):
        w = 1 / (1 + torch.cdist(y, y).square())
        w.fill_diagonal_(0)
        pull = ((12 if step < 250 else 1) * p - w / w.sum()) * w    # at first more: clusters form
        grad = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        gain = torch.where((grad > 0) == (speed > 0), gain * 0.8, gain + 0.2).clamp_min(0.01)
        speed = (0.5 if step < 250 else 0.8) * speed - 50 * gain * grad
        y = y + speed
    return y


# ---- The features -------------------------------------------------------------------------------

class Classifier(nn.Module):
    """A small convolutional classifier, for features where no Inception can be had.

    uint8 (B, 3, H, W) -> features (B, 128), spatial features (B, 7 x 8 x 8), logits (B, n_classes).
    On real images their means (the spatial ones' over a channel) are 0, their mean variance 1."""

    def __init__(self, n_classes):
        super().__init__()

        def layers(i, o):
            return nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)

        self.early = nn.Sequential(*layers(3, 32), *layers(32, 64))
        self.late = nn.Sequential(*layers(64, 128))
        self.register_buffer("centre", torch.zeros(128))
        self.register_buffer("centre_spatial", torch.zeros(7, 1, 1))
        self.register_buffer("scale", torch.ones(2))    # features keep their relative weights
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3),
                                  nn.Linear(16 * 128, n_classes))

    def forward(self, images):
        x = self.early(images.float() / 127.5 - 1)
        spatial = F.adaptive_avg_pool2d(x[:, :7], 8)    # larger, covariances would have many GB
        spatial, x = (spatial - self.centre_spatial) * self.scale[1], self.late(x)
        return (x.mean((2, 3)) - self.centre) * self.scale[0], spatial.flatten(1), self.head(x)


def train_classifier(images, labels, n_classes):
    """A Classifier of uint8 images (M, H, W, 3), trained for a minute on two cores."""
    torch.manual_seed(0)
    device = train.pick_device()
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
    y, (h, w) = torch.from_numpy(labels).to(device), x.shape[2:]
    model = Classifier(n_classes).to(device, memory_format=torch.channels_last)
    steps = max(4 * (len(x) // 128), 200)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        pick = torch.randint(len(x), (128,))
        dx, dy = torch.randint(0, 5, (2,)).tolist()     # a shift of up to two pixels
        batch = F.pad(x[pick].float(), [2] * 4, mode="replicate")[..., dy:dy + h, dx:dx + w]
        F.cross_entropy(model(batch)[2], y[pick]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    real = extract(images[:5000], model.eval())
    variance = torch.stack([real[name].var(0).mean() for name in ("pool", "spatial")])
    if not variance.all():
        raise Problem("the reference's images are all alike, and no classifier can learn from them")
    model.centre, model.scale = real["pool"].mean(0), 1 / variance.sqrt()
    model.centre_spatial = real["spatial"].mean(0).view(7, -1, 1).mean(1, True)
    return model.to(device)


@torch.no_grad()
def extract(images, network, batch=500):
    """What a network says of images (M, H, W, 3) uint8: {"pool": (M, D), "spatial", "logits"}."""
    parts, device = [], train.pick_device()
    keep = "cpu" if device.type == "mps" else device    # which lacks the measures' float64
    for some in torch.from_numpy(images).split(batch):
        out = network(some.permute(0, 3, 1, 2).to(device))
        out = out if isinstance(out, tuple) else (out,)
        parts.append([part.flatten(1).to(keep) for part in out])
    return dict(zip(("pool", "spatial", "logits"), map(torch.cat, zip(*parts))))


# ---- Files --------------------------------------------------------------------------------------

def load_npz(path):
    """Images uint8 (M, H, W, 3) and labels (M,), or None, of an .npz in ADM's layout."""
    with train.blaming(path, "give an .npz of train.py sample --num or measures.py reference"):
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["arr_0"], file["arr_1"] if "arr_1" in file else None
        if images.dtype != np.uint8 or images.shape[3:] != (3,) or min(images.shape[:3]) < 8:
            raise ValueError("arr_0 must be uint8 (M, H, W, 3) with M, H and W of 8 or more")
        if labels is not None and (labels.dtype.kind not in "iu" or len(labels) != len(images)):
            raise ValueError("arr_1 must be a whole number for each image")
    return images, labels


def save_log(path, log):
    """Writes a list of dictionaries as a table."""
    with train.replacing(path, "w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in log for name in row))
        writer.writeheader()
        writer.writerows(log)


def add_lines(path, lines):
    """Appends dictionaries to a table, which keeps its columns. Processes may do so at once."""
    import fcntl                                # Windows has none
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        columns = next(csv.reader(file), None)
        writer = csv.DictWriter(file, columns or lines[0], extrasaction="ignore")
        if not columns:
            writer.writeheader()
        writer.writerows(lines)


def read(path):
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def make(run, jobs, table, part=(0, 1)):
    """Adds the line run(*job) of each job to a table, whose first columns tell the jobs apart.

    part: (i, n) for every n-th job from the i-th on. The others go on where one has a Problem."""
    if not 0 <= part[0] < part[1]:
        raise Problem(f"--part {part[0]} {part[1]}: the first must be less than the second")
    done, problems = {tuple(row.values())[:len(jobs[0])] for row in read(table)}, []
    for job in jobs[part[0]::part[1]]:
        if tuple(map(str, job)) not in done:
            try:
                add_lines(table, [run(*job)])
            except (Problem, torch.OutOfMemoryError) as problem:
                problems.append(f"{', '.join(map(str, job))}: {problem}")
    if problems:
        raise Problem("\n".join(problems))


def commit():
    """The commit of this code, with a + if its files have changed; "" where there is no git."""
    command = "git describe --always --abbrev=10 --exclude=* --dirty=+"
    return subprocess.run(command, shell=True, cwd=pathlib.Path(__file__).parent,
                          capture_output=True, text=True).stdout.strip()


# ---- The commands -------------------------------------------------------------------------------

def reference(argv):
    """Writes data as `train.py sample --num` writes samples: what FID on one's own data needs."""
    parser = train.Parser(prog="measures.py reference", description=reference.__doc__)
    add = parser.add_argument
    add("--data", required=True, help="shapes, cifar10, or a folder of class folders")
    add("--data-dir", default="data", help="where cifar10 lies, or is downloaded to")
    add("--classes", type=train.positive, help="so many random classes, as of encode.py")
    add("--image-size", type=train.positive, help="side of a folder's images, cropped; default: 32")
    add("--num", type=train.positive, help="how many images, drawn at random; default: all")
    add("--seed", type=int, default=0, help="of everything random")
    add("--out", required=True, help="the .npz to write")
    args = parser.parse_args(argv)
    built_in = args.data in ("shapes", "cifar10")
    if built_in and args.classes:
        raise Problem(f"--classes {args.classes}: only of a folder; leave it away")
    with train.replacing(args.out) as file:         # opened before the images are read
        data = train.load_data(args) if built_in else train.Data(
            *pick_classes(args.data, args.classes, args.seed), args.image_size or 32)
        total = len(data.labels)
        if args.num and args.num > total:
            raise Problem(f"--num {args.num}: the data has {total} images")
        pick = np.sort(np.random.default_rng(args.seed).permutation(total)[:args.num])
        images = data.images[pick] if built_in else train.read_images(
            [data.images[i] for i in pick], data.image_size)
        np.savez(file, arr_0=images, arr_1=data.labels[pick])
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
        raise Problem(f"{args.samples}: images of {x.shape[1]}x{x.shape[2]}, the reference's are "
                      f"{y.shape[1]}x{y.shape[2]}; make both of one size")
    if args.network:
        with train.blaming(f"--network {args.network}", "--help says what file it must be"):
            network = torch.jit.load(args.network, map_location=train.pick_device()).eval()
            if len(extract(y[:5], network)) == 2:
                raise ValueError("it gives two tensors, and neither one nor three")
    elif y_labels is None or len(classes := np.unique(y_labels)) < 2:
        raise Problem(f"{args.reference}: labels of fewer than two classes; give --network")
    else:
        order, held_out = np.random.default_rng(0).permutation(len(y)), max(1, len(y) // 10)
        seen, number = order[held_out:], np.searchsorted(classes, y_labels)
        network = train_classifier(y[seen], number[seen], len(classes))
    generated, real = extract(x, network), extract(y, network)
    print(f"{len(x)} generated images against {len(y)} real ones")
    for name, value in compare(generated, real).items():
        print(f"{name:10} {value:.4f}")
    if not args.network:
        of_x, of_y = (classes[f["logits"].argmax(1).cpu().numpy()] for f in (generated, real))
        share = (of_y == y_labels)[order[:held_out]].mean()
        print(f"recognized, of real images that the classifier has not seen: {share:.1%}")
        if x_labels is not None:
            print(f"recognized, of the generated images: {(of_x == x_labels).mean():.1%}")


if __name__ == "__main__":
    train.explained(main)
