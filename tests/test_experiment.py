"""The experiments of lessons 11, 12 and A: the runs, and the analysis against numbers by hand."""
import math
from itertools import product

import pytest

from lab import experiment, measures, recall
from lab.neighbours import NEIGHBOURS

S, I, H = experiment.TASKS                  # sharpness, interference, heterogeneity


def test_the_stages_make_the_runs_of_the_plan(monkeypatch, tmp_path):
    def run(task, arm, seed, rate):
        best = rate == (0.03 if arm == "ReLU" else 0.01)
        accuracies = {f"accuracy_{n}": int(best) for n in experiment.SIZES}
        return dict(task=task, arm=arm, seed=seed, rate=rate, **accuracies)

    def made(*argv, table="runs"):
        monkeypatch.setattr("sys.argv", ["experiment.py", *argv])
        experiment.main()
        return measures.read(tmp_path / f"recall/{table}.csv")
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    monkeypatch.setattr(experiment, "run_recall", run)
    monkeypatch.setattr(experiment, "run_twins", lambda arm, seed: dict(arm=arm, seed=seed))
    assert len(made("pilot", "--part", "0", "2")) == 19 * 3 * 3         # of each rate one seed
    for argv, says in (["main"], "no attention lacks pilot runs on sharpness"), (
            ["pilot", "--part", "2", "2"], "--part 2 2: the first must be less than the second"):
        with pytest.raises(SystemExit, match=says):
            made(*argv)
    rows = made("pilot", "--part", "1", "2")
    jobs = product(("100", "101"), ("0.003", "0.01", "0.03"))
    assert len(rows) == 19 * 3 * 6 and {(row["seed"], row["rate"]) for row in rows} == {*jobs}
    rows = made("main")[len(rows):]
    assert len(rows) == 19 * 3 * 20 and {int(row["seed"]) for row in rows} == set(range(20))
    assert all((row["rate"] == "0.03") == (row["arm"] == "ReLU") for row in rows)
    beside = [(row["arm"], row["task"]) for row in made("neighbours")[19 * 3 * 26:]]
    assert sorted(beside) == sorted([(arm, I) for arm in NEIGHBOURS] * (2 * 3 + 5))
    assert made("main") == made("neighbours")               # nothing is made twice
    rows = made("pilot") + [rows[0] | dict(arm="ReLU", rate="0.01", accuracy_16="99")]
    assert experiment.best_rate(rows, "sharpness", "ReLU") == 0.03      # fresh seeds have no say
    assert len(made("twins", table="twins")) == 7 * 8 == len(made("twins", table="twins"))


def test_a_run_is_measured_on_all_sizes(monkeypatch):
    monkeypatch.setattr(recall, "train_model", lambda *job: recall.Model(job[1], job[2]))
    line, model = experiment.run_recall("interference", "softmax", 3, 1), recall.Model("softmax", 3)
    accuracies = {f"accuracy_{n}": round(recall.accuracy(model, "interference", 3, n), 6)
                  for n in (2, 4, 8, 16, 32, 64)}
    assert accuracies.items() <= line.items()
    assert line["on_target"] == recall.weight_on_target(model, "interference", 3)


@pytest.mark.parametrize("df, t", [(1, 12.7062), (2, 4.3027), (4, 2.7764), (19, 2.0930)])
def test_tails_and_quantiles_of_student_s_t_are_those_of_the_tables(df, t):
    assert experiment.quantile(df) == pytest.approx(t, abs=1e-4)
    assert experiment.tail(-t, df) == experiment.tail(t, df) == pytest.approx(0.05, rel=1e-4)


def test_the_paired_t_test_and_holm_by_hand():
    # Differences 1, 0.5 and 2.5 have mean 4/3 and variance 13/12. Seeds 8 and 9 have no partner.
    line = experiment.paired({1: 2.0, 2: 3.5, 3: 4.5, 8: 0.0}, {9: 7.0, 3: 2.0, 2: 3.0, 1: 1.0})
    error = math.sqrt(13 / 12 / 3)
    p = 1 - (4 / 3 / error) / math.sqrt(2 + (4 / 3 / error) ** 2)
    assert line == pytest.approx(dict(estimate=4 / 3, error=error, df=2, p=p), rel=1e-4)
    bounds = 4 / 3 - 4.3027 * error, 4 / 3 + 4.3027 * error
    assert experiment.interval(line) == pytest.approx(bounds, rel=1e-4)
    with pytest.raises(ValueError, match="two seeds"):
        experiment.paired({1: 1.0, 2: 2.0}, {1: 1.0, 3: 2.0})
    assert experiment.paired({1: 1.0, 2: 2.0}, {1: 0.0, 2: 1.0})["p"] == 0
    assert experiment.paired({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0})["p"] == 1
    # Holm: in order .01 x 4, .02 x 3, .03 x 2, .04 x 1; each at least the one before.
    assert experiment.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert experiment.holm([0.6, 0.7]) == [1, 1]


def recall_rows(*gains):
    """Twenty seeds of every arm, softmax at .99. gains: (task, arm, of its logits, by seed)."""
    rows, gains = [], {(task, arm): gain for task, arm, *gain in gains}
    for arm, (task, n), seed in product(recall.ARMS, experiment.TASKS.items(), range(21)):
        gain, spread = (*gains.get((task, arm), [0]), 0)[:2]
        logit = 0.1 * seed + 0.02 * math.sin(7 * len(arm) + 3 * seed)
        logit = (math.log(99) if arm == "softmax" else logit) + gain + spread * (-1) ** seed
        accuracy = 1 / (1 + math.exp(-logit)) if seed < 20 else 0.01        # a pilot's seed
        rows.append(dict(arm=arm, task=task, seed=str(seed)) | {f"accuracy_{n}": str(accuracy)})
    return rows


def test_margin_is_a_tenth_of_the_better_softmax_minus_relu():
    rows = recall_rows((S, "softmax", -9), (S, "softmax, 4 heads", 2))
    assert experiment.margin(rows, S) == pytest.approx(0.2, abs=0.01)
    for accuracy, cut in (0.75, 0.75), (1, 0.99), (0, 0.01):
        assert experiment.logit(accuracy) == pytest.approx(math.log(cut / (1 - cut)))


def test_holm_corrects_within_a_family():
    table = experiment.recall_contrasts(recall_rows((S, "signed", -1)))
    for family, number in dict(kernel=4, projection=3, differential=5, denominator=1).items():
        lines = [line for line in table if line["family"] == family]
        least = min(lines, key=lambda line: line["p"])
        assert least["holm"] == min(1, 3 * number * least["p"])


@pytest.mark.parametrize("part, word, gains", [
    ("a fixed power", "useful", [(S, "fixed power", 1)]),
    ("routed Q and K", "useful", [(H, "routed", 1)]),
    ("three projectors", "useful", [(H, "DyDiLA", 1)]),
    ("the differential", "useful", [(I, "DyDiLA", 1)]),
    ("the differential", "undecided", [(I, "DyDiLA", -1)]),
    ("the differential", "undecided", [(I, "DyDiLA", 1), (S, "DyDiLA", -1)]),
    ("the differential", "undecided", [(I, "DyDiLA", 1), (I, "dynamic, equal cost", 1)]),
    ("the differential", "undecided", [(S, "DyDiLA", 0.4)]),        # the margin is .36
    ("the differential", "useless here", [(I, "DyDiLA", 0.3)]),
    ("the differential", "useless here", [(I, "DyDiLA", 0, 0.83)]),     # 90 % in .33, 95 % in .40
    ("the differential", "undecided", [(I, "DyDiLA", 0.75, 0.83)])])    # 90 % > .42, 95 % > .35
def test_the_rule_s_words(part, word, gains):
    words = experiment.judge_recall(recall_rows(*gains))
    assert words.pop(part) == word and "useless here" in words.values()


def test_an_arm_is_trainable_where_half_of_its_seeds_reach_twice_chance():
    rows = recall_rows((S, "signed", -3.2), (I, "ReLU", -2.9))      # 7 and 11 of 20 reach 1/8
    found = {(t, arm) for t in experiment.TASKS for arm in experiment.arms_of(rows)
             if not experiment.trainable(rows, t, arm)}
    assert found == {(S, "signed")}


def test_pairs_at_half_are_read_off_straight_lines():
    row = dict(arm="x", accuracy_2="0.9", accuracy_4="0.75", accuracy_8="0.25", accuracy_64="0.2")
    assert experiment.pairs_at_half(row) == pytest.approx(2.5)


def test_the_twins_contrasts_are_paired_by_seed():
    arms = sorted({*sum(experiment.TWINS, ())})
    rows = [dict(arm=arm, seed=str(seed), score=str(i + seed + 0.1 * math.sin(i * seed)))
            for i, arm in enumerate(arms) for seed in range(8)]
    for line in experiment.twins_contrasts(rows):
        change = arms.index(line["arm"]) - arms.index(line["base"])
        assert line["estimate"] == pytest.approx(change, abs=0.1) and line["holm"] < 0.01


def test_the_contrasts_of_the_eighty_runs():
    rows = []       # DiT is worse by a half, all else the same
    for (i, variant), seed in product(enumerate(experiment.VARIANTS), range(100, 111)):
        log = 0.03 * (seed - 104) + 0.01 * math.sin(7 * i + 3 * seed) + 9 * (seed == 110)
        log += math.log(1.5 if variant == "dit" else 1)
        rows.append(dict(variant=variant, seed=str(seed), cfg2_KID=str(math.exp(log)),
                         held_out_log=str(log)))
    for line in experiment.compare(rows, experiment.PLANNED):
        found, want = line["estimate"], -math.log(1.5) * (line["base"] == "dit")
        assert found == pytest.approx(want, abs=0.02) and (line["holm"] < 1e-3) == bool(want)
        assert line["df"] == 9
    assert experiment.percent(math.log(1.5)) == "+50.0 %"
