"""The analysis of the experiments of notebooks 10 and 11, as it was fixed before their runs were made.

    python notebooks/lab/verdict.py notebooks/results/verdict/runs.csv                notebook 10's
    python notebooks/lab/verdict.py recall notebooks/results/recall/runs.csv          the tasks of recall.py
    python notebooks/lab/verdict.py neighbours notebooks/results/verdict/runs.csv     notebook 11's

Prints the table of contrasts, and of notebook 10's what the rule says. Before all runs are there it only counts them.
"""
import csv
import functools
import math
import pathlib
import sys
import textwrap

import numpy as np

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
from lab.neighbours import NEIGHBOURS  # noqa: E402

# The eight variants, as ladder.py names them.
LAMBDA0 = {n: f"lambda0:normalizer={n}" for n in ("none", "mass")}      # rung 5 with lambda held at 0
RUNG5 = {n: f"rung5:normalizer={n}" for n in ("none", "mass")}          # with the differential
RUNG6 = {n: f"rung6:normalizer={n}" for n in ("none", "mass")}          # DyDi-LiT: and with the convolution
VARIANTS = [*LAMBDA0.values(), *RUNG5.values(), *RUNG6.values(), "sana", "dit"]
NAMES = dict(zip(VARIANTS, ["λ = 0, printed", "λ = 0, mass", "rung 5, printed", "rung 5, mass", "DyDi-LiT, printed",
                            "DyDi-LiT, mass", "Sana", "DiT"]))
SEEDS = range(100, 110)

# Notebook 11: DyDi-LiT as it is by default, and its neighbours, with the first five of these seeds.
OURS = RUNG6["none"]
BESIDE = [OURS, *NEIGHBOURS]
BESIDE_SEEDS = range(100, 105)

# Logarithms of what is measured, so that a difference is a ratio. held_out_log is a mean logarithm already.
MEASURES = {"KID": lambda row: math.log(float(row["cfg2_KID"])),
            "held-out loss": lambda row: float(row["held_out_log"])}


def contrasts(best):
    """The eight contrasts fixed beforehand: {what it asks: (variant, variant that it is compared with)}."""
    return {
        "1  printed Eq. 8 against mass, full model": (RUNG6["none"], RUNG6["mass"]),
        "2a differential on against off, printed": (RUNG5["none"], LAMBDA0["none"]),
        "2b differential on against off, mass": (RUNG5["mass"], LAMBDA0["mass"]),
        "3  division on against off, lambda = 0": (LAMBDA0["mass"], LAMBDA0["none"]),
        "4a convolution on against off, printed": (RUNG6["none"], RUNG5["none"]),
        "4b convolution on against off, mass": (RUNG6["mass"], RUNG5["mass"]),
        "5  DyDi-LiT against Sana, equal cost": (best, "sana"),
        "6  DyDi-LiT against DiT, equal cost": (best, "dit"),
    }


# ---- Student's t ----------------------------------------------------------------------------------------------------

def tail(t, df):
    """The chance that |T| exceeds |t|. With T = sqrt(df) tan(angle), the angle has a density like cos^(df - 1)."""
    def area(low, points=4_001):
        angle = np.linspace(low, math.pi / 2, points)
        return np.trapezoid(np.cos(angle).clip(0) ** (df - 1), angle)

    return float(area(math.atan(abs(t) / math.sqrt(df))) / area(0))


@functools.cache
def quantile(df, level=0.95):
    """The t that |T| exceeds with a chance of 1 - level, by bisection."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, df) > 1 - level else (low, middle)
    return high


# ---- Two ways, one variance -----------------------------------------------------------------------------------------

class TwoWay:
    """Least squares of value = the variant's mean + the seed's share + a remainder.

    All remainders count towards one variance, the pooled one. values: {(variant, seed): number}; a variant may lack
    seeds. .sd is the remainders' standard deviation, .df its degrees of freedom: with V variants and S seeds,
    all there, (V - 1)(S - 1).
    """

    def __init__(self, values):
        variants, seeds = (sorted(set(names)) for names in zip(*values))
        self.column = {variant: i for i, variant in enumerate(variants)}
        design = np.zeros((len(values), len(variants) + len(seeds)))
        for line, (variant, seed) in zip(design, values):
            line[self.column[variant]] = line[len(variants) + seeds.index(seed)] = 1
        y = np.array(list(values.values()))
        self.inverse = np.linalg.pinv(design.T @ design)
        self.effects = self.inverse @ design.T @ y
        self.df = len(y) - int(np.linalg.matrix_rank(design))
        remainders = y - design @ self.effects
        self.sd = math.sqrt(remainders @ remainders / self.df)

    def difference(self, variant, base):
        """variant - base: estimate, half of the 95 % interval, and the p of no difference."""
        c = np.zeros(len(self.effects))
        c[self.column[variant]] += 1
        c[self.column[base]] -= 1
        error = self.sd * math.sqrt(c @ self.inverse @ c)
        estimate = float(c @ self.effects)
        return estimate, quantile(self.df) * error, tail(estimate / error, self.df)


def holm(p):
    """Holm's adjustment: the smallest p times their number, the next times one less, and never below the one before."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


# ---- The verdict ----------------------------------------------------------------------------------------------------

def chosen(rows, variants, seeds=SEEDS):
    """The rows of these variants and seeds."""
    return [row for row in rows if row["variant"] in variants and int(row["seed"]) in seeds]


def fits_of(rows, variants, seeds):
    """{measure: TwoWay of the rows of these variants and seeds}."""
    rows = chosen(rows, variants, seeds)
    return {name: TwoWay({(row["variant"], int(row["seed"])): value(row) for row in rows})
            for name, value in MEASURES.items()}


def compare(fits, contrasts):
    """A dictionary per contrast and measure. Less is better in both. Holm's correction runs over all of them."""
    table = []
    for asks, (variant, base) in contrasts.items():
        for name, fit in fits.items():
            estimate, half, p = fit.difference(variant, base)
            table.append(dict(asks=asks, measure=name, variant=variant, base=base, estimate=estimate, half=half, p=p))
    for line, p in zip(table, holm([line["p"] for line in table])):
        line["holm"] = p
    return table


def judge(rows):
    """Notebook 10's table of contrasts, from the rows of runs.csv."""
    fits = fits_of(rows, VARIANTS, SEEDS)
    best = min(RUNG6.values(), key=lambda variant: fits["KID"].effects[fits["KID"].column[variant]])
    return compare(fits, contrasts(best))


def judge_neighbours(rows):
    """Notebook 11's: DyDi-LiT against each neighbour."""
    return compare(fits_of(rows, BESIDE, BESIDE_SEEDS), {f"DyDi-LiT against {name}": (OURS, name) for name in NEIGHBOURS})


def printed_is_worse(table):
    """Whether contrast 1 says, after Holm, that Eq. 8 as printed is worse than `mass` on either measure."""
    return any(line["holm"] < 0.05 and line["estimate"] > 0 for line in table if line["asks"].startswith("1 "))


def percent(log_ratio):
    return 100 * math.expm1(log_ratio)


def complete(rows, variants, seeds):
    """Prints which runs there are. Whether they are all there."""
    rows = chosen(rows, variants, seeds)
    print(f"{len(rows)} of {len(variants) * len(seeds)} runs, commit " + ", ".join(sorted({row["commit"] for row in rows})))
    missing = [variant for variant in variants if sum(row["variant"] == variant for row in rows) < len(seeds)]
    if missing:
        print(textwrap.fill("The table would be premature, runs are missing: " + ", ".join(missing), 100))
    return not missing


def print_table(table):
    """Prints the contrasts in percent."""
    print(f"{'contrast':43}{'measure':15}{'change':>8}{'95 % interval':>20}{'Holm p':>9}")
    for line in table:
        low, high = (percent(line["estimate"] + side * line["half"]) for side in (-1, 1))
        interval = f"{low:+.1f} to {high:+.1f} %"
        print(f"{line['asks']:43}{line['measure']:15}{percent(line['estimate']):+6.1f} %{interval:>20}{line['holm']:9.3f}")


def print_levels(rows, blocks, names=NAMES, seeds=SEEDS):
    """Prints what else was measured, means over the runs of a variant and, in the last two columns, over their blocks.

    names: what to call each variant. A column that has no numbers is left out."""
    columns = {"error": ("held_out_loss", "8.4f"), "KID": ("cfg2_KID", "6.2f"), "FID": ("cfg2_FID", "7.1f"),
               "precision": ("cfg2_precision", "10.2f"), "recall": ("cfg2_recall", "7.2f"),
               "FID cfg 1": ("cfg1_FID", "10.1f"), "FID cfg 4": ("cfg4_FID", "10.1f"),
               "row variance": ("row_variance", "13.2f"), "|λQ'|/|Q|": ("subtracted_q", "10.3f")}
    lines = [*rows, *blocks]
    columns = {name: (column, form) for name, (column, form) in columns.items() if any(line.get(column) for line in lines)}
    print(" " * 18 + "".join(f"{name:>{form.split('.')[0]}}" for name, (_, form) in columns.items()))
    for variant, name in names.items():
        mine = chosen(lines, [variant], seeds)
        found = {column: [float(row[column]) for row in mine if row.get(column)] for column, _ in columns.values()}
        print(f"{name:18}" + "".join(f"{sum(found[c]) / len(found[c]):{form}}" for c, form in columns.values() if found[c]))


def print_bands(rows, bases=(RUNG6["mass"], "sana", "dit"), names=NAMES, seeds=SEEDS):
    """Prints the change of the held-out loss from a base to DyDi-LiT as it is by default, for each band of timesteps."""
    bands = sorted(name for name in rows[0] if name.startswith("log_band"))
    print("timesteps from      " + "".join(f"{1000 // len(bands) * i:>7}" for i in range(len(bands))))
    means = {variant: np.mean([[float(row[band]) for band in bands] for row in chosen(rows, [variant], seeds)], axis=0)
             for variant in (OURS, *bases)}
    for base in bases:
        print(f"to {names[base]:17}" + "".join(f"{percent(change):+5.0f} %" for change in means[OURS] - means[base]))


def print_silenced(lines, names=NAMES, seeds=SEEDS):
    """Prints what silenced.py found: by how much a variant's loss grows without its attention, mean and range of its runs."""
    print(f"{'':20}{'loss without attention':>24}{'least':>9}{'most':>10}{'output / V':>14}")
    for variant, name in names.items():
        mine = chosen(lines, [variant], seeds)
        growth = sorted(float(line["without_attention"]) - float(line["held_out_log"]) for line in mine)
        sizes = [float(line["size"]) for line in mine if line["size"]]
        print(f"{name:20}{percent(np.mean(growth)):>+22,.1f} %{percent(growth[0]):>+9,.1f}{percent(growth[-1]):>+10,.1f}"
              + (f"{np.median(sizes):>14.1e}" if sizes else ""))


def print_stability(lines):
    """Prints what the plan's stability runs found, a line per run: the loss, the largest gradient norm, the largest outputs."""
    form = "{:8}{:14}{:10}{:>5}{:>8}{:>10}{:>8}{:>23}{:>8}"
    print(form.format("Eq. 8", "model", "numbers", "steps", "loss", "gradient", "output", "output, 16,384 tokens", "finite"))
    for line in lines:
        print(form.format(*line.values()))


def show(rows):
    """Notebook 10's: which runs there are, the contrasts, and what the rule says of the default. Returns judge's table."""
    if not complete(rows, VARIANTS, SEEDS):
        return None
    print_table(table := judge(rows))
    worse = printed_is_worse(table)
    print(f"\nThe printed Eq. 8 is {'worse than' if worse else 'not shown to be worse than'} mass. "
          + ("mass stays the default." if worse else "It becomes the default if it was stable, too."))
    return table


def show_neighbours(rows):
    """Notebook 11's: which runs there are, and the contrasts. Returns judge_neighbours' table."""
    if not complete(rows, BESIDE, BESIDE_SEEDS):
        return None
    print_table(table := judge_neighbours(rows))
    return table


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def paired(a, b):
    """The paired t-test of a - b. a, b: {seed: number}; only seeds that both have count.

    Returns a dictionary with estimate, error (its standard error), df and p."""
    differences = np.array([a[seed] - b[seed] for seed in sorted(a) if seed in b])
    n = len(differences)
    if n < 2:
        raise ValueError("paired: a contrast needs two seeds or more")
    estimate, error = differences.mean(), differences.std(ddof=1) / math.sqrt(n)
    p = tail(estimate / error, n - 1) if error > 0 else float(estimate == 0)
    return dict(estimate=float(estimate), error=float(error), df=n - 1, p=p)


def interval(line, level=0.95):
    """The lower and upper bound of one of paired's results."""
    half = quantile(line["df"], level) * line["error"]
    return line["estimate"] - half, line["estimate"] + half


# ---- Recall (notebook 10) ---------------------------------------------------------------------

TASKS = dict(sharpness=16, interference=8, heterogeneity=16)    # and on how many pairs it is judged
FAMILIES = {    # contrasts as (arm, arm that it is compared with)
    "kernel": [("fixed power", "ReLU"), ("dynamic", "fixed power"), ("dynamic", "one power"),
               ("DyDiLA", "ReLU differential")],
    "projection": [("routed", "dynamic"), ("routed", "random routes"), ("DyDiLA", "one projector")],
    "differential": [("DyDiLA", "lambda 0"), ("RMS", "RMS, lambda 0"), ("DyDiLA", "adding"),
                     ("DyDiLA", "signed"), ("DyDiLA", "dynamic, equal cost")],
    "denominator": [("ReLU", "Sana")],
    "the whole": [("DyDiLA", "Sana"), ("DyDiLA", "softmax")],
}
# A part's own task, and its contrasts. The first asks whether the part helps. The others ask
# whether it is this part that helps, or only what it brings along.
PARTS = {
    "a fixed power": ("sharpness", [("fixed power", "ReLU")]),
    "routed powers": ("sharpness", [("dynamic", "fixed power"), ("dynamic", "one power")]),
    "routed Q and K": ("heterogeneity", [("routed", "dynamic"), ("routed", "random routes")]),
    "three projectors": ("heterogeneity", [("DyDiLA", "one projector")]),
    "the differential": ("interference", [("DyDiLA", "lambda 0"), ("DyDiLA", "dynamic, equal cost")]),
    "no denominator": ("sharpness", [("ReLU", "Sana")]),
}


def logit(accuracy):
    """Accuracies are cut to .01 and .99. Beyond, a logit says how many queries were asked."""
    p = min(max(accuracy, 0.01), 0.99)
    return math.log(p / (1 - p))


def by_seed(rows, task, arm, measure=None, seeds=range(20)):
    """{seed: the accuracy's logit} of an arm, or what measure(row) makes of each row."""
    measure = measure or (lambda row: logit(float(row[f"accuracy_{TASKS[task]}"])))
    return {int(row["seed"]): measure(row) for row in rows
            if (row["task"], row["arm"]) == (task, arm) and int(row["seed"]) in seeds}


def margin(rows, task):
    """A tenth of the gap between the better softmax and ReLU: what counts as a difference."""
    means = [np.mean(list(by_seed(rows, task, arm).values()))
             for arm in ("softmax", "softmax, 4 heads", "ReLU")]
    return (max(means[:2]) - means[2]) / 10


def recall_contrasts(rows, measure=None):
    """A dictionary per contrast and task, as paired makes it. Holm's correction is per family."""
    table = []
    for family, pairs in FAMILIES.items():
        lines = [dict(family=family, arm=arm, base=base, task=task,
                      **paired(*(by_seed(rows, task, name, measure) for name in (arm, base))))
                 for arm, base in pairs for task in TASKS]
        for line, p in zip(lines, holm([line["p"] for line in lines])):
            table.append(line | dict(holm=p))
    return table


def judge_recall(rows):
    """What the rule says of each part: {part: "useful", "useless here" or "undecided"}.

    useful: on the part's own task, the 95 % intervals of all its contrasts lie above the margin,
    and on no task does its first contrast's estimate lie below minus the margin. useless here: the
    90 % intervals of its first contrast lie within the margin on all tasks."""
    table = {(line["arm"], line["base"], line["task"]): line for line in recall_contrasts(rows)}
    delta, words = {task: margin(rows, task) for task in TASKS}, {}
    for part, (own, pairs) in PARTS.items():
        first = {task: table[(*pairs[0], task)] for task in TASKS}
        low = min(interval(table[(*pair, own)])[0] for pair in pairs)
        if low > delta[own] and all(first[t]["estimate"] >= -delta[t] for t in TASKS):
            words[part] = "useful"
        elif all(max(map(abs, interval(first[t], 0.90))) < delta[t] for t in TASKS):
            words[part] = "useless here"
        else:
            words[part] = "undecided"
    return words


def pairs_at_half(row):
    """The logarithm to base 2 of the number of pairs at which a model's accuracy falls to a half.

    It is read off straight lines between the measured numbers, and cut to 2 and 64 pairs."""
    numbers = sorted(int(name.split("_")[1]) for name in row if name.startswith("accuracy_"))
    values = [float(row[f"accuracy_{n}"]) for n in numbers]
    for (n, high), (m, low) in zip(zip(numbers, values), zip(numbers[1:], values[1:])):
        if high >= 0.5 > low:
            return math.log2(n) + (high - 0.5) / (high - low) * math.log2(m / n)
    return math.log2(numbers[-1] if values[-1] >= 0.5 else numbers[0])


def trainable(rows, task, arm):
    """Whether half of an arm's seeds or more reach twice the accuracy of chance, which is 1/16."""
    reached = by_seed(rows, task, arm, lambda row: float(row[f"accuracy_{TASKS[task]}"]) > 2 / 16)
    return sum(reached.values()) >= len(reached) / 2


def print_contrasts(table, unit="", scale=1.0):
    print(f"{'family':13}{'contrast':32}{'task':14}{'change':>9}{'95 % interval':>19}{'Holm p':>9}")
    for line in table:
        low, high = (f"{scale * bound:+.2f}" for bound in interval(line))
        print(f"{line['family']:13}{line['arm'] + ' - ' + line['base']:32}{line['task']:14}"
              f"{scale * line['estimate']:+9.2f}{f'{low} to {high}':>19}{line['holm']:9.3f}{unit}")


def print_recall(rows):
    """Prints accuracies, contrasts of their logits, and what the rule says."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    print(f"{'mean accuracy (least, most)':28}" + "".join(f"{task:>22}" for task in TASKS))
    for arm in arms:
        cells = []
        for task, n in TASKS.items():
            found = list(by_seed(rows, task, arm, lambda row: float(row[f"accuracy_{n}"])).values())
            cells.append(f"{np.mean(found):.3f} ({min(found):.3f}, {max(found):.3f})")
        print(f"{arm:28}" + "".join(f"{cell:>22}" for cell in cells))
    print("\nmargin, in logits: " + ", ".join(f"{t} {margin(rows, t):.2f}" for t in TASKS) + "\n")
    print_contrasts(recall_contrasts(rows))
    print()
    for part, word in judge_recall(rows).items():
        print(f"{part}: {word}")
    for task in TASKS:
        dead = [arm for arm in arms if arm != "no attention" and not trainable(rows, task, arm)]
        if dead:
            print(f"not trainable on {task}: {', '.join(dead)}")

TWINS = [("dynamic", "Sana"), ("DyDiLA", "lambda 0"), ("DyDiLA", "dynamic"), ("DyDiLA", "Sana"),
         ("DyDiLA", "DyDiLA without convolution"), ("DyDiLA", "DiT")]


def twins_contrasts(rows):
    """A dictionary per contrast of the twins' scores. Holm's correction over all."""
    scores = {arm: {int(row["seed"]): float(row["score"]) for row in rows if row["arm"] == arm}
              for arm in dict.fromkeys(row["arm"] for row in rows)}
    table = [dict(family="twins", arm=arm, base=base, task="score",
                  **paired(scores[arm], scores[base])) for arm, base in TWINS]
    return [line | dict(holm=p) for line, p in zip(table, holm([line["p"] for line in table]))]


if __name__ == "__main__":
    if sys.argv[1:2] == ["recall"]:
        sys.exit(print_recall(read(sys.argv[2])))
    *which, path = sys.argv[1:] or [""]
    if which not in ([], ["neighbours"]) or not path:
        sys.exit(__doc__)
    (show_neighbours if which else show)(read(path))
