"""Is Eq. 8 stable without a denominator? The stability runs of notebook 10's plan.

    python notebooks/lab/stability.py --data cifar10 --data-dir DIR > stability.csv

For each normalizer 300 steps of 8 images of DyDi-LiT-S/2 in float32, on 256 tokens of pixels, with the paper's learning
rate, and 1,000 steps of 8 images in BF16 autocast. A CPU only emulates BF16, slowly, and takes the small model for those.
Both models also get 16,384 tokens afterwards. A line per run: the mean loss of its last 50 steps, the largest gradient
norm on the way, the largest outputs, and whether all of these were finite.
"""
import argparse
import dataclasses
import math
import pathlib
import sys

import torch

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import dydilit  # noqa: E402
import train  # noqa: E402
from lab import eq8  # noqa: E402
from lab.normalizers import steps_of  # noqa: E402


@torch.no_grad()
def largest_output(model, tokens, dtype):
    """The largest entry of the output for noise in so many tokens. The weights are the model's, the positions new."""
    side, device = math.isqrt(tokens) * model.cfg.patch_size, model.pos_embed.device
    cfg = dataclasses.replace(model.cfg, image_size=side * model.cfg.vae_factor)
    larger = dydilit.DyDiLiT(cfg, eq8.parts_with(model.blocks[0].attn.differential.denominator)).to(device).eval()
    larger.load_state_dict({**model.state_dict(), "pos_embed": larger.pos_embed})
    x = torch.randn(1, cfg.in_channels, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        return larger(x, torch.full((1,), 500, device=device), torch.zeros(1, dtype=torch.long, device=device)).abs().max().item()


def main():
    parser = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shapes", choices=["shapes", "cifar10"])
    parser.add_argument("--data-dir", default="data", help="where cifar10 lies, or is downloaded to")
    parser.add_argument("--steps", type=train.positive, nargs=2, default=[300, 1000], help="in float32, in BF16; default: 300 1000")
    parser.add_argument("--normalizers", nargs="+", choices=eq8.Divided.DENOMINATORS, default=["none", "mass"])
    args = parser.parse_args()
    train.keep_freed_memory()
    data, device = train.load_data(args), train.pick_device()
    slow = train.SMALL_MODEL if device.type == "cpu" else "DyDi-LiT-S/2"
    print("normalizer,model,dtype,steps,loss,largest_gradient_norm,largest_output,largest_output_16384,finite")
    for normalizer in args.normalizers:
        for name, dtype, steps in [("DyDi-LiT-S/2", torch.float32, args.steps[0]), (slow, torch.bfloat16, args.steps[1])]:
            torch.manual_seed(0)
            model = dydilit.build_model(name, eq8.parts_with(normalizer), **data.model_shape()).to(device)
            losses, norm = steps_of(model, data, steps, 8, 1e-4, autocast=dtype is torch.bfloat16)
            found = [sum(losses[-50:]) / len(losses[-50:]), norm, largest_output(model, model.pos_embed.shape[1], dtype),
                     largest_output(model, 16_384, dtype)]
            print(normalizer, name, str(dtype)[6:], steps, *(f"{number:.4g}" for number in found),
                  all(map(math.isfinite, found)), sep=",", flush=True)


if __name__ == "__main__":
    train.explained(main)
