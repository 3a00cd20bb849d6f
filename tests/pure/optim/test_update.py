"""The update of a tree against torch's optimizer on the same groups."""

from __future__ import annotations

import pytest
import torch

from nmoe.config.sections import Group, Optim
from nmoe.pure.core import tree
from nmoe.pure.core.spec import POLICY
from nmoe.pure.model import model
from nmoe.pure.optim.update import rule, tree_state, tree_update
from tests import shapes

OPTIM = Optim(
    dense=Group(lr=1e-2), expert=Group(lr=3e-3, beta2=0.99), router=Group(lr=1e-3), weight_decay=0.2, clip_norm=0.5
)


def test_a_tree_is_updated_as_torch_updates_its_groups() -> None:
    c = shapes.config()
    specs = model.specs(c)
    params = tree.map(lambda _, leaf: leaf.requires_grad_(), shapes.parameters(c))
    state = tree_state(params, specs, OPTIM)
    theirs = tree.map(lambda _, leaf: torch.nn.Parameter(leaf.detach().clone()), params)
    groups = [
        {"params": [leaf], "lr": group.lr, "betas": (group.beta1, group.beta2), "weight_decay": 0.2 * policy.decay}
        for (_, leaf), (_, spec) in zip(tree.leaves(theirs), tree.leaves(specs), strict=True)
        for policy in [POLICY[spec.role]]
        for group in [getattr(OPTIM, policy.group)]
    ]
    assert len({(group["lr"], group["weight_decay"]) for group in groups}) == 4
    rates = [getattr(OPTIM, POLICY[spec.role].group).lr for _, spec in tree.leaves(specs)]
    optimizer = torch.optim.AdamW(groups, foreach=False)
    generator = torch.Generator().manual_seed(0)
    for share in (0.5, 1.0, 0.25):
        grads = tree.map(lambda _, leaf: torch.randn(leaf.shape, generator=generator).to(leaf.dtype), params)
        for (_, leaf), (_, gradient) in zip(tree.leaves(theirs), tree.leaves(grads), strict=True):
            leaf.grad = gradient.clone()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = share * rate
        torch.nn.utils.clip_grad_norm_([leaf for _, leaf in tree.leaves(theirs)], 0.5)
        optimizer.step()
        before = tree.map(lambda _, leaf: leaf.detach().clone(), params)
        old, (params, state) = params, tree_update(params, grads, state, specs, OPTIM, share=share)
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tree.leaves(old), tree.leaves(before), strict=True))
    assert state.updates.item() == 3
    for (path, ours), (_, right) in zip(tree.leaves(params), tree.leaves(theirs), strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-11, msg=lambda text, path=path: f"{path}: {text}")


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of adamw, muon, got 'sgd'"):
        rule("sgd")


def test_unzip_finds_the_leaves_of_the_first_tree() -> None:
    both = tree.map(lambda path, leaf: (path, (leaf, 2 * leaf)), ((1, 2), 3))
    paths, numbers = tree.unzip(((1, 2), 3), both)
    assert paths == (("0.0", "0.1"), "1") and numbers == (((1, 2), (2, 4)), (3, 6))
    with pytest.raises(ValueError, match=r"expected tuples of one length at the leaves, got lengths \[1, 2\]"):
        tree.unzip((1, 2), ((1,), (1, 2)))
