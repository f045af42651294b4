"""The experiments of lessons 11, 12 and A: the runs, and the analysis against numbers by hand."""
import math

import numpy as np
import pytest

from lab import experiment, measures, recall
from lab.neighbours import NEIGHBOURS


# ---- The runs ---------------------------------------------------------------------------------

@pytest.fixture
def made(monkeypatch, tmp_path):
    """Calls experiment.py, whose runs only write their lines. Returns its two tables."""
    def run(task, arm, seed, rate):         # ReLU does best at .03, all others at .01
        accuracy = 1 - abs(math.log(rate / (0.03 if arm == "ReLU" else 0.01))) / 2
        accuracies = {f"accuracy_{n}": accuracy for n in experiment.SIZES}
        return dict(task=task, arm=arm, seed=seed, rate=rate, **accuracies)

    def call(*argv):
        monkeypatch.setattr("sys.argv", ["experiment.py", *argv])
        experiment.main()
        return [measures.read(tmp_path / f"recall/{name}.csv") for name in ("runs", "twins")]
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    monkeypatch.setattr(experiment, "run_recall", run)
    monkeypatch.setattr(experiment, "run_twins", lambda arm, seed: dict(arm=arm, seed=seed))
    return call


def test_the_stages_make_the_runs_of_the_plan(made):
    assert len(made("pilot", "--part", "0", "2")[0]) == 19 * 3 * 3      # of each rate one seed
    with pytest.raises(SystemExit, match="no attention lacks pilot runs on sharpness"):
        made("main")
    rows, _ = made("pilot", "--part", "1", "2")
    assert len(rows) == 19 * 3 * 2 * 3 and {row["seed"] for row in rows} == {"100", "101"}
    assert {row["rate"] for row in rows} == {"0.003", "0.01", "0.03"}
    rows = made("main")[0][len(rows):]
    assert len(rows) == 19 * 3 * 20 and {int(row["seed"]) for row in rows} == set(range(20))
    assert all((row["rate"] == "0.03") == (row["arm"] == "ReLU") for row in rows)
    beside = made("neighbours")[0][19 * 3 * 26:]
    assert {row["arm"] for row in beside} == set(NEIGHBOURS) and len(beside) == 5 * (2 * 3 + 5)
    assert {row["task"] for row in beside} == {"interference"}
    assert made("main")[0] == made("neighbours")[0]         # nothing is made twice
    rows = made("pilot")[0] + [rows[0] | dict(arm="ReLU", rate="0.01", accuracy_16="99")]
    assert experiment.best_rate(rows, "sharpness", "ReLU") == 0.03      # fresh seeds have no say
    _, rows = made("twins")
    assert len(rows) == 7 * 8 == len(made("twins")[1])


def test_a_run_is_measured_on_all_sizes(monkeypatch):
    monkeypatch.setattr(recall, "train_model", lambda *job: recall.Model(job[1], job[2]))
    line, model = experiment.run_recall("interference", "softmax", 3, 1), recall.Model("softmax", 3)
    for n in (2, 4, 8, 16, 32, 64):
        accuracy = recall.accuracy(model, "interference", 3, n)
        assert line[f"accuracy_{n}"] == pytest.approx(accuracy, abs=1e-6)
    assert line["on_target"] == recall.weight_on_target(model, "interference", 3)


# ---- Statistics -------------------------------------------------------------------------------

@pytest.mark.parametrize("t", [0.3, 1.0, 4.303, 40.0])
def test_tails_of_student_s_t_in_closed_form(t):
    assert experiment.tail(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-5)
    assert experiment.tail(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-5)


@pytest.mark.parametrize("df, t", [(1, 12.7062), (2, 4.3027), (4, 2.7764), (19, 2.0930)])
def test_quantiles_are_those_of_the_tables(df, t):
    assert experiment.quantile(df) == pytest.approx(t, abs=1e-4)


def test_the_paired_t_test_by_hand():
    # Differences 1, 0.5 and 2.5 have mean 4/3 and variance 13/12. Seeds 8 and 9 have no partner.
    line = experiment.paired({1: 2.0, 2: 3.5, 3: 4.5, 8: 0.0}, {9: 7.0, 3: 2.0, 2: 3.0, 1: 1.0})
    error = math.sqrt(13 / 12 / 3)
    p = 1 - (4 / 3 / error) / math.sqrt(2 + (4 / 3 / error) ** 2)
    assert line == pytest.approx(dict(estimate=4 / 3, error=error, df=2, p=p), rel=1e-4)
    bounds = 4 / 3 - 4.3027 * error, 4 / 3 + 4.3027 * error
    assert experiment.interval(line) == pytest.approx(bounds, rel=1e-4)
    low, high = experiment.interval(line, 0.90)
    assert high - low == pytest.approx(2 * 2.9200 * error, rel=1e-4)
    with pytest.raises(ValueError, match="two seeds"):
        experiment.paired({1: 1.0, 2: 2.0}, {1: 1.0, 3: 2.0})
    assert experiment.paired({1: 1.0, 2: 2.0}, {1: 0.0, 2: 1.0})["p"] == 0
    assert experiment.paired({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0})["p"] == 1


def test_holm_by_hand():
    # In order .01 x 4, .02 x 3, .03 x 2, .04 x 1; each at least the one before.
    assert experiment.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert experiment.holm([0.6, 0.7]) == [1, 1]


# ---- Recall and twins -------------------------------------------------------------------------

def recall_rows(**shifts):
    """Twenty seeds of every arm, softmax at .99. shifts: {arm: {task: a gain by seed}}."""
    rows, pairs = [], [pair for pairs in experiment.FAMILIES.values() for pair in pairs]
    for arm in [*dict.fromkeys(sum(pairs, ())), "softmax, 4 heads"]:
        for task, n in experiment.TASKS.items():
            gain = shifts.get(arm.replace(" ", "_"), {}).get(task, lambda seed: 0)
            for seed in range(21):
                logit = 0.1 * seed + 0.02 * math.sin(7 * len(arm) + 3 * seed)
                logit = (math.log(99) if arm == "softmax" else logit) + gain(seed)
                accuracy = 1 / (1 + math.exp(-logit))
                if seed == 20:                                      # a pilot's seed, not to count
                    accuracy = 0.01
                rows.append({"arm": arm, "task": task, "seed": f"{seed}",
                             f"accuracy_{n}": f"{accuracy}"})
    return rows


def by(mean, spread=0):
    return lambda seed: mean + spread * (-1) ** seed


def test_margin_is_a_tenth_of_the_better_softmax_minus_relu():
    middle = np.mean([0.1 * seed + 0.02 * math.sin(7 * 4 + 3 * seed) for seed in range(20)])
    for task in experiment.TASKS:
        want = (math.log(99) - middle) / 10
        assert experiment.margin(recall_rows(), task) == pytest.approx(want)
        rows = recall_rows(**{"softmax": {task: by(-9)}, "softmax,_4_heads": {task: by(2)}})
        assert experiment.margin(rows, task) == pytest.approx(0.2, abs=0.01)


def test_logits_are_cut():
    assert experiment.logit(0.5) == 0 and experiment.logit(0.75) == pytest.approx(math.log(3))
    assert experiment.logit(1.0) == experiment.logit(0.99) == pytest.approx(math.log(99))
    assert experiment.logit(0.0) == pytest.approx(-math.log(99))


def test_contrasts_are_paired_and_holm_corrects_within_a_family():
    table = experiment.recall_contrasts(recall_rows(signed=dict(sharpness=by(-1))))
    assert len(table) == 3 * 15 and all(line["df"] == 19 for line in table)
    for line in table:
        found = (line["base"], line["task"]) == ("signed", "sharpness")
        if line["base"] != "softmax":
            assert line["estimate"] == pytest.approx(int(found), abs=0.05) and line["error"] < 0.01
    for family, number in dict(kernel=4, projection=3, differential=5, denominator=1).items():
        lines = [line for line in table if line["family"] == family]
        assert len(lines) == 3 * number
        least = min(lines, key=lambda line: line["p"])
        assert least["holm"] == pytest.approx(min(1, 3 * number * least["p"]))


@pytest.mark.parametrize("word, shifts", [
    ("useless here", {}),                                       # the margin is .36
    ("useful", dict(DyDiLA=dict(interference=by(1)))),
    ("undecided", dict(DyDiLA=dict(heterogeneity=by(1)))),                  # not where it should
    ("undecided", dict(DyDiLA=dict(interference=by(-1)))),
    ("undecided", dict(DyDiLA=dict(interference=by(1), sharpness=by(-1)))),     # but hurts here
    ("undecided", {name: dict(interference=by(1)) for name in ("DyDiLA", "dynamic,_equal_cost")}),
    ("useless here", dict(DyDiLA=dict(interference=by(0.3)))),
    ("useless here", dict(DyDiLA=dict(interference=by(0, 0.83)))),      # 90 % within .33, 95 % .40
    ("undecided", dict(DyDiLA=dict(interference=by(0, 1)))),            # 90 % within .40
    ("undecided", dict(DyDiLA=dict(sharpness=by(0.4)))),                # not useless everywhere
    ("undecided", dict(DyDiLA=dict(interference=by(0.75, 0.83))))])     # from 90 % .42, 95 % .35
def test_the_rule_s_words(word, shifts):
    words = experiment.judge_recall(recall_rows(**shifts))
    assert words["the differential"] == word and words["routed Q and K"] == "useless here"


@pytest.mark.parametrize("part, arm, task", [
    ("a fixed power", "fixed_power", "sharpness"), ("routed powers", "dynamic", "sharpness"),
    ("routed Q and K", "routed", "heterogeneity"), ("three projectors", "DyDiLA", "heterogeneity"),
    ("no denominator", "ReLU", "sharpness")])
def test_each_part_is_useful_on_its_own_task(part, arm, task):
    assert experiment.judge_recall(recall_rows(**{arm: {task: by(1)}}))[part] == "useful"


def test_an_arm_at_chance_is_not_trainable(capsys):
    rows = recall_rows(signed=dict(sharpness=by(-3.2)), ReLU=dict(interference=by(-2.9)))
    assert not experiment.trainable(rows, "sharpness", "signed")   # 7 of 20 reach 1/8
    assert experiment.trainable(rows, "interference", "ReLU")      # more than half reach 1/8
    experiment.print_judgement(rows)
    assert "three projectors: useless here\n" in (out := capsys.readouterr().out)
    assert out.endswith("not trainable on sharpness: signed\n")


def test_accuracies_are_printed_as_mean_least_and_most(capsys):
    experiment.print_accuracies(recall_rows())
    title, first, second, *_ = capsys.readouterr().out.splitlines()
    mean, least, most = (float(word.strip("(,)")) for word in second.split()[-3:])
    assert least == pytest.approx(0.5, abs=0.01) and least < mean < most
    assert first.split() == ["softmax", *3 * ["0.990", "(0.990,", "0.990)"]]
    assert title.split()[-3:] == ["sharpness", "interference", "heterogeneity"]


def test_pairs_at_half_are_read_off_straight_lines():
    row = dict(arm="x", accuracy_2="0.9", accuracy_4="0.75", accuracy_8="0.25", accuracy_64="0.2")
    assert experiment.pairs_at_half(row) == pytest.approx(2.5)
    assert experiment.pairs_at_half(dict(accuracy_2="0.4", accuracy_64="0.1")) == 1
    assert experiment.pairs_at_half(dict(accuracy_2="0.9", accuracy_64="0.5")) == 6


def test_the_twins_contrasts_are_paired_by_seed():
    arms = list(dict.fromkeys(sum(experiment.TWINS, ())))
    rows = [dict(arm=arm, seed=str(seed), score=str(i + seed + 0.1 * math.sin(i * seed)))
            for i, arm in enumerate(arms) for seed in range(8)]
    table = experiment.twins_contrasts(rows)
    for line, (arm, base) in zip(table, experiment.TWINS, strict=True):
        change = arms.index(arm) - arms.index(base)
        assert line["estimate"] == pytest.approx(change, abs=0.1) and line["df"] == 7
    assert max(line["holm"] for line in table) < 0.01


# ---- The eighty runs and the neighbours -------------------------------------------------------

def eighty_rows():
    """Made-up runs: DiT is worse by a half, EDiT better by a fifth, all else the same."""
    rows = []
    for i, variant in enumerate([*experiment.VARIANTS, *NEIGHBOURS]):
        for seed in range(100, 111):
            log = 0.03 * (seed - 104) + 0.01 * math.sin(7 * i + 3 * seed)
            log += math.log(dict(dit=1.5, edit=0.8).get(variant, 1)) 
            log += 9 * (seed == 110)                                # unplanned
            bands = {f"band{b}": str(math.exp(log) * (b + 1)) for b in range(10)}
            rows.append(dict(variant=variant, seed=str(seed), cfg2_KID=str(math.exp(log)),
                             held_out_log=str(log), **bands))
    return rows


def test_planned_contrasts_find_what_was_put_in_and_nothing_else(capsys):
    table = experiment.compare(eighty_rows(), experiment.PLANNED)
    assert len(table) == 16 and {line["df"] for line in table} == {9}
    for line in table:
        found, worse = experiment.percent(line["estimate"]), line["base"] == "dit"
        assert found == pytest.approx(-33.3 * worse, abs=2) and (line["holm"] < 1e-6) == worse
    experiment.print_table(table)
    title, *_, last = capsys.readouterr().out.splitlines()
    assert last[:58].split()[-1] == "loss" and "-33." in last[58:67]
    assert max(map(len, (title, last))) < 100


def test_the_neighbours_have_five_seeds():
    table = experiment.compare(eighty_rows(), experiment.BESIDE, experiment.NEIGHBOUR_SEEDS)
    assert len(table) == 10 and {line["df"] for line in table} == {4}
    for line in table:
        want = 25 * (line["base"] == "edit")
        assert experiment.percent(line["estimate"]) == pytest.approx(want, abs=2)


def test_errors_are_multiples_of_the_floor(capsys):
    floors = [dict(timesteps_from=str(100 * b), squared_error=str((b + 1) / 2)) for b in range(10)]
    experiment.print_floors(eighty_rows(), floors)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split()[2:] == [str(100 * b) for b in range(10)]
    assert [line[:20].strip() for line in lines] == list(experiment.NAMES.values())
    for line, want in (lines[0], 2), (lines[-1], 3):
        assert [*map(float, line.split()[-10:])] == pytest.approx(10 * [want], rel=0.05)
