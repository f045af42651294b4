"""The tasks that need attention: who can solve them, who cannot, and whether scores say so."""
import math
import zlib

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import dydilit
from lab import charts, recall, twins
from lab.neighbours import NEIGHBOURS, KVCompressedAttention

TASKS = list(recall.PAIRS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def oracle(task, tokens):
    """Each query's value by whoever knows how the task was made. tokens: of make_sets."""
    keys, values, types = tokens.split([16, 16, 3], dim=-1)
    if task == "heterogeneity":
        keys = (keys.unsqueeze(-2) @ recall.rotations()[types.argmax(dim=-1)].mT).squeeze(-2)
    pairs = tokens.shape[1] // 2
    nearest = torch.cdist(keys[:, pairs:], keys[:, :pairs]).argmin(dim=-1)
    return torch.take_along_dim(values[:, :pairs].argmax(dim=-1), nearest, dim=1)


# ---- The tasks --------------------------------------------------------------------------------

@pytest.mark.parametrize("task, least", [*zip(TASKS, (0.97, 1, 1))])
def test_an_oracle_solves_each_task_and_a_constant_answer_does_not(task, least):
    tokens, values = recall.make_sets(task, 500, 16, generator())
    assert tokens.shape == (500, 32, 35) and values.shape == (500, 16)
    assert (oracle(task, tokens) == values).float().mean() >= least
    assert (F.one_hot(values, 16).float().mean(dim=(0, 1)) - 1 / 16).abs().max() < 0.015
    shown, types = tokens[..., 16:32], tokens[..., 32:]
    assert not shown[:, 16:].any() and torch.equal(shown[:, :16], F.one_hot(values, 16).float())
    assert (types.sum(dim=-1) == (task == "heterogeneity")).all()
    assert torch.equal(tokens, recall.make_sets(task, 500, 16, generator())[0])


def test_each_task_is_hard_in_its_own_way():
    def cosine(a, b):
        return torch.cosine_similarity(a, b, dim=-1).mean().item()

    made = [recall.make_sets(task, 3000, 4, generator())[0] for task in TASKS]
    near, common, turned = (tokens[..., :16] for tokens in made)
    # sharpness: noise of half the key's size, which the others lack
    assert near[:, :4].std() == pytest.approx(1, abs=0.01)
    assert (near[:, 4:] - near[:, :4]).std() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(common[:, 4:], common[:, :4])
    # interference: two keys of a set share a vector as long as themselves, those of two sets none
    assert cosine(common[:, 0], common[:, 1]) == pytest.approx(0.5, abs=0.03)
    assert cosine(common[1:, 0], common[:-1, 1]) == pytest.approx(0, abs=0.03)
    # heterogeneity: a pair and its query look alike only if they have one type, a third of them
    kind = made[2][..., 32:].argmax(dim=-1)
    same = kind[:, 0] == kind[:, 4]
    assert same.float().mean() == pytest.approx(1 / 3, abs=0.04)
    torch.testing.assert_close(turned[same, 0], turned[same, 4])
    torch.testing.assert_close(turned[:, 0].norm(dim=-1), turned[:, 4].norm(dim=-1))
    for a, b in (0, 1), (0, 2), (1, 2):
        chosen = (kind[:, 0] == a) & (kind[:, 4] == b)
        assert cosine(turned[chosen, 0], turned[chosen, 4]) < 0.3


# ---- The arms ---------------------------------------------------------------------------------

def relu_map(q, k):
    return q.relu() @ k.relu().mT


def cube(z):                                # Eq. 5 with a power of 3
    z = z.relu()
    return z ** 3 * z.norm(dim=-1, keepdim=True) / (z ** 3).norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("arm, want", [
    ("Sana", lambda a, q, k: relu_map(q, k) / relu_map(q, k).sum(-1, keepdim=True)),
    ("ReLU", lambda a, q, k: relu_map(q, k) / 20),
    ("signed", lambda a, q, k: q @ k.mT / 20),
    ("softmax", lambda a, q, k: (q @ k.mT / 32 ** 0.5).softmax(-1)),
    ("softmax, 4 heads", lambda a, q, k: (q @ k.mT / 8 ** 0.5).softmax(-1)),
    ("fixed power", lambda a, q, k: cube(q) @ cube(k).mT / 20),
    ("dynamic", lambda a, q, k: a.kernel(q, k)[0] @ a.kernel(q, k)[1].mT / 20),
    ("routed", lambda a, q, k: a.kernel(q, k)[0] @ a.kernel(q, k)[1].mT / 20)])
def test_plain_arms_by_hand(arm, want):
    attention, x = recall.Model(arm, 0).attention, torch.randn(2, 20, 32)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    if arm == "routed":
        q, k = attention.projection(x)
    q, k, v = (z.unflatten(2, (4 if "heads" in arm else 1, -1)).transpose(1, 2) for z in (q, k, v))
    out = (want(attention, q, k) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.proj(out))


def trained(arm):
    """An arm's parameters before and after a large step."""
    attention = recall.Model(arm, 0).attention
    before = {name: value.detach().clone() for name, value in attention.named_parameters()}
    optimizer = torch.optim.Adam(attention.parameters(), 0.5)
    attention(torch.randn(4, 16, 32)).square().sum().backward()
    optimizer.step()
    return attention, {name: bool((before[name] != value).any())
                       for name, value in attention.named_parameters()}


def test_controls_hold_what_they_should():
    for arm, learns in ("DyDiLA", True), ("lambda 0", False), ("RMS, lambda 0", False):
        attention, changed = trained(arm)
        assert changed["differential.lambdas"] == learns == attention.differential.lambdas.any()
        assert attention.dwc is None
    attention, changed = trained("adding")
    assert any(changed[name] for name in changed if "lambdas" in name)
    assert (attention.differential.lambdas < 0).all()
    _, changed = trained("random routes")
    assert changed["projection.weight_q"] and changed["projection.weight_k"]
    assert not changed["projection.router_q.weight"] | changed["projection.router_k.weight"]
    assert trained("routed")[1]["projection.router_q.weight"]


def test_forms_and_kernels_of_the_differential():
    q, q_red, k, k_red, v = torch.rand(5, 2, 9, 32)
    rms = recall.Model("RMS", 0).attention.differential(q, q_red, k, k_red, v)
    torch.testing.assert_close(rms.square().mean(dim=-1), torch.ones(2, 9), rtol=1e-3, atol=0)
    held = recall.Model("lambda 0", 0).attention.differential(q, q_red, k, k_red, v)
    torch.testing.assert_close(held, q @ k.mT @ v / 9)
    kernel = recall.Model("ReLU differential", 0).attention.kernel
    assert all(map(torch.equal, kernel(q - 0.5, k - 0.5), ((q - 0.5).relu(), (k - 0.5).relu())))
    for bank, small, large in (("projection.weight_q", "one projector", "routed"),
                               ("kernel.gammas", "one power", "dynamic")):
        banks = [recall.Model(arm, 0).attention.get_parameter(bank) for arm in (small, large)]
        assert [len(bank) for bank in banks] == [1, 3 if small == "one projector" else 9]


def test_equal_cost_is_equal():
    def macs(arm):
        with FlopCounterMode(display=False) as counter:
            recall.Model(arm, 0).attention(torch.randn(1, 32, 32))
        return counter.get_total_flops()
    assert macs("dynamic, equal cost") == pytest.approx(macs("DyDiLA"), rel=0.01)


def test_a_shuffled_attention_cannot_use_places():
    class Places(nn.Module):
        def forward(self, x):
            return x + torch.arange(x.shape[1]).view(1, -1, 1)
    x, same = torch.randn(500, 16, 2), nn.Linear(2, 2)
    places = (recall.Shuffled(Places())(x) - x)[..., 0]
    torch.testing.assert_close(places.sort(dim=1).values, torch.arange(16.0).expand(500, 16))
    assert places.mean(dim=0).std() < 0.5                   # every token comes to every place
    torch.testing.assert_close(recall.Shuffled(same)(x), same(x))
    for name in NEIGHBOURS:
        attention = recall.Model(name, 0).attention
        assert isinstance(attention, recall.Shuffled) and attention(torch.randn(1, 16, 32)).any()
        assert isinstance(attention.attention, KVCompressedAttention) == (name == "pixart")


# ---- The model, its training and its measures -------------------------------------------------

def test_the_model_by_hand():
    model, tokens = recall.Model("ReLU", 0), torch.randn(2, 12, 35)
    x = tokens @ model.embed.weight.T
    x = x + model.attention(F.layer_norm(x, (32,)))
    torch.testing.assert_close(model(tokens), model.head(x[:, 6:]))


def test_arms_share_the_initial_values_that_they_have_in_common():
    models = {arm: recall.Model(arm, 3) for arm in recall.ARMS if arm != "dynamic, equal cost"}
    states = [model.state_dict() for model in models.values()]
    other = recall.Model("DyDiLA", 4).state_dict()
    assert not torch.equal(models["DyDiLA"].head.bias, other["head.bias"])
    for name in ("embed.weight", "head.weight", "attention.qkv.weight"):
        found = [state[name] for state in states if name in state]
        alike = [weight for weight in found if weight.shape == found[0].shape]
        assert len(alike) > 10 and all(torch.equal(weight, found[0]) for weight in alike)
        assert not torch.equal(found[0], other[name])
    three, one = (models[arm].attention.projection.weight_q for arm in ("DyDiLA", "one projector"))
    assert torch.equal(three[:1], one)
    torch.manual_seed(zlib.crc32(b"3 attention.projection.weight_q"))
    for matrix in three:
        assert torch.equal(nn.init.xavier_uniform_(torch.empty(32, 32)), matrix)


def test_three_steps_of_training_by_hand():
    model, sets = recall.Model("softmax", 5), generator(5)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(3):
        tokens, values = recall.make_sets("interference", 32, 8, sets)
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 3)
        optimizer.zero_grad()
        scores = model(tokens).log_softmax(dim=-1)
        (-scores[F.one_hot(values, 16).bool()].mean()).backward()
        optimizer.step()
    found = recall.train_model("interference", "softmax", 5, 0.02, steps=3)
    for a, b in zip(found.parameters(), model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_training_finds_the_pairs_with_softmax_and_not_without_attention():
    for arm, low, high in ("softmax", 0.9, 1), ("no attention", 0, 0.1):
        model = recall.train_model("interference", arm, 0, 0.01, 150)
        assert low <= recall.accuracy(model, "interference", 0, 8) <= high


def test_accuracy_counts_right_answers_on_unseen_sets():
    unseen, _ = recall.make_sets("interference", 256, 4, generator(10 ** 6 + 7))

    def half(tokens):               # knows the first half of the queries, and is wrong elsewhere
        assert torch.equal(tokens, unseen)
        answer = oracle("interference", tokens)
        answer[:, 2:] = (answer[:, 2:] + 1) % 16
        return F.one_hot(answer, 16)
    assert recall.accuracy(half, "interference", 7, 4) == 0.5


@pytest.mark.parametrize("arm, score", [("softmax", lambda a: (a / 32 ** 0.5).softmax(-1)),
                                        ("signed", lambda a: a.abs())])
def test_weight_on_target_is_read_off_the_map(arm, score):
    model = recall.Model(arm, 0)
    tokens, _ = recall.make_sets("sharpness", 256, 16, generator(10 ** 6))
    q, k, _ = model.attention.qkv(model.norm(model.embed(tokens))).chunk(3, dim=-1)
    weights = score(q @ k.mT)[:, 16:]
    want = (weights[:, :, :16].diagonal(dim1=1, dim2=2) / weights.sum(dim=-1)).mean().item()
    assert recall.weight_on_target(model, "sharpness", 0) == pytest.approx(want, rel=1e-4)
    for arm in ("no attention", "softmax, 4 heads"):
        assert math.isnan(recall.weight_on_target(recall.Model(arm, 0), "sharpness", 0))


# ---- Twins ------------------------------------------------------------------------------------

def test_every_texture_occurs_twice():
    x, twin = twins.make_twins(20, generator())
    assert x.shape == (20, 3, 16, 16) and set(x.unique().tolist()) == {-1.0, 1.0}
    assert abs(x.mean()) < 0.02 and len(twin.unique(dim=0)) == 20
    tiles = twins.to_tiles(x)
    assert torch.equal(tiles[:, 5], x[:, :, 4:8, 4:8]) and torch.equal(twins.to_picture(tiles), x)
    assert torch.equal(twins.swapped(x, twin), x)
    assert ((twin >= 8) == (torch.arange(16) < 8)).all()
    assert twins.agreement(x) == 1
    assert twins.agreement(torch.randn(200, 3, 16, 16)) == pytest.approx(0.625, abs=0.01)


@pytest.mark.parametrize("timestep", [100, 400])
def test_the_bounds_are_bayes_rule(timestep):
    x, twin = twins.make_twins(2, generator())
    t = torch.full((2,), timestep)
    x_t = twins.PROCESS.q_sample(x, t, torch.randn(x.shape, generator=generator(1)))
    a, s = twins.PROCESS.sqrt_alpha_bar[timestep], twins.PROCESS.sqrt_one_minus[timestep]
    one, other = (torch.distributions.Normal(a, s).log_prob(z.double())
                  - torch.distributions.Normal(-a, s).log_prob(z.double())
                  for z in (x_t, twins.swapped(x_t, twin)))         # what each sight says for +1
    for found, odds in zip(twins.best_denoisers(x_t, twin, t), (one, one + other)):
        torch.testing.assert_close(found.double(), 2 * odds.sigmoid() - 1, rtol=1e-3, atol=1e-4)


def test_the_score_is_0_with_one_twin_and_1_with_both(monkeypatch):
    seen, best, denoiser = [], twins.best_denoisers, twins.Denoiser("DiT", 0)
    monkeypatch.setattr(twins, "best_denoisers", lambda *x: seen.append(best(*x)) or seen[-1])
    for sights in 0, 1:
        denoiser.half_logit = lambda x_t, t: seen[-1][sights].clamp(-1 + 1e-6, 1 - 1e-6).atanh()
        assert twins.score(denoiser, 0, n=8) == pytest.approx(sights, abs=1e-3)
    assert torch.equal(torch.stack([x_t for x_t, *_ in seen[:4]]),
                       torch.stack([x_t for x_t, *_ in seen[4:]])) and len(seen) == 8


def test_two_steps_of_a_denoiser_by_hand():
    denoiser, random = twins.Denoiser("Sana", 2), generator(2)
    optimizer = torch.optim.Adam(denoiser.parameters())
    for rate in (0.008 * 0.01, 0.008 * 0.02 * 0.5):             # rises for 100 steps, falls to 0
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
    for a, b in zip(found.parameters(), denoiser.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_each_system_denoises_with_its_own_attention():
    t = torch.tensor([10, 900])
    attention = {arm: twins.Denoiser(arm, 0).model.blocks[0].attn for arm in twins.ARMS}
    assert twins.Denoiser("dynamic", 0).half_logit(torch.randn(2, 3, 16, 16), t).isfinite().all()
    assert isinstance(attention["no attention"], dydilit.Mlp)
    assert isinstance(attention["DiT"], dydilit.SoftmaxAttention)
    assert not attention["lambda 0"].differential.lambdas.any()
    assert attention["DyDiLA"].differential.lambdas.all() and attention["DyDiLA"].dwc
    assert attention["DyDiLA without convolution"].dwc is None


def test_samples_of_whoever_knows_the_picture_are_that_picture():
    x, _ = twins.make_twins(8, generator(5))
    denoiser = twins.Denoiser("DiT", 0)
    denoiser.half_logit = lambda x_t, t: 9 * x
    torch.testing.assert_close(twins.sample(denoiser, n=8), x, rtol=0, atol=0.02)


def test_couples_of_a_real_picture_agree_everywhere():
    picture = twins.make_twins(1, generator())[0][0]
    strips = torch.stack(charts.paired_tiles(picture))
    assert strips.shape == (8, 3, 4, 14)
    assert torch.equal(strips[..., :4], strips[..., 5:9]) and (strips[..., 10:] == 1).all()
    assert all((strips[..., :4] == tile).flatten(1).all(1).any()
               for tile in twins.to_tiles(picture[None])[0])
