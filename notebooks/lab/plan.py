"""Pictures of notebooks 10 and A, and the samples that A shows.

    python notebooks/lab/plan.py runs/verdict/cifar10-DyDi-LiT-XS-4 DIR

After the eighty runs, this keeps a sample of each class from four of the systems, and the training
picture nearest to each, in results/verdict/samples.npz. To results/verdict/floors.csv go the errors
of always predicting the mean picture of the class. DIR has the pictures in CIFAR-10's layout.
"""
import pathlib
import sys

import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import dydilit  # noqa: E402
import train  # noqa: E402
from lab import figures, measures, twins, verdict  # noqa: E402
from lab.figures import BLUE, GREEN, GREY, ORANGE  # noqa: E402

LOOKS = {"sharpness": (BLUE, "o"), "interference": (ORANGE, "s"), "heterogeneity": (GREEN, "D")}


def every_seed(rows):
    """Each arm's accuracy on each task: a dot per seed, and a bar at the mean."""
    arms = verdict.arms_of(rows)
    _, axes = plt.subplots(1, 3, figsize=(12, 0.34 * len(arms) + 1.3), sharey=True)
    for ax, (task, n) in zip(axes, verdict.TASKS.items()):
        for i, arm in enumerate(arms):
            found = [*verdict.by_seed(rows, task, arm, lambda row: float(row[f"accuracy_{n}"])).values()]
            ax.plot(found, [i] * len(found), LOOKS[task][1], color=LOOKS[task][0], alpha=0.35, markersize=5)
            ax.plot(np.mean(found), i, "|", color="black", markersize=14, markeredgewidth=2.5)
        ax.set(xlim=(0, 1.02), xticks=[0, 0.25, 0.5, 0.75, 1], xlabel="accuracy")
        ax.set_title(f"{task}, {n} pairs", fontsize=14)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    plt.show()


def forest(table, margins):
    """Contrasts as estimates with 95 % intervals, all on one axis, in units of the task's margin.

    table: of verdict.recall_contrasts; margins: {task: number}. Filled: Holm's p is below .05."""
    pairs = list(dict.fromkeys((line["family"], line["arm"], line["base"]) for line in table))
    _, ax = plt.subplots(figsize=(11, 0.62 * len(pairs) + 1.5))
    ax.axvspan(-1, 1, color=GREY, alpha=0.2, linewidth=0)
    ax.axvline(0, color=GREY, linestyle="-", linewidth=1)
    for line in table:
        colour, marker = LOOKS[line["task"]]
        y = pairs.index((line["family"], line["arm"], line["base"]))
        y += 0.24 * (list(margins).index(line["task"]) - 1)
        low, high = (bound / margins[line["task"]] for bound in verdict.interval(line))
        ax.plot([low, high], [y, y], color=colour, linestyle="-")
        ax.plot(line["estimate"] / margins[line["task"]], y, marker, color=colour,
                fillstyle="full" if line["holm"] < 0.05 else "none")
    for y, (family, *_) in enumerate(pairs[1:], 1):
        if family != pairs[y - 1][0]:
            ax.axhline(y - 0.5, color=GREY, linestyle=":", linewidth=1)
    ax.set_yticks(range(len(pairs)), [f"{arm} − {base}" for _, arm, base in pairs])
    ax.set(ylim=(len(pairs) - 0.5, -0.5), xlabel="change of the accuracy's logit, in margins")
    for task in margins:
        ax.plot([], [], LOOKS[task][1] + "-", color=LOOKS[task][0], label=task)
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
    """verdict.compare()'s table of the eighty runs: contrasts with 95 % intervals, a panel per measure.

    Filled: it survives Holm's correction."""
    asks, measures = (list(dict.fromkeys(line[key] for line in table)) for key in ("asks", "measure"))
    _, axes = plt.subplots(1, len(measures), figsize=(11, 0.42 * len(asks) + 1.2), sharey=True)
    for line in table:
        ax, y = axes[measures.index(line["measure"])], asks.index(line["asks"])
        ax.plot([verdict.percent(bound) for bound in verdict.interval(line)], [y, y], "-", color=BLUE)
        ax.plot(verdict.percent(line["estimate"]), y, "o", color=BLUE,
                fillstyle="full" if line["holm"] < 0.05 else "none")
    for ax, measure in zip(axes, measures):
        ax.axvline(0, color=GREY, linestyle="-", linewidth=1)
        ax.set_xlabel(f"change of {measure}, %")
    axes[0].set(yticks=range(len(asks)), yticklabels=asks)
    axes[0].invert_yaxis()
    plt.show()


# ---- Samples --------------------------------------------------------------------------------------------------------

SHOWN = {"Sana": "sana", "DiT": "dit", "rung 5": verdict.OURS.replace("rung6", "rung5"), "DyDi-LiT": verdict.OURS}


def first_samples(folder, variants, seed):
    """A sample of each class and variant, (variants, classes, H, W, 3) uint8, from ladder.py's folder of the data.

    They are those of the recipe's guidance. In a column, all come from the same noise.
    """
    from lab import ladder, measures
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
    images = first_samples(folder, SHOWN.values(), verdict.SEEDS[0])
    np.savez_compressed(verdict.RESULTS / "verdict/samples.npz", images=images,
                        nearest=nearest(images, training.images), names=list(SHOWN))


def keep_floors(data_dir, training):
    """Writes the squared error, by band, of predicting that x_0 is the mean picture of its class.

    Held-out pictures and noise are those on which ladder.py measures the models."""
    from lab import ladder
    pixels, labels = train.pixels(training.images), torch.as_tensor(training.labels)
    means = torch.stack([pixels[labels == c].mean(0) for c in range(10)])
    data, diffusion, lines = ladder.held_out("cifar10", data_dir), dydilit.GaussianDiffusion(), []
    for band in range(ladder.BANDS):
        x, x_t, noise, y, t = ladder.noisy_band(data, band)
        guess = x_t - diffusion._at("sqrt_alpha_bar", t) * means[y]
        error = (guess / diffusion._at("sqrt_one_minus", t) - noise).square().mean().item()
        lines.append(dict(timesteps_from=band * 1000 // ladder.BANDS, squared_error=error))
    measures.save_log(verdict.RESULTS / "verdict/floors.csv", lines)


def show_samples(path):
    """What keep_samples kept, a row per system, with the nearest training pictures on the right."""
    with np.load(path) as file:
        left, right, names = (file[key] for key in ("images", "nearest", "names"))
    grid = np.concatenate([left, np.full_like(left[:, :1], 255), right], axis=1)
    words = [""] * grid.shape[1]
    words[left.shape[1] // 2], words[-right.shape[1] // 2] = "samples", "nearest training pictures"
    figures.show_images(torch.from_numpy(grid).permute(0, 1, 4, 2, 3) / 127.5 - 1, list(names), words, width=0.52)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    pictures = train.cifar10(sys.argv[2])
    keep_samples(sys.argv[1], pictures)
    keep_floors(sys.argv[2], pictures)
