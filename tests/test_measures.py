"""The measures of generated images against closed forms and slow loops, and their command."""
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from lab import measures


def features(m, d, seed=0):
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("m", [60, 8])          # 8 points in 10 dimensions: without full rank
def test_frechet_distance_by_the_products_eigenvalues(m):
    x, y = features(m, 10) @ features(10, 10, 1), features(m, 10, 2) @ features(10, 10, 3) + 1
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(a @ b).real, 0)).sum()
    want = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(a) + np.trace(b) - 2 * root
    assert measures.frechet_distance(x, y) == pytest.approx(want, rel=1e-5)
    assert all(0 <= measures.frechet_distance(f, f) < 1e-9 for f in (x, y))


def test_features_far_from_zero_keep_their_digits():
    x, y = ((features(500, 2, seed) + 1000 + seed).float() for seed in (0, 1))
    for f in measures.frechet_distance, measures.precision_recall, measures.kernel_distance:
        assert f(x, y) == pytest.approx(f(x.double(), y.double()), rel=1e-9)


def test_kernel_distance_by_loops():
    def mean(pairs):
        return np.mean([(sum(float(p * q) for p, q in zip(*pair)) / 5 + 1) ** 3 for pair in pairs])

    x, y = features(7, 5), features(7, 5, 1) + 0.5
    within = sum(mean(itertools.permutations(f, 2)) for f in (x, y))
    want = within - 2 * mean(itertools.product(x, y))
    assert measures.kernel_distance(x, y, n_subsets=3) == pytest.approx(want, rel=1e-10)
    values = [measures.kernel_distance(features(400, 6), features(400, 6, 1), 20, seed=seed)
              for seed in range(5)]                         # of subsets, and without bias
    assert abs(np.mean(values)) < 0.05 and min(values) < 0 and np.std(values) > 0.01


def test_inception_score_of_two_splits_and_the_rest():
    logits, scores = features(12, 3), []
    for p in logits.softmax(1).split(5):
        divergences = [sum(v * math.log(v / q) for v, q in zip(row, p.mean(0))) for row in p]
        scores.append(math.exp(np.mean(divergences)))
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
    maps = torch.softmax(2 * features(12, 6), dim=-1).view(2, 6, 6)
    rows = maps.flatten(0, 1).tolist()
    entropy = [-sum(w * math.log(w) for w in row) / math.log(6) for row in rows]
    variance = [sum((w - 1 / 6) ** 2 for w in row) * 6 for row in rows]
    assert measures.row_entropy(maps).flatten().tolist() == pytest.approx(entropy)
    assert measures.row_variance(maps).flatten().tolist() == pytest.approx(variance)


def test_tsne_takes_its_first_steps_as_published_and_ends_in_a_minimum():
    x, eye = features(60, 3) * torch.tensor([1, 2, 3]) + 1, torch.eye(60)
    d2 = (x[:, None] - x).square().sum(2).fill_diagonal_(math.inf)
    precision = torch.ones(60, 1, dtype=x.dtype)
    for i in range(60):                         # until each row of p has the perplexity
        p = torch.softmax(-precision * d2, 1)
        flat = torch.special.entr(p).sum(1, True) > math.log(8)
        precision = precision * 2 ** ((2 * flat.double() - 1) * 8 * 0.5 ** i)
    p = (p + p.T) / 120

    def slope(y, exaggeration):                 # of KL(p || q)
        y.requires_grad_()
        w = (1 - eye) / (1 + (y[:, None] - y).square().sum(2))
        return torch.autograd.grad(w.sum().log() - (exaggeration * p * (w + eye).log()).sum(), y)[0]

    y = torch.linalg.svd(x - x.mean(0)).U[:, :2]            # the principal components
    y, speed, gain = y / y.std() * 1e-4, torch.zeros_like(y), torch.ones_like(y)
    for _ in range(12):
        grad = slope(y, 12)
        gain = torch.where((grad > 0) == (speed > 0), gain * 0.8, gain + 0.2).clamp(min=0.01)
        speed = 0.5 * speed - 50 * gain * grad
        y = y.detach() + speed
    torch.testing.assert_close(measures.tsne(x, perplexity=8, steps=12), y)
    assert slope(measures.tsne(x, perplexity=8), 1).abs().max() < 1e-4


def pictures(m, side=8):
    return np.random.default_rng(0).integers(0, 256, (m, side, side, 3), np.uint8)


def test_classifier_by_its_layers():
    model = measures.Classifier(5).eval()
    for name, t in model.state_dict().items():
        if "num" not in name:
            torch.nn.init.uniform_(t, 0.1 if "var" in name or "scale" in name else -0.5, 0.6)

    def layer(x, conv, norm, *_):
        x = F.conv2d(x, conv.weight, conv.bias, padding=1)
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return F.max_pool2d(x.clamp_min(0), 2)

    images = torch.from_numpy(pictures(3, 64)).permute(0, 3, 1, 2)
    early = layer(layer(images / 255 * 2 - 1, *model.early[:2]), *model.early[4:])  # (3, 64, 16, .)
    late = layer(early, *model.late)                                                # (3, 128, 8, 8)
    pool = (late.mean((2, 3)) - model.centre) * model.scale[0]
    spatial = (F.avg_pool2d(early[:, :7], 2) - model.centre_spatial) * model.scale[1]
    logits = F.avg_pool2d(late, 2).flatten(1) @ model.head[3].weight.T + model.head[3].bias
    torch.testing.assert_close(model(images), (pool, spatial.flatten(1), logits))
    assert model.head[2].p == 0.3


class Linear(torch.nn.Linear):
    """As small as a Classifier can be: what it is trained with leaves its trace in the weights."""

    def __init__(self, n_classes):
        super().__init__(192, n_classes)

    def forward(self, images):
        x = images.float().flatten(1) / 255
        logits = super().forward(F.dropout(x, 0.3, self.training))
        return logits, x[:, :28], logits


@pytest.mark.parametrize("m, steps", [(53 * 128, 4 * 53), (100, 200)])
def test_training_by_its_recipe(monkeypatch, m, steps):
    monkeypatch.setattr(measures, "Classifier", Linear)
    fading = np.linspace(1, 0.2, m)[:, None, None, None]
    images, labels = (fading * pictures(m)).astype(np.uint8), np.arange(m) % 4
    torch.manual_seed(1)                                    # which does not matter
    got = measures.train_classifier(images, labels, 4)
    torch.manual_seed(0)
    model, x, y = Linear(4), torch.from_numpy(images).movedim(3, 1), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        pick, (dx, dy) = torch.randint(len(x), (128,)), torch.randint(0, 5, (2,)).tolist()
        rows, columns = ((torch.arange(8) + d - 2).clamp(0, 7) for d in (dy, dx))
        optimizer.zero_grad()
        F.cross_entropy(model(x[pick][:, :, rows][..., columns])[2], y[pick]).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(got.weight, model.weight)
    pool, spatial, _ = model.eval()(x[:5000])
    means = pool.mean(0), spatial.unflatten(1, (7, 4)).mean((0, 2))[:, None, None]  # of 7 channels
    scale = torch.stack([f.var(0).mean() ** -0.5 for f in (pool, spatial)])
    torch.testing.assert_close((got.centre, got.centre_spatial, got.scale), (*means, scale))
    with pytest.raises(train.Problem, match="all alike"):
        measures.train_classifier(np.full((50, 8, 8, 3), 9, np.uint8), labels[:50], 4)


def test_extract_takes_all_images_in_parts():
    def network(x):
        seen.append(len(x))
        x = x * torch.ones((), requires_grad=True)
        return (x[:, 0], x[:, 1], x[:, 2, 0]) if x.shape[3] == 9 else x

    seen, images = [], np.concatenate([pictures(1201)] * 2, 2)[:, :, :9]        # 8 rows, 9 columns
    found = measures.extract(images, network)
    for i, name in enumerate(("pool", "spatial")):
        assert np.array_equal(found[name], images[..., i].reshape(1201, 72))
    assert np.array_equal(found["logits"], images[:, 0, :, 2])
    assert seen == [500, 500, 201] and not found["pool"].requires_grad
    assert list(measures.extract(images[:, :, :8], network)) == ["pool"]


def measure(capsys, *argv):
    """{what: number} of the lines that the command prints, without the first."""
    measures.main([*argv])
    return dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_command_with_a_network_of_the_users(cli, capsys):
    def network(x):
        x = x / 255
        return F.adaptive_avg_pool2d(x, 2).flatten(1), x[:, :, :3, :3], 5 * x[:, 0, 0, :4]

    images, example = pictures(100, 32), torch.zeros(1, 3, 32, 32)
    torch.jit.trace(network, example).save("three.pt")
    torch.jit.trace(lambda x: network(x)[:2], example).save("two.pt")
    np.savez("ref.npz", arr_0=images)
    np.savez("dark.npz", arr_0=images[:60] // 2)
    found = measure(capsys, "dark.npz", "ref.npz", "--network", "three.pt")
    want = measures.compare(*(measures.extract(x, network) for x in (images[:60] // 2, images)))
    assert {k: float(v) for k, v in found.items()} == pytest.approx(want, abs=1e-3)
    for name, message in (("ref.npz", "--help says what"), ("two.pt", "it gives two tensors")):
        with pytest.raises(train.Problem, match=f"--network {name}: .*{message}"):
            measure(capsys, "dark.npz", "ref.npz", "--network", name)


def test_command_with_a_classifier_of_the_reference(cli, capsys, monkeypatch):
    """This one knows by heart what it was taught, and takes all else for the first class."""
    def learn(images, labels, n_classes):
        known.update((image.tobytes(), label) for image, label in zip(images, labels))
        assert len(known) == 36 and set(labels) == {0, 1} and n_classes == 2

        def network(x):
            told = [known.get(image.numpy().tobytes(), 0) for image in x.movedim(1, 3).contiguous()]
            return x[:, 0, 0].float(), x[:, 1, 0].float(), F.one_hot(torch.tensor(told), 2).float()
        return network

    known, images, labels = {}, pictures(40), np.array([5, 1000] * 20)
    monkeypatch.setattr(measures, "train_classifier", learn)
    np.savez("ref.npz", arr_0=images, arr_1=labels)
    np.savez("half.npz", arr_0=images[:30], arr_1=[5, 1000] * 10 + [7] * 10)
    *_, of_real, of_made = measure(capsys, "half.npz", "ref.npz").values()
    unseen = {i for i in range(40) if images[i].tobytes() not in known}
    right = {i for i in range(40) if i not in unseen or labels[i] == 5}
    assert len(unseen) == 4 and 0 < len(right & unseen) < 4
    assert of_real == f"{len(right & unseen) / 4:.1%}"
    assert of_made == f"{len(right & set(range(20))) / 30:.1%}" != f"{20 / 30:.1%}"
    np.savez("half.npz", arr_0=images[:30])
    assert len(measure(capsys, "half.npz", "ref.npz")) == 8     # without labels, only of the real


@pytest.mark.parametrize("change, message", [
    (dict(arr_0=np.array([{}] * 20)), "Object arrays cannot be loaded"),    # it would run its code
    (dict(arr_0=pictures(20) / 2), "arr_0 must be uint8"),
    (dict(arr_0=pictures(7), arr_1=np.arange(7)), "arr_0 must be uint8 .* of 8 or more"),
    (dict(arr_1=np.arange(19)), "arr_1 must be a whole number for each image"),
    (dict(arr_1=np.array([*"abcde"] * 4)), "arr_1 must be a whole number for each image"),
    (dict(arr_1=np.ones(20, int)), "labels of fewer than two classes"),
    (dict(arr_0=pictures(20, 9)), "images of 8x8, the reference's are 9x9; make both of one size")])
def test_bad_input_is_named_in_one_line(cli, change, message):
    good = dict(arr_0=pictures(20), arr_1=np.arange(20))
    np.savez("good.npz", **good)
    np.savez("bad.npz", **(good | change))
    with pytest.raises(train.Problem, match=r"^(bad|good).npz: .*" + message):
        measures.main(["good.npz", "bad.npz"])
