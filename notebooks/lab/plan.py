"""Pictures of notebook 10's experiment: its plan as a board of variants, what verdict.py found, and samples.

    python notebooks/lab/plan.py runs/verdict/cifar10-DyDi-LiT-XS-4 DIR notebooks/results/verdict/samples.npz

After the runs, this keeps a sample of each class from four of the systems, and the training picture nearest to each. DIR
has the training pictures, as files in CIFAR-10's layout.
"""
import pathlib
import sys

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import FancyBboxPatch

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
from lab import figures, verdict  # noqa: E402
from lab.figures import GREY, clear  # noqa: E402
from lab.verdict import contrasts, percent  # noqa: E402

# The contrasts' numbers and words.
WORDS = {ask[:2].strip(): ask[3:].replace(", ", ",\n") for ask in contrasts("")}
FOUND = {"less": "#a6dcc5", "cannot tell": "#e6e6e6", "more": "#f6b48a"}


def board():
    """The eight variants as boxes, the eight contrasts as arrows that lead from what is compared with to what is judged."""
    ax = plt.subplots(figsize=(11, 4.9))[1]
    ax.set(xlim=(-1.75, 9.4), ylim=(-0.75, 4.2), aspect="equal")
    clear(ax)
    ax.add_patch(FancyBboxPatch((4.85, -0.25), 2.0, 3.5, boxstyle="round,pad=0,rounding_size=0.2", facecolor="#F4F4F4",
                                edgecolor=GREY, linestyle="--", linewidth=1.5))
    ax.text(5.85, -0.55, "the better one", ha="center", va="center", fontsize=14, color="#555555")
    rows, columns = {"printed\nEq. 8": 2.6, "mass": 0.4}, {"λ held at 0": 0, "differential": 2.9, "differential,\nconvolution": 5.85}
    for word, y in rows.items():
        ax.text(-0.85, y, word, ha="right", va="center", fontsize=15)
    for word, x in columns.items():
        ax.text(x, 3.8, word, ha="center", va="center", fontsize=15)
    for x, y, word in [*((x, y, "10 runs") for x in columns.values() for y in rows.values()), (8.6, 2.6, "Sana\n10 runs"), (8.6, 0.4, "DiT\n10 runs")]:
        ax.add_patch(FancyBboxPatch((x - 0.7, y - 0.4), 1.4, 0.8, boxstyle="round,pad=0,rounding_size=0.1", facecolor="white",
                                    edgecolor="black", linewidth=2, zorder=2))
        ax.text(x, y, word, ha="center", va="center", fontsize=14, zorder=3)
    for name, start, end in [("1", (5.85, 0.8), (5.85, 2.2)), ("2a", (0.7, 2.6), (2.2, 2.6)), ("2b", (0.7, 0.4), (2.2, 0.4)),
                             ("3", (0, 2.2), (0, 0.8)), ("4a", (3.6, 2.6), (5.15, 2.6)), ("4b", (3.6, 0.4), (5.15, 0.4)),
                             ("5", (7.9, 2.6), (6.85, 2.0)), ("6", (7.9, 0.4), (6.85, 1.0))]:
        ax.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", linewidth=2.2, shrinkA=0, shrinkB=0, mutation_scale=20, color="black"))
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        ax.text(x, y, name, ha="center", va="center", fontsize=15, fontweight="bold",
                bbox=dict(boxstyle="circle,pad=0.15", facecolor="white", edgecolor="black"), zorder=4)
    plt.show()


def contrasts_picture(table):
    """verdict.judge()'s table: contrasts in rows, measures in columns, each cell's colour says what was found.

    In a cell are the change and its 95 % interval. A frame: it survives Holm's correction.
    """
    asks, measures = (list(dict.fromkeys(line[key] for line in table)) for key in ("asks", "measure"))
    fig, ax = plt.subplots(figsize=(10, 0.74 * len(asks) + 1.2))
    for line in table:
        found = "cannot tell" if abs(line["estimate"]) <= line["half"] else "less" if line["estimate"] < 0 else "more"
        j, i = measures.index(line["measure"]), asks.index(line["asks"])
        ax.add_patch(plt.Rectangle((j - 0.48, i - 0.45), 0.96, 0.9, facecolor=FOUND[found],
                                   edgecolor="black" if line["holm"] < 0.05 else "none", linewidth=2.5))
        low, middle, high = (f"{percent(line['estimate'] + side * line['half']):+.1f}".replace("-", "−") for side in (-1, 0, 1))
        ax.text(j - 0.12, i, f"{middle} %", ha="right", va="center", fontsize=17)
        ax.text(j - 0.06, i, f"{low} to {high}", ha="left", va="center", fontsize=14)
    ax.set(xlim=(-0.5, len(measures) - 0.5), ylim=(len(asks) - 0.5, -0.5))
    clear(ax, ticks=True)
    ax.set_xticks(range(len(measures)), measures, fontsize=16)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.set_yticks(range(len(asks)), [WORDS[ask.split()[0]] for ask in asks], fontsize=14)
    handles = [plt.Rectangle((0, 0), 1, 1, facecolor=colour) for colour in FOUND.values()]
    handles.append(plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="black", linewidth=2.5))
    fig.legend(handles, [*FOUND, "survives Holm's correction"], loc="outside lower center", ncols=4, fontsize=14, frameon=False)
    plt.show()


# ---- Samples --------------------------------------------------------------------------------------------------------

SHOWN = {"Sana": "sana", "DiT": "dit", "rung 5": verdict.OURS.replace("rung6", "rung5"), "DyDi-LiT": verdict.OURS}


def first_samples(folder, variants, seed):
    """A sample of each class and variant, (variants, classes, H, W, 3) uint8, from ladder.py's folder of the data.

    They are those of the recipe's guidance. In a column, all come from the same noise.
    """
    from lab import ladder, measures
    rows = []
    for variant in variants:
        pattern = f"{variant.replace(':', '-')}-*-{seed}/samples-cfg{ladder.RECIPE}-*.npz"
        images, labels = measures.load_npz(next(pathlib.Path(folder).glob(pattern)))
        rows.append(images[[np.flatnonzero(labels == c)[0] for c in np.unique(labels)]])
    return np.stack(rows)


def nearest(images, training):
    """The training picture with the least squared difference to each image, mirrored or not. All uint8, (..., H, W, 3)."""
    both = np.concatenate([training, training[:, :, ::-1]])
    wanted = torch.from_numpy(images).float().flatten(0, -4).flatten(1)
    parts = np.array_split(both, 1 + len(both) // 2000)     # all at once would take gigabytes
    distances = [torch.cdist(wanted, torch.from_numpy(part).float().flatten(1)) for part in parts]
    return both[torch.cat(distances, dim=1).argmin(dim=1)].reshape(images.shape)


def keep_samples(folder, data_dir, out):
    """Writes the samples of SHOWN, of the first seed, and their nearest training pictures."""
    from lab import common
    images = first_samples(folder, SHOWN.values(), verdict.SEEDS[0])
    np.savez_compressed(out, images=images, nearest=nearest(images, common.cifar10(data_dir).images), names=list(SHOWN))


def show_samples(path):
    """What keep_samples kept, a row per system, with the nearest training pictures on the right."""
    with np.load(path) as file:
        left, right, names = (file[key] for key in ("images", "nearest", "names"))
    grid = np.concatenate([left, np.full_like(left[:, :1], 255), right], axis=1)
    words = [""] * grid.shape[1]
    words[left.shape[1] // 2], words[-right.shape[1] // 2] = "samples", "nearest training pictures"
    figures.show_images(torch.from_numpy(grid).permute(0, 1, 4, 2, 3) / 127.5 - 1, list(names), words, width=0.52)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    keep_samples(*sys.argv[1:])
