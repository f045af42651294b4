"""What a trained model loses without its attention: each run of ladder.py, its attention's output set to zero.

    python notebooks/lab/silenced.py runs/verdict DIR > notebooks/results/verdict/silenced.csv

DIR has the data, as for ladder.py. Prints a line per run. It has the loss of 50 held-out images as training weighs it, a mean
logarithm, with and without attention. The last column is the length of the attention's output beside that of the values,
the mean over blocks. A convolution on V stays. Nothing is trained again.
"""
import argparse
import pathlib
import sys

import torch

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import dydilit  # noqa: E402
import train  # noqa: E402
from lab import ladder, verdict  # noqa: E402
from lab.neighbours import NEIGHBOURS, FewHeadLinearAttention  # noqa: E402


def silence(attn):
    """Sets to zero what the attention adds, in place. The convolution on V and the bias of the projection stay."""
    if getattr(attn, "differential", None) is not None:
        attn.differential.register_forward_hook(lambda module, inputs, out: torch.zeros_like(out))
    elif isinstance(attn, FewHeadLinearAttention):          # ReLU attention to keys of zero is zero
        def without_keys(module, inputs, out):
            q, k, v = out.chunk(3, dim=-1)
            return torch.cat([q, torch.zeros_like(k), v], dim=-1)
        attn.qkv.register_forward_hook(without_keys)
    elif getattr(attn, "dwc", None) is None:                # all that the projection gets comes from the attention
        attn.proj.register_forward_pre_hook(lambda module, inputs: torch.zeros_like(inputs[0]))
    else:
        raise ValueError("silence: a convolution without a differential is not told from the attention")


@torch.no_grad()
def relative_size(model, data, n=50):
    """|attention's output| / |V|, means over tokens, of n held-out images at all noise levels; the mean over blocks."""
    ratios = []

    def of_difference(module, inputs, out):
        ratios.append((out.norm(dim=-1).mean() / inputs[4].norm(dim=-1).mean()).item())

    hooks = [block.attn.differential.register_forward_hook(of_difference) for block in model.blocks
             if getattr(block.attn, "differential", None) is not None]
    t = torch.randint(1000, (n,), generator=torch.Generator().manual_seed(0))
    _, x_t, _, y = ladder.noisy(data, t, seed=0)
    model(*(a.to(model.pos_embed.device) for a in (x_t, t, y)))
    for hook in hooks:
        hook.remove()
    return sum(ratios) / len(ratios) if ratios else ""


def losses_of(folder, variant, data):
    """Of a run: the loss, the loss without attention, and relative_size."""
    parts = ladder.blocks_of(variant)
    model = dydilit.load_model(folder / "checkpoint.pt", parts)[0].to(train.pick_device())
    size, whole = relative_size(model, data), ladder.held_out_losses(model, data)[1]
    for block in model.blocks:
        silence(block.attn)
    without = ladder.held_out_losses(model, data)[1]
    return sum(whole) / len(whole), sum(without) / len(without), size


def main(runs, data_dir):
    runs = pathlib.Path(runs)
    lines = verdict.chosen(verdict.read(runs / "runs.csv"), [*verdict.VARIANTS, *NEIGHBOURS])
    images = {data: ladder.held_out(data, data_dir, 50) for data in {line["data"] for line in lines}}
    print("variant,seed,held_out_log,without_attention,size")
    for line in lines:
        args = argparse.Namespace(out=runs, model=line["model"])
        folder = ladder.run_folder(args, *(line[key] for key in ("data", "variant", "steps", "seed")))
        found = losses_of(folder, line["variant"], images[line["data"]])
        print(line["variant"], line["seed"], *(f"{x:.6g}" if x != "" else x for x in found), sep=",", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    train.explained(main, *sys.argv[1:])
