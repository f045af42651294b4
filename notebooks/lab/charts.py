"""Charts of lessons 9 to 12 and A, and the samples that A and 12 show."""
import math
import pathlib
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import PercentFormatter

import dydilit
import train
from lab import eq8, experiment, figures, ladder, measures, twins
from lab.experiment import RESULTS  # noqa: F401
from lab.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY, VIOLET, array, clear, curves, look
from lab.helpers import WIDTH, example

CLASS_COLOURS = [BLUE, BLACK, ORANGE, GREEN, PINK, VIOLET, SKY, GREY, "#C79A00", "#8C564B"]
KINDS = {"DiT": "softmax", "softmax": "softmax", "Sana": "ReLU", "ReLU": "ReLU", "DyDi": "convolution"}


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


def bars(parts, xlabel, labels=(None,), colours=(SKY, ORANGE), form="{:.0%}", width=9.0, base=0,
         ax=None, loc="lower right"):
    """Horizontal bars of {name: number, or one per label}, each with its number. Returns the axes.

    They begin at `base`. If that is not 0, the axis is logarithmic and they lead to either side."""
    every = np.array([np.atleast_1d(values) for values in parts.values()])
    rows, n = every.shape
    ax = ax or plt.subplots(figsize=(width, 0.9 + (0.26 + 0.26 * n) * rows))[1]
    for j, label in enumerate(labels):
        y = np.arange(rows) + (j - (n - 1) / 2) * 0.8 / n
        colour, hatch = colours[j] if n > 1 else BLUE, "//" if n > 1 and j == 0 else None
        if n == 1 and len(colours) >= rows:
            colour = list(colours)[:rows]
        ax.barh(y, every[:, j] - base, left=base, height=0.72 / n, label=label, color=colour,
                edgecolor="white", hatch=hatch)
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
    """What lesson 10 measures: from noise to generated pictures, from both sets of pictures to features, and to one number."""
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


def blur(images, sigma):
    """Gaussian blur. sigma: in pixels."""
    reach = math.ceil(3 * sigma)
    bell = torch.exp(-torch.arange(-reach, reach + 1) ** 2 / (2 * sigma ** 2))
    x = F.pad(torch.as_tensor(images).to(bell.device).permute(0, 3, 1, 2).float(), (reach,) * 4, mode="replicate")
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        x = F.conv2d(x, (bell / bell.sum()).view(shape).expand(3, -1, -1, -1), groups=3)
    return array(x.permute(0, 2, 3, 1).round()).astype(np.uint8)


def noise(images, sd):
    """Gaussian noise. sd: in grey levels of 255."""
    return np.clip(np.rint(images + np.random.default_rng(0).normal(0, sd, images.shape)), 0, 255).astype(np.uint8)


def shift(images, pixels):
    """Everything moves right and down by so many pixels."""
    height, width = images.shape[1:3]
    return np.pad(images, ((0, 0), (pixels, 0), (pixels, 0), (0, 0)), mode="edge")[:, :height, :width]


def rearrange(images, side):
    """The square patches of each image, side x side pixels, in random order."""
    rng, n, out = np.random.default_rng(0), images.shape[1] // side, np.empty_like(images)
    for i, image in enumerate(images):
        parts = image.reshape(n, side, n, side, 3).swapaxes(1, 2).reshape(n * n, side, side, 3)[rng.permutation(n * n)]
        out[i] = parts.reshape(n, n, side, side, 3).swapaxes(1, 2).reshape(image.shape)
    return out


TASK_LOOKS = {"sharpness": (BLUE, "o"), "interference": (ORANGE, "s"), "heterogeneity": (GREEN, "D")}


def every_seed(rows):
    """Each arm's accuracy on each task: a dot per seed, and a bar at the mean."""
    arms = experiment.arms_of(rows)
    _, axes = plt.subplots(1, 3, figsize=(12, 0.34 * len(arms) + 1.3), sharey=True)
    for ax, (task, n) in zip(axes, experiment.TASKS.items()):
        for i, arm in enumerate(arms):
            found = [*experiment.by_seed(rows, task, arm, lambda row: float(row[f"accuracy_{n}"])).values()]
            ax.plot(found, [i] * len(found), TASK_LOOKS[task][1], color=TASK_LOOKS[task][0], alpha=0.35, markersize=5)
            ax.plot(np.mean(found), i, "|", color="black", markersize=14, markeredgewidth=2.5)
        ax.set(xlim=(0, 1.02), xticks=[0, 0.25, 0.5, 0.75, 1], xlabel="accuracy")
        ax.set_title(f"{task}, {n} pairs", fontsize=14)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    plt.show()


def forest(table, margins):
    """Contrasts as estimates with 95 % intervals, all on one axis, in units of the task's margin.

    table: of experiment.recall_contrasts; margins: {task: number}. Filled: Holm's p is below .05."""
    pairs = list(dict.fromkeys((line["family"], line["arm"], line["base"]) for line in table))
    _, ax = plt.subplots(figsize=(11, 0.62 * len(pairs) + 1.5))
    ax.axvspan(-1, 1, color=GREY, alpha=0.2, linewidth=0)
    ax.axvline(0, color=GREY, linestyle="-", linewidth=1)
    for line in table:
        colour, marker = TASK_LOOKS[line["task"]]
        y = pairs.index((line["family"], line["arm"], line["base"]))
        y += 0.24 * (list(margins).index(line["task"]) - 1)
        low, high = (bound / margins[line["task"]] for bound in experiment.interval(line))
        ax.plot([low, high], [y, y], color=colour, linestyle="-")
        ax.plot(line["estimate"] / margins[line["task"]], y, marker, color=colour,
                fillstyle="full" if line["holm"] < 0.05 else "none")
    for y, (family, *_) in enumerate(pairs[1:], 1):
        if family != pairs[y - 1][0]:
            ax.axhline(y - 0.5, color=GREY, linestyle=":", linewidth=1)
    ax.set_yticks(range(len(pairs)), [f"{arm} − {base}" for _, arm, base in pairs])
    ax.set(ylim=(len(pairs) - 0.5, -0.5), xlabel="change of the accuracy's logit, in margins")
    for task in margins:
        ax.plot([], [], TASK_LOOKS[task][1] + "-", color=TASK_LOOKS[task][0], label=task)
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, 1.06), ncols=3, fontsize=13, frameon=False)
    plt.show()


def paired_tiles(picture):
    """A picture's 16 tiles in eight couples, most alike first, each as a strip (3, 4, 14).

    A strip has the tile, its partner, and where they agree: white in all three colours, black in none."""
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


def show_twins(folder):
    """A sample of each system of twins.py, cut into couples of tiles. The last row is a real picture."""
    rows = {arm: torch.from_numpy(np.load(path))[0] for arm in twins.ARMS
            if (path := folder / f"twins-{arm.replace(' ', '-')}.npy").exists()}
    rows["real"] = twins.make_twins(1, torch.Generator().manual_seed(0))[0][0]
    _, axes = plt.subplots(len(rows), 8, figsize=(12, 0.62 * len(rows)), squeeze=False)
    for line, (name, picture) in zip(axes, rows.items()):
        for ax, tiles in zip(line, paired_tiles(picture)):
            ax.imshow(((tiles + 1) / 2).permute(1, 2, 0), interpolation="nearest")
            figures.clear(ax)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=13)
    plt.show()


def contrasts_picture(table):
    """experiment.compare()'s table of the eighty runs: contrasts with 95 % intervals, a panel per measure.

    Filled: it survives Holm's correction."""
    asks, measures = (list(dict.fromkeys(line[key] for line in table)) for key in ("asks", "measure"))
    _, axes = plt.subplots(1, len(measures), figsize=(11, 0.42 * len(asks) + 1.2), sharey=True)
    for line in table:
        ax, y = axes[measures.index(line["measure"])], asks.index(line["asks"])
        ax.plot([experiment.percent(bound) for bound in experiment.interval(line)], [y, y], "-", color=BLUE)
        ax.plot(experiment.percent(line["estimate"]), y, "o", color=BLUE,
                fillstyle="full" if line["holm"] < 0.05 else "none")
    for ax, measure in zip(axes, measures):
        ax.axvline(0, color=GREY, linestyle="-", linewidth=1)
        ax.set_xlabel(f"change of {measure}, %")
    axes[0].set(yticks=range(len(asks)), yticklabels=asks)
    axes[0].invert_yaxis()
    plt.show()


# ---- Samples --------------------------------------------------------------------------------------------------------

SHOWN = {"Sana": "sana", "DiT": "dit", "rung 5": experiment.OURS.replace("rung6", "rung5"), "DyDi-LiT": experiment.OURS}


def first_samples(folder, variants, seed):
    """A sample of each class and variant, (variants, classes, H, W, 3) uint8, from ladder.py's folder of the data.

    They are those of the recipe's guidance. In a column, all come from the same noise.
    """
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


def keep_samples(folder, training):
    """Writes the samples of SHOWN, of the first seed, and their nearest training pictures."""
    images = first_samples(folder, SHOWN.values(), experiment.SEEDS[0])
    np.savez_compressed(experiment.RESULTS / "verdict/samples.npz", images=images,
                        nearest=nearest(images, training.images), names=list(SHOWN))


def keep_floors(data_dir, training):
    """Writes the squared error, by band, of predicting that x_0 is the mean picture of its class.

    Held-out pictures and noise are those on which ladder.py measures the models."""
    pixels, labels = train.pixels(training.images), torch.as_tensor(training.labels)
    means = torch.stack([pixels[labels == c].mean(0) for c in range(10)])
    data, diffusion, lines = eq8.held_out_images("cifar10", data_dir), dydilit.GaussianDiffusion(), []
    for band in range(ladder.BANDS):
        x, x_t, noise, y, t = ladder.noisy_band(data, band)
        guess = x_t - diffusion._at("sqrt_alpha_bar", t) * means[y]
        error = (guess / diffusion._at("sqrt_one_minus", t) - noise).square().mean().item()
        lines.append(dict(timesteps_from=band * 1000 // ladder.BANDS, squared_error=error))
    measures.save_log(experiment.RESULTS / "verdict/floors.csv", lines)


def show_samples(path):
    """What keep_samples kept, a row per system, with the nearest training pictures on the right."""
    with np.load(path) as file:
        left, right, names = (file[key] for key in ("images", "nearest", "names"))
    grid = np.concatenate([left, np.full_like(left[:, :1], 255), right], axis=1)
    words = [""] * grid.shape[1]
    words[left.shape[1] // 2], words[-right.shape[1] // 2] = "samples", "nearest training pictures"
    figures.show_images(torch.from_numpy(grid).permute(0, 1, 4, 2, 3) / 127.5 - 1, list(names), words, width=0.52)


# The eight systems with their looks, and what ladder.py calls them.
LOOKS = {"DiT": (BLUE, "-", "o"), "PixArt-Sigma": (SKY, "--", "s"), "MoH-DiT": (BLACK, ":", "^"), "Sana": (GREY, "--", "D"),
         "EDiT": (GREEN, "-.", "v"), "LiT": (PINK, (0, (3, 1)), "X"), "DiG": (VIOLET, (0, (8, 3)), "P"),
         "DyDi-LiT": (ORANGE, "-", "*")}
VARIANTS = {"DiT": "dit", "PixArt-Sigma": "pixart", "MoH-DiT": "moh", "Sana": "sana", "EDiT": "edit", "LiT": "lit", "DiG": "dig",
            "DyDi-LiT": experiment.RUNG6["mass"]}
figures.LOOKS.update(LOOKS)


# ---- The map of the answers -----------------------------------------------------------------------------------------

IDEAS = {"compress the keys": (BLUE, 4.6), "linearize": (GREEN, 3.5), "gate and scan": (ORANGE, 2.4),
         "route the tokens": (VIOLET, 1.4), "route the heads": (PINK, 0.5)}
ANSWERS = {"PixArt-Sigma": (["compress the keys"], "softmax over N/16 keys, in the later blocks"),
           "EDiT": (["compress the keys", "linearize"], "N/4 keys, queries see their surroundings"),
           "Sana": (["linearize"], "ReLU, one head"),
           "LiT": (["linearize"], "ReLU, few heads, a 5×5 convolution"),
           "DiG": (["linearize", "gate and scan"], "a memory that forgets, four directions"),
           "DyDi-LiT": (["linearize", "route the tokens"], "kernel, difference, a 3×3 convolution"),
           "MoH-DiT": (["route the heads"], "softmax, each token picks heads")}


def answers_map():
    """The question, five ideas, and the seven systems that are made of them; grey are those of earlier lessons."""
    known = ("Sana", "DyDi-LiT")
    colours = {"DiT": BLACK, **{idea: colour for idea, (colour, _) in IDEAS.items()}, **dict.fromkeys(ANSWERS, BLACK)}
    s = figures.Sketch(12.4, 5.3, [part for part in colours if part not in known], colours)
    s.box("DiT", 0.95, 2.6, "DiT:\nevery token\nsees every\nother, $N^2$", 1.6, 1.6)
    for idea, (_, y) in IDEAS.items():
        s.arrow(idea, (1.75, 2.6 + 0.25 * (y - 2.6)), (2.4, y))
        s.box(idea, 3.6, y, idea, 2.4)
    for i, (name, (ideas, text)) in enumerate(ANSWERS.items()):
        y = 4.95 - 0.74 * i
        for j, idea in enumerate(ideas):                    # where two arrows end, one ends above the other
            s.arrow(idea, (4.8, IDEAS[idea][1]), (6.2, y + 0.12 * (len(ideas) - 1) * (1 - 2 * j)))
        s.box(name, 7.1, y, name, 1.8, 0.55)
        s.note(name, 8.15, y, text, ha="left")
    plt.show()


# ---- The neighbours on the course's photograph ----------------------------------------------------------------------

def course_module(kind, *arguments):
    """A neighbour's attention of width 64 that nobody trained, with the course's projections; always the same.

    Queries and keys get the projection that they share in lesson 1, values theirs, and what follows the attention is the
    identity. All other weights are a new model's.
    """
    ex = example()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        module = kind(WIDTH, *arguments)
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    layer.bias.zero_()
        w_qk, w_v = ex.w_qk.T, ex.w_v.T                     # nn.Linear multiplies by the transpose
        if hasattr(module, "qkv"):
            module.qkv.weight.copy_(torch.cat([w_qk, w_qk, w_v]))
        elif hasattr(module, "kv"):
            module.q.weight.copy_(w_qk)
            module.kv.weight.copy_(torch.cat([w_qk, w_v]))
        else:                                               # DiG's queries and keys are half as wide
            module.q.weight.copy_(w_qk[:len(w_qk) // 2])
            module.k.weight.copy_(w_qk[:len(w_qk) // 2])
            module.v.weight.copy_(w_v)
        nn.init.eye_(module.proj.weight)
    return module.requires_grad_(False)


def small_strip(maps, *names):
    """figures.strip() of the maps with these names, with fewer pixels: this lesson has many."""
    with plt.rc_context({"figure.dpi": 90}):
        figures.strip({name: maps[name] for name in names})


def processor_ms(functions, repeats):
    """Milliseconds that the processor spends on each of {name: function}, the least of several calls.

    Unlike a clock's time, it hardly changes when other programs run.
    """
    times = {}
    for name, function in functions.items():
        calls = []
        for _ in range(repeats):
            start = time.process_time()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()                    # a processor that waits is counted, too
            calls.append(time.process_time() - start)
        times[name] = 1e3 * min(calls)
    return times


# ---- The detective's picture ----------------------------------------------------------------------------------------

def show_whole(depths, coefficients, tolerance):
    """How far a block's number of d^2 is from a whole one, if there are so many blocks; the number stands where it fits.

    coefficients: {system: one number per depth}; tolerance: what the rounding of the printed figures allows, per depth.
    """
    fig, axes = plt.subplots(len(coefficients), 1, figsize=(9.5, 2.5 * len(coefficients)), sharex=True, squeeze=False)
    for ax, (name, values) in zip(axes[:, 0], coefficients.items()):
        colour, _, marker = LOOKS[name]
        ax.fill_between(depths, np.negative(tolerance), tolerance, color=GREY, alpha=0.35, linewidth=0)
        for depth, value, allowed in zip(depths, values, tolerance):
            far = value - round(value)
            fits = abs(far) < allowed
            ax.plot([depth, depth], [0, far], color=colour, linestyle="-", linewidth=1.5)
            ax.plot(depth, far, color=colour, marker=marker, markersize=13 if fits else 8, fillstyle="full" if fits else "none")
            if fits:
                ax.annotate(f"{value:.0f} $d^2$", (depth, far), (0, 13), textcoords="offset points", ha="center")
        ax.set(ylim=(-0.6, 0.6), xticks=depths)
        ax.set_title(name, loc="left", color=colour, fontweight="bold", fontsize=14)
    axes[-1, 0].set_xlabel("number of blocks, supposed")
    fig.supylabel("distance to a whole number", fontsize=14)
    plt.show()


# ---- Side by side ---------------------------------------------------------------------------------------------------

def show_runs(rows):
    """Every run of the eight systems in both measures, and each system's mean as a bar. rows: of runs.csv."""
    _, axes = plt.subplots(1, 2, figsize=(12.6, 4.6), sharey=True, gridspec_kw={"wspace": 0.12})
    for ax, (measure, value) in zip(axes, experiment.MEASURES.items()):
        for i, (name, variant) in enumerate(VARIANTS.items()):
            logs = [value(row) for row in experiment.chosen(rows, [variant], experiment.NEIGHBOUR_SEEDS)]
            ax.plot(np.exp(logs), [i] * len(logs), linestyle="", marker="o", color=LOOKS[name][0], alpha=0.6)
            ax.plot(np.exp(np.mean(logs)), i, linestyle="", marker="|", markersize=26, markeredgewidth=3, color=LOOKS[name][0])
        ax.set(xlabel=measure + ", less is better", xscale="log", yticks=range(len(VARIANTS)), yticklabels=list(VARIANTS))
        low, high = ax.get_xlim()
        ticks = [float(f"{tick:.2g}") for tick in np.geomspace(1.02 * low, high / 1.02, 5)]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_xticks([], minor=True)
    axes[0].invert_yaxis()
    plt.show()


def keep_system_samples(folder, out):
    """A sample of each class and system, of the first seed, from ladder.py's folder of the data."""
    np.savez_compressed(out, images=first_samples(folder, VARIANTS.values(), experiment.NEIGHBOUR_SEEDS[0]), names=list(VARIANTS))


def show_system_samples(path):
    """The grid that keep_system_samples kept, a row per system."""
    with np.load(path) as file:
        figures.show_images(torch.from_numpy(file["images"]).permute(0, 1, 4, 2, 3) / 127.5 - 1, list(file["names"]))
