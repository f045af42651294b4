"""How long things take beside each other. The sides alternate in one process; ratios of medians, no absolute promises.

    python notebooks/lab/benchmark.py                  everything, 25 to 40 minutes on two CPU cores
    python notebooks/lab/benchmark.py step routed      of: step, compiled, routed, length, resolution, guidance, memory,
                                                       neighbours

On a GPU the training steps run in BF16 autocast, and the card's name, images per second, the share of its peak and the
largest micro-batch that fits are reported, too.
"""
import gc
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import dydilit  # noqa: E402
import train  # noqa: E402
from lab import cost  # noqa: E402
from lab.helpers import Allocations, median_ms  # noqa: E402
from lab.ladder import honest_macs  # noqa: E402

CUDA = torch.cuda.is_available()
PEAK_TFLOPS = {"RTX 3090": 71, "RTX 4090": 165, "A100": 312, "H100": 989, "H200": 989}     # dense BF16, datasheets


def row(figure, here, floor="", goal=""):
    print(f"| {figure} | {here} | {floor} | {goal} |", flush=True)


def stepper(name, batch, compiled=False):
    """A function that makes one training step. name: of a model, or the model."""
    model, diffusion = dydilit.build_model(name) if isinstance(name, str) else name, dydilit.GaussianDiffusion()
    optimizer, forward = torch.optim.AdamW(model.parameters(), 1e-4), torch.compile(model) if compiled else model
    x = torch.randn(batch, model.cfg.in_channels, model.cfg.input_size, model.cfg.input_size)
    y = torch.zeros(batch, dtype=torch.long)

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
            loss = diffusion.losses(forward, x, y)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def step(batch=64 if CUDA else 8):
    """Training steps of the three small models."""
    names = ["Sana-S/2", "DyDi-LiT-S/2", "DiT-S/2"]
    macs = {name: honest_macs(name) for name in names}
    ms = median_ms({name: stepper(name, batch) for name in names}, repeats=9)
    for name in names:
        rate = batch / ms[name] * 1e3
        tflops = 6 * macs[name] * rate / 1e12               # forward and backward, two operations per MAC
        card = torch.cuda.get_device_name() if CUDA else ""
        share = "".join(f", {tflops / peak:.0%} of the card's peak" for key, peak in PEAK_TFLOPS.items() if key in card)
        row(f"{name}, training, batches of {batch}", f"{rate:.1f} images/s, {tflops:.2f} TFLOP/s{share}")
    sana, ours, dit = (macs[name] for name in names)
    row("training step, DyDi-LiT-S / Sana-S", f"{ms[names[1]] / ms[names[0]]:.3f}", f"{ours / sana:.3f}", "at most 1.40")
    row("images/s in training, DyDi-LiT-S / DiT-S", f"{ms[names[2]] / ms[names[1]]:.3f}", f"{dit / ours:.3f}",
        "at least 0.90")


def compiled(batch=64 if CUDA else 8):
    """The same with torch.compile."""
    names = ["Sana-S/2", "DyDi-LiT-S/2"]
    functions = {(name, c): stepper(name, batch, c) for name in names for c in (False, True)}
    ms = median_ms(functions, repeats=7)
    row("the same, torch.compile", f"{ms[names[1], True] / ms[names[0], True]:.3f}",
        f"{honest_macs(names[1]) / honest_macs(names[0]):.3f}", "at most 1.25")
    for name in names:
        row(f"{name}, compiled / eager", f"{ms[name, True] / ms[name, False]:.3f}")


def routed(d=768, n=7, tokens=2048):
    """One routed d x d projection, as in DyDi-LiT-L, against a plain one."""
    x, upstream = torch.randn(tokens, d, requires_grad=True), torch.randn(tokens, d)
    bank, plain = torch.randn(n, d, d, requires_grad=True), torch.randn(d, d, requires_grad=True)
    index = torch.randint(n, (tokens,))

    def both_ways(function, weight):
        with torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
            y = function()
        return torch.autograd.grad(y, (x, weight), upstream.to(y.dtype))
    ms = median_ms({"routed": lambda: both_ways(lambda: dydilit.routed_linear(x, bank, index), bank),
                    "plain": lambda: both_ways(lambda: F.linear(x, plain), plain)}, repeats=41)
    row(f"routed / plain projection, d = {d}, {n} projectors", f"{ms['routed'] / ms['plain']:.3f}", "1.0", "at most 1.5")


def length(lengths=(1024, 2048, 4096, 8192, 16384)):
    """The DyDiLA module of DyDi-LiT-S, forward and backward, against the number of tokens."""
    module, seconds, peaks = dydilit.build_model("DyDi-LiT-S/2", depth=1).blocks[0].attn, [], []

    def both_ways(n):
        side = int(n ** 0.5)
        x = torch.randn(1, side * side, 384)
        module(x).square().mean().backward()
        module.zero_grad()
    lengths = [int(n ** 0.5) ** 2 for n in lengths]         # squares
    ms = median_ms({n: lambda n=n: both_ways(n) for n in lengths}, repeats=7)
    for n in lengths:
        gc.collect()
        with Allocations() as allocations:
            both_ways(n)
        peaks.append(allocations.peak)
        seconds.append(ms[n])
    for what, values in [("time", seconds), ("peak memory", peaks)]:
        slope = np.polyfit(np.log(lengths), np.log(values), 1)[0]
        row(f"DyDiLA, {what} against N = {lengths[0]:,} .. {lengths[-1]:,}: log-log slope", f"{slope:.3f}", "1.0",
            "at most 1.1")


@torch.no_grad()
def resolution(repeats={1024: 5, 2048: 3}):
    """Forward passes of the large models on large images; a third of the blocks of each, which keeps the ratio."""
    for size, count in repeats.items():
        models = {name: dydilit.build_model(name, image_size=size, depth=depth).eval()
                  for name, depth in [("DiT-L/2", 4), ("DyDi-LiT-L/2", 3)]}
        x, t, y = torch.randn(1, 4, size // 8, size // 8), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        with torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
            ms = median_ms({name: lambda m=m: m(x, t, y) for name, m in models.items()}, count)
        macs = honest_macs("DiT-L/2", image_size=size) / honest_macs("DyDi-LiT-L/2", image_size=size)
        row(f"forward, DiT-L / DyDi-LiT-L, N = {(size // 16) ** 2:,}", f"{ms['DiT-L/2'] / ms['DyDi-LiT-L/2']:.2f}",
            f"{macs:.2f}", f"at least {1.5 if size == 1024 else 3}")


@torch.no_grad()
def guidance(count=64, steps=250):
    """Guided sampling, fused and with both passes in one batch, against the plain loop."""
    name = "DyDi-LiT-S/2" if CUDA else train.SMALL_MODEL
    plain, fused = dydilit.build_model(name).eval(), dydilit.build_model(name).eval().fuse()
    x = torch.randn(count, plain.cfg.in_channels, plain.cfg.input_size, plain.cfg.input_size)
    y, diffusion = torch.arange(count) % plain.cfg.n_classes, dydilit.GaussianDiffusion()
    c = plain.cfg.in_channels

    def two_passes(x, t):
        with_class, without = plain(x, t, y), plain(x, t, torch.full_like(y, plain.cfg.n_classes))
        return torch.cat([without[:, :c] + 4 * (with_class[:, :c] - without[:, :c]), with_class[:, c:]], dim=1)
    ms = median_ms({name: lambda f=f: diffusion.sample(f, x, steps, progress=False) for name, f in [
        ("plain", two_passes), ("fused", lambda x, t: fused.forward_with_cfg(x, t, y, 4))]}, repeats=3)
    row(f"{name}, {steps} guided steps, {count} images: plain loop / fused and batched", f"{ms['plain'] / ms['fused']:.3f}",
        "", f"{ms['plain'] / 1e3:.1f} s, {ms['fused'] / 1e3:.1f} s")


def memory(name="DyDi-LiT-S/2", card=24):
    """What a training step keeps for its backward pass, in BF16, and the micro-batch that fits a card of 24 GB."""
    model, diffusion = dydilit.build_model(name), dydilit.GaussianDiffusion()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def kept(batch):
        """Bytes that a batch's graph holds, but for the weights."""
        found = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor
        x, y = torch.randn(batch, 4, 32, 32), torch.zeros(batch, dtype=torch.long)
        with torch.autocast(x.device.type, torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = diffusion.losses(model, x, y)["loss"].mean()
        loss.backward()
        return sum(found.values())
    each = (kept(12) - kept(4)) / 8
    weights = 4 * sum(p.numel() for p in model.parameters())
    static = 5 * weights + kept(4) - 4 * each           # weights, average, gradient, two moments; copies in BF16
    row(f"{name}, kept for the backward pass, BF16", f"{each / 2 ** 20:.1f} MiB an image, {static / 2 ** 20:.0f} besides")
    row(f"the micro-batch for which {card} GB would do, a tenth left free", f"{int((0.9e9 * card - static) / each)}")
    if CUDA:
        for batch in (256, 128, 64, 32):
            try:
                torch.cuda.reset_peak_memory_stats()
                stepper(name, batch)()
                row(f"{name}, peak memory of a step of {batch}", f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
            except torch.OutOfMemoryError:
                row(f"{name}, a step of {batch}", "out of memory")


def neighbours(batch=64 if CUDA else 2, repeats=9, lengths=(256, 1024, 4096, 16384)):
    """All eight systems of the paper's tables at size S against DiT, one pair after the other; then their attention alone,
    a block's of each, against the number of tokens. Slopes are over the upper half of the lengths."""
    def macs(system):
        with torch.device("meta"):
            return sum(cost.count_macs(cost.build(system))["honest"].values())

    def forward(model):
        x, t, y = torch.randn(batch, 4, 32, 32), torch.zeros(batch), torch.zeros(batch, dtype=torch.long)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
            model(x, t, y)

    for system in [name for name in cost.SYSTEMS if name != "DiT"]:
        models = {name: cost.build(name) for name in (system, "DiT")}
        for what, functions in [("forward", {name: lambda m=m: forward(m) for name, m in models.items()}),
                                ("training step", {name: stepper(m, batch) for name, m in models.items()})]:
            ms = median_ms(functions, repeats)
            row(f"{what}, {system}-S / DiT-S, {batch} images", f"{ms[system] / ms['DiT']:.3f}", f"{macs(system) / macs('DiT'):.3f}",
                f"{ms[system]:.0f} and {ms['DiT']:.0f} ms")
    modules = {name: cost.build(name, depth=2).blocks[1].attn for name in cost.SYSTEMS}     # block 1 of 2: PixArt's compressed one
    times = {name: [] for name in modules}
    for n in lengths:
        x = torch.randn(1, n, 384)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
            ms = median_ms({name: lambda m=m: m(x) for name, m in modules.items()}, 3)
        for name in modules:
            times[name].append(ms[name])
    upper = slice(len(lengths) // 2 - 1, None)
    for name, values in times.items():
        slope = np.polyfit(np.log(lengths[upper]), np.log(values[upper]), 1)[0]
        row(f"{name}'s attention, N = {lengths[upper][0]:,} .. {lengths[-1]:,}: log-log slope", f"{slope:.2f}", "",
            ", ".join(f"{value:.4g}" for value in values) + " ms")


if __name__ == "__main__":
    rows = dict(step=step, compiled=compiled, routed=routed, length=length, resolution=resolution, guidance=guidance,
                memory=memory, neighbours=neighbours)
    if unknown := set(sys.argv[1:]) - set(rows):
        sys.exit(f"benchmark.py: {', '.join(sorted(unknown))}: choose from {', '.join(rows)}")
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, torch {torch.__version__}")
    row("figure", "here", "floor", "goal")
    row(*["---"] * 4)
    for name in sys.argv[1:] or rows:
        rows[name]()
