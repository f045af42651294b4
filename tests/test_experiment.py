"""The analysis of notebooks 11, 12 and A against closed forms and numbers made by hand."""
import math

import matplotlib
import numpy as np
import pytest

from lab import experiment, ladder
from lab.neighbours import NEIGHBOURS

matplotlib.use("agg")                       # draws without a screen


@pytest.mark.parametrize("t", [0.3, 1.0, 4.303, 40.0])
def test_tails_of_student_s_t_in_closed_form(t):
    assert experiment.tail(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-5)
    assert experiment.tail(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-5)
    assert experiment.tail(-t, 2) == experiment.tail(t, 2)


@pytest.mark.parametrize("df, t", [(1, 12.7062), (2, 4.3027), (4, 2.7764), (19, 2.0930)])
def test_quantiles_are_those_of_the_tables(df, t):
    assert experiment.quantile(df) == pytest.approx(t, abs=1e-4)


def test_the_paired_t_test_by_hand():
    # Differences 1, 0.5 and 2.5 have mean 4/3 and variance 13/12. Seeds 8 and 9 have no partner.
    line = experiment.paired({1: 2.0, 2: 3.5, 3: 4.5, 8: 0.0}, {9: 7.0, 3: 2.0, 2: 3.0, 1: 1.0})
    error = math.sqrt(13 / 12 / 3)
    assert line["df"] == 2 and line["estimate"] == pytest.approx(4 / 3)
    assert line["error"] == pytest.approx(error)
    assert line["p"] == pytest.approx(1 - (4 / 3 / error) / math.sqrt(2 + (4 / 3 / error) ** 2), rel=1e-4)
    low, high = experiment.interval(line)
    assert (low, high) == pytest.approx((4 / 3 - 4.3027 * error, 4 / 3 + 4.3027 * error), rel=1e-4)
    low, high = experiment.interval(line, 0.90)
    assert high - low == pytest.approx(2 * 2.9200 * error, rel=1e-4)
    with pytest.raises(ValueError, match="two seeds"):
        experiment.paired({1: 1.0, 2: 2.0}, {1: 1.0, 3: 2.0})


def test_holm_by_hand():
    # In order .01 x 4, .02 x 3, .03 x 2, .04 x 1; each at least the one before.
    assert experiment.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert experiment.holm([0.6, 0.7]) == [1, 1]


# ---- Recall -----------------------------------------------------------------------------------

ARMS = dict.fromkeys(name for pairs in experiment.FAMILIES.values() for pair in pairs for name in pair)


def recall_rows(**shifts):
    """Twenty seeds of every arm at accuracy .5, softmax at .99; shifts: {arm: {task: logits}}."""
    rows = []
    for arm in [*ARMS, "softmax, 4 heads"]:
        for task, n in experiment.TASKS.items():
            for seed in range(21):
                logit = 0.1 * seed + 0.02 * math.sin(7 * len(arm) + 3 * seed)
                logit += shifts.get(arm.replace(" ", "_"), {}).get(task, 0)
                accuracy = 0.99 if arm == "softmax" else 1 / (1 + math.exp(-logit))
                if seed == 20:                                      # a pilot's seed, not to count
                    accuracy = 0.01
                rows.append(dict(arm=arm, task=task, seed=str(seed), **{f"accuracy_{n}": str(accuracy)}))
    return rows


def test_margin_is_a_tenth_of_softmax_minus_relu():
    middle = np.mean([0.1 * seed + 0.02 * math.sin(7 * 4 + 3 * seed) for seed in range(20)])
    for task in experiment.TASKS:
        assert experiment.margin(recall_rows(), task) == pytest.approx((math.log(99) - middle) / 10)


def test_logits_are_cut():
    assert experiment.logit(0.5) == 0 and experiment.logit(0.75) == pytest.approx(math.log(3))
    assert experiment.logit(1.0) == experiment.logit(0.99) == pytest.approx(math.log(99))
    assert experiment.logit(0.0) == pytest.approx(-math.log(99))


def test_nothing_different_is_useless_here():
    table = experiment.recall_contrasts(recall_rows())
    assert len(table) == 3 * sum(map(len, experiment.FAMILIES.values()))
    assert set(experiment.judge_recall(recall_rows()).values()) == {"useless here"}
    for line in table:
        assert line["holm"] >= line["p"] and (line["base"] == "softmax" or abs(line["estimate"]) < 0.05)


def test_a_part_is_useful_if_it_helps_where_it_should_and_hurts_nowhere():
    better, other = dict(interference=1.0), dict(heterogeneity=1.0)
    assert experiment.judge_recall(recall_rows(DyDiLA=better))["the differential"] == "useful"
    assert experiment.judge_recall(recall_rows(DyDiLA=other))["the differential"] == "undecided"
    worse = dict(interference=1.0, sharpness=-1.0)
    assert experiment.judge_recall(recall_rows(DyDiLA=worse))["the differential"] == "undecided"
    equal = {"DyDiLA": better, "dynamic,_equal_cost": better}           # cost alone would do as much
    assert experiment.judge_recall(recall_rows(**equal))["the differential"] == "undecided"


def test_holm_corrects_within_a_family():
    table = experiment.recall_contrasts(recall_rows(DyDiLA=dict(interference=0.03)))
    for family in experiment.FAMILIES:
        lines = [line for line in table if line["family"] == family]
        assert [line["holm"] for line in lines] == experiment.holm([line["p"] for line in lines])


def test_an_arm_at_chance_is_not_trainable(capsys):
    rows = recall_rows(signed=dict(sharpness=-9.0))
    assert not experiment.trainable(rows, "sharpness", "signed")
    assert experiment.trainable(rows, "interference", "signed")
    experiment.print_judgement(rows)
    assert "not trainable on sharpness: signed" in capsys.readouterr().out


def test_pairs_at_half_are_read_off_straight_lines():
    row = dict(arm="x", accuracy_2="0.9", accuracy_4="0.75", accuracy_8="0.25", accuracy_64="0.2")
    assert experiment.pairs_at_half(row) == pytest.approx(2.5)
    assert experiment.pairs_at_half(dict(accuracy_2="0.4", accuracy_64="0.1")) == 1
    assert experiment.pairs_at_half(dict(accuracy_2="0.9", accuracy_64="0.5")) == 6


def test_the_twins_contrasts_are_paired_by_seed():
    arms = dict.fromkeys(name for pair in experiment.TWINS for name in pair)
    rows = [dict(arm=arm, seed=str(seed), score=str(i + seed + 0.1 * math.sin(i * seed)))
            for i, arm in enumerate(arms) for seed in range(8)]
    table = experiment.twins_contrasts(rows)
    assert [round(line["estimate"]) for line in table] == [
        list(arms).index(a) - list(arms).index(b) for a, b in experiment.TWINS]
    assert all(line["df"] == 7 for line in table)


# ---- The eighty runs --------------------------------------------------------------------------

def made_up():
    """Eighty runs and the neighbours': DiT is worse by a half, EDiT better by a fifth."""
    rows = []
    for i, variant in enumerate([*experiment.VARIANTS, *NEIGHBOURS]):
        for seed in range(100, 111):
            log = 0.03 * (seed - 104) + 0.01 * math.sin(7 * i + 3 * seed)
            log += math.log(dict(dit=1.5, edit=0.8).get(variant, 1)) + 9 * (seed == 110)    # not in the plan
            rows.append(dict(variant=variant, seed=str(seed), cfg2_KID=str(math.exp(log)), held_out_log=str(log),
                             **{f"band{b}": str(math.exp(log) * (b + 1)) for b in range(10)}))
    return rows


def test_contrasts_find_what_was_put_in_and_nothing_else(capsys):
    table = experiment.compare(made_up(), experiment.PLANNED)
    assert len(table) == 16
    for line in table:
        found, worse = experiment.percent(line["estimate"]), line["base"] == "dit"
        assert found == pytest.approx(-33.3 * worse, abs=2) and (line["holm"] < 1e-6) == worse
    assert [line["holm"] for line in table] == experiment.holm([line["p"] for line in table])
    experiment.print_table(table)
    assert max(map(len, capsys.readouterr().out.splitlines())) < 100


def test_the_neighbours_have_five_seeds():
    table = experiment.compare(made_up(), experiment.BESIDE, experiment.NEIGHBOUR_SEEDS)
    for line in table:
        assert line["df"] == 4
        assert experiment.percent(line["estimate"]) == pytest.approx(25 * (line["base"] == "edit"), abs=2)


def test_errors_are_multiples_of_the_floor(capsys):
    floors = [dict(timesteps_from=str(100 * b), squared_error=str((b + 1) / 2)) for b in range(10)]
    experiment.print_floors(made_up(), floors)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split()[2:] == [str(100 * b) for b in range(10)]
    assert [line[:20].strip() for line in lines] == list(experiment.NAMES.values())
    assert all(float(number) == pytest.approx(2, rel=0.05) for number in lines[0].split()[-10:])
    assert all(float(number) == pytest.approx(3, rel=0.05) for number in lines[-1].split()[-10:])


def test_the_loss_without_attention_is_a_ratio(capsys):
    lines = [dict(variant=variant, seed=str(seed), held_out_log="-5", without_attention=str(-5 + math.log(1 + factor)),
                  size="" if variant == "dit" else "0.5")
             for variant in experiment.VARIANTS for seed, factor in ((100, 3.0), (101, 0.0), (7, 9.0))]    # 7 is not in the plan
    experiment.print_silenced(lines)
    title, *shown = capsys.readouterr().out.splitlines()
    assert [line[:20].strip() for line in shown] == list(experiment.NAMES.values())
    assert shown[0][20:].split() == ["+100.0", "%", "+0.0", "+300.0", "5.0e-01"] and shown[-1][20:].split()[-1] == "+300.0"


def test_the_variants_are_those_of_the_ladder(known):
    for variant in [*experiment.VARIANTS, *NEIGHBOURS]:
        ladder.flags(variant, known)
