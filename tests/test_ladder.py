"""The ladder of runs: who is compared at which cost, and that runs stop, go on and repeat."""
import subprocess
import sys
import time

import pytest
import torch

import dydilit
import train
from lab import experiment, ladder, measures
from lab.execute import HERE
from lab.neighbours import NEIGHBOURS, lit_heads


def test_variants_are_those_of_the_tables_and_of_lesson_12(known):
    assert [known[f"rung{i}"] for i in range(1, 7)] == [fields for _, fields in dydilit.LADDER]
    assert known["map"] == dict(dwc=False, differential="map")
    assert known["increasing"] == dict(dwc=False, lambda_init=[0.2, 0.8])
    lesson = (HERE / "12_the_neighbours.ipynb").read_text()
    labels = dict(zip(NEIGHBOURS, ("PixArt-Sigma", "EDiT", "DiG", "MoH-DiT", "LiT")))
    for name in "sana", "dit", *NEIGHBOURS:
        fields, parts = known[name], ladder.trainer(name)[1]
        macs = ladder.honest_macs(train.SMALL_MODEL, parts=parts, **ladder.SHAPE, **fields)
        more = 100 * (macs / ladder.honest_macs(train.SMALL_MODEL) - 1)
        assert abs(more) < 3                        # as near as a step of the width allows
        if name in NEIGHBOURS:
            heads = fields.get("n_heads", lit_heads(96) if name == "lit" else 1)
            row = labels[name], fields["depth"], fields["dim"], heads, f"{more:+.1f} %"
            assert " | ".join(map(str, row)).replace(" -", " −") in lesson


@pytest.mark.parametrize("variant, script, flags", [
    ("rung6:lr=1e-3,n_heads=4", ["train.py"], ["--lr", "1e-3", "--set", "n_heads=4"]),
    ("rung5:normalizer=mass", ["notebooks/lab/eq8.py", "mass"], ["--set", "dwc=false"]),
    ("lambda0:normalizer=none,steps=9", ["notebooks/lab/eq8.py", "lambda0-none"],
     ["--steps", "9", "--set", "dwc=false"]),
    ("lit:dim=48", ["notebooks/lab/neighbours.py", "lit"], ["--set", "depth=5", "dim=48"])])
def test_a_variant_becomes_a_command(known, variant, script, flags):
    assert ladder.trainer(variant)[0] == script and ladder.flags(variant, known) == flags


def test_unknown_variants_are_refused_and_those_of_the_lessons_are_not(known):
    for variant in [*experiment.VARIANTS, *NEIGHBOURS]:
        ladder.flags(variant, known)
    with pytest.raises(train.Problem, match="--variants rung7: choose from rung1"):
        ladder.flags("rung7", known)
    with pytest.raises(train.Problem, match="=typo: choose the normalizer from none, length"):
        ladder.flags("rung6:normalizer=typo", known)


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
def test_the_ladder_stops_goes_on_and_repeats_itself(tmp_path):
    torch.jit.script(torch.nn.ZeroPad2d(-14)).save(str(tmp_path / "network.pt"))     # a crop
    table, tiny = tmp_path / "out/runs.csv", "dim=16,depth=2,batch_size=4"
    command = [sys.executable, HERE / "lab/ladder.py", "--steps", "2", "--samples", "20",
               "--sampling-steps", "2", "--workers", "2", "--out", "out", "--network", "network.pt",
               "--variants", f"lambda0:{tiny}", f"edit:{tiny}", "--seeds"]
    process = subprocess.Popen([*command, "9"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.rglob("checkpoint.pt")):
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.communicate()[1].endswith("stopped; the same command goes on from here\n")

    def climb(done, todo):
        says = subprocess.check_output([*command, "1"], cwd=tmp_path, text=True)
        assert f"{done} runs are in" in says and f"{todo} are to do" in says
        return measures.read(table)
    rows = climb(0, 2)
    for row in rows:
        assert 0.5 < float(row["held_out_loss"]) < 2 and float(row["cfg2_KID"])
    assert climb(2, 0) == rows and len(rows) == 2
    measures.save_log(table, [rows[1] | dict(extra=1)])     # a line made anew is the same,
    old, anew = climb(1, 1)                                 # and others may have more columns
    assert old == rows[1] | dict(extra="1")
    assert anew == rows[0] | dict(seconds=anew["seconds"], extra="")
