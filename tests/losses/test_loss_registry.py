"""Every pairwise loss with every aggregation runs or raises, and nothing that is passed is ignored (L4)."""

import itertools

import pytest
import torch

from shapo_kernels import losses

NUMBERS = {"beta": 0.3, "epsilon": 0.2, "gamma": 0.4, "beta_reward": 2.0, "beta_prime": 0.8}
COMBINATIONS = list(itertools.product(losses.PAIRWISE, losses.AGGREGATIONS))


def make_loss(name, aggregation="mean", **changes):
    needed = losses.PAIRWISE[name].parameters + losses.AGGREGATIONS[aggregation]
    return losses.PreferenceLoss(name, aggregation, **{key: NUMBERS[key] for key in needed} | changes)


def make_fields(name, pairs=7):
    generator = torch.Generator().manual_seed(11)

    def draw():
        return -10 * torch.rand(pairs, generator=generator, dtype=torch.float64)

    spec = losses.PAIRWISE[name]
    fields = {
        "policy_chosen": draw().requires_grad_(),
        "policy_rejected": draw().requires_grad_(),
        "chosen_counts": torch.randint(1, 9, (pairs,), generator=generator),
        "rejected_counts": torch.randint(1, 9, (pairs,), generator=generator),
    }
    if spec.uses_reference:
        fields |= {"ref_chosen": draw(), "ref_rejected": draw()}
    if spec.uses_rewards:
        fields |= {"reward_chosen": draw(), "reward_rejected": draw()}
    return fields


def by_hand(name, f):
    """The same losses from the functions that define them."""
    chosen, rejected = f["policy_chosen"], f["policy_rejected"]
    if name == "simpo":
        means = chosen / f["chosen_counts"], rejected / f["rejected_counts"]
        return losses.simpo(*means, beta=0.3, gamma=0.4)
    logps = chosen, rejected, f["ref_chosen"], f["ref_rejected"]
    counts = [f["chosen_counts"], f["rejected_counts"]] * 2
    return {
        "dpo": lambda: losses.dpo(*logps, beta=0.3),
        "cdpo": lambda: losses.cdpo(*logps, beta=0.3, epsilon=0.2),
        "rdpo": lambda: losses.rdpo(*logps, beta=0.3, epsilon=0.2),
        "ipo": lambda: losses.ipo(*logps, beta=0.3),
        "ipo_mean": lambda: losses.ipo(*logps, beta=0.3, lengths=counts),
        "hinge": lambda: losses.hinge(*logps, beta=0.3),
        "reward_level": lambda: losses.reward_level(
            *logps,
            beta=0.3,
            reward_chosen=f["reward_chosen"],
            reward_rejected=f["reward_rejected"],
            beta_reward=2.0,
        ),
    }[name]()


@pytest.mark.parametrize(("name", "aggregation"), COMBINATIONS)
def test_every_combination_is_its_loss_under_its_aggregation(name, aggregation):
    fields = make_fields(name)
    output = make_loss(name, aggregation)(losses.PreferenceBatch(**fields))
    per_pair = by_hand(name, fields)
    expected = per_pair.mean() if aggregation == "mean" else losses.drdpo(per_pair, beta_prime=0.8)
    assert torch.allclose(output.per_pair, per_pair, rtol=1e-13)
    assert torch.allclose(output.loss, expected, rtol=1e-13)
    output.loss.backward()
    assert fields["policy_chosen"].grad.abs().sum() > 0


@pytest.mark.parametrize(("name", "aggregation"), COMBINATIONS)
def test_micro_batches_of_every_combination_equal_the_whole_batch(name, aggregation):
    loss, fields = make_loss(name, aggregation), make_fields(name)
    policy = fields["policy_chosen"]
    full = loss(losses.PreferenceBatch(**fields))
    (expected,) = torch.autograd.grad(full.loss, policy)
    parts = [{key: value[rows] for key, value in fields.items()} for rows in (slice(0, 3), slice(3, 7))]
    with torch.no_grad():
        whole = loss.whole_batch([loss(losses.PreferenceBatch(**part)).per_pair for part in parts])
    shares = [loss(losses.PreferenceBatch(**part), whole=whole).loss for part in parts]
    (gradient,) = torch.autograd.grad(sum(shares), policy)
    assert sum(shares).item() == pytest.approx(full.loss.item(), rel=1e-12)
    assert torch.allclose(gradient, expected, rtol=1e-12)
    assert loss.needs_whole_batch == (aggregation == "drdpo")


@pytest.mark.parametrize("name", losses.PAIRWISE)
def test_implicit_rewards_are_beta_times_the_log_ratio_and_carry_no_gradient(name):
    fields = make_fields(name)
    output = make_loss(name)(losses.PreferenceBatch(**fields))
    spec = losses.PAIRWISE[name]
    rewards = {}
    for side in ("chosen", "rejected"):
        ratio = fields[f"policy_{side}"].detach() - (fields[f"ref_{side}"] if spec.uses_reference else 0)
        rewards[side] = 0.3 * (ratio / fields[f"{side}_counts"] if spec.per_token else ratio)
    assert torch.allclose(output.chosen_rewards, rewards["chosen"], rtol=1e-12)
    assert torch.allclose(output.rejected_rewards, rewards["rejected"], rtol=1e-12)
    assert torch.allclose(output.margin, rewards["chosen"] - rewards["rejected"], rtol=1e-10)
    assert not output.margin.requires_grad


@pytest.mark.parametrize(("name", "aggregation"), COMBINATIONS)
def test_a_parameter_that_is_missing_or_not_used_is_an_error(name, aggregation):
    needed = losses.PAIRWISE[name].parameters + losses.AGGREGATIONS[aggregation]
    numbers = {key: NUMBERS[key] for key in needed}
    for parameter in NUMBERS:
        if parameter in needed:
            fewer = {key: value for key, value in numbers.items() if key != parameter}
            with pytest.raises(ValueError, match=f"needs a value for '{parameter}'"):
                losses.PreferenceLoss(name, aggregation, **fewer)
        else:
            with pytest.raises(ValueError, match=f"has no parameter '{parameter}': it takes beta"):
                losses.PreferenceLoss(name, aggregation, **numbers, **{parameter: 0.1})


def test_parameters_out_of_range_are_refused_before_the_first_batch():
    for name, parameter, value in (
        ("dpo", "beta", 0.0),
        ("rdpo", "epsilon", 0.5),
        ("simpo", "gamma", float("nan")),
        ("reward_level", "beta_reward", -1.0),
    ):
        with pytest.raises(ValueError, match=f"{parameter} is"):
            make_loss(name, **{parameter: value})
    with pytest.raises(ValueError, match="beta_prime is"):
        make_loss("dpo", "drdpo", beta_prime=0.0)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="loss is 'kto': expected one of dpo, cdpo"):
        losses.PreferenceLoss("kto", beta=0.1)
    with pytest.raises(ValueError, match="aggregation is 'sum': expected one of mean, drdpo"):
        losses.PreferenceLoss("dpo", "sum", beta=0.1)


def test_rewards_and_references_are_never_ignored():
    """Soft labels are defined for the reward level alone; SimPO has no use for a reference model that was run."""
    for name, spec in losses.PAIRWISE.items():
        fields = make_fields(name)
        for field, used in (
            ("ref_chosen", spec.uses_reference),
            ("ref_rejected", spec.uses_reference),
            ("reward_chosen", spec.uses_rewards),
            ("reward_rejected", spec.uses_rewards),
        ):
            if used:
                batch = losses.PreferenceBatch(**fields | {field: None})
                message = f"the loss {name} needs {field}"
            else:
                batch = losses.PreferenceBatch(**fields | {field: torch.ones(7)})
                message = f"the loss {name} does not use {field}"
            with pytest.raises(ValueError, match=message):
                make_loss(name)(batch)


@pytest.mark.parametrize("name", ["simpo", "ipo_mean"])
def test_losses_of_means_need_the_token_counts(name):
    with pytest.raises(ValueError, match=f"the loss {name} needs rejected_counts"):
        make_loss(name)(losses.PreferenceBatch(**make_fields(name) | {"rejected_counts": None}))


def test_losses_of_sums_do_not_need_the_token_counts():
    fields = make_fields("dpo") | {"chosen_counts": None, "rejected_counts": None}
    assert make_loss("dpo")(losses.PreferenceBatch(**fields)).loss > 0


def test_a_loss_prints_what_it_is():
    assert repr(make_loss("cdpo", "drdpo")) == "PreferenceLoss('cdpo', 'drdpo', beta=0.3, epsilon=0.2, beta_prime=0.8)"


def test_every_loss_runs_through_a_shapo_update():
    """Pass 1 and pass 2 of an update, with the whole batch's Dr.DPO over two micro-batches in each."""
    import shapo_kernels as sk

    for name, aggregation in COMBINATIONS:
        loss = make_loss(name, aggregation)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2)).double()
        before = model[2].weight.detach().clone()
        subspace = sk.Subspace({"2.weight": [1, 4]})
        opt = sk.ShaPOOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, subspace, rho=0.1)
        inputs, fields = torch.randn(7, 4, dtype=torch.float64), make_fields(name)

        def share(rows, whole=None, loss=loss, model=model, inputs=inputs, fields=fields):
            chosen, rejected = model(inputs[rows]).unbind(1)
            rest = {key: value[rows] for key, value in fields.items()}
            batch = losses.PreferenceBatch(**rest | {"policy_chosen": chosen, "policy_rejected": rejected})
            return loss(batch, whole=whole)

        def shares(loss=loss, share=share):
            micro_batches = (slice(0, 3), slice(3, 7))
            with torch.no_grad():
                whole = loss.whole_batch([share(rows).per_pair for rows in micro_batches])
            return [share(rows, whole).loss for rows in micro_batches]

        with opt.ascent():
            for part in shares():
                opt.ascend(part)
        with opt.perturbed():
            for part in shares():
                part.backward()
        opt.step()
        assert torch.isfinite(model[2].weight).all()
        assert not torch.equal(model[2].weight, before)


@pytest.mark.parametrize(("name", "aggregation"), COMBINATIONS)
def test_the_likelihood_of_the_chosen_responses_is_added_to_every_loss_and_aggregation(name, aggregation):
    fields = make_fields(name)
    batch = losses.PreferenceBatch(**fields)
    plain, with_term = make_loss(name, aggregation)(batch), make_loss(name, aggregation, nll=0.7)(batch)
    likelihood = -fields["policy_chosen"].sum() / fields["chosen_counts"].sum()
    torch.testing.assert_close(with_term.loss, plain.loss + 0.7 * likelihood)
    torch.testing.assert_close(with_term.nll, likelihood.detach())
    torch.testing.assert_close(with_term.per_pair, plain.per_pair)
    assert plain.nll is None
    (gradient,) = torch.autograd.grad(with_term.loss - plain.loss, fields["policy_chosen"])
    torch.testing.assert_close(gradient, torch.full_like(gradient, -0.7 / int(fields["chosen_counts"].sum())))


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
def test_shares_of_micro_batches_add_up_with_the_likelihood(aggregation):
    fields = make_fields("dpo")
    loss = make_loss("dpo", aggregation, nll=0.7)
    expected = loss(losses.PreferenceBatch(**fields))
    whole = loss.whole_batch(expected.per_pair, chosen_counts=fields["chosen_counts"])
    parts = [
        loss(losses.PreferenceBatch(**{key: value[rows] for key, value in fields.items()}), whole=whole)
        for rows in (slice(0, 2), slice(2, 7))
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), expected.loss)
    torch.testing.assert_close(sum(part.nll for part in parts), expected.nll)
    names = [fields["policy_chosen"], fields["policy_rejected"]]
    shares = torch.autograd.grad(sum(part.loss for part in parts), names)
    for share, whole_gradient in zip(shares, torch.autograd.grad(expected.loss, names), strict=True):
        torch.testing.assert_close(share, whole_gradient)


def test_a_likelihood_that_cannot_be_taken_is_refused():
    fields = make_fields("dpo")
    loss = make_loss("dpo", nll=1.0)
    with pytest.raises(ValueError, match="needs chosen_counts"):
        loss(losses.PreferenceBatch(**{**fields, "chosen_counts": None}))
    with pytest.raises(ValueError, match="whole was made without chosen_counts"):
        loss(losses.PreferenceBatch(**fields), whole=loss.whole_batch(torch.zeros(7)))
    with pytest.raises(ValueError, match=r"chosen_counts has the shape \[6\]: expected \[7\]"):
        losses.chosen_nll(fields["policy_chosen"], fields["chosen_counts"][:6])
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="nll is"):
            make_loss("dpo", nll=weight)
    assert "nll=1.0" in repr(loss)
    assert losses.chosen_nll(torch.zeros(2), torch.zeros(2)).item() == 0
