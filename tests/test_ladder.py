"""The ladder of runs: what is compared at equal cost, and that runs stop, resume and repeat themselves."""
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
from lab import eq8, ladder, measures
from lab.neighbours import NEIGHBOURS, lit_heads

NOTEBOOKS = pathlib.Path(train.__file__).resolve().parent / "notebooks"

MODELS = [*(overrides for _, overrides in dydilit.LADDER), dict(differential="map"), dict(denominator="rms"),
          dict(denominator="mass", n_heads=2), dict(dydilit.LADDER[0][1], n_heads=4), dict(attention="softmax", n_heads=4)]


def features(m, d, seed=0):
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Means(torch.nn.Module):
    """A feature network as a user brings it."""

    def forward(self, x: torch.Tensor):
        x = x.float() / 255
        pool = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return pool, x[:, :, :3, :3].flatten(1), 5 * pool[:, :4]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "means.pt"
    torch.jit.script(Means()).save(str(path))
    return path


@pytest.mark.parametrize("overrides", MODELS, ids=[str(i) for i in range(len(MODELS))])
def test_attention_map_is_what_the_module_applies(overrides):
    torch.manual_seed(0)
    fields, parts = {"dim": 16, "depth": 1, **overrides}, dydilit.block_parts
    if "denominator" in fields:
        parts = eq8.parts_with(fields.pop("denominator"))
    cfg = dydilit.ModelConfig(**fields)
    attn = parts(cfg, 0)[0].double()
    x = features(2 * 9, 16).view(2, 9, 16)
    weights = ladder.attention_map(attn, x)
    assert weights.shape == (2, cfg.n_heads, 9, 9)
    v = attn.qkv(x).chunk(3 if cfg.attention == "softmax" or attn.qkv.out_features == 48 else 1, dim=-1)[-1]
    out = dydilit.merge_heads(weights @ dydilit.split_heads(v, cfg.n_heads))
    if overrides.get("denominator") == "rms":               # not linear in the values: right but for each row's scale
        out = torch.nn.functional.rms_norm(out, out.shape[-1:], eps=dydilit.EPS)
    if getattr(attn, "dwc", None) is not None:
        out = out + attn.dwc(v)
    torch.testing.assert_close(attn.proj(out), attn(x))


BASE = dict(image_size=32, vae_factor=1, in_channels=3, n_classes=10)


def test_variants_are_those_of_the_tables(known):
    assert [known[f"rung{i}"] for i in range(1, 7)] == [overrides for _, overrides in dydilit.LADDER]
    assert known["map"] == dict(dwc=False, differential="map") and known["increasing"]["lambda_init"] == [0.2, 0.8]
    target = ladder.honest_macs(train.SMALL_MODEL)
    for name in ("sana", "dit"):
        assert ladder.honest_macs(train.SMALL_MODEL, **known[name]) == pytest.approx(target, rel=0.02)
    assert ladder.flags("rung1:n_heads=4,lr=1e-3", known)[:2] == ["--lr", "1e-3"]
    with pytest.raises(train.Problem, match="--variants rung7: choose from rung1"):
        ladder.flags("rung7", known)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_have_equal_cost_and_can_be_looked_at(known, name):
    assert ladder.trainer(f"{name}:lr=1e-3") == ("notebooks/lab/neighbours.py", name) and ladder.trainer("dit") == ("train.py",)
    parts, overrides = ladder.blocks_of(name), {**BASE, **known[name]}
    honest = ladder.honest_macs(train.SMALL_MODEL, parts=parts, **overrides)
    assert honest == pytest.approx(ladder.honest_macs(train.SMALL_MODEL), rel=0.03)
    model = dydilit.build_model(train.SMALL_MODEL, parts, **overrides).eval()
    blocks, routers = ladder.look_inside(model, train.shapes(20), n=20, shuffles=1)
    assert [line["block"] for line in blocks] == list(range(model.cfg.depth)) and routers == []
    assert all(-1 <= line["similarity_out"] <= 1 for line in blocks)
    assert sum(line["row_entropy"] != "" for line in blocks) == (3 if name == "pixart" else 0)      # its full attention


def test_lesson_11_says_what_the_ladder_trains(known):
    lesson, ours = (NOTEBOOKS / "12_the_neighbours.ipynb").read_text(), ladder.honest_macs(train.SMALL_MODEL)
    for label, name in [("PixArt-Sigma", "pixart"), ("EDiT", "edit"), ("DiG", "dig"), ("MoH-DiT", "moh"), ("LiT", "lit")]:
        fields, heads = known[name], known[name].get("n_heads", lit_heads(96) if name == "lit" else 1)
        change = 100 * (ladder.honest_macs(train.SMALL_MODEL, parts=NEIGHBOURS[name], **BASE, **fields) / ours - 1)
        line = f"| {label} | {fields['depth']} | {fields['dim']} | {heads} | {change:+.1f} % |".replace("-2", "−2")
        assert line in lesson


def test_lambda_held_at_0_is_rung_5_without_the_subtraction():
    overrides = dict(dydilit.LADDER[4][1], dim=16, depth=2, image_size=32, vae_factor=1)
    torch.manual_seed(0)
    rung5 = dydilit.build_model(train.SMALL_MODEL, **overrides)
    torch.manual_seed(0)
    held = dydilit.build_model(train.SMALL_MODEL, eq8.parts_with("lambda0-mass"), **overrides)
    before, after = rung5.state_dict(), held.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"blocks.{i}.attn.differential.lambdas" for i in range(2)}
    attn = held.blocks[0].attn
    x, other = features(2 * 9, 16).float().view(2, 9, 16), features(2 * 9, 16, 1).float().view(2, 9, 16)
    q, k = x.relu(), other.relu()
    torch.testing.assert_close(attn.differential(q, k, k, q, x), dydilit.linear_attention(q, k, x))      # divided by the mass
    held(torch.randn(4, held.cfg.in_channels, 32, 32), torch.arange(4), torch.arange(4)).sum().backward()
    assert all(b.attn.differential.lambdas.grad is None and not b.attn.differential.lambdas.any() for b in held.blocks)


def test_variants_of_eq_8_are_trained_by_a_script_of_their_own(known):
    script = "notebooks/lab/eq8.py"
    for variant, word in [("rung6:normalizer=none", "none"), ("lambda0:normalizer=none,lr=1e-3", "lambda0-none"),
                          ("lambda0", "lambda0-length"), ("rung5:normalizer=mass", "mass")]:
        assert ladder.trainer(variant) == (script, word)
        assert ladder.flags(variant, known)[-2:] == ladder.flags(variant.split(":")[0], known)[-2:]     # --set, without it
    with pytest.raises(train.Problem, match="normalizer=typo: choose the normalizer from none, length"):
        ladder.flags("rung6:normalizer=typo", known)
    with pytest.raises(ValueError, match="no token differential"):
        dydilit.build_model(train.SMALL_MODEL, ladder.blocks_of("dit:normalizer=none"), **known["dit"])


def test_the_form_length_is_the_librarys():
    x, t, outputs = torch.randn(2, 3, 32, 32), torch.tensor([10, 500]), []
    for parts in (dydilit.block_parts, eq8.parts_with("length")):
        torch.manual_seed(0)
        model = dydilit.build_model(train.SMALL_MODEL, parts, depth=1).eval()
        for p in (model.final_layer.linear.weight, model.blocks[0].adaLN_modulation[1].weight):     # they start at zero
            torch.nn.init.normal_(p, std=0.05)
        outputs.append(model(x, t, t * 0))
    assert torch.equal(*outputs) and outputs[0].any()


def test_held_out_loss_is_measured_as_in_training():
    data = train.shapes(20)
    plain, logs = ladder.held_out_losses(model := Constant(), data, batch=7)
    t = 300 + torch.randint(100, (20,), generator=torch.Generator().manual_seed(3))
    x, x_t, noise, y = eq8.noisy(data, t, seed=1003)
    want = dydilit.GaussianDiffusion().losses(model, x, y, t, noise)
    assert plain[3] == pytest.approx((0.5 * x_t - noise).square().mean().item(), rel=1e-5)
    assert logs[3] == pytest.approx(np.mean([math.log(loss) for loss in want["loss"]]), rel=1e-5)


class Constant(torch.nn.Module):
    """Predicts half of its input as the noise, and the smallest variance."""
    pos_embed = torch.zeros(1)

    def forward(self, x, t, y):
        return torch.cat([0.5 * x, -torch.ones_like(x)], 1)


def test_tables_take_lines_of_runs_with_more_or_fewer_measures(tmp_path):
    measures.save_log(tmp_path / "runs.csv", [dict(seed=0, FID=3), dict(seed=1, FID=4, recognized=0.5)])
    assert ladder.read(tmp_path / "runs.csv") == [dict(seed="0", FID="3", recognized=""),
                                                  dict(seed="1", FID="4", recognized="0.5")]


TINY = "dim=16,depth=2,batch_size=4"
CLIMB = [sys.executable, NOTEBOOKS / "lab/ladder.py", "--seeds", "1", "--steps", "2", "--samples", "20", "--sampling-steps", "2",
         "--workers", "2", "--out", "ladder", "--variants", f"rung6:{TINY}", f"dit:{TINY}", "--network"]


def climb(tmp_path, network, *more):
    done = subprocess.run([*CLIMB, network, *more], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = {name: sorted(ladder.read(tmp_path / "ladder" / f"{name}.csv"), key=str)
              for name in ("runs", "blocks", "routers", "real")}
    return done.stdout, tables


@pytest.mark.slow
def test_ladder_of_notebook_10_runs_resumes_and_repeats_itself(tmp_path, network):
    process = subprocess.Popen([*CLIMB, network, "--seeds", "5"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 600                            # a busy machine needs a minute
    while not (started := list(tmp_path.rglob("checkpoint.pt"))):
        assert process.poll() is None, process.stderr.read()
        assert time.time() < deadline
        time.sleep(0.1)
    process.terminate()
    says = process.communicate(timeout=300)[1]
    assert process.returncode == 1 and says.endswith("ladder.py: stopped; the same command goes on from here\n")
    for path in started:
        with train.claimed(path.parent):                    # what it had called has ended, too
            pass
    says, first = climb(tmp_path, network)
    assert "0 runs are in" in says and "2 are to do" in says
    assert len(first["runs"]) == 2 and len(first["blocks"]) == 4 and len(first["routers"]) == 2 * 8
    for line in first["runs"]:
        assert 0.5 < float(line["held_out_loss"]) < 2 and float(line["cfg1_FID"]) > 0 and line["images"] == "8"
        bands = [float(line[f"band{b}"]) for b in range(ladder.BANDS)]
        assert float(line["held_out_loss"]) == pytest.approx(np.mean(bands), rel=1e-4)
        logs = [float(line[f"log_band{b}"]) for b in range(ladder.BANDS)]
        assert float(line["held_out_log"]) == pytest.approx(np.mean(logs), abs=1e-4)
        assert float(line["cfg2_KID"]) and float(line["cfg4_FID"]) > 0 and line["commit"] == ladder.commit()
    for line in first["routers"]:
        assert 1 <= float(line["perplexity"]) <= int(line["choices"]) and 0 <= float(line["shuffles_as_high"]) <= 1
        assert 1 <= int(line["favourites"]) <= 10 and 1 <= float(line["favourites_shuffled"]) <= 10
        start = {"projection": None, "kernel": 3, "differential": 0.01}[line["router"].split(".")[0]]       # of two steps
        assert line["value"] == "" if start is None else float(line["value"]) == pytest.approx(start, abs=0.01)
    assert [(line["data"], line["samples"]) for line in first["real"]] == [("shapes", "20")]
    assert 0 < float(first["real"][0]["FID"]) < min(float(line["cfg1_FID"]) for line in first["runs"])
    says, again = climb(tmp_path, network)
    assert "2 runs are in" in says and "0 are to do" in says and again == first
    measures.save_log(tmp_path / "ladder" / "runs.csv", [line for line in first["runs"] if "dit" in line["variant"]])
    measures.save_log(tmp_path / "ladder" / "blocks.csv", [line for line in first["blocks"] if "dit" in line["variant"]])
    (tmp_path / "ladder" / "routers.csv").unlink()
    _, again = climb(tmp_path, network)
    for name in first:                                      # a line that is made anew is the same line
        assert [{k: v for k, v in line.items() if "seconds" not in k} for line in again[name]] == \
            [{k: v for k, v in line.items() if "seconds" not in k} for line in first[name]]


@pytest.mark.slow
def test_ladder_of_notebook_11_trains_and_samples_a_neighbour(tmp_path, network):
    _, tables = climb(tmp_path, network, "--variants", f"edit:{TINY}")
    (line,) = tables["runs"]
    assert line["dim"] == "16" and line["held_out_log"] and line["cfg2_KID"] and len(tables["blocks"]) == 2
    run = next((tmp_path / "ladder").rglob("checkpoint.pt")).parent
    command = [sys.executable, NOTEBOOKS / "lab/neighbours.py"]
    told = [subprocess.run([*command, *words], capture_output=True, text=True) for words in (
        ["dig", "sample", "--run", run], ["dit"])]                          # another system's weights, and no neighbour
    assert "checkpoint.pt: not a model of train.py" in told[0].stderr and told[0].stderr.startswith("neighbours.py: ")
    assert told[1].stderr == "neighbours.py: the first word must be one of pixart, edit, dig, moh, lit\n"
