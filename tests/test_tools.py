"""encode.py, which makes latents for train.py, and `measures.py reference`, which writes data."""
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch

import train
from lab import encode, measures
from test_train import TINY, cifar_files, image_tree, snapshot

ENCODE = ["--data", "net", "--image-size", 32, "--vae", "vae", "--batch-size"]


def tool(module, *argv):
    """What `python notebooks/lab/MODULE.py ...` does."""
    train.explained(module.main, [*map(str, argv)])


def reference(*argv):
    tool(measures, "reference", *argv, "--out", "new/ref.npz")
    return measures.load_npz("new/ref.npz")


def test_reference_draws_from_the_data(cli, tmp_path):
    data, drawn = train.cifar10(cifar_files(tmp_path / "data")), []
    place = {image.tobytes(): i for i, image in enumerate(data.images)}
    assert np.array_equal(reference("--data", "cifar10")[0], data.images)
    for seed in (0, 0, 1):
        images, labels = reference("--data", "cifar10", "--num", 30, "--seed", seed)
        drawn.append([place[image.tobytes()] for image in images])
        assert labels.tolist() == data.labels[drawn[-1]].tolist()
        assert drawn[-1] == sorted(set(drawn[-1])) and len(images) == 30 and drawn[-1][-1] > 60
    assert drawn[0] == drawn[1] != drawn[2]


def test_reference_of_a_folder_has_the_classes_that_encode_picks(cli, tmp_path):
    root, picks = image_tree(tmp_path / "pets", "edcba", 5), []
    for seed in (0, 0, 1, 2, 3):
        args = ["--data", "pets", "--classes", 3, "--seed", seed]
        images, labels = reference(*args, "--image-size", 24)
        picks.append(encode.pick_classes(root, 3, seed)[2])
        assert picks[-1] == sorted(set(picks[-1])) and len(picks[-1]) == 3
        want = [train.read_image(root / n / f"{i}.png", 24) for n in picks[-1] for i in range(5)]
        assert np.array_equal(images, want) and labels.tolist() == 5 * [0] + 5 * [1] + 5 * [2]
    assert picks[0] == picks[1] and len(set(map(tuple, picks))) > 2
    assert reference(*args, "--num", 8)[0].shape == (8, 32, 32, 3)


@pytest.fixture
def vae(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="these need: pip install diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4, norm_num_groups=4, latent_channels=4, sample_size=32,
        scaling_factor=0.5)
    vae.quant_conv.weight.data *= 10                        # means and deviations that vary
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_encode_train_and_decode(cli, vae, tmp_path):
    image_tree(tmp_path / "net", "abcde", 3)
    args = [*ENCODE, 2, "--classes", 3]
    tool(encode, *args, "--out", "latents")
    store, data = np.load("latents/latents.npy"), train.latents(pathlib.Path("latents"))
    assert store.shape == (9, 2, 4, 4, 4) and store.dtype == np.float16
    paths, _, names = encode.pick_classes(tmp_path / "net", 3)
    assert data.names == names and data.labels.tolist() == [i // 3 for i in range(9)]
    model = train.load_vae("vae", "cpu")
    x = train.pixels(np.stack([train.read_image(path, 32) for path in paths]))
    noise = torch.from_numpy(np.stack([                     # by seed and number
        np.random.default_rng((0, i)).standard_normal((2, 4, 4, 4), np.float32) for i in range(9)]))
    for view, images in enumerate((x, x.flip(3))):
        z = model.encode(images).latent_dist
        want = 0.5 * (z.mean + z.std * noise[:, view])
        assert z.std.std() > 0.1 and np.allclose(store[:, view], want, rtol=2e-3, atol=2e-3)
    assert abs(store[:, 0] - store[:, 1]).mean() > 0.1
    x, y = data.batch(torch.tensor([4, 5]), torch.tensor([False, True]))
    assert np.array_equal(x.numpy(), [store[4, 0], store[5, 1]]) and y.tolist() == [1, 1]
    assert data.model_shape() == dict(image_size=32, vae_factor=8, in_channels=4, n_classes=3)

    cli("--data", "latents", *TINY, "--steps", "2")
    cli("sample", "--run", "runs/latents", "--num", 4)
    assert np.load("runs/latents/samples.npz")["arr_0"].shape == (4, 32, 32, 3)

    before = snapshot(tmp_path / "latents")
    with pytest.raises(SystemExit, match="latents: another encoding .files_sha256, names, seed d"):
        tool(encode, *args, "--out", "latents", "--seed", 1)
    assert snapshot(tmp_path / "latents") == before


def test_neither_stops_nor_the_batch_size_change_latents(cli, vae, tmp_path, monkeypatch):
    image_tree(tmp_path / "net", "ab", 5)
    tool(encode, *ENCODE, 3, "--out", "whole")
    read, calls = encode.read_images, []

    def stopping(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(*args, **options)

    monkeypatch.setattr(encode, "read_images", stopping)
    with pytest.raises(SystemExit) as stop:
        tool(encode, *ENCODE, 3, "--out", "stopped")
    assert stop.value.code == 130
    with pytest.raises(SystemExit, match="only 6 images are encoded; run encode.py again"):
        cli("--data", "stopped", *TINY)
    tool(encode, *ENCODE, 1, "--out", "stopped")
    assert len(calls) == 7                                      # four images were left
    tool(encode, *ENCODE, 3, "--out", "other", "--seed", 1)
    whole, stopped, other = (np.load(f"{n}/latents.npy") for n in ("whole", "stopped", "other"))
    assert np.allclose(whole, stopped, rtol=2e-3, atol=1e-3) and abs(whole - other).max() > 0.1
    assert np.load("stopped/labels.npy").tolist() == 5 * [0] + 5 * [1]


def test_a_full_disk_is_told_before_the_work(cli, vae, tmp_path):
    image_tree(tmp_path / "net", "ab", 20)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))    # a write beyond it fails
    try:
        with pytest.raises(SystemExit, match="net/new/latents.npy: .*check the path and the free"):
            tool(encode, *ENCODE, 4, "--out", "net/new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tool(encode, *ENCODE, 4, "--out", "net/new")        # there is space now, and it is no class
    assert train.latents(tmp_path / "net/new").names == ["a", "b"]
    encode.reserve(tmp_path / "x.npy", (1000, 2, 4, 4, 4))          # has no hole to be filled later
    assert (tmp_path / "x.npy").stat().st_blocks * 512 >= 256_000 and not np.load("x.npy").any()


def test_without_diffusers_latents_say_what_to_install(cli, tmp_path, monkeypatch):
    image_tree(tmp_path / "net")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match="pip install diffusers"):
        tool(encode, "--data", "net", "--out", "latents")


def test_a_terminal_may_lack_a_names_letters(tmp_path):
    image_tree(tmp_path / "猫")
    words = [pathlib.Path(measures.__file__), "reference", "--data", "猫", "--out", "猫.npz"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True,
                          env=dict(os.environ, PYTHONIOENCODING="cp1252"))
    assert done.returncode == 0 and b"\\u732b.npz: 12 images of 32x32" in done.stdout
    assert len(measures.load_npz(tmp_path / "猫.npz")[0]) == 12


BAD = {
    "reference --data pets --num 99 --out r.npz": "--num 99: the data has 16 images",
    "reference --data pets --classes 3 --out r.npz": "--classes 3: pets has 2",
    "reference --data shapes --classes 3 --out r.npz": "--classes 3: only of a folder",
    "reference --data pets --out pets/cat/0.png/r.npz": "pets/cat/0.png/r.npz: .*File exists",
    "--data pets --out half": "half/latents.json: .*; choose another --out",
    "--data pets --out mine": "mine: not empty; choose another --out",
    "--data pets --vae vae --image-size 36 --out new": "not a multiple of the VAE's factor, 8",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_line_and_loses_nothing(cli, vae, tmp_path, words, monkeypatch):
    image_tree(tmp_path / "pets", count=8)
    for path, text in (("half/latents.json", '{"done": '), ("mine/thesis.txt", "years of work")):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(text)
    before = snapshot(tmp_path)
    for module in (train, encode):
        monkeypatch.setattr(module, "read_images", None)        # it is told before any work
    with pytest.raises(SystemExit, match=BAD[words]) as stop:
        tool(measures if "reference" in words else encode, *words.split())
    assert "\n" not in str(stop.value) and snapshot(tmp_path) == before
