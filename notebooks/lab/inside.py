"""Lesson 7's pictures of a trained model: routes, attention from part to part, banks, and what happens without a part."""
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from lab.figures import BLUE, CHOICES, GREY, ORANGE, array, box, clear, show_picture

WORDS = ["projector 1", "projector 2", "projector 3"]


def key(fig, words=WORDS):
    """The colours of a bank's members, over a figure."""
    fig.legend(handles=[Patch(facecolor=colour, label=word) for colour, word in zip(CHOICES, words)],
               loc="outside upper center", ncols=len(words), fontsize=14, frameon=False)


def grid_of(names, columns=4, **size):
    """A figure with an axes for each name, in rows of `columns`, and the names as titles."""
    fig, axes = plt.subplots(len(names) // columns, columns, squeeze=False, **size)
    for ax, name in zip(axes.flat, names):
        ax.set_title(name, fontsize=15)
    return fig, axes


def show_loads(loads, groups):
    """For each router the shares of the choices in every group, as bars. loads: {router: (groups, choices)}."""
    fig, axes = grid_of(loads, len(loads), figsize=(5.2 * len(loads), 4.8), sharex=True, sharey=True)
    for ax, shares in zip(axes.flat, loads.values()):
        left = np.zeros(len(groups))
        for choice, colour in zip(array(shares).T, CHOICES):
            ax.barh(groups, choice, left=left, color=colour, height=0.82)
            left += choice
        ax.set(xlim=(0, 1), xticks=[0, 0.2, 0.4, 0.6, 0.8])
        ax.grid(False)
        ax.tick_params(length=0)
    axes[0, 0].invert_yaxis()
    fig.supxlabel("share of the tokens", fontsize=14)
    key(fig)
    plt.show()


def show_shares(x, shares, xlabel):
    """For each router the shares of the choices over x. shares: {router: (len(x), choices)}."""
    fig, axes = grid_of(shares, figsize=(11.5, 5.8), sharex=True, sharey=True)
    for ax, values in zip(axes.flat, shares.values()):
        ax.stackplot(x, array(values).T, colors=CHOICES[:values.shape[1]])
        ax.set(xlim=(x[0], x[-1]), ylim=(0, 1), yticks=[0, 0.5, 1], xticks=[750, 500, 250])
    for ax in axes[:, 0]:
        ax.set_ylabel("share of tokens")
    fig.supxlabel(xlabel, fontsize=14)
    key(fig)
    plt.show()


def show_route_maps(pictures, routes):
    """Pictures in the first row, below them what each router chose there.

    pictures: (P, 3, S, S) in [-1, 1]; routes: {router: (P, side^2) int}.
    """
    side = int(next(iter(routes.values())).shape[1] ** 0.5)
    fig, axes = plt.subplots(len(routes) + 1, len(pictures), figsize=(1.6 * len(pictures) + 1.6, 1.7 * len(routes) + 2.2))
    axes[0, 0].set_ylabel("picture", rotation=0, ha="right", va="center", fontsize=15)
    for ax, picture in zip(axes[0], pictures):
        show_picture(ax, picture, side)
    for row, (name, index) in zip(axes[1:], routes.items()):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=15)
        for ax, image in zip(row, index):
            ax.imshow(array(image).reshape(side, side), cmap=ListedColormap(CHOICES[:3]), vmin=-0.5, vmax=2.5, interpolation="nearest")
            clear(ax)
    key(fig)
    plt.show()


def show_chance(measured, shuffled):
    """A dot for each measured number, and from the least to the largest of its shuffled ones a grey bar.

    measured: {name: number}; shuffled: {name: numbers}.
    """
    fig, ax = plt.subplots(figsize=(8, 4.8))
    for i, (name, value) in enumerate(measured.items()):
        low, high = min(shuffled[name]), max(shuffled[name])
        ax.barh(i, high - low, left=low, height=0.55, color="#C8C8C8", label=f"{len(shuffled[name])} shuffles" if i == 0 else None)
        ax.plot(value, i, "o", color=ORANGE, markersize=11, label="the classes" if i == 0 else None)
    ax.set(yticks=range(len(measured)), yticklabels=list(measured), xlabel="tokens that would have to change their projector", xlim=(0, None))
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.invert_yaxis()
    fig.legend(loc="outside upper center", ncols=2, frameon=False)
    plt.show()


def show_stages(picture, rows, titles, query):
    """The picture, a query's row of each map on one scale, and the last row minus the one before on its own scale.

    picture: (3, S, S); rows: list of (N,), in multiples of the even weight; query: number of the token.
    """
    side = int(len(rows[0]) ** 0.5)
    maps = [array(row).reshape(side, side) for row in rows]
    change = maps[-1] - maps[-2]
    top, most = max(m.max() for m in maps), abs(change).max()
    fig, axes = plt.subplots(1, len(rows) + 2, figsize=(2.75 * (len(rows) + 2), 3.4))
    show_picture(axes[0], picture, side)
    for ax, m in zip(axes[1:-1], maps):
        image = ax.imshow(m, vmin=min(0, min(m.min() for m in maps)), vmax=top, interpolation="nearest")
    fig.colorbar(image, ax=list(axes[1:-1]), shrink=0.8, pad=0.01)
    image = axes[-1].imshow(change, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    fig.colorbar(image, ax=axes[-1], shrink=0.8, pad=0.02)
    for ax, title in zip(axes, ["picture, query", *titles, f"{titles[-1]} − {titles[-2]}"]):
        clear(ax)
        ax.set_title(title, fontsize=15)
        box(ax, divmod(query, side))
    plt.show()


def show_histories(histories, xlabel):
    """Every member of every block's bank over the training, in multiples of its start. histories: {name: (steps, blocks, members)}."""
    blocks = next(iter(histories.values())).shape[1]
    fig, axes = plt.subplots(len(histories), blocks, figsize=(11.5, 3 * len(histories)), sharex=True, sharey="row")
    for row, (name, values) in zip(axes, histories.items()):
        for b, ax in enumerate(row):
            ax.axhline(1, color=GREY, linestyle="-", linewidth=1.5)
            ax.plot(range(1, len(values) + 1), values[:, b], color=BLUE, linestyle="-", linewidth=1.3)
        row[0].set_ylabel(name)
        row[-1].annotate("start", (1, 1), (3, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center", color=GREY)
    for b, ax in enumerate(axes[0]):
        ax.set_title(f"block {b + 1}", fontsize=15)
    fig.supxlabel(xlabel, fontsize=14)
    plt.show()


def show_spread(groups, ylabel, xlabels):
    """Median and middle 80 % of many numbers in each of some places, for two groups. groups: {name: list of tensors, one for each place}."""
    _, ax = plt.subplots()
    for i, (name, places) in enumerate(groups.items()):
        low, middle, high = np.array([np.quantile(array(values), [0.1, 0.5, 0.9]) for values in places]).T
        x = np.arange(len(places)) + 0.16 * (i - (len(groups) - 1) / 2)
        ax.errorbar(x, middle, [middle - low, high - middle], fmt="osD^v"[i], color=(BLUE, ORANGE)[i], label=name, capsize=5, linewidth=2.2, markersize=9)
    ax.set(xticks=range(len(xlabels)), xticklabels=xlabels, ylabel=ylabel, ylim=(0, None))
    ax.legend()
    plt.show()


def show_increase(increase, xlabel):
    """Percentages of very different sizes on a logarithmic axis, filled where the loss grows, open where it falls.

    increase: {name: (percent, two standard errors)}.
    """
    _, ax = plt.subplots(figsize=(11, 4.6))
    for i, (name, (value, error)) in enumerate(increase.items()):
        size = max(abs(value), 1e-9)
        ax.plot([max(size - error, 1e-9), size + error], [i, i], color=BLUE, linestyle="-", linewidth=3)
        ax.plot(size, i, "o", color=BLUE, markersize=12, markerfacecolor=BLUE if value > 0 else "white", markeredgewidth=2)
        ax.annotate(f"{float(f'{value:.2g}'):+,g} %", (size + error, i), (12, 0), textcoords="offset points", va="center")
    ticks = [0.01, 0.1, 1, 10, 100, 1000, 10000]
    ax.set(xscale="log", xlim=(0.005, 60000), yticks=range(len(increase)), yticklabels=list(increase), xlabel=xlabel)
    ax.set_xticks(ticks, [f"{tick:,g} %" for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.invert_yaxis()
    plt.show()
