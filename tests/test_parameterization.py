"""The table of exponents against the paper's, factors at given sizes, optimizer groups, and a stranger's own MoE."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from torch import nn

from records.errors import UsageError
from repro.accounting import accounting
from repro.coordinates import coordinates
from repro.data import corpus
from repro.data.batches import Batches, evaluation_windows
from repro.mlp import Mlp, make_model
from repro.model import ModelConfig, Transformer
from repro.moe import MoE
from repro.parameterization import ROLES, Power, Sizes, parameterize, scales, table, text
from repro.train import Mechanism, TrainConfig, make_optimizer, training_step

BASE = Sizes(d_model=64, d_expert=32, num_experts=8, top_k=4)
GROWN = {
    "I": Sizes(d_model=256, d_expert=128, num_experts=8, top_k=4),
    "II": Sizes(d_model=256, d_expert=32, num_experts=32, top_k=16),
    "III": Sizes(d_model=256, d_expert=128, num_experts=32, top_k=16),
}
RULES = [(rule, regime) for regime in GROWN for rule in ("sp", "mup", "mssp")]
TEXT_BASE = ModelConfig(
    d_model=32, num_layers=2, num_heads=2, context=16, d_expert=16, num_experts=4, top_k=2, qk_norm="head"
)
MLP_BASE = ModelConfig(
    kind="mlp", vocab_size=10, d_model=16, num_layers=1, num_heads=1, context=65, d_expert=8, num_experts=4, top_k=2
)


def column(rule, regime, optimizer, field):
    return {row.role: str(getattr(row, field)) for row in table(rule, regime, optimizer)}


# arXiv 2605.14200, as the authors' public code has it
@pytest.mark.parametrize(
    ("regime", "router", "up", "down"),
    [("I", "N^-1", "1", "1"), ("II", "N^-1·M", "N^-1·M", "N·M"), ("III", "1", "M", "M")],
)
def test_learning_rates_of_sgd(regime, router, up, down):
    for rule in ("mup", "mssp"):
        found = column(rule, regime, "sgd", "lr")
        assert found == {
            "embedding": "N", "router": router, "expert_up": up, "expert_down": down, "readout": "N^-1",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("regime", "router", "up", "down"),
    [("I", "1", "N^-1", "N^-1"), ("II", "M^-1", "M^-1", "N^-1·M^-1"), ("III", "M^-1", "N^-1·M^-1", "N^-1·M^-1")],
)
def test_learning_rates_and_eps_of_adam(regime, router, up, down):
    for rule in ("mup", "mssp"):
        eps, lr = column(rule, regime, "adam", "eps"), column(rule, regime, "adam", "lr")
        assert [eps[role] for role in ("router", "expert_up", "expert_down", "readout", "embedding")] == [
            router, up, down, "1", "N^-1",
        ]  # fmt: skip
        assert [lr[role] for role in ("router", "expert_up", "expert_down", "readout", "embedding", "gain")] == [
            "N^-1", "N^-1", "F^-1", "N^-1", "1", "1",
        ]  # fmt: skip


def test_mssp_differs_from_mup_in_one_place_a_regime():
    for optimizer in ("adam", "sgd"):
        changed = {
            regime: {
                row.role: (str(row.std), row.tied)
                for row, other in zip(table("mssp", regime, optimizer), table("mup", regime, optimizer), strict=True)
                if row != other
            }
            for regime in GROWN
        }
        assert changed == {
            "I": {"router": ("None", False)},
            "II": {"expert_down": ("F^-½·M^½", False)},
            "III": {"expert_up": ("N^-½", True), "expert_down": ("F^-½", True)},
        }


def test_factors_at_four_times_the_width():
    found = scales("mssp", regime="II", optimizer="sgd", sizes=GROWN["II"], base=BASE)
    down = found.scale("expert_down")
    assert (down.std, down.lr, down.decay, down.tied) == (2.0, 16.0, 1 / 16, False)
    assert (found.scale("embedding").lr, found.scale("readout").std, found.gate) == (4.0, 0.0, 0.25)
    adam = scales("mup", regime="III", sizes=GROWN["III"], base=BASE)
    assert (adam.scale("expert_up").lr, adam.scale("expert_up").eps, adam.scale("expert_down").std) == (
        1 / 4,
        1 / 16,
        1,
    )
    assert scales("mup", regime="I", sizes=GROWN["I"], base=BASE).gate == 1.0
    assert scales("mup", regime="I", sizes=GROWN["I"], base=BASE).scale("router").std == 0.5


@pytest.mark.parametrize(("rule", "regime"), RULES)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_at_the_base_every_factor_is_exactly_one(rule, regime, optimizer):
    found = scales(rule, regime=regime, optimizer=optimizer, sizes=BASE, base=BASE, zero_readout=False)
    for role, scale in found.by_role.items():
        zero_router = (rule, regime, role) == ("mssp", "I", "router")
        assert (scale.std, scale.lr, scale.eps, scale.decay) == (0.0 if zero_router else 1.0, 1.0, 1.0, 1.0)
    assert (found.gate, found.residual) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"regime": "IV"}, "expected a regime of I, II, III, found 'IV'"),
        ({"rule": "ntk"}, "expected a rule of sp, mup"),
        ({"optimizer": "muon"}, "expected a optimizer of adam, sgd, found 'muon'"),
        ({"rule": "tied", "regime": "I", "sizes": GROWN["I"]}, "wrong fix of regimes II and III"),
        ({"sizes": GROWN["I"]}, "expected d_expert of 32 at width 256 in regime II .fixed"),
        ({"sizes": replace(BASE, d_model=128)}, "expected num_experts of 16 at width 128 in regime II .grows"),
        ({"sizes": replace(GROWN["II"], num_layers=4), "optimizer": "sgd"}, "depth is scaled with adam"),
    ],
)
def test_bad_input_is_said(changes, why):
    settings = {"rule": "mssp", "regime": "II", "sizes": GROWN["II"], "base": BASE} | changes
    with pytest.raises(UsageError, match=why):
        scales(settings.pop("rule"), **settings)


def test_bad_sizes_and_heads_are_said():
    with pytest.raises(UsageError, match=r"K > M"):
        Sizes(d_model=64, d_expert=32, num_experts=4, top_k=8)
    for width, heads in ((40, 2), (64, 2)):  # heads of 20, and of 32, where the base's are of 16
        wide = replace(TEXT_BASE, d_model=width, num_heads=heads, d_expert=16)
        with pytest.raises(UsageError, match="multiple of the base's head size 16"):
            parameterize(wide, "mssp", regime="II", base=TEXT_BASE)
    with pytest.raises(UsageError, match="those that the table has a column for with this optimizer"):
        parameterize(TEXT_BASE, "mssp", regime="II", optimizer="sgd", base=TEXT_BASE)


def test_a_transformer_of_the_machine_starts_and_steps_as_the_table_says():
    sizes = {"d_model": 64, "num_heads": 4, "num_experts": 8, "top_k": 4, "num_layers": 8}
    config = parameterize(replace(TEXT_BASE, **sizes), "mssp", regime="II", base=TEXT_BASE)
    assert (config.gate_scale, config.residual_scale, config.score, config.renormalize) == (0.5, 0.25, "sigmoid", False)
    model, base = (make.requires_grad_(False) for make in (Transformer(config), Transformer(TEXT_BASE)))
    stds = {
        name: (p.std(), dict(base.named_parameters())[name].std())
        for name, p in model.named_parameters()
        if ".1." in name
    }
    # √2 for the boost; depth leaves the base's std, not (2L)^-½ of the deeper model
    assert stds["blocks.1.ffn.w_down_EFD"][0] / stds["blocks.1.ffn.w_down_EFD"][1] == pytest.approx(2**0.5, rel=0.03)
    assert stds["blocks.1.attention.w_out_DD"][0] / stds["blocks.1.attention.w_out_DD"][1] == pytest.approx(
        0.5**0.5, rel=0.05
    )
    assert not model.unembedding_VD.any()
    model.requires_grad_()
    train = TrainConfig(steps=1, batch=1, context=16, lr=1e-2, eps=1e-6, weight_decay=0.1)
    found = {
        name: group
        for group in make_optimizer(model, train).param_groups
        for name, p in model.named_parameters()
        if any(p is other for other in group["params"])
    }
    down, gain = found["blocks.0.ffn.w_down_EFD"], found["blocks.0.attention_norm.gain_D"]
    assert (down["lr"], down["lr_scale"], down["weight_decay"]) == (1e-2, 1.0, 0.1)  # constant in II
    assert down["eps"] == pytest.approx(1e-6 / 4 / 4)  # 1/(N·M), and 1/L
    up = found["blocks.0.ffn.w_up_EDF"]
    assert (up["lr"], up["weight_decay"]) == (0.5e-2, 0.2)
    assert gain["weight_decay"] == 0
    assert len(found) == len(dict(model.named_parameters()))


def test_every_weight_of_the_machine_has_a_role():
    for config in (TEXT_BASE, replace(TEXT_BASE, d_shared=8, dense_layers=1, d_dense=32), MLP_BASE):
        names = {name.rpartition(".")[2] for name, _ in make_model(config).named_parameters()}
        assert names <= set(ROLES)


def test_tied_experts_start_equal_and_part_at_the_first_step():
    config = parameterize(MLP_BASE, "mssp", regime="III", base=MLP_BASE)
    model = make_model(config)
    assert all(torch.equal(model.ffn.w_up_EDF[0], expert) for expert in model.ffn.w_up_EDF)
    assert all(torch.equal(model.ffn.w_down_EFD[0], expert) for expert in model.ffn.w_down_EFD)
    untied = make_model(parameterize(MLP_BASE, "mup", regime="III", base=MLP_BASE))
    assert torch.equal(model.ffn.w_up_EDF[0], untied.ffn.w_up_EDF[0])
    assert not torch.equal(untied.ffn.w_up_EDF[0], untied.ffn.w_up_EDF[1])
    text = corpus.load("classification")
    batches = Batches(data=text.train, batch=32, context=65, seed=0)
    train = TrainConfig(steps=2, batch=32, context=65, lr=1e-2, balance=0, weight_decay=0)
    optimizer = make_optimizer(model, train)
    for step in range(2):
        training_step(model, optimizer, train, *batches.at(step), Mechanism(), step, 0)
    assert not torch.equal(model.ffn.w_up_EDF[0], model.ffn.w_up_EDF[1])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_classifier_learns(optimizer):
    text = corpus.load("classification")
    model = make_model(MLP_BASE)
    assert isinstance(model, Mlp)
    assert sum(p.numel() for p in model.parameters()) == accounting(MLP_BASE).total
    train = TrainConfig(
        steps=40, batch=64, context=65, lr=1e-2 if optimizer == "adamw" else 1.5, balance=0, weight_decay=0,
        optimizer=optimizer,
    )  # fmt: skip
    found = make_optimizer(model, train)
    batches = Batches(data=text.train, batch=64, context=65, seed=0)
    losses = [
        float(training_step(model, found, train, *batches.at(step), Mechanism(), step, 0)[0]) for step in range(40)
    ]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.2
    tokens_BS, _ = batches.at(0)
    other_BS = tokens_BS.clone()
    other_BS[:, 0] = 9  # the class of the record before
    assert torch.equal(model(tokens_BS).logits_BSV, model(other_BS).logits_BSV)
    with pytest.raises(UsageError, match="expected records of 65 tokens, found 64"):
        model(tokens_BS[:, 1:])


def test_coordinates_add_up_and_leave_the_model_as_it_was():
    config = parameterize(MLP_BASE, "sp", regime="II", base=MLP_BASE)
    first, now = make_model(config), make_model(config)
    text = corpus.load("classification")
    windows = evaluation_windows(text.held_out, tokens=65 * 32, context=65)
    (start,) = coordinates(first, now, *windows)
    assert (start.propagating, start.effective, start.backward) == (0.0, 0.0, None)
    # the gradient at the input, by finite differences of the summed loss
    captured = nn.functional.gelu((windows[0][:, 1:].float() - 127.5) / ((256**2 - 1) / 12) ** 0.5 @ first.w_in_ID)
    x_TD = captured.detach().requires_grad_()
    logits = first.ffn(x_TD) @ first.unembedding_VD.t()
    nn.functional.cross_entropy(logits, windows[1][:, -1], reduction="sum").backward()
    assert start.gradient == pytest.approx(16 * float(x_TD.grad.square().mean().sqrt()), rel=1e-4)
    with torch.no_grad():
        for parameter in now.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    (found,) = coordinates(first, now, *windows)
    assert found.effective > 0
    assert found.propagating > 0
    assert found.backward is not None
    assert all(parameter.grad is None for parameter in now.parameters())
    assert "forward_with_router" not in vars(now.ffn)
    twice = make_model(config)
    with torch.no_grad():
        twice.ffn.w_down_EFD.mul_(2)  # W − W₀ = W₀: effective is init, and the ratio is one
    (doubled,) = coordinates(first, twice, *windows)
    assert doubled.effective == pytest.approx(doubled.init)
    assert doubled.backward == pytest.approx(1.0)
    assert doubled.propagating == 0.0


@torch.no_grad()
def test_coordinates_are_the_sums_that_the_paper_defines():
    config = parameterize(MLP_BASE, "mup", regime="II", base=replace(MLP_BASE, d_model=8, num_experts=2, top_k=1))
    first, now = make_model(config), make_model(config)
    for parameter in now.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    text = corpus.load("classification")
    tokens_BS, targets_BS = evaluation_windows(text.held_out, tokens=65 * 32, context=65)
    (found,) = coordinates(first, now, tokens_BS, targets_BS)
    x_TI = (tokens_BS[:, 1:].float() - 127.5) / ((256**2 - 1) / 12) ** 0.5
    before_TD, after_TD = (nn.functional.gelu(x_TI @ model.w_in_ID) for model in (first, now))
    logits_TE = after_TD @ now.ffn.router_ED.t()  # both sums have the gates of the model as it is
    chosen_TE = torch.zeros_like(logits_TE).scatter(1, logits_TE.topk(config.top_k).indices, 1.0)
    gate_TE = chosen_TE * logits_TE.sigmoid() * config.gate_scale
    terms = {name: torch.zeros(32, 16) for name in ("init", "propagating", "effective")}
    for expert in range(config.num_experts):
        gate_T1, down_FD = gate_TE[:, expert, None], first.ffn.w_down_EFD[expert]
        start_TF = nn.functional.gelu(before_TD @ first.ffn.w_up_EDF[expert])
        moved_TF = nn.functional.gelu(after_TD @ now.ffn.w_up_EDF[expert])
        terms["init"] += gate_T1 * (start_TF @ down_FD)
        terms["propagating"] += gate_T1 * ((moved_TF - start_TF) @ down_FD)
        terms["effective"] += gate_T1 * (moved_TF @ (now.ffn.w_down_EFD[expert] - down_FD))
    for name, term_TD in terms.items():
        assert getattr(found, name) == pytest.approx(float(term_TD.square().mean().sqrt()), rel=1e-4), name
    logits = sum(terms.values()) @ now.unembedding_VD.t()  # and together they are the layer's output
    assert torch.allclose(logits, now(tokens_BS).logits_BSV[:, 0], atol=1e-5)


class Stranger(nn.Module):
    """Somebody's own MoE: other names, other layout, softmax over nothing."""

    def __init__(self, width, hidden, experts, k):
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(experts, width, hidden) * width**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, width) * hidden**-0.5)
        self.head = nn.Linear(width, 32, bias=False)
        self.k, self.gate_scale = k, 1.0

    def forward(self, tokens):
        x = self.norm(self.embed(tokens))
        weight, expert = self.gate(x).sigmoid().topk(self.k)
        h = torch.einsum("td,tkdf->tkf", x, self.w1[expert]).relu()
        y = torch.einsum("tkf,tkfd->tkd", h, self.w2[expert])
        return self.head((self.gate_scale * weight[..., None] * y).sum(1))


def test_a_stranger_applies_it_in_five_lines():
    torch.manual_seed(0)
    model = Stranger(256, 128, 32, 16)
    before = model.w2.detach().clone()

    mssp = scales("mssp", regime="III", sizes=GROWN["III"], base=BASE)
    roles = mssp.roles(
        model, {"embed": "embedding", "gate": "router", "w1": "expert_up", "w2": "expert_down", "head": "readout"}
    )
    mssp.rescale(model, roles)
    optimizer = torch.optim.AdamW(mssp.groups(model, roles, lr=4e-3, eps=1e-8, weight_decay=0.1))
    model.gate_scale = mssp.gate

    assert roles["norm.weight"] == roles["norm.bias"] == "gain"
    assert torch.equal(model.w2, before[:1].expand_as(before))  # tied
    assert not model.head.weight.any()
    by_name = {name: group for (name, _), group in zip(model.named_parameters(), optimizer.param_groups, strict=True)}
    assert by_name["w2"]["lr"] == by_name["w1"]["lr"] == by_name["gate.weight"]["lr"] == 1e-3
    assert by_name["embed.weight"]["lr"] == 4e-3
    assert by_name["w1"]["eps"] == 1e-8 / 16
    assert by_name["w1"]["weight_decay"] == 0.4
    assert mssp.gate == 0.25
    loss = nn.functional.cross_entropy(model(torch.arange(32)), torch.arange(32))
    loss.backward()
    optimizer.step()
    with pytest.raises(UsageError, match="expected a role for w1, found none"):
        mssp.roles(model, {"embed": "embedding", "gate": "router"})
    with pytest.raises(UsageError, match="found 'router_bias'"):
        mssp.roles(model, {"": "router_bias"})


def test_the_printed_tables_hold_every_role_and_regime():
    lines = text().splitlines()
    assert [line for line in lines if line.startswith("regime")] == [
        f"regime {regime}, {optimizer}" for optimizer in ("adam", "sgd") for regime in ("I", "II", "III")
    ]
    assert (
        "expert_down | F^-½              | N^-1    | F^-½              | F^-1    | F^-½·M^½          | F^-1    | N^-1·M^-1"
        in lines
    )
    assert "expert_up   | N^-½              | N^-1    | N^-½              | M       | N^-½, tied        | M" in lines


def test_powers():
    assert str(Power(n=-0.5, m=1) * Power(n=-0.5)) == "N^-1·M"
    assert str(Power(l=-1) * Power(l=1)) == "1"
    assert Power(k=-1)(GROWN["II"], BASE) == 0.25
    assert Power(f=2).inverse()(GROWN["I"], BASE) == 1 / 16


def test_the_gate_multiplier_scales_the_layers_output():
    torch.manual_seed(1)
    plain = MoE(d_model=8, d_expert=4, num_experts=4, top_k=2, score="sigmoid", renormalize=False)
    scaled = MoE(d_model=8, d_expert=4, num_experts=4, top_k=2, score="sigmoid", renormalize=False, gate_scale=0.25)
    scaled.load_state_dict(plain.state_dict())
    x_TD = torch.randn(5, 8)
    torch.testing.assert_close(scaled(x_TD), 0.25 * plain(x_TD))


def test_residual_and_normed_queries_change_the_forward_pass_alone():
    base = dataclasses.replace(TEXT_BASE, qk_norm="none")
    tokens = torch.randint(0, 256, (2, 16))
    plain, scaled = Transformer(base), Transformer(dataclasses.replace(base, residual_scale=0.5))
    assert not torch.allclose(plain(tokens).logits_BSV, scaled(tokens).logits_BSV)
    normed = Transformer(TEXT_BASE)
    q_norm = normed.blocks[0].attention.q_norm
    assert q_norm is not None
    assert q_norm.gain_D.shape == (16,)
    with torch.no_grad():
        before = normed(tokens).logits_BSV
        for block in normed.blocks:
            block.attention.w_qkv_DD[:, :64].mul_(3)  # queries and keys: their size no longer matters
        torch.testing.assert_close(normed(tokens).logits_BSV, before, rtol=1e-3, atol=1e-3)
    assert sum(p.numel() for p in normed.parameters()) == accounting(TEXT_BASE).total
