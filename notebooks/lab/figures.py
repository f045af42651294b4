"""What the notebooks' pictures share: names and colours, the two diagrams, the strip of maps, grids of images, sliders."""
import inspect
import math
import os

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, to_rgb
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from lab import example as spine

# Okabe and Ito's colours, told apart by colour-blind readers; the line styles and markers serve a print without colour.
BLUE, ORANGE, GREEN, PINK, SKY, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000"
GREY, VIOLET = "#777777", "#6A51A3"
COLOURS = [BLUE, ORANGE, GREEN, PINK, SKY, BLACK]

# In every lesson a kind of attention, and the part of the module that makes it, has one colour, line and marker.
LOOKS = {"softmax": (BLUE, "-", "o"), "ReLU": (GREY, "--", "s"), "focused": (GREEN, "-.", "D"), "dynamic": (PINK, ":", "^"),
         "differential": (ORANGE, (0, (6, 1, 1, 1)), "v"), "convolution": (SKY, (0, (8, 3)), "P"),
         "projected": (VIOLET, (0, (3, 1)), "X")}

plt.rcParams.update({
    "figure.dpi": 110, "figure.figsize": (8, 4.2), "figure.constrained_layout.use": True, "font.size": 14,
    "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False, "image.cmap": "viridis",
    "lines.linewidth": 2.2, "lines.markersize": 7,
    "axes.prop_cycle": plt.cycler(color=COLOURS, linestyle=["-", "--", "-.", ":", (0, (6, 1, 1, 1)), (0, (8, 3))])})


def look(name, marker=False, label=None):
    """Keywords for ax.plot: colour, line style and label (marker too) of a kind of attention. name: a key of LOOKS."""
    colour, line, symbol = LOOKS[name]
    return dict(color=colour, linestyle=line, label=label or name, **({"marker": symbol} if marker else {}))


def array(x):
    """Anything with numbers in it as a float64 array."""
    return np.asarray(x.detach().cpu() if torch.is_tensor(x) else x, dtype=np.float64)


def curves(x, ys, xlabel, ylabel, markers=True, ax=None, xticks=None, yticks=None, **settings):
    """Lines of {name: values} over x with the names' looks, and as many labelled ticks as asked for.

    xticks, yticks: the numbers to label. settings: what ax.set takes (xscale="log", ylim=...). Returns the axes.
    """
    ax = ax or plt.subplots()[1]
    for name, values in ys.items():
        ax.plot(array(x), array(values), **(look(name, markers) if name in LOOKS else {"label": name, "marker": "o" if markers else ""}))
    ax.set(xlabel=xlabel, ylabel=ylabel, **settings)
    for axis, ticks in [(ax.xaxis, xticks), (ax.yaxis, yticks)]:
        if ticks is not None:
            axis.set_ticks(list(ticks), [f"{tick:g}" for tick in ticks])
            axis.set_ticks([], minor=True)
    ax.legend()
    return ax


# ---- The photograph and the strip -----------------------------------------------------------------------------------

# Nothing where the weight is zero, then yellow to red; blue where it is negative.
HEAT = LinearSegmentedColormap.from_list("heat", [
    (0.0, (0.0, 0.1, 0.8, 1.0)), (0.25, (0.1, 0.3, 1.0, 0.9)), (0.44, (0.4, 0.65, 1.0, 0.55)), (0.5, (1, 1, 1, 0)), (0.56, (1.0, 0.95, 0.3, 0.55)), (0.75, (1.0, 0.55, 0.0, 0.9)),
    (1.0, (0.85, 0.0, 0.1, 1.0))])
TOP = 10                                    # the strip's scale ends at ten times the even weight


def show_picture(ax, picture, side=spine.SIDE, grey=False):
    """The photograph under a map of (side, side) tokens. picture: (3, S, S) in [-1, 1]."""
    pixels = array((picture.permute(1, 2, 0) + 1) / 2).clip(0, 1)
    if grey:
        pixels = (0.35 + 0.6 * pixels.mean(axis=2, keepdims=True)).repeat(3, axis=2)
    ax.imshow(pixels, extent=(-0.5, side - 0.5, side - 0.5, -0.5), interpolation="bilinear")
    clear(ax)


def outline(ax, mask, colour, side=spine.SIDE):
    """A line around the tokens of a mask. mask: (side^2,) bool."""
    fine = np.kron(array(mask).reshape(side, side), np.ones((16, 16)))
    axis = (np.arange(16 * side) + 0.5) / 16 - 0.5
    ax.contour(axis, axis, fine, levels=[0.5], colors=[colour], linewidths=2, linestyles="-")


def draw_map(ax, row, ex, top=TOP):
    """One query's weights over the photograph, in multiples of the even weight 1/N. row: (256,), any scale."""
    row = row.abs().sum() ** -1 * row
    show_picture(ax, ex.picture, grey=True)
    image = ax.imshow(array(row.view(spine.SIDE, spine.SIDE) * len(row)), cmap=HEAT, vmin=-top, vmax=top,
                      interpolation="nearest")
    box(ax, divmod(ex.query, spine.SIDE))
    return image


def show_map(row, title, ex=None, top=TOP):
    """The photograph with face, sky and query, and beside it, large, one query's weights. row: (256,)."""
    ex = ex or spine.example()
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.3))
    show_example(left, ex)
    image = draw_map(right, row, ex, top)
    right.set_title(title)
    bar = fig.colorbar(image, ax=right, shrink=0.9, extend="max", label="weight × N")
    bar.ax.set_ylim(-top if row.min() < 0 else 0, top)
    plt.show()


def show_example(ax, ex):
    """The photograph, the face outlined in yellow, the sky in white, the query in red."""
    show_picture(ax, ex.picture)
    outline(ax, ex.face, "#FFD700")
    outline(ax, ex.sky, "white")
    box(ax, divmod(ex.query, spine.SIDE))
    ax.set_title("query, face, sky", fontsize=14)


def strip(maps, ex=None):
    """The example's query in each of {name: map}: small pictures on one colour scale, under each the three numbers.

    Shares and entropy are of |weight|, divided by its sum. maps: {name: (256, 256) or (256,)}; see attention_maps().
    """
    ex = ex or spine.example()
    rows = {name: m[ex.query] if m.dim() == 2 else m for name, m in maps.items()}
    fig, axes = plt.subplots(1, len(rows) + 1, figsize=(2.0 * len(rows) + 2.9, 2.95))
    show_example(axes[0], ex)
    axes[0].set_xlabel("share on the face\nshare on the sky\nrow entropy", fontsize=13)
    for ax, (name, row) in zip(axes[1:], rows.items()):
        image = draw_map(ax, row, ex)
        ax.set_title(name, fontsize=14, color=LOOKS[name][0] if name in LOOKS else BLACK, fontweight="bold")
        face, sky, entropy = spine.shares(row, ex)
        ax.set_xlabel(f"{face:.0%}\n{sky:.1%}\n{entropy:.2f}", fontsize=13)
    negative = any(row.min() < 0 for row in rows.values())
    bar = fig.colorbar(image, ax=axes, shrink=0.8, aspect=12, pad=0.01, ticks=range(-TOP, TOP + 1, 5), extend="max")
    bar.ax.set_ylim(-TOP if negative else 0, TOP)
    bar.set_label("weight × N", fontsize=13)
    plt.show()


# ---- Grids of pictures and maps -------------------------------------------------------------------------------------

def show_images(images, rows=None, columns=None, title=None, width=0.9, handle=None):
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


def show_maps(maps, titles, query=None, picture=None, columns=4, **imshow):
    """Heat maps side by side; each has its own scale unless vmin and vmax are given. The query token is boxed in all.

    maps: list of (side, side), or of any matrices; query: (row, column); picture: (3, S, S) in [-1, 1].
    """
    n = len(maps) + (picture is not None)
    rows = math.ceil(n / columns)
    fig, axes = plt.subplots(rows, min(n, columns), figsize=(3 * min(n, columns), 2.7 * rows), squeeze=False)
    for ax in axes.flat:
        clear(ax)
    axes = list(axes.flat)
    for ax in axes[n:]:
        ax.set_visible(False)
    if picture is not None:
        ax = axes.pop(0)
        show_picture(ax, picture, maps[0].shape[0])
        ax.set_title("picture and query", fontsize=13)
        box(ax, query)
    for ax, values, title in zip(axes, maps, titles):
        image = ax.imshow(array(values), interpolation="nearest", **imshow)
        ax.set_title(title, fontsize=13)
        box(ax, query)
        fig.colorbar(image, ax=ax, shrink=0.8).ax.tick_params(labelsize=11)
    plt.show()


def clear(ax, ticks=False):
    """Takes frame, grid and tick marks off a picture, and without `ticks` the labels too."""
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    if not ticks:
        ax.set(xticks=[], yticks=[])


def box(ax, query):
    """A red frame, edged with white, around a token. query: (row, column), or None for no frame."""
    if query is not None:
        for colour, width in [("white", 4.5), ("red", 2)]:
            ax.add_patch(Rectangle((query[1] - 0.5, query[0] - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=width))


def show_matrices(*parts):
    """Small matrices of numbers side by side, strings such as "=" between them. parts: 2-D tensors and strings."""
    widths = [0.5 + 0.14 * len(p) if isinstance(p, str) else 0.75 * p.shape[1] + 0.3 for p in parts]
    height = max(0 if isinstance(p, str) else len(p) for p in parts)
    fig, ax = plt.subplots(figsize=(sum(widths) * 0.8, height * 0.5 + 0.3))
    x = 0.0
    for part, width in zip(parts, widths):
        if isinstance(part, str):
            ax.text(x + width / 2, 0, part, ha="center", va="center", fontsize=18)
        else:
            rows, columns = part.shape
            for i in range(rows):
                for j in range(columns):
                    ax.text(x + 0.5 + 0.75 * j, (rows - 1) / 2 - i, f"{part[i, j].item():g}", ha="center", va="center", fontsize=15)
            for edge, inward in [(x + 0.08, 0.12), (x + width - 0.05, -0.12)]:
                ax.plot([edge + inward, edge, edge, edge + inward], np.array([-1, -1, 1, 1]) * rows / 2, color=BLACK,
                        linestyle="-", linewidth=1.5)
        x += width
    ax.set(xlim=(0, x), ylim=(-height / 2 - 0.1, height / 2 + 0.1))
    clear(ax)
    plt.show()


# ---- Diagrams -------------------------------------------------------------------------------------------------------

PARTS = {"X": BLACK, "shared projection": BLACK, "routed projection": VIOLET, "kernel": PINK, "differential": ORANGE,
         "attention": BLUE, "convolution": SKY, "output": BLACK}


class Sketch:
    """Boxes and arrows; what is not lit is grey."""

    def __init__(self, width, height, lit, colours):
        unknown = set(lit) - set(colours)
        if unknown:
            raise ValueError(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(colours)}")
        self.lit, self.colours = set(lit or colours), colours
        _, self.ax = plt.subplots(figsize=(width, height))
        self.ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        clear(self.ax)

    def colour(self, part):
        return self.colours[part] if part in self.lit else "#B8B8B8"

    def box(self, part, x, y, text, width=1.3, height=0.62, cards=1, size=14):
        """A box centred at (x, y); several cards for a bank."""
        colour, on = self.colour(part), part in self.lit
        face = tuple(1 - (0.08 if colour == BLACK else 0.22) * (1 - c) for c in to_rgb(colour)) if on else (0.97, 0.97, 0.97)
        for card in reversed(range(cards)):
            shift = 0.07 * card
            self.ax.add_patch(FancyBboxPatch(
                (x - width / 2 + shift, y - height / 2 + shift), width, height, boxstyle="round,pad=0,rounding_size=0.1",
                facecolor=face, edgecolor=colour, linewidth=2.4 if on else 1.2, zorder=3 - 0.1 * card))
        self.ax.text(x, y, text, ha="center", va="center", fontsize=size, color=BLACK if on else "#999999", zorder=4)

    def circle(self, part, x, y, text):
        colour, on = self.colour(part), part in self.lit
        self.ax.add_patch(plt.Circle((x, y), 0.21, facecolor="white", edgecolor=colour, linewidth=2.2 if on else 1.2, zorder=3))
        self.ax.text(x, y - 0.01, text, ha="center", va="center", fontsize=17, color=colour, zorder=4)

    def arrow(self, part, *points, label=None, head=True, shift=(0, 0.13)):
        """A line through the points that ends in a head; the label stands over its first stretch."""
        colour, width = self.colour(part), 2 if part in self.lit else 1.2
        xs, ys = zip(*points)
        self.ax.plot(xs[:-1], ys[:-1], color=colour, linewidth=width, linestyle="-", zorder=2, solid_joinstyle="round")
        self.ax.add_patch(FancyArrowPatch(points[-2], points[-1], arrowstyle="-|>" if head else "-", mutation_scale=15,
                                          color=colour, linewidth=width, shrinkA=0, shrinkB=0, zorder=2))
        if label:
            x, y = (points[0][0] + points[1][0]) / 2 + shift[0], (points[0][1] + points[1][1]) / 2 + shift[1]
            self.ax.text(x, y, label, ha="center", va="bottom", fontsize=14, color=BLACK if part in self.lit else "#999999")

    def note(self, part, x, y, text, **text_settings):
        self.ax.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": 13, "color": self.colour(part),
                                    **text_settings})


def module_diagram(*lit):
    """Fig. 2(b), the DyDiLA module, with the named PARTS lit; all of them without a name."""
    s = Sketch(12.4, 5.7, lit, PARTS)
    lanes = {"Q": 4.75, "Q'": 3.85, "K": 2.7, "K'": 1.8, "V": 0.5}
    s.box("X", 0.55, 2.7, "$X$", 0.7)
    for name, y in lanes.items():
        routed = "'" in name
        part = "routed projection" if routed else "shared projection"
        s.arrow(part, (0.9, 2.7), (1.35, 2.7), (1.35, y), (1.85, y))
        s.box(part, 2.5, y, {"Q": "$W_0^Q$", "K": "$W_0^K$", "V": "$W_0^V$", "Q'": "$W_{u}^Q$", "K'": "$W_{v}^K$"}[name],
              cards=3 if routed else 1)
        if name != "V":
            s.arrow(part, (3.35 if routed else 3.15, y), (4.1, y), label=f"${name}$", shift=(0.06, 0.02))
            s.box("kernel", 4.65, y, r"$\phi_{f}$", 1.1, cards=3)
    for y, symbol in [(4.75, "Q"), (2.7, "K")]:
        s.arrow("kernel", (5.4, y), (6.59, y), label=rf"$\tilde {symbol}$", shift=(0, 0.02))
        s.arrow("kernel", (5.4, y - 0.9), (6.8, y - 0.9), (6.8, y - 0.21))
        s.note("kernel", 5.9, y - 0.66, rf"$\tilde {symbol}'$", fontsize=14, color=BLACK if "kernel" in s.lit else "#999999")
        s.note("differential", 7.12, y - 0.48, rf"$\lambda^{symbol}$", fontsize=15)
        s.circle("differential", 6.8, y, "$-$")
        s.arrow("differential", (7.01, y), (7.75, y), (7.75, 3.95 if symbol == "Q" else 3.45), (8.1, 3.95 if symbol == "Q" else 3.45))
    s.box("attention", 9.0, 3.7, "linear attention\n$Q\\,(K^T V)$", 1.8, 1.2, size=13)
    s.arrow("attention", (3.15, 0.5), (3.4, 0.5), (3.4, 1.0), (9.0, 1.0), (9.0, 3.1))
    s.arrow("convolution", (3.15, 0.5), (6.0, 0.5))
    s.note("shared projection", 3.62, 0.75, "$V$", fontsize=14, color=BLACK if "shared projection" in s.lit else "#999999")
    s.box("convolution", 6.8, 0.5, "DWC 3×3", 1.6)
    s.arrow("attention", (9.9, 3.7), (10.54, 3.7))
    s.arrow("convolution", (7.6, 0.5), (10.75, 0.5), (10.75, 3.49))
    s.circle("output", 10.75, 3.7, "$+$")
    s.arrow("output", (10.96, 3.7), (11.2, 3.7))
    s.box("output", 11.7, 3.7, "$W^O$", 0.95)
    for x, part, text in [(2.5, "routed projection", "projection"), (4.65, "kernel", "measure kernel"),
                          (6.8, "differential", "differential")]:
        on = part in s.lit or part == "routed projection" and "shared projection" in s.lit
        s.note(part, x, 5.45, text, fontsize=13, color=s.colour(part if part in s.lit else "shared projection") if on else "#999999")
    plt.show()


SHELL = {"latent": BLACK, "patches": GREEN, "condition": VIOLET, "AdaLN": VIOLET, "attention": BLUE, "Mix-FFN": ORANGE,
         "final layer": GREEN, "noise": BLACK}


def transformer_diagram(*lit):
    """Fig. 2(a), the transformer, with the named parts of SHELL lit; all of them without a name."""
    s = Sketch(12.4, 4.0, lit, SHELL)
    y = 1.2
    s.ax.add_patch(FancyBboxPatch((3.35, 0.15), 5.7, 2.3, boxstyle="round,pad=0,rounding_size=0.15", facecolor="#FAFAFA",
                                  edgecolor="#888888", linewidth=1.5, linestyle="--", zorder=0))
    s.ax.text(5.15, 2.15, "one of L blocks", ha="center", va="center", fontsize=13, color="#555555")
    s.box("latent", 0.62, y, "noisy\nlatent", 1.0, 0.95)
    s.arrow("patches", (1.12, y), (1.5, y))
    s.box("patches", 2.2, y, "patches\n+ positions", 1.4, 0.95)
    s.arrow("AdaLN", (2.9, y), (3.6, y))
    stations = [(4.1, "AdaLN", "AdaLN", 1.0), (5.35, "attention", "DyDiLA", 1.15), (7.05, "AdaLN", "AdaLN", 1.0),
                (8.05, "Mix-FFN", "Mix-\nFFN", 0.72)]
    for x, part, text, width in stations:
        s.box(part, x, y, text, width, 0.8, size=13)
    s.arrow("attention", (4.6, y), (4.775, y), head=False)
    s.arrow("attention", (5.925, y), (6.0, y), head=False)
    for x, start, part in [(6.2, 3.45, "attention"), (8.72, 6.47, "Mix-FFN")]:
        s.circle(part, x, y, "$+$")
        s.arrow(part, (start, y), (start, 0.45), (x, 0.45), (x, y - 0.21))
    s.arrow("AdaLN", (6.41, y), (6.55, y), head=False)
    s.arrow("Mix-FFN", (7.55, y), (7.69, y), head=False)
    s.arrow("Mix-FFN", (8.41, y), (8.51, y), head=False)
    s.arrow("final layer", (8.93, y), (9.3, y))
    s.box("final layer", 10.0, y, "AdaLN,\nlinear", 1.35, 0.95)
    s.arrow("noise", (10.68, y), (11.05, y))
    s.box("noise", 11.65, y, "noise,\nvariance", 1.2, 0.95)
    s.box("condition", 1.4, 3.45, "timestep $t$", 1.6)
    s.box("condition", 3.25, 3.45, "class $y$", 1.4)
    s.circle("condition", 4.6, 3.45, "$+$")
    s.arrow("condition", (3.95, 3.45), (4.39, 3.45))
    s.ax.plot([1.4, 1.4, 4.6], [3.76, 3.97, 3.97], color=s.colour("condition"), linewidth=2 if "condition" in s.lit else 1.2,
              linestyle="-")
    s.arrow("condition", (4.6, 3.97), (4.6, 3.66))
    s.note("condition", 4.95, 3.45, "$c$ sets shift, scale and gate of every block", ha="left", fontsize=13,
           color=BLACK if "condition" in s.lit else "#999999")
    s.ax.plot([4.6, 4.6], [3.24, 2.8], color=s.colour("AdaLN"), linewidth=2 if "AdaLN" in s.lit else 1.2, linestyle="-")
    s.ax.plot([4.1, 10.0], [2.8, 2.8], color=s.colour("AdaLN"), linewidth=2 if "AdaLN" in s.lit else 1.2, linestyle="-")
    for x, end in [(4.1, y + 0.4), (7.05, y + 0.4), (10.0, y + 0.475)]:
        s.arrow("AdaLN", (x, 2.8), (x, end))
    for x, part in [(6.2, "attention"), (8.72, "Mix-FFN")]:
        s.arrow("AdaLN", (x, 2.8), (x, y + 0.21))
    plt.show()


# ---- Sliders --------------------------------------------------------------------------------------------------------

def slider(function, **ranges):
    """The picture that function(name=value) draws, then a slider to move name, over a second copy of the picture.

    ranges: one name=(low, high, step). The first picture takes the function's default, or the middle of the range. It
    is all there is without ipywidgets, and in committed outputs.
    """
    (name, (low, high, step)), = ranges.items()
    default = inspect.signature(function).parameters[name].default
    start = (low + high) / 2 if default is inspect.Parameter.empty else default
    function(**{name: start})
    if os.environ.get("LAB_STATIC"):        # set by execute.py
        return
    try:
        import ipywidgets
    except ImportError:
        return
    kind = ipywidgets.IntSlider if all(isinstance(n, int) for n in (low, high, step, start)) else ipywidgets.FloatSlider
    ipywidgets.interact(function, **{name: kind(value=start, min=low, max=high, step=step, description=name,
                                                continuous_update=False)})


# ---- Routing (lessons 2 and 3) --------------------------------------------------------------------------------------

CHOICES = ["#8FBCE0", "#F2B48C", "#8FD1B9", "#E7C6DA", "#666666", "#F0E442", "#C9A66B"]     # light, so that text can lie on them


def show_choices(choices, names, ex=None, photograph=True):
    """What each token chose from a bank, beside the photograph if wanted; under each map the shares of the choices.

    choices: {title: (256,) int}; names: a word for each member of the bank.
    """
    ex = ex or spine.example()
    n = len(choices) + photograph
    fig, axes = plt.subplots(1, n, figsize=(3.0 * n, 4.1))
    if photograph:
        show_example(axes[0], ex)
    for ax, (title, index) in zip(axes[photograph:], choices.items()):
        ax.imshow(array(index).reshape(spine.SIDE, spine.SIDE), cmap=ListedColormap(CHOICES[:len(names)]), vmin=-0.5,
                  vmax=len(names) - 0.5, interpolation="nearest")
        clear(ax)
        outline(ax, ex.face, BLACK)
        outline(ax, ex.sky, "white")
        box(ax, divmod(ex.query, spine.SIDE))
        ax.set_title(title, fontsize=14)
        load = torch.bincount(index.flatten(), minlength=len(names)) / index.numel()
        ax.set_xlabel("  ".join(f"{share:.0%}" for share in load.tolist()), fontsize=13)
    fig.legend(handles=[Patch(facecolor=colour, label=name) for colour, name in zip(CHOICES, names)],
               loc="outside lower center", ncols=len(names), fontsize=13, frameon=False)
    plt.show()


def show_cones(router, extent=2.0):
    """The plane, coloured by what a router (a Router of width 2) chooses there, its columns as arrows."""
    axis = torch.linspace(-extent, extent, 401)
    plane = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)                      # (401, 401, 2)
    columns = array(router.weight)
    _, ax = plt.subplots(figsize=(5.4, 5.0))
    ax.imshow(array(router(plane)[0]), origin="lower", extent=(-extent, extent) * 2, vmin=-0.5, vmax=len(columns) - 0.5,
              cmap=ListedColormap(CHOICES[:len(columns)]), interpolation="nearest")
    for i, (x, y) in enumerate(columns):
        ax.annotate("", (x, y), (0, 0), arrowprops=dict(arrowstyle="-|>", color=BLACK, linewidth=2, shrinkA=0, shrinkB=0))
        length = (x * x + y * y) ** 0.5
        ax.text(x + 0.18 * x / length, y + 0.18 * y / length, i, ha="center", va="center", fontsize=17)
    ax.set(xlabel="first entry of the token", ylabel="second entry of the token", aspect="equal",
           xticks=range(-2, 3), yticks=range(-2, 3))
    ax.grid(False)
    plt.show()


def show_cells(rows):
    """Rows of small coloured squares with a word in each. rows: {label: (words, colours)}, colours as int of CHOICES."""
    longest = max(len(words) for words, _ in rows.values())
    _, ax = plt.subplots(figsize=(0.62 * longest + 2.2, 0.85 * len(rows) + 0.2))
    for y, (words, colours) in enumerate(rows.values()):
        for x, (word, colour) in enumerate(zip(words, colours)):
            ax.add_patch(Rectangle((x - 0.48, y - 0.36), 0.96, 0.72, facecolor=CHOICES[int(colour)]))
            ax.text(x, y, word, ha="center", va="center", fontsize=13)
    ax.set(xlim=(-0.6, longest - 0.4), ylim=(len(rows) - 0.5, -0.5))
    clear(ax)
    ax.set_yticks(range(len(rows)), list(rows))
    plt.show()


def bands(x, runs, xlabel, ylabel, ax=None, **settings):
    """The mean of several runs as a line, from the lowest to the highest as a band. runs: {name: (runs, len(x))}.

    settings: what curves() takes. Returns the axes.
    """
    ax = curves(x, {name: array(values).mean(axis=0) for name, values in runs.items()}, xlabel, ylabel, ax=ax, **settings)
    for line, values in zip(ax.get_lines()[-len(runs):], runs.values()):
        line.set_marker("")
        ax.fill_between(array(x), array(values).min(axis=0), array(values).max(axis=0), color=line.get_color(), alpha=0.15,
                        linewidth=0)
    ax.legend()
    return ax


def show_arrows(fans):
    """Arrows from the origin in the first quadrant, one panel for each of {title: (n, 2)}; arrow i has the same colour in all."""
    _, axes = plt.subplots(1, len(fans), figsize=(3.7 * len(fans), 3.9), sharey=True)
    for ax, (title, arrows) in zip(axes, fans.items()):
        for (x, y), colour in zip(array(arrows), plt.cm.plasma(np.linspace(0, 0.85, len(arrows)))):
            ax.annotate("", (x, y), (0, 0), arrowprops=dict(arrowstyle="-|>", color=colour, linewidth=2, shrinkA=0, shrinkB=0))
        ax.set(xlim=(0, 1.1), ylim=(0, 1.1), aspect="equal", xlabel="first entry", title=title, xticks=[0, 0.5, 1],
               yticks=[0, 0.5, 1])
    axes[0].set_ylabel("second entry")
    plt.show()


def show_percentages(table, rows, columns, xlabel, title=None, cmap="RdYlBu", limits=(-0.4, 1.4)):
    """A table of shares, coloured by cmap between the limits. table: (R, C) in 0..1, nan where there is nothing to say."""
    table = array(table)
    _, ax = plt.subplots(figsize=(0.95 * len(columns) + 3.6, 0.52 * len(rows) + 1.0))
    ax.imshow(table, cmap=cmap, vmin=limits[0], vmax=limits[1], aspect="auto")
    for (i, j), share in np.ndenumerate(table):
        ax.text(j, i, "–" if np.isnan(share) else f"{share:.0%}", ha="center", va="center", fontsize=14)
    clear(ax)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xlabel(xlabel)
    ax.set_title(title, fontsize=15)
    plt.show()
