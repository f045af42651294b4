"""The tasks that need attention: who can solve them, who cannot, and whether the scores say so."""
import pytest
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import dydilit
from lab import charts, experiment, recall, twins
from lab.neighbours import NEIGHBOURS


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def oracle(task, tokens):
    """Each query's value by whoever knows how the task was made. tokens: of make_sets."""
    keys, values, types = tokens.split([recall.KEY, recall.VALUES, recall.TYPES], dim=-1)
    if task == "heterogeneity":
        keys = (keys.unsqueeze(-2) @ recall.rotations()[types.argmax(dim=-1)].mT).squeeze(-2)
    pairs = tokens.shape[1] // 2
    nearest = torch.cdist(keys[:, pairs:], keys[:, :pairs]).argmin(dim=-1)
    return torch.take_along_dim(values[:, :pairs].argmax(dim=-1), nearest, dim=1)


@pytest.mark.parametrize("task, least", [("sharpness", 0.97), ("interference", 1), ("heterogeneity", 1)])
def test_an_oracle_solves_each_task_and_a_constant_answer_does_not(task, least):
    tokens, values = recall.make_sets(task, 500, recall.PAIRS[task], generator())
    assert tokens.shape == (500, 2 * recall.PAIRS[task], 35) and values.shape == tokens.shape[:1] + (recall.PAIRS[task],)
    assert (oracle(task, tokens) == values).float().mean() >= least
    for answer in range(16):
        assert (values == answer).float().mean() == pytest.approx(1 / 16, abs=0.015)


def test_queries_show_no_value_and_pairs_show_theirs():
    tokens, values = recall.make_sets("sharpness", 50, 4, generator())
    shown = tokens[..., recall.KEY:recall.KEY + recall.VALUES]
    assert not shown[:, 4:].any() and (shown[:, :4].sum(dim=-1) == 1).all()
    assert (shown[:, :4].argmax(dim=-1) == values).all()


def test_each_task_is_hard_in_its_own_way():
    keys = {task: recall.make_sets(task, 2000, 4, generator())[0][..., :16] for task in recall.PAIRS}
    # sharpness: noise of half the key's size; the others have none
    assert (keys["sharpness"][:, 4:] - keys["sharpness"][:, :4]).std() == pytest.approx(0.5, abs=0.01)
    assert (keys["interference"][:, 4:] == keys["interference"][:, :4]).all()
    # interference: two keys of a set share a vector as long as themselves, those of two sets do not
    def cosine(a, b):
        return torch.cosine_similarity(a, b, dim=-1).mean().item()
    a = keys["interference"]
    assert cosine(a[:, 0], a[:, 1]) == pytest.approx(0.5, abs=0.03)
    assert cosine(a[1:, 0], a[:-1, 1]) == pytest.approx(0, abs=0.03)
    # heterogeneity: a pair and its query look alike only if they have one type
    tokens, _ = recall.make_sets("heterogeneity", 2000, 4, generator())
    same = (tokens[:, 0, 32:] == tokens[:, 4, 32:]).all(dim=-1)
    assert same.float().mean() == pytest.approx(1 / 3, abs=0.04)
    torch.testing.assert_close(tokens[same, 0, :16], tokens[same, 4, :16])
    assert cosine(tokens[~same, 0, :16], tokens[~same, 4, :16]) < 0.3
    torch.testing.assert_close(recall.rotations() @ recall.rotations().mT, torch.eye(16).expand(3, 16, 16))


def test_accuracy_counts_right_answers():
    class Oracle(nn.Module):
        def forward(self, tokens):
            return torch.nn.functional.one_hot(oracle("interference", tokens), 16)
    assert recall.accuracy(Oracle(), "interference", 0, 8) == 1
    silent = recall.Model("no attention", 0)
    assert recall.accuracy(silent, "interference", 0, 8) == pytest.approx(1 / 16, abs=0.02)


def test_arms_share_the_initial_values_that_they_have_in_common():
    states = {arm: recall.Model(arm, 3).state_dict() for arm in recall.ARMS if arm not in NEIGHBOURS}
    for name in ("embed.weight", "head.weight", "attention.qkv.weight", "attention.proj.weight"):
        found = [state[name] for arm, state in states.items() if name in state and arm != "dynamic, equal cost"]
        assert len(found) > 10 and all((weight == found[0]).all() for weight in found if weight.shape == found[0].shape)
    three, one = states["DyDiLA"], states["one projector"]
    assert (three["attention.projection.weight_q"][0] == one["attention.projection.weight_q"][0]).all()
    assert not (three["embed.weight"] == recall.Model("DyDiLA", 4).state_dict()["embed.weight"]).all()


def test_equal_cost_is_equal():
    macs = {}
    for arm in ("DyDiLA", "dynamic, equal cost"):
        with FlopCounterMode(display=False) as counter:
            recall.Model(arm, 0).attention(torch.randn(1, 32, 32))
        macs[arm] = counter.get_total_flops() / 2
    assert macs["dynamic, equal cost"] == pytest.approx(macs["DyDiLA"], rel=0.01)


@pytest.mark.parametrize("arm, trains", [("lambda 0", False), ("DyDiLA", True), ("adding", True)])
def test_a_differentials_factors(arm, trains):
    attention = recall.Model(arm, 0).attention
    before = attention.differential.lambdas.detach().clone()
    recall_step(arm, attention)
    after = attention.differential.lambdas.detach()
    assert (before != after).any() == trains
    assert (after == 0).all() == (arm == "lambda 0")
    if arm == "adding":
        assert (before < 0).all() and (after <= 0).all()


def recall_step(arm, attention):
    optimizer = torch.optim.Adam(attention.parameters(), 0.5)
    attention(torch.randn(4, 16, 32)).square().sum().backward()
    optimizer.step()


def test_random_routes_stay():
    attention = recall.Model("random routes", 0).attention
    before = attention.projection.router_q.weight.clone(), attention.projection.weight_q.clone()
    recall_step("random routes", attention)
    assert (attention.projection.router_q.weight == before[0]).all()
    assert (attention.projection.weight_q != before[1]).any()


@pytest.mark.parametrize("arm, want", [
    ("Sana", lambda q, k, v: (q.relu() @ k.relu().mT) / (q.relu() @ k.relu().mT).sum(-1, keepdim=True) @ v),
    ("ReLU", lambda q, k, v: q.relu() @ k.relu().mT @ v / 20),
    ("signed", lambda q, k, v: q @ k.mT @ v / 20),
    ("softmax", lambda q, k, v: (q @ k.mT / 32 ** 0.5).softmax(-1) @ v),
    ("fixed power", lambda q, k, v: dydilit.focused_kernel(q, 3) @ dydilit.focused_kernel(k, 3).mT @ v / 20)])
def test_plain_arms_by_hand(arm, want):
    attention, x = recall.Model(arm, 0).attention, torch.randn(2, 20, 32)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    torch.testing.assert_close(attention(x), attention.proj(want(q, k, v)))


def test_weight_on_target_is_read_off_the_map():
    model, pairs = recall.Model("softmax", 0), recall.PAIRS["interference"]
    tokens, _ = recall.make_sets("interference", 256, pairs, generator(10 ** 6))
    q, k, _ = model.attention.qkv(model.norm(model.embed(tokens))).chunk(3, dim=-1)
    weights = (q @ k.mT / 32 ** 0.5).softmax(dim=-1)[:, pairs:, :pairs]
    want = weights.diagonal(dim1=1, dim2=2).mean().item()
    assert recall.weight_on_target(model, "interference", 0) == pytest.approx(want, rel=1e-4)


def test_training_finds_the_pairs_with_softmax_and_not_without_attention():
    assert recall.accuracy(recall.train_model("interference", "softmax", 0, 0.01, 150), "interference", 0, 8) > 0.9
    assert recall.accuracy(recall.train_model("interference", "no attention", 0, 0.01, 150), "interference", 0, 8) < 0.1


def test_a_shuffled_attention_cannot_use_places():
    class Places(nn.Module):
        def forward(self, x):
            return x + torch.arange(x.shape[1]).view(1, -1, 1)
    x = torch.randn(500, 16, 2)
    places = recall.Shuffled(Places())(x) - x
    torch.testing.assert_close(places.sort(dim=1).values[..., 0], torch.arange(16.0).expand(500, 16))
    assert places.mean(dim=0).std() < 0.5                   # every token comes to every place
    same = nn.Linear(2, 2)
    torch.testing.assert_close(recall.Shuffled(same)(x), same(x))


def test_the_best_rate_is_the_pilots():
    lines = [dict(task="sharpness", arm="x", seed=str(seed), rate=str(rate), accuracy_16=str(accuracy))
             for rate, accuracies in zip(experiment.RATES, [(0.5, 0.5), (0.2, 0.9), (0.4, 0.4)])
             for seed, accuracy in zip(experiment.PILOT_SEEDS, accuracies)]
    lines.append(dict(task="sharpness", arm="x", seed="0", rate=str(experiment.RATES[0]), accuracy_16="1.0"))
    assert experiment.best_rate(lines, "sharpness", "x") == experiment.RATES[1]
    with pytest.raises(SystemExit, match="pilot"):
        experiment.best_rate(lines[1:], "sharpness", "x")


# ---- Twins ------------------------------------------------------------------------------------

def test_every_texture_occurs_twice():
    x, twin = twins.make_twins(20, generator())
    assert x.shape == (20, 3, 16, 16) and set(x.unique().tolist()) == {-1.0, 1.0}
    assert (twins.to_picture(twins.to_tiles(x)) == x).all()
    tiles = twins.to_tiles(x)
    assert (tiles[:, 5] == x[:, :, 4:8, 4:8]).all()
    for i in range(16):
        assert (torch.take_along_dim(tiles, twin[:, i].view(-1, 1, 1, 1, 1), 1)[:, 0] == tiles[:, i]).all()
        assert ((twin[:, i] >= 8) == (i < 8)).all()
    assert twins.agreement(x) == 1
    assert twins.agreement(torch.randn(200, 3, 16, 16)) == pytest.approx(0.625, abs=0.01)


@pytest.mark.parametrize("timestep", [100, 400])
def test_the_bounds_are_bayes_rule(timestep):
    x, twin = twins.make_twins(2, generator())
    t = torch.full((2,), timestep)
    x_t = twins.PROCESS.q_sample(x, t, torch.randn(x.shape, generator=generator(1)))
    a, s = twins.PROCESS.sqrt_alpha_bar[timestep].item(), twins.PROCESS.sqrt_one_minus[timestep].item()

    def log_density(seen, pixel):
        return torch.distributions.Normal(a * pixel, s).log_prob(seen.double())
    one = torch.sigmoid(log_density(x_t, 1) - log_density(x_t, -1))
    other = twins.swapped(x_t, twin)
    both = torch.sigmoid(log_density(x_t, 1) + log_density(other, 1) - log_density(x_t, -1) - log_density(other, -1))
    for found, chance in zip(twins.best_denoisers(x_t, twin, t), (one, both)):
        torch.testing.assert_close(found.double(), 2 * chance - 1, rtol=1e-3, atol=1e-4)


class Knows(nn.Module):
    """Gives the half logit of the best denoiser with one twin or with both, and waits for its twin's numbers."""

    def __init__(self, both):
        super().__init__()
        self.both, self.makes = both, generator(10 ** 6)

    def half_logit(self, x_t, t):
        _, twin = twins.make_twins(len(x_t), self.makes)        # as score makes them
        torch.randn(x_t.shape, generator=self.makes)
        return torch.atanh(twins.best_denoisers(x_t.double(), twin, t)[self.both].clamp(-1 + 1e-12, 1 - 1e-12))


def test_the_score_is_0_with_one_twin_and_1_with_both():
    assert twins.score(Knows(0), 0, n=8) == pytest.approx(0, abs=1e-3)
    assert twins.score(Knows(1), 0, n=8) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("arm", twins.ARMS)
def test_a_denoiser_of_each_system_trains_and_samples(arm):
    denoiser = twins.train_model(arm, 0, steps=2)
    assert torch.isfinite(denoiser.half_logit(torch.randn(2, 3, 16, 16), torch.tensor([10, 900]))).all()
    assert twins.sample(denoiser, n=1).shape == (1, 3, 16, 16)


def test_samples_of_whoever_knows_the_picture_are_that_picture():
    x, _ = twins.make_twins(64, generator(5))
    denoiser = twins.Denoiser("DiT", 0)
    denoiser.half_logit = lambda x_t, t: 9 * x
    torch.testing.assert_close(twins.sample(denoiser), x, rtol=0, atol=0.02)


def test_couples_of_a_real_picture_agree_everywhere():
    picture = twins.make_twins(1, generator())[0][0]
    strips = charts.paired_tiles(picture)
    assert len(strips) == 8 and all(strip.shape == (3, 4, 14) for strip in strips)
    assert all((strip[:, :, :4] == strip[:, :, 5:9]).all() and (strip[:, :, 10:] == 1).all() for strip in strips)
    shown = torch.stack([strip[:, :, :4] for strip in strips])
    assert all((shown == tile).flatten(1).all(1).any() for tile in twins.to_tiles(picture[None])[0])
