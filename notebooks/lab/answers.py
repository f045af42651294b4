"""What lesson 11 draws and takes: the map of the answers, the neighbours with the course's projections, the runs side by side.

    python notebooks/lab/answers.py runs/verdict/cifar10-DyDi-LiT-XS-4 notebooks/results/neighbours.npz

After the runs of lesson 11, this keeps a sample of each class and system, of the first seed, for the lesson's picture.
"""
import pathlib
import sys
import time

import numpy as np
import torch
import torch.nn as nn
from matplotlib import pyplot as plt

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
from lab import example, figures, plan, verdict  # noqa: E402
from lab.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY, VIOLET  # noqa: E402
from lab.verdict import RESULTS  # noqa: E402, F401

# The eight systems with their looks, and what ladder.py calls them.
LOOKS = {"DiT": (BLUE, "-", "o"), "PixArt-Sigma": (SKY, "--", "s"), "MoH-DiT": (BLACK, ":", "^"), "Sana": (GREY, "--", "D"),
         "EDiT": (GREEN, "-.", "v"), "LiT": (PINK, (0, (3, 1)), "X"), "DiG": (VIOLET, (0, (8, 3)), "P"),
         "DyDi-LiT": (ORANGE, "-", "*")}
VARIANTS = {"DiT": "dit", "PixArt-Sigma": "pixart", "MoH-DiT": "moh", "Sana": "sana", "EDiT": "edit", "LiT": "lit", "DiG": "dig",
            "DyDi-LiT": verdict.RUNG6["mass"]}
figures.LOOKS.update(LOOKS)


# ---- The map of the answers -----------------------------------------------------------------------------------------

IDEAS = {"compress the keys": (BLUE, 4.6), "linearize": (GREEN, 3.5), "gate and scan": (ORANGE, 2.4),
         "route the tokens": (VIOLET, 1.4), "route the heads": (PINK, 0.5)}
ANSWERS = {"PixArt-Sigma": (["compress the keys"], "softmax over N/16 keys, in the later blocks"),
           "EDiT": (["compress the keys", "linearize"], "N/4 keys, queries see their surroundings"),
           "Sana": (["linearize"], "ReLU, one head"),
           "LiT": (["linearize"], "ReLU, few heads, a 5×5 convolution"),
           "DiG": (["linearize", "gate and scan"], "a memory that forgets, four directions"),
           "DyDi-LiT": (["linearize", "route the tokens"], "kernel, difference, a 3×3 convolution"),
           "MoH-DiT": (["route the heads"], "softmax, each token picks heads")}


def answers_map():
    """The question, five ideas, and the seven systems that are made of them; grey are those of earlier lessons."""
    known = ("Sana", "DyDi-LiT")
    colours = {"DiT": BLACK, **{idea: colour for idea, (colour, _) in IDEAS.items()}, **dict.fromkeys(ANSWERS, BLACK)}
    s = figures.Sketch(12.4, 5.3, [part for part in colours if part not in known], colours)
    s.box("DiT", 0.95, 2.6, "DiT:\nevery token\nsees every\nother, $N^2$", 1.6, 1.6)
    for idea, (_, y) in IDEAS.items():
        s.arrow(idea, (1.75, 2.6 + 0.25 * (y - 2.6)), (2.4, y))
        s.box(idea, 3.6, y, idea, 2.4)
    for i, (name, (ideas, text)) in enumerate(ANSWERS.items()):
        y = 4.95 - 0.74 * i
        for j, idea in enumerate(ideas):                    # where two arrows end, one ends above the other
            s.arrow(idea, (4.8, IDEAS[idea][1]), (6.2, y + 0.12 * (len(ideas) - 1) * (1 - 2 * j)))
        s.box(name, 7.1, y, name, 1.8, 0.55)
        s.note(name, 8.15, y, text, ha="left")
    plt.show()


# ---- The neighbours on the course's photograph ----------------------------------------------------------------------

def course_module(kind, *arguments):
    """A neighbour's attention of width 64 that nobody trained, with the course's projections; always the same.

    Queries and keys get the projection that they share in lesson 1, values theirs, and what follows the attention is the
    identity. All other weights are a new model's.
    """
    ex = example.example()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        module = kind(example.WIDTH, *arguments)
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    layer.bias.zero_()
        w_qk, w_v = ex.w_qk.T, ex.w_v.T                     # nn.Linear multiplies by the transpose
        if hasattr(module, "qkv"):
            module.qkv.weight.copy_(torch.cat([w_qk, w_qk, w_v]))
        elif hasattr(module, "kv"):
            module.q.weight.copy_(w_qk)
            module.kv.weight.copy_(torch.cat([w_qk, w_v]))
        else:                                               # DiG's queries and keys are half as wide
            module.q.weight.copy_(w_qk[:len(w_qk) // 2])
            module.k.weight.copy_(w_qk[:len(w_qk) // 2])
            module.v.weight.copy_(w_v)
        nn.init.eye_(module.proj.weight)
    return module.requires_grad_(False)


def small_strip(maps, *names):
    """figures.strip() of the maps with these names, with fewer pixels: this lesson has many."""
    with plt.rc_context({"figure.dpi": 90}):
        figures.strip({name: maps[name] for name in names})


def processor_ms(functions, repeats):
    """Milliseconds that the processor spends on each of {name: function}, the least of several calls.

    Unlike a clock's time, it hardly changes when other programs run.
    """
    times = {}
    for name, function in functions.items():
        calls = []
        for _ in range(repeats):
            start = time.process_time()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()                    # a processor that waits is counted, too
            calls.append(time.process_time() - start)
        times[name] = 1e3 * min(calls)
    return times


# ---- The detective's picture ----------------------------------------------------------------------------------------

def show_whole(depths, coefficients, tolerance):
    """How far a block's number of d^2 is from a whole one, if there are so many blocks; the number stands where it fits.

    coefficients: {system: one number per depth}; tolerance: what the rounding of the printed figures allows, per depth.
    """
    fig, axes = plt.subplots(len(coefficients), 1, figsize=(9.5, 2.5 * len(coefficients)), sharex=True, squeeze=False)
    for ax, (name, values) in zip(axes[:, 0], coefficients.items()):
        colour, _, marker = LOOKS[name]
        ax.fill_between(depths, np.negative(tolerance), tolerance, color=GREY, alpha=0.35, linewidth=0)
        for depth, value, allowed in zip(depths, values, tolerance):
            far = value - round(value)
            fits = abs(far) < allowed
            ax.plot([depth, depth], [0, far], color=colour, linestyle="-", linewidth=1.5)
            ax.plot(depth, far, color=colour, marker=marker, markersize=13 if fits else 8, fillstyle="full" if fits else "none")
            if fits:
                ax.annotate(f"{value:.0f} $d^2$", (depth, far), (0, 13), textcoords="offset points", ha="center")
        ax.set(ylim=(-0.6, 0.6), xticks=depths)
        ax.set_title(name, loc="left", color=colour, fontweight="bold", fontsize=14)
    axes[-1, 0].set_xlabel("number of blocks, supposed")
    fig.supylabel("distance to a whole number", fontsize=14)
    plt.show()


# ---- Side by side ---------------------------------------------------------------------------------------------------

def show_runs(rows):
    """Every run of the eight systems in both measures, and each system's mean as a bar. rows: of runs.csv."""
    _, axes = plt.subplots(1, 2, figsize=(12.6, 4.6), sharey=True, gridspec_kw={"wspace": 0.12})
    for ax, (measure, value) in zip(axes, verdict.MEASURES.items()):
        for i, (name, variant) in enumerate(VARIANTS.items()):
            logs = [value(row) for row in verdict.chosen(rows, [variant], verdict.NEIGHBOUR_SEEDS)]
            ax.plot(np.exp(logs), [i] * len(logs), linestyle="", marker="o", color=LOOKS[name][0], alpha=0.6)
            ax.plot(np.exp(np.mean(logs)), i, linestyle="", marker="|", markersize=26, markeredgewidth=3, color=LOOKS[name][0])
        ax.set(xlabel=measure + ", less is better", xscale="log", yticks=range(len(VARIANTS)), yticklabels=list(VARIANTS))
        low, high = ax.get_xlim()
        ticks = [float(f"{tick:.2g}") for tick in np.geomspace(1.02 * low, high / 1.02, 5)]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_xticks([], minor=True)
    axes[0].invert_yaxis()
    plt.show()


def keep_samples(folder, out):
    """A sample of each class and system, of the first seed, from ladder.py's folder of the data."""
    np.savez_compressed(out, images=plan.first_samples(folder, VARIANTS.values(), verdict.NEIGHBOUR_SEEDS[0]), names=list(VARIANTS))


def show_samples(path):
    """The grid that keep_samples kept, a row per system."""
    with np.load(path) as file:
        figures.show_images(torch.from_numpy(file["images"]).permute(0, 1, 4, 2, 3) / 127.5 - 1, list(file["names"]))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    keep_samples(*sys.argv[1:])
