"""What the notebooks share: the way to dydilit.py, plots, timing, and the check of answers. Nothing of the method."""
import math
import statistics
import time
import weakref

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import cbook
from matplotlib.patches import Rectangle
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from lab.measures import row_entropy, row_variance  # noqa: F401

if torch.cuda.is_available():
    torch.set_default_device("cuda")        # every tensor that a notebook makes is made there

# Okabe and Ito's colours, told apart by colour-blind readers; the line styles and markers serve a print without colour.
BLUE, ORANGE, GREEN, PINK, SKY, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000"
COLOURS = [BLUE, ORANGE, GREEN, PINK, SKY, BLACK]
plt.rcParams.update({
    "figure.dpi": 90, "figure.figsize": (6.5, 3.6), "figure.constrained_layout.use": True, "font.size": 11,
    "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False, "image.cmap": "viridis",
    "axes.prop_cycle": plt.cycler(color=COLOURS, linestyle=["-", "--", "-.", ":", (0, (6, 1, 1, 1)), (0, (8, 3))])})


def check(number, answer, expected, tolerance=1e-3):
    """Says whether an exercise's answer is right. answer, expected: numbers, tensors, strings or lists; ... is none."""
    if answer is ...:
        return print(f"Exercise {number}: not answered yet. Put your answer in place of the ... above.")
    try:
        right = (answer == expected if isinstance(expected, str) else
                 bool(np.allclose(array(answer), array(expected), rtol=tolerance, atol=tolerance * 1e-2)))
    except (TypeError, ValueError):         # another shape, or no number at all
        right = False
    print(f"Exercise {number}: " + ("right." if right else "not right yet."))


def array(x):
    """Anything with numbers in it as a float64 array."""
    return np.asarray(x.detach().cpu() if torch.is_tensor(x) else x, dtype=np.float64)


def photo(size=64):
    """A photograph that matplotlib brings along, Rear Admiral Grace Hopper. (1, 3, size, size) in [-1, 1]."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return train.pixels(train.read_image(file.name, size)[None]).to(torch.get_default_device())


def median_ms(functions, repeats=7):
    """Median milliseconds of each of {name: function}, called in turn so that a busy machine slows all of them."""
    times = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:                           # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


class Allocations(TorchDispatchMode):
    """Bytes of the tensors made within this context and still alive: now, and at the peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for storage in storages((args, kwargs)):
            self.known.add(storage)         # was there before, or was counted when it was made
        out = operation(*args, **(kwargs or {}))
        for storage in storages(out):
            if storage not in self.known:   # neither a view nor an in-place result
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, nbytes):
        self.now -= nbytes


def storages(tree):
    """The memory of all tensors in nested lists and dictionaries."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


def show_images(images, rows=None, columns=None, title=None, width=0.75, handle=None):
    """A grid of pictures. images: (R, K, C, S, S) in [-1, 1]; rows, columns: labels; width: inches of a picture.

    handle: IPython's DisplayHandle of an earlier output that the grid replaces.
    """
    r, k, c, s, _ = images.shape
    grid = np.ones((r * (s + 2) - 2, k * (s + 2) - 2, c))
    for i in range(r):
        for j in range(k):
            grid[i * (s + 2):][:s, j * (s + 2):][:, :s] = array((images[i, j].permute(1, 2, 0) + 1) / 2).clip(0, 1)
    fig, ax = plt.subplots(figsize=(width * k + 1, width * r + 0.5))
    ax.imshow(grid if c == 3 else grid[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_yticks([(s + 2) * i + s / 2 for i in range(len(rows or []))], rows or [])
    ax.set_xticks([(s + 2) * j + s / 2 for j in range(len(columns or []))], columns or [])
    clear(ax, ticks=True)
    ax.xaxis.tick_top()
    ax.set_title(title)
    if handle is None:
        plt.show()
    else:
        plt.close(fig)
        handle.update(fig)


def clear(ax, ticks=False):
    """Takes frame, grid and tick marks off a picture, and without `ticks` the labels too."""
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    if not ticks:
        ax.set(xticks=[], yticks=[])


def show_maps(maps, titles, query=None, picture=None, columns=4, **imshow):
    """Heat maps side by side, each with its own scale; a picture before them; the query token boxed in all.

    maps: list of (side, side), or of any matrices; query: (row, column); picture: (3, S, S) in [-1, 1].
    """
    n = len(maps) + (picture is not None)
    rows = math.ceil(n / columns)
    fig, axes = plt.subplots(rows, min(n, columns), figsize=(2.6 * min(n, columns), 2.3 * rows), squeeze=False)
    for ax in axes.flat:
        clear(ax)
    axes = list(axes.flat)
    for ax in axes[n:]:
        ax.set_visible(False)
    if picture is not None:
        ax = axes.pop(0)
        ax.imshow(array((picture.permute(1, 2, 0) + 1) / 2).clip(0, 1), interpolation="nearest",
                  extent=(-0.5, maps[0].shape[1] - 0.5, maps[0].shape[0] - 0.5, -0.5))
        ax.set_title("picture and query", fontsize=10)
        box(ax, query)
    for ax, values, title in zip(axes, maps, titles):
        image = ax.imshow(array(values), interpolation="nearest", **imshow)
        ax.set_title(title, fontsize=10)
        box(ax, query)
        fig.colorbar(image, ax=ax, shrink=0.8).ax.tick_params(labelsize=8)
    plt.show()


def box(ax, query):
    if query is not None:
        ax.add_patch(Rectangle((query[1] - 0.5, query[0] - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=1.8))
