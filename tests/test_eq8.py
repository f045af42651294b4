"""Forms of Eq. 8, whether attention is used, and the model that is shipped."""
import math

import pytest
import torch

import dydilit
import train
from lab import eq8
from lab.execute import HERE


def build(parts, **fields):
    """A small model with random weights in all places, the same for all forms."""
    torch.manual_seed(0)
    model = dydilit.build_model(train.SMALL_MODEL, parts, dim=32, depth=2, **fields).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def test_the_form_length_is_the_librarys_and_lambda_can_be_held():
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([10, 500])
    out = build(dydilit.block_parts)(x, t, t * 0)
    assert torch.equal(build(eq8.parts_with("length"))(x, t, t * 0), out)
    assert not torch.allclose(build(eq8.parts_with("mass"))(x, t, t * 0), out, rtol=0.01)
    differential = build(eq8.parts_with("lambda0-mass")).blocks[1].attn.differential
    assert not differential.lambdas.any() and not differential.lambdas.requires_grad
    q, _, k, _, v = sets = torch.rand(5, 2, 9, 32)
    torch.testing.assert_close(differential(*sets), dydilit.linear_attention(q, k, v))
    with pytest.raises(ValueError, match="no token differential"):
        build(eq8.parts_with("mass"), attention="softmax")


def test_permuted_keys_bring_other_tokens_values_in_each_picture():
    q, q_red, k, k_red, v = torch.rand(5, 3, 16, 4)
    new = eq8.permuted((q, q_red, k, k_red, v, 1))
    assert new[0] is q and new[1] is q_red and new[4] is v and new[5] == 1
    orders = (new[2].unsqueeze(2) == k.unsqueeze(1)).all(-1).int().argmax(-1)       # (3, 16)
    assert (orders.sort(dim=1).values == torch.arange(16)).all() and len(orders.unique(dim=0)) == 3
    k_red = torch.take_along_dim(k_red, orders.unsqueeze(-1), dim=1)
    assert torch.equal(new[3], k_red)                       # a key keeps its redundancy


def test_use_measures_lengths_and_what_the_loss_costs():
    model, data, seen = build(dydilit.block_parts), eq8.held_out_images("shapes", None, 20), []
    assert len(data.images) == 20 and (data.images != train.shapes(20).images).any()    # unseen
    hook = model.blocks[1].attn.differential.register_forward_hook(lambda *args: seen.append(args))
    found = eq8.use(model, data)
    hook.remove()
    _, (_, _, _, _, v, *_), out = seen[0]
    size = out.norm(dim=-1).mean() / v.norm(dim=-1).mean()
    assert found["size_2"] == pytest.approx(size.item())
    mean, zero = (eq8.WITHOUT[way][1](None, None, out) for way in ("mean", "zero"))
    torch.testing.assert_close(mean[:, 5], out.sum(dim=1) / out.shape[1])
    assert mean.shape == zero.shape == out.shape and not zero.any()
    t = torch.arange(0, 1000, 50)[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    x, noise, y = eq8.noisy(data, 20, seed=0)
    losses = dydilit.GaussianDiffusion().losses(model, x, y, t, noise)
    assert found["log_whole"] == pytest.approx(losses["loss"].log().mean().item(), rel=1e-4)
    assert found["square_whole"] == pytest.approx(losses["simple"].mean().item(), rel=1e-4)
    assert len({found[f"log_{way}"] for way in eq8.WITHOUT}) == 4
    assert found == eq8.use(model, data)                    # the hooks are gone, the noise repeats


@pytest.mark.parametrize("sizes, growth, expected", [
    ([0.2, 0.2, 0.2, 0.0], 0.06, True), ([0.2, 0.2, 0.0, 0.0], 0.06, False),
    ([0.09, 0.2, 0.2, 0.09], 0.06, False), ([0.2, 0.2, 0.2, 0.2], 0.04, False)])
def test_alive_needs_three_long_outputs_and_keys_that_matter(sizes, growth, expected):
    row = {f"size_{b}": str(size) for b, size in enumerate(sizes, 1)}
    assert eq8.alive(row | dict(log_whole="-5", log_permuted=-5 + math.log1p(growth))) is expected


def test_the_shipped_model_is_alive():
    model, about = dydilit.load_model(HERE / "results/shapes/model.pt")
    assert about["step"] == train.KNOBS["steps"][0]
    assert not any("/" in str(about["knobs"][name]) for name in ("data", "data_dir"))
    assert eq8.alive(eq8.use(model, eq8.held_out_images("shapes", None, 40)))
