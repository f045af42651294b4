"""The ladder of runs: who is compared at which cost, and that runs stop, go on and repeat."""
import math
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import dydilit
import train
from lab import experiment, ladder, measures
from lab.neighbours import NEIGHBOURS, lit_heads

NOTEBOOKS = pathlib.Path(train.__file__).resolve().parent / "notebooks"
SMALL = train.SMALL_MODEL


def test_variants_are_those_of_the_tables(known):
    assert [known[f"rung{i}"] for i in range(1, 7)] == [fields for _, fields in dydilit.LADDER]
    assert known["map"] == dict(dwc=False, differential="map")
    assert known["increasing"] == dict(dwc=False, lambda_init=[0.2, 0.8])
    ours = ladder.honest_macs(SMALL)
    for name in ("sana", "dit", *NEIGHBOURS):       # as near as a step of the width allows
        fields = dict(parts=ladder.trainer(name)[1], **ladder.SHAPE, **known[name])
        assert ladder.honest_macs(SMALL, **fields) == pytest.approx(ours, rel=0.03)


def test_lesson_12_says_what_the_ladder_trains(known):
    lesson = (NOTEBOOKS / "12_the_neighbours.ipynb").read_text()
    for label, name in zip(("PixArt-Sigma", "EDiT", "DiG", "MoH-DiT", "LiT"), NEIGHBOURS):
        fields = known[name]
        heads = fields.get("n_heads", lit_heads(96) if name == "lit" else 1)
        macs = ladder.honest_macs(SMALL, parts=NEIGHBOURS[name], **ladder.SHAPE, **fields)
        change = f"{100 * (macs / ladder.honest_macs(SMALL) - 1):+.1f} %".replace("-", "−")
        assert f"| {label} | {fields['depth']} | {fields['dim']} | {heads} | {change} |" in lesson


@pytest.mark.parametrize("variant, script, flags", [
    ("rung6:lr=1e-3,n_heads=4", ["train.py"], ["--lr", "1e-3", "--set", "n_heads=4"]),
    ("rung5", ["train.py"], ["--set", "dwc=false"]),
    ("rung5:normalizer=mass", ["notebooks/lab/eq8.py", "mass"], ["--set", "dwc=false"]),
    ("lambda0", ["notebooks/lab/eq8.py", "lambda0-length"], ["--set", "dwc=false"]),
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


def test_held_out_loss_is_measured_as_in_training():
    class Half(torch.nn.Module):
        """Predicts half of its input as the noise, and the smallest variance."""
        pos_embed = torch.zeros(1)

        def forward(self, x, t, y):
            return torch.cat([0.5 * x, -torch.ones_like(x)], 1)

    data, model = train.shapes(20), Half()
    plain, logs = ladder.held_out_losses(model, data, batch=7)
    x, noise, y, t = ladder.noisy_band(data, 3)
    assert set(t.tolist()) <= set(range(300, 400)) and len(set(t.tolist())) > 10
    assert y.tolist() == data.labels.tolist()
    diffusion = dydilit.GaussianDiffusion()
    x_t, want = diffusion.q_sample(x, t, noise), diffusion.losses(model, x, y, t, noise)["loss"]
    assert plain[3] == pytest.approx((0.5 * x_t - noise).square().mean().item(), rel=1e-5)
    assert logs[3] == pytest.approx(np.mean([math.log(loss) for loss in want]), rel=1e-5)
    assert len(plain) == len(logs) == 10 and len(set(plain)) == 10


def test_tables_take_lines_with_more_or_fewer_measures(tmp_path):
    measures.save_log(tmp_path / "runs.csv", [dict(seed=0, FID=3), dict(seed=1, FID=4, IS=0.5)])
    assert measures.read(tmp_path / "runs.csv") == [dict(seed="0", FID="3", IS=""),
                                                    dict(seed="1", FID="4", IS="0.5")]


class Means(torch.nn.Module):
    """A feature network as a user brings it."""

    def forward(self, x: torch.Tensor):
        return torch.nn.functional.adaptive_avg_pool2d(x / 255, 2).flatten(1)


@pytest.mark.slow
def test_the_ladder_stops_goes_on_and_repeats_itself(tmp_path):
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    tiny = "dim=16,depth=2,batch_size=4"
    command = [sys.executable, NOTEBOOKS / "lab/ladder.py", "--steps", "2", "--samples", "20",
               "--sampling-steps", "2", "--workers", "2", "--out", "out", "--network", "means.pt",
               "--variants", f"lambda0:{tiny}", f"edit:{tiny}", "--seeds"]
    process = subprocess.Popen([*command, "9"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 600                            # a busy machine needs a minute
    while not list(tmp_path.rglob("checkpoint.pt")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    process.terminate()
    says = process.communicate(timeout=300)[1]
    assert process.returncode == 1
    assert says.endswith("ladder.py: stopped; the same command goes on from here\n")

    def climb():
        done = subprocess.run([*command, "1"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, measures.read(tmp_path / "out/runs.csv")

    says, rows = climb()
    assert "0 runs are in" in says and "2 are to do" in says and len(rows) == 2
    for row in rows:
        bands = [float(row[f"band{b}"]) for b in range(10)]
        assert float(row["held_out_loss"]) == pytest.approx(np.mean(bands), rel=1e-4)
        assert 0.5 < np.mean(bands) < 2 and float(row["cfg2_KID"]) and row["dim"] == "16"
    says, again = climb()
    assert "2 runs are in" in says and "0 are to do" in says and again == rows
    measures.save_log(tmp_path / "out/runs.csv", rows[1:])
    anew = climb()[1]                                       # a line that is made anew is the same
    assert anew == [*rows[1:], rows[0] | dict(seconds=anew[-1]["seconds"])]
