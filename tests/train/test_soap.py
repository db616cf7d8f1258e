"""SOAP beside its algorithm written out for one matrix, and its state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from escaip.errors import CheckpointError
from escaip.train.soap import SOAP

LEARNING_RATE, DECAY, BETA, FREQUENCY = 0.03, 0.1, 0.95, 4
# Matrices of full rank: bases of a null space are those of rounding errors.
SHAPES = [(5, 5), (3,), (5, 5), (4, 4), (3,)]


def reference_step(weight: Tensor, gradient: Tensor, state: dict[str, Tensor], time: int) -> None:
    """Algorithm 3 of arXiv 2409.11321: moments in the space of the weight, projected in each step."""
    if time == 0:
        state["left"], state["right"] = (1 - BETA) * gradient @ gradient.T, (1 - BETA) * gradient.T @ gradient
        state["L"], state["R"] = (torch.linalg.eigh(state[side])[1].flip(1) for side in ("left", "right"))
        state["first"], state["second"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return
    state["first"] = BETA * state["first"] + (1 - BETA) * gradient
    state["second"] = BETA * state["second"] + (1 - BETA) * (state["L"].T @ gradient @ state["R"]) ** 2
    first = state["L"].T @ state["first"] @ state["R"] / (1 - BETA**time)
    change = first / (state["second"].sqrt() + 1e-8) * (1 - BETA**time) ** 0.5
    weight -= LEARNING_RATE * state["L"] @ change @ state["R"].T
    weight *= 1 - LEARNING_RATE * DECAY
    state["left"] = BETA * state["left"] + (1 - BETA) * gradient @ gradient.T
    state["right"] = BETA * state["right"] + (1 - BETA) * gradient.T @ gradient
    if time % FREQUENCY == 0:
        for axis, (side, name) in enumerate((("left", "L"), ("right", "R"))):
            product = state[side] @ state[name]
            order = (state[name] * product).sum(0).argsort(descending=True)
            state["second"] = state["second"].index_select(axis, order)
            state[name] = torch.linalg.qr(product[:, order])[0]


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in SHAPES]


def take_steps(optimizer: SOAP, weights: list[torch.nn.Parameter], begin: int, end: int) -> None:
    for time in range(begin, end):
        torch.manual_seed(1 + time)
        for weight in weights:
            weight.grad = weight.detach() + torch.randn_like(weight)
        optimizer.step()


def test_is_the_algorithm() -> None:
    weights, expected, states = parameters(), [one.detach() for one in parameters()], [{} for _ in SHAPES]
    optimizer = SOAP(weights, LEARNING_RATE, weight_decay=DECAY, frequency=FREQUENCY)
    for time in range(3 * FREQUENCY):
        take_steps(optimizer, weights, time, time + 1)
        torch.manual_seed(1 + time)
        for weight, state in zip(expected, states, strict=True):
            gradient = weight + torch.randn_like(weight)
            if weight.dim() == 2:
                reference_step(weight, gradient, state, time)
        for found, weight in zip(weights, expected, strict=True):
            if weight.dim() == 2:
                torch.testing.assert_close(found.detach(), weight, rtol=0, atol=1e-10)


def test_vectors_are_stepped_by_adam() -> None:
    weights, expected = parameters()[1:2], parameters()[1:2]
    optimizer = SOAP(weights, LEARNING_RATE, weight_decay=0.0)
    adam = torch.optim.Adam(expected, LEARNING_RATE, betas=(BETA, BETA), eps=1e-12)
    take_steps(optimizer, weights, 0, 1)
    assert torch.equal(weights[0], expected[0])  # gathers moments only
    take_steps(optimizer, weights, 1, 6)
    for time in range(1, 6):
        torch.manual_seed(1 + time)
        expected[0].grad = expected[0].detach() + torch.randn_like(expected[0])
        adam.step()
    torch.testing.assert_close(weights[0], expected[0], rtol=0, atol=1e-7)


def test_continues_from_its_state() -> None:
    weights = parameters()
    optimizer = SOAP(weights, LEARNING_RATE)
    take_steps(optimizer, weights, 0, 13)
    state, resumed = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(weights)
    take_steps(optimizer, weights, 13, 25)
    other = SOAP(resumed, LEARNING_RATE)
    other.load_state_dict(state)
    take_steps(other, resumed, 13, 25)
    assert all(torch.equal(one, two) for one, two in zip(weights, resumed, strict=True))


def test_refuses_the_state_of_another_soap() -> None:
    optimizer = SOAP(parameters(), LEARNING_RATE)
    state = {**optimizer.state_dict(), "state": {0: {"exp_avg": torch.zeros(5, 5), "GG": []}}}
    with pytest.raises(CheckpointError, match="state of the optimizer"):
        optimizer.load_state_dict(state)


def test_a_missing_gradient_counts_as_zero_beside_others() -> None:
    weights = parameters()
    optimizer = SOAP(weights, LEARNING_RATE)
    before = [one.detach().clone() for one in weights]
    for _ in range(3):
        weights[0].grad = torch.ones_like(weights[0])
        optimizer.step()
    moved = [not torch.equal(one, two) for one, two in zip(before, weights, strict=True)]
    assert moved == [True, False, False, False, False]
