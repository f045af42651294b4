"""The measures of generated images against closed forms and slow loops."""
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import train
from lab import measures

NOTEBOOKS = pathlib.Path(train.__file__).resolve().parent / "notebooks"


def features(m, d, seed=0):
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean, variance, m=50):
    """Points whose sample mean and (diagonal) sample covariance are exactly these."""
    x = features(m, len(mean))
    x = torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(m - 1)
    return (x - x.mean(0)) * torch.tensor(variance, dtype=x.dtype).sqrt() + torch.tensor(mean, dtype=x.dtype)


# ---- the formulas ----

def test_frechet_distance_of_aligned_gaussians():
    x, y = with_moments([0, 0, 1], [1, 4, 9]), with_moments([1, 2, 1], [4, 4, 0.25], m=80)
    want = 1 + 4 + (1 - 2) ** 2 + 0 + (3 - 0.5) ** 2
    assert measures.frechet_distance(x, y) == pytest.approx(want, abs=1e-9)
    assert measures.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("m", [60, 8])                      # 8 points in 10 dimensions: covariances without full rank
def test_frechet_distance_by_the_product_s_eigenvalues(m):
    x, y = features(m, 10) @ features(10, 10, 1), features(m, 10, 2) @ features(10, 10, 3) + 1
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(a @ b).real, 0)).sum()
    want = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(a) + np.trace(b) - 2 * root
    assert measures.frechet_distance(x, y) == pytest.approx(want, rel=1e-5)
    assert measures.frechet_distance(y, x) == pytest.approx(want, rel=1e-5)


def test_frechet_distance_keeps_its_digits_in_float32():
    x, y = features(500, 20) + 1000, features(500, 20, 1) + 1000.5      # features far from zero
    assert measures.frechet_distance(x.float(), y.float()) == pytest.approx(measures.frechet_distance(x, y), rel=1e-3)


def test_kernel_distance_by_loops():
    x, y = features(7, 5), features(7, 5, 1) + 0.5

    def kernel(a, b):
        return (sum(float(p * q) for p, q in zip(a, b)) / 5 + 1) ** 3

    n, want = 7, 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                want += (kernel(x[i], x[j]) + kernel(y[i], y[j])) / (n * (n - 1))
            want -= 2 * kernel(x[i], y[j]) / n ** 2
    assert measures.kernel_distance(x, y, n_subsets=3) == pytest.approx(want, rel=1e-10)


def test_kernel_distance_is_unbiased_and_takes_subsets():
    x, y = features(400, 6), features(500, 6, 1)
    values = [measures.kernel_distance(x, y, subset=20, n_subsets=100, seed=s) for s in range(5)]
    assert len(set(values)) == 5 and abs(np.mean(values)) < 0.05 and min(values) < 0        # same distribution: around 0
    assert measures.kernel_distance(x, y + 1, subset=20) > 1


def test_inception_score():
    sure = 50 * torch.eye(4, dtype=torch.float64)
    assert measures.inception_score(sure.repeat(5, 1)) == pytest.approx(4, rel=1e-9)        # sure, and of every class
    assert measures.inception_score(sure[:1].repeat(9, 1)) == pytest.approx(1)              # sure, of one class
    assert measures.inception_score(torch.zeros(9, 4)) == pytest.approx(1)                  # never sure
    logits = features(12, 3)
    scores = []
    for start in (0, 5, 10):                                # two splits of five, and the rest
        p = [[math.exp(v) / sum(math.exp(w) for w in row) for v in row] for row in logits[start:start + 5].tolist()]
        marginal = [sum(row[k] for row in p) / len(p) for k in range(3)]
        scores.append(math.exp(sum(v * math.log(v / q) for row in p for v, q in zip(row, marginal)) / len(p)))
    assert measures.inception_score(logits, split=5) == pytest.approx(np.mean(scores), rel=1e-10)


def test_precision_and_recall_by_loops():
    x, y, k = 1.5 * features(25, 2), features(30, 2, 1) + 1, 3

    def inside(points, centres):
        hits = 0
        for p in points:
            for c in centres:
                radius = sorted(math.dist(c, other) for other in centres)[k]        # [0] is the centre itself
                if math.dist(p, c) <= radius:
                    hits += 1
                    break
        return hits / len(points)

    want = inside(x.tolist(), y.tolist()), inside(y.tolist(), x.tolist())
    assert measures.precision_recall(x, y, chunk=7) == pytest.approx(want) and 0 < want[0] < 1 and 0 < want[1] < 1
    one_mode = features(25, 2) * 0.01
    precision, recall = measures.precision_recall(one_mode + 1, y)
    assert precision == 1 and recall < 0.2


def test_over_smoothing_measures_by_loops():
    weights = torch.softmax(2 * features(6, 6), dim=-1)
    for row, entropy, variance in zip(weights.tolist(), measures.row_entropy(weights), measures.row_variance(weights)):
        assert entropy.item() == pytest.approx(-sum(w * math.log(w) for w in row) / math.log(6))
        assert variance.item() == pytest.approx(sum((w - 1 / 6) ** 2 for w in row) / 6 * 36)


def test_tsne_keeps_neighbours_and_repeats_itself():
    centres = 6 * features(4, 10, 1)
    label = torch.arange(120) % 4
    x = centres[label] + features(120, 10)
    y = measures.tsne(x, perplexity=15, steps=400)
    nearest = torch.cdist(y, y).fill_diagonal_(math.inf).argmin(1)
    assert (label[nearest] == label).double().mean() > 0.97
    assert torch.equal(y, measures.tsne(x, perplexity=15, steps=400))
    assert measures.tsne(torch.ones(40, 3), perplexity=5, steps=300).isfinite().all()


# ---- the command ----

def npz(path, images, labels):
    measures.write_npz(path, images, labels)
    return path


class Means(torch.nn.Module):
    """A feature network as a user brings it: channel means of quarters, the image's corner, and made-up logits."""

    def forward(self, x: torch.Tensor):
        x = x.float() / 255
        pool = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return pool, x[:, :, :3, :3].flatten(1), 5 * pool[:, :4]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "means.pt"
    torch.jit.script(Means()).save(str(path))
    return path


def measure(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["measures.py", *map(str, argv)])
    measures.main()
    return capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_command_with_a_network_of_the_user_s(tmp_path, monkeypatch, capsys, network):
    data = train.shapes(200)
    real = npz(tmp_path / "ref.npz", data.images, data.labels)
    same = measure(monkeypatch, capsys, real, real, "--network", network)
    values = dict(line.split() for line in same.splitlines()[1:])
    assert set(values) == {"FID", "sFID", "KID", "sKID", "IS", "precision", "recall"}
    assert float(values["FID"]) < 1e-3 and float(values["precision"]) == float(values["recall"]) == 1
    dark = npz(tmp_path / "dark.npz", data.images[:100] // 2, data.labels[:100])
    values = dict(line.split() for line in measure(monkeypatch, capsys, dark, real, "--network", network).splitlines()[1:])
    want = measures.extract(data.images, Means())["pool"].double(), measures.extract(data.images[:100] // 2, Means())["pool"]
    assert float(values["FID"]) == pytest.approx(measures.frechet_distance(want[1], want[0]), abs=1e-3)


@pytest.mark.slow
def test_command_with_a_classifier_of_the_data(tmp_path, monkeypatch, capsys):
    data = train.shapes(2000, size=16)
    real = npz(tmp_path / "ref.npz", data.images, data.labels)
    swapped = npz(tmp_path / "swapped.npz", data.images, (data.labels + 1) % 10)
    output = measure(monkeypatch, capsys, swapped, real)
    assert "recognized as their class: 0." in output                            # good pictures of the wrong class
    share = float(output.split("it has not seen: ")[1].split("%")[0])
    assert 90 < share <= 100
    assert float(output.split("FID")[1].split()[0]) < 1e-3                      # which FID cannot see


BAD = [
    (["none.npz", "ref.npz"], "none.npz: not five images or more"),
    (["text.npz", "ref.npz"], "text.npz: not five images or more"),
    (["pickle.npz", "ref.npz"], "pickle.npz: not five images or more"),
    (["floats.npz", "ref.npz"], "floats.npz: not five images or more"),
    (["small.npz", "ref.npz"], "images of 16x16, the reference's are 32x32; make both of one size"),
    (["ref.npz", "ref.npz", "--network", "text.npz"], "--network text.npz: cannot be loaded"),
    (["ref.npz"], "the following arguments are required: reference"),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("argv, says", BAD, ids=[says[:30] for _, says in BAD])
def test_bad_input_is_named_in_one_line(tmp_path, monkeypatch, capsys, argv, says):
    images, labels = np.zeros((20, 32, 32, 3), np.uint8), np.arange(20) % 10
    npz(tmp_path / "ref.npz", images, labels)
    npz(tmp_path / "small.npz", images[:, :16, :16], labels)
    npz(tmp_path / "floats.npz", images / 2, labels)
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "pickle.npz", arr_0=np.array([{"a": 1}] * 5, dtype=object), arr_1=labels[:5])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["measures.py", *argv])
    with pytest.raises(SystemExit) as end:
        train.explained(measures.main)
    line = end.value.code                                                       # Python prints it and exits with 1
    assert line.startswith("measures.py: ") and says in line and "\n" not in line
    assert capsys.readouterr().err == ""


def test_bad_input_ends_the_program(tmp_path):
    done = subprocess.run([sys.executable, NOTEBOOKS / "lab/measures.py", "none.npz", "ref.npz"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("measures.py: none.npz: ") and done.stderr.count("\n") == 1
