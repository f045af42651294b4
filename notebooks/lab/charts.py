"""Charts of lessons 8 to 12 and A."""
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
from matplotlib.ticker import PercentFormatter

from lab import experiment, twins
from lab.figures import (BLACK, BLUE, GREEN, GREY, LOOKS, ORANGE, PINK, SKY, VIOLET, WIDTH, array,
                         clear, example)


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
        words = "–" if np.isnan(values[i][j]) else forms[j].format(values[i][j])
        ax.text(j, i, words, ha="center", va="center", fontsize=14,
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


# ---- The neighbours (lesson 12) -----------------------------------------------------------------

# The eight systems with their looks, and what ladder.py calls them.
SYSTEMS = {"DiT": (BLUE, "-", "o"), "PixArt-Sigma": (SKY, "--", "s"), "MoH-DiT": (BLACK, ":", "^"),
           "Sana": (GREY, "--", "D"), "EDiT": (GREEN, "-.", "v"), "LiT": (PINK, (0, (3, 1)), "X"),
           "DiG": (VIOLET, (0, (8, 3)), "P"), "DyDi-LiT": (ORANGE, "-", "*")}
VARIANTS = dict(zip(SYSTEMS, ["dit", "pixart", "moh", "sana", "edit", "lit", "dig",
                              experiment.RUNG6["mass"]]))
LOOKS.update(SYSTEMS)


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
