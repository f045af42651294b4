"""The analysis of the experiments of notebooks 10 and 11 against closed forms and numbers made by hand."""
import argparse
import math

import matplotlib
import numpy as np
import pytest
import torch

import dydilit
import train
from lab import common, ladder, plan, silenced, verdict
from lab.neighbours import NEIGHBOURS

matplotlib.use("agg")                       # draws without a screen


@pytest.mark.parametrize("t", [0.3, 1.0, 4.303, 40.0])
def test_tails_of_student_s_t_in_closed_form(t):
    assert verdict.tail(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-5)
    assert verdict.tail(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-5)
    assert verdict.tail(-t, 2) == verdict.tail(t, 2)


@pytest.mark.parametrize("df, t", [(1, 12.7062), (2, 4.3027), (4, 2.7764), (18, 2.1009), (63, 1.9983)])
def test_quantiles_are_those_of_the_tables(df, t):
    assert verdict.quantile(df) == pytest.approx(t, abs=1e-4)


def test_two_ways_by_hand():
    # Means 2, 4, 9; seeds' shares -1, 0, 1; remainders whose rows and columns add up to zero. Their squares sum to 10.
    remainders = [[1, -1, 0], [-2, 1, 1], [1, 0, -1]]
    fit = verdict.TwoWay({(name, seed): mean + seed - 1 + remainders[i][seed]
                          for i, (name, mean) in enumerate(zip("abc", (2, 4, 9))) for seed in range(3)})
    assert fit.df == 4 and fit.sd == pytest.approx(math.sqrt(10 / 4))
    estimate, half, p = fit.difference("b", "a")
    error = math.sqrt(10 / 4) * math.sqrt(2 / 3)
    assert estimate == pytest.approx(2)
    assert half == pytest.approx(2.7764 * error, rel=1e-4)
    assert p == pytest.approx(verdict.tail(2 / error, 4))


def test_two_variants_are_the_paired_t_test():
    pairs = [(1.0, 2.0), (3.0, 3.5), (2.0, 4.5)]            # differences 1, 0.5, 2.5: mean 4/3, variance 13/12
    fit = verdict.TwoWay({(name, seed): pair[i] for seed, pair in enumerate(pairs) for i, name in enumerate("ab")})
    estimate, half, _ = fit.difference("b", "a")
    assert fit.df == 2 and estimate == pytest.approx(4 / 3)
    assert half == pytest.approx(4.3027 * math.sqrt(13 / 12 / 3), rel=1e-4)


def test_a_missing_run_is_no_zero():
    values = {(name, seed): mean + 10 * seed for name, mean in zip("abc", (1, 2, 4)) for seed in range(3)}
    values = {at: value + (0.1 if at == ("a", 0) else 0) for at, value in values.items() if at != ("c", 2)}
    fit = verdict.TwoWay(values)
    assert fit.df == 3 and fit.difference("c", "b")[0] == pytest.approx(2, abs=0.1)


def test_holm_by_hand():
    # In order .01 x 4, .02 x 3, .03 x 2, .04 x 1; each at least the one before.
    assert verdict.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert verdict.holm([0.6, 0.7]) == [1, 1]


def made_up(printed=0.0, wobble=0.01):
    """Eighty runs: only DiT differs, by a third, and Eq. 8 as printed with the convolution, by `printed`."""
    rows = []
    for i, variant in enumerate(verdict.VARIANTS):
        for seed in range(100, 110):
            log = 0.03 * (seed - 104) + wobble * math.sin(7 * i + 3 * seed) + math.log(1.5) * (variant == "dit")
            log += printed * (variant == verdict.RUNG6["none"])
            rows.append(dict(variant=variant, seed=str(seed), commit="abc", cfg2_KID=str(math.exp(log)), held_out_log=str(log)))
    return rows


def test_the_verdict_finds_what_was_put_in_and_nothing_else():
    table = verdict.judge(made_up())
    assert len(table) == 16
    for line in table:
        if line["base"] == "dit":
            assert verdict.percent(line["estimate"]) == pytest.approx(-33.3, abs=1) and line["holm"] < 1e-6
        else:
            assert abs(line["estimate"]) < 0.02 and line["holm"] > 0.05
    assert not verdict.printed_is_worse(table)


def test_the_rule_follows_contrast_1_and_its_sign():
    worse, better = verdict.judge(made_up(printed=0.1)), verdict.judge(made_up(printed=-0.1))
    assert verdict.printed_is_worse(worse) and not verdict.printed_is_worse(better)
    chosen = [{line["variant"] for line in table if line["base"] in ("sana", "dit")} for table in (worse, better)]
    assert chosen == [{verdict.RUNG6["mass"]}, {verdict.RUNG6["none"]}]


def test_a_table_of_unfinished_runs_is_not_shown(capsys):
    verdict.show(made_up()[:-1])
    shown = capsys.readouterr().out
    assert "79 of 80" in shown and "missing: dit" in shown and "Holm" not in shown
    verdict.show(made_up())
    shown = capsys.readouterr().out
    assert shown.count("KID") == 8 and max(map(len, shown.splitlines())) < 100


def beside(wobble=0.01):
    """Notebook 10's made-up runs and notebook 11's: EDiT has a fifth less of both measures, DiG twice as much."""
    rows = made_up()
    for i, name in enumerate(verdict.NEIGHBOURS):
        for seed in range(100, 105):
            log = 0.03 * (seed - 104) + wobble * math.sin(5 * i + 2 * seed) + math.log(dict(edit=0.8, dig=2).get(name, 1))
            rows.append(dict(variant=name, seed=str(seed), commit="def", cfg2_KID=str(math.exp(log)), held_out_log=str(log)))
    return rows


def test_the_neighbours_are_each_compared_with_dydi_lit():
    table = verdict.judge_neighbours(beside())
    assert [(line["variant"], line["base"]) for line in table] == [(verdict.OURS, n) for n in verdict.NEIGHBOURS for _ in "12"]
    for line in table:
        change, found = dict(edit=25, dig=-50).get(line["base"], 0), verdict.percent(line["estimate"])
        assert found == pytest.approx(change, abs=2) and (line["holm"] < 1e-6 if change else line["holm"] > 0.05)
    assert [line["holm"] for line in table] == verdict.holm([line["p"] for line in table])         # over 5 x 2
    fit = verdict.fits_of(beside(), verdict.BESIDE, verdict.BESIDE_SEEDS)["KID"]
    assert fit.df == 5 * 4                                  # six systems, five seeds, none of notebook 10's other runs
    assert verdict.judge(beside()) == verdict.judge(made_up())      # nor do the neighbours' count there


def test_the_neighbours_table_waits_for_its_runs(capsys):
    verdict.show_neighbours([row for row in beside() if row["variant"] != "lit"])
    shown = capsys.readouterr().out
    assert "25 of 30" in shown and "missing: lit" in shown and "Holm" not in shown
    verdict.show_neighbours(beside())
    shown = capsys.readouterr().out
    assert "30 of 30 runs, commit abc, def" in shown and shown.count("DyDi-LiT against") == 10


def test_the_levels_are_means_of_a_variants_own_runs(capsys):
    columns = ("cfg2_KID", "cfg2_FID", "cfg2_precision", "cfg2_recall", "cfg1_FID", "cfg4_FID")
    rows = [dict(variant=variant, seed=str(seed), **{column: str(i + seed / 100) for column in columns})
            for i, variant in enumerate(verdict.VARIANTS) for seed in (*verdict.SEEDS, 7)]              # 7 is not in the plan
    blocks = [dict(variant=variant, seed="100", row_variance=value, subtracted_q="" if variant == "dit" else "0.2")
              for variant in verdict.VARIANTS for value in ("1", "2")]
    verdict.print_levels(rows, blocks)
    title, *lines = capsys.readouterr().out.splitlines()
    assert [line[:18].strip() for line in lines] == list(verdict.NAMES.values()) and max(map(len, [title, *lines])) < 100
    assert lines[4].split()[-8:] == ["5.04", "5.0", "5.04", "5.04", "5.0", "5.0", "1.50", "0.200"]      # 4 + the mean of 1.00 to 1.09
    assert lines[7].split() == ["DiT", "8.04", "8.0", "8.04", "8.04", "8.0", "8.0", "1.50"]


def test_the_levels_begin_with_the_squared_error(capsys):
    verdict.print_levels([dict(variant=variant, seed="100", held_out_loss="0.0305") for variant in verdict.VARIANTS], [])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split() == ["error"] and all(line.endswith(" 0.0305") and len(line) == title.index("error") + 5 for line in lines)
    rows = [dict(variant="lit", seed=str(seed), held_out_loss=f"0.{seed}") for seed in (100, 102, 109)]
    verdict.print_levels(rows, [], {"lit": "LiT"}, verdict.BESIDE_SEEDS)                                # 109 is not in the plan
    assert capsys.readouterr().out.splitlines()[1].split() == ["LiT", "0.1010"]


def test_bands_are_ratios_to_each_base(capsys):
    losses = {verdict.OURS: 0.5, verdict.RUNG6["mass"]: 1.0, "sana": 0.5, "dit": 0.25}
    rows = [dict(variant=variant, seed=str(seed), **{f"log_band{i}": str(math.log(loss) + seed / 100) for i in range(10)})
            for variant, loss in losses.items() for seed in (*verdict.SEEDS, 7)]                        # 7 is not in the plan
    verdict.print_bands(rows)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split()[2:] == [str(100 * i) for i in range(10)] and len({len(line) for line in lines}) == 1
    assert [line.split()[-20:-18] for line in lines] == [["-50", "%"], ["+0", "%"], ["+100", "%"]]
    rows += [dict(variant="lit", seed="100", **{f"log_band{i}": str(math.log(0.625) + 1) for i in range(10)})]
    verdict.print_bands(rows, ["lit"], {"lit": "LiT"}, range(100, 101))
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["to", "LiT", "-20", "%"]


def test_the_loss_without_attention_is_a_ratio(capsys):
    lines = [dict(variant=variant, seed=str(seed), held_out_log="-5", without_attention=str(-5 + math.log(1 + factor)),
                  size="" if variant == "dit" else "0.5")
             for variant in verdict.VARIANTS for seed, factor in ((100, 3.0), (101, 0.0), (7, 9.0))]    # 7 is not in the plan
    verdict.print_silenced(lines)
    title, *shown = capsys.readouterr().out.splitlines()
    assert [line[:20].strip() for line in shown] == list(verdict.NAMES.values())
    assert shown[0][20:].split() == ["+100.0", "%", "+0.0", "+300.0", "5.0e-01"] and shown[-1][20:].split()[-1] == "+300.0"


@pytest.mark.parametrize("variant", ["rung6", "rung5:normalizer=mass", "sana", "dit"])
def test_a_silenced_attention_is_one_whose_output_is_zero(variant):
    model = dydilit.build_model(train.SMALL_MODEL, ladder.blocks_of(variant), depth=1, **{"dit": dict(attention="softmax", n_heads=4),
                                "sana": dydilit.LADDER[0][1], "rung5:normalizer=mass": dict(dwc=False)}.get(variant, {}))
    attn, x = model.blocks[0].attn, torch.randn(2, 64, 96)
    before = attn(x)
    silenced.silence(attn)
    convolved = 0 if getattr(attn, "dwc", None) is None else attn.dwc(attn.qkv(x).chunk(3, dim=-1)[-1])
    want = attn.proj.bias + convolved @ attn.proj.weight.T if variant == "rung6" else attn.proj.bias.expand_as(x)
    torch.testing.assert_close(attn(x), want)
    assert not torch.allclose(before, want)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_silenced_neighbour_keeps_only_bias_and_convolution(name):
    attn = dydilit.build_model(train.SMALL_MODEL, NEIGHBOURS[name], depth=2, n_heads=6).blocks[1].attn
    x, bias = torch.randn(2, 64, 96), 0 if attn.proj.bias is None else attn.proj.bias
    before = attn(x)
    silenced.silence(attn)
    want = torch.zeros_like(x) + bias
    if name == "lit":
        heads = attn.qkv(x).chunk(3, dim=-1)[-1].unflatten(-1, (2, 48))                                 # (B, N, h, d/h)
        images = heads.permute(0, 2, 3, 1).reshape(4, 48, 8, 8)                                         # (B h, d/h, side, side)
        want = attn.proj(attn.dwc(images).reshape(2, 96, 64).transpose(1, 2))
    torch.testing.assert_close(attn(x), want)
    assert not torch.allclose(before, want)


def test_the_stability_table_has_a_line_for_each_run(capsys):
    line = dict(normalizer="none", model="DyDi-LiT-S/2", dtype="float32", steps="300", loss="0.1", largest_gradient_norm="2.5",
                largest_output="4.1", largest_output_16384="0.7", finite="True")
    verdict.print_stability([line, {**line, "normalizer": "mass"}])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and shown[1].split() == list(line.values()) and len({len(text) for text in shown}) == 1


def test_the_picture_has_a_cell_for_each_line_and_a_frame_for_what_survives(monkeypatch):
    figures = []
    monkeypatch.setattr(plan.plt, "show", lambda: figures.append(plan.plt.gcf()))
    table = verdict.judge(made_up(printed=0.1))
    plan.contrasts_picture(table)
    plan.plt.close(figures[0])
    ax, = figures[0].axes
    framed = [cell for cell in ax.patches if cell.get_edgecolor()[3] > 0]
    assert len(ax.patches) == len(table) == 16
    assert len(framed) == sum(line["holm"] < 0.05 for line in table) == 6       # contrasts 1, 4a and 6
    assert {text.get_text() for text in ax.get_yticklabels()} == set(plan.WORDS.values())


def test_samples_come_with_their_nearest_training_pictures(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    training, labels = rng.integers(0, 256, (5000, 8, 8, 3), dtype=np.uint8), np.repeat(np.arange(10), 3)
    images = {}
    for i, variant in enumerate(plan.SHOWN.values()):       # every sample is a training picture, nearly, the second mirrored
        images[variant] = training[30 * i:30 * (i + 1)].copy()
        images[variant][3] = images[variant][3, :, ::-1]
        images[variant] ^= 1
        run = tmp_path / f"{variant.replace(':', '-')}-7-{verdict.SEEDS[0]}"
        run.mkdir()
        np.savez(run / f"samples-cfg{ladder.RECIPE}-30-20.npz", arr_0=images[variant], arr_1=labels)
    monkeypatch.setattr(common, "cifar10", lambda folder: argparse.Namespace(images=training))
    plan.keep_samples(tmp_path, "somewhere", tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as file:
        kept, found = file["images"], file["nearest"]
    assert kept.shape == found.shape == (4, 10, 8, 8, 3)
    for i, variant in enumerate(plan.SHOWN.values()):
        assert (kept[i] == images[variant][::3]).all() and (found[i] ^ 1 == kept[i]).all()
    shown = []
    monkeypatch.setattr(plan.plt, "show", lambda: shown.append(plan.plt.gcf()))
    plan.show_samples(tmp_path / "samples.npz")
    ax, = shown[0].axes
    plan.plt.close(shown[0])
    assert [label.get_text() for label in ax.get_yticklabels()] == list(plan.SHOWN)


def test_the_variants_are_those_of_the_ladder(known):
    for variant in verdict.VARIANTS + verdict.BESIDE:
        ladder.flags(variant, known)
