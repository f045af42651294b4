"""The first 102 runs of results/*.csv: reading them, comparing variants, and the pictures of notebooks 10 and A."""
import csv
import pathlib

import matplotlib.pyplot as plt
import numpy as np

import dydilit
from lab.figures import BLUE, ORANGE, PINK, curves, level, look
from lab.verdict import TwoWay, holm, percent, quantile

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results"
SETS = {"cifar10": "Fashion", "shapes": "shapes"}
NAMES = {"rung1": "Sana", "rung2": "+ focused kernel", "rung3": "+ dynamic kernel", "rung4": "+ projection",
         "rung5": "+ differential", "rung6": "+ convolution", "map": "map-wise", "increasing": "lambda 0.2 to 0.8",
         "sana": "Sana, equal cost", "dit": "DiT, equal cost"}
MEASURES = {"loss": "held_out", "FID": "cfg4_FID", "KID": "cfg4_KID"}

# Claims: (words, variant that should have less, variant that should have more, the paper's two FIDs).
STEPS = [("focused kernel beats ReLU", "rung2", "rung1", 28.20, 28.00),
         ("dynamic kernel beats focused", "rung3", "rung2", 27.87, 28.20),
         ("projection beats plain Q, K", "rung4", "rung3", 27.46, 27.87),
         ("differential beats projection", "rung5", "rung4", 26.20, 27.46),
         ("convolution beats its absence", "rung6", "rung5", 24.48, 26.20),
         ("all parts beat Sana", "rung6", "rung1", 24.48, 28.00)]
OTHERS = [("token-wise beats map-wise", "rung5", "map", 26.20, 26.62),
          ("λ from 0.01 beats 0.2 to 0.8", "rung5", "increasing", 26.20, 29.30),
          ("DyDi-LiT beats Sana of equal cost", "rung6", "sana", 24.48, 28.00),
          ("DyDi-LiT beats DiT of equal cost", "rung6", "dit", 24.48, 35.29)]
ALIKE = ":init=full"                        # what a variant shares with the full model starts as there
SAME_START = [(words, a + (ALIKE if a != "rung6" else ""), b + ALIKE, *fids) for words, a, b, *fids in STEPS]
NORMALIZER = [("printed Eq. 8 beats mass, rung 5", f"rung5{ALIKE},normalizer=none", "rung5" + ALIKE),
              ("printed Eq. 8 beats mass, rung 6", "rung6:normalizer=none", "rung6")]


# ---- Reading --------------------------------------------------------------------------------------------------------

def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def read(name):
    """The lines of results/NAME.csv, numbers as numbers."""
    with open(RESULTS / f"{name}.csv", newline="") as file:
        return [{k: number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def runs():
    """runs.csv, with held_out: the loss weighted as these runs were trained, min(1, 0.5 / SNR) in each band."""
    diffusion = dydilit.GaussianDiffusion()
    snr = (diffusion.sqrt_alpha_bar / diffusion.sqrt_one_minus).square().cpu().numpy()
    weights = np.minimum(1, 0.5 / snr).reshape(10, 100).mean(1)
    rows = read("runs")
    for row in rows:
        row["held_out"] = sum(w * row[f"band{b}"] for b, w in enumerate(weights)) / weights.sum()
        row["high_noise"] = sum(row[f"band{b}"] for b in range(4, 10)) / 6
    return rows


def values(rows, data, column):
    """{(variant, seed): logarithm of a column}."""
    return {(r["variant"], r["seed"]): float(np.log(r[column])) for r in rows if r["data"] == data}


def by_seed(rows, data, variant, column):
    """A column of one variant, an array in the order of the seeds."""
    return np.array([r[column] for r in sorted(rows, key=lambda r: r["seed"]) if (r["data"], r["variant"]) == (data, variant)])


def fits(rows, data, column):
    """The two pooled fits of a column: of the ten variants with initial values of their own, and of those that start alike."""
    logs = values(rows, data, column)
    alike = {variant for claim in SAME_START + NORMALIZER for variant in claim[1:3]}
    return [TwoWay({at: y for at, y in logs.items() if at[0] in pool}) for pool in (NAMES, alike)]


def compare(rows, claims, measures=MEASURES, data=SETS):
    """Each claim by each measure on each set: {(words, data, measure): (estimate, half, p)}, of logarithms.

    A claim whose runs are not there is left out.
    """
    found = {}
    for d in data:
        for measure, column in measures.items():
            pooled = fits(rows, d, column)
            for words, a, b, *_ in claims:
                for fit in pooled:
                    if a in fit.column and b in fit.column:
                        found[words, d, measure] = fit.difference(a, b)
    return found


# ---- Pictures -------------------------------------------------------------------------------------------------------

def set_look(data):
    """Keywords for errorbar: colour and marker of a set of pictures."""
    return dict(zip(SETS, (dict(color=ORANGE, marker="o", linestyle="none", markersize=8),
                           dict(color=BLUE, marker="s", linestyle="none", markersize=8))))[data]


# Percent to label, by the length of an axis that counts logarithms.
TICKS = {3: (-95, -80, -50, 0, 100), 2.35: (-75, -50, 0, 100), 1: (-75, -50, 0, 50), 0.15: (-20, -10, 0), 0: (-4, -2, 0, 2)}


def claims_picture(rows, claims):
    """A forest plot of claims, a panel for each measure: a mark and its 95 % interval for each set of pictures.

    The axis counts logarithms and is labelled in percent. A filled mark survives Holm's correction over the whole picture.
    """
    found = compare(rows, claims)
    survives = dict(zip(found, [p < 0.05 for p in holm([p for *_, p in found.values()])]))
    fig, axes = plt.subplots(1, len(MEASURES), figsize=(12, 0.45 * len(claims) + 2), sharey=True)
    for ax, measure in zip(axes, MEASURES):
        for i, (words, _, _, *fids) in enumerate(claims):
            if i % 2:
                ax.axhspan(i - 0.5, i + 0.5, color="#F0F0F0", linewidth=0)
            for data, shift in zip(SETS, (-0.17, 0.17)):
                if (words, data, measure) in found:
                    estimate, half, _ = found[words, data, measure]
                    ax.errorbar(estimate, i + shift, xerr=half, capsize=3, linewidth=2, markeredgewidth=2, **set_look(data),
                                markerfacecolor=None if survives[words, data, measure] else "white")
            if fids and measure == "FID":
                ax.plot(np.log(fids[0] / fids[1]), i, "x", color="black", markersize=9, markeredgewidth=2.5, zorder=4)
        low, high = ax.get_xlim()
        steps = next(steps for width, steps in TICKS.items() if high - low > width)
        ticks = [t for t in steps if low < np.log1p(t / 100) < high]
        ax.set_xticks(np.log1p(np.array(ticks) / 100), [f"{t:+}".replace("+0", "0").replace("-", "−") for t in ticks])
        level(ax, "no difference", 0, upright=True)
        ax.set(xlabel="change, %", ylim=(len(claims) - 0.5, -0.5))
        ax.grid(False, axis="y")
        ax.set_title({"loss": "held-out loss"}.get(measure, measure), fontsize=16, pad=24)
    axes[0].set_yticks(range(len(claims)), [words for words, *_ in claims])
    axes[0].tick_params(axis="y", length=0)
    handles = [plt.errorbar([], [], xerr=[], capsize=3, label=name, **set_look(data)) for data, name in SETS.items()]
    handles += [plt.Line2D([], [], linestyle="none", marker=m, color="black", markersize=9, markeredgewidth=2, markerfacecolor=face, label=word)
                for m, face, word in [("o", "black", "filled: survives Holm"), ("o", "white", "open: does not"), ("x", "black", "the paper's FID")]]
    fig.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, columnspacing=1.2)
    plt.show()


def kernel_picture(rows, column="held_out"):
    """The held-out loss of the dynamic kernel against the focused one, a pair of runs for each seed, with either start."""
    ax = plt.subplots(figsize=(9, 4.4))[1]
    for suffix, marker, face, words in [("", "o", PINK, "each its own"), (ALIKE, "D", "white", "the full model's")]:
        pairs = [[by_seed(rows, data, rung + suffix, column) for rung in ("rung3", "rung2")] for data in SETS]
        change = np.array([100 * (dynamic / focused - 1) for dynamic, focused in pairs])                 # (sets, seeds)
        ax.plot([[0, 1, 2], [4, 5, 6]], change, marker, color=PINK, markersize=11, markeredgewidth=2.5, markerfacecolor=face)
        ax.plot([], [], marker, color=PINK, markersize=11, markeredgewidth=2.5, markerfacecolor=face, label=words)
    level(ax, "no difference", 0)
    ax.set_xticks([0, 1, 2, 4, 5, 6], [f"{name}\nseed {seed}" for name in SETS.values() for seed in range(3)])
    ax.set(ylabel="held-out loss, change in %", ylim=(-0.6, 3.2), xlim=(-0.6, 7.6), yticks=[0, 1, 2])
    ax.legend(loc="upper right", title="initial values")
    plt.show()


def bands_picture(rows):
    """DyDi-LiT's held-out loss against two Sanas, by the band of timesteps, percent with 95 % intervals."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True)
    for ax, base, title in zip(axes, ("rung1", "sana"), ("Sana of equal width", "Sana of equal cost")):
        for data, shift in zip(SETS, (-9, 9)):
            logs = np.array([fits(rows, data, f"band{band}")[0].difference("rung6", base)[:2] for band in range(10)])
            low, middle, high = (100 * np.expm1(logs[:, 0] + side * logs[:, 1]) for side in (-1, 0, 1))
            ax.errorbar(np.arange(50, 1000, 100) + shift, middle, [middle - low, high - middle], capsize=3, label=SETS[data],
                        **{**set_look(data), "linestyle": "-"})
        ax.set_title(f"against {title}", fontsize=15)
        ax.set_xlabel("timestep")
        ax.set_xticks(range(0, 1001, 200))
    level(axes[0], "", 0)
    level(axes[1], "no\ndifference", 0, end=1.03)
    axes[0].set_ylabel("held-out loss, change in %")
    axes[1].legend(loc="lower left")
    plt.show()


def per_block(blocks, data, variant, column):
    """A column of blocks.csv, (blocks, seeds)."""
    mine = [b for b in blocks if (b["data"], b["variant"]) == (data, variant)]
    depth = sorted({b["block"] for b in mine})
    return np.array([[b[column] for b in mine if b["block"] == d] for d in depth])


def smoothing_picture(blocks, variants):
    """Row variance and the tokens' cosine after attention, a mark per run: the mean over its blocks, on Fashion.

    variants: {words: (variant, key of LOOKS)}.
    """
    _, axes = plt.subplots(1, 2, figsize=(10, 0.46 * len(variants) + 1.2), sharey=True)
    for ax, column, label in zip(axes, ("row_variance", "similarity_out"), ("row variance × N²", "cosine of two tokens after attention")):
        for i, (variant, kind) in enumerate(variants.values()):
            found = per_block(blocks, "cifar10", variant, column).mean(0)
            ax.plot(found, [i] * len(found), **{**look(kind, marker=True), "linestyle": "none", "markersize": 10})
        ax.set_xlabel(label)
    axes[0].set_yticks(range(len(variants)), list(variants))
    axes[0].set_xticks([0.5, 1, 1.5, 2])
    axes[1].set_xticks([0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    axes[0].set_ylim(len(variants) - 0.5, -0.5)
    plt.show()


def chosen(routers, data, variant, kind):
    """The mean over tokens of the factor that a kind's routers pick, (blocks, seeds)."""
    mine = [x for x in routers if (x["data"], x["variant"]) == (data, variant) and x["router"].startswith(kind)]
    depth, seeds = sorted({x["block"] for x in mine}), sorted({x["seed"] for x in mine})
    return np.array([[np.mean([x["value"] for x in mine if (x["block"], x["seed"]) == (d, s)]) for s in seeds] for d in depth])


def banks_picture(routers):
    """λ and γ that a token gets, by block, the mean and the range of three seeds. Fashion left, shapes right."""
    looks = {"rung3": look("dynamic", True, "rung 3, dynamic kernel"), "rung5": look("differential", True, "rung 5, differential"),
             "rung6": look("convolution", True, "rung 6, DyDi-LiT"), "map": dict(color="black", linestyle=":", marker="s", label="map-wise")}
    handles = {}
    fig, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, sharey="row")
    for line, (kind, symbol), variants in zip(axes, [("differential", "λ"), ("kernel", "γ")],
                                              [("rung5", "map", "rung6"), ("rung3", "rung5", "rung6")]):
        for ax, data in zip(line, SETS):
            for k, variant in enumerate(variants):
                found = chosen(routers, data, variant, kind)
                mean = found.mean(1)
                handles[variant] = ax.errorbar(np.arange(1, len(found) + 1) + 0.07 * (k - 1), mean, [mean - found.min(1), found.max(1) - mean],
                                               capsize=4, **looks[variant])
            ax.set_xticks(range(1, 5))
        line[0].set_ylabel(symbol, fontsize=18, rotation=0, labelpad=14)
    for ax, data in zip(axes[0], SETS):
        ax.set_title(SETS[data], fontsize=16)
    for ax in axes[1]:
        ax.set_xlabel("block")
    fig.legend(handles=[handles[variant] for variant in looks], loc="outside lower center", ncols=4, frameon=False, fontsize=13)
    plt.show()


# ---- Printed lines --------------------------------------------------------------------------------------------------

def smallest_picture(rows, variants=8, most=20):
    """The smallest change that n seeds can show, in percent: half of the interval of a contrast of `variants` variants.

    From the pooled standard deviations of the first runs on Fashion, initial values their own.
    """
    n = range(2, most + 1)
    sds = {f"{name}, sd {100 * fit.sd:.1f} %": fit.sd for name, column in MEASURES.items() for fit in fits(rows, "cifar10", column)[:1]}
    ax = curves(n, {name: [percent(quantile((variants - 1) * (m - 1)) * sd * (2 / m) ** 0.5) for m in n] for name, sd in sds.items()},
                "seeds", "smallest visible change, %", markers=False, yscale="log", xticks=[2, 3, 5, 10, 15, 20],
                yticks=[0.5, 1, 2, 5, 10, 20, 50])
    level(ax, "first runs", 3, upright=True)
    level(ax, "plan", 10, upright=True)
    plt.show()


def print_levels(rows, data):
    """Means over three seeds of the ten variants at guidance 4, a line per variant."""
    print(f"{SETS[data]:20}{'FID':>8}{'KID':>8}{'recognized':>12}{'loss x 1000':>13}")
    for variant, name in NAMES.items():
        fid, kid, share, loss = (by_seed(rows, data, variant, c).mean() for c in ("cfg4_FID", "cfg4_KID", "cfg4_recognized", "held_out"))
        print(f"{name:20}{fid:8.1f}{kid:8.2f}{share:12.0%}{1000 * loss:13.2f}")


def print_routers(routers):
    """What the routers of the full model do with three seeds: collapse, dependence on the class, favourites."""
    for data in SETS:
        for kind in ("projection", "kernel", "differential"):
            mine = [x for x in routers if (x["variant"], x["data"]) == ("rung6", data) and x["router"].startswith(kind)]
            beyond = sum(x["shuffles_as_high"] == 0 for x in mine)
            bits = np.median([x["class_bits"] - x["class_bits_shuffled"] for x in mine])
            print(f"{SETS[data]:8}{kind:13}{len(mine)} routers, {sum(x['perplexity'] < 1.05 for x in mine)} collapsed, {beyond:2} beyond all "
                  f"shuffles, median {bits:.3f} bits")
            print(f"{'':21}favourites of ten classes {np.mean([x['favourites'] for x in mine]):.2f}, of shuffled classes "
                  f"{np.mean([x['favourites_shuffled'] for x in mine]):.2f}")


def print_near_classes(rows, guidance=4):
    """Percent recognized on Fashion in three groups of classes, how many points DyDi-LiT has over the others, by seed."""
    groups = {"near (tops, dresses)": [0, 2, 3, 4, 6], "shoes": [5, 7, 9], "trousers and bags": [1, 8]}
    for group, classes in groups.items():
        share = {v: np.array([np.mean([100 * float(text.split()[c]) for c in classes]) for text in
                              by_seed(rows, "cifar10", v, f"cfg{guidance}_recognized_by_class")]) for v in ("rung6", "sana", "dit")}
        print(f"{group:22}" + ", ".join(f"over {NAMES[v]}: " + " ".join(f"{x:+.0f}" for x in share["rung6"] - share[v]) for v in ("sana", "dit")))
