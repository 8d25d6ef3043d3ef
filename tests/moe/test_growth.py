"""Growing an expert pool: what is kept, what is copied, what is drawn anew, and what is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repro.model import ModelConfig, Transformer
from repro.moe import MoE, RoutingError, TopK
from repro.moe.growth import NEW, Growth, allocate, grow, grow_state, utility

SMALL = ModelConfig(
    d_model=16, num_layers=2, num_heads=2, context=8, d_expert=8, num_experts=4, top_k=1, selection_bias=True
)
LARGE = replace(SMALL, num_experts=8)
LAYERS = ("blocks.0.ffn", "blocks.1.ffn")
RANDOM = Growth(experts="random", router="random")


def model(config: ModelConfig, seed: int = 0) -> Transformer:
    made = Transformer(config)
    made.init_weights(seed)
    return made


def trained(seed: int = 7) -> Transformer:
    """A small model whose weights and biases are no fresh initialisation."""
    made = model(SMALL, seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return made


def without_biases(of: Transformer) -> Transformer:
    """Twice the experts halve every softmax score, so a selection bias of the old size would weigh twice as much."""
    for layer in layers(of):
        layer.bias_E.zero_()
    return of


def layers(of: Transformer) -> list[MoE]:
    return [of.get_submodule(name) for name in LAYERS]


TOKENS = torch.arange(32).view(4, 8) * 7 % 256


def test_with_one_expert_a_token_copying_preserves_the_function_bit_for_bit():
    old, new = without_biases(trained()), model(LARGE)
    grow(old, new, Growth())
    assert torch.equal(new(TOKENS).logits_BSV, old(TOKENS).logits_BSV)


def test_with_two_experts_a_token_twins_displace_the_second_expert():
    """The facts' warning: renormalised top-2 picks both copies of the best expert, so the function changes."""
    old, new = without_biases(trained()), model(LARGE)
    grow(old, new, Growth())
    rule = TopK(2)
    assert not torch.allclose(new(TOKENS, rule).logits_BSV, old(TOKENS, rule).logits_BSV, atol=1e-3)
    expert_TK = new(TOKENS, rule).routers[0].routing.expert_N.view(-1, 2)
    assert torch.equal(expert_TK[:, 1], expert_TK[:, 0] + 4)


def test_everything_outside_the_pools_is_taken_over_and_old_experts_keep_their_places():
    old, new = trained(), model(LARGE)
    lineages = grow(old, new, RANDOM)
    assert set(lineages) == set(LAYERS)
    assert lineages[LAYERS[0]].tolist() == [0, 1, 2, 3, NEW, NEW, NEW, NEW]
    for name, tensor in old.state_dict().items():
        grown = new.state_dict()[name]
        assert torch.equal(grown if grown.shape == tensor.shape else grown[:4], tensor), name


def test_random_experts_are_those_of_the_larger_models_own_initialisation():
    new, fresh = model(LARGE, 3), model(LARGE, 3)
    grow(trained(), new, RANDOM)
    for grown, drawn in zip(layers(new), layers(fresh), strict=True):
        for leaf in ("router_ED", "w_up_EDF", "w_down_EFD"):
            assert torch.equal(getattr(grown, leaf)[4:], getattr(drawn, leaf)[4:])


def test_copied_experts_may_get_random_router_rows():
    new, fresh, old = model(LARGE, 3), model(LARGE, 3), trained()
    grow(old, new, Growth(router="random"))
    for grown, drawn, source in zip(layers(new), layers(fresh), layers(old), strict=True):
        assert torch.equal(grown.w_up_EDF[4:], source.w_up_EDF)
        assert torch.equal(grown.router_ED[4:], drawn.router_ED[4:])
        assert torch.equal(grown.router_ED[:4], source.router_ED)


def test_biases_are_copied_reset_and_disturbed_for_the_new_experts_alone():
    old = trained()
    kept, reset, disturbed = model(LARGE), model(LARGE), model(LARGE)
    grow(old, kept, Growth())
    grow(old, reset, Growth(reset_bias=True))
    grow(old, disturbed, Growth(bias_noise=1e-3), generator=torch.Generator().manual_seed(0))
    for source, a, b, c in zip(layers(old), layers(kept), layers(reset), layers(disturbed), strict=True):
        assert torch.equal(a.bias_E, torch.cat((source.bias_E, source.bias_E)))
        assert torch.equal(b.bias_E, torch.zeros(8))
        assert torch.equal(c.bias_E[:4], source.bias_E)
        noise = c.bias_E[4:] - source.bias_E
        assert 0 < noise.abs().max() <= 1e-3
        assert len(noise.unique()) == 4


def test_weight_noise_touches_copies_alone_at_its_relative_size():
    old, new = trained(), model(LARGE)
    grow(old, new, Growth(weight_noise=0.01), generator=torch.Generator().manual_seed(0))
    for source, grown in zip(layers(old), layers(new), strict=True):
        assert torch.equal(grown.w_up_EDF[:4], source.w_up_EDF)
        assert torch.equal(grown.router_ED[4:], source.router_ED)
        ratio = (grown.w_up_EDF[4:] - source.w_up_EDF).std() / source.w_up_EDF.std()
        assert ratio.item() == pytest.approx(0.01, rel=0.1)


def test_the_papers_allocation_at_32_experts():
    copies = allocate(Growth(allocation="utility"), 32, 32, torch.arange(32.0))
    times = [1 + count for count in copies]
    assert (times.count(4), times.count(3), times.count(1)) == (10, 1, 21)
    assert copies[22:] == [3] * 10
    assert copies[21] == 2


@given(st.integers(1, 40), st.data())
def test_allocation_deals_out_exactly_what_is_asked(experts, data):
    most = data.draw(st.integers(1, 4))
    new = data.draw(st.integers(0, most * experts))
    score_E = torch.tensor(data.draw(st.lists(st.floats(0, 10), min_size=experts, max_size=experts)))
    copies = allocate(Growth(allocation="utility", max_copies=most), experts, new, score_E)
    assert sum(copies) == new
    assert max(copies) <= most
    poorest = min((score_E[e].item() for e in range(experts) if copies[e]), default=float("inf"))
    assert all(copies[e] == most for e in range(experts) if score_E[e].item() > poorest)


def test_utility_scores():
    layer = layers(trained())[0]
    E = 4
    up, down = torch.zeros_like(layer.w_up_EDF), torch.zeros_like(layer.w_down_EFD)
    up[1, 0, 0], down[1, 0, 0], up[2, 0, 0] = 3.0, 4.0, 1.0
    # opposite gradients cancel in the mean
    swing = torch.zeros_like(up)
    swing[3] = 100.0
    batches = [{"w_up_EDF": up + swing, "w_down_EFD": down}, {"w_up_EDF": up - swing, "w_down_EFD": down}]
    assert utility(layer, batches, "grad2").tolist() == pytest.approx([0, 25, 1, 0])
    weight_E = torch.stack(
        [torch.cat((layer.w_up_EDF[e].flatten(), layer.w_down_EFD[e].flatten())).norm() for e in range(E)]
    ).detach()
    assert torch.allclose(utility(layer, [], "weight"), weight_E)
    assert torch.allclose(utility(layer, batches, "weight_grad"), weight_E * torch.tensor([0.0, 5, 1, 0]))
    # three weights whose gradient never swings count 1 each; one that swings around 0 counts nothing
    assert utility(layer, batches, "grad2_per_curvature").tolist() == pytest.approx([0, 2, 1, 0])
    assert utility(layer, batches, "least_grad2").tolist() == pytest.approx([0, -25, -1, 0])
    with pytest.raises(RoutingError, match="at least one batch"):
        utility(layer, [], "grad2")


def test_useful_experts_are_copied_more_often():
    old, new = trained(), model(LARGE)
    scores = {name: torch.tensor([0.0, 2.0, 9.0, 1.0]) for name in LAYERS}
    lineages = grow(old, new, Growth(allocation="utility"), scores=scores)
    assert lineages[LAYERS[0]].tolist() == [0, 1, 2, 3, 1, 2, 2, 2]
    assert torch.equal(layers(new)[0].w_down_EFD[5], layers(old)[0].w_down_EFD[2])


def test_optimizer_state_follows_the_lineage():
    lineages = {"blocks.0.ffn": torch.tensor([0, 1, 1, NEW])}
    value = torch.tensor([[1.0], [2.0]])
    assert grow_state("blocks.0.ffn.router_ED", value, lineages).tolist() == [[1.0], [2.0], [2.0], [0.0]]
    assert grow_state("blocks.0.attention.w_out_DD", value, lineages) is value
    assert grow_state("blocks.0.ffn.router_ED", torch.tensor(5.0), lineages).item() == 5.0  # the step count


@pytest.mark.parametrize(
    ("config", "growth", "message"),
    [
        (replace(SMALL, num_experts=2), Growth(), "a pool of 4 experts cannot shrink to 2"),
        (replace(SMALL, num_experts=2), RANDOM, "a pool of 4 experts cannot shrink to 2"),
        (replace(SMALL, num_experts=6), Growth(), "expected a multiple of 4"),
        (replace(SMALL, num_experts=20), Growth(allocation="utility"), "at most 3 copies each give no 16"),
        (LARGE, Growth(allocation="utility"), "a utility for each of 4 experts"),
        (replace(LARGE, d_expert=16), Growth(), "the experts differ in shape"),
        (replace(LARGE, num_layers=3), Growth(), "has no MoE layer blocks.2.ffn"),
        (replace(LARGE, selection_bias=False), Growth(bias_noise=1e-3), "need a model with a selection bias"),
    ],
)
def test_a_growth_that_cannot_be_is_refused(config, growth, message):
    scores = {name: torch.ones(4) for name in LAYERS} if "utility for each" not in message else None
    with pytest.raises(RoutingError, match=message):
        grow(trained(), model(config), growth, scores=scores)


def test_a_random_expert_has_no_router_row_to_copy():
    with pytest.raises(RoutingError, match="use router='random'"):
        Growth(experts="random")
