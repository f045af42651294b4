"""Charts of lessons 9 to 12 and A.

    python notebooks/lab/charts.py floors DIR   writes results/verdict/floors.csv, CIFAR-10 in DIR
"""
import pathlib
import sys

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
from matplotlib.ticker import PercentFormatter

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import dydilit  # noqa: E402
import train  # noqa: E402
from lab import eq8, experiment, figures, ladder, measures, twins  # noqa: E402
from lab.figures import (BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY, VIOLET, WIDTH,  # noqa: E402
                         Sketch, array, clear, curves, example, look)

KINDS = {"DiT": "softmax", "softmax": "softmax", "Sana": "ReLU", "ReLU": "ReLU",
         "DyDi": "convolution"}


def race(x, ys, xlabel, ylabel, **settings):
    """curves() of {name: values}, each with its family's look. Returns the axes.

    A name begins with DiT, softmax, Sana, ReLU or DyDi, whose line is thick. One with "paper" or
    "stored" in it is a variant."""
    ax = plt.subplots(figsize=(8.6, 4.6))[1]
    for name, values in ys.items():
        kind = next(kind for start, kind in KINDS.items() if name.startswith(start))
        style = dict(look(kind, marker=True, label=name), linewidth=2.2)
        if "paper" in name:
            style |= dict(linestyle=":", color=ORANGE)
        elif "stored" in name:
            style |= dict(linestyle=":", fillstyle="none")
        elif kind == "convolution":
            style |= dict(linewidth=4)
        ax.plot(array(x), array(values), **style)
    return curves(x, {}, xlabel, ylabel, ax=ax, **settings)


def bars(parts, xlabel, labels=(None,), colours=None, form="{:.0%}", base=0, loc="lower right"):
    """Horizontal bars of {name: number, or one per label}, each with its number. Returns the axes.

    colours: one per label, or one per bar. The bars begin at `base`. If that is not 0, the axis is
    logarithmic and they lead to either side."""
    every = np.array([np.atleast_1d(values) for values in parts.values()])
    rows, n = every.shape
    ax = plt.subplots(figsize=(9, 0.9 + (0.26 + 0.26 * n) * rows))[1]
    colours = (colours or (SKY, ORANGE)) if n > 1 else [colours or BLUE]
    for j, label in enumerate(labels):
        y = np.arange(rows) + (j - (n - 1) / 2) * 0.8 / n
        ax.barh(y, every[:, j] - base, left=base, height=0.72 / n, label=label, color=colours[j],
                edgecolor="white", hatch="//" if n > 1 and j == 0 else None)
        for height, value in zip(y, every[:, j]):
            ax.text(value, height, f" {form.format(value)} ", va="center", fontsize=13,
                    ha="left" if value >= base else "right")
    ax.set_yticks(range(rows), parts)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel(xlabel)
    if base:
        ax.set(xscale="log", xlim=(0.75 * every.min(), 1.35 * every.max()))
        ax.minorticks_off()
    else:
        ax.set_xlim(0, 1.12 * every.max())
    if "%" in form:
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if n > 1:
        ax.legend(loc=loc)
    return ax


def dots(found, xlabel, looks, ax=None, **settings):
    """A dot for each of {name: values}, a row per name, and a bar at the mean. Returns the axes.

    looks: (colour, marker) of each name; settings: what ax.set takes."""
    ax = ax or plt.subplots(figsize=(8.5, 4.4))[1]
    for i, (values, (colour, marker)) in enumerate(zip(found.values(), looks)):
        ax.plot(values, [i] * len(values), marker, color=colour, alpha=0.4, markersize=6)
        ax.plot(np.mean(values), i, "|", color=BLACK, markersize=15, markeredgewidth=2.5)
    ax.set(xlabel=xlabel, yticks=range(len(found)), yticklabels=list(found), **settings)
    ax.set_ylim(len(found) - 0.5, -0.5)
    return ax


# ---- Measuring (lesson 10) ----------------------------------------------------------------------

def number_table(rows, columns, values, badness, forms):
    """A table of numbers, each on a blue that is the darker, the nearer its badness is to 1.

    values, badness: (rows, columns); forms: a format per column."""
    ax = plt.subplots(figsize=(0.9 * len(columns) + 2.9, 0.5 * len(rows) + 0.6))[1]
    ax.imshow(badness, cmap="Blues", vmin=0, vmax=1.2, aspect="auto")
    for (i, j), dark in np.ndenumerate(badness):
        ax.text(j, i, forms[j].format(values[i][j]), ha="center", va="center", fontsize=14,
                color="white" if dark > 0.7 else BLACK)
    clear(ax, ticks=True)
    ax.set_xticks(range(len(columns)), columns, fontsize=14)
    ax.set_yticks(range(len(rows)), rows, fontsize=14)
    ax.xaxis.tick_top()
    plt.show()


CLASS_LOOKS = [(BLUE, "o"), (BLACK, "P"), (ORANGE, "s"), (GREEN, "D"), (PINK, "^"), (VIOLET, "X"),
               (SKY, "v"), (GREY, "<"), ("#C79A00", "*"), ("#8C564B", "p")]


def scatter_classes(ax, points, labels, names, title):
    """Points of several classes in the plane, (n, 2), without axes. names: {label: name}."""
    for label, name in names.items():
        colour, marker = CLASS_LOOKS[label]
        ax.scatter(*array(points)[labels == label].T, s=22, color=colour, marker=marker, label=name,
                   linewidths=0)
    clear(ax)
    ax.spines[:].set_visible(True)
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_title(title, fontsize=14)


def ellipses(ax, mean, covariance, colour, linestyle="-", label=None):
    """Outlines of a Gaussian in the plane at one and two standard deviations."""
    angle = np.linspace(0, 2 * np.pi, 100)
    values, vectors = np.linalg.eigh(array(covariance))
    ring = vectors * np.sqrt(values) @ np.stack([np.cos(angle), np.sin(angle)])
    for radius in (1, 2):
        ax.plot(*(array(mean)[:, None] + radius * ring), color=colour, linestyle=linestyle,
                label=label if radius == 1 else None)


def balls(ax, centres, radii, points, inside, names, title):
    """Discs around the centres (L, 2), and points (M, 2) that lie in one of them, or in none.

    inside: (M,) bool; names: what the centres and the points are."""
    for centre, radius in zip(array(centres), array(radii)):
        ax.add_patch(plt.Circle(centre, radius, color=GREY, alpha=0.13, linewidth=0))
    ax.scatter(*array(centres).T, s=16, color=GREY, label=f"{names[0]}, with balls")
    ax.scatter(*array(points[inside]).T, s=50, color=BLUE, label=f"{names[1]}, inside")
    ax.scatter(*array(points[~inside]).T, s=50, color=ORANGE, marker="X",
               label=f"{names[1]}, outside")
    ax.set(aspect="equal", xticks=range(-2, 7, 2), yticks=range(-2, 5, 2), title=title)
    ax.legend(fontsize=12, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3,
              handletextpad=0.2, columnspacing=0.8)


def pipeline():
    """From noise to generated pictures, from both sets of pictures to features, and to a number."""
    places = {"noise": (0.9, 2.4), "model,\nmany steps": (2.9, 2.4),
              "generated\npictures": (5, 2.4), "real\npictures": (5, 0.7), "network": (7.1, 1.55),
              "features": (8.9, 1.55), "one\nnumber": (10.6, 1.55)}
    names = list(places)
    s = Sketch(11.5, 3.1, names[2:], dict.fromkeys(names, BLACK))
    for name, (x, y) in places.items():
        s.box(name, x, y, name, 1.4, 1.0)
    for start, end in zip(names[:3] + names[3:6], names[1:3] + ["network"] + names[4:]):
        (x, y), (to_x, to_y) = places[start], places[end]
        s.arrow(start, (x + 0.7, y), (to_x - 0.7, to_y + 0.2 * np.sign(y - to_y)))
    plt.show()


# ---- Does it hold? (lessons 11 and A) -----------------------------------------------------------

GROUP_LOOKS = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "D")]


def forest(table, words, key, units, xlabel):
    """Contrasts as estimates with 95 % intervals, and a colour for each group. Returns the axes.

    table: experiment.paired's lines; words(line): its row; key: where a line has its group; units:
    {group: what counts as 1 on the axis}. Filled: it survives Holm's correction."""
    rows, groups = list(dict.fromkeys(map(words, table))), list(units)
    ax = plt.subplots(figsize=(11, 0.22 * (len(groups) - 0.2) * len(rows) + 1.5))[1]
    ax.axvline(0, color=GREY, linestyle="-", linewidth=1)
    for line in table:
        group = groups.index(line[key])
        y = rows.index(words(line)) + 0.24 * (group - (len(groups) - 1) / 2)
        style = dict(color=GROUP_LOOKS[group][0], linestyle="-")
        ax.plot([bound / units[line[key]] for bound in experiment.interval(line)], [y, y], **style)
        ax.plot(line["estimate"] / units[line[key]], y, GROUP_LOOKS[group][1], **style,
                fillstyle="full" if line["holm"] < 0.05 else "none")
    for group, (colour, marker) in zip(groups, GROUP_LOOKS):
        ax.plot([], [], marker + "-", color=colour, label=group)
    ax.set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5), xlabel=xlabel)
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=3, fontsize=13, frameon=False)
    return ax


def paired_tiles(picture):
    """A picture's 16 tiles in eight couples, most alike first, each as a strip (3, 4, 14).

    A strip has the tile, its partner, and where they agree, white in all colours, black in none."""
    tiles = twins.to_tiles(picture[None].sign())[0]                         # (16, 3, 4, 4)
    alike, strips = tiles.flatten(1) @ tiles.flatten(1).T, []
    alike.fill_diagonal_(-100)
    for _ in range(len(tiles) // 2):
        i, j = divmod(alike.argmax().item(), len(tiles))
        agree = ((tiles[i] == tiles[j]).float().mean(0) * 2 - 1).expand(3, -1, -1)
        gap = torch.full((3, twins.TILE, 1), 0.5)
        strips.append(torch.cat([tiles[i], gap, tiles[j], gap, agree], dim=2))
        alike[[i, j]] = alike[:, [i, j]] = -100
    return strips


def show_twins(pictures):
    """{name: picture}, each cut into its couples of tiles, a row per name."""
    _, axes = plt.subplots(len(pictures), 8, figsize=(12, 0.62 * len(pictures)), squeeze=False)
    for line, (name, picture) in zip(axes, pictures.items()):
        for ax, tiles in zip(line, paired_tiles(picture)):
            ax.imshow(((tiles + 1) / 2).permute(1, 2, 0), interpolation="nearest")
            clear(ax)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=13)
    plt.show()


def write_floors(data_dir):
    """The squared error, by band, of always predicting the mean picture of the class.

    The noise cancels: what is left of its prediction's error is the picture's, times a ratio. The
    pictures and timesteps are those on which ladder.py measures the models."""
    training, diffusion, lines = train.cifar10(data_dir), dydilit.GaussianDiffusion(), []
    pixels, labels = train.pixels(training.images), torch.as_tensor(training.labels)
    means = torch.stack([pixels[labels == c].mean(0) for c in range(10)])
    held_out = eq8.held_out_images("cifar10", data_dir)
    ratio = diffusion.sqrt_alpha_bar / diffusion.sqrt_one_minus
    for band in range(ladder.BANDS):
        x, _, y, t = ladder.noisy_band(held_out, band)
        error = (ratio[t].view(-1, 1, 1, 1) * (x - means[y])).square().mean().item()
        lines.append(dict(timesteps_from=band * 1000 // ladder.BANDS, squared_error=error))
    measures.save_log(experiment.RESULTS / "verdict/floors.csv", lines)


# ---- The neighbours (lesson 12) -----------------------------------------------------------------

# The eight systems with their looks, and what ladder.py calls them.
LOOKS = {"DiT": (BLUE, "-", "o"), "PixArt-Sigma": (SKY, "--", "s"), "MoH-DiT": (BLACK, ":", "^"),
         "Sana": (GREY, "--", "D"), "EDiT": (GREEN, "-.", "v"), "LiT": (PINK, (0, (3, 1)), "X"),
         "DiG": (VIOLET, (0, (8, 3)), "P"), "DyDi-LiT": (ORANGE, "-", "*")}
VARIANTS = dict(zip(LOOKS, ["dit", "pixart", "moh", "sana", "edit", "lit", "dig",
                            experiment.RUNG6["mass"]]))
figures.LOOKS.update(LOOKS)
IDEAS = {"compress the keys": (BLUE, 4.6), "linearize": (GREEN, 3.5),
         "gate and scan": (ORANGE, 2.4), "route the tokens": (VIOLET, 1.4),
         "route the heads": (PINK, 0.5)}
ANSWERS = {
    "PixArt-Sigma": (["compress the keys"], "softmax over N/16 keys, in the later blocks"),
    "EDiT": (["compress the keys", "linearize"], "N/4 keys, queries see their surroundings"),
    "Sana": (["linearize"], "ReLU, one head"),
    "LiT": (["linearize"], "ReLU, few heads, a 5×5 convolution"),
    "DiG": (["linearize", "gate and scan"], "a memory that forgets, four directions"),
    "DyDi-LiT": (["linearize", "route the tokens"], "kernel, difference, a 3×3 convolution"),
    "MoH-DiT": (["route the heads"], "softmax, each token picks heads")}


def answers_map():
    """Five ideas, and the seven systems made of them; grey are those of earlier lessons."""
    colours = {"DiT": BLACK, **{idea: colour for idea, (colour, _) in IDEAS.items()},
               **dict.fromkeys(ANSWERS, BLACK)}
    s = Sketch(12.4, 5.3, set(colours) - {"Sana", "DyDi-LiT"}, colours)
    s.box("DiT", 0.95, 2.6, "DiT:\nevery token\nsees every\nother, $N^2$", 1.6, 1.6)
    for idea, (_, y) in IDEAS.items():
        s.arrow(idea, (1.75, 2.6 + 0.25 * (y - 2.6)), (2.4, y))
        s.box(idea, 3.6, y, idea, 2.4)
    for i, (name, (ideas, text)) in enumerate(ANSWERS.items()):
        y = 4.95 - 0.74 * i
        for j, idea in enumerate(ideas):            # where two arrows end, one ends above the other
            s.arrow(idea, (4.8, IDEAS[idea][1]), (6.2, y + 0.12 * (len(ideas) - 1) * (1 - 2 * j)))
        s.box(name, 7.1, y, name, 1.8, 0.55)
        s.note(name, 8.15, y, text, ha="left")
    plt.show()


def course_module(kind, *arguments):
    """A neighbour's attention of width 64 that nobody trained; always the same.

    Queries, keys and values get lesson 1's projections, and what follows the attention is the
    identity. All other weights are a new model's."""
    ex = example()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        module = kind(WIDTH, *arguments)
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    layer.bias.zero_()
        w_qk, w_v = ex.w_qk.T, ex.w_v.T             # nn.Linear multiplies by the transpose
        for name, weights in [("qkv", [w_qk, w_qk, w_v]), ("kv", [w_qk, w_v]), ("q", [w_qk]),
                              ("k", [w_qk]), ("v", [w_v])]:
            if hasattr(module, name):               # DiG's queries and keys are half as wide
                layer = getattr(module, name)
                layer.weight.copy_(torch.cat(weights)[:len(layer.weight)])
        nn.init.eye_(module.proj.weight)
    return module.requires_grad_(False)


def small_strip(maps, *names):
    """figures.strip() of the maps with these names, with fewer pixels: this lesson has many."""
    with plt.rc_context({"figure.dpi": 90}):
        figures.strip({name: maps[name] for name in names})


if __name__ == "__main__":
    if sys.argv[1:2] != ["floors"] or len(sys.argv) != 3:
        sys.exit(__doc__)
    write_floors(sys.argv[2])
