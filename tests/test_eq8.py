"""Forms of Eq. 8, whether attention is used, the rule, and the model that is shipped."""
import math

import numpy as np
import pytest
import torch

import dydilit
import train
from lab import eq8
from lab.execute import HERE

SHIPPED = HERE / "results" / "shapes" / "model.pt"


def build(parts, **fields):
    """A small model with random weights in all places, the same for all forms."""
    torch.manual_seed(0)
    model = dydilit.build_model(train.SMALL_MODEL, parts, dim=32, depth=2, **fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def small():
    return build(dydilit.block_parts), eq8.held_out_images("shapes", None, 20)


def test_the_form_length_is_the_librarys(small):
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([10, 500])
    out = small[0](x, t, t * 0)
    assert torch.equal(build(eq8.parts_with("length"))(x, t, t * 0), out)
    assert not torch.allclose(build(eq8.parts_with("mass"))(x, t, t * 0), out, rtol=0.01)


def test_lambda_held_at_0_leaves_plain_attention():
    model = build(eq8.parts_with("lambda0-mass"))
    differential = model.blocks[1].attn.differential
    q, q_red, k, k_red, v = torch.rand(5, 2, 9, 32)
    out, want = differential(q, q_red, k, k_red, v), dydilit.linear_attention(q, k, v)
    torch.testing.assert_close(out, want)
    assert not differential.lambdas.any() and not differential.lambdas.requires_grad
    with pytest.raises(ValueError, match="no token differential"):
        build(eq8.parts_with("mass"), attention="softmax")


def test_permuted_keys_bring_other_tokens_values_in_each_picture():
    q, q_red, k, k_red, v = torch.rand(5, 3, 16, 4)
    new = eq8.permuted((q, q_red, k, k_red, v, 1))
    assert new[0] is q and new[1] is q_red and new[4] is v and new[5] == 1
    orders = [[int((new[2][b, j] == k[b]).all(-1).nonzero()) for j in range(16)] for b in range(3)]
    for b, order in enumerate(orders):
        assert sorted(order) == list(range(16)) and order != list(range(16))
        assert torch.equal(new[3][b], k_red[b, order])      # a key keeps its redundancy
    assert orders[0] != orders[1]


def test_use_measures_lengths_zeros_and_what_the_loss_costs(small):
    model, data = small
    assert len(data.images) == 20 and (data.images != train.shapes(20).images).any()    # unseen
    seen = []
    hook = model.blocks[1].attn.differential.register_forward_hook(lambda *args: seen.append(args))
    found = eq8.use(model, data)
    hook.remove()
    _, (q, _, k, _, v, *_), out = seen[0]
    size = out.norm(dim=-1).mean() / v.norm(dim=-1).mean()
    assert found["size_2"] == pytest.approx(size.item())
    for name, z in ("zero_q_2", q), ("zero_k_2", k):
        assert found[name] == pytest.approx((z == 0).all(-1).float().mean().item())
    mean, zero = (eq8.WITHOUT[way][1](None, None, out) for way in ("mean", "zero"))
    torch.testing.assert_close(mean[:, 5], out.sum(dim=1) / out.shape[1])
    assert mean.shape == zero.shape == out.shape and not zero.any()
    assert len({found[f"log_{way}"] for way in eq8.WITHOUT}) == 4
    t = torch.arange(0, 1000, 50)[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    x, noise, y = eq8.noisy(data, 20, seed=0)
    with torch.no_grad():
        losses = dydilit.GaussianDiffusion().losses(model, x, y, t, noise)
    assert found["log_whole"] == pytest.approx(losses["loss"].log().mean().item(), rel=1e-4)
    assert found["square_whole"] == pytest.approx(losses["simple"].mean().item(), rel=1e-4)
    assert found == eq8.use(model, data)                    # the hooks are gone, the noise repeats
    assert eq8.cost(dict(log_whole="-5", log_mean=math.log(2) - 5), "mean") == pytest.approx(1)


@pytest.mark.parametrize("sizes, growth, expected", [
    ([0.2, 0.2, 0.2, 0.0], 0.06, True), ([0.2, 0.2, 0.0, 0.0], 0.06, False),
    ([0.09, 0.2, 0.2, 0.09], 0.06, False), ([0.2, 0.2, 0.2, 0.2], 0.04, False)])
def test_alive_needs_three_long_outputs_and_keys_that_matter(sizes, growth, expected):
    row = {f"size_{b}": str(size) for b, size in enumerate(sizes, 1)}
    assert eq8.alive(row | dict(log_whole="-5", log_permuted=-5 + math.log1p(growth))) is expected


def test_intervals_are_students_with_one_degree_of_freedom():
    # Two numbers 2 apart have a standard error of 1, and the quantile of the tables is 12.7062.
    assert eq8.interval([1.0, 3.0]) == pytest.approx((2, 2 - 12.7062, 2 + 12.7062), rel=1e-5)


def test_the_plan_has_36_runs():
    runs = eq8.planned()
    assert len(runs) == len(set(runs)) == 36 and {steps for *_, steps in runs} == {1000}
    assert [(form, lr) for _, form, lr, _, _ in runs].count(("none", 0.004)) == 4


def test_the_shipped_model_samples_and_is_alive(tmp_path):
    model, about = dydilit.load_model(SHIPPED)
    assert about["step"] == train.KNOBS["steps"][0]
    assert not any("/" in str(about["knobs"][name]) for name in ("data", "data_dir"))
    assert eq8.alive(eq8.use(model, eq8.held_out_images("shapes", None, 40)))
    train.main(["sample", "--run", str(SHIPPED.parent), "--num", "10", "--steps", "5",
                "--sampler", "ddim", "--out", str(tmp_path / "s.npz")])
    images = np.load(tmp_path / "s.npz")["arr_0"]
    assert images.shape == (10, 32, 32, 3) and images.std() > 20
