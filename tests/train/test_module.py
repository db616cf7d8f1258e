"""The Lightning module: learning, checkpoints, resuming, what it takes from its data, stopping on NaN."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.plugins import Precision
from training_stand_ins import TINY, labelled_molecules, make_data, make_trainer

from escaip import Potential, load_potential
from escaip.data import AtomicData, AtomicDataModule, collate, fit_statistics
from escaip.errors import ConfigError, DataError, TrainingError
from escaip.potential.atomic_energies import fit_charges
from escaip.potential.zbl import bond_gaps, guard_onsets, measure_distances, zbl_onsets
from escaip.train import BestAndLast, ForceTerm, LossSettings, LossTerm, PotentialModule, WeightEMA
from escaip.train.atomic_energy_refit import ReferenceFit
from escaip.types import Prediction


class Recorder(Callback):
    """Losses, learning rates and validation losses as they come."""

    def __init__(self) -> None:
        self.steps: dict[tuple[int, int], tuple[float, float]] = {}
        self.validations: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        metrics = trainer.callback_metrics
        self.steps[trainer.current_epoch, batch_idx] = float(metrics["train/loss"]), float(metrics["lr"])

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.validations[trainer.global_step] = float(trainer.callback_metrics["val/loss"])


class Keep(Callback):
    """Copies the best and last checkpoints of every epoch."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        folder = Path(trainer.default_root_dir)
        for name in ("best", "last"):
            if (folder / f"{name}.ckpt").is_file():
                shutil.copy(folder / f"{name}.ckpt", folder / f"{name}-{trainer.current_epoch}.ckpt")


def test_overfits_a_few_structures(tmp_path: Path) -> None:
    seed_everything(0)
    settings = LossSettings(LossTerm(1.0), ForceTerm(1.0))
    module = PotentialModule(TINY, settings, learning_rate=5e-3, weight_decay=0.0)
    recorder = Recorder()
    data = make_data(tmp_path, 4, split={"val": 0})
    make_trainer(tmp_path, [recorder], max_epochs=150, limit_val_batches=0).fit(module, data)
    losses = [loss for loss, _ in recorder.steps.values()]
    assert losses[-1] < 0.3 * losses[0]


def test_loss_weights_move_in_training_and_not_in_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forces = ForceTerm(2.0, "mae", average="atom")
    settings = LossSettings(LossTerm(1.0, final_weight=16.0), forces, change_after=0.5)

    weights: dict[int, tuple[float, ...]] = {}
    moved = LossSettings.at

    def run(checkpoint: Path | None) -> PotentialModule:
        seed_everything(1)
        module = PotentialModule(TINY, settings, learning_rate=1e-3)
        last = BestAndLast(dirpath=str(tmp_path), keep_every_n_steps=1)
        trainer = make_trainer(tmp_path, [last], max_epochs=4)

        def at(settings: LossSettings, progress: float) -> LossSettings:
            found = moved(settings, progress)
            weights[trainer.global_step] = tuple(found.weights.values())
            return found

        monkeypatch.setattr(LossSettings, "at", at)
        trainer.fit(module, make_data(tmp_path, 20, batch_size=8), ckpt_path=checkpoint)
        return module

    module = run(None)
    expected = [1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 4.0, 8.0]  # eight steps: the last four at 4/8 to 7/8 of the run
    assert [weights[step] for step in sorted(weights)] == [pytest.approx((value, 2.0, 0.0)) for value in expected]
    errors = module.last_errors["model"]
    validated = 16.0 * errors["energy_mae_meV_per_atom"] + 2.0 * errors["force_mae_meV_per_A"]
    assert errors["loss"] == pytest.approx(validated / 1000.0, rel=1e-6)
    whole = weights.copy()
    weights.clear()
    run(tmp_path / "step-6.ckpt")
    assert weights == {step: whole[step] for step in (6, 7)}


def test_averaged_weights_are_validated_saved_and_served(tmp_path: Path) -> None:
    seed_everything(0)
    module = PotentialModule(TINY, learning_rate=1e-2)
    checkpoints = BestAndLast(dirpath=str(tmp_path))
    seen: dict[str, Any] = {}

    class Look(Callback):
        def on_validation_epoch_start(self, trainer: Any, module: Any) -> None:
            seen["validated"] = {k: v.clone() for k, v in module.potential.state_dict().items()}
            seen.setdefault("first", seen["validated"])

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            seen.setdefault("raw", []).append([p.detach().clone() for p in module.parameters()])

    trainer = make_trainer(tmp_path, [WeightEMA(0.8), checkpoints, Look()], max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(module, make_data(tmp_path))
    expected = [p.clone() for p in seen["raw"][0]]
    for count, raw in enumerate(seen["raw"][1:], start=1):
        decay = min(0.8, (1 + count) / (10 + count))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, raw, strict=True)]
    served = load_potential(tmp_path / "last.ckpt", device="cpu")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for (name, value), average in zip(served.named_parameters(), expected, strict=True):
        torch.testing.assert_close(value, average, rtol=1e-5, atol=1e-7)
        assert torch.equal(value, seen["validated"][name])
        assert torch.equal(value, saved["state_dict"][f"potential.{name}"])
        assert torch.equal(value, module.potential.state_dict()[name])
    names = [name for name, _ in module.named_parameters()]
    for name, raw in zip(names, seen["raw"][-1], strict=True):
        assert torch.equal(saved["current_model_state"][name], raw)
    statistics = trainer.datamodule.statistics
    assert float(served.scale) == pytest.approx(statistics.force_rms)
    for when in ("first", "validated"):  # before the first step, too
        assert torch.equal(seen[when]["element_references"], served.element_references)
    assert float(served.element_references[1]) == pytest.approx(statistics.element_references[1])
    assert served.metadata.elements == statistics.elements


def _run(
    folder: Path, checkpoint: Path | None = None, optimizer: str = "adamw", density_radial: int = 0, **options: Any
) -> tuple[Recorder, PotentialModule]:
    seed_everything(1)
    settings: Any = {"optimizer": optimizer, "learning_rate": 1e-2, "warmup_fraction": 0.3}
    density = {"density_radial": density_radial, "density_degree": 1, "density_channels": 4}
    module = PotentialModule({**TINY, **density, "dropout": 0.1}, **settings)
    recorder = Recorder()
    last = BestAndLast(dirpath=str(folder), keep_every_n_steps=1)
    callbacks = [WeightEMA(0.9), last, recorder, *([Keep()] if checkpoint is None else [])]
    trainer = make_trainer(folder, callbacks, max_epochs=3, gradient_clip_val=10.0, **options)
    trainer.fit(module, make_data(folder, 24), ckpt_path=checkpoint)
    return recorder, module


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2, "val_check_interval": 0.5}, {"optimizer": "soap"}, {"density_radial": 3}],
    ids=["plain", "accumulation", "soap", "linear"],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, options: dict[str, Any]) -> None:
    whole, reference = _run(tmp_path / "whole", **options)
    steps = 3 if "accumulate_grad_batches" in options else 5
    names = ("step-1.ckpt", f"step-{steps + steps // 2}.ckpt", "last-1.ckpt", "best-2.ckpt")
    for name in names[2 * bool(options) :]:
        resumed, module = _run(tmp_path / f"from-{name}", tmp_path / "whole" / name, **options)
        assert resumed.steps
        assert resumed.steps == {place: whole.steps[place] for place in whole.steps if place >= min(resumed.steps)}
        assert len(whole.steps) - len(resumed.steps) <= 10
        assert resumed.validations == {step: whole.validations[step] for step in resumed.validations}
        for name, value in reference.state_dict().items():
            assert torch.equal(value, module.state_dict()[name]), name


def test_validates_in_inference_mode(tmp_path: Path) -> None:
    module = PotentialModule(TINY)
    data = make_data(tmp_path)
    data.setup()
    module.potential.set_statistics(data.statistics)
    trainer = make_trainer(tmp_path, [], inference_mode=True)
    errors = trainer.validate(module, data, verbose=False)[0]
    assert errors["val/force_mae_meV_per_A"] > 0.0


class _Poison(Callback):
    """Spoils the labels of one structure in the third batch."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.name = ""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            batch.energy[0] = self.value
            self.name = batch.structure_id[0]


def test_a_loss_that_is_not_finite_stops_and_names_the_batch(tmp_path: Path) -> None:
    poison = _Poison(math.inf)
    module = PotentialModule(TINY)
    callbacks = [poison, BestAndLast(dirpath=str(tmp_path), every_n_steps=2)]
    with pytest.raises(TrainingError, match="loss is inf at step 2") as raised:
        make_trainer(tmp_path, callbacks).fit(module, make_data(tmp_path))
    assert poison.name in str(raised.value)
    assert str(tmp_path / "last.ckpt") in str(raised.value)
    assert "from energy" in str(raised.value)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    assert all(bool(torch.isfinite(value).all()) for value in kept["state_dict"].values())


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    module = PotentialModule(TINY)
    weight = next(module.potential.model.parameters())
    weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingError, match=r"gradient norm is nan at step 0.*molecules"):
        make_trainer(tmp_path, []).fit(module, make_data(tmp_path))
    assert bool(torch.isfinite(weight).all())


@pytest.mark.parametrize("missing", ["energy", "forces"])
def test_every_parameter_has_a_gradient_when_labels_are_missing(missing: str) -> None:
    structures = [AtomicData.from_ase(atoms) for atoms in labelled_molecules(3)]
    module = PotentialModule(TINY)
    module.potential.set_statistics(fit_statistics(structures))
    batch = collate(structures)
    batch[missing][:] = math.nan
    from escaip.train.losses import loss_sums

    prediction = module.potential(batch, create_graph=True)
    loss_sums(prediction, batch, module.losses).total(module.losses).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in module.parameters())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"architecture": {"preset": "3m"}}, "preset '3m'"),
        ({"architecture": {"hiden_size": 3}}, "hiden_size.*hidden_size"),
        ({"architecture": {**TINY, "forces": "direct"}, "losses": LossSettings(stress=LossTerm(1.0))}, "no stress"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"warmup_fraction": 1.5}, "warmup_fraction"),
        ({"direct_share": 1.0}, r"direct_share is 1\.0: it must be in \[0, 1\)"),
        ({"direct_share": 0.5, "architecture": {**TINY, "forces": "direct"}}, "for conservative forces, and these are"),
        ({"direct_share": 0.5, "init_from": "example:organic"}, r"for random weights, and model\.init_from has others"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        PotentialModule(**settings)


@pytest.mark.bad_input
def test_a_loss_on_a_label_that_nobody_has(tmp_path: Path) -> None:
    module = PotentialModule(TINY, LossSettings(stress=LossTerm(1.0)))
    with pytest.raises(ConfigError, match=r"losses\.stress\.weight is 1, but no training structure has stress"):
        make_trainer(tmp_path, []).fit(module, make_data(tmp_path))


@pytest.mark.bad_input
def test_a_figure_that_is_not_logged(tmp_path: Path) -> None:
    module = PotentialModule(TINY)
    callbacks = [BestAndLast(monitor="val/energy", dirpath=str(tmp_path))]
    with pytest.raises(ConfigError, match=r"'val/energy' is not logged: choose .*val/loss"):
        make_trainer(tmp_path, callbacks).fit(module, make_data(tmp_path))


ELEMENTS = (1, 6, 7, 8)
OFF = torch.zeros(119, dtype=torch.float64)
OFF[list(ELEMENTS)] = torch.tensor([0.5, -2.0, 3.0, 1.0], dtype=torch.float64)


def _batch(count: int = 6, seed: int = 0, names: tuple[str, ...] = ("H2O", "NH3", "CH4", "CH3OH", "C2H6")) -> Any:
    return collate([AtomicData.from_ase(atoms) for atoms in labelled_molecules(count, seed, names)])


def _off_by(batch: Any, off: torch.Tensor) -> Prediction:
    """Predictions whose errors are linear in the composition."""
    atomic = off[batch.atomic_numbers]
    energy = batch.energy - atomic.new_zeros(len(batch.energy)).index_add(0, batch.batch, atomic)
    return Prediction(energy, None, None, atomic)


@pytest.mark.parametrize("term", [LossTerm(1.0, "mse"), LossTerm(1.0, "mae"), LossTerm(1.0, "huber", 0.1)])
def test_errors_linear_in_the_composition_are_found_exactly(term: LossTerm) -> None:
    fit = ReferenceFit(ELEMENTS, [True], term)
    for seed in range(3):
        batch = _batch(10, seed)
        batch.energy[seed] = torch.nan  # not labelled
        fit.add(fit.of_batch(_off_by(batch, OFF), batch))
    np.testing.assert_allclose(fit.solve()[0], OFF, atol=1e-10)
    assert not fit.sums.any()


def test_weights_are_those_of_the_loss() -> None:
    """Absolute errors: a wild structure does not move the others, after some rounds."""
    batch = _batch(30)
    found = {}
    for kind in ("mse", "mae"):
        off, fit = OFF.clone(), ReferenceFit(ELEMENTS, [True], LossTerm(1.0, kind))
        for _ in range(30):
            prediction = _off_by(batch, off)
            prediction.energy[0] += 100.0
            fit.add(fit.of_batch(prediction, batch))
            off = off - fit.solve()[0]
        found[kind] = float(off.abs().max())
    assert found["mae"] < 1e-3
    assert found["mse"] > 0.1


@pytest.mark.parametrize(("per", "power"), [("atom", 1.0), ("root", 0.5), ("structure", 0.0)])
def test_squares_are_those_that_the_loss_counts(per: str, power: float) -> None:
    batch, noise = _batch(20), torch.linspace(-1.0, 1.0, 20, dtype=torch.float64)
    fit = ReferenceFit(ELEMENTS, [True], LossTerm(1.0, "mse", per=per))
    fit.add(fit.of_batch(Prediction(batch.energy - noise, None, None, noise), batch))
    structures = [batch.atomic_numbers[first:last] for first, last in itertools.pairwise(batch.ptr)]
    counts = np.array([[int((numbers == z).sum()) for z in ELEMENTS] for numbers in structures])
    factor = counts.sum(1, keepdims=True) ** -power
    expected = np.linalg.lstsq(factor * counts, factor[:, 0] * noise.numpy(), rcond=None)[0]
    np.testing.assert_allclose(fit.solve()[0][list(ELEMENTS)], expected, atol=1e-9)


def test_one_composition_has_one_sum() -> None:
    batch = _batch(4, names=("CH4",))
    fit = ReferenceFit(ELEMENTS, [True], LossTerm(1.0))
    fit.add(fit.of_batch(_off_by(batch, OFF), batch))
    shift = fit.solve()[0]
    assert float(shift[6] + 4 * shift[1]) == pytest.approx(float(OFF[6] + 4 * OFF[1]), rel=1e-10)
    assert float(shift[7]) == float(shift[8]) == 0.0


def test_sets_are_kept_apart_and_given_references_stay() -> None:
    batch = _batch(10)
    batch.dataset = torch.tensor([0, 1] * 5)
    fit = ReferenceFit(ELEMENTS, [True, False], LossTerm(1.0, "mse"))
    other = batch.clone()
    prediction = _off_by(batch, OFF)
    prediction.energy[1::2] += 7.0
    fit.add(fit.of_batch(prediction, other))
    shifts = fit.solve()
    np.testing.assert_allclose(shifts[0], OFF, atol=1e-9)
    assert not shifts[1].any()


def _ions(off: dict[int, float], code: int = 0) -> list[AtomicData]:
    """Molecules whose energies are linear in the composition, but for what their charge adds."""
    names = ("H2O", "NH3", "CH4", "CH3OH")
    structures = [AtomicData.from_ase(atoms) for atoms in labelled_molecules(16, 0, names)]
    for index, data in enumerate(structures):
        data.charge[:], data.dataset[:] = list(off)[index // len(names) % len(off)], code
        data.energy[:] = OFF[data.atomic_numbers].sum() + off[int(data.charge)]
    return structures


def test_energies_of_charges_are_found_with_those_of_elements() -> None:
    structures = _ions({0: 0.0, 1: 12.0, -1: -6.0})
    alone = torch.zeros(119, dtype=torch.float64)
    for number, energy in fit_statistics(structures).element_references.items():
        alone[number] = energy
    assert float((alone - OFF).abs().max()) > 0.1  # ions spoil a fit in the composition
    references, charges = fit_charges(alone, structures, [True])
    expected = torch.zeros(41, dtype=torch.float64)
    expected[21], expected[19] = 12.0, -6.0
    np.testing.assert_allclose(charges, expected, atol=1e-8)
    np.testing.assert_allclose(references, OFF, atol=1e-8)


def test_energies_of_charges_of_each_set_and_beside_isolated_atoms() -> None:
    given = torch.stack([torch.full_like(OFF, torch.nan), 2.0 * OFF, OFF])  # the second leaves a part to the model
    given[0, list(ELEMENTS)] = 0.0
    sets = [*_ions({0: 0.0, 1: 12.0}, 0), *_ions({0: 0.0, 1: 9.0, 2: 30.0}, 1), *_ions({0: 0.0}, 2)]
    references, charges = fit_charges(given, sets, [True, False, True])
    np.testing.assert_allclose(charges[:, 20:23], [[0.0, 12.0, 0.0], [0.0, 9.0, 30.0], [0.0, 0.0, 0.0]], atol=1e-8)
    np.testing.assert_allclose(references[0, list(ELEMENTS)], OFF[list(ELEMENTS)], atol=1e-8)
    assert torch.equal(references[1:], given[1:])


def test_of_many_structures_some_are_fitted() -> None:
    structures = _ions({0: 0.0, 1: 12.0})
    structures[1].charge[:] = 2  # not among the first and the last
    _, charges = fit_charges(OFF, structures, [True], max_structures=2)
    assert charges.nonzero()[:, 0].tolist() == [21]


@pytest.mark.bad_input
def test_a_charge_out_of_range_names_its_structure() -> None:
    structures = _ions({0: 0.0})
    structures[3].charge[:], structures[3].structure_id = -21, "anion"
    with pytest.raises(DataError, match=r"total charge outside \[-20, 20\]: anion has -21"):
        fit_charges(OFF, structures, [True])


def _train_ions(folder: Path, epochs: int = 1, resume: Path | None = None, **architecture: Any) -> Any:
    frames = labelled_molecules(24)
    for index, atoms in enumerate(frames):
        atoms.info["charge"] = index // 3 % 2
        atoms.calc.results["energy"] += 12.0 * atoms.info["charge"]
    folder.mkdir(exist_ok=True)
    ase.io.write(folder / "ions.extxyz", frames)
    data = AtomicDataModule(train=str(folder / "ions.extxyz"), batch_size=4, split={"by": "structure", "val": 4})
    module = PotentialModule({**TINY, **architecture}, learning_rate=1e-12, weight_decay=0.0)
    callbacks = [WeightEMA(0.9), BestAndLast(dirpath=str(folder))]
    make_trainer(folder, callbacks, max_epochs=epochs).fit(module, data, ckpt_path=resume)
    return module.potential, data.statistics


def test_a_model_conditioned_on_charge_has_energies_of_charges(tmp_path: Path) -> None:
    trained, _ = _train_ions(tmp_path, charge=True)
    assert float(trained.charge_energies[21]) == pytest.approx(12.0, abs=0.5)
    assert trained.charge_energies.nonzero()[:, 0].tolist() == [21]
    for name in ("best", "last"):
        assert torch.equal(load_potential(tmp_path / f"{name}.ckpt").charge_energies, trained.charge_energies)
    with pytest.raises(DataError, match=r"total charge of .* is 1, which this model does not know"):
        _train_ions(tmp_path / "unaware")


@pytest.mark.parametrize("old", [False, True])
def test_a_resumed_run_keeps_its_energies_of_charges(tmp_path: Path, old: bool) -> None:
    _train_ions(tmp_path, charge=True)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for weights in (checkpoint["state_dict"], checkpoint["current_model_state"]):
        if old:
            del weights["potential.charge_energies"]
        else:
            weights["potential.charge_energies"][21] = 11.0
    torch.save(checkpoint, tmp_path / "begun.ckpt")
    resumed, _ = _train_ions(tmp_path, 2, tmp_path / "begun.ckpt", charge=True)
    saved = load_potential(tmp_path / "last.ckpt")
    for potential in (resumed, saved):
        assert float(potential.charge_energies[21]) == (0.0 if old else 11.0)
        assert torch.equal(potential.element_references.cpu(), checkpoint["state_dict"]["potential.element_references"])


def _train(folder: Path, epochs: int, isolated: dict[str, float] | None = None, **settings: Any) -> Potential:
    """Weights that hardly move, and references that start from the labels alone."""
    seed_everything(0)
    module = PotentialModule(TINY, learning_rate=1e-12, weight_decay=0.0, **settings)
    callbacks = [WeightEMA(0.0), BestAndLast(dirpath=str(folder))]
    data = make_data(folder, 24, isolated_energies=isolated)
    make_trainer(folder, callbacks, max_epochs=epochs).fit(module, data)
    return module.potential


def test_training_moves_them_to_what_the_model_leaves(tmp_path: Path) -> None:
    trained = _train(tmp_path, 2, losses=LossSettings(LossTerm(1.0, "mse"), ForceTerm(1.0)))
    batches = make_data(tmp_path, 24)
    batches.setup("fit")
    rows, left = [], []
    with torch.no_grad():
        for batch in batches.train_dataloader():
            energy = trained(batch, create_graph=False).energy
            sizes = batch.ptr[1:] - batch.ptr[:-1]
            for index, atoms in enumerate(sizes.tolist()):
                numbers = batch.atomic_numbers[batch.batch == index]
                rows.append([float((numbers == z).sum()) / atoms for z in ELEMENTS])
            left.append((batch.energy - energy) / sizes)
    slope = np.linalg.lstsq(np.array(rows), torch.cat(left).numpy(), rcond=None)[0]
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)  # nothing linear is left
    assert float(trained.element_references[1]) == pytest.approx(batches.statistics.element_references[1], rel=1e-12)
    assert float(trained.element_shifts.abs().max()) > 1e-4
    saved = load_potential(tmp_path / "last.ckpt")
    assert torch.equal(saved.element_shifts, trained.element_shifts)
    assert saved(batch, create_graph=False).energy.tolist() == pytest.approx(energy.tolist(), rel=1e-6)


def test_averaged_weights_have_energies_of_their_own(tmp_path: Path) -> None:
    """An average of weights has other energies than the weights of the last step, whose shifts are fitted."""
    seed_everything(0)
    data, module = make_data(tmp_path, 24), PotentialModule(TINY, learning_rate=0.01)
    make_trainer(tmp_path, [WeightEMA(0.99), BestAndLast(dirpath=str(tmp_path))], max_epochs=3).fit(module, data)
    structures = list(data.datasets["train"])
    for name in ("best", "last"):
        found = load_potential(tmp_path / f"{name}.ckpt").predict(structures)
        errors = [float(one.energy - each.energy) / one.num_nodes for one, each in zip(structures, found, strict=True)]
        assert abs(np.median(errors)) < 0.25 * np.mean(np.abs(errors))


def test_they_stay_where_asked_and_where_given(tmp_path: Path) -> None:
    assert not _train(tmp_path, 2, refit_references=False).element_shifts.any()
    isolated = {"H": -13.0, "C": -5.0, "N": -5.5, "O": -6.0}
    trained = _train(tmp_path / "isolated", 2, isolated)
    assert trained.element_references[list(ELEMENTS)].tolist() == [-13.0, -5.0, -5.5, -6.0]
    assert not trained.element_shifts.any()


def _repelled(folder: Path, epochs: int = 1, resume: str | None = None, **settings: Any) -> tuple[Potential, Any]:
    module, data = PotentialModule(TINY, **settings), make_data(folder, 12)
    trainer = make_trainer(folder, [WeightEMA(0.9), BestAndLast(dirpath=str(folder))], max_epochs=epochs)
    trainer.fit(module, data, ckpt_path=resume)
    return module.potential, data


def test_onsets_are_those_of_the_training_set(tmp_path: Path) -> None:
    trained, data = _repelled(tmp_path)
    found = measure_distances(data.datasets["train"], trained.cutoff)
    closest, (start, end) = found.closest, bond_gaps(found)
    expected, guarded = zbl_onsets(closest).float(), guard_onsets(found).clamp_max(trained.cutoff).float()
    assert 0.7 < float(expected[1, 8]) < 0.97
    assert 1.0 < float(guarded[1, 1]) < 1.65
    for potential in (trained, load_potential(tmp_path / "last.ckpt"), load_potential(tmp_path / "best.ckpt")):
        assert torch.equal(potential.repulsion.onset, expected)
        assert torch.equal(potential.core_guard.onset, guarded)
        assert torch.equal(potential.bond_guard.start, start.float())
        assert torch.equal(potential.bond_guard.onset, end.clamp_max(trained.cutoff).float())
    loaded = load_potential(tmp_path / "last.ckpt")
    loaded.save(tmp_path / "model.escaip")
    assert torch.equal(load_potential(tmp_path / "model.escaip").repulsion.onset, expected)


def test_a_resumed_run_keeps_what_its_checkpoint_has(tmp_path: Path) -> None:
    _repelled(tmp_path, repulsion=None, core_guard=None, bond_guard=None)
    assert not load_potential(tmp_path / "last.ckpt").repulsion
    resumed, _ = _repelled(tmp_path, 2, str(tmp_path / "last.ckpt"))
    assert not resumed.repulsion
    assert not resumed.core_guard
    assert not resumed.bond_guard
    assert not load_potential(tmp_path / "last.ckpt").repulsion


def test_a_data_module_without_structures(tmp_path: Path) -> None:
    module = PotentialModule(TINY)
    data = make_data(tmp_path, 12)
    data.setup("fit")
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        datamodule=SimpleNamespace(statistics=data.statistics), precision_plugin=Precision()
    )
    with pytest.raises(ConfigError, match="set the first three to null"):
        module.setup("fit")


def test_it_can_be_chosen(tmp_path: Path) -> None:
    fractions = [float(_repelled(tmp_path / str(f), repulsion=f)[0].repulsion.onset[1, 8]) for f in (0.45, 0.9)]
    assert fractions[1] == pytest.approx(2 * fractions[0], rel=1e-5)
    with pytest.raises(ConfigError, match="repulsion is 2"):
        PotentialModule(TINY, repulsion=2.0)
