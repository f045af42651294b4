"""The runs of notebook 10's experiment, and of notebook 11's systems on recall.

    python notebooks/lab/experiment.py pilot        three learning rates for each arm, two seeds
    python notebooks/lab/experiment.py main         then twenty fresh seeds, each at its best rate
    python notebooks/lab/experiment.py twins        eight seeds of the systems of twins.py
    python notebooks/lab/experiment.py neighbours   notebook 11's, pilot and five seeds
    python notebooks/lab/verdict.py                 prints what came out

Each run adds a line to runs.csv or twins.csv in notebooks/results/recall, and one that is there
already is not made again. With --part 0 2 and --part 1 2, two processes share the work.
"""
import argparse
import pathlib
import sys
import time

import numpy as np
import torch

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
from lab import gate, ladder, recall, twins  # noqa: E402
from lab.neighbours import NEIGHBOURS  # noqa: E402

RESULTS = pathlib.Path(__file__).parents[1] / "results/recall"
RATES, PILOT_SEEDS, SEEDS = (0.003, 0.01, 0.03), (100, 101), range(20)
PAIRS = (2, 4, 8, 16, 32, 64)               # a trained model is measured on sets of these sizes


def best_rate(lines, task, arm):
    """The rate with the best mean accuracy of the pilot seeds."""
    found = {rate: [float(line[f"accuracy_{recall.PAIRS[task]}"]) for line in lines
                    if (line["task"], line["arm"], float(line["rate"])) == (task, arm, rate)
                    and int(line["seed"]) in PILOT_SEEDS] for rate in RATES}
    if any(len(accuracies) < len(PILOT_SEEDS) for accuracies in found.values()):
        sys.exit(f"experiment.py: {arm} lacks pilot runs on {task}; run the pilot first")
    return max(found, key=lambda rate: sum(found[rate]))


def run_recall(task, arm, seed, rate):
    start = time.time()
    model = recall.train_model(task, arm, seed, rate)
    line = dict(task=task, arm=arm, seed=seed, rate=rate, commit=ladder.commit())
    seconds, sizes = time.time() - start, PAIRS
    if arm in NEIGHBOURS:
        sizes = (2, 8, 32)                                  # their tokens must form a square
    line |= {f"accuracy_{n}": round(recall.accuracy(model, task, seed, n), 6) if n in sizes else ""
             for n in PAIRS}
    line |= dict(on_target=recall.weight_on_target(model, task, seed), seconds=round(seconds, 1))
    gate.add_lines(RESULTS / "runs.csv", [line])


def run_twins(arm, seed):
    start = time.time()
    denoiser = twins.train_model(arm, seed)
    seconds, pictures = time.time() - start, twins.sample(denoiser)
    gate.add_lines(RESULTS / "twins.csv", [dict(
        arm=arm, seed=seed, commit=ladder.commit(), score=twins.score(denoiser, seed),
        agreement=twins.agreement(pictures), seconds=round(seconds, 1))])
    if seed == 0:
        np.save(RESULTS / f"twins-{arm.replace(' ', '-')}.npy", pictures[:6].numpy())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["pilot", "main", "twins", "neighbours"])
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    arms = [arm for arm in recall.ARMS if arm not in NEIGHBOURS]

    def undone(jobs, table, *keys):
        done = {tuple(line[key] for key in keys) for line in ladder.read(RESULTS / table)}
        return [job for job in jobs[args.part[0]::args.part[1]] if tuple(map(str, job)) not in done]

    if args.stage == "twins":
        for job in undone([(arm, seed) for seed in range(8) for arm in twins.ARMS],
                          "twins.csv", "arm", "seed"):
            run_twins(*job)
        return
    tasks, seeds = recall.PAIRS, SEEDS
    if args.stage == "neighbours":
        arms, tasks, seeds = list(NEIGHBOURS), ["interference"], SEEDS[:5]
    keys = ("task", "arm", "seed", "rate")
    if args.stage in ("pilot", "neighbours"):
        for job in undone([(task, arm, seed, rate) for seed in PILOT_SEEDS for task in tasks
                           for arm in arms for rate in RATES], "runs.csv", *keys):
            run_recall(*job)
    if args.stage in ("main", "neighbours"):
        lines = ladder.read(RESULTS / "runs.csv")
        for job in undone([(task, arm, seed, best_rate(lines, task, arm)) for seed in seeds
                           for task in tasks for arm in arms], "runs.csv", *keys):
            run_recall(*job)


if __name__ == "__main__":
    main()
