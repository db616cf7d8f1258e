"""What autograd keeps of a prediction for its derivative, per token, feature and layer, by preset.

python benchmarks/kept.py [--presets 1m 5m ...]

The constants ``_BYTES_PER_FEATURE`` of escaip/potential/derivatives.py and the estimate of
escaip/potential/predict.py come from here.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from ase.build import bulk
from torch import Tensor

import escaip.potential.derivatives
from escaip import EScAIPConfig, Potential
from escaip.data import AtomicData, collate


class Kept:
    """Bytes of the storages that saved tensors hold, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._uses: Counter[int] = Counter()

    def take(self, x: Tensor) -> _Hold:
        """A hook of :class:`torch.autograd.graph.saved_tensors_hooks`."""
        return _Hold(self, x)


class _Hold:
    def __init__(self, kept: Kept, x: Tensor) -> None:
        storage = x.untyped_storage()
        self.kept, self.x, self.key, self.size = kept, x, storage.data_ptr(), storage.nbytes()
        kept._uses[self.key] += 1
        if kept._uses[self.key] == 1:
            kept.now += self.size
            kept.most = max(kept.most, kept.now)

    def __del__(self) -> None:
        self.kept._uses[self.key] -= 1
        if not self.kept._uses[self.key]:
            self.kept.now -= self.size


def main() -> None:
    """Prints one line per preset and way to ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(EScAIPConfig.PRESETS))
    for preset in parser.parse_args().presets:
        potential = Potential(EScAIPConfig.preset(preset)).eval()
        config = potential.config
        atoms = bulk("Cu", cubic=True).repeat(5)
        atoms.rattle(0.05, seed=1)
        batch = collate([AtomicData.from_ase(atoms)])
        tokens = potential.graph_of(batch).num_tokens
        for create_graph in (False, True):
            kept = Kept()
            escaip.potential.derivatives._MOST_KEPT = (2**60, 2**60)
            with torch.autograd.graph.saved_tensors_hooks(kept.take, lambda hold: hold.x):
                potential(batch, create_graph=create_graph)
            each = kept.most / tokens / config.hidden_size
            print(
                f"{preset}, {'to be differentiated again' if create_graph else 'prediction'}: {tokens} tokens, "
                f"{each / config.num_layers:.1f} bytes per feature and layer, {each / 4:.1f} numbers per feature",
                flush=True,
            )


if __name__ == "__main__":
    main()
