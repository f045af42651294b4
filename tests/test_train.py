"""train.py as its user meets it: data in, the recipe, runs and stops, samples, and bad input."""
import dataclasses
import hashlib
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import dydilit
import train
from lab import measures

ROOT = pathlib.Path(train.__file__).resolve().parent
TINY = ["--batch-size", "8", "--sampling-steps", "2", "--set", "dim=16", "depth=1", "n_gammas=2",
        "n_lambdas=2", "n_projectors=2"]
CHILDREN = []


def command(*argv, program=(ROOT / "train.py",), **kwargs):
    argv = [sys.executable, *map(str, [*program, *argv])]
    CHILDREN.append(subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                     text=True, **kwargs))
    return CHILDREN[-1]


@pytest.fixture(autouse=True)
def no_orphans():
    """A test that fails leaves no process behind that trains for ever."""
    yield
    while CHILDREN:
        CHILDREN.pop().kill()


def finish(*argv, code=0, **kwargs):
    process = command(*argv, **kwargs)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def wait_until(happened, process):
    """Polls until happened() says so. The deadline is far beyond what a busy machine needs."""
    deadline = time.time() + 300
    while not (found := happened()):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.002)
    return found


def load(run):
    return torch.load(pathlib.Path(run) / "checkpoint.pt", weights_only=True)


def rows(run):
    return measures.read(pathlib.Path(run) / "log.csv")


def image_tree(root, classes=("cat", "dog"), count=6, size=(40, 48)):
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            image = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
            image.save(root / name / f"{i}.png")
    return root


def cifar_files(folder, count=20):
    """A small set in the layout of CIFAR-10's binary version: label, red, green, blue planes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in [*train.CIFAR_FILES, "test_batch.bin"]:
        records = rng.integers(0, 256, (count, 3073), np.uint8)
        records[:, 0] = np.arange(count) % 10
        records.tofile(folder / name)
    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    return folder


@pytest.fixture
def small(tmp_path):
    """Flags of small runs on a small set."""
    return ["--data", "cifar10", "--data-dir", cifar_files(tmp_path / "data"), *TINY]


# ---- Data ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("how, sha256", [
    (dict(n=3000), "1691b726df456d9b40a848c80d34e4b7b166fdb435ef6edb5b1bbfba60995ab4"),
    (dict(n=100, seed=1, size=48),
     "c36f5cfc7b5459c2d54b7fbb63295e867560a6b082481c87410fdd812b5dba02")])
def test_shapes_are_those_of_all_results(how, sha256):
    data = train.shapes(**how)
    assert hashlib.sha256(data.images.tobytes() + data.labels.tobytes()).hexdigest() == sha256
    assert np.ptp(np.bincount(data.labels)) == 0 and len(data.names) == 10 and not data.flip


def test_cifar_is_read_plane_by_plane(tmp_path):
    folder = cifar_files(tmp_path / "cifar-10-batches-bin")
    raw = np.fromfile(folder / "data_batch_2.bin", np.uint8).reshape(-1, 3073)
    for data_dir in (tmp_path, folder):
        data = train.cifar10(data_dir)
        assert data.images.shape == (100, 32, 32, 3) and data.names == [*"abcdefghij"]
        assert data.labels[20:40].tolist() == raw[:, 0].tolist() and data.flip
        assert [*data.images[21, 5, 7]] == [raw[1, 1 + c * 1024 + 5 * 32 + 7] for c in range(3)]


def test_cifar_is_downloaded_checked_and_unpacked(tmp_path, monkeypatch):
    source = cifar_files(tmp_path / "source")
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        tar.add(source, "cifar-10-batches-bin")
    monkeypatch.setattr(train, "CIFAR_URL", (tmp_path / "c.tar.gz").as_uri())
    with pytest.raises(train.Problem, match="invalid hash value.*; delete it, and fetch"):
        train.cifar10(tmp_path / "data")
    right = hashlib.sha256((tmp_path / "c.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(train, "CIFAR_SHA256", right)
    assert len(train.cifar10(tmp_path / "data").images) == 100
    assert len(train.cifar10(tmp_path / "data", ["test_batch.bin"]).images) == 20


@pytest.mark.parametrize("mode, suffix", [
    ("RGB", "png"), ("RGBA", "png"), ("LA", "png"), ("L", "png"), ("P", "png"), ("1", "png"),
    ("RGB", "jpg"), ("CMYK", "jpg"), ("L", "jpg"), ("P", "gif"), ("RGB", "webp")])
def test_images_of_every_mode(tmp_path, mode, suffix):
    image = Image.new("RGB", (50, 40), (200, 100, 50)).convert(mode)
    image.save(tmp_path / f"x.{suffix}")
    got = train.read_image(tmp_path / f"x.{suffix}", 32)
    assert got.shape == (32, 32, 3) and got.dtype == np.uint8
    want = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(0)
    assert abs(got.reshape(-1, 3).mean(0) - want).max() <= 3


def test_transparent_pixels_are_white(tmp_path):
    pixels = np.full((32, 32, 4), (255, 0, 0, 255), np.uint8)
    pixels[16:, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "x.jpg", format="png")      # endings are not trusted
    got = train.read_image(tmp_path / "x.jpg", 32)
    assert (got[:16] == [255, 0, 0]).all() and (got[16:] == 255).all()


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (31, 31)), (6, (0, 31))])
def test_photographs_stand_upright(tmp_path, orientation, corner):
    """A camera that was turned says so in the EXIF data, and not in the pixels."""
    pixels, exif = np.zeros((32, 32, 3), np.uint8), Image.Exif()
    pixels[0, 0], exif[0x0112] = 255, orientation
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    assert train.read_image(tmp_path / "x.png", 32)[corner].tolist() == [255] * 3


@pytest.mark.parametrize("width, height, size", [(32, 32, 32), (100, 76, 32), (500, 375, 64),
                                                 (20, 30, 32), (333, 64, 64)])
def test_the_middle_square_is_scaled_as_by_adm(tmp_path, width, height, size):
    """guided-diffusion halves with a box filter, and goes the rest of the way bicubically."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    image = Image.fromarray(pixels[top:top + side, left:left + side])
    while image.width >= 2 * size:
        image = image.resize((image.width // 2, image.width // 2), Image.BOX)
    want = np.asarray(image.resize((size, size), Image.BICUBIC))
    assert np.array_equal(train.read_image(tmp_path / "x.png", size), want)


def test_work_is_not_done_for_what_is_cropped_away(tmp_path, monkeypatch):
    Image.new("RGB", (1, 20_000)).save(tmp_path / "line.png")
    noise = np.random.default_rng(0).integers(0, 256, (2400, 3200, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.jpg")
    largest, resize = [], Image.Image.resize

    def watched(image, size, *more):
        largest.append(max(*size, *image.size))
        return resize(image, size, *more)
    monkeypatch.setattr(Image.Image, "resize", watched)
    assert train.read_image(tmp_path / "line.png", 64).shape == (64, 64, 3)
    train.read_image(tmp_path / "large.jpg", 64)
    assert max(largest) <= 300                      # of the JPEG, an eighth of each side is decoded


def test_a_folder_says_what_it_gives(tmp_path, capsys):
    root = image_tree(tmp_path / "pets", ["dog", "cat"])
    (root / "cat" / ".ipynb_checkpoints").mkdir()
    shutil.copy(root / "cat" / "0.png", root / "cat" / ".ipynb_checkpoints")
    (root / ".cache" / "x").mkdir(parents=True)
    shutil.copy(root / "cat" / "0.png", root / ".cache" / "x")
    (root / "cat" / "old").mkdir()
    Image.new("RGB", (40, 40)).save(root / "cat" / "old" / "a.JFIF", format="jpeg")
    for name in ("notes.txt", "cat/LICENSE", "0.png", "bird/readme.pdf"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("")
    paths, labels, names = train.image_folder(root)
    assert names == ["cat", "dog"] and labels.tolist() == [0] * 7 + [1] * 6
    assert [p.parent.name for p in paths] == ["cat"] * 6 + ["old"] + ["dog"] * 6
    assert capsys.readouterr().out == (f"{root}: 13 images, 2 classes (cat, dog); "
                                       "4 files skipped: .pdf, .png, .txt, LICENSE\n")


@pytest.mark.parametrize("classes, says", [(["."], "6 images, 1 class (photos)"),
                                           (["cat", "dog"], "12 images, 2 classes (cat, dog)")])
def test_a_run_in_the_data_is_no_class_and_a_flat_folder_one(
        cli, tmp_path, monkeypatch, capsys, classes, says):
    monkeypatch.chdir(image_tree(tmp_path / "photos", classes))
    for steps in (1, 2):
        cli(*TINY, "--data", ".", "--steps", steps, "--batch-size", "4")
    said = capsys.readouterr().out
    assert said.count(says) == 2 and said.count("runs/photos lies in --data; it is no class") == 2
    assert load("runs/photos")["step"] == 2


def test_all_images_that_cannot_be_read_are_named(tmp_path):
    root = image_tree(tmp_path / "pets", count=2)
    (root / "cat" / "0.png").write_bytes((root / "cat" / "0.png").read_bytes()[:-100])
    for name, mode in [("cat/f.tiff", "F"), ("dog/i.png", "I;16")]:
        Image.new(mode, (40, 40)).save(root / name)
    with pytest.raises(train.Problem) as stop:
        train.read_images(train.image_folder(root)[0], 32)
    first, *lines = str(stop.value).split("\n")
    assert first == "3 images are unreadable; mend or remove them" and len(lines) == 3
    assert {line.partition(": ")[0].strip() for line in lines} == {
        str(root / name) for name in ("cat/0.png", "cat/f.tiff", "dog/i.png")}


def test_latents_come_mirrored_and_shapes_do_not():
    data = train.shapes(50)
    x, _ = data.batch(torch.tensor([1]), torch.tensor([True]))
    assert x[0, 2, 5, 6].item() == pytest.approx(data.images[1, 5, 6, 2] / 127.5 - 1)
    latents = np.arange(10, dtype=np.float16).reshape(5, 2, 1, 1, 1)        # each with its mirror
    data = train.Data(latents, np.arange(5), [*"abcde"], 8, vae="v")
    x, _ = data.batch(torch.tensor([3, 1]), torch.tensor([False, True]))
    assert x.flatten().tolist() == [6, 3]


# ---- The recipe ---------------------------------------------------------------------------------

@pytest.mark.parametrize("log_loss", [0, 1])
def test_steps_are_those_of_the_recipe(tmp_path, monkeypatch, log_loss):
    """Eight steps beside plain lines: batch, flips, timesteps, loss, rate, AdamW and average."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (30, 8, 8, 3), np.uint8), rng.integers(0, 3, 30)
    monkeypatch.setattr(train, "load_data", lambda args: train.Data(images, labels, [*"abc"], 8))
    args = train.arguments([*TINY, "label_dropout=0.5", "--steps", "8", "--warmup", "3", "--lr",
                            "0.012", "--cooldown", "0.5", "--beta2", "0.8", "--ema", "0.3",
                            "--seed", "5", "--log-loss", str(log_loss)])
    run = train.Training(args, dydilit.block_parts, tmp_path / "run")
    run.forward = run.model
    torch.manual_seed(5)
    model = dydilit.build_model(
        args.model, **dict(args.set), image_size=8, vae_factor=1, in_channels=3, n_classes=3)
    average = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), 1.0, (0.9, 0.8), weight_decay=0)
    rates = [0.004, 0.008, 0.012, 0.012, 0.012, 0.009, 0.006, 0.003]
    decays, seen = [1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3, 0.3, 0.3], []
    for step, (rate, decay) in enumerate(zip(rates, decays)):
        run.train_step()
        run.step += 1
        random = torch.Generator().manual_seed(zlib.crc32(f"(5, {step})".encode()))
        index = torch.randint(30, (8,), generator=random)
        flipped = torch.rand(8, generator=random) < 0.5
        x = images[index] / 127.5 - 1
        x = np.stack([i[:, ::-1] if flip else i for i, flip in zip(x, flipped)])
        x = torch.tensor(x, dtype=torch.float32).permute(0, 3, 1, 2)
        order, place = torch.randperm(8, generator=random), torch.rand(8, generator=random)
        t = torch.tensor([int((o + p) * 1000 / 8) for o, p in zip(order, place)])
        noise = torch.randn(8, 3, 8, 8, generator=random)
        torch.manual_seed(zlib.crc32(f"(5, {step}, 0)".encode()))
        losses = dydilit.GaussianDiffusion().losses(
            model.train(), x, torch.tensor(labels[index]), t, noise)["loss"]
        seen.append(losses.mean().item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        (losses.log() if log_loss else losses).mean().backward()
        optimizer.step()
        for p, a, mine, ema in zip(model.parameters(), average, run.model.parameters(),
                                   run.ema.parameters()):
            a += (1 - decay) * (p.detach() - a)
            torch.testing.assert_close(mine, p, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(ema, a, rtol=1e-3, atol=1e-5)
    run.report()
    assert run.log == [[8, 64, pytest.approx(np.mean(seen), rel=1e-3), *run.log[0][3:]]]
    assert not run.ema.training                             # its labels are not dropped


def same_losses(one, other):
    for a, b in zip(rows(one), rows(other), strict=True):
        a, b = ({name: float(value) for name, value in row.items()} for row in (a, b))
        assert a == pytest.approx(b, rel=1e-3)


TORCHRUN = "-m", "torch.distributed.run", "--nproc_per_node=2", "--", ROOT / "train.py"


def test_parts_of_a_batch_and_two_processes_give_the_same_steps(small, tmp_path):
    args = [*small, "label_dropout=0", "--steps", "3", "--log-every", "1", "--run"]
    finish(*args, tmp_path / "one")
    finish(*args, tmp_path / "parts", "--accumulate", 4)
    finish(*args, tmp_path / "two", "--accumulate", 2, program=TORCHRUN)
    for run in ("parts", "two"):
        same_losses(tmp_path / run, tmp_path / "one")
        for p, q in zip(load(tmp_path / run)["weights"].values(),
                        load(tmp_path / "one")["weights"].values()):
            torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_processes_stop_together_and_samples_are_made_by_one(small, tmp_path):
    """A stop must not wait for the next line of the log."""
    process = command(*small, "--run", tmp_path / "run", "--steps", 10**6, "--save-every", 10**6,
                      program=TORCHRUN)
    wait_until((tmp_path / "run" / "checkpoint.pt").exists, process)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert load(tmp_path / "run")["step"] > 0
    output = finish("sample", "--run", tmp_path / "run", program=TORCHRUN, code=1)
    assert "sample runs in one process; start it without torchrun" in output


# ---- Sampling -----------------------------------------------------------------------------------

def tiny_model(**fields):
    """A model whose weights are all random, so that nothing of it is zero."""
    torch.manual_seed(0)
    fields = dict(dim=16, depth=1, n_gammas=2, n_lambdas=2, image_size=8) | fields
    model = dydilit.build_model("DyDi-LiT-XS/4", **fields).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def plain_samples(model, labels, scale, seed, clip):
    """Two steps of DDIM, from timestep 999 to 0 and to the image, each guided by two passes."""
    kept = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0).float()
    out = []
    for i, label in enumerate(labels):
        random = torch.Generator().manual_seed(zlib.crc32(f"({seed}, {i})".encode()))
        x = torch.randn(1, model.cfg.in_channels, 8, 8, generator=random)
        for t, before in [(999, kept[0]), (0, torch.tensor(1.0))]:
            c = model.cfg.in_channels
            with_class, without = (model(x, torch.tensor([t]), torch.tensor([y]))[:, :c].detach()
                                   for y in (label, 10))
            noise = without + scale * (with_class - without)
            x0 = (x - (1 - kept[t]).sqrt() * noise) / kept[t].sqrt()
            x0 = x0.clamp(-1, 1) if clip else x0
            noise = (x - kept[t].sqrt() * x0) / (1 - kept[t]).sqrt()
            x = before.sqrt() * x0 + (1 - before).sqrt() * noise
        out.append(x)
    return torch.cat(out)


def test_samples_are_two_guided_steps_put_together_by_hand():
    model, labels = tiny_model(), [3, 7, 7]
    got = train.generate(model, labels, 2, 1.7, "ddim", seed=4)
    want = (plain_samples(model, labels, 1.7, 4, clip=True).permute(0, 2, 3, 1) + 1) * 127.5
    assert got.dtype == np.uint8 and abs(got - want.numpy()).max() <= 0.51


def test_latents_are_decoded_at_their_own_scale():
    """The stand-in VAE's latents are pixels, times a factor that is not 1."""
    vae = mock.Mock(config=mock.Mock(scaling_factor=200.0),
                    decode=lambda z: mock.Mock(sample=z[:, 1:]))
    model = tiny_model(in_channels=4)
    got = train.generate(model, [1] * 5, 2, 1.0, "ddim", vae=vae)
    z = plain_samples(model, [1] * 5, 1.0, 0, clip=False)[:, 1:]
    want = ((z.permute(0, 2, 3, 1) / 200 + 1) * 127.5).round().clamp(0, 255).numpy()
    assert abs(got - want).max() <= 1 and 0.02 < ((got > 0) & (got < 255)).mean() < 0.98


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_image_does_not_depend_on_its_batch(sampler):
    model, labels = tiny_model(), [0, 1, 2, 3, 4, 5]
    one = train.generate(model, labels, 3, 1.5, sampler, seed=2).astype(int)
    other = train.generate(model, labels, 3, 1.5, sampler, seed=2, batch_size=4)
    tail = train.generate(model, labels[2:], 3, 1.5, sampler, seed=2, first=2)
    assert abs(one - other).max() <= 1 and abs(one[2:] - tail).max() <= 1
    assert (one != train.generate(model, labels, 3, 1.5, sampler, seed=3)).mean() > 0.25
    assert len({image.tobytes() for image in one}) == 6


@pytest.fixture
def run(cli):
    cli(*TINY, "--steps", "3", "--lr", "0.01")
    return cli


def test_sample_writes_grids_and_adms_layout(run, capsys):
    run("sample", "--run", "runs/shapes", "--classes", "2", "3")
    assert Image.open("runs/shapes/grid.png").height == 2 * 68
    run("sample", "--run", "runs/shapes", "--num", 23, "--steps", 3, "--cfg", 1, "--batch-size", 7)
    assert "23 samples, step 3, 3 steps, guidance 1" in capsys.readouterr().out
    samples = np.load("runs/shapes/samples.npz")
    assert samples["arr_0"].shape == (23, 32, 32, 3) and samples["arr_0"].dtype == np.uint8
    assert samples["arr_1"].tolist() == [i * 10 // 23 for i in range(23)]
    checkpoint(pathlib.Path("many"))                        # of twelve classes, ten for a grid
    run("sample", "--run", "many")
    run("sample", "--run", "many", "--num", 12, "--out", "many.npz")
    assert Image.open("many/grid.png").height == 10 * 68
    assert np.load("many.npz")["arr_1"].tolist() == [*range(12)]


@pytest.mark.parametrize("changed, left", [(False, [4]), (True, [4, 4, 2])])
def test_stopped_sampling_goes_on_where_it_was(run, monkeypatch, changed, left):
    """With the same model only, and not in the middle of an image."""
    generate, made = train.generate, []

    def watched(model, labels, *more):
        assert more[:4] == (3, 2.5, "ddim", 7)
        if made == [3, 3]:
            raise KeyboardInterrupt
        made.append(len(labels))
        return generate(model, labels, *more)
    flags = ["sample", "--run", "runs/shapes", "--num", 10, "--steps", 3, "--cfg", 2.5, "--sampler",
             "ddim", "--seed", 7, "--batch-size"]
    run(*flags, 10, "--out", "whole.npz")
    monkeypatch.setattr(train, "generate", watched)
    with pytest.raises(SystemExit):
        run(*flags, 3)
    kept, = pathlib.Path("runs/shapes").glob(".samples*")
    kept.write_bytes(kept.read_bytes() + b"half an image")
    if changed:
        os.utime("runs/shapes/checkpoint.pt")
    made.clear()
    run(*flags, 4)
    assert made == left and kept.exists() == changed
    whole, pieces = np.load("whole.npz"), np.load("runs/shapes/samples.npz")
    assert abs(whole["arr_0"].astype(int) - pieces["arr_0"]).max() <= 1
    assert np.array_equal(whole["arr_1"], pieces["arr_1"])


def test_a_finished_runs_model_samples_without_its_checkpoint(run):
    """In half precision, which a picture of 256 levels hardly shows."""
    def sample():
        run("sample", "--run", "runs/shapes", "--num", 4, "--out", "s.npz")
        return np.load("s.npz")["arr_0"].astype(int)
    before = sample()
    pathlib.Path("runs/shapes/checkpoint.pt").unlink()
    assert abs(sample() - before).max() <= 2
    assert torch.load("runs/shapes/model.pt")["ema"]["pos_embed"].dtype == torch.half
    for content in (b"", b"PK"):
        pathlib.Path("runs/shapes/model.pt").write_bytes(content)
        with pytest.raises(SystemExit, match="model.pt: not a model of train.py, or a damaged one"):
            sample()


def test_pictures_do_not_depend_on_the_users_matplotlibrc(run):
    curve = pathlib.Path("runs/shapes/loss.png")
    before = curve.read_bytes()
    with matplotlib.rc_context({"savefig.format": "pdf", "text.usetex": True}):
        run(*TINY, "--steps", "3", "--lr", "0.01")
    assert curve.read_bytes() == before and before.startswith(b"\x89PNG")


@pytest.mark.parametrize("side", [8, 32, 256])
def test_a_grid_has_at_least_the_pixels_of_its_samples(tmp_path, side):
    images = np.random.default_rng(0).integers(0, 256, (6, side, side, 3), np.uint8)
    names = ["a" * 83, "$x^^y$", "b\udcff"]
    train.save_grid(tmp_path / "grid.png", images, [0, 0, 1, 1, 2, 2], names)
    grid, scale = np.asarray(Image.open(tmp_path / "grid.png")), max(1, 64 // side)
    assert grid.shape[1] < 2 * (side * scale + 4) + 300     # the names are no wider than that
    last = grid[-side * scale - 2:-2, -side * scale - 2:-2]
    assert np.array_equal(last[::scale, ::scale], images[5])


# ---- Runs ---------------------------------------------------------------------------------------

def test_a_run_leaves_everything_behind(cli, capsys):
    cli(*TINY, "--steps", "6", "--log-every", "2", "--sample-every", "4")
    run = pathlib.Path("runs/shapes")
    assert sorted(map(str, snapshot(run))) == ["checkpoint.pt", "log.csv", "loss.png", "model.pt",
                                               "samples-0000004.png", "samples.png"]
    assert [int(row["step"]) for row in rows(run)] == [2, 4, 6] and rows(run)[-1]["images"] == "48"
    for name in ("samples.png", "loss.png"):
        assert np.asarray(Image.open(run / name)).std() > 5
    assert "trained for 6 steps" in capsys.readouterr().out
    (run / "log.csv").write_text("no,log\n")                # the log belongs to the checkpoint
    cli(*TINY, "--steps", "9", "--log-every", "2")
    assert "resuming at step 6 of 9" in capsys.readouterr().out and load(run)["step"] == 9
    assert [int(row["step"]) for row in rows(run)] == [2, 4, 6, 8, 9]
    cli(*TINY, "--steps", "4")
    assert "trained for 9 steps" in capsys.readouterr().out


def test_train_and_dydilit_need_no_other_file(tmp_path):
    """Nor a terminal that has the letters of a run's name."""
    for name in ("train.py", "dydilit.py"):
        shutil.copy(ROOT / name, tmp_path)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    for argv in ([*TINY, "--steps", "2"], [*TINY, "--steps", "3"], ["sample"]):
        said = finish(*argv, "--run", "runs/猫", program=["train.py"], cwd=tmp_path, env=env)
        assert "runs/\\u732b" in said
    assert load(tmp_path / "runs/猫")["step"] == 3 and (tmp_path / "runs/猫/grid.png").exists()


def test_folders_train_at_their_size_and_with_their_own_images_only(cli, tmp_path):
    image_tree(tmp_path / "a" / "pets")
    Image.new("RGB", (48, 48)).save(image_tree(tmp_path / "b" / "pets") / "dog" / "3.png")
    os.rename(image_tree(tmp_path / "c" / "pets") / "cat" / "5.png", "c/pets/dog/!.png")   # a label
    cli(*TINY, "--data", "a/pets", "--image-size", "16", "--steps", "1")
    state = load("runs/pets")
    assert state["data"]["names"] == ["cat", "dog"] and state["model"]["image_size"] == 16
    before = snapshot(pathlib.Path("runs"))
    for flags, named in [(["--data", "b/pets"], "data_crc32"), (["--data", "c/pets"], "data_crc32"),
                         (["--lr", "0.5"], "lr 0.004"), (["--set", "dim=24"], "dim 16, not 24")]:
        with pytest.raises(SystemExit, match=f"this run has {named}.* choose another --run"):
            cli(*TINY, "--data", "a/pets", "--image-size", "16", "--steps", "2", *flags)
    assert snapshot(pathlib.Path("runs")) == before


def test_latents_train_without_grids_where_their_vae_is_gone(cli, tmp_path, capsys):
    latent_files(tmp_path / "z")
    cli(*TINY, "--data", "z", "--steps", "2", "--vae", "moved/away")
    said = capsys.readouterr().out
    assert "samples.png is left out: VAE moved/away: " in said and "or folder" in said
    assert load("runs/z")["step"] == 2 and not pathlib.Path("runs/z/samples.png").exists()


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_resume_bit_for_bit(small, tmp_path, kills):
    """By SIGKILL, every other time while a checkpoint is written, else at any moment."""
    args = [*small, "--cooldown", 0, "--log-every", 5, "--save-every", 5, "--sample-every", 70]
    killed, rng, started = tmp_path / "killed", np.random.default_rng(0), time.time()
    finish(*args, "--run", killed, "--steps", 5)
    usual = time.time() - started
    for kill in range(kills):
        part = killed / ".checkpoint.pt.part"
        part.unlink(missing_ok=True)                        # what the last kill left behind
        process = command(*args, "--run", killed, "--steps", 100_000)
        if kill % 2:
            time.sleep(rng.uniform(0, 2 * usual))
        else:
            for delay in (rng.uniform(0, 1), 0):
                wait_until(part.exists, process)
                time.sleep(delay)
        process.kill()
        process.communicate()
    steps = load(killed)["step"] + 20
    said = finish(*args, "--run", killed, "--steps", steps)
    assert f"resuming at step {steps - 20}" in said
    finish(*args, "--run", tmp_path / "whole", "--steps", steps)
    states = [load(run) for run in (tmp_path / "whole", killed)]
    torch.testing.assert_close(*([state["step"], state["weights"], state["ema"],
                                  state["optimizer"]["state"]] for state in states), rtol=0, atol=0)
    one, other = snapshot(tmp_path / "whole"), snapshot(killed)
    assert one.keys() == other.keys()
    assert all(one[path] == other[path] for path in one if path.suffix in (".png", ".csv"))


@pytest.mark.parametrize("number", [
    "SIGINT", *(pytest.param(n, marks=pytest.mark.slow) for n in ("SIGHUP", "SIGTERM"))])
def test_a_stopped_run_saves_and_keeps_its_folder(small, tmp_path, number):
    args = [*small, "--run", tmp_path / "run"]
    process = command(*args, "--steps", 10**6, "--save-every", 10**6, "--log-every", 10)
    wait_until((tmp_path / "run" / "log.csv").exists, process)
    output = finish(*args, "--steps", 10, code=1)
    assert output == (f"{tmp_path / 'run'}: [Errno 11] Resource temporarily unavailable "
                      "(BlockingIOError); another process is at work in it\n")
    process.send_signal(getattr(signal, number))
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 130 and "saved at step" in output and "Traceback" not in output
    step = load(tmp_path / "run")["step"]
    assert step >= 10 and f"resuming at step {step}" in finish(*args, "--steps", step + 1)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_weights(cli):
    cli(*TINY, "--steps", "4", "--save-every", "2")
    state = load("runs/shapes")
    state["weights"]["blocks.0.attn.qkv.weight"][0, 0] = float("inf")   # as after a diverged step
    torch.save(state, "runs/shapes/checkpoint.pt")
    before = pathlib.Path("runs/shapes/checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match="no longer finite; .* lower --lr, or resume from"):
        cli(*TINY, "--steps", "40", "--save-every", "2")
    assert pathlib.Path("runs/shapes/checkpoint.pt").read_bytes() == before


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_a_compiled_run(small, tmp_path):
    """It takes a minute to compile. The steps are those of the model as it stands."""
    args = [*small, "label_dropout=0", "--log-every", 1, "--cooldown", 0]  # dropout draws otherwise
    finish(*args, "--steps", 6, "--run", tmp_path / "plain")
    finish(*args, "--steps", 3, "--run", tmp_path / "compiled", "--compile")
    finish(*args, "--steps", 6, "--run", tmp_path / "compiled", "--compile")
    same_losses(tmp_path / "plain", tmp_path / "compiled")
    finish("sample", "--run", tmp_path / "compiled")


@pytest.mark.slow
def test_a_disk_that_fills(small, tmp_path):
    """At some byte of the checkpoint: the process may write no larger files than that."""
    args = [*small, "--run", tmp_path / "run"]
    finish(*args, "--steps", 2)
    before, saved = snapshot(tmp_path / "run"), pathlib.Path("checkpoint.pt")
    for share in (0.9999, 0.5):
        limit = int(share * len(before[saved]))
        output = finish(*args, "--steps", 4, "--log-every", 100, "--save-every", 3, code=1,
                        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (limit,)))
        says = output.splitlines()[-1]
        assert "check the" in says and "free space" in says and "Traceback" not in output
        after = snapshot(tmp_path / "run")
        assert after.keys() == before.keys() and after[saved] == before[saved]
    assert "resuming at step 2" in finish(*args, "--steps", 4)


# ---- Bad input ----------------------------------------------------------------------------------


class Evil:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def checkpoint(folder, **more):
    """What sampling needs of a checkpoint, of a tiny model, and more."""
    model = dydilit.build_model("DyDi-LiT-XS/4", dim=16, depth=1, n_classes=12)
    about = dict(data=dict(names=[*"abcdefghijkl"], vae=None), knobs=dict(sampling_steps=1, cfg=1))
    folder.mkdir()
    torch.save(dict(about, model=dataclasses.asdict(model.cfg), ema=model.state_dict(), step=0,
                    **more), folder / "checkpoint.pt")


def latent_files(folder, images=np.zeros((16, 2, 4, 4, 4), np.float16), n=16, **about):
    folder.mkdir()
    np.save(folder / "latents.npy", images)
    np.save(folder / "labels.npy", np.arange(n) % 2)
    about = dict(names=["a", "b"], image_size=32, vae="v", done=16, total=16) | about
    (folder / "latents.json").write_text(json.dumps(about))


@pytest.fixture(scope="session")
def bad_places(tmp_path_factory):
    """A folder with every foul thing that the table below names, and what is in its files."""
    tmp_path = tmp_path_factory.mktemp("bad")
    checkpoint(tmp_path / "evil", x=Evil())
    checkpoint(tmp_path / "plain")
    latent_files(tmp_path / "few-labels", n=15)
    latent_files(tmp_path / "unfinished", done=9)
    os.truncate(cifar_files(tmp_path / "short-cifar") / "data_batch_3.bin", 9999)
    image_tree(tmp_path / "pets", count=8)
    for path in ("alien/checkpoint.pt", "mine/thesis.txt", "file"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("years of work")
    return tmp_path, snapshot(tmp_path)


BAD = [
    (["--data", "nowhere"], "--data nowhere: no images; give shapes, cifar10 or a folder"),
    (["--data", "cifar10", "--data-dir", "short-cifar"], "short-cifar: cannot reshape .*; give"),
    (["--data", "pets", "--image-size", "3000000"], "out of memory; train with a larger"),
    (["--data", "few-labels"], "few-labels: its latents, labels and names do not fit together"),
    (["--data", "unfinished"], "only 9 images are encoded; run encode.py again"),
    (["--image-size", "64"], "--image-size: these images have 32; leave the flag away"),
    (["--run", "alien"], "alien/checkpoint.pt: .*; choose another --run, or move it away"),
    (["--run", "evil"], "evil/checkpoint.pt: Weights only load failed"),
    (["--run", "mine"], "mine: files, but no checkpoint; choose another --run"),
    (["--run", "file"], "File exists: 'file'"),
    (["--set", "n_classes=5"], "--image-size, --set: .*multiple values .* 'n_classes'"),
    (["--set", "dim=18"], "--image-size, --set: dim=18 is not a multiple of 4"),
    (["--data", "pets", "--image-size", "30"], "image_size=30 is not a multiple of"),
    (["--batch-size", "0"], "argument --batch-size: 0 is not in 1.."),
    (["--beta2", "2"], "--lr, --beta2: Invalid beta parameter at index 1: 2.0"),
    (["--batch-size", "8", "--accumulate", "3"], "--batch-size: no multiple of --accumulate x 1"),
    (["--device", "cuda"], "--device cuda: this torch finds none"),
    (["sample", "--run", "evil"], "--run: evil/checkpoint.pt: not a model of train.py"),
    (["sample", "--run", "plain", "--classes", "0", "12"], "--classes: there are 0 a, 1 b"),
    (["sample", "--run", "plain", "--steps", "2000"], "argument --steps: 2000 is not in 1..1000"),
    (["sample", "--run", "plain", "--num", "3", "--out", "file/x.npz"], "file/.x.npz.*check"),
]


def snapshot(root):
    found = [path for path in root.rglob("[!.]*") if path.is_file()]
    return {path.relative_to(root): path.read_bytes() for path in found}


@pytest.mark.parametrize("argv, message", BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input_gets_one_line_and_loses_nothing(cli, bad_places, tmp_path, argv, message):
    source, contents = bad_places
    shutil.copytree(source, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    more = []
    if argv[0] != "sample":
        more += ["--batch-size", "8"] * ("--batch-size" not in argv) + ["--sampling-steps", "2"]
        more += TINY[4:] * ("--set" not in argv) + ["--steps", "1"] * ("--steps" not in argv)
    with pytest.raises(SystemExit, match=message) as stop:
        cli(*argv, *more)
    assert isinstance(stop.value.code, str) and stop.value.code.count("\n") <= 1
    after = snapshot(tmp_path)
    assert {path: after.get(path) for path in contents} == contents
    assert not pathlib.Path("executed").exists()


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
@pytest.mark.parametrize("command", [["train", *TINY], ["sample", "--run", "runs/shapes"],
                                     ["sample", "--run", "runs/shapes", "--num", "3"]])
def test_a_mistake_of_the_program_keeps_its_traceback(run, monkeypatch, command, error):
    monkeypatch.setattr(dydilit.DyDiLA, "forward", mock.Mock(side_effect=error("no user's fault")))
    with pytest.raises(error):
        run(*command, "--steps", "9", *["--lr", "0.01"] * (command[0] == "train"))
    assert not [*pathlib.Path("runs").rglob("*.part")]      # nor does half a file stay

