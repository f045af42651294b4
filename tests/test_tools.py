"""encode.py, which makes latents for train.py, and `measures.py reference`, which writes data."""
import pathlib
import resource
import sys

import numpy as np
import pytest
import torch

import train
from lab import encode, measures
from test_train import TINY, cifar_files, image_tree, snapshot

ENCODE = ["--data", "net", "--image-size", 32, "--vae", "vae"]


def tool(module, *argv):
    """What `python notebooks/lab/MODULE.py ...` does."""
    train.explained(module.main, [*map(str, argv)])


def reference(*argv):
    tool(measures, "reference", *argv, "--out", "new/ref.npz")
    return measures.load_npz("new/ref.npz")


def test_reference_draws_from_the_classes_that_encode_picks(cli, tmp_path):
    root, picked, drawn = image_tree(tmp_path / "pets", "edcba", 5), [], []
    for seed in (0, 0, 1, 2, 3):
        args = ["--data", "pets", "--classes", 3, "--image-size", 24, "--seed", seed]
        (images, labels), (some, of_some) = reference(*args), reference(*args, "--num", 9)
        picked.append(encode.pick_classes(root, 3, seed)[2])
        want = [train.read_image(root / n / f"{i}.png", 24) for n in picked[-1] for i in range(5)]
        assert np.array_equal(images, want) and labels.tolist() == 5 * [0] + 5 * [1] + 5 * [2]
        drawn.append([(images == image).all((1, 2, 3)).argmax() for image in some])
        assert of_some.tolist() == labels[drawn[-1]].tolist() and len(some) == 9
        assert all(chosen[-1] == sorted(set(chosen[-1])) for chosen in (picked, drawn))
    assert all(a == b and a not in others for a, b, *others in (picked, drawn))
    assert reference("--data", "pets")[0].shape == (25, 32, 32, 3)
    data = train.cifar10(cifar_files(tmp_path / "data"))
    assert np.array_equal(reference("--data", "cifar10")[0], data.images)


@pytest.fixture
def vae(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="these need: pip install diffusers")
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4, norm_num_groups=4, latent_channels=4, sample_size=32,
        scaling_factor=0.5)
    vae.quant_conv.weight.data *= 10                        # means and deviations that vary
    vae.save_pretrained(tmp_path / "vae")


def test_latents_by_hand_in_spite_of_a_stop(cli, vae, tmp_path, monkeypatch):
    image_tree(tmp_path / "net", "abcde", 3)
    args, read, sizes = [*ENCODE, "--classes", 3, "--out", "latents"], encode.read_images, []

    def stopping(paths, *args, **options):
        sizes.append(len(paths))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return read(paths, *args, **options)

    monkeypatch.setattr(encode, "read_images", stopping)
    with pytest.raises(SystemExit, match="130"):
        tool(encode, *args, "--batch-size", 2)
    with pytest.raises(SystemExit, match="only 4 images are encoded; run encode.py again"):
        cli("--data", "latents", *TINY)
    tool(encode, *args, "--batch-size", 1)
    assert sizes == 3 * [2] + 5 * [1]                       # five images were left
    store, data = np.load("latents/latents.npy"), train.latents(pathlib.Path("latents"))
    paths, _, names = encode.pick_classes(tmp_path / "net", 3)
    assert data.names == names and data.labels.tolist() == [i // 3 for i in range(9)]
    x = train.pixels(np.stack([train.read_image(path, 32) for path in paths]))
    noise = torch.from_numpy(np.stack([                     # by seed and number
        np.random.default_rng((0, i)).standard_normal((2, 4, 4, 4), np.float32) for i in range(9)]))
    for view, images in enumerate((x, x.flip(3))):
        z = train.load_vae("vae", "cpu").encode(images).latent_dist
        want = 0.5 * (z.mean + z.std * noise[:, view])
        assert z.std.std() > 0.1 and np.allclose(store[:, view], want, rtol=2e-3, atol=2e-3)
    assert abs(store[:, 0] - store[:, 1]).mean() > 0.1 and store.dtype == np.float16
    with pytest.raises(SystemExit, match="latents: another encoding .files_sha256, names, seed d"):
        tool(encode, *args, "--seed", 1)
    cli("--data", "latents", *TINY, "--steps", "2")         # they are as they were
    cli("sample", "--run", "runs/latents", "--num", 4)
    assert np.load("runs/latents/samples.npz")["arr_0"].shape == (4, 32, 32, 3)


def test_a_full_disk_is_told_before_the_work(cli, vae, tmp_path):
    image_tree(tmp_path / "net", "ab", 20)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))    # a write beyond it fails
    try:
        with pytest.raises(SystemExit, match="net/new/latents.npy: .*check the path and the free"):
            tool(encode, *ENCODE, "--out", "net/new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tool(encode, *ENCODE, "--out", "net/new")        # there is space now, and it is no class
    assert train.latents(tmp_path / "net/new").names == ["a", "b"]
    encode.reserve(tmp_path / "x.npy", (1000, 2, 4, 4, 4))          # has no hole to be filled later
    assert (tmp_path / "x.npy").stat().st_blocks * 512 >= 256_000 and not np.load("x.npy").any()


BAD = {
    "reference --data pets --num 99 --out r.npz": "--num 99: the data has 16 images",
    "reference --data pets --classes 3 --out r.npz": "--classes 3: pets has 2",
    "reference --data shapes --classes 3 --out r.npz": "--classes 3: only of a folder",
    "reference --data pets --out pets/cat/0.png/r.npz": "pets/cat/0.png/r.npz: .*File exists",
    "--data pets --out half": "half/latents.json: .*; choose another --out",
    "--data pets --out mine": "mine: not empty; choose another --out",
    "--data pets --out new": "pip install diffusers",
    "--data pets --vae vae --image-size 36 --out new": "not a multiple of the VAE's factor, 8",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_line_and_loses_nothing(cli, vae, tmp_path, words, monkeypatch):
    image_tree(tmp_path / "pets", count=8)
    for path, text in (("half/latents.json", '{"done": '), ("mine/thesis.txt", "years of work")):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(text)
    before = snapshot(tmp_path)
    if "--vae" not in words:
        monkeypatch.setitem(sys.modules, "diffusers", None)
    for module in (train, encode):
        monkeypatch.setattr(module, "read_images", None)        # it is told before any work
    with pytest.raises(SystemExit, match=BAD[words]) as stop:
        tool(measures if "reference" in words else encode, *words.split())
    assert "\n" not in str(stop.value) and snapshot(tmp_path) == before
