"""The measure of whether attention is used, the rule that chose the form of Eq. 8, and the model that is shipped."""
import itertools
import math

import numpy as np
import pytest
import torch

import dydilit
import train
from lab import eq8, ladder
from lab.execute import HERE

SHIPPED = HERE / "results" / "shapes" / "model.pt"


@pytest.fixture(scope="module")
def small():
    """A small model with random weights in all places, and 20 pictures."""
    torch.manual_seed(0)
    model = dydilit.build_model(train.SMALL_MODEL, dim=32, depth=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, eq8.held_out_images("shapes", None, 20)


def test_permuted_keys_bring_other_tokens_values_in_each_picture():
    q, q_red, k, k_red, v = torch.rand(5, 3, 16, 4)
    new = eq8.permuted((q, q_red, k, k_red, v, 1))
    assert torch.equal(new[0], q) and torch.equal(new[1], q_red) and torch.equal(new[4], v) and new[5] == 1
    orders = [[int((new[2][b, j] == k[b]).all(-1).nonzero()) for j in range(16)] for b in range(3)]
    for b, order in enumerate(orders):
        assert sorted(order) == list(range(16)) and order != list(range(16))
        assert torch.equal(new[3][b], k_red[b, order])      # a key keeps its redundancy
    assert orders[0] != orders[1]


def test_use_measures_lengths_zeros_and_what_the_loss_costs(small):
    model, data = small
    seen = []
    hook = model.blocks[1].attn.differential.register_forward_hook(lambda module, inputs, out: seen.append((inputs, out)))
    found = eq8.use(model, data)
    hook.remove()
    inputs, out = seen[0]
    assert found["size_2"] == pytest.approx((out.norm(dim=-1).mean() / inputs[4].norm(dim=-1).mean()).item())
    assert found["zero_q_2"] == pytest.approx((inputs[0] == 0).all(-1).float().mean().item())
    assert len({found[f"log_{way}"] for way in eq8.WITHOUT}) == 4 and found == eq8.use(model, data)     # and repeats
    bands = [found[f"square_whole_{low}"] for low, _ in itertools.pairwise(eq8.BANDS)]
    assert np.average(bands, weights=[2, 6, 6, 6]) == pytest.approx(found["square_whole"])


def test_an_attention_without_values_is_dead(small):
    model, data = small
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for block in model.blocks:
        block.attn.qkv.weight.data[-32:] *= 1e-6            # V
    found = eq8.use(model, data)
    model.load_state_dict(before)
    assert all(found[f"log_{way}"] == pytest.approx(found["log_whole"], abs=1e-5) for way in eq8.WITHOUT)
    assert not eq8.alive(found)


@pytest.mark.parametrize("sizes, growth, expected", [
    ([0.2, 0.2, 0.2, 0.0], 0.06, True), ([0.2, 0.2, 0.0, 0.0], 0.06, False), ([0.2, 0.2, 0.2, 0.2], 0.04, False)])
def test_alive_needs_three_long_outputs_and_keys_that_matter(sizes, growth, expected):
    row = {f"size_{b}": str(size) for b, size in enumerate(sizes, 1)}
    assert eq8.alive(dict(row, log_whole="-5", log_permuted=str(-5 + math.log1p(growth)))) is expected


def test_intervals_are_students_with_one_degree_of_freedom():
    mean, low, high = eq8.interval([1.0, 3.0])
    sd, quantile = 2 ** 0.5, math.tan(math.pi * 0.475)      # of Cauchy's distribution, which t with one degree is
    assert mean == 2 and [low, high] == pytest.approx([2 - quantile * sd / 2 ** 0.5, 2 + quantile * sd / 2 ** 0.5], rel=1e-4)


def test_the_shipped_model_samples_and_is_alive(tmp_path):
    model, about = dydilit.load_model(SHIPPED)
    assert about["step"] == train.KNOBS["steps"][0] and not any("/" in str(value) for value in (about["knobs"]["data"],
                                                                                            about["knobs"]["data_dir"]))
    assert eq8.alive(eq8.use(model, eq8.held_out_images("shapes", None, 100)))
    train.main(["sample", "--run", str(SHIPPED.parent), "--num", "10", "--steps", "10", "--sampler", "ddim",
                "--out", str(tmp_path / "s.npz")])
    images = np.load(tmp_path / "s.npz")["arr_0"]
    assert images.shape == (10, 32, 32, 3) and images.std() > 20
