"""The measures of generated images against closed forms and slow loops, and their command."""
import math
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


# ---- the formulas ----

@pytest.mark.parametrize("m", [60, 8])          # 8 points in 10 dimensions: without full rank
def test_frechet_distance_by_the_products_eigenvalues(m):
    x, y = features(m, 10) @ features(10, 10, 1), features(m, 10, 2) @ features(10, 10, 3) + 1
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(a @ b).real, 0)).sum()
    want = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(a) + np.trace(b) - 2 * root
    assert measures.frechet_distance(x, y) == pytest.approx(want, rel=1e-5)
    assert all(0 <= measures.frechet_distance(f, f) < 1e-9 for f in (x, y))


@pytest.mark.parametrize("measure", [measures.frechet_distance, measures.precision_recall,
                                     lambda x, y: measures.kernel_distance(x, y, n_subsets=3)])
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
    x, y = features(400, 6), features(400, 6, 1)
    values = [measures.kernel_distance(x, y, subset=20, seed=seed) for seed in range(5)]
    assert abs(np.mean(values)) < 0.05 and min(values) < 0 and np.std(values) > 0.01


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
        radius = {c: sorted(math.dist(c, other) for other in centres)[3] for c in centres}
        return np.mean([any(math.dist(p, c) <= radius[c] for c in centres) for p in points])

    x, y = 2 * features(50, 2), features(60, 2, 1) + 1.5
    points = [[tuple(row) for row in f.tolist()] for f in (x, y)]
    want = inside(*points), inside(*points[::-1])
    assert measures.precision_recall(x, y, chunk=7) == pytest.approx(want)
    assert 0 < want[0] < 1 and 0 < want[1] < 1 and want[0] != want[1]
    line, end = torch.tensor([[0], [1], [2], [3]]), torch.full((4, 1), 6)
    assert measures.precision_recall(end, line)[0] == 1         # on the rim of the last one's disc


def test_compare_gives_each_measure_its_features():
    x, y = features(50, 2), 2 * features(80, 2, 1) + 1
    logits = 50 * torch.eye(3).repeat_interleave(2000, 0)       # class by class, in two splits
    real, want = dict(pool=y, spatial=3 * y), measures.precision_recall(x, y)
    found = measures.compare(dict(pool=x, spatial=3 * x, logits=logits), real)
    for s, scale in (("", 1), ("s", 3)):
        assert found[s + "FID"] == pytest.approx(scale ** 2 * measures.frechet_distance(x, y))
        assert found[s + "KID"] == measures.kernel_distance(scale * x, scale * y)
    assert 2.997 < found["IS"] < 3
    assert (found["precision"], found["recall"]) == want and want[0] != want[1]
    assert list(measures.compare(dict(pool=x), real)) == ["FID", "KID", "precision", "recall"]


def test_over_smoothing_measures_by_loops():
    weights = torch.softmax(2 * features(12, 6), dim=-1).view(2, 6, 6)
    entropies, variances = measures.row_entropy(weights), measures.row_variance(weights)
    for row, entropy, variance in zip(weights.view(12, 6).tolist(), entropies.flatten().tolist(),
                                      variances.flatten().tolist()):
        assert entropy == pytest.approx(-sum(w * math.log(w) for w in row) / math.log(6))
        assert variance == pytest.approx(sum((w - 1 / 6) ** 2 for w in row) / 6 * 36)


def test_tsne_takes_its_first_steps_as_published_and_ends_in_a_minimum():
    x, apart = features(60, 3) * torch.tensor([1, 2, 3]) + 1, ~torch.eye(60, dtype=torch.bool)
    d2 = (x[:, None] - x).square().sum(2)[apart].view(60, 59)
    low, high = 0 * d2[:, :1], 0 * d2[:, :1] + 1e3
    for _ in range(60):                         # the precision whose row has this perplexity
        middle = (low + high) / 2
        p = torch.softmax(-middle * d2, 1)
        flat = torch.special.entr(p).sum(1, True) > math.log(8)
        low, high = torch.where(flat, middle, low), torch.where(flat, high, middle)
    p = torch.zeros(60, 60, dtype=x.dtype).masked_scatter(apart, p)
    p = ((p + p.T) / 120)[apart]

    def slope(y, exaggeration):                 # of KL(p || q)
        y.requires_grad_()
        w = (1 / (1 + (y[:, None] - y).square().sum(2)))[apart]
        return torch.autograd.grad(w.sum().log() - (exaggeration * p * w.log()).sum(), y)[0]

    y = torch.linalg.svd(x - x.mean(0)).U[:, :2]            # the principal components
    y, speed, gain = y / y.std() * 1e-4, torch.zeros_like(y), torch.ones_like(y)
    for _ in range(12):
        grad = slope(y, 12)
        gain = torch.where((grad > 0) == (speed > 0), gain * 0.8, gain + 0.2).clamp(min=0.01)
        speed = 0.5 * speed - 50 * gain * grad
        y = y.detach() + speed
    torch.testing.assert_close(measures.tsne(x, perplexity=8, steps=12), y)
    assert slope(measures.tsne(x, perplexity=8), 1).abs().max() < 1e-4


# ---- the features ----

def pictures(m, side=8):
    return np.random.default_rng(0).integers(0, 256, (m, side, side, 3), np.uint8)


def test_classifier_by_its_layers():
    model = measures.Classifier(5).eval()
    weights = dict(model.state_dict())
    for name, t in weights.items():
        if "num" not in name:
            torch.nn.init.uniform_(t, 0.1 if "var" in name or "scale" in name else -0.5, 0.6)

    def layer(x, name, i):
        x = F.conv2d(x, weights[f"{name}.{i}.weight"], weights[f"{name}.{i}.bias"], padding=1)
        w, b, mean, variance = (weights[f"{name}.{i + 1}.{k}"][:, None, None]
                                for k in ("weight", "bias", "running_mean", "running_var"))
        return F.max_pool2d(((x - mean) / (variance + 1e-5).sqrt() * w + b).clamp_min(0), 2)

    images = torch.from_numpy(pictures(3, 64)).permute(0, 3, 1, 2)
    early = layer(layer(images / 255 * 2 - 1, "early", 0), "early", 4)      # (3, 64, 16, 16)
    late = layer(early, "late", 0)                                          # (3, 128, 8, 8)
    pool = (late.mean((2, 3)) - weights["centre"]) * weights["scale"][0]
    spatial = (F.avg_pool2d(early[:, :7], 2) - weights["centre_spatial"]) * weights["scale"][1]
    logits = F.avg_pool2d(late, 2).flatten(1) @ weights["head.3.weight"].T + weights["head.3.bias"]
    torch.testing.assert_close(model(images), (pool, spatial.flatten(1), logits))
    dropped = model.head.train()[:3](torch.ones(1, 128, 4, 4)) == 0
    assert 0.25 < dropped.double().mean() < 0.35


class Linear(torch.nn.Module):
    """As small as a Classifier can be: what it is trained with leaves its trace in the weights."""

    def __init__(self, n_classes=4):
        super().__init__()
        self.layer, self.dropout = torch.nn.Linear(192, n_classes), torch.nn.Dropout(0.3)
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        x = images.float().flatten(1) / 255
        logits = self.layer(self.dropout(x))
        return logits, x[:, :28], logits


def test_training_by_its_recipe(monkeypatch):
    """212 steps of AdamW, its rate and momentum by the one-cycle rule, on shifted images."""
    monkeypatch.setattr(measures, "Classifier", Linear)
    fading = np.linspace(1, 0.2, 53 * 128)[:, None, None, None]
    images, labels = (fading * pictures(53 * 128)).astype(np.uint8), np.arange(53 * 128) % 4
    torch.manual_seed(1)                                    # which does not matter
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
    pool, spatial, _ = model.eval()(x[:5000])               # 28 spatial features: 7 channels of 4
    torch.testing.assert_close(got.centre, pool.mean(0))
    centre = spatial.unflatten(1, (7, 4)).mean((0, 2))[:, None, None]
    torch.testing.assert_close(got.centre_spatial, centre)
    scale = torch.stack([f.var(0).mean() ** -0.5 for f in (pool, spatial)])
    torch.testing.assert_close(got.scale, scale)
    few = measures.train_classifier(images[:100], labels[:100], 4)
    assert few.batches == 200 * [128] + [100] and not few.training
    with pytest.raises(train.Problem, match="all alike"):
        measures.train_classifier(np.full((50, 8, 8, 3), 9, np.uint8), labels[:50], 4)


def test_extract_takes_all_images_in_parts():
    def network(x):
        seen.append(len(x))
        x = x * torch.ones((), requires_grad=True)
        return (x[:, 0], x[:, 1], x[:, 2, 0]) if x.shape[3] == 9 else x

    seen, images = [], np.concatenate([pictures(1201)] * 2, 2)[:, :, :9]        # 8 rows, 9 columns
    found = measures.extract(images, network)
    assert {name: f.shape for name, f in found.items()} == dict(
        pool=(1201, 72), spatial=(1201, 72), logits=(1201, 9))
    assert np.array_equal(found["spatial"].view(1201, 8, 9), images[..., 1])
    assert seen == [500, 500, 201] and not found["pool"].requires_grad
    assert list(measures.extract(images[:, :, :8], network)) == ["pool"]


# ---- what other tools use ----

def test_tables_grow_by_lines(tmp_path):
    table = tmp_path / "new" / "table.csv"
    assert measures.read(table) == []
    measures.add_lines(table, [dict(a=1, b="x, y"), dict(a=2, b="")])
    measures.add_lines(table, [dict(a=3, b="z")])
    assert measures.read(table) == [dict(a="1", b="x, y"), dict(a="2", b=""), dict(a="3", b="z")]


def test_commit_names_the_code(tmp_path, monkeypatch):
    def git(*words):
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *words],
                              cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    code = tmp_path / "code.py"
    monkeypatch.setattr(measures, "__file__", str(code))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert measures.commit() == ""
    code.write_text("a = 1")
    for words in ("init", "add .", "commit -m first", "tag -am first v1"):
        git(*words.split())
    assert measures.commit() == git("rev-parse", "HEAD")[:10]
    code.write_text("a = 2")
    assert measures.commit() == git("rev-parse", "HEAD")[:10] + "+"
    monkeypatch.setenv("PATH", "")
    assert measures.commit() == ""


# ---- the command ----

class Means(torch.nn.Module):
    """A network as a user brings it: channel means of quarters, the corner, made-up logits."""

    def forward(self, x: torch.Tensor):
        x = x.float() / 255
        pool = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return pool, x[:, :, :3, :3].flatten(1), 5 * pool[:, :4]


def measure(capsys, *argv):
    """The first line of what the command prints, and {what: number} of the others."""
    measures.main([*map(str, argv)])
    first, *rest = capsys.readouterr().out.splitlines()
    return first, dict(line.rsplit(maxsplit=1) for line in rest)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_command_with_a_network_of_the_users(tmp_path, capsys):
    data, network = train.shapes(100), tmp_path / "means.pt"
    torch.jit.script(Means()).save(network)
    measures.write_npz(tmp_path / "ref.npz", data.images, data.labels)
    np.savez(tmp_path / "dark.npz", arr_0=data.images[:60] // 2)            # without labels
    files = tmp_path / "dark.npz", tmp_path / "ref.npz"
    first, found = measure(capsys, *files, "--network", network)
    assert first == "60 generated images against 100 real ones" and len(found) == 7
    x, y = (dict(zip(("pool", "spatial", "logits"), Means()(torch.from_numpy(f).movedim(3, 1))))
            for f in (data.images[:60] // 2, data.images))
    want = measures.compare(x, y)
    assert {k: float(v) for k, v in found.items()} == pytest.approx(want, abs=1e-3)


SEEN = "recognized, of real images that the classifier has not seen:"
MADE = "recognized, of the generated images:"


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
    files = tmp_path / "half.npz", tmp_path / "ref.npz"
    monkeypatch.setattr(measures, "train_classifier", learn)
    measures.write_npz(files[1], images, labels)
    measures.write_npz(files[0], images[:30], [5, 1000] * 10 + [7] * 10)
    _, found = measure(capsys, *files)
    assert taught == [(36, [0, 1], 2)]
    unseen = {i for i in range(40) if images[i].tobytes() not in known}
    right = {i for i in range(40) if i not in unseen or labels[i] == 5}
    assert len(unseen) == 4 and 0 < len(right & unseen) < 4
    assert found[SEEN] == f"{len(right & unseen) / 4:.1%}"
    assert found[MADE] == f"{len(right & set(range(20))) / 30:.1%}" != f"{20 / 30:.1%}"
    np.savez(files[0], arr_0=images)
    _, found = measure(capsys, *files)
    assert len(found) == 8 and MADE not in found


@pytest.mark.slow
def test_the_classifier_knows_the_data(tmp_path, capsys):
    data, files = train.shapes(2000, size=16), (tmp_path / "swapped.npz", tmp_path / "ref.npz")
    for path, labels in zip(files, ((data.labels + 1) % 10, data.labels)):
        measures.write_npz(path, data.images, labels)
    _, found = measure(capsys, *files)
    assert float(found[SEEN][:-1]) > 90 and float(found["FID"]) < 1e-3
    assert float(found[MADE][:-1]) < 1          # images of the wrong class, which FID cannot see


BAD = {     # what is wrong with the reference, and what is said
    "none": "none.npz: .*No such file.*; give an .npz of train.py sample",
    "pickle": "pickle.npz: Object arrays cannot be loaded",      # which would run its code
    "floats": "floats.npz: arr_0 must be uint8",
    "few": "few.npz: arr_0 must be uint8 .* of 8 or more",
    "short": "short.npz: arr_1 must be a whole number for each image",
    "names": "names.npz: arr_1 must be a whole number for each image",
    "large": "ref.npz: images of 8x8, the reference's are 8x9; make both of one size",
    "unlabelled": "unlabelled.npz: a classifier needs labels of two classes or more",
    "single": "single.npz: a classifier needs labels of two classes or more; give --network",
    "ref --network ref.npz": "--network ref.npz: .*; give a TorchScript file",
    "ref --network two.pt": "--network two.pt: it gives two tensors",
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_named_in_one_line(tmp_path, monkeypatch, words):
    images, labels = pictures(20), np.arange(20)
    monkeypatch.chdir(tmp_path)
    torch.jit.trace(lambda x: (x[:, 0], x[:, 1]), torch.zeros(1, 3, 8, 8)).save("two.pt")
    for name, x, y in [("ref", images, labels), ("floats", images / 2, labels),
                       ("few", images[:7], labels[:7]), ("short", images, labels[:19]),
                       ("names", images, labels.astype(str)), ("single", images, labels * 0),
                       ("large", images[:, :, [*range(8), 0]], labels),
                       ("pickle", np.array([{}] * 20), labels)]:
        np.savez(f"{name}.npz", arr_0=x, arr_1=y)
    np.savez("unlabelled.npz", arr_0=images)
    reference, *flags = words.split()
    monkeypatch.setattr(sys, "argv", ["measures.py", "ref.npz", f"{reference}.npz", *flags])
    with pytest.raises(SystemExit, match=BAD[words]) as end:
        train.explained(measures.main)
    assert end.value.code.startswith("measures.py: ") and "\n" not in end.value.code
