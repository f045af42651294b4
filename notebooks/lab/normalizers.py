"""Which denominator should Eq. 8 have? Trains the small model with each, on the same images and noise.

    python notebooks/lab/normalizers.py --data cifar10 --data-dir DIR > normalizers.csv

Prints, per seed and normalizer, the loss on held-out images with fixed noise and the largest gradient norm on the way.
They are those of eq8.py. The library has `none`.
"""
import argparse
import math
import pathlib
import sys

import torch
from tqdm.auto import tqdm

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import dydilit  # noqa: E402
import train  # noqa: E402
from lab import eq8  # noqa: E402

BATCH = 32


def steps_of(model, data, steps, batch, lr, seed=0, skip=0, autocast=False):
    """Trains on the images after the first `skip`. Returns the loss of each step and the largest gradient norm.

    autocast: in BF16. A norm that is not finite makes the largest one infinite.
    """
    optimizer, device = torch.optim.AdamW(model.parameters(), lr, weight_decay=0), model.pos_embed.device
    diffusion, losses, largest = dydilit.GaussianDiffusion().to(device), [], 0.0
    for step in tqdm(range(steps), leave=False):
        torch.manual_seed(seed * 2 ** 32 + step)
        index = skip + train.batch_indices(len(data.labels) - skip, batch, step, seed)
        x, y = data.batch(index, torch.rand(batch) < 0.5)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = diffusion.losses(model, x.to(device), y.to(device))["loss"].mean()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
        largest = max(largest, norm) if math.isfinite(norm) else math.inf
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, largest


def run(data, normalizer, seed, steps):
    torch.manual_seed(seed)
    model = dydilit.build_model("DyDi-LiT-XS/4", eq8.parts_with(normalizer), n_classes=len(data.names))
    diffusion, held_out = dydilit.GaussianDiffusion(), 1024
    _, largest = steps_of(model, data, steps, BATCH, 3e-4, seed, skip=held_out)
    model.eval()
    torch.manual_seed(0)
    losses = []
    with torch.no_grad():
        for part in torch.arange(held_out).split(128):
            x, y = data.batch(part, torch.zeros(len(part), dtype=torch.bool))
            losses.append(diffusion.losses(model, x, y)["simple"])
    return torch.cat(losses).mean().item(), largest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shapes", choices=["shapes", "cifar10"])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    train.keep_freed_memory()
    data = train.load_data(args)
    print("seed,normalizer,held_out_loss,largest_gradient_norm")
    for seed in range(args.seeds):
        for normalizer in eq8.Divided.DENOMINATORS:
            loss, largest = run(data, normalizer, seed, args.steps)
            print(f"{seed},{normalizer},{loss:.4f},{largest:.2f}", flush=True)


if __name__ == "__main__":
    main()
