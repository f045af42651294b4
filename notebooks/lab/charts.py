"""Charts of lessons 8 and 9: costs that race each other, bars with their numbers, a table of coloured numbers, a t-SNE map."""
import matplotlib.pyplot as plt
import numpy as np

from lab.figures import BLUE, COLOURS, GREY, LOOKS, ORANGE, SKY, array, clear, curves, look

WHOLE = next(name for name, (colour, *_) in LOOKS.items() if colour == SKY)         # what LOOKS calls the whole module
KINDS = {"DiT": "softmax", "softmax": "softmax", "Sana": "ReLU", "ReLU": "ReLU", "DyDi": WHOLE}


def mark(ax, value, words, axis="y", end=1.0):
    """A thin grey line at a value of an axis, with words at one end of it.

    Words on a level line stand on it, left (end=0), right (1) or beside the panel (more); on an upright one, above the panel.
    """
    if axis == "y":
        ax.axhline(value, color=GREY, linestyle="-", linewidth=1.3, zorder=1)
        ax.annotate(words, (end, value), (0, 0 if end > 1 else 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                    fontsize=13, ha="right" if 0.5 < end <= 1 else "left", va="center" if end > 1 else "bottom", color="#555555")
    else:
        ax.axvline(value, color=GREY, linestyle="-", linewidth=1.3, zorder=1)
        ax.annotate(words, (value, 1), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=13,
                    ha="center", va="bottom", color="#555555")


def race(x, ys, xlabel, ylabel, **settings):
    """curves() of {name: values} for models and their attention, each with its family's look. Returns the axes.

    A name begins with DiT, softmax, Sana, ReLU or DyDi. One with "paper" or "stored" in it is a variant of its family.
    """
    ax = plt.subplots(figsize=(8.6, 4.6))[1]
    for name, values in ys.items():
        kind = next(kind for start, kind in KINDS.items() if name.startswith(start))
        variant = dict(linestyle=":", color=ORANGE) if "paper" in name else {}
        if "stored" in name:
            variant = dict(linestyle=":", fillstyle="none")
        ax.plot(array(x), array(values), **{**look(kind, marker=True, label=name), **variant})
    return curves(x, {}, xlabel, ylabel, ax=ax, **settings)


def bars(parts, xlabel, labels=(None,), colours=(SKY, ORANGE), form="{:.0%}", width=9.0, ax=None, loc="lower right"):
    """Horizontal bars of {name: number, or one number per label}, the number at the end of each. Returns the axes."""
    rows = {name: np.atleast_1d(values) for name, values in parts.items()}
    n = len(labels)
    ax = ax or plt.subplots(figsize=(width, 0.9 + (0.26 + 0.26 * n) * len(rows)))[1]
    for j, label in enumerate(labels):
        y = np.arange(len(rows)) + (j - (n - 1) / 2) * 0.8 / n
        values = [row[j] for row in rows.values()]
        ax.barh(y, values, height=0.72 / n, label=label, edgecolor="white", hatch="//" if n > 1 and j == 0 else None,
                color=colours[j] if n > 1 else list(colours)[:len(rows)] if len(colours) >= len(rows) else BLUE)
        for height, value in zip(y, values):
            ax.text(value, height, " " + form.format(value), va="center", fontsize=13 if n == 1 else 12)
    ax.set_yticks(range(len(rows)), rows)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlim(0, 1.12 * max(row.max() for row in rows.values()))
    ax.set_xlabel(xlabel)
    if n > 1:
        ax.legend(loc=loc)
    return ax


def number_table(rows, columns, values, badness, forms, low="as real", high="worst"):
    """A table of numbers, each on a colour from green (badness 0) to red (1). values, badness: (rows, columns)."""
    fig, ax = plt.subplots(figsize=(1.02 * len(columns) + 3.2, 0.5 * len(rows) + 1.1))
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
    """Points of several classes in the plane, (n, 2), each class with a colour and a marker; no axes. names: {label: name}."""
    points = array(points)
    for (label, name), colour, marker in zip(names.items(), COLOURS, "osD^v"):
        ax.scatter(*points[labels == label].T, s=size, color=colour, marker=marker, label=name, linewidths=0)
    clear(ax)
    ax.spines[:].set_visible(True)
    ax.set_aspect("equal", adjustable="datalim")
    ax.margins(0.08)


def ellipses(ax, mean, covariance, colour, linestyle="-"):
    """Outlines of a Gaussian in the plane at one and two standard deviations. mean: (2,); covariance: (2, 2)."""
    angle = np.linspace(0, 2 * np.pi, 100)
    values, vectors = np.linalg.eigh(array(covariance))
    circle = vectors * np.sqrt(values) @ np.stack([np.cos(angle), np.sin(angle)])
    for radius in (1, 2):
        ax.plot(*(array(mean)[:, None] + radius * circle), color=colour, linestyle=linestyle)


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
