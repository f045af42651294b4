"""Lesson 8's pictures of a trained model: routes, maps, banks, and the loss without a part."""
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from lab.figures import BLACK, BLUE, ORANGE, array, clear, level, show_picture

CHOICES = [BLUE, ORANGE, "#F0E442"]         # dark, middle and light, to differ in grey, too
LEAST = 0.05                                # per cent, where the axis of a growth begins


def key(fig):
    """The colours of a bank's three projectors, over a figure."""
    handles = [Patch(facecolor=c, label=f"projector {i}") for i, c in enumerate(CHOICES, 1)]
    fig.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=14, frameon=False)


def show_loads(loads, groups):
    """For each router the shares of its choices in every group. loads: {router: (groups, 3)}."""
    size = (5.2 * len(loads), 4.8)
    fig, axes = plt.subplots(1, len(loads), figsize=size, sharex=True, sharey=True)
    for ax, (name, shares) in zip(axes, loads.items()):
        shares = array(shares)
        for choice, start, colour in zip(shares.T, shares.cumsum(axis=1).T - shares.T, CHOICES):
            ax.barh(groups, choice, left=start, color=colour, height=0.82)
        ax.set_title(name, fontsize=15)
        ax.set(xlim=(0, 1), xticks=[0, 0.2, 0.4, 0.6, 0.8])
        ax.grid(False)
        ax.tick_params(length=0)
    axes[0].invert_yaxis()
    fig.supxlabel("share of the tokens", fontsize=14)
    key(fig)
    plt.show()


def show_shares(x, shares, xlabel):
    """For each of eight routers the shares of its choices over x. shares: {router: (len(x), 3)}."""
    fig, axes = plt.subplots(2, 4, figsize=(11.5, 5.8), sharex=True, sharey=True)
    for ax, (name, values) in zip(axes.flat, shares.items()):
        ax.stackplot(x, array(values).T, colors=CHOICES)
        ax.set_title(name, fontsize=15)
        ax.set(xlim=(x[0], x[-1]), ylim=(0, 1), yticks=[0, 0.5, 1], xticks=[750, 500, 250])
    for ax in axes[:, 0]:
        ax.set_ylabel("share of tokens")
    fig.supxlabel(xlabel, fontsize=14)
    key(fig)
    plt.show()


def show_route_maps(pictures, routes):
    """Pictures in the first row, below them what each router chose there.

    pictures: (P, 3, S, S) in [-1, 1]; routes: {router: (P, 64) int}."""
    size = (1.6 * len(pictures) + 1.6, 1.7 * len(routes) + 2.2)
    fig, axes = plt.subplots(len(routes) + 1, len(pictures), figsize=size)
    for row, name in zip(axes, ["picture", *routes]):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=15)
    for ax, picture in zip(axes[0], pictures):
        show_picture(ax, picture, 8)
    for row, index in zip(axes[1:], routes.values()):
        for ax, image in zip(row, index):
            ax.imshow(array(image).reshape(8, 8), cmap=ListedColormap(CHOICES), vmin=-0.5,
                      vmax=2.5, interpolation="nearest")
            clear(ax)
    key(fig)
    plt.show()


def show_banks(banks, starts):
    """Every member of every block's bank as a dot, and where all of them started.

    banks: {name: list of (members,)}; starts: {name: number}."""
    _, axes = plt.subplots(1, len(banks), figsize=(11, 4.2))
    for ax, (name, blocks) in zip(axes, banks.items()):
        for b, members in enumerate(blocks, 1):
            place = b + np.linspace(-0.25, 0.25, len(members))
            ax.plot(place, np.sort(array(members)), "o", color=BLUE, markersize=6)
        level(ax, "start", starts[name], end=1.01)
        ax.set(xlabel="block", ylabel=name, xticks=range(1, len(blocks) + 1))
    plt.show()


def show_growth(growth, xlabel, ways=("",)):
    """Percentages of very different sizes on a logarithmic axis, open where the loss falls.

    growth: {row: a pair of (percent, two standard errors) for each of the ways}."""
    fig, ax = plt.subplots(figsize=(11, 1.3 + len(growth) * (0.3 + 0.3 * len(ways))))
    for w, (way, colour, marker) in enumerate(zip(ways, (BLUE, ORANGE, BLACK), "osD")):
        for i, pairs in enumerate(growth.values()):
            (value, error), y = pairs[w], i + 0.75 / len(ways) * (w - (len(ways) - 1) / 2)
            size, face = max(abs(value), LEAST), colour if value > 0 else "white"
            ax.plot([max(size - error, LEAST), size + error], [y, y], color=colour, linestyle="-")
            ax.plot(size, y, marker, color=colour, markersize=10, markerfacecolor=face,
                    markeredgewidth=2, label=None if i else way)
            ax.annotate(f"{float(f'{value:.2g}'):+,g} %", (size + error, y), (10, 0), va="center",
                        textcoords="offset points", fontsize=13)
    ticks = [0.1, 1, 10, 100, 1000, 10000]
    ax.set(xscale="log", xlim=(LEAST, 60000), xlabel=xlabel)
    ax.set_yticks(range(len(growth)), list(growth))
    ax.set_xticks(ticks, [f"{tick:,g} %" for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.invert_yaxis()
    if len(ways) > 1:
        fig.legend(loc="outside upper center", ncols=len(ways), frameon=False)
    plt.show()


def show_fading(runs):
    """The attention's output beside V while training. Thin: a block; thick: the geometric mean.

    runs: {title: {data set: (steps, sizes (steps, blocks))}}."""
    _, axes = plt.subplots(1, len(runs), figsize=(11.5, 4.8), sharey=True)
    for ax, (title, sets) in zip(axes, runs.items()):
        for (word, (steps, sizes)), colour, line in zip(sets.items(), (BLUE, ORANGE), ("-", "--")):
            ax.plot(steps, sizes, color=colour, linestyle=line, linewidth=1, alpha=0.45)
            mean = np.exp(np.log(sizes).mean(axis=1))
            ax.plot(steps, mean, color=colour, linestyle=line, linewidth=4, label=word)
        level(ax, "as long\nas V" if ax is axes[-1] else "", 1, end=1.01)
        ax.set(title=title, yscale="log", xlabel="training step")
        ax.set_xscale("symlog", linthresh=50, linscale=0.4)
        ax.set_xlim(left=-10)
        ax.set_xticks([0, 50, 200, 1000, 4000], ["0", "50", "200", "1,000", "4,000"])
        ax.set_xticks([], minor=True)
    ticks = [0.0001, 0.001, 0.01, 0.1, 1, 10, 100]
    axes[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0].set_ylabel("length of the output beside V")
    axes[0].legend()
    plt.show()
