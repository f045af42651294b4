"""The tasks that need attention: who can solve them, who cannot, and whether scores say so."""
import math
import zlib

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal
from torch.utils.flop_counter import FlopCounterMode

import dydilit
from lab import charts, recall, twins
from lab.neighbours import NEIGHBOURS, KVCompressedAttention


@pytest.mark.parametrize("task, least", [*zip(recall.PAIRS, (0.97, 1, 1))])
def test_whoever_knows_a_task_solves_it_and_a_constant_answer_does_not(task, least):
    tokens, values = recall.make_sets(task, 500, 16, torch.Generator())
    keys, shown, types = tokens.split([16, 16, 3], dim=-1)
    assert not shown[:, 16:].any() and torch.equal(shown[:, :16], F.one_hot(values, 16).float())
    assert (types.sum(dim=-1) == (task == "heterogeneity")).all()
    if task == "heterogeneity":
        keys = (keys.unsqueeze(-2) @ recall.rotations()[types.argmax(dim=-1)].mT).squeeze(-2)
    nearest = torch.cdist(keys[:, 16:], keys[:, :16]).argmin(dim=-1)
    assert (torch.take_along_dim(values, nearest, dim=1) == values).float().mean() >= least
    assert (F.one_hot(values, 16).float().mean(dim=(0, 1)) - 1 / 16).abs().max() < 0.015
    assert torch.equal(tokens, recall.make_sets(task, 500, 16, torch.Generator())[0])


def test_each_task_is_hard_in_its_own_way():
    made = [recall.make_sets(task, 3000, 4, torch.Generator())[0] for task in recall.PAIRS]
    near, common, turned = (tokens[..., :16] for tokens in made)
    # sharpness: noise of half the key's size, which the others lack
    assert near[:, :4].std() == pytest.approx(1, abs=0.01)
    assert (near[:, 4:] - near[:, :4]).std() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(common[:, 4:], common[:, :4])
    # interference: two keys of a set share a vector as long as themselves, those of two sets none
    assert (common[:, 0] * common[:, 1]).mean() == pytest.approx(1, abs=0.05)
    assert (common[1:, 0] * common[:-1, 1]).mean() == pytest.approx(0, abs=0.05)
    # heterogeneity: a pair and its query look alike only if they have one type, a third of them
    kind = made[2][..., 32:].argmax(dim=-1)
    same = kind[:, 0] == kind[:, 4]
    assert same.float().mean() == pytest.approx(1 / 3, abs=0.04)
    torch.testing.assert_close(turned[same, 0], turned[same, 4])
    assert (turned[~same, 0] * turned[~same, 4]).mean().abs() < 0.2


@pytest.mark.parametrize("arm, kernel, weights", [
    ("Sana", F.relu, lambda a: F.normalize(a, p=1, dim=-1)),
    ("ReLU", F.relu, lambda a: a / 20),
    ("softmax, 4 heads", lambda z: z, lambda a: (a / 8 ** 0.5).softmax(-1)),
    ("fixed power", lambda z: dydilit.focused_kernel(z, 3), lambda a: a / 20),
    ("routed", lambda z: z, lambda a: a / 20)])
def test_plain_arms_by_hand(arm, kernel, weights):
    attention, x = recall.Model(arm, 0).attention, torch.randn(2, 20, 32)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    if arm == "routed":
        q, k = attention.kernel(*attention.projection(x))
    q, k, v = (z.unflatten(2, (4 if "heads" in arm else 1, -1)).transpose(1, 2) for z in (q, k, v))
    out = (weights(kernel(q) @ kernel(k).mT) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.proj(out))


def test_arms_differ_as_they_should():
    def learn(arm):
        parameters = recall.Model(arm, 0).attention.named_parameters()
        return {name for name, parameter in parameters if parameter.requires_grad}

    def macs(arm):
        with FlopCounterMode(display=False) as counter:
            recall.Model(arm, 0).attention(torch.randn(1, 32, 32))
        return counter.get_total_flops()
    lambdas = {"differential.lambdas"}
    assert learn("DyDiLA") - learn("lambda 0") == learn("RMS") - learn("RMS, lambda 0") == lambdas
    routers = {name for name in learn("routed") if "projection.router" in name}
    assert learn("routed") - learn("random routes") == routers and len(routers) >= 2
    assert not any("dwc" in name for name in learn("DyDiLA"))
    assert len(recall.Model("one power", 0).attention.kernel.gammas) == 1
    assert macs("dynamic, equal cost") == pytest.approx(macs("DyDiLA"), rel=0.01)


def test_differentials_by_hand():
    q, _, k, _, v = sets = torch.randn(5, 2, 9, 32)
    names = "RMS", "lambda 0", "ReLU differential", "adding"
    rms, held, relu, adding = (recall.Model(name, 0).attention for name in names)
    sizes = rms.differential(*sets).square().mean(dim=-1)
    torch.testing.assert_close(sizes, torch.ones(2, 9), rtol=1e-3, atol=0)
    torch.testing.assert_close(held.differential(*sets), q @ k.mT @ v / 9)
    assert all(map(torch.equal, relu.kernel(q, k), (q.relu(), k.relu())))
    adding.differential.parametrizations.lambdas.original.data.normal_()
    assert (adding.differential.lambdas < 0).all()


def test_a_shuffled_attention_cannot_use_places():
    x = torch.randn(500, 16, 2)
    places = (recall.Shuffled(lambda x: x + torch.arange(16).view(1, 16, 1))(x) - x)[..., 0]
    torch.testing.assert_close(places.sort(dim=1).values, torch.arange(16.0).expand(500, 16))
    assert places.mean(dim=0).std() < 0.5                   # every token comes to every place
    for name in NEIGHBOURS:
        attention = recall.Model(name, 0).attention
        assert isinstance(attention, recall.Shuffled) and attention(torch.randn(1, 16, 32)).any()
        assert isinstance(attention.attention, KVCompressedAttention) == (name == "pixart")


def test_arms_share_the_initial_values_that_they_have_in_common():
    states = {arm: recall.Model(arm, 3).state_dict() for arm in recall.ARMS}
    mine, other = states["DyDiLA"], recall.Model("DyDiLA", 4).state_dict()
    for name in "embed.weight", "head.weight", "attention.qkv.weight":
        found = (state.get(name, torch.empty(0)) for state in states.values())
        alike = [weight for weight in found if weight.shape == mine[name].shape]
        assert len(alike) > 10 and all(torch.equal(weight, mine[name]) for weight in alike)
    bank = "attention.projection.weight_q"
    assert torch.equal(states["one projector"][bank], mine[bank][:1])
    torch.manual_seed(zlib.crc32(f"3 {bank}".encode()))
    for matrix in mine[bank]:
        assert torch.equal(nn.init.xavier_uniform_(torch.empty(32, 32)), matrix)
    assert not any(torch.equal(mine[name], other[name]) for name in (bank, "head.bias"))


def test_three_steps_of_training_by_hand():
    model, sets = recall.Model("ReLU", 5), torch.Generator().manual_seed(5)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(3):
        tokens, values = recall.make_sets("interference", 32, 8, sets)
        x = tokens @ model.embed.weight.T
        x = x + model.attention(F.layer_norm(x, (32,)))
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 3)
        optimizer.zero_grad()
        F.cross_entropy(model.head(x[:, 8:]).flatten(0, 1), values.flatten()).backward()
        optimizer.step()
    found = recall.train_model("interference", "ReLU", 5, 0.02, steps=3)
    torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=1e-3, atol=1e-5)


def test_accuracy_counts_right_answers_on_unseen_sets():
    sets = torch.Generator().manual_seed(10 ** 6 + 7)
    unseen, values = recall.make_sets("interference", 256, 4, sets)
    half = F.one_hot((values + torch.tensor([0, 0, 1, 1])) % 16, 16)        # the first two right
    found = recall.accuracy(lambda tokens: half * torch.equal(tokens, unseen), "interference", 7, 4)
    assert found == 0.5


def test_weight_on_target_is_read_off_the_map():
    model = recall.Model("signed", 0)
    tokens, _ = recall.make_sets("sharpness", 256, 16, torch.Generator().manual_seed(10 ** 6))
    q, k, _ = model.attention.qkv(model.norm(model.embed(tokens))).chunk(3, dim=-1)
    weights = (q @ k.mT)[:, 16:].abs()
    want = (weights[:, :, :16].diagonal(dim1=1, dim2=2) / weights.sum(dim=-1)).mean().item()
    assert recall.weight_on_target(model, "sharpness", 0) == pytest.approx(want, rel=1e-4)
    for arm in "no attention", "softmax, 4 heads":
        assert math.isnan(recall.weight_on_target(recall.Model(arm, 0), "sharpness", 0))


def test_every_texture_occurs_twice_and_couples_agree_everywhere():
    x, twin = twins.make_twins(20, torch.Generator())
    assert set(x.unique().tolist()) == {-1.0, 1.0} and abs(x.mean()) < 0.02
    assert len(twin.unique(dim=0)) == 20 and ((twin >= 8) == (torch.arange(16) < 8)).all()
    tiles = twins.to_tiles(x)
    assert torch.equal(tiles[:, 5], x[:, :, 4:8, 4:8]) and torch.equal(twins.to_picture(tiles), x)
    assert torch.equal(twins.swapped(x, twin), x)
    strips = torch.stack(charts.paired_tiles(x[0]))
    assert torch.equal(strips[..., :4], strips[..., 5:9]) and (strips[..., 10:] == 1).all()


def test_the_bounds_are_bayes_rule():
    (x, twin), t = twins.make_twins(2, torch.Generator()), torch.tensor([100, 400])
    x_t = twins.PROCESS.q_sample(x, t, torch.randn(x.shape))
    a, s = (twins.PROCESS._at(name, t) for name in ("sqrt_alpha_bar", "sqrt_one_minus"))
    sights = [x_t], [x_t, twins.swapped(x_t, twin)]
    for found, seen in zip(twins.best_denoisers(x_t, twin, t), sights):
        odds = sum(Normal(a, s).log_prob(z) - Normal(-a, s).log_prob(z) for z in seen)
        torch.testing.assert_close(found, 2 * odds.sigmoid() - 1, rtol=1e-3, atol=1e-4)


def test_the_score_is_0_with_one_twin_and_1_with_both(monkeypatch):
    seen, best, denoiser = [], twins.best_denoisers, twins.Denoiser("DiT", 0)
    monkeypatch.setattr(twins, "best_denoisers", lambda *x: seen.append(best(*x)) or seen[-1])
    for sights in 0, 1:
        denoiser.half_logit = lambda x_t, t: seen[-1][sights].clamp(-1 + 1e-6, 1 - 1e-6).atanh()
        assert twins.score(denoiser, 0, n=8) == pytest.approx(sights, abs=1e-3)


def test_two_steps_of_a_denoiser_by_hand():
    denoiser, random = twins.Denoiser("Sana", 2), torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(denoiser.parameters())
    for rate in 0.008 * 0.01, 0.008 * 0.02 * 0.5:               # rises for 100 steps, falls to 0
        x, _ = twins.make_twins(16, random)
        t = (1000 * torch.rand(16, generator=random).square()).long()
        x_t = twins.PROCESS.q_sample(x, t, torch.randn(x.shape, generator=random))
        chance = torch.sigmoid(2 * denoiser.half_logit(x_t, t))             # of a pixel being +1
        optimizer.zero_grad()
        F.binary_cross_entropy(chance, (x + 1) / 2).backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    found = twins.train_model("Sana", 2, steps=2)
    torch.testing.assert_close(found.state_dict(), denoiser.state_dict(), rtol=1e-3, atol=1e-6)


def test_samples_of_whoever_knows_the_picture_are_that_picture():
    (x, _), denoiser = twins.make_twins(8, torch.Generator()), twins.Denoiser("DiT", 0)
    denoiser.half_logit = lambda x_t, t: 9 * x
    torch.testing.assert_close(twins.sample(denoiser, n=8), x, rtol=0, atol=0.02)
