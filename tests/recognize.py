"""What share of generated images is recognized as the class that was asked for?

    python tests/recognize.py SAMPLES.npz [--data cifar10 --data-dir DIR]

SAMPLES.npz is what `train.py sample --num` writes. A small convolutional classifier is trained on the real data (a minute
on two cores); its accuracy on real images that it has not seen is printed beside its verdict on the samples.
"""
import argparse
import pathlib
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import train  # noqa: E402


def fit(x, y, n_classes, epochs=4, seed=0):
    """A four-layer convolutional classifier of 32x32 images, trained with shifts of up to two pixels."""
    torch.manual_seed(seed)
    layers, width = [], 3
    for out in (32, 64, 128):
        layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
        width = out
    model = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(width * 16, n_classes))
    model = model.to(memory_format=torch.channels_last)
    steps = epochs * (len(x) // 128)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        pick = torch.randint(len(x), (128,))
        dx, dy = torch.randint(0, 5, (2,)).tolist()
        batch = F.pad(x[pick], (2, 2, 2, 2), mode="replicate")[:, :, dy:dy + 32, dx:dx + 32]
        F.cross_entropy(model(batch), y[pick]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def predict(model, x):
    return torch.cat([model(part).argmax(1) for part in x.split(500)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples")
    parser.add_argument("--data", default="shapes", choices=["shapes", "cifar10"])
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    data = train.load_data(args)
    x, y = train.pixels(data.images), torch.from_numpy(data.labels)
    held_out = len(x) // 10
    model = fit(x[held_out:], y[held_out:], len(data.names))
    real = (predict(model, x[:held_out]) == y[:held_out]).float().mean()
    samples = np.load(args.samples)
    x, y = train.pixels(samples["arr_0"]), torch.from_numpy(samples["arr_1"])
    right = predict(model, x) == y
    print(f"real images it has not seen: {real:.1%} recognized")
    print(f"generated images: {right.float().mean():.1%} of {len(right)} recognized")
    print(", ".join(f"{name} {right[y == c].float().mean():.0%}" for c, name in enumerate(data.names) if (y == c).any()))


if __name__ == "__main__":
    main()
