"""The measures of generated images against closed forms and slow loops."""
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from lab import measures


def features(m, d, seed=0):
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean, variance, m=50):
    """Points whose sample mean and (diagonal) sample covariance are exactly these."""
    x = features(m, len(mean))
    x = torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(m - 1)
    mean, variance = (torch.tensor(t, dtype=x.dtype) for t in (mean, variance))
    return (x - x.mean(0)) * variance.sqrt() + mean


# ---- the formulas ----

def test_frechet_distance_of_aligned_gaussians():
    x, y = with_moments([0, 0, 1], [1, 4, 9]), with_moments([1, 2, 1], [4, 4, 0.25], m=80)
    want = 1 + 4 + (1 - 2) ** 2 + 0 + (3 - 0.5) ** 2
    assert measures.frechet_distance(x, y) == pytest.approx(want, abs=1e-9)
    assert all(0 <= measures.frechet_distance(f, f) < 1e-9 for f in (x, y, features(9, 20)))


@pytest.mark.parametrize("m", [60, 8])          # 8 points in 10 dimensions: without full rank
def test_frechet_distance_by_the_products_eigenvalues(m):
    x, y = features(m, 10) @ features(10, 10, 1), features(m, 10, 2) @ features(10, 10, 3) + 1
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(a @ b).real, 0)).sum()
    want = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(a) + np.trace(b) - 2 * root
    assert measures.frechet_distance(x, y) == pytest.approx(want, rel=1e-5)
    assert measures.frechet_distance(y, x) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("measure", [measures.frechet_distance, measures.kernel_distance,
                                     measures.precision_recall])
def test_features_far_from_zero_keep_their_digits(measure):
    x, y = ((features(500, 2, seed) + 1000 + seed).float() for seed in (0, 1))
    assert measure(x, y) == pytest.approx(measure(x.double(), y.double()), rel=1e-9)


def test_kernel_distance_by_loops():
    x, y, n, want = features(7, 5), features(7, 5, 1) + 0.5, 7, 0.0

    def kernel(a, b):
        return (sum(float(p * q) for p, q in zip(a, b)) / 5 + 1) ** 3

    for i in range(n):
        for j in range(n):
            if i != j:
                want += (kernel(x[i], x[j]) + kernel(y[i], y[j])) / (n * (n - 1))
            want -= 2 * kernel(x[i], y[j]) / n ** 2
    assert measures.kernel_distance(x, y, n_subsets=3) == pytest.approx(want, rel=1e-10)


def test_kernel_distance_is_unbiased_and_takes_subsets():
    x, y = features(400, 6), features(500, 6, 1)
    values = [measures.kernel_distance(x, y, subset=20, seed=seed) for seed in range(5)]
    assert len(set(values)) == 5 and abs(np.mean(values)) < 0.05 and min(values) < 0    # around 0
    assert measures.kernel_distance(x, y + 1, subset=20) > 1
    drawn = [measures.kernel_distance(x, y, subset=20, n_subsets=1, seed=s) for s in range(50)]
    assert 5 < np.std(drawn) / np.std(values) < 20      # a mean of 100 varies a tenth as much


def test_inception_score():
    sure = 50 * torch.eye(4, dtype=torch.float64)
    assert measures.inception_score(sure.repeat(5, 1)) == pytest.approx(4)      # of every class
    assert measures.inception_score(sure[:1].repeat(9, 1)) == pytest.approx(1)  # of one class
    assert measures.inception_score(torch.zeros(9, 4)) == pytest.approx(1)      # never sure
    logits, scores = features(12, 3), []
    for part in (logits[:5], logits[5:10], logits[10:]):        # two splits of five, and the rest
        p = [[math.exp(v) / sum(math.exp(w) for w in row) for v in row] for row in part.tolist()]
        marginal = [sum(row[k] for row in p) / len(p) for k in range(3)]
        divergence = sum(v * math.log(v / q) for row in p for v, q in zip(row, marginal)) / len(p)
        scores.append(math.exp(divergence))
    assert measures.inception_score(logits, split=5) == pytest.approx(np.mean(scores), rel=1e-10)


def test_precision_and_recall_by_loops():
    def inside(points, centres):
        hits = 0
        for p in points:
            for c in centres:
                radius = sorted(math.dist(c, other) for other in centres)[3]    # [0] is c itself
                if math.dist(p, c) <= radius:
                    hits += 1
                    break
        return hits / len(points)

    x, y = 1.5 * features(25, 2), features(30, 2, 1) + 1
    want = inside(x.tolist(), y.tolist()), inside(y.tolist(), x.tolist())
    assert measures.precision_recall(x, y, chunk=7) == pytest.approx(want)
    assert 0 < want[0] < 1 and 0 < want[1] < 1 and want[0] != want[1]


def test_compare_gives_each_measure_its_features():
    x, y = with_moments([0, 0], [1, 4]), with_moments([1, 0], [4, 4], m=80)
    logits = 50 * torch.eye(3).repeat_interleave(2000, 0)       # class by class, in two splits
    found = measures.compare(dict(pool=x, spatial=2 * x, logits=logits), dict(pool=y, spatial=2 * y))
    assert list(found) == ["FID", "KID", "sFID", "sKID", "IS", "precision", "recall"]
    assert found["FID"] == pytest.approx(2) and found["sFID"] == pytest.approx(8)
    assert found["KID"] == measures.kernel_distance(x, y)
    assert found["sKID"] == measures.kernel_distance(2 * x, 2 * y)
    assert 2.997 < found["IS"] < 3
    assert (found["precision"], found["recall"]) == measures.precision_recall(x, y)
    assert found["precision"] != found["recall"]
    assert list(measures.compare(dict(pool=x), dict(pool=y))) == ["FID", "KID", "precision", "recall"]


def test_over_smoothing_measures_by_loops():
    weights = torch.softmax(2 * features(12, 6), dim=-1).view(2, 6, 6)
    for row, entropy, variance in zip(weights.flatten(0, 1).tolist(),
                                      measures.row_entropy(weights).flatten(),
                                      measures.row_variance(weights).flatten()):
        assert entropy.item() == pytest.approx(-sum(w * math.log(w) for w in row) / math.log(6))
        assert variance.item() == pytest.approx(sum((w - 1 / 6) ** 2 for w in row) / 6 * 36)


def tsne_loss(x, perplexity):
    """KL(p || q) but for a constant, with the bandwidths of p by another search."""
    m, apart = len(x), ~torch.eye(len(x), dtype=torch.bool)
    p = torch.zeros(m, m, dtype=x.dtype)
    for i in range(m):
        low, high = 0.0, 1e3
        for _ in range(60):                     # the precision whose row has this perplexity
            middle = (low + high) / 2
            row = torch.softmax(-middle * (x[apart[i]] - x[i]).square().sum(1), 0)
            flat = torch.special.entr(row).sum() > math.log(perplexity)
            low, high = (middle, high) if flat else (low, middle)
        p[i, apart[i]] = row
    p = (p + p.T)[apart] / (2 * m)

    def loss(y, exaggeration):
        w = (1 / (1 + (y[:, None] - y[None]).square().sum(-1)))[apart]
        return w.sum().log() - (exaggeration * p * w.log()).sum()
    return loss


def test_tsne_takes_its_first_steps_as_published_and_ends_in_a_minimum():
    x = features(60, 3) * torch.tensor([1, 2, 3]) + 1
    loss = tsne_loss(x, perplexity=8)
    y = torch.linalg.svd(x - x.mean(0)).U[:, :2]            # the principal components
    y, speed, gain = y / y.std() * 1e-4, torch.zeros_like(y), torch.ones_like(y)
    for _ in range(12):
        gradient, = torch.autograd.grad(loss(y.requires_grad_(), 12), y)
        gain = torch.where((gradient > 0) == (speed > 0), gain * 0.8, gain + 0.2).clamp(min=0.01)
        speed = 0.5 * speed - 50 * gain * gradient
        y = y.detach() + speed
    torch.testing.assert_close(measures.tsne(x, perplexity=8, steps=12), y)
    y = measures.tsne(x, perplexity=8).requires_grad_()
    assert torch.autograd.grad(loss(y, 1), y)[0].abs().max() < 1e-4


# ---- the features ----

def pictures(m, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (m, side, side, 3), np.uint8)


def test_classifier_by_its_layers():
    torch.manual_seed(0)
    model = measures.Classifier(5).eval()
    for name, t in model.state_dict().items():
        if "num" not in name:
            torch.nn.init.uniform_(t, 0.1 if "var" in name or "scale" in name else -0.5, 0.6)
    weights = dict(model.state_dict())

    def layer(x, name, i):
        x = F.conv2d(x, weights[f"{name}.{i}.weight"], weights[f"{name}.{i}.bias"], padding=1)
        w, b, mean, variance = (weights[f"{name}.{i + 1}.{k}"][:, None, None]
                                for k in ("weight", "bias", "running_mean", "running_var"))
        return F.max_pool2d(((x - mean) / (variance + 1e-5).sqrt() * w + b).clamp_min(0), 2)

    images = torch.from_numpy(pictures(3, 64)).permute(0, 3, 1, 2)
    early = layer(layer(images / 255 * 2 - 1, "early", 0), "early", 4)          # (3, 64, 16, 16)
    late = layer(early, "late", 0)                                              # (3, 128, 8, 8)
    spatial = (F.avg_pool2d(early[:, :7], 2) - weights["centre_spatial"]) * weights["scale"][1]
    logits = F.avg_pool2d(late, 2).flatten(1) @ weights["head.3.weight"].T + weights["head.3.bias"]
    for got, want in zip(model(images), ((late.mean((2, 3)) - weights["centre"])
                                         * weights["scale"][0], spatial.flatten(1), logits)):
        torch.testing.assert_close(got, want)


class Linear(torch.nn.Module):
    """As small as a Classifier can be: what it is trained with leaves its trace in the weights."""

    def __init__(self, n_classes=4):
        super().__init__()
        self.layer, self.dropout = torch.nn.Linear(192, n_classes), torch.nn.Dropout(0.3)
        self.centre, self.centre_spatial, self.scale = torch.zeros(4), 0, torch.ones(2)
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        x = images.float().flatten(1) / 255
        logits = self.layer(self.dropout(x))
        return logits, x[:, :28], logits


def test_training_by_its_recipe(monkeypatch):
    """212 steps of AdamW, its rate and momentum by the one-cycle rule, on shifted images."""
    monkeypatch.setattr(measures, "Classifier", Linear)
    images = np.linspace(1, 0.2, 53 * 128)[:, None, None, None] * pictures(53 * 128)
    images, labels = images.astype(np.uint8), np.arange(53 * 128) % 4
    got = measures.train_classifier(images, labels, 4)
    torch.manual_seed(0)
    model, x = Linear(), torch.from_numpy(images).permute(0, 3, 1, 2)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)

    def between(start, end, share):
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    for step in range(212):
        rise, fall = step / (0.3 * 212 - 1), (step - (0.3 * 212 - 1)) / (0.7 * 212)
        rate, beta = ((between(4e-3 / 25, 4e-3, rise), between(0.95, 0.85, rise)) if rise < 1 else
                      (between(4e-3, 4e-3 / 25e4, fall), between(0.85, 0.95, fall)))
        optimizer.param_groups[0].update(lr=rate, betas=(beta, 0.999))
        pick, (dx, dy) = torch.randint(len(x), (128,)), torch.randint(0, 5, (2,)).tolist()
        rows, columns = ((torch.arange(8) + d - 2).clamp(0, 7) for d in (dy, dx))
        logits = model(x[pick][:, :, rows][..., columns])[2].log_softmax(1)
        optimizer.zero_grad()
        (-logits[torch.arange(128), torch.from_numpy(labels)[pick]].mean()).backward()
        optimizer.step()
    torch.testing.assert_close(got.layer.weight, model.layer.weight)
    assert not got.training and got.batches[:212] == 212 * [128]
    pool, spatial, _ = model.eval()(x[:5000])               # 28 spatial features: 7 channels of 4
    channels = spatial.unflatten(1, (7, 4)).mean((0, 2))
    torch.testing.assert_close(got.centre, pool.mean(0))
    torch.testing.assert_close(got.centre_spatial.flatten(), channels)
    assert got.centre_spatial.shape == (7, 1, 1)
    torch.testing.assert_close(got.scale, torch.stack([f.var(0).mean() ** -0.5
                                                       for f in (pool, spatial)]))
    few = measures.train_classifier(images[:100], labels[:100], 4)
    assert few.batches == 200 * [128] + [100]
    with pytest.raises(train.Problem, match="all alike"):
        measures.train_classifier(np.full((50, 8, 8, 3), 9, np.uint8), labels[:50], 4)


def test_extract_takes_all_images_in_parts():
    seen = []

    def network(x):
        seen.append(x)
        return (x[:, 0].float(), x[:, 1], x[:, 2, 0]) if x.shape[3] == 9 else x[:, 2]

    images = np.concatenate([pictures(1201), pictures(1201)[:, :, :1]], 2)      # 8 rows, 9 columns
    found = measures.extract(images, network)
    assert {name: f.shape for name, f in found.items()} == dict(
        pool=(1201, 72), spatial=(1201, 72), logits=(1201, 9))
    assert np.array_equal(found["spatial"].view(1201, 8, 9), images[..., 1])
    assert [len(x) for x in seen] == [500, 500, 201] and seen[0].dtype == torch.uint8
    assert list(measures.extract(images[:, :, :8], network)) == ["pool"]
    assert not measures.extract(images[:2], lambda x: torch.ones(2, 1, requires_grad=True) * 2)[
        "pool"].requires_grad


# ---- the files ----

def test_tables_grow_by_lines(tmp_path):
    table = tmp_path / "new" / "table.csv"
    assert measures.read(table) == []
    measures.add_lines(table, [dict(a=1, b="x, y"), dict(a=2, b="")])
    measures.add_lines(table, [dict(a=3, b="z")])
    assert measures.read(table) == [dict(a="1", b="x, y"), dict(a="2", b=""), dict(a="3", b="z")]


def test_commit_names_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "__file__", str(tmp_path / "code.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert measures.commit() == ""

    def git(*words):
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *words],
                              cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    (tmp_path / "code.py").write_text("a = 1")
    for words in (["init"], ["add", "."], ["commit", "-m", "first"], ["tag", "-am", "v1", "v1"]):
        git(*words)
    name = git("rev-parse", "HEAD")[:10]
    assert measures.commit() == name
    (tmp_path / "code.py").write_text("a = 2")
    assert measures.commit() == name + "+"


# ---- the command ----

def npz(path, images, labels):
    measures.write_npz(path, images, labels)
    return path


class Means(torch.nn.Module):
    """A network as a user brings it: channel means of quarters, the corner, made-up logits."""

    def forward(self, x: torch.Tensor):
        x = x.float() / 255
        pool = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return pool, x[:, :, :3, :3].flatten(1), 5 * pool[:, :4]


class Two(torch.nn.Module):
    def forward(self, x: torch.Tensor):
        return x[:, 0].float(), x[:, 1].float()


def save(network, path):
    torch.jit.script(network).save(str(path))
    return path


def measure(capsys, *argv):
    measures.main([*map(str, argv)])
    first, *rest = capsys.readouterr().out.splitlines()
    return first, dict(line.rsplit(maxsplit=1) for line in rest)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_command_with_a_network_of_the_users(tmp_path, capsys):
    data, network = train.shapes(100), save(Means(), tmp_path / "means.pt")
    npz(tmp_path / "ref.npz", data.images, data.labels)
    np.savez(tmp_path / "dark.npz", arr_0=data.images[:60] // 2)                # without labels
    first, found = measure(capsys, tmp_path / "dark.npz", tmp_path / "ref.npz", "--network", network)
    x, y = (dict(zip(("pool", "spatial", "logits"), Means()(torch.from_numpy(images).permute(
        0, 3, 1, 2)))) for images in (data.images[:60] // 2, data.images))
    want = measures.compare(x, y)
    assert first == "60 generated images against 100 real ones" and len(found) == 7
    assert {k: float(v) for k, v in found.items()} == pytest.approx(want, abs=1e-3)


def test_command_with_a_classifier_of_the_reference(tmp_path, capsys, monkeypatch):
    """This one knows by heart what it was taught, and takes all else for the first class."""
    def learn(images, labels, n_classes):
        taught.append((len(images), sorted(set(labels)), n_classes))
        known.update((image.tobytes(), label) for image, label in zip(images, labels))

        def network(x):
            told = [known.get(image.numpy().tobytes(), 0) for image in x.movedim(1, 3).contiguous()]
            return x[:, 0, 0].float(), x[:, 1, 0].float(), F.one_hot(torch.tensor(told), 2).float()
        return network

    taught, known, images, labels = [], {}, pictures(40), np.array([5, 1000] * 20)
    monkeypatch.setattr(measures, "train_classifier", learn)
    npz(tmp_path / "ref.npz", images, labels)
    npz(tmp_path / "half.npz", images[:30], np.array([5, 1000] * 10 + [7] * 10))
    _, found = measure(capsys, tmp_path / "half.npz", tmp_path / "ref.npz")
    assert taught == [(36, [0, 1], 2)]
    right = {i for i in range(40) if labels[i] == 5 or images[i].tobytes() in known}
    unseen = [i for i in range(40) if images[i].tobytes() not in known]
    assert 0 < (share := len(right & set(unseen)) / 4) < 1 and len(right & set(range(20))) < 20
    assert found["recognized, of real images that the classifier has not seen:"] == f"{share:.1%}"
    share = len(right & set(range(20))) / 30
    assert found["recognized, of the generated images:"] == f"{share:.1%}"
    np.savez(tmp_path / "unlabelled.npz", arr_0=images)
    _, found = measure(capsys, tmp_path / "unlabelled.npz", tmp_path / "ref.npz")
    assert len(found) == 8 and "recognized, of the generated images:" not in found


@pytest.mark.slow
def test_the_classifier_knows_the_data(tmp_path, capsys):
    data = train.shapes(2000, size=16)
    npz(tmp_path / "ref.npz", data.images, data.labels)
    swapped = npz(tmp_path / "swapped.npz", data.images, (data.labels + 1) % 10)
    _, found = measure(capsys, swapped, tmp_path / "ref.npz")
    assert found["recognized, of the generated images:"] < "1.0%"       # of the wrong class,
    assert float(found["FID"]) < 1e-3                                   # which FID cannot see
    assert "90.0%" < found["recognized, of real images that the classifier has not seen:"] < "99.9%"


BAD = {     # what is wrong with the reference, and what is said
    "none": "none.npz: .*No such file",
    "text": "text.npz: .*; give an .npz of train.py sample",
    "floats": "floats.npz: arr_0 must be uint8",
    "few": "few.npz: arr_0 must be uint8 .* of 8 or more",
    "low": "low.npz: arr_0 must be uint8 .* of 8 or more",
    "short": "short.npz: arr_1 must be a whole number for each image",
    "names": "names.npz: arr_1 must be a whole number for each image",
    "large": "ref.npz: images of 8x8, the reference's are 8x9; make both of one size",
    "unlabelled": "unlabelled.npz: a classifier needs labels of two classes or more; give --network",
    "single": "single.npz: a classifier needs labels of two classes or more; give --network",
    "ref --network ref.npz": "--network ref.npz: .*; give a TorchScript file",
    "ref --network two.pt": "--network two.pt: it gives two tensors",
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_named_in_one_line(tmp_path, monkeypatch, words):
    images, labels = pictures(20), np.arange(20)
    monkeypatch.chdir(tmp_path)
    pathlib.Path("text.npz").write_text("no archive")
    save(Two(), "two.pt")
    for name, x, y in [("ref", images, labels), ("floats", images / 2, labels),
                       ("few", images[:7], labels[:7]), ("low", images[:, :7], labels),
                       ("short", images, labels[:19]), ("names", images, labels.astype(str)),
                       ("large", images[:, :, [*range(8), 0]], labels), ("single", images, labels * 0)]:
        np.savez(f"{name}.npz", arr_0=x, arr_1=y)
    np.savez("unlabelled.npz", arr_0=images)
    reference, *flags = words.split()
    monkeypatch.setattr(sys, "argv", ["measures.py", "ref.npz", f"{reference}.npz", *flags])
    with pytest.raises(SystemExit, match=BAD[words]) as end:
        train.explained(measures.main)
    assert end.value.code.startswith("measures.py: ") and "\n" not in end.value.code
