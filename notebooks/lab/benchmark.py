"""How fast the models are beside each other, and what training keeps in memory.

    python notebooks/lab/benchmark.py                  everything, about ten minutes on one CPU core
    python notebooks/lab/benchmark.py step memory      of: step, resolution, memory

The figures go to notebooks/results/benchmark.csv, a line for each figure and device. `counted` is
the ratio of the MACs. On a GPU the models run in BF16 autocast, on a CPU in float32.
"""
import pathlib
import statistics
import sys
import time

import torch

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import dydilit  # noqa: E402
from lab import measures  # noqa: E402
from lab.cost import honest_macs  # noqa: E402

PATH = pathlib.Path(__file__).resolve().parents[1] / "results/benchmark.csv"
CUDA = torch.cuda.is_available()
KINDS = ("DiT", "Sana", "DyDi-LiT")


def report(figure, measured, counted=""):
    """Prints a figure, and keeps it in place of an older one of the same device."""
    threads = f"CPU, {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"
    device = torch.cuda.get_device_name() if CUDA else threads
    line = dict(figure=figure, measured=measured, counted=counted, device=device)
    print("  ".join(line.values()), flush=True)
    others = [old for old in measures.read(PATH)
              if (old["figure"], old["device"]) != (figure, device)]
    measures.save_log(PATH, [*others, dict(line, torch=torch.__version__)])


def median_ms(functions, repeats=7):
    """Median milliseconds of each of {name: function}, which take turns; on one CPU thread, of the
    processor's own time, which other programs hardly change."""
    clock = time.perf_counter if CUDA or torch.get_num_threads() > 1 else time.process_time
    times = {name: [] for name in functions}
    for _ in range(repeats + 1):        # the first round warms up
        for name, function in functions.items():
            start = clock()
            function()
            if CUDA:
                torch.cuda.synchronize()
            times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(ms[1:]) for name, ms in times.items()}


def stepper(name, batch):
    model, diffusion = dydilit.build_model(name), dydilit.GaussianDiffusion()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    x, y = torch.randn(batch, 4, 32, 32), torch.zeros(batch, dtype=torch.long)

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
            loss = diffusion.losses(model, x, y)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def step(batch=64 if CUDA else 4):
    """Training steps of the three small models."""
    names = [f"{kind}-S/2" for kind in KINDS]
    ms = median_ms({name: stepper(name, batch) for name in names})
    ours = names.pop()
    for name in names:
        report(f"training step, {ours} / {name}", f"{ms[ours] / ms[name]:.3f}",
               f"{honest_macs(ours) / honest_macs(name):.3f}")


@torch.no_grad()
def resolution(repeats={1024: 5, 2048: 3}):
    """Forward passes of the large models on large images. One block of each, times its number."""
    for size, count in repeats.items():
        blocks = {name: dydilit.build_model(name, depth=1).eval().blocks[0]
                  for name in ("DiT-L/2", "DyDi-LiT-L/2")}
        x, c = torch.randn(1, (size // 16) ** 2, 768), torch.randn(1, 768)
        with torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
            ms = median_ms({name: lambda b=b: b(x, c) for name, b in blocks.items()}, count)
        ratio = 9 * ms["DyDi-LiT-L/2"] / (12 * ms["DiT-L/2"])
        dit, ours = (honest_macs(name, image_size=size) for name in ms)
        figure = f"forward at {size} pixels, DyDi-LiT-L/2 / DiT-L/2"
        report(figure, f"{ratio:.3f}", f"{ours / dit:.3f}")


def kept(function, weights):
    """Bytes that autograd keeps for the backward pass of function(), but for these weights."""
    own, found = {weight.untyped_storage().data_ptr() for weight in weights}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()     # held until all is counted, or a place would be used twice
    return sum(found.values()) if result is not None else 0


def memory():
    """What a training step keeps in BF16, for each image, and besides."""
    diffusion, device = dydilit.GaussianDiffusion(), torch.get_default_device()
    for name in [f"{kind}-{size}/2" for size in "SBL" for kind in KINDS]:
        model = dydilit.build_model(name)

        def loss(batch):
            x, y = torch.randn(batch, 4, 32, 32), torch.zeros(batch, dtype=torch.long)
            with torch.autocast(device.type, torch.bfloat16):
                return diffusion.losses(model, x, y)["loss"].mean()
        one, three = (kept(lambda: loss(batch), model.parameters()) for batch in (1, 3))
        each = (three - one) / 2
        # Weights, their average, gradients and AdamW's two moments in float32; copies in BF16.
        besides = 20 * sum(p.numel() for p in model.parameters()) + one - each
        report(f"MiB kept per image, {name}", f"{each / 2 ** 20:.1f}")
        report(f"MiB besides, {name}", f"{besides / 2 ** 20:.0f}")


if __name__ == "__main__":
    parts = {part.__name__: part for part in (step, resolution, memory)}
    if unknown := set(sys.argv[1:]) - set(parts):
        sys.exit(f"benchmark.py: {', '.join(sorted(unknown))}: choose from {', '.join(parts)}")
    for name in sys.argv[1:] or parts:
        parts[name]()
