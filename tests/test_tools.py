"""encode.py, which makes latents for train.py, and `measures.py reference`, which writes data as samples are written."""
import json
import pathlib
import sys

import numpy as np
import pytest
import torch

import train
from lab import encode, measures
from test_train import TINY, cifar_files, image_tree, snapshot


def tool(module, *argv):
    """What `python notebooks/lab/MODULE.py ...` does."""
    train.explained(module.main, [*map(str, argv)])


def test_classes_are_picked_by_seed(tmp_path):
    image_tree(tmp_path, "edcba", 2)
    picks = [encode.pick_classes(tmp_path, 3, seed) for seed in range(8)]
    assert all(len(p) == 3 and p == sorted(p) for p in picks) and len(set(map(tuple, picks))) > 1
    assert picks[0] == encode.pick_classes(tmp_path, 3, 0)


@pytest.mark.parametrize("data", ["shapes", "cifar10", "pets"])
def test_reference_holds_the_data(cli, tmp_path, data):
    cifar_files(tmp_path / "data")
    image_tree(tmp_path / "pets", "abcd", 5)
    more = ["--classes", 2, "--image-size", 24] if data == "pets" else []
    tool(measures, "reference", "--data", data, "--num", 8, "--out", "out/ref.npz", *more)
    ref = np.load("out/ref.npz")
    size = 24 if data == "pets" else 32
    assert ref["arr_0"].shape == (8, size, size, 3) and ref["arr_0"].dtype == np.uint8 and len(ref["arr_1"]) == 8
    if data == "cifar10":
        images = {image.tobytes(): label for image, label in zip(*(getattr(train.cifar10(tmp_path / "data"), n)
                                                                   for n in ("images", "labels")))}
        assert [images[i.tobytes()] for i in ref["arr_0"]] == ref["arr_1"].tolist()


@pytest.fixture
def vae(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="the VAE's tests need: pip install diffusers")
    torch.manual_seed(0)
    blocks = 4
    diffusers.AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * blocks, up_block_types=["UpDecoderBlock2D"] * blocks,
                            block_out_channels=[8] * blocks, norm_num_groups=4, latent_channels=4, sample_size=32,
                            scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_encode_train_and_decode(cli, vae, tmp_path, capsys):
    image_tree(tmp_path / "net", "abcde", 3)
    args = ["--data", "net", "--classes", 3, "--image-size", 32, "--vae", "vae", "--batch-size", 2]
    tool(encode, *args, "--out", "latents")
    store, about = np.load("latents/latents.npy"), json.loads(pathlib.Path("latents/latents.json").read_text())
    assert store.shape == (9, 2, 4, 4, 4) and store.dtype == np.float16 and about["scaling_factor"] == 0.5
    names = encode.pick_classes(tmp_path / "net", 3, 0)
    assert about["names"] == names and about["done"] == 9
    model, paths = train.load_vae("vae", "cpu"), train.image_folder(tmp_path / "net", names)[0]
    x = torch.from_numpy(np.stack([train.read_image(p, 32) for p in paths])).permute(0, 3, 1, 2) / 127.5 - 1
    for view, images in enumerate((x, x.flip(3))):          # the VAE's own noise is small beside the latents
        mean, std = (getattr(model.encode(images).latent_dist, n) * 0.5 for n in ("mean", "std"))
        assert ((torch.from_numpy(store[:, view]).float() - mean).abs() < 6 * std + 0.01).all()

    data = train.latents(pathlib.Path("latents"))
    x, y = data.batch(torch.tensor([4, 5]), torch.tensor([False, True]))
    assert np.array_equal(x[0].numpy(), store[4, 0]) and np.array_equal(x[1].numpy(), store[5, 1])
    assert data.model_shape() == dict(image_size=32, vae_factor=8, in_channels=4, n_classes=3)

    cli("--data", "latents", *TINY, "--steps", "2")
    cli("sample", "--run", "runs/latents", "--num", 4)
    assert np.load("runs/latents/samples.npz")["arr_0"].shape == (4, 32, 32, 3)

    with pytest.raises(SystemExit, match="holds another encoding .files_sha256, names, seed differ"):
        tool(encode, *args, "--out", "latents", "--seed", 1)
    with pytest.raises(SystemExit, match="not a multiple of the VAE's factor 8"):
        tool(encode, *args, "--out", "other", "--image-size", 36)
    with pytest.raises(SystemExit, match="latents are not images"):
        tool(measures, "reference", "--data", "latents", "--out", "x.npz")


def test_encode_resumes_where_it_was_stopped(cli, vae, tmp_path, monkeypatch):
    image_tree(tmp_path / "net", "ab", 5)
    args = ["--data", "net", "--image-size", 32, "--vae", "vae", "--batch-size", 3]
    tool(encode, *args, "--out", "whole")
    read, calls = encode.read_images, []

    def stopping(*a, **options):
        calls.append(a)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(*a, **options)
    monkeypatch.setattr(encode, "read_images", stopping)
    with pytest.raises(SystemExit) as stop:
        tool(encode, *args, "--out", "stopped")
    assert stop.value.code == 130
    with pytest.raises(SystemExit, match="only 6 of 10 images are encoded; run the encode command again"):
        cli("--data", "stopped", *TINY)
    tool(encode, *args, "--out", "stopped")
    assert len(calls) == 5
    for name in ("latents.npy", "labels.npy"):
        assert pathlib.Path("whole", name).read_bytes() == pathlib.Path("stopped", name).read_bytes()


def test_without_diffusers_latents_say_what_to_install(cli, tmp_path, monkeypatch):
    image_tree(tmp_path / "net")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match="pip install diffusers"):
        tool(encode, "--data", "net", "--out", "latents")


BAD = [
    (measures, ["reference", "--data", "pets", "--out", "ref.png"], "--out ref.png: give a name that ends in .npz"),
    (measures, ["reference", "--data", "pets", "--num", "99", "--out", "r.npz"], "--num 99: the data has 16 images"),
    (measures, ["reference", "--data", "pets", "--classes", "3", "--out", "r.npz"], "--classes 3: .* has 2 class folders; give 2..2"),
    (measures, ["reference", "--data", "shapes", "--classes", "3", "--out", "r.npz"], "--classes 3: only a folder's classes"),
    (encode, ["--data", "pets", "--out", "half-encoded"], "half-encoded/latents.json: damaged; choose another --out"),
    (encode, ["--data", "pets", "--out", "mine"], "mine: not empty; choose another --out"),
]


@pytest.mark.parametrize("module, argv, message", BAD, ids=[" ".join(argv) for _, argv, _ in BAD])
def test_bad_input_gets_one_line_and_loses_nothing(cli, tmp_path, module, argv, message):
    image_tree(tmp_path / "pets", count=8)
    for path, text in (("half-encoded/latents.json", '{"done": '), ("mine/thesis.txt", "years of work")):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(text)
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit, match=message) as stop:
        tool(module, *argv)
    assert "\n" not in str(stop.value) and snapshot(tmp_path) == before
