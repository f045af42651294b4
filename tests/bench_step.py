"""How long is a training step of one model over another's? Alternates the two in one process and gives medians.

    python tests/bench_step.py [--models Sana-S/2 DyDi-LiT-S/2] [--batch-size 16] [--repeats 9]
"""
import argparse
import pathlib
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import dydilit  # noqa: E402
import train  # noqa: E402


def stepper(name, batch_size, device):
    """A function that makes one training step and returns its seconds."""
    model = dydilit.build_model(name).to(device)
    optimizer, diffusion = torch.optim.AdamW(model.parameters(), 1e-4), dydilit.GaussianDiffusion().to(device)
    x = torch.randn(batch_size, model.cfg.in_channels, model.cfg.input_size, model.cfg.input_size, device=device)
    y = torch.zeros(batch_size, dtype=torch.long, device=device)

    def step():
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = diffusion.losses(model, x, y)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs=2, default=["Sana-S/2", "DyDi-LiT-S/2"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    train.keep_freed_memory()
    device = train.pick_device()
    steps = [stepper(name, args.batch_size, device) for name in args.models]
    for _ in range(2):
        [step() for step in steps]
    times = [[step() for step in steps] for _ in range(args.repeats)]
    for name, column in zip(args.models, zip(*times)):
        print(f"{name:14} {statistics.median(column) * 1e3:8.1f} ms a step of {args.batch_size}")
    print(f"ratio, median of {args.repeats} pairs: {statistics.median(b / a for a, b in times):.3f}")


if __name__ == "__main__":
    main()
