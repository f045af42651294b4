"""The ladder of runs: who is compared at which cost, what is measured, and that runs go on."""
import sys

import pytest
import torch

import dydilit
import train
from lab import experiment, ladder, measures
from lab.execute import HERE
from lab.neighbours import NEIGHBOURS, lit_heads

KNOWN = ladder.variants(train.SMALL_MODEL)


def test_variants_are_those_of_the_tables_and_of_lesson_12():
    assert [KNOWN[f"rung{i}"] for i in range(1, 7)] == [fields for _, fields in dydilit.LADDER]
    assert KNOWN["map"] == dict(dwc=False, differential="map")
    assert KNOWN["increasing"] == dict(dwc=False, lambda_init=[0.2, 0.8])
    lesson = (HERE / "12_the_neighbours.ipynb").read_text()
    labels = dict(zip(NEIGHBOURS, ("PixArt-Sigma", "EDiT", "DiG", "MoH-DiT", "LiT")))
    for name in "sana", "dit", *NEIGHBOURS:
        fields, parts = KNOWN[name], ladder.settings(name, KNOWN)[1]
        macs = ladder.honest_macs(train.SMALL_MODEL, parts=parts, **ladder.SHAPE, **fields)
        more = 100 * (macs / ladder.honest_macs(train.SMALL_MODEL) - 1)
        assert abs(more) < 3                        # as near as a step of the width allows
        if name in NEIGHBOURS:
            heads = fields.get("n_heads", lit_heads(96) if name == "lit" else 1)
            row = labels[name], fields["depth"], fields["dim"], heads, f"{more:+.1f} %"
            assert " | ".join(map(str, row)).replace(" -", " −") in lesson


@pytest.mark.parametrize("variant, flags, form, learns", [
    ("rung6:lr=1e-3,n_heads=4", ["--lr", "1e-3", "--set", "n_heads=4"], "length", True),
    ("rung5:normalizer=mass", ["--set", "dwc=false"], "mass", True),
    ("lambda0:steps=9", ["--steps", "9", "--set", "dwc=false"], "length", False)])
def test_a_variant_becomes_flags_and_parts(variant, flags, form, learns):
    found, parts = ladder.settings(variant, KNOWN)
    differential = parts(dydilit.ModelConfig(), 0)[0].differential
    assert found == flags and differential.lambdas.requires_grad == learns
    assert getattr(differential, "denominator", "length") == form
    assert ladder.settings("lit:dim=48", KNOWN) == (["--set", "depth=5", "dim=48"],
                                                    NEIGHBOURS["lit"])


def test_unknown_variants_are_refused_and_those_of_the_lessons_are_not():
    for variant in [*experiment.VARIANTS, *NEIGHBOURS]:
        ladder.settings(variant, KNOWN)
    with pytest.raises(train.Problem, match="--variants rung7: choose from rung1"):
        ladder.settings("rung7", KNOWN)
    with pytest.raises(train.Problem, match="=typo: the normalizers of .* are none, length"):
        ladder.settings("rung6:normalizer=typo", KNOWN)


def test_held_out_losses_are_those_of_training():
    data, model = train.shapes(20), dydilit.build_model(train.SMALL_MODEL, dim=16, depth=1).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    plain, logs = ladder.held_out_losses(model, data, batch=7)
    x, noise, y, t = ladder.noisy_band(data, 3)
    assert set(t.tolist()) <= set(range(300, 400)) and len(set(t.tolist())) > 10
    assert y.tolist() == data.labels.tolist() and len(set(plain)) == len(logs) == 10
    want = dydilit.GaussianDiffusion().losses(model, x, y, t, noise)
    assert plain[3] == pytest.approx(want["simple"].mean().item(), rel=1e-4)
    assert logs[3] == pytest.approx(want["loss"].log().mean().item(), rel=1e-4)


@pytest.mark.slow
def test_each_run_is_made_once_and_measured(cli, tmp_path, monkeypatch, shapes=train.shapes):
    monkeypatch.setattr(train, "shapes", lambda n=200, seed=0: shapes(min(n, 200), seed))
    monkeypatch.setattr(measures, "train_classifier", lambda *data: measures.Classifier(data[2]))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    tiny, table = "dim=16,depth=2,batch_size=4", tmp_path / "out/runs.csv"

    def climb():
        words = "--steps 2 --samples 20 --out out --seeds 1 --first-seed 5 --variants".split()
        monkeypatch.setattr(sys, "argv", ["ladder.py", *words, f"lambda0:{tiny}", f"edit:{tiny}",
                                          f"rung6:lr=inf,{tiny}"])
        with pytest.raises(SystemExit, match="rung6:lr=inf.*: step 2: the loss is no longer finit"):
            ladder.main()
        return measures.read(table)
    rows = climb()                                          # a run that fails keeps no other back
    assert [row["variant"] for row in rows] == [f"lambda0:{tiny}", f"edit:{tiny}"]
    for row in rows:
        assert 0.5 < float(row["held_out_loss"]) < 2 and float(row["cfg2_KID"])
    about = dydilit.load_model(next(tmp_path.rglob("*lambda0*/model.pt")))[1]
    assert climb() == rows and about["knobs"]["seed"] == 5
    measures.save_log(table, [rows[1] | dict(extra=1)])     # a table keeps its columns,
    old, anew = climb()                                     # and a line made anew is the same
    assert old == rows[1] | dict(extra="1")
    assert anew == rows[0] | dict(seconds=anew["seconds"], extra="")
    data, process = train.shapes(), dydilit.GaussianDiffusion()
    x, _ = data.batch(torch.arange(200), torch.zeros(200, dtype=torch.bool))
    means = torch.stack([x[data.labels == c].mean(0) for c in range(10)])

    def constant(x, t, y):
        """A model for which every clean picture is the mean of its class."""
        a, s = (process._at(name, t) for name in ("sqrt_alpha_bar", "sqrt_one_minus"))
        return torch.cat([(x - a * means[y]) / s, torch.zeros_like(x)], dim=1)
    constant.pos_embed = x
    errors, _ = ladder.held_out_losses(constant, train.shapes(seed=1))
    floors = measures.read(table.with_name("shapes-floors.csv"))
    assert [float(row["squared_error"]) for row in floors] == pytest.approx(errors, rel=1e-3)
