"""What the notebooks' pictures share: looks, the strip of maps, the diagrams, grids, animations."""
import io
import math
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython import display
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, to_rgb
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

from lab.helpers import *  # noqa: F403

# Okabe and Ito's colours, told apart by colour-blind readers; line styles and markers for print.
BLUE, ORANGE, GREEN, PINK, SKY, BLACK = "#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #000000".split()
GREY, VIOLET, BROWN = "#777777", "#6A51A3", "#8C510A"
COLOURS = [BLUE, ORANGE, GREEN, PINK, SKY, BLACK]
LONG, SHORT, MIXED = (0, (8, 3)), (0, (3, 1)), (0, (6, 1, 1, 1))            # dashes

LOOKS = {       # A kind of attention, and the part that makes it, looks the same in every lesson.
    "softmax": (BLUE, "-", "o"), "ReLU": (GREY, "--", "s"), "focused": (GREEN, "-.", "D"),
    "dynamic": (PINK, ":", "^"), "differential": (ORANGE, MIXED, "v"),
    "convolution": (SKY, LONG, "P"), "projected": (VIOLET, SHORT, "X")}
LOOKS |= {      # the arms of recall.py
    "no attention": (BLACK, ":", "x"), "Sana": LOOKS["ReLU"], "fixed power": LOOKS["focused"],
    "routed": LOOKS["projected"], "DyDiLA": LOOKS["differential"], "lambda 0": (SKY, SHORT, "P"),
    "signed": (BLACK, LONG, "*"), "random routes": (PINK, ":", "^"), "adding": (GREEN, ":", "D")}
LOOKS |= {      # how a router may get its gradient (lessons 2 and 3, appendix B)
    "no gradient": (GREY, "--", "s"), "router does not learn": (GREY, "-", "s"),
    "chosen entry": (BLUE, "-", "o"), "Switch": (PINK, ":", "^"),
    "whole one-hot": (GREEN, "-.", "D"), "Gumbel": (ORANGE, MIXED, "v"),
    "REINFORCE": (BLACK, SHORT, "X"), "soft mixture": (SKY, LONG, "P")}

plt.rcParams.update({
    "figure.dpi": 110, "figure.figsize": (8, 4.2), "figure.constrained_layout.use": True,
    "font.size": 14, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
    "axes.spines.right": False, "lines.linewidth": 2.2, "lines.markersize": 7,
    "axes.prop_cycle": plt.cycler(color=COLOURS, linestyle=["-", "--", "-.", ":", MIXED, LONG])})


def look(name, marker=False, label=None):
    """Keywords for ax.plot: colour, line style and label, marker too. name: a key of LOOKS."""
    colour, line, symbol = LOOKS[name]
    return dict(color=colour, linestyle=line, label=label or name, marker=symbol if marker else "")


def array(x):
    """Anything with numbers in it as a float64 array."""
    return np.asarray(x.detach().cpu() if torch.is_tensor(x) else x, dtype=np.float64)


# ---- Lines ---------------------------------------------------------------------------------------

def curves(x, ys, xlabel, ylabel, markers=True, ax=None, xticks=None, yticks=None, levels=None,
           **settings):
    """Lines of {name: values} over x, with a legend where there are several. Returns the axes.

    xticks, yticks: the numbers to label. levels: {words: value} for level(). settings: of ax.set
    (xscale="log", ylim=...)."""
    ax = ax or plt.subplots()[1]
    for name, values in ys.items():
        plain = {"label": name, "marker": "o" if markers else ""}
        ax.plot(array(x), array(values), **(look(name, markers) if name in LOOKS else plain))
    ax.set(xlabel=xlabel, ylabel=ylabel, **settings)
    for axis, ticks in [(ax.xaxis, xticks), (ax.yaxis, yticks)]:
        if ticks is not None:
            powers = axis.get_scale() == "log" and (min(ticks) < 1e-3 or max(ticks) > 1e4)
            axis.set_ticks([], minor=True)
            axis.set_ticks(list(ticks), [f"$10^{{{math.log10(n):.0f}}}$" if powers else f"{n:g}"
                                         for n in ticks])
    for words, value in (levels or {}).items():
        level(ax, words, value)
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend()
    return ax


def level(ax, words, value, upright=False, end=0.995):
    """A thin grey line at a value, to compare with, and its words.

    end: where the words of a level line stand, from 0 to 1; more is beside the axes."""
    (ax.axvline if upright else ax.axhline)(value, color=GREY, linestyle="-", linewidth=1, zorder=1)
    if upright:
        place = dict(x=value, y=1.01, transform=ax.get_xaxis_transform(), ha="center")
    else:
        place = dict(x=end, y=value, transform=ax.get_yaxis_transform(),
                     ha="right" if 0.5 < end <= 1 else "left")
    ax.text(s=words, va="center" if end > 1 else "bottom", fontsize=13, color="#444444", **place)


def bands(x, runs, xlabel, ylabel, **settings):
    """The mean of several runs as a line, from the lowest to the highest as a band.

    runs: {name: (runs, len(x))}; settings: of curves(). Returns the axes."""
    means = {name: array(values).mean(axis=0) for name, values in runs.items()}
    ax = curves(x, means, xlabel, ylabel, markers=False, **settings)
    for line, values in zip(ax.get_lines(), runs.values()):
        low, high = array(values).min(axis=0), array(values).max(axis=0)
        ax.fill_between(array(x), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    return ax


def recall_panel(found, numbers, trained=16, ax=None, title="trained with 16 pairs"):
    """Accuracy against the number of pairs. Lines are means, dots are seeds.

    found: {name: (seeds, len(numbers))}. Returns the axes."""
    means = {name: array(values).mean(axis=0) for name, values in found.items()}
    ax = curves(numbers, means, "pairs in a set", "accuracy", False, ax, numbers,
                [0, 0.25, 0.5, 0.75, 1], {"chance": 1 / 16}, xscale="log", ylim=(0, 1.03))
    for line, values in zip(ax.get_lines(), found.values()):
        ax.plot(numbers, array(values).T, "o", markersize=4, color=line.get_color())
    ax.axvline(trained, color=GREY, linestyle=":", linewidth=1)
    ax.set_title(title, fontsize=13)
    return ax


# ---- The photograph and the strip ----------------------------------------------------------------

# Nothing where the weight is zero, then yellow to red, in twenty steps.
HEAT = LinearSegmentedColormap.from_list("heat", [
    (0.0, (1, 1, 1, 0)), (0.12, (1, 0.95, 0.3, 0.55)), (0.5, (1, 0.55, 0, 0.9)),
    (1.0, (0.85, 0, 0.1, 1))], N=20)


def clear(ax, ticks=False):
    """Takes frame, grid and tick marks off a picture, and without `ticks` the labels too."""
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    if not ticks:
        ax.set(xticks=[], yticks=[])


def box(ax, query):
    """A red frame, edged with white, around the token at (row, column)."""
    for colour, width in [("white", 4.5), ("red", 2)]:
        ax.add_patch(Rectangle((query[1] - 0.5, query[0] - 0.5), 1, 1, fill=False, edgecolor=colour,
                               linewidth=width))


def show_picture(ax, picture, side=SIDE, grey=False):
    """The photograph under a map of (side, side) tokens. picture: (3, S, S) in [-1, 1]."""
    pixels = array((picture.permute(1, 2, 0) + 1) / 2).clip(0, 1)
    if grey:                                # few greys make small files
        pixels = 0.35 + 0.05 * (12 * pixels.mean(2, keepdims=True)).round().repeat(3, axis=2)
    ax.imshow(pixels, extent=(-0.5, side - 0.5, side - 0.5, -0.5),
              interpolation="nearest" if grey else "bilinear")
    clear(ax)


def outline(ax, mask, colour):
    """A line, edged with black, around the tokens of a mask (256,)."""
    fine = np.kron(array(mask).reshape(SIDE, SIDE), np.ones((16, 16)))
    axis = (np.arange(16 * SIDE) + 0.5) / 16 - 0.5
    for edge, width in [(BLACK, 4), (colour, 2)]:
        ax.contour(axis, axis, fine, levels=[0.5], colors=[edge], linewidths=width, linestyles="-")


def show_example(ax, ex, lines=()):
    """The photograph with face, sky and query outlined, and what the lines under the maps say."""
    show_picture(ax, ex.picture)
    outline(ax, ex.face, "#FFD700")
    outline(ax, ex.sky, "white")
    box(ax, QUERY)
    ax.set_title("query (red), face\n(yellow), sky (white)", fontsize=13)
    under(ax, lines)


def under(ax, lines):
    """Lines of text under a picture."""
    ax.set_xlabel("\n" * len(lines), fontsize=13)       # keeps room for them
    for i, words in enumerate(lines):
        ax.annotate(words, (0.5, 0), (0, -6 - 18 * i), xycoords="axes fraction", ha="center",
                    textcoords="offset points", va="top", fontsize=13)


def draw_map(ax, row, ex):
    """One query's weights over the photograph, in multiples of the even weight. row: (256,)."""
    show_picture(ax, ex.picture, grey=True)
    image = ax.imshow(array((row / row.sum() * len(row)).view(SIDE, SIDE)), cmap=HEAT, vmin=0,
                      vmax=10, interpolation="nearest")
    box(ax, QUERY)
    return image


def show_map(row, title):
    """The photograph with face, sky and query, and beside it one query's weights. row: (256,)."""
    ex = example()
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.3))
    show_example(left, ex)
    right.set_title(title, fontsize=14)
    fig.colorbar(draw_map(right, row, ex), shrink=0.9, extend="max", label="weight × N (1 = even)")
    plt.show()


def strip(maps):
    """The example's query in each of {name: (256, 256)} on one scale, with numbers of shares()."""
    ex, n = example(), len(maps) + 1
    lines = 1 if n < 6 else 2
    columns = math.ceil(n / lines)
    fig, axes = plt.subplots(lines, columns, squeeze=False,
                             figsize=(2.1 * columns + 1, 3.5 * lines))
    show_example(axes[0, 0], ex, ["weight on the face", "weight on the sky", "row entropy"])
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    for ax, (name, m) in zip(axes.flat[1:], maps.items()):
        image, found = draw_map(ax, m[ex.query], ex), shares(m[ex.query], ex)
        ax.set_title(name, fontsize=14, fontweight="bold", pad=20,
                     color=LOOKS.get(name, [BLACK])[0])
        if name in NAMES:
            ax.text(0.5, 1.025, "trained" if name in TRAINED else "not trained",
                    transform=ax.transAxes, ha="center", fontsize=12)
        under(ax, [f"face {found.face:.0%}", f"sky {found.sky:.1%}",
                   f"entropy {found.entropy:.2f}"])
    fig.colorbar(image, ax=axes, label="weight × N (1 = even)", extend="max", shrink=0.75,
                 aspect=12 * lines, pad=0.01)
    plt.show()


def show_signed(rows):
    """The photograph, and beside it rows of weights that may be negative, as maps on one scale.

    rows: {title: (256,)}. Each is divided by the sum of its weights above zero."""
    ex = example()
    fig, axes = plt.subplots(1, len(rows) + 1, figsize=(2.3 * len(rows) + 3.4, 3.8))
    show_example(axes[0], ex, ["above zero, face's share", "above zero, sky's share",
                               "below zero / above zero"])
    for ax, (title, row) in zip(axes[1:], rows.items()):
        weights = array(row / row.clamp_min(0).sum() * len(row)).reshape(SIDE, SIDE)
        image = ax.imshow(weights, cmap=plt.get_cmap("RdBu_r", 25), vmin=-6, vmax=6,
                          interpolation="nearest")
        clear(ax)
        ax.spines[:].set(visible=True, linewidth=0.8, color=GREY)
        outline(ax, ex.face, "white")
        outline(ax, ex.sky, "white")
        box(ax, QUERY)
        ax.set_title(title, fontsize=14, fontweight="bold", color=LOOKS.get(title, [BLACK])[0])
        found = shares(row, ex)
        under(ax, [f"{found.face:.0%}", f"{found.sky:.1%}",
                   f"{found.negative / (1 - found.negative):.2f}"])
    fig.colorbar(image, ax=axes, shrink=0.8, aspect=14, pad=0.01, extend="both", label="weight × N")
    plt.show()


# ---- Grids of pictures, maps and choices ---------------------------------------------------------

def show_images(images, rows=(), columns=(), width=0.9):
    """A grid of pictures with labels. images: (R, K, C, S, S) in [-1, 1]; width: inches of each."""
    r, k, c, s, _ = images.shape
    grid = np.ones((r * (s + 2), k * (s + 2), c))       # two white pixels between pictures
    for i, j in np.ndindex(r, k):
        pixels = array((images[i, j].permute(1, 2, 0) + 1) / 2).clip(0, 1)
        grid[i * (s + 2):][:s, j * (s + 2):][:, :s] = pixels
    _, ax = plt.subplots(figsize=(width * k + 1, width * r + 0.5))
    ax.imshow(grid[:-2, :-2].repeat(3 // c, axis=2), interpolation="nearest")
    ax.set_yticks([(s + 2) * i + s / 2 for i in range(len(rows))], rows)
    ax.set_xticks([(s + 2) * j + s / 2 for j in range(len(columns))], columns)
    clear(ax, ticks=True)
    ax.xaxis.tick_top()
    plt.show()


def show_maps(maps, titles, query=None, picture=None, columns=4, label=None, signs=(), numbers=None,
              **imshow):
    """Matrices side by side. With vmin and vmax they share one colour bar, else each has its own.

    query: (row, column), boxed in all; picture: (3, S, S), shown first; label: of the bar; signs:
    what stands before each map, such as "+"; numbers: a format such as "{:.2f}" for the cells."""
    n = len(maps) + (picture is not None)
    columns, size = min(n, columns), min(3, 10.8 / columns)
    rows = math.ceil(n / columns)
    fig, axes = plt.subplots(rows, columns, squeeze=False,
                             figsize=(size * columns + 0.8, (size + 0.1) * rows))
    panels = axes.flat[:n]
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    if picture is not None:
        show_picture(panels[0], picture, len(maps[0]))
        panels[0].set_title("picture and query", fontsize=14)
    values = [array(m) for m in maps]
    for ax, m, title in zip(panels[n - len(maps):], values, titles):
        image = ax.imshow(m, interpolation="nearest", **imshow)
        clear(ax)
        ax.set_title(title, fontsize=14)
        ax.spines[:].set(visible=True, linewidth=0.8, color="#949494")
        for (i, j), value in np.ndenumerate(m) if numbers else []:
            ax.text(j, i, numbers.format(value), ha="center", va="center", fontsize=14)
        if "vmin" not in imshow:
            fig.colorbar(image, ax=ax, shrink=0.8, label=label).ax.tick_params(labelsize=12)
    for ax, sign in zip(panels, signs):
        ax.text(-0.1, 0.5, sign, transform=ax.transAxes, ha="center", va="center", fontsize=22)
    for ax in panels if query is not None else []:
        box(ax, query)
    if "vmin" in imshow:
        below, above = np.nanmin(values) < imshow["vmin"], np.nanmax(values) > imshow["vmax"]
        fig.colorbar(image, ax=axes, shrink=0.8, label=label, pad=0.02,
                     extend=["neither", "min", "max", "both"][below + 2 * above])
    plt.show()


def show_set(tokens, query=0):
    """One of recall.make_sets' sets, a token per row, and an arrow from a query to its pair."""
    pairs = len(tokens) // 2
    fig, ax = plt.subplots(figsize=(10, 0.3 * len(tokens) + 1.2))
    image = ax.imshow(array(tokens), cmap="PuOr", vmin=-3, vmax=3, aspect="auto")
    clear(ax, ticks=True)
    ax.set_xticks([7.5, 23.5, 33], ["key, 16 numbers", "value, one of 16", "type"])
    ax.set_yticks([pairs / 2 - 0.5, 1.5 * pairs - 0.5], ["pairs", "queries"])
    ax.tick_params(axis="y", pad=48)
    ax.vlines([15.5, 31.5], -0.5, len(tokens) - 0.5, color=BLACK, linewidth=1)
    ax.axhline(pairs - 0.5, color=BLACK, linestyle="-", linewidth=2)
    ax.annotate("", (-0.6, query), (-0.6, pairs + query), annotation_clip=False, arrowprops=dict(
        arrowstyle="-|>", color=ORANGE, linewidth=2.5, connectionstyle="arc3,rad=-0.22"))
    fig.colorbar(image, ax=ax, shrink=0.9)
    plt.show()


# What is chosen. Told apart by colour-blind readers, and light enough for text to lie on it.
CHOICES = ["#6BAED6", "#F2A25C", "#FBF3A8", "#9A9A9A", "#FFFFFF"]


def arrow(ax, x, y, colour=BLACK):
    """An arrow from the origin."""
    ax.annotate("", (x, y), (0, 0), arrowprops=dict(arrowstyle="-|>", color=colour, linewidth=2,
                                                    shrinkA=0, shrinkB=0))


def draw_cones(ax, router, extent, tokens=None):
    """The plane, coloured by what a router of width 2 chooses there, its choices counted from 1.

    Its columns are arrows. With tokens (n, 2) they are left out, and the tokens are dots."""
    axis = torch.linspace(-extent, extent, 401)
    plane = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # (401, 401, 2)
    columns = array(router.weight)
    ax.imshow(array(router(plane).argmax(dim=-1)), extent=(-extent, extent) * 2, origin="lower",
              cmap=ListedColormap(CHOICES[:len(columns)]), vmin=-0.5, vmax=len(columns) - 0.5)
    for i, column in enumerate(columns):
        length = np.hypot(*column)
        x, y = column / length * (length + 0.1 * extent if tokens is None else 0.85 * extent)
        if tokens is None:
            arrow(ax, *column)
        if tokens is None or router(torch.tensor([x, y]).float()).argmax() == i:
            ax.text(x, y, i + 1, ha="center", va="center", fontsize=17)
    if tokens is not None:
        ax.plot(*array(tokens).T, "o", color=BLACK, markersize=4, markeredgecolor="white",
                markeredgewidth=0.7)
    ticks = range(-extent, extent + 1, extent // 2)
    ax.set(xlabel="first entry of the token", ylabel="second entry of the token", xticks=ticks,
           yticks=ticks, xlim=(-extent, extent), ylim=(-extent, extent))
    ax.grid(False)


def draw_arrows(ax, arrows, title, low=0.0):
    """Arrows from the origin, axes from low to 1; arrow i has one colour. arrows: (n, 2)."""
    for point, colour in zip(array(arrows), plt.cm.plasma(np.linspace(0, 0.85, len(arrows)))):
        arrow(ax, *point, colour)
    for line in (ax.axhline, ax.axvline):
        line(0, color=GREY, linestyle="-", linewidth=1, zorder=1)
    ticks, limits = np.arange(low, 1.1, 0.5), (1.1 * low, 1.1)
    ax.set(xlim=limits, ylim=limits, aspect="equal", title=title, xticks=ticks, yticks=ticks)


# ---- Stills and animations -----------------------------------------------------------------------

def pictures_of(draw, values, dpi):
    """What draw(value) draws for each value, (frames, height, width, 3) uint8. Nothing is shown."""
    frames = []
    with mock.patch.object(plt, "show"):        # draw may end with plt.show(), or not
        for value in values:
            draw(value)
            fig = plt.gcf()
            fig.set_dpi(dpi)
            fig.canvas.draw()
            frames.append(np.asarray(fig.canvas.buffer_rgba())[..., :3].copy())
            plt.close(fig)
    return np.stack(frames)


def show_png(first, **settings):
    """Shows a Pillow picture, or an animation, as a PNG."""
    file = io.BytesIO()
    first.save(file, "png", optimize=True, **settings)
    display.display(display.Image(file.getvalue()))


def stills(draw, values, beside=True, dpi=80):
    """What draw(value) draws for a few values, as one picture: side by side, or in a column."""
    frames = pictures_of(draw, values, dpi)
    show_png(Image.fromarray(np.concatenate(frames, axis=1 if beside else 0)))


def animation(draw, values):
    """What draw(value) draws for many values, as one animated PNG that plays for ever.

    All figures must have one size. Paper doesn't move, so show stills() of three values, too."""
    frames = pictures_of(draw, values, dpi=80)
    n, height, width, _ = frames.shape
    column = Image.fromarray(frames.reshape(n * height, width, 3)).quantize(
        128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)     # one palette for all
    first, *others = [column.crop((0, i * height, width, (i + 1) * height)) for i in range(n)]
    show_png(first, save_all=True, append_images=others, loop=0, duration=[150] * (n - 1) + [1500])


# ---- Diagrams ------------------------------------------------------------------------------------

PARTS = {"X": BLACK, "shared projection": BLACK, "routed projection": VIOLET, "kernel": PINK,
         "differential": ORANGE, "attention": BLUE, "convolution": SKY, "output": BLACK}
SHELL = {"latent": BLACK, "patches": BLACK, "condition": BROWN, "AdaLN": BROWN, "attention": SKY,
         "Mix-FFN": BLACK, "final layer": BLACK, "noise": BLACK}
DIM, DIM_TEXT = "#949494", "#767676"        # what is not lit; still to be read on a wall


class Sketch:
    """Boxes and arrows on a figure 11 inches wide; what isn't lit is grey and below what is."""

    def __init__(self, width, height, lit, colours):
        if unknown := set(lit) - set(colours):
            raise ValueError(f"no such part: {', '.join(unknown)}; there are {', '.join(colours)}")
        self.lit = set(lit or colours)
        self.colours = {part: colours[part] if part in self.lit else DIM for part in colours}
        self.ax = plt.subplots(figsize=(11, 11 * height / width))[1]
        self.ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        clear(self.ax)

    def box(self, part, x, y, text, width=1.3, height=0.62, cards=1, size=14):
        """A box centred at (x, y). Several cards are a bank, of which the front card was chosen."""
        colour, on = self.colours[part], part in self.lit
        pale = 0.08 if colour == BLACK else 0.22
        face = tuple(1 - pale * (1 - c) for c in to_rgb(colour)) if on else "#F7F7F7"
        for card in reversed(range(cards)):
            corner = x - width / 2 + 0.06 * card, y - height / 2 + 0.06 * card
            self.ax.add_patch(FancyBboxPatch(
                corner, width, height, boxstyle="round,pad=0,rounding_size=0.08", edgecolor=colour,
                facecolor="white" if card else face, linewidth=2.2 if on else 1.2,
                zorder=3 - 0.1 * card))
        self.note(part, x, y, text, fontsize=size)

    def circle(self, part, x, y, text):
        self.ax.add_patch(plt.Circle((x, y), 0.21, facecolor="white", edgecolor=self.colours[part],
                                     linewidth=2.2 if part in self.lit else 1.2, zorder=3))
        self.note(part, x, y - 0.01, text, fontsize=17, color=self.colours[part])

    def arrow(self, part, *points, head="-|>", colour=None):
        """A line through the points, with a head. colour: another than the part's, where lit."""
        on = part in self.lit
        settings = dict(color=colour if colour and on else self.colours[part],
                        linewidth=2 if on else 1.2, zorder=2.2 if on else 2)
        self.ax.plot(*zip(*points[:-1]), linestyle="-", solid_joinstyle="round", **settings)
        self.ax.add_patch(FancyArrowPatch(*points[-2:], arrowstyle=head, shrinkA=0, shrinkB=0,
                                          mutation_scale=14, **settings))

    def note(self, part, x, y, text, **settings):
        """Words at (x, y), black where the part is lit."""
        plain = dict(ha="center", va="center", fontsize=14, zorder=4,
                     color=BLACK if part in self.lit else DIM_TEXT)
        self.ax.text(x, y, text, **{**plain, **settings})


def module_diagram(*lit):
    """Fig. 2(b), the DyDiLA module, with the named PARTS lit; all without a name. R: routers."""
    s = Sketch(12.4, 6.5, lit, PARTS)
    lanes = {"Q": (5.35, "W_0^Q"), "Q'": (4.2, "W_{u}^Q"), "K": (2.95, "W_0^K"),
             "K'": (1.8, "W_{v}^K"), "V": (0.45, "W_0^V")}

    def router(part, x, y, start):
        """A small R below the box at (x, y), which hears the token that passes at x = start."""
        s.box(part, x - 0.25, y - 0.47, "$R$", 0.36, 0.32, size=12)
        s.arrow(part, (start, y), (start, y - 0.47), (x - 0.43, y - 0.47))

    s.box("X", 0.5, 2.95, "$X$", 0.7)
    for name, (y, weight) in lanes.items():
        routed = "'" in name
        part = "routed projection" if routed else "shared projection"
        s.arrow(part, (0.85, 2.95), (1.2, 2.95), (1.2, y), (1.85, y))
        s.box(part, 2.5, y, f"${weight}$", cards=3 if routed else 1)
        if routed:
            router(part, 2.5, y, 1.5)
        if name != "V":
            s.arrow(part, (3.27 if routed else 3.15, y), (4.2, y))
            s.note(part, 3.52, y + 0.19, f"${name}$")
            s.box("kernel", 4.75, y, r"$\phi_{f}$", 1.1, cards=3)
            router("kernel", 4.75, y, 3.9)
    last = "differential" if "differential" in s.lit else "attention"
    for symbol, y, below, end in [("Q", 5.35, 4.2, 4.1), ("K", 2.95, 1.8, 3.5)]:
        middle = (y + below) / 2 - 0.1
        s.arrow("kernel", (5.42, y), (6.99, y))
        s.arrow("kernel", (5.42, below), (7.2, below), head="-")
        s.note("kernel", 5.72, y + 0.22, rf"$\tilde {symbol}$")
        s.note("kernel", 5.72, below + 0.22, rf"$\tilde {symbol}'$")
        for start in (y, below):
            s.arrow("differential", (6.05, start), (6.05, middle), (6.42, middle))
        s.box("differential", 6.6, middle, "$R$", 0.36, 0.32, size=12)
        s.arrow("differential", (7.2, below), (7.2, y - 0.21))
        s.box("differential", 7.2, middle, rf"$\times\lambda^{symbol}$", 0.84, 0.44, cards=3)
        s.circle("differential", 7.2, y, "$-$")
        s.arrow(last, (7.41, y), (8.05, y), (8.05, end), (8.4, end))
    s.box("attention", 9.3, 3.8, "linear attention\n$Q\\,(K^T V)$", 1.8, 1.2, size=13)
    s.arrow("attention", (3.15, 0.45), (3.4, 0.45), (3.4, 1.0), (9.3, 1.0), (9.3, 3.2))
    s.arrow("convolution", (3.15, 0.45), (6.3, 0.45))
    s.note("shared projection", 3.62, 0.72, "$V$")
    s.box("convolution", 7.1, 0.45, "DWC 3×3", 1.6)
    s.arrow("attention", (10.2, 3.8), (10.64, 3.8))
    s.arrow("convolution", (7.9, 0.45), (10.85, 0.45), (10.85, 3.59))
    s.circle("output", 10.85, 3.8, "$+$")
    s.arrow("output", (11.06, 3.8), (11.3, 3.8))
    s.box("output", 11.78, 3.8, "$W^O$", 0.95)
    for x, part, words in [(2.5, "routed projection", "projection"),
                           (4.75, "kernel", "measure kernel"),
                           (7.0, "differential", "differential")]:
        s.note(part, x, 6.25, words, color=s.colours[part] if part in s.lit else DIM_TEXT)
    plt.show()


def transformer_diagram(*lit):
    """Fig. 2(a), the transformer, with the named parts of SHELL lit; all without a name."""
    s = Sketch(13.7, 4.1, lit, SHELL)
    y, bus, top = 1.2, 2.8, 3.5
    s.ax.add_patch(Rectangle((3.2, 0.15), 7.4, 2.3, facecolor="#FAFAFA", edgecolor="#888888",
                             linewidth=1.5, linestyle="--", zorder=0))
    s.note("AdaLN", 5.25, 2.15, "one of L blocks", fontsize=13, color="#555555")
    stations = [        # along the tokens' path, which is black: part, x, text, width
        ("latent", 0.62, "noisy\nlatent", 1.1), ("patches", 2.2, "patches\n+ positions", 1.5),
        ("AdaLN", 4.0, "AdaLN", 1.0), ("attention", 5.4, "DyDiLA", 1.15),
        ("attention", 6.4, "×", 0), ("attention", 7.05, "+", 0), ("AdaLN", 8.0, "AdaLN", 0.95),
        ("Mix-FFN", 9.1, "Mix-\nFFN", 0.72), ("Mix-FFN", 9.8, "×", 0), ("Mix-FFN", 10.38, "+", 0),
        ("final layer", 11.5, "AdaLN,\nlinear", 1.2), ("noise", 13.0, "noise,\nvariance", 1.2)]
    reached = None
    for part, x, text, width in stations:
        half = width / 2 or 0.21
        if reached:
            s.arrow(part, (reached, y), (x - half, y), colour=BLACK)
        if width:
            s.box(part, x, y, text, width, 0.9, size=13)
        else:
            s.circle("AdaLN" if text == "×" else part, x, y, text)
        reached = x + half
    for start, x, part in [(3.35, 7.05, "attention"), (7.38, 10.38, "Mix-FFN")]:
        s.arrow(part, (start, y), (start, 0.45), (x, 0.45), (x, y - 0.21), colour=BLACK)
    s.box("condition", 1.3, top, "timestep $t$", 1.7)
    s.box("condition", 3.1, top, "class $y$", 1.4)
    s.circle("condition", 4.5, top, "$+$")
    s.arrow("condition", (3.8, top), (4.29, top))
    s.arrow("condition", (1.3, top + 0.31), (1.3, top + 0.5), (4.5, top + 0.5), (4.5, top + 0.21))
    s.note("condition", 4.85, top, "$c$ sets shift, scale and gate (×) of every block", ha="left")
    s.arrow("AdaLN", (4.5, top - 0.21), (4.5, bus), head="-")
    for x, height in [(4.0, 0.45), (6.4, 0.21), (8.0, 0.45), (9.8, 0.21), (11.5, 0.45)]:
        s.arrow("AdaLN", (4.5, bus), (x, bus), (x, y + height))
    plt.show()
