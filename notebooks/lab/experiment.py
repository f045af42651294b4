"""The experiments of lessons 11, 12 and A: the runs on recall, and the analysis of all.

    python notebooks/lab/experiment.py pilot        recall: three rates for each arm, two seeds
    python notebooks/lab/experiment.py main         then twenty fresh seeds, each at its best rate
    python notebooks/lab/experiment.py twins        eight seeds of the systems of twins.py
    python notebooks/lab/experiment.py neighbours   lesson 12's systems: pilot, then five seeds

Each run adds a line to runs.csv or twins.csv in notebooks/results/recall, and one that is there
already is not made again. With --part 0 2 and --part 1 2, two processes share the work. The eighty
runs of appendix A are made by ladder.py.

Contrasts, measures and rule were fixed before the runs. Runs are paired by their seeds, and each
contrast has the variance of its own differences.
"""
import argparse
import functools
import math
import pathlib
import sys
import time

import numpy as np
import torch

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
from lab import measures, recall, twins  # noqa: E402
from lab.measures import make, read  # noqa: E402
from lab.neighbours import NEIGHBOURS  # noqa: E402
from lab.recall import ARMS, PAIRS as TASKS  # noqa: E402

RESULTS = pathlib.Path(__file__).parents[1] / "results"
RATES, PILOT_SEEDS, FRESH_SEEDS = (0.003, 0.01, 0.03), (100, 101), range(20)
SIZES = (2, 4, 8, 16, 32, 64)               # pairs of the sets on which a model is measured


# ---- The runs ---------------------------------------------------------------------------------

def best_rate(rows, task, arm):
    """The rate with the best mean accuracy of the pilot's seeds."""
    found = {rate: by_seed([row for row in rows if float(row["rate"]) == rate], task, arm,
                           accuracy_of(task), PILOT_SEEDS) for rate in RATES}
    if any(len(accuracies) < len(PILOT_SEEDS) for accuracies in found.values()):
        sys.exit(f"experiment.py: {arm} lacks pilot runs on {task}; run the pilot first")
    return max(found, key=lambda rate: sum(found[rate].values()))


def run_recall(task, arm, seed, rate):
    """Trains an arm on a task. Returns its line of runs.csv."""
    start = time.time()
    model = recall.train_model(task, arm, seed, rate)
    line = dict(task=task, arm=arm, seed=seed, rate=rate, commit=measures.commit())
    seconds = round(time.time() - start, 1)
    for n in SIZES:                         # a neighbour's tokens must form a square
        fits = arm not in NEIGHBOURS or n in (2, 8, 32)
        line[f"accuracy_{n}"] = round(recall.accuracy(model, task, seed, n), 6) if fits else ""
    return line | dict(on_target=recall.weight_on_target(model, task, seed), seconds=seconds)


def run_twins(arm, seed):
    """Trains a system on twins. Returns its line of twins.csv, and keeps samples of the first."""
    start = time.time()
    denoiser = twins.train_model(arm, seed)
    seconds, pictures = round(time.time() - start, 1), twins.sample(denoiser)
    if seed == 0:
        np.save(RESULTS / f"recall/twins-{arm.replace(' ', '-')}.npy", pictures[:6].numpy())
    return dict(arm=arm, seed=seed, commit=measures.commit(), score=twins.score(denoiser, seed),
                seconds=seconds)


# ---- Statistics -------------------------------------------------------------------------------

def tail(t, df):
    """The chance that |T| exceeds |t|.

    With T = sqrt(df) tan(angle), the angle has a density like cos^(df - 1)."""
    def area(low):
        angle = np.linspace(low, math.pi / 2, 4_001)
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


def holm(p):
    """Holm's adjustment of a family of p values.

    The smallest p times their number, the next times one less, and never below the one before."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def contrasts(cases):
    """A dictionary per contrast: its fields, what `paired` finds, and Holm's p over all cases.

    cases: [(fields, {seed: number}, {seed: number} of what it is compared with)]."""
    lines = [fields | paired(a, b) for fields, a, b in cases]
    return [line | dict(holm=p) for line, p in zip(lines, holm([line["p"] for line in lines]))]


# ---- Recall and twins (lesson 11) -------------------------------------------------------------

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
    "the differential": ("interference", [("DyDiLA", "lambda 0"),
                                          ("DyDiLA", "dynamic, equal cost")]),
    "no denominator": ("sharpness", [("ReLU", "Sana")]),
}


def logit(accuracy):
    """Accuracies are cut to .01 and .99. Beyond, a logit says how many queries were asked."""
    p = min(max(accuracy, 0.01), 0.99)
    return math.log(p / (1 - p))


def accuracy_of(task):
    """What reads a row's accuracy on sets as those that were trained on."""
    return lambda row: float(row[f"accuracy_{TASKS[task]}"])


def by_seed(rows, task, arm, measure=None, seeds=FRESH_SEEDS):
    """{seed: the accuracy's logit} of an arm, or what measure(row) makes of each row."""
    measure = measure or (lambda row: logit(accuracy_of(task)(row)))
    found = {int(row["seed"]): measure(row) for row in rows
             if (row["task"], row["arm"]) == (task, arm) and int(row["seed"]) in seeds}
    return dict(sorted(found.items()))


def arms_of(rows):
    """The arms that have runs on all tasks, in recall.py's order."""
    return [arm for arm in ARMS if all(by_seed(rows, task, arm) for task in TASKS)]


def margin(rows, task):
    """A tenth of the gap between the better softmax and ReLU: what counts as a difference."""
    means = [np.mean(list(by_seed(rows, task, arm).values()))
             for arm in ("softmax", "softmax, 4 heads", "ReLU")]
    return (max(means[:2]) - means[2]) / 10


def recall_contrasts(rows):
    """`contrasts` of all arms of FAMILIES on all tasks. Holm's correction is per family."""
    return [line for family, pairs in FAMILIES.items() for line in contrasts([
        (dict(family=family, arm=arm, base=base, task=task),
         by_seed(rows, task, arm), by_seed(rows, task, base))
        for arm, base in pairs for task in TASKS])]


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
    falling = [-float(row[f"accuracy_{n}"]) for n in numbers]
    return float(np.interp(-0.5, falling, np.log2(numbers)))


def trainable(rows, task, arm):
    """Whether half of an arm's seeds or more reach twice the accuracy of chance, which is 1/16."""
    found = by_seed(rows, task, arm, accuracy_of(task)).values()
    return np.mean([accuracy > 2 / 16 for accuracy in found]) >= 1 / 2


def print_contrasts(table, show="{:+.2f}".format):
    """Prints a line per contrast. show: how a number is written."""
    print(f"{'contrast':43}{'of':15}{'change':>9}{'95 % interval':>21}{'Holm p':>8}")
    for line in table:
        asks = line.get("asks") or f"{line['arm']} - {line['base']}"
        of, bounds = line.get("measure") or line["task"], " to ".join(map(show, interval(line)))
        print(f"{asks:43}{of:15}{show(line['estimate']):>9}{bounds:>21}{line['holm']:8.3f}")


TWINS = [("dynamic", "Sana"), ("DyDiLA", "lambda 0"), ("DyDiLA", "dynamic"), ("DyDiLA", "Sana"),
         ("DyDiLA", "DyDiLA without convolution"), ("DyDiLA", "DiT")]


def twins_contrasts(rows):
    """`contrasts` of the twins' scores."""
    def scores(arm):
        return {int(row["seed"]): float(row["score"]) for row in rows if row["arm"] == arm}
    return contrasts([(dict(family="twins", arm=arm, base=base, task="score"),
                       scores(arm), scores(base)) for arm, base in TWINS])


# ---- The eighty runs and the neighbours (lessons A and 12) ------------------------------------

LAMBDA0 = {n: f"lambda0:normalizer={n}" for n in ("none", "mass")}      # rung 5, lambda held at 0
RUNG5 = {n: f"rung5:normalizer={n}" for n in ("none", "mass")}          # with the differential
RUNG6 = {n: f"rung6:normalizer={n}" for n in ("none", "mass")}          # and with the convolution
VARIANTS = [*LAMBDA0.values(), *RUNG5.values(), *RUNG6.values(), "sana", "dit"]
NAMES = dict(zip(VARIANTS, ["λ = 0, printed", "λ = 0, mass", "rung 5, printed", "rung 5, mass",
                            "DyDi-LiT, printed", "DyDi-LiT, mass", "Sana", "DiT"]))
SEEDS, NEIGHBOUR_SEEDS = range(100, 110), range(100, 105)
# Logarithms, so that a difference is a ratio. held_out_log is a mean logarithm already.
MEASURES = {"KID": lambda row: math.log(float(row["cfg2_KID"])),
            "held-out loss": lambda row: float(row["held_out_log"])}
PLANNED = {
    "1  printed Eq. 8 against mass, full model": (RUNG6["none"], RUNG6["mass"]),
    "2a differential on against off, printed": (RUNG5["none"], LAMBDA0["none"]),
    "2b differential on against off, mass": (RUNG5["mass"], LAMBDA0["mass"]),
    "3  division on against off, lambda = 0": (LAMBDA0["mass"], LAMBDA0["none"]),
    "4a convolution on against off, printed": (RUNG6["none"], RUNG5["none"]),
    "4b convolution on against off, mass": (RUNG6["mass"], RUNG5["mass"]),
    "5  printed DyDi-LiT against Sana": (RUNG6["none"], "sana"),
    "6  printed DyDi-LiT against DiT": (RUNG6["none"], "dit"),
}


def percent(log_ratio):
    return f"{100 * math.expm1(log_ratio):+.1f} %"


def chosen(rows, variants, seeds=SEEDS):
    """The rows of these variants and seeds."""
    return [row for row in rows if row["variant"] in variants and int(row["seed"]) in seeds]


def compare(rows, pairs, seeds=SEEDS):
    """`contrasts` of pairs of variants, in each of MEASURES. pairs: {what it asks: a pair}."""
    def values(variant, measure):
        return {int(row["seed"]): measure(row) for row in chosen(rows, [variant], seeds)}
    return contrasts([(dict(asks=asks, measure=name, variant=variant, base=base),
                       values(variant, measure), values(base, measure))
                      for asks, (variant, base) in pairs.items()
                      for name, measure in MEASURES.items()])


# ---- The command ------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["pilot", "main", "twins", "neighbours"])
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.stage == "twins":
        jobs = [(arm, seed) for seed in range(8) for arm in twins.ARMS]
        return make(run_twins, jobs, RESULTS / "recall/twins.csv", args.part)
    arms, tasks, seeds = [arm for arm in ARMS if arm not in NEIGHBOURS], TASKS, FRESH_SEEDS
    if args.stage == "neighbours":
        arms, tasks, seeds = NEIGHBOURS, ["interference"], FRESH_SEEDS[:5]
    table = RESULTS / "recall/runs.csv"
    if args.stage != "main":
        make(run_recall, [(task, arm, seed, rate) for seed in PILOT_SEEDS for task in tasks
                          for arm in arms for rate in RATES], table, args.part)
    if args.stage != "pilot":
        rows = read(table)
        rates = {(task, arm): best_rate(rows, task, arm) for task in tasks for arm in arms}
        make(run_recall, [(task, arm, seed, rate) for seed in seeds
                          for (task, arm), rate in rates.items()], table, args.part)


if __name__ == "__main__":
    main()
