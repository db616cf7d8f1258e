"""The Lightning module: a potential, its losses and its logged figures."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from tqdm import tqdm

from escaip.data import AtomicData, Statistics
from escaip.data.dataset import MixedDataset, evenly
from escaip.errors import ConfigError, TrainingError
from escaip.models import ModelConfig, build_config, settings_of
from escaip.potential import Potential, PotentialMetadata
from escaip.potential.atomic_energies import fit_charges
from escaip.potential.loading import read_potential
from escaip.potential.potential import ENERGY_BUFFERS, missing_energies
from escaip.potential.zbl import check_fraction, fit_onsets
from escaip.train.atomic_energy_refit import ReferenceFit, remaining_shifts
from escaip.train.init_from import freeze as freeze_parts
from escaip.train.init_from import relabel, start_from
from escaip.train.linear_fit import LinearRefit, fit_linear_energy
from escaip.train.lora import LowRankUpdate, adapted_weights
from escaip.train.losses import LossSettings, LossSums, loss_sums
from escaip.train.metrics import ErrorMetrics, error_sums, errors_from_sums, figure_name
from escaip.train.mup import fan_in_ratios, scale_outputs
from escaip.train.optim import make_optimizer, make_schedule
from escaip.train.stages import ForceStages, forget
from escaip.types import TARGETS, Prediction, StructureBatch

DEFAULT_ARCHITECTURE: dict[str, Any] = {"preset": "1m"}
DEFAULT_LOSSES = LossSettings()
DEFAULT_PAIR_TERMS = {"repulsion": 0.9, "core_guard": 0.98, "bond_guard": 0.9}
_NAMES_SHOWN = 8
_SETTLING = 64  # structures of each set that shifts are fitted to before a validation


class PotentialModule(LightningModule):
    """Trains a ``Potential``.

    Logged at each step: ``train/loss``, the MAE of every target that is predicted and labelled
    (``train/energy_mae_meV_per_atom``, ``train/force_mae_meV_per_A``), ``train/grad_norm`` and ``lr``; at each
    validation ``val/loss``, the errors of ``escaip.train.metrics`` and those of the trivial baseline as
    ``val_baseline/...``.

    With several processes the loss of a step is that of the union of their batches: sums over all labelled entries
    divided by their number, so two processes train as one process would on both batches. Gradient accumulation
    averages the losses of its batches. The random numbers of dropout depend on (seed, epoch, batch, process) alone,
    so a resumed run draws those of an uninterrupted one.

    Attributes:
        potential: the potential in training.
        learning_rate: peak learning rate.
        stages: says whether forces are direct for now (``direct_share``).
        resumes: set it before a fit from a checkpoint, which then does not read the file of ``init_from``.
        last_errors: errors of the last validation, ``{"model": ..., "baseline": ...}``, and for a mixture each set by
            name.
    """

    _energy_fit: ReferenceFit | LinearRefit | None = None
    _low_rank: LowRankUpdate | None = None
    _lora_state: dict[str, dict[str, Tensor]] | None = None
    _loader_state: dict[str, Any] | None = None
    _dropped: Sequence[Tensor] = ()

    def __init__(
        self,
        architecture: dict[str, Any] = DEFAULT_ARCHITECTURE,
        losses: LossSettings = DEFAULT_LOSSES,
        optimizer: Literal["adamw", "soap"] = "soap",
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-3,
        warmup_fraction: float = 0.05,
        final_fraction: float = 0.01,
        level_of_theory: str = "unknown",
        datasets: Sequence[str] = (),
        compile: bool = False,
        recompute: bool = False,
        refit_references: bool = True,
        base_width: int | None = None,
        repulsion: float | None = 0.9,
        core_guard: float | None = 0.98,
        bond_guard: float | None = 0.9,
        init_from: str | None = None,
        init_energies: Literal["refit", "keep"] = "refit",
        init_dataset: str | None = None,
        freeze: Sequence[str] = (),
        lora: int = 0,
        direct_share: float = 0.0,
    ) -> None:
        """Builds the potential.

        Args:
            architecture: settings of ``EScAIPConfig``, with ``preset`` naming the size to start from;
                default the preset ``1m``.
            losses: kinds and weights of the loss; default energy MAE (1) and force L2 norm (10).
            optimizer: see ``escaip.train.optim.make_optimizer``.
            learning_rate: peak learning rate.
            weight_decay: decay of the weights of linear layers.
            warmup_fraction: part of the steps over which the learning rate rises.
            final_fraction: learning rate of the last step in units of the peak.
            level_of_theory: level of theory of the labels, in words; stored with the model. Default that of a
                prepared store or of structures that state it, which it must not contradict.
            datasets: names of the training sets; stored with the model.
            compile: compile energy, forces and their derivatives into one graph (docs/howto/speed.md): the first step
                takes minutes, the others half as long as without.
            recompute: keep only the inputs of each block and compute the rest again for the derivatives: a fraction of
                the memory for about a third more time (arXiv 1604.06174).
            refit_references: after each epoch shift the element references by a fit to the remaining energy errors
                (docs/concepts/energies.md); those given as energies of isolated atoms stay.
            base_width: ``hidden_size`` at which ``learning_rate`` and ``weight_decay`` were found; other widths scale
                them, and the first outputs, so that they stay right (maximal-update parametrisation,
                ``escaip.train.mup``). Default: used as they are.
            repulsion: between atoms closer than this fraction of the shortest distance between their elements in the
                training set (``escaip.potential.zbl``); null for none.
            core_guard: a softer repulsion between atoms, bonded or not, closer than this fraction of the shortest
                distance between their elements in the training set, less what that varies by among parts of the set;
                null for none.
            bond_guard: stiffens bonds longer than any in the training set up to this fraction of the distance of the
                next atoms of their elements, where the set shows no atoms in between; null for none.
            init_from: model file or ``example:NAME`` whose architecture, weights, scale, repulsion and guards the
                training starts from (docs/howto/finetune.md).
            init_energies: ``refit`` fits atomic energies to the labels before the first step; ``keep`` keeps those of
                the file.
            init_dataset: of a file with several data sets, the one whose energies, scale and head those sets of
                ``data.train`` take whose name the file does not have.
            freeze: parts of the model that do not learn: embedding, blocks.0, ..., readouts, heads.
            lora: rank of the updates that linear weights outside of the heads learn (``escaip.train.lora``); 0 for
                weights that learn in full.
            direct_share: part of the steps in which the model learns energies and direct forces, which take less time,
                before it learns conservative ones with the same weights (``escaip.train.stages``).

        Raises:
            ConfigError: a setting that does not exist or cannot be used.
            CheckpointError: ``init_from`` cannot be read.
        """
        if init_from is not None and dict(architecture) == DEFAULT_ARCHITECTURE:
            architecture = settings_of(read_potential(init_from).config)
        settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        if compile and recompute:
            raise ConfigError("compile and recompute do not go together: set one of them to false")
        _check_schedule(learning_rate, weight_decay, warmup_fraction, final_fraction)
        self.pair_terms = {"repulsion": repulsion, "core_guard": core_guard, "bond_guard": bond_guard}
        for name, fraction in self.pair_terms.items():
            check_fraction(fraction, name)
        _check_start(init_from, init_dataset, freeze, lora, direct_share, self.pair_terms)
        config = build_config(dict(architecture))
        _check_losses(losses, config)
        self.save_hyperparameters(_plain(settings), logger=False)
        self.losses = losses
        self.optimizer_name, self.learning_rate, self.weight_decay = optimizer, learning_rate, weight_decay
        self.warmup_fraction, self.final_fraction = warmup_fraction, final_fraction
        metadata = PotentialMetadata(level_of_theory=level_of_theory, datasets=tuple(datasets))
        potential = self.potential = Potential(config, metadata=metadata)
        self.stages = ForceStages(potential, direct_share)
        self.base_width, self._ratios = base_width, dict[str, float]()
        if base_width is not None:
            self._ratios = {f"potential.model.{k}": v for k, v in fan_in_ratios(potential.config, base_width).items()}
            scale_outputs(potential.model, potential.config, base_width)
        freeze_parts(potential.model, freeze)
        adapted_weights(potential.model, lora)  # refuses ranks and parts
        self.init_from, self.init_energies, self.init_dataset, self.lora = init_from, init_energies, init_dataset, lora
        potential.recompute = True if recompute else None
        if compile:
            potential.compile()
        self.validation_errors = ErrorMetrics(losses)
        self.last_errors, self._card_errors = dict[str, dict[str, float]](), dict[str, float]()
        self.refit_references, self._recent = refit_references, list[str]()
        self.resumes, self._dropout_seed, self._total_steps = False, 0, 1

    def setup(self, stage: str) -> None:
        """Takes references, scale and elements from the data module; a checkpoint that is resumed replaces them.

        The seed of dropout is that of the process and kept for the whole run, resumed parts included.

        Raises:
            ConfigError: a loss on a label that no training structure has, no statistics at all, or no structures to
                look up distances in.
            DataError: a charge out of range, for a model that is conditioned on it.
        """
        self.trainer.precision_plugin.convert_module(self)  # before weights are read, which it would round
        if stage != "fit":
            return
        self._dropout_seed = torch.initial_seed() % 2**31
        data: Any = getattr(self.trainer, "datamodule", None)
        statistics = getattr(data, "statistics", None)
        if statistics is not None:
            self._use_statistics(statistics, data)
        elif self.init_from is not None or not self.potential.metadata.elements:
            raise ConfigError(
                "no statistics of the training set: pass a data module, or call module.potential.set_statistics first"
            )

    def _use_statistics(self, statistics: Any, data: Any) -> None:
        several = isinstance(statistics, Mapping)
        sets = list(statistics.values()) if several else [statistics]
        for name, weight in self.losses.weights.items():
            if weight > 0 and not any(item.label_counts.get(name, 0) for item in sets):
                raise ConfigError(
                    f"losses.{_place(name)}.weight is {weight:g}, but no training structure has {name}: "
                    "set it to 0, or name the label's key in data.train"
                )
        structures = getattr(data, "datasets", {}).get("train")
        if self.init_from is not None:
            self._start(statistics, data, structures, sets)
        elif several:
            self.potential.set_statistics(statistics, shares=data.shares, scale=data.scale)
        else:
            self.potential.set_statistics(statistics)
        level = getattr(data, "level_of_theory", "")
        stated = self.potential.metadata.level_of_theory
        if level not in ("", stated) and stated != "unknown" and not several:
            raise ConfigError(
                f"model.level_of_theory is {stated}, the training data state {level}: leave model.level_of_theory out, "
                "or correct one of them"
            )
        if level and stated == "unknown":
            self.potential.set_metadata(dataclasses.replace(self.potential.metadata, level_of_theory=level))
        if self.init_from is None:
            self._fit_energies(structures, sets)

    def _start(self, statistics: Any, data: Any, structures: Any, sets: Sequence[Statistics]) -> None:
        """Starts from the file of ``init_from``, unless a checkpoint is resumed."""
        if getattr(data, "scale", "shared") != "shared":
            raise ConfigError("model.init_from keeps the force scale of its file: leave data.scale out")
        keep, replayed = self.init_energies == "keep", getattr(data, "replayed", [])
        if self.refit_references:
            names = list(statistics) if isinstance(statistics, Mapping) else [""]
            kept = {name for name in names if keep or name in replayed}
            fitted = [item.references_fitted and name not in kept for name, item in zip(names, sets, strict=True)]
            elements = sorted({z for item in sets for z in item.elements})
            self._energy_fit = ReferenceFit(elements, fitted, self.losses.energy)
        if self.resumes:
            return
        if structures is None:
            raise ConfigError(
                "model.init_from looks at the training structures: give the data module datasets['train']"
            )
        device = self.trainer.strategy.root_device
        place, of = str(self.init_from), self.init_dataset
        rank_zero_only(print)(start_from(self.potential, place, statistics, structures, keep, device, of, replayed))

    def relabel(self, structures: Iterable[AtomicData], name: str) -> tuple[list[AtomicData], str]:
        """Returns copies of structures of a set with labels from the file of ``init_from``, and the file's hash.

        See ``escaip.train.init_from.relabel``.
        """
        stress, device = self.losses.weights["stress"] > 0, self.trainer.strategy.root_device
        return relabel(str(self.init_from), structures, name, self.init_dataset, stress, device)

    def _fit_energies(self, structures: Any, sets: Sequence[Statistics]) -> None:
        """Fits onsets of the pair terms, energies of charges and the linear energy, before training begins."""
        potential, fitted = self.potential, [item.references_fitted for item in sets]
        has_pair_terms = any(fraction is not None for fraction in self.pair_terms.values())
        has_linear_energy = getattr(potential.model, "density", None) is not None
        if structures is None and (has_pair_terms or has_linear_energy):
            raise ConfigError(
                "model.repulsion, core_guard and bond_guard, and density_radial, look at the training structures, and "
                "this data module has no datasets['train']: set the first three to null and the last to 0"
            )
        if has_pair_terms:
            terms = {getattr(potential, name): fraction for name, fraction in self.pair_terms.items()}
            members: Any = structures.members.values() if isinstance(structures, MixedDataset) else [structures]
            fit_onsets(terms, list(members), potential.cutoff)
        if potential.config.charge and structures is not None:
            references, charges = fit_charges(potential.element_references.cpu(), structures, fitted)
            potential.set_references(references, potential.scale, charges)
        if has_linear_energy:
            fit_linear_energy(potential, structures, sets[0].force_rms, fitted[0])
            self._energy_fit = LinearRefit(potential, fitted[0] and self.refit_references)
        elif self.refit_references:
            self._energy_fit = ReferenceFit(potential.metadata.elements, fitted, self.losses.energy)

    def on_train_start(self) -> None:
        """Returns the training data to the place where a resumed run left it.

        Lightning restores loaders only where it had not built them yet, but ``estimated_stepping_batches`` builds them
        before it reads their state. A loader reads its own when the first batch is taken, which comes after this.
        """
        loader: Any = self.trainer.train_dataloader
        if self._loader_state is not None and hasattr(loader, "load_state_dict"):
            loader.load_state_dict(self._loader_state)
        self._loader_state = None

    def on_train_batch_start(self, batch: StructureBatch, batch_idx: int) -> None:
        """Ends the first stage, and makes random numbers a function of (seed, epoch, batch, process)."""
        step = self.trainer.global_step
        if self.stages.is_first and step >= self.stages.share * self._total_steps:
            gone = self.stages.end()
            self._dropped = gone if self.trainer.world_size > 1 else ()
            schedule: Any = self.lr_schedulers()
            forget(self.trainer.optimizers[0], schedule, self)
            rank_zero_only(tqdm.write)(f"step {step}: forces are conservative from here on")
        seed = self._dropout_seed
        for part in (self.current_epoch, batch_idx, self.global_rank):
            seed = (seed * 6_364_136_223_846_793_005 + part + 1_442_695_040_888_963_407) % 2**63
        torch.manual_seed(seed)

    def training_step(self, batch: StructureBatch, batch_idx: int) -> Tensor:
        """Returns the loss of this process; its mean over processes is the loss of the union of their batches.

        Raises:
            TrainingError: the loss is NaN or Inf.
        """
        losses = self.losses.at(self.trainer.global_step / self._total_steps)
        forces, stress = losses.weights["forces"] > 0, losses.weights["stress"] > 0 and not self.stages.is_first
        prediction = self.potential(batch, compute_forces=forces, compute_stress=stress, create_graph=True)
        terms = loss_sums(prediction, batch, losses)
        local = [terms.sums.detach(), terms.counts, error_sums(prediction, batch)]
        if self._energy_fit is not None:
            local.append(self._energy_fit.of_batch(prediction, batch))
        total = self.trainer.strategy.reduce(torch.cat(local), reduce_op="sum")
        sums, counts, errors, *fit = total.split([len(part) for part in local])
        loss = terms.total(losses, counts) * self.trainer.world_size
        for weight in self._dropped:
            loss = loss + 0.0 * weight.sum()  # processes wait for the gradients of all that they began with
        logged = LossSums(sums, counts).total(losses)
        self._recent.extend(str(name) for name in batch.structure_id)
        if not torch.isfinite(logged):
            raise self._loss_failure(float(logged), terms, batch)
        if self._energy_fit is not None:
            self._energy_fit.add(fit[0], self.trainer.num_training_batches)
        found = errors_from_sums(errors)
        names = [figure_name(target, "mae") for target in TARGETS.values()]
        shown = {f"train/{name}": found[name] for name in names if name in found}
        self.log_dict({"train/loss": float(logged), **shown}, batch_size=1)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=1)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Solves for the energies that are linear, so that averaged weights and checkpoints go with them."""
        fit, trainer = self._energy_fit, self.trainer
        if fit is not None and fit.is_due(trainer.global_step, self._total_steps, trainer.is_last_batch):
            fit.apply(self.potential)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips, logs the norm, and stops where it is not finite.

        Raises:
            TrainingError: a gradient is NaN or Inf (float16 training skips such steps instead).
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if not torch.isfinite(norm) and not scaled:
            problem = f"gradient norm is {float(norm)} at step {self.trainer.global_step} after the batch of"
            raise _training_error(self.trainer, problem, self._recent)
        self.log("train/grad_norm", norm, batch_size=1)
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self._recent = []

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Steps; with ``lora`` in the factors of the weights, after the gradients of all processes are summed."""
        low_rank = self._low_rank
        if low_rank is None or optimizer_closure is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            return

        def closure() -> Any:
            result = optimizer_closure()
            low_rank.take_gradients()
            return result

        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        low_rank.apply()

    def on_validation_epoch_start(self) -> None:
        """Keeps the errors of the sets of a mixture apart, once it is known that there are several."""
        if self.validation_errors.datasets != self.potential.datasets:
            self.validation_errors = ErrorMetrics(self.losses, self.potential.datasets).to(self.device)

    def settle_energies(self) -> None:
        """Fits the shifts of averaged weights, about to be validated and saved, to some training structures.

        While weights change, energies of all structures move up and down together; what the training fits is for the
        weights of that moment.
        """
        data: Any = getattr(getattr(self.trainer, "datamodule", None), "datasets", {}).get("train")
        if self._energy_fit is None or data is None:
            return
        fitted, shifts = self._energy_fit.fitted, self.potential.element_shifts
        members: list[Any] = [*data.members.values()] if len(fitted) > 1 else [data]
        for own, member, is_fitted in zip(shifts.view(len(fitted), -1), members, fitted, strict=True):
            if is_fitted:
                change = remaining_shifts(self.potential, evenly(member, _SETTLING), self.losses.energy)
                own += self.trainer.strategy.broadcast(change)

    def validation_step(self, batch: StructureBatch, batch_idx: int) -> None:
        """Adds the errors of a batch.

        Raises:
            TrainingError: a prediction is NaN or Inf.
        """
        prediction = self._predict(batch)
        finite = torch.ones_like(batch.ptr[1:], dtype=torch.bool)
        for target in TARGETS.values():
            # Stress is NaN by definition where a structure has no volume.
            value = prediction.of_target(target.name) if target.name != "stress" else None
            if value is not None:
                bad = ~torch.isfinite(value).reshape(len(value), -1).all(-1)
                finite[batch.batch[bad] if target.per_atom else bad] = False
        if not bool(finite.all()):
            names = [name for name, fine in zip(batch.structure_id, finite.tolist(), strict=True) if not fine]
            raise _training_error(self.trainer, "prediction is NaN or Inf in validation for", names)
        self.validation_errors.update(prediction, batch, self.potential.atomic_references(batch))

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step

    def on_validation_epoch_end(self) -> None:
        """Logs errors, loss and baseline of the whole set."""
        self._log_errors("val")

    def on_test_epoch_end(self) -> None:
        """Logs errors, loss and baseline of the whole set."""
        self._log_errors("test")

    def configure_optimizers(self) -> Any:
        """Returns the optimizer, with warm-up and cosine over the whole run, stepped with the optimizer."""
        if self.lora:
            seed = self.trainer.strategy.broadcast(self._dropout_seed)
            self._low_rank = LowRankUpdate(self.potential.model, self.lora, seed, self._lora_state)
        optimizer = make_optimizer(
            self, self.learning_rate, self.weight_decay, self._ratios, self.optimizer_name, self._low_rank,
            {f"potential.{name}" for name in self.stages.alone},
        )  # fmt: skip
        total = self.trainer.estimated_stepping_batches
        schedule = make_schedule(optimizer, total, self.warmup_fraction, self.final_fraction)
        self._total_steps = max(1, int(total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the entries that ``escaip.load_potential`` reads, the seed of dropout and the place in the data."""
        checkpoint["escaip"] = self.potential.describe()
        checkpoint["escaip"]["metadata"]["provenance"] |= self._card()
        checkpoint["dropout_seed"] = self._dropout_seed
        if self._energy_fit is not None:
            checkpoint["reference_fit"] = self._energy_fit.sums
        if self._low_rank is not None:
            checkpoint["lora"] = self._low_rank.state_dict()
        loader: Any = self.trainer.train_dataloader
        if hasattr(loader, "state_dict"):
            checkpoint["train_loader"] = loader.state_dict()

    def _card(self) -> dict[str, Any]:
        """Returns what the file states of the training: data, licences, citations, errors of the last validation."""
        data = getattr(getattr(self.trainer, "datamodule", None), "card", {})
        errors = {name: value for name, value in self._card_errors.items() if math.isfinite(value)}
        return {**data, "validation_errors": errors} if errors else data

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes elements, level of theory and the seed from a checkpoint; Lightning restores the weights."""
        if "escaip" in checkpoint:
            if self.stages.is_first and checkpoint["escaip"]["config"]["forces"] == "conservative":
                self.stages.end()
            self.potential.set_metadata(PotentialMetadata.from_dict(checkpoint["escaip"]["metadata"]))
        for weights in (checkpoint["state_dict"], checkpoint.get("current_model_state", {})):
            if "potential.element_references" in weights:
                for name, values in missing_energies(weights["potential.element_references"]).items():
                    weights.setdefault(f"potential.{name}", values)
        # One set of references, or one for each of several: the checkpoint says.
        for name in ENERGY_BUFFERS:
            stored = checkpoint["state_dict"].get(f"potential.{name}")
            if stored is not None:
                setattr(self.potential, name, stored.to(self.potential.device, copy=True))
        sums = checkpoint.get("reference_fit")
        if self._energy_fit is not None and sums is not None and sums.shape == self._energy_fit.sums.shape:
            self._energy_fit.sums = sums.to(self.potential.device, copy=True)
        self._loader_state, self._lora_state = checkpoint.get("train_loader"), checkpoint.get("lora")
        self._dropout_seed = int(checkpoint.get("dropout_seed", self._dropout_seed))

    def _predict(self, batch: Any) -> Prediction:
        """Predicts for a validation; conservative forces are derivatives, also in Lightning's inference mode."""
        stress = self.potential.config.is_conservative and bool((~torch.isnan(batch.stress)).any())
        if not torch.is_inference_mode_enabled():
            return self.potential(batch, compute_stress=stress, create_graph=False)
        with torch.inference_mode(False):
            return self.potential(batch.clone(), compute_stress=stress, create_graph=False)

    def _log_errors(self, stage: str) -> None:
        self.last_errors = self.validation_errors.compute()
        if stage == "val" and not self.trainer.sanity_checking:
            self._card_errors = {name: float(value) for name, value in self.last_errors["model"].items()}
        self.validation_errors.reset()
        model = {f"{stage}/{name}": value for name, value in self.last_errors["model"].items()}
        baseline = {f"{stage}_baseline/{name}": value for name, value in self.last_errors["baseline"].items()}
        sets = {
            f"{stage}/{name}/{dataset}": value
            for dataset in self.potential.datasets
            for name, value in self.last_errors[dataset].items()
        }
        self.log_dict({**model, **baseline, **sets}, batch_size=1, sync_dist=True)

    def _loss_failure(self, loss: float, terms: LossSums, batch: StructureBatch) -> Exception:
        finite = torch.isfinite(terms.sums).tolist()
        bad = [name for name, fine in zip(self.losses.terms, finite, strict=True) if not fine]
        problem = f"loss is {loss} at step {self.trainer.global_step}"
        if not bad:
            return TrainingError(f"{problem} in another process: see its message")
        return _training_error(self.trainer, f"{problem} (from {', '.join(bad)}) in the batch of", batch.structure_id)


def _place(name: str) -> str:
    """Returns where the loss on a target stands in ``losses``."""
    return name if name in ("energy", "forces", "stress") else f"properties.{name}"


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings as dicts, lists, numbers and text, which a checkpoint can hold without running code."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(settings, default=dataclasses.asdict))
    except TypeError as error:
        raise ConfigError(f"a setting of the model cannot be stored ({error}): use numbers, text and lists") from error
    return plain


def _check_losses(losses: LossSettings, config: ModelConfig) -> None:
    """Raises ConfigError for a loss on a target that the model does not predict, or a head that no loss trains."""
    heads = config.heads
    for name, term in losses.terms.items():
        if name == "stress" and term.weight > 0 and not config.is_conservative:
            raise ConfigError("losses.stress.weight is above 0, but a direct-force model has no stress: set it to 0")
        if name not in ("energy", "forces", "stress", *heads):
            raise ConfigError(
                f"losses.{_place(name)} needs a head that predicts {name}: name it in model.architecture.heads"
            )
    for name in heads:
        if name not in losses.properties:
            raise ConfigError(f"head {name!r} has no loss: give losses.{_place(name)}, or remove it from heads")


def _check_schedule(learning_rate: float, weight_decay: float, warmup: float, final: float) -> None:
    if not learning_rate > 0:
        raise ConfigError(f"learning_rate is {learning_rate}: it must be above 0")
    if weight_decay < 0:
        raise ConfigError(f"weight_decay is {weight_decay}: it must be at least 0")
    for name, value in (("warmup_fraction", warmup), ("final_fraction", final)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} is {value}: it must be in [0, 1]")


def _check_start(
    init_from: str | None,
    init_dataset: str | None,
    freeze: Sequence[str],
    lora: int,
    direct_share: float,
    pair_terms: Mapping[str, float | None],
) -> None:
    if lora < 0:
        raise ConfigError(f"model.lora is {lora}: it must be a rank, or 0 for none")
    if init_from is not None and direct_share:
        raise ConfigError("model.direct_share is for random weights, and model.init_from has others: leave it out")
    if init_from is None and lora:
        raise ConfigError("model.lora would add to random weights: name the potential in model.init_from")
    if init_from is None and freeze:
        raise ConfigError("model.freeze would keep random weights: name the potential in model.init_from")
    if init_from is None and init_dataset is not None:
        raise ConfigError("model.init_dataset names a set of no file: name the potential in model.init_from")
    if init_from is not None and pair_terms != DEFAULT_PAIR_TERMS:
        raise ConfigError(
            "model.init_from keeps the repulsion and guards of its file: leave model.repulsion, core_guard and "
            "bond_guard out"
        )


def _training_error(trainer: Trainer, problem: str, names: Sequence[str]) -> TrainingError:
    """Returns the error for numbers that are not finite: the problem, the structures and the last good checkpoint."""
    shown = ", ".join(str(name) for name in names[:_NAMES_SHOWN])
    shown += f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    good = "no checkpoint had been written yet"
    for callback in reversed(trainer.checkpoint_callbacks):
        path = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
        good = f"the last good checkpoint is {path}" if path else good
    return TrainingError(f"{problem} {shown}; {good}: inspect these structures, or lower model.learning_rate")
