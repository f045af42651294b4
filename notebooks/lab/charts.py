"""Charts of lessons 8 and 9: costs that race each other, bars with their numbers, a table of coloured numbers, a t-SNE map."""
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import PercentFormatter

from lab.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY, VIOLET, array, clear, curves, look

CLASS_COLOURS = [BLUE, BLACK, ORANGE, GREEN, PINK, VIOLET, SKY, GREY, "#C79A00", "#8C564B"]
KINDS = {"DiT": "softmax", "softmax": "softmax", "Sana": "ReLU", "ReLU": "ReLU", "DyDi": "convolution"}


def race(x, ys, xlabel, ylabel, **settings):
    """curves() of {name: values} for models and their attention, each with its family's look. Returns the axes.

    A name begins with DiT, softmax, Sana, ReLU or DyDi, whose line is thick. One with "paper" or "stored" in it is a variant.
    """
    ax = plt.subplots(figsize=(8.6, 4.6))[1]
    for name, values in ys.items():
        kind = next(kind for start, kind in KINDS.items() if name.startswith(start))
        variant = dict(linestyle=":", color=ORANGE) if "paper" in name else {}
        if "stored" in name:
            variant = dict(linestyle=":", fillstyle="none")
        width = 4 if kind == "convolution" and not variant else 2.2
        ax.plot(array(x), array(values), **{**look(kind, marker=True, label=name), "linewidth": width, **variant})
    return curves(x, {}, xlabel, ylabel, ax=ax, **settings)


def bars(parts, xlabel, labels=(None,), colours=(SKY, ORANGE), form="{:.0%}", width=9.0, base=0, ax=None, loc="lower right"):
    """Horizontal bars of {name: number, or one number per label}, the number at the end of each. Returns the axes.

    They begin at `base`. If that is not 0, the axis is logarithmic and they lead to either side of it.
    """
    rows = {name: np.atleast_1d(values) for name, values in parts.items()}
    n, every = len(labels), np.array(list(rows.values()))
    ax = ax or plt.subplots(figsize=(width, 0.9 + (0.26 + 0.26 * n) * len(rows)))[1]
    for j, label in enumerate(labels):
        y = np.arange(len(rows)) + (j - (n - 1) / 2) * 0.8 / n
        ax.barh(y, every[:, j] - base, left=base, height=0.72 / n, label=label, edgecolor="white", hatch="//" if n > 1 and j == 0 else None,
                color=colours[j] if n > 1 else list(colours)[:len(rows)] if len(colours) >= len(rows) else BLUE)
        for height, value in zip(y, every[:, j]):
            ax.text(value, height, f" {form.format(value)} ", va="center", ha="left" if value >= base else "right", fontsize=13)
    ax.set_yticks(range(len(rows)), rows)
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


def number_table(rows, columns, values, badness, forms, low="as real", high="worst"):
    """A table of numbers, each on a colour from green (badness 0) to red (1). values, badness: (rows, columns)."""
    fig, ax = plt.subplots(figsize=(0.9 * len(columns) + 2.9, 0.5 * len(rows) + 1.1))
    image = ax.imshow(badness, cmap="RdYlGn_r", vmin=-0.15, vmax=1.15, aspect="auto", alpha=0.75)
    for i in range(len(rows)):
        for j in range(len(columns)):
            ax.text(j, i, forms[j].format(values[i][j]), ha="center", va="center", fontsize=14)
    clear(ax, ticks=True)
    ax.set_xticks(range(len(columns)), columns, fontsize=14)
    ax.set_yticks(range(len(rows)), rows, fontsize=14)
    ax.xaxis.tick_top()
    ax.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    ax.grid(True, which="minor", color="white", linewidth=3, alpha=1, linestyle="-")
    ax.tick_params(which="both", length=0)
    bar = fig.colorbar(image, ax=ax, orientation="horizontal", aspect=40, shrink=0.5, pad=0.02, ticks=[0, 1])
    bar.ax.set_xticklabels([low, high], fontsize=13)
    bar.ax.set_xlim(0, 1)
    plt.show()


def scatter_classes(ax, points, labels, names, size=22):
    """Points of several classes in the plane, (n, 2), no axes. A class has the same colour and marker wherever it comes.

    names: {label, 0 to 9: name}.
    """
    points = array(points)
    for label, name in names.items():
        ax.scatter(*points[labels == label].T, s=size, color=CLASS_COLOURS[label], marker="oPsD^Xv<*p"[label], label=name, linewidths=0)
    clear(ax)
    ax.spines[:].set_visible(True)
    ax.set_aspect("equal", adjustable="datalim")
    ax.margins(0.08)


def ellipses(ax, mean, covariance, colour, linestyle="-", label=None):
    """Outlines of a Gaussian in the plane at one and two standard deviations. mean: (2,); covariance: (2, 2)."""
    angle = np.linspace(0, 2 * np.pi, 100)
    values, vectors = np.linalg.eigh(array(covariance))
    circle = vectors * np.sqrt(values) @ np.stack([np.cos(angle), np.sin(angle)])
    for radius in (1, 2):
        ax.plot(*(array(mean)[:, None] + radius * circle), color=colour, linestyle=linestyle, label=label if radius == 1 else None)


def balls(ax, centres, radii, points, inside, names):
    """Discs around the centres, and points that lie in one of them or in none.

    centres: (L, 2); radii: (L,); points: (M, 2); inside: (M,) bool; names: what the centres and the points are.
    """
    for centre, radius in zip(array(centres), array(radii)):
        ax.add_patch(plt.Circle(centre, radius, color="gray", alpha=0.13, linewidth=0))
    ax.scatter(*array(centres).T, s=16, color="gray", label=f"{names[0]}, with balls")
    for which, word, colour, marker in [(inside, "inside", BLUE, "o"), (~inside, "outside", ORANGE, "X")]:
        ax.scatter(*array(points[which]).T, s=50, color=colour, marker=marker, label=f"{names[1]}, {word}")
    ax.set(aspect="equal", xticks=range(-2, 7, 2), yticks=range(-2, 5, 2))
    ax.legend(fontsize=12, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, handletextpad=0.2, columnspacing=0.8)


def pipeline():
    """What lesson 9 measures: from noise to generated pictures, from both sets of pictures to features, and to one number."""
    ax = plt.subplots(figsize=(11, 3.2))[1]
    stations = {"noise": (0.6, 2.4), "model,\nmany steps": (2.6, 2.4), "generated\npictures": (4.8, 2.4), "real\npictures": (4.8, 0.7),
                "network": (6.9, 1.55), "features": (8.7, 1.55), "one\nnumber": (10.4, 1.55)}
    for word, (x, y) in stations.items():
        lit = x > 4
        ax.text(x, y, word, ha="center", va="center", fontsize=15, color=BLACK if lit else "#767676", zorder=3)
        ax.add_patch(FancyBboxPatch((x - 0.68, y - 0.5), 1.36, 1.0, boxstyle="round,pad=0,rounding_size=0.12", linewidth=2.2 if lit else 1.4,
                                    facecolor="#EAF2F8" if lit else "white", edgecolor=BLACK if lit else "#949494"))
    for start, end in [((1.28, 2.4), (1.92, 2.4)), ((3.28, 2.4), (4.12, 2.4)), ((5.48, 2.4), (6.22, 1.8)), ((5.48, 0.7), (6.22, 1.3)),
                       ((7.58, 1.55), (8.02, 1.55)), ((9.38, 1.55), (9.72, 1.55))]:
        ax.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", linewidth=2, shrinkA=0, shrinkB=0, mutation_scale=18,
                                                    color=BLACK if start[0] > 4 else "#949494"))
    ax.set(xlim=(-0.2, 11.2), ylim=(0.05, 3.05), aspect="equal")
    clear(ax)
    plt.show()
