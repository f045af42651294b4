"""train.py as its user meets it: data in, runs, stops and resumes, samples, and what bad input is told."""
import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import dydilit
import train

ROOT = pathlib.Path(train.__file__).resolve().parent
TINY = ["--batch-size", "8", "--sampling-steps", "2", "--set", "dim=16", "depth=1", "n_gammas=2", "n_lambdas=2",
        "n_projectors=2"]
CHILDREN = []


def command(*argv, **kwargs):
    CHILDREN.append(subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, argv)], stdout=subprocess.PIPE,
                                     stderr=subprocess.STDOUT, text=True, **kwargs))
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


def same(a, b):
    """Bit for bit, through nested dictionaries and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def rows(run):
    with open(pathlib.Path(run) / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def image_tree(root, classes=("cat", "dog"), count=6, size=(40, 48)):
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / name / f"{i}.png")
    return root


def cifar_files(folder, count=20):
    """A small data set in the layout of CIFAR-10's binary version: label, then red, green and blue planes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in [*train.CIFAR_FILES, "test_batch.bin"]:
        records = rng.integers(0, 256, (count, 3073), np.uint8)
        records[:, 0] = np.arange(count) % 10
        records.tofile(folder / name)
    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    return folder


# ---- data ----

def test_shapes_are_balanced_varied_and_seeded():
    data, other = train.shapes(1000), train.shapes(1000, seed=1)
    assert data.images.shape == (1000, 32, 32, 3) and data.images.dtype == np.uint8
    assert (np.bincount(data.labels) == 100).all() and len(data.names) == 10 and not data.flip
    assert len({image.tobytes() for image in [*data.images, *other.images]}) == 2000
    assert np.array_equal(data.images, train.shapes(1000).images)
    assert data.images.reshape(1000, -1).std(1).min() > 20                  # a shape is seen against its background


@pytest.mark.parametrize("how, sha256", [
    (dict(n=3000), "1691b726df456d9b40a848c80d34e4b7b166fdb435ef6edb5b1bbfba60995ab4"),
    (dict(n=100, seed=1, size=48), "c36f5cfc7b5459c2d54b7fbb63295e867560a6b082481c87410fdd812b5dba02")])
def test_shapes_are_those_of_all_results(how, sha256):
    data = train.shapes(**how)
    assert hashlib.sha256(data.images.tobytes() + data.labels.tobytes()).hexdigest() == sha256


def test_cifar_is_read_plane_by_plane(tmp_path):
    folder = cifar_files(tmp_path / "cifar-10-batches-bin")
    raw = np.fromfile(folder / "data_batch_2.bin", np.uint8).reshape(-1, 3073)
    for data_dir in (tmp_path, folder):
        data = train.cifar10(data_dir)
        assert data.images.shape == (100, 32, 32, 3) and data.names == list("abcdefghij") and data.flip
        assert data.labels[20:40].tolist() == raw[:, 0].tolist()
        assert data.images[21, 5, 7].tolist() == [raw[1, 1 + c * 1024 + 5 * 32 + 7] for c in range(3)]


def test_cifar_is_downloaded_checked_and_unpacked(tmp_path, monkeypatch):
    source = cifar_files(tmp_path / "source")
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        for path in source.iterdir():
            tar.add(path, f"cifar-10-batches-bin/{path.name}")
    monkeypatch.setattr(train, "CIFAR_URL", (tmp_path / "c.tar.gz").as_uri())
    with pytest.raises(train.Problem, match="not CIFAR-10's binary version .*; delete it"):
        train.cifar10(tmp_path / "data")
    monkeypatch.setattr(train, "CIFAR_SHA256", hashlib.sha256((tmp_path / "c.tar.gz").read_bytes()).hexdigest())
    assert len(train.cifar10(tmp_path / "data").images) == 100
    assert len(train.cifar10(tmp_path / "data", ["test_batch.bin"]).images) == 20
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["cifar-10-batches-bin", "cifar-10-binary.tar.gz"]
    monkeypatch.setattr(train, "CIFAR_URL", (tmp_path / "nothing").as_uri())
    with pytest.raises(train.Problem, match="elsewhere.*No such file.* fetch .*nothing by other means"):
        train.cifar10(tmp_path / "elsewhere")


@pytest.mark.parametrize("mode, suffix", [("RGB", "png"), ("RGBA", "png"), ("LA", "png"), ("L", "png"), ("P", "png"),
                                          ("1", "png"), ("I;16", "png"), ("RGB", "jpg"), ("CMYK", "jpg"), ("L", "jpg"),
                                          ("RGB", "bmp"), ("P", "gif"), ("RGB", "webp"), ("I;16", "tif")])
def test_images_of_every_mode(tmp_path, mode, suffix):
    colour = Image.new("RGB", (50, 40), (200, 100, 50))
    if mode == "I;16":
        image = Image.fromarray(np.full((40, 50), 200 * 257, np.uint16))
    else:
        image = colour.convert(mode)
    image.save(tmp_path / f"x.{suffix}")
    got = train.read_image(tmp_path / f"x.{suffix}", 32)
    assert got.shape == (32, 32, 3) and got.dtype == np.uint8
    want = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(0) if mode != "I;16" else [200] * 3
    assert abs(got.reshape(-1, 3).mean(0) - want).max() <= 3


def test_transparent_pixels_are_white_and_suffixes_are_not_trusted(tmp_path):
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:16] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "x.jpg", format="png")
    got = train.read_image(tmp_path / "x.jpg", 32)
    assert (got[:16] == [255, 0, 0]).all() and (got[16:] == 255).all()


@pytest.mark.parametrize("width, height, size", [(32, 32, 32), (100, 75, 32), (500, 375, 64), (20, 30, 32), (333, 64, 64)])
def test_crop_is_adms(tmp_path, width, height, size):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / "x.png")
    image = Image.open(tmp_path / "x.png")                  # center_crop_arr of guided-diffusion's image_datasets.py:
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    want = np.array(image)
    top, left = (want.shape[0] - size) // 2, (want.shape[1] - size) // 2
    assert np.array_equal(train.read_image(tmp_path / "x.png", size), want[top:top + size, left:left + size])


def test_image_folders_are_sorted(tmp_path):
    image_tree(tmp_path, "edcba", 2)
    names = train.class_folders(tmp_path)
    paths, labels = train.image_folder(tmp_path, names)
    assert names == list("abcde") and labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [p.parent.name for p in paths] == list("aabbccddee")


def test_batches_are_scaled_and_mirrored():
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    data = train.Data(images, np.arange(5), list("abcde"), 8)
    x, y = data.batch(torch.tensor([3, 1]), torch.tensor([False, True]))
    assert y.tolist() == [3, 1] and x.dtype == torch.float32
    assert x[0, 2, 5, 6].item() == pytest.approx(images[3, 5, 6, 2] / 127.5 - 1)
    assert x[1, 2, 5, 6].item() == pytest.approx(images[1, 5, 1, 2] / 127.5 - 1)
    data.flip = False
    assert data.batch(torch.tensor([1]), torch.tensor([True]))[0][0, 2, 5, 6].item() == pytest.approx(
        images[1, 5, 6, 2] / 127.5 - 1)


def test_every_epoch_sees_every_image_once():
    steps = [train.batch_indices(10, 4, step, 7) for step in range(5)]
    seen = torch.cat(steps)
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert sorted(train.batch_indices(3, 8, 0, 7)[:6].tolist()) == [0, 0, 1, 1, 2, 2]      # a batch of two epochs and more


# ---- runs ----

def test_a_run_leaves_everything_behind(cli, capsys):
    cli(*TINY, "--steps", "6", "--log-every", "2", "--sample-every", "4")
    run = pathlib.Path("runs/shapes")
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint.pt", "log.csv", "loss.png", "model.pt", "samples-0000004.png",
                                                     "samples.png"]
    assert [int(r["step"]) for r in rows(run)] == [2, 4, 6] and rows(run)[-1]["images"] == "48"
    for name in ("samples.png", "loss.png"):
        assert np.asarray(Image.open(run / name)).std() > 5
    assert "6 steps done" in capsys.readouterr().out
    cli(*TINY, "--steps", "9")
    assert "resuming at step 6 of 9" in capsys.readouterr().out and load(run)["step"] == 9


def test_train_and_dydilit_need_no_other_file(tmp_path):
    for name in ("train.py", "dydilit.py"):
        shutil.copy(ROOT / name, tmp_path)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for argv in ([*TINY, "--steps", "2"], [*TINY, "--steps", "3"], ["sample", "--run", "runs/shapes", "--classes", "star"]):
        done = subprocess.run([sys.executable, "train.py", *argv], cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert load(tmp_path / "runs/shapes")["step"] == 3 and (tmp_path / "runs/shapes/grid.png").exists()


def test_pictures_do_not_depend_on_the_users_matplotlibrc(tmp_path):
    log = [dict(step=step, loss="2", simple="1", variational="1") for step in (1, 2)]
    with matplotlib.rc_context({"savefig.format": "pdf", "text.usetex": True, "axes.edgecolor": "red"}):
        train.save_curve(tmp_path / "own.png", log)
        train.save_grid(tmp_path / "grid.png", np.zeros((4, 8, 8, 3), np.uint8), [0, 0, 1, 1], ["a", "b"])
        assert matplotlib.rcParams["savefig.format"] == "pdf"
    train.save_curve(tmp_path / "default.png", log)
    assert (tmp_path / "own.png").read_bytes() == (tmp_path / "default.png").read_bytes()
    assert Image.open(tmp_path / "grid.png").format == "PNG"


def test_training_learns(cli):
    # 2x2 patches: a 4x4 patch's 48 numbers of noise do not fit into the 16 of this model's tokens.
    cli(*TINY, "patch_size=2", "--steps", "150", "--log-every", "30", "--lr", "1e-2")
    losses = [float(r["loss"]) for r in rows("runs/shapes")]
    assert losses[-1] < 0.6 * losses[0]


def test_folders_train_at_their_size(cli, tmp_path):
    image_tree(tmp_path / "pets")
    cli(*TINY, "--data", "pets", "--image-size", "16", "--steps", "2")
    state = load("runs/pets")
    assert state["data"]["names"] == ["cat", "dog"] and state["model"]["image_size"] == 16
    assert state["model"]["n_classes"] == 2


def test_class_names_are_drawn_as_they_are(cli, tmp_path):
    """Dollars would be mathematics, and a name need not be valid text."""
    image_tree(tmp_path / "odd", ["$a^^b$", "10$ and 20$", "a\udcff"])
    cli(*TINY, "--data", "odd", "--steps", "1", "--batch-size", "4")
    cli("sample", "--run", "runs/odd", "--num", "3")
    assert pathlib.Path("runs/odd/samples.png").exists()


def test_a_run_goes_on_with_its_own_data_only(cli, tmp_path):
    image_tree(tmp_path / "a" / "train")
    image_tree(tmp_path / "b" / "train", size=(48, 40))
    cli(*TINY, "--data", "a/train", "--steps", "1")
    with pytest.raises(SystemExit, match="runs/train/checkpoint.pt: this run has images_sha256 .* choose another --run"):
        cli(*TINY, "--data", "b/train", "--steps", "2")


def test_pictures_are_made_up_for_after_a_stop(cli):
    cli(*TINY, "--steps", "4", "--sample-every", "2")
    first = pathlib.Path("runs/shapes/samples-0000002.png")
    assert first.exists() and not pathlib.Path("runs/shapes/samples-0000004.png").exists()
    cli(*TINY, "--steps", "6", "--sample-every", "2")
    assert pathlib.Path("runs/shapes/samples-0000004.png").exists()


def test_moving_average(cli):
    cli(*TINY, "--steps", "1", "--ema", "0.75")
    state, start = load("runs/shapes"), None
    torch.manual_seed(0)
    start = dydilit.DyDiLiT(dydilit.ModelConfig(**state["model"])).state_dict()
    for name, value in state["ema"].items():
        torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * state["weights"][name])


def same_step(one, other):
    """Loss and gradient norm of two runs agree. (Weights after AdamW would not show a gradient of another scale.)"""
    for a, b in zip(rows(one), rows(other), strict=True):
        for name in ("loss", "simple", "variational", "grad_norm"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3)


def test_accumulation_gives_the_same_step(cli):
    for k in (1, 2, 4):
        cli(*TINY, "label_dropout=0", "--steps", "3", "--log-every", "1", "--run", f"run{k}", "--accumulate", k)
    for k in (2, 4):
        same_step(f"run{k}", "run1")


def test_two_processes_see_the_same_batch(tmp_path):
    cifar_files(tmp_path)
    args = ["--data", "cifar10", "--data-dir", tmp_path, *TINY, "label_dropout=0", "--steps", "3", "--log-every", "1"]
    finish(*args, "--run", tmp_path / "one")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--", ROOT / "train.py",
                           *map(str, args), "--accumulate", "2", "--run", tmp_path / "two"], timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same_step(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_resume_bit_for_bit(tmp_path, kills):
    """By SIGKILL, every other time while a checkpoint is being written, else at any moment from the start on."""
    args = ["--data", "cifar10", "--data-dir", cifar_files(tmp_path / "data"), *TINY, "--cooldown", 0, "--log-every", 5,
            "--save-every", 5, "--sample-every", 70]
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
    assert f"resuming at step {steps - 20}" in finish(*args, "--run", killed, "--steps", steps)
    finish(*args, "--run", tmp_path / "whole", "--steps", steps)
    one, other = load(tmp_path / "whole"), load(killed)
    assert all(same(one[k], other[k]) for k in ("step", "weights", "ema", "optimizer", "window"))
    assert rows(tmp_path / "whole") == rows(killed)
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())
    for path in killed.glob("samples*.png"):
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(tmp_path):
    args = ["--data", "cifar10", "--data-dir", cifar_files(tmp_path / "data"), *TINY, "--run", tmp_path / "run"]
    process = command(*args, "--steps", 100_000, "--save-every", 5)
    wait_until((tmp_path / "run" / "checkpoint.pt").exists, process)
    output = finish(*args, "--steps", 10, code=1)
    assert output.startswith(f"train.py: {tmp_path / 'run'}: ") and output.count("\n") == 1 and "another process" in output
    process.kill()                                          # with SIGKILL nothing is tidied up, yet the folder is free
    process.communicate()
    assert "resuming at step" in finish(*args, "--steps", load(tmp_path / "run")["step"] + 1)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_saves_and_exits(tmp_path, number):
    args = ["--data", "cifar10", "--data-dir", cifar_files(tmp_path / "data"), *TINY, "--run", tmp_path / "run"]
    process = command(*args, "--steps", 100_000, "--save-every", 100_000, "--log-every", 10)
    wait_until((tmp_path / "run" / "log.csv").exists, process)
    process.send_signal(number)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 130 and "saved at step" in output and "Traceback" not in output
    step = load(tmp_path / "run")["step"]
    assert step >= 10 and f"resuming at step {step}" in finish(*args, "--steps", step + 1)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_weights(cli):
    cli(*TINY, "--steps", "4", "--save-every", "2")
    state = load("runs/shapes")
    state["weights"]["blocks.0.attn.qkv.weight"][0, 0] = float("inf")       # as a diverged step would leave them
    torch.save(state, "runs/shapes/checkpoint.pt")
    before = pathlib.Path("runs/shapes/checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match="no longer finite at step .* lower --lr .*checkpoint.pt is still good"):
        cli(*TINY, "--steps", "40", "--save-every", "2")
    assert pathlib.Path("runs/shapes/checkpoint.pt").read_bytes() == before


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run(tmp_path):
    """It takes a minute to compile; the steps are those of the model as it stands, resumed or not."""
    args = ["--data", "cifar10", "--data-dir", cifar_files(tmp_path / "data"), *TINY, "label_dropout=0",
            "--log-every", 1, "--cooldown", 0]              # compiled dropout draws other random numbers
    finish(*args, "--steps", 6, "--run", tmp_path / "plain")
    finish(*args, "--steps", 3, "--run", tmp_path / "compiled", "--compile")
    finish(*args, "--steps", 6, "--run", tmp_path / "compiled", "--compile")
    for one, other in zip(rows(tmp_path / "plain"), rows(tmp_path / "compiled"), strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-4)
    finish("sample", "--run", tmp_path / "compiled")


@pytest.mark.slow
def test_without_a_compiler(tmp_path):
    output = finish("--data", "cifar10", "--data-dir", cifar_files(tmp_path / "data"), *TINY, "--run", tmp_path / "run",
                    "--compile", code=1, env={**os.environ, "CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert output.splitlines()[-1].startswith("train.py: InvalidCxxCompiler: No working C++ compiler")
    assert "Traceback" not in output


# ---- samples ----

@pytest.fixture
def run(cli):
    cli(*TINY, "--steps", "3", "--lr", "0.01")
    return cli


def test_sample_writes_grids_and_adms_layout(run, capsys):
    run("sample", "--run", "runs/shapes", "--classes", "star,3")
    run("sample", "--run", "runs/shapes", "--num", 23, "--steps", 3, "--cfg", 1, "--batch-size", 7, "--sampler", "ddim")
    assert "23 samples, step 3, 3 steps, guidance 1" in capsys.readouterr().out
    samples = np.load("runs/shapes/samples.npz")
    assert samples["arr_0"].shape == (23, 32, 32, 3) and samples["arr_0"].dtype == np.uint8
    assert sorted(np.bincount(samples["arr_1"])) == [2] * 7 + [3] * 3 and (np.diff(samples["arr_1"]) >= 0).all()
    assert pathlib.Path("runs/shapes/grid.png").stat().st_size > 1000


def test_samples_depend_on_seed_and_weights_alone(run):
    def sample(*more):
        run("sample", "--run", "runs/shapes", "--num", 4, "--out", "s.npz", *more)
        return np.load("s.npz")["arr_0"]
    assert np.array_equal(sample(), sample())
    assert not np.array_equal(sample(), sample("--seed", 1))


def test_a_finished_runs_model_samples_without_its_checkpoint(run, capsys):
    """In half precision, which a picture of 256 levels hardly shows. load_model says what a damaged file is."""
    def sample():
        run("sample", "--run", "runs/shapes", "--num", 4, "--out", "s.npz")
        return np.load("s.npz")["arr_0"].astype(int)
    averaged = load("runs/shapes")["ema"]
    model, about = dydilit.load_model("runs/shapes/model.pt")
    assert not model.training and about["data"]["names"] == train.shapes(10).names and about["step"] == 3
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, averaged[name], rtol=1e-3, atol=1e-6)
    before = sample()
    pathlib.Path("runs/shapes/checkpoint.pt").unlink()
    assert np.abs(sample() - before).max() <= 2
    for content in (b"", b"PK"):
        pathlib.Path("runs/shapes/model.pt").write_bytes(content)
        with pytest.raises(SystemExit, match="runs/shapes/model.pt: not a model of train.py, or a damaged one"):
            sample()


def test_a_lab_tool_trains_and_samples_other_attentions(cli):
    """By handing main() the parts of the blocks. Without them its checkpoint does not fit."""
    class Mean(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.mean(1, keepdim=True).expand_as(x))

    def parts(cfg, i):
        return Mean(cfg.dim, cfg.dim), dydilit.block_parts(cfg, i)[1]
    train.main(["--steps", "1", *TINY], parts)
    train.main(["--steps", "2", *TINY], parts)
    train.main(["sample", "--run", "runs/shapes", "--num", "2"], parts)
    assert np.load("runs/shapes/samples.npz")["arr_0"].shape == (2, 32, 32, 3)
    assert isinstance(dydilit.load_model("runs/shapes/model.pt", parts)[0].blocks[0].attn, Mean)
    with pytest.raises(ValueError, match="not a model of train.py"):
        dydilit.load_model("runs/shapes/model.pt")


# ---- bad input ----

def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


class Evil:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def checkpoint(folder, change):
    """A checkpoint of a tiny model, with something changed."""
    model = dydilit.build_model("DyDi-LiT-XS/4", dim=16, depth=1)
    state = dict(format="dydilit", step=0, window=torch.zeros(5), log=[], identity={}, knobs=dict(sampling_steps=1, cfg=1.0),
                 data=dict(names=list("abcdefghij"), vae=None), model=dataclasses.asdict(model.cfg),
                 weights=model.state_dict(), ema=model.state_dict(), optimizer=torch.optim.AdamW(model.parameters()).state_dict())
    folder.mkdir()
    torch.save(change(state) or state, folder / "checkpoint.pt")


def latent_files(folder, images=np.zeros((16, 2, 4, 4, 4), np.float16), labels=np.arange(16) % 2, **about):
    folder.mkdir()
    np.save(folder / "latents.npy", images)
    np.save(folder / "labels.npy", labels)
    (folder / "latents.json").write_text(json.dumps({**dict(names=["a", "b"], image_size=32, vae="v", done=16, total=16),
                                                         **about}))


@pytest.fixture(scope="session")
def bad_places(tmp_path_factory):
    """A folder with every foul thing that the table below names, and what is in its files."""
    tmp_path = tmp_path_factory.mktemp("bad")
    checkpoint(tmp_path / "evil", lambda s: s.update(x=Evil()))
    checkpoint(tmp_path / "no-identity", lambda s: s.pop("identity") and None)
    checkpoint(tmp_path / "few-names", lambda s: s["data"]["names"].pop() and None)
    (tmp_path / "alien").mkdir()
    (tmp_path / "alien" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    latent_files(tmp_path / "evil-latents", np.array([Evil()] * 16))
    latent_files(tmp_path / "few-labels", labels=np.arange(15) % 2)
    latent_files(tmp_path / "unfinished", done=9)
    latent_files(tmp_path / "cut-latents")
    truncated(tmp_path / "cut-latents" / "latents.npy")
    truncated(cifar_files(tmp_path / "short-cifar") / "data_batch_3.bin")
    np.full((20, 3073), 77, np.uint8).tofile(cifar_files(tmp_path / "alien-cifar") / "data_batch_2.bin")
    image_tree(tmp_path / "one-class", ["cat"])
    image_tree(tmp_path / "pets", count=8)
    (image_tree(tmp_path / "hollow") / "bird").mkdir()
    truncated(image_tree(tmp_path / "cut", count=8) / "dog" / "2.png")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    return tmp_path, snapshot(tmp_path)


BAD = [
    (["--data", "nowhere"], "--data nowhere: neither shapes, cifar10 nor a folder of two classes"),
    (["--data", "one-class"], "--data one-class: neither .* nor a folder of two classes or more"),
    (["--data", "cifar10", "--data-dir", "short-cifar"], "short-cifar: cannot reshape .*; replace these files"),
    (["--data", "cifar10", "--data-dir", "alien-cifar"], "alien-cifar: there are labels beyond 9"),
    (["--data", "hollow"], "bird: no images in this class folder"),
    (["--data", "cut"], "2.png: .*; replace or remove this image"),
    (["--data", "pets", "--image-size", "3000000"], "out of memory; train with a larger --accumulate"),
    (["--data", "evil-latents"], "evil-latents: .*Python objects in dtype.*; encode again into another folder"),
    (["--data", "few-labels"], "few-labels: its latents, labels and names do not fit together"),
    (["--data", "cut-latents"], "cut-latents: .*; encode again"),
    (["--data", "unfinished"], "only 9 of 16 images are encoded; run the encode command again"),
    (["--image-size", "64"], "--image-size 64: these images have 32; leave it away"),
    (["--run", "alien"], "alien/checkpoint.pt: .*; move it away"),
    (["--run", "evil"], "evil/checkpoint.pt: Weights only load failed"),
    (["--run", "no-identity"], "no-identity/checkpoint.pt: 'identity' .KeyError.; move it away"),
    (["--run", "mine"], "mine: files, but no checkpoint; choose another --run"),
    (["--run", "file"], "File exists: 'file'"),
    (["--model", "DiT-XXL"], "--model, --set: no model 'DiT-XXL'; choose one of"),
    (["--set", "dim=18"], "--model, --set: dim=18 is not a multiple of 4"),
    (["--set", "dim=2147483644"], "out of memory; train with"),
    (["--set", "dims=3"], "argument --set: dims=3: no FIELD=VALUE; fields: attention, .*depth"),
    (["--set", "image_size=64"], "argument --set: image_size=64: no FIELD=VALUE"),
    (["--batch-size", "0"], "argument --batch-size: 0 is not in 1.."),
    (["--lr", "nan"], "argument --lr: nan is not in 0.."),
    (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["--batch-size", "8", "--accumulate", "3"], "--batch-size: no multiple of --accumulate x 1 processes"),
    (["--device", "cuda"], "--device cuda: this torch finds none"),
    (["--fast"], "unrecognized arguments: --fast"),
    (["sample", "--run", "nowhere"], "No such file or directory: 'nowhere/model.pt'"),
    (["sample", "--run", "evil"], "--run: evil/checkpoint.pt: not a model of train.py, or a damaged one"),
    (["sample", "--run", "few-names"], "few-names/checkpoint.pt: not a model of train.py, or a damaged one"),
]


def snapshot(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("argv, message", BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input_gets_one_line_and_loses_nothing(cli, bad_places, tmp_path, argv, message):
    source, contents = bad_places
    shutil.copytree(source, tmp_path, symlinks=True, copy_function=os.link, dirs_exist_ok=True)
    training = not argv or argv[0].startswith("-")
    batch = ["--batch-size", "8"] if training and "--batch-size" not in argv else []
    tiny = TINY[2:] if training and "--set" not in argv and "--sampling-steps" not in argv else []
    steps = ["--steps", "1"] if training and "--steps" not in argv else []
    with pytest.raises(SystemExit, match=message) as stop:
        cli(*argv, *batch, *tiny, *steps)
    assert str(stop.value).startswith("train.py: ") and "\n" not in str(stop.value)
    after = snapshot(tmp_path)
    assert {path: after.get(path) for path in contents} == contents and not pathlib.Path("executed").exists()


@pytest.mark.parametrize("flags, message", [
    (["--lr", "0.5"], "this run has lr 0.004, not 0.5; repeat its flags, or choose another --run"),
    (["--set", "dim=24"], "has dim 16, not 24")])
def test_flags_that_contradict_the_checkpoint_are_named(cli, flags, message):
    cli(*TINY, "--steps", "1")
    before = snapshot(pathlib.Path("runs"))
    with pytest.raises(SystemExit, match=message):
        cli(*TINY, "--steps", "2", *flags)
    assert snapshot(pathlib.Path("runs")) == before


def test_the_log_belongs_to_the_checkpoint(cli):
    """So what happens to log.csv does not matter: the next line brings back the others."""
    cli(*TINY, "--steps", "2", "--log-every", "1")
    before = rows("runs/shapes")
    pathlib.Path("runs/shapes/log.csv").write_text("no,log\n1,2,3\n")
    cli(*TINY, "--steps", "3", "--log-every", "1")
    assert rows("runs/shapes")[:2] == before and len(rows("runs/shapes")) == 3


@pytest.mark.parametrize("argv, message", [
    (["--out", "x.npz"], "--out x.npz: give a name in .npz with --num, and one in .png without it"),
    (["--classes", "0,dragon"], "--classes dragon: this run knows 0..9")])
def test_bad_wishes_for_samples_are_named(run, argv, message):
    with pytest.raises(SystemExit, match=message):
        run("sample", "--run", "runs/shapes", *argv)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no limit on a file's size there")
def test_a_disk_that_fills(tmp_path):
    """The disk fills at some byte of the checkpoint: the process may write no larger files than that."""
    import resource
    args = ["--data", "cifar10", "--data-dir", cifar_files(tmp_path / "data"), *TINY, "--run", tmp_path / "run"]
    finish(*args, "--steps", 2)
    before = snapshot(tmp_path / "run")
    for share in (0.9999, 0.5):
        limit = int(share * len(before[pathlib.Path("checkpoint.pt")]))
        output = finish(*args, "--steps", 4, "--log-every", 100, "--save-every", 3, code=1,
                        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        says = output.splitlines()[-1]
        assert says.startswith("train.py: ") and "space" in says and "Traceback" not in output
        after = snapshot(tmp_path / "run")
        assert after == before
    assert "resuming at step 2" in finish(*args, "--steps", 4)


@pytest.mark.parametrize("error", [RecursionError, ValueError])
def test_a_mistake_of_the_program_keeps_its_traceback(cli, monkeypatch, error):
    def mistaken(*args):
        raise error("no user's fault")
    monkeypatch.setattr(train, "sample", mistaken)          # a RecursionError is a RuntimeError, as a full memory is
    with pytest.raises(error):
        cli("sample", "--run", "x")


def test_help_lists_every_knob(capsys):
    for argv in (["--help"], ["train", "--help"], ["sample", "--help"]):
        with pytest.raises(SystemExit) as stop:
            train.main(argv)
        assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in shown for name in [*train.KNOBS, "accumulate"])
