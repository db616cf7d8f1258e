"""Evaluations recorded in CUDA graphs: what launches some hundred kernels becomes one launch (docs/performance.md).

A recording has fixed sizes. Those of a simulation change a little at every step, so inputs are padded to capacities
with some room (:mod:`escaip.potential.padding`), and one recording serves for long; others are made
when structures outgrow it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.models import Model
from escaip.potential.ahead import WeightState
from escaip.potential.compile import CompiledEvaluation
from escaip.potential.derivatives import EvaluationInputs
from escaip.potential.padding import Sizes, pad, unpad
from escaip.types import ModelOutput

Function = Callable[[list[Tensor]], list[Tensor]]
Recorder = Callable[[Function, list[Tensor]], tuple[Callable[[], None], list[Tensor]]]

# Recordings kept, each with memory for its intermediate results, and the calls before one that settle what is lazy.
_MOST_KEPT, _WARM_UP = 4, 3
# A recording for more than so many times the tokens at hand is not used for them.
_WASTE = 1.25


def record_on_cuda(function: Function, inputs: list[Tensor]) -> tuple[Callable[[], None], list[Tensor]]:
    """Records a function of tensors that stay where they are.

    Returns:
        What runs it again, and the tensors in which its results then stand.

    Raises:
        ConfigError: it cannot be recorded: it waits for the device, for instance.
    """
    with torch.cuda.device(inputs[0].device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                function(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                results = function(inputs)
        except RuntimeError as error:
            first = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise ConfigError(f"the evaluation cannot be recorded in a CUDA graph ({first}): leave it out") from error
    return graph.replay, results


@dataclass
class _Recording:
    """One of a fixed size."""

    sizes: Sizes
    inputs: list[Tensor]
    replay: Callable[[], None]
    results: list[Tensor]


class RecordedEvaluation:
    """A compiled evaluation, recorded for each size that it meets and replayed.

    Args:
        evaluation: of predictions.
        record: records a function; for CUDA by default.

    Attributes:
        num_recordings: made so far.
    """

    def __init__(self, evaluation: CompiledEvaluation, record: Recorder = record_on_cuda) -> None:
        self._evaluation = evaluation
        self._record = record
        self._recordings: list[_Recording] = []  # the one used last stands last
        self._state: list[tuple[int, int]] = []
        self._state_of = WeightState()
        self.num_recordings = 0

    def fits(self, model: Model) -> bool:
        """Whether the weights are those that were compiled."""
        return self._evaluation.fits(model)

    def __call__(self, model: Model, inputs: EvaluationInputs) -> tuple[ModelOutput, Tensor | None]:
        """As :func:`escaip.potential.derivatives.energy_and_gradient`."""
        state = self._state_of(model)
        if state != self._state:  # what is made of weights once, as tables of the distance, is another tensor now
            self._recordings, self._state = [], state
        own = Sizes.of(inputs)
        recording = self._take(own) or self._make(model, inputs, own.capacity())
        self._recordings.append(recording)
        torch._foreach_copy_(recording.inputs, pad(inputs, recording.sizes).flat())
        recording.replay()
        # The next replay overwrites these.
        results = [result.clone() for result in recording.results]
        return unpad(results, recording.sizes, own, self._evaluation.config)

    def _take(self, own: Sizes) -> _Recording | None:
        """The smallest that holds these sizes, if it is not much too large."""
        found = [r for r in self._recordings if r.sizes.hold(own) and r.sizes.tokens <= _WASTE * own.capacity().tokens]
        if not found:
            return None
        best = min(found, key=lambda recording: (recording.sizes.tokens, recording.sizes.pairs))
        self._recordings.remove(best)
        return best

    def _make(self, model: Model, inputs: EvaluationInputs, sizes: Sizes) -> _Recording:
        del self._recordings[: max(0, len(self._recordings) + 1 - _MOST_KEPT)]
        self.num_recordings += 1
        static = [x.clone() for x in pad(inputs, sizes).flat()]
        replay, results = self._record(lambda tensors: self._evaluation.run(model, tensors), static)
        return _Recording(sizes, static, replay, results)
