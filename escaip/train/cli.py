"""``escaip fit | validate | test``: a configuration file, overrides, and a folder for each run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, Namespace, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from escaip.data import AtomicDataModule
from escaip.data.sets import named_sets, replayed_sets
from escaip.errors import CheckpointError, ConfigError
from escaip.models import ModelConfig, build_config, settings_of
from escaip.potential.loading import read_potential
from escaip.potential.model_file import migrate
from escaip.train.arguments import find_checkpoint, pairs, prepare
from escaip.train.callbacks import (
    BestAndLast,
    FinalEvaluation,
    PlainCheckpointIO,
    RunReport,
    Stopped,
    TrainingProgress,
    read_checkpoint,
    run_folder,
)
from escaip.train.ema import WeightEMA
from escaip.train.init_from import FREE_SETTINGS, HEADS, SWITCHES, kept_architecture
from escaip.train.module import DEFAULT_ARCHITECTURE, PotentialModule
from escaip.train.resuming import TRAINER, DataCheck, check_settings, other_settings, trainer_settings
from escaip.train.run_log import RunLog

LATEST, LOG = "latest", "run.log"
_OF_ONE_COMMAND = ("ckpt_path", "config", "verbose", "weights_only")
_LONGEST_MESSAGE = 400
# Settings of a model that a run keeps when it is resumed, with those of checkpoints from before there was a choice.
_KEPT: dict[str, Any] = {
    "optimizer": "adamw", "init_from": None, "init_energies": "refit", "init_dataset": None, "freeze": [],
    "lora": 0, "direct_share": 0.0,
}  # fmt: skip


def run(argv: list[str]) -> int:
    """Runs one of the training commands and returns 0.

    Args:
        argv: ``["fit", "--config", FILE, "--trainer.max_steps", "100", ...]``; ``FILE`` is a path or the name of a
            recipe.

    Raises:
        ConfigError: a setting that does not exist or cannot be used.
        EscaipError: data, checkpoint or training failed; the message names the thing and the remedy.
        SystemExit: with 128 and the number of the signal that ended the run.
    """
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    cli: TrainingCLI | None = None
    with RunLog() as log:
        try:
            cli = build(argv, log)
            cli.execute()
        except MisconfigurationException as error:
            raise ConfigError(_one_line(error)) from error
        except SystemExit as stop:
            received = _received(stop)
            if received is None or cli is None:
                raise
            if cli.trainer.is_global_zero:
                print(f"{received.name}: {_how_to_go_on(argv, cli)}", flush=True)
            raise SystemExit(128 + received) from stop
    return 0


def _received(stop: SystemExit) -> signal.Signals | None:
    """Returns the signal that a ``SystemExit`` stands for; Lightning turns Ctrl-C and SIGTERM into such."""
    if isinstance(stop, Stopped):
        return stop.received
    if isinstance(stop, SIGTERMException):
        return signal.SIGTERM
    return signal.SIGINT if isinstance(stop.__context__, KeyboardInterrupt) else None


def _how_to_go_on(argv: list[str], cli: TrainingCLI) -> str:
    saved = getattr(cli.trainer.checkpoint_callback, "last_model_path", "")
    if not saved:
        return "stopped before a checkpoint was written" if argv[0] == "fit" else "stopped"
    kept = [pair for pair in pairs(argv[1:]) if pair[0] != "--ckpt_path"]
    words = [word for pair in kept for word in pair if word is not None]
    command = shlex.join(["escaip", "fit", *words, "--ckpt_path", "last"])
    return f"stopped at step {cli.trainer.global_step}, saved in {os.path.relpath(saved)}; continue with\n{command}"


def build(argv: list[str], log: RunLog | None = None) -> TrainingCLI:
    """Parses the same arguments and builds model, data module and trainer, without running anything.

    What ``log`` has noted is kept in the folder of the run.
    """
    arguments, name, settings = prepare(argv)
    return TrainingCLI(
        PotentialModule,
        AtomicDataModule,
        save_config_callback=RunFolder,
        save_config_kwargs={"overwrite": True, "log": log},
        trainer_defaults={
            "gradient_clip_val": 100.0,
            "use_distributed_sampler": False,
            "inference_mode": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 10,
            "enable_model_summary": False,
        },
        seed_everything_default=0,
        parser_kwargs={"prog": "escaip", "description": "Trains and evaluates potentials."},
        parser_class=OneLineParser,
        args=arguments,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        default_name=name,
        options={key: value for key, value in settings.items() if key.startswith("model.architecture")},
    )


class OneLineParser(LightningArgumentParser):
    """Reports an error in one line instead of the usage of some hundred options; abbreviations are refused."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{_one_line(message)}: see {self.prog.replace(' [options]', '')} --help") from ex


class RunFolder(SaveConfigCallback):
    """Saves ``config.yaml`` and ``run.log`` in the folder of the run, and points the link ``latest`` beside it there.

    The logger takes a free ``version_N`` before data and settings are checked; a run that is refused gives it back.
    Options of one command only are left out of the configuration, so that the file configures any of them and a rerun
    starts afresh.
    """

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, *, log: RunLog | None, **kwargs: Any
    ) -> None:
        config = config.clone()
        for key in _OF_ONE_COMMAND:
            config.pop(key, None)
        super().__init__(parser, config, **kwargs)
        self._log = log

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes nothing: the checks of the run are still to come."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the files and moves the link, once."""
        if self.already_saved:
            return
        super().setup(trainer, pl_module, str(trainer.state.fn))
        if trainer.is_global_zero:
            if self._log is not None:
                self._log.open(run_folder(trainer) / LOG)
            if trainer.state.fn == "fit":
                self._link(run_folder(trainer))

    # The first of these to come: a finished run that is resumed trains no more.
    on_fit_end = on_validation_start = on_test_start = on_train_start

    @rank_zero_only
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes the folder of a run that was refused, and the folder above it, where they are empty."""
        if not self.already_saved and trainer.loggers:
            folder = run_folder(trainer)
            with contextlib.suppress(OSError):
                folder.rmdir()
                folder.parent.rmdir()

    @staticmethod
    def _link(folder: Path) -> None:
        if not folder.name.startswith("version_"):
            return
        link = folder.parent / LATEST
        aside = folder.parent / f".{LATEST}.{os.getpid()}"
        if link.is_symlink() or not link.exists():
            aside.symlink_to(folder.name)
            os.replace(aside, link)


class TrainingCLI(LightningCLI):
    """LightningCLI with run folders, averaged weights, checkpoints, one progress bar and a table of errors."""

    def __init__(self, *args: Any, default_name: str, options: Mapping[str, Any], **kwargs: Any) -> None:
        self._default_name, self._options = default_name, options
        command = kwargs["args"][0]
        # Of the parsers of three commands, which take a while to build, only the one in use is built.
        self.subcommands = lambda: {command: LightningCLI.subcommands()[command]}  # type: ignore[method-assign]
        super().__init__(*args, **kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        """Does nothing, so that building and running are two steps."""

    def execute(self) -> None:
        """Runs the command that was parsed."""
        super()._run_subcommand(str(self.subcommand))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of a run."""
        parser.add_argument("--name", type=str, default=self._default_name, help="folder of the runs, inside --out")
        parser.add_argument("--out", type=str, default="runs", help="where runs are kept")
        parser.add_lightning_class_args(WeightEMA, "ema")
        parser.add_lightning_class_args(BestAndLast, "checkpoint")
        parser.add_lightning_class_args(FinalEvaluation, "evaluation")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "fit":
            parser.set_defaults({"verbose": False})
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses exactly the arguments given."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def _parse_ckpt_path(self) -> None:
        """Resolves ``last`` and ``best``, and makes sure that the model is the one in the checkpoint, or the base."""
        command = self.config.subcommand
        config = self.config[command]
        start = config.model.init_from
        if config.get("ckpt_path") is None:
            if command != "fit":
                raise ConfigError(f"escaip {command} needs a model: pass --ckpt_path FILE, or best, or last")
            if start is not None:
                self._keep_architecture(read_potential(start).config, start, SWITCHES)
            return
        path = find_checkpoint(config.ckpt_path, Path(config.out) / config.name)
        checkpoint = read_checkpoint(path)
        if "escaip" not in checkpoint:
            raise CheckpointError(f"{path} is a checkpoint of another program: pass one that escaip fit wrote")
        description = migrate(checkpoint["escaip"], path)
        stored = {"name": description["architecture"], **description["config"]}
        config.ckpt_path = str(path)
        if command != "fit":
            config.model.architecture, config.model.direct_share = stored, 0.0
            return
        used = {**_KEPT, **checkpoint.get("hyper_parameters", {})}
        for name in _KEPT:
            given = json.loads(json.dumps(config.model[name]))
            if given != used[name]:
                raise other_settings(path, f"model.{name}", used[name], given)
        if start is not None:
            self._keep_architecture(build_config(stored), str(path), ())
        if used["direct_share"]:
            stored["forces"] = "conservative"  # whatever they are in the stage of the checkpoint
        _check_same_model(config.model.architecture, stored, path)
        self._resumed = {
            key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")
        }
        limit = config.trainer.max_epochs
        if limit is not None and -1 < limit < checkpoint["epoch"]:
            epoch = checkpoint["epoch"]
            raise ConfigError(f"{path} is at epoch {epoch}, trainer.max_epochs is {limit}: raise it to go on")

    def _keep_architecture(self, config: ModelConfig, place: str, switches: Sequence[str]) -> None:
        """Takes the architecture of the weights that a training starts from."""
        run, options = self.config[self.config.subcommand], dict[str, Any]()
        model = run.model
        for key, value in self._options.items():
            options.update(value if key == "model.architecture" else {key.removeprefix("model.architecture."): value})
        given = {name: value for name, value in model.architecture.items() if name not in options}
        recipe = {} if given == DEFAULT_ARCHITECTURE else given
        model.architecture, other = kept_architecture(config, place, options, recipe, switches)
        if HEADS in switches and HEADS not in options and model.architecture.get(HEADS, 1) > 1:
            replayed = replayed_sets(run.data.replay, run.data.replay_labels)
            model.architecture[HEADS] = max(1, len(named_sets("data.train", run.data.train)) + len(replayed))
        if other:
            rank_zero_only(print)(
                f"model.architecture of the configuration does not apply: {place} has another {', '.join(other)}"
            )

    def after_instantiate_classes(self) -> None:
        """Tells the model whether a checkpoint is resumed."""
        self.model.resumes = self.config[self.config.subcommand].get("ckpt_path") is not None

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        _check_strategy(config.get("strategy"))
        folder = Path(self._get(self.config, "out")) / self._get(self.config, "name")
        callbacks = [c for c in callbacks if not (isinstance(c, WeightEMA) and c.decay == 0.0)]
        callbacks += [DataCheck(), RunReport()]
        if config.get("enable_progress_bar") is not False:
            callbacks.append(TrainingProgress())
        if config.get("enable_checkpointing") is False:
            callbacks = [c for c in callbacks if not isinstance(c, BestAndLast)]
        config["logger"] = _loggers(config.get("logger"), folder)
        config["default_root_dir"] = config.get("default_root_dir") or str(folder)
        plugins = config.get("plugins") or []
        config["plugins"] = [PlainCheckpointIO(), *(plugins if isinstance(plugins, list) else [plugins])]
        if SLURMEnvironment.detect() and not any(isinstance(p, ClusterEnvironment) for p in config["plugins"]):
            # Lightning would save in the middle of a step, and every later run of that name would start from there.
            config["plugins"].append(SLURMEnvironment(auto_requeue=False))
        return super()._instantiate_trainer(config, callbacks)

    def before_fit(self) -> None:
        """Raises ConfigError for a run that is resumed with other settings."""
        path = self.config[self.subcommand].ckpt_path
        if path is not None:
            given = {"hyper_parameters": self.model.hparams, "datamodule_hyper_parameters": self.datamodule.hparams}
            check_settings(path, self._resumed, {**given, TRAINER: trainer_settings(self.trainer)})

    def after_fit(self) -> None:
        """Validates the final weights where the run ended between two validations."""
        trainer = self.trainer
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        reports = [callback for callback in callbacks if isinstance(callback, RunReport)]
        if any(trainer.global_step in report.steps for report in reports) or not trainer.limit_val_batches:
            return
        if "val" in self.datamodule.datasets:
            trainer.validate(self.model, datamodule=self.datamodule, verbose=False)


def _loggers(given: Any, folder: Path) -> list[Any] | bool:
    """Returns the CSV logger and the others asked for, unless logging is off."""
    if given is False:
        return False
    others = [] if given in (None, True) else given if isinstance(given, list) else [given]
    return [CSVLogger(save_dir=str(folder.parent), name=folder.name, flush_logs_every_n_steps=20), *others]


def _check_strategy(given: Any) -> None:
    """Raises ConfigError for strategies that divide the weights, and for names that Lightning does not know."""
    name = given if isinstance(given, str) else type(given).__name__
    if _divides(name):
        raise ConfigError(
            f"trainer.strategy {name} divides the weights between processes, but optimizer, averages and checkpoints "
            "take them whole: use ddp"
        )
    known = ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(given, str) and given.lower() not in known:
        choices = ", ".join(choice for choice in known if not _divides(choice))
        raise ConfigError(f"trainer.strategy {given!r} does not exist: choose among {choices}")


def _divides(strategy: str) -> bool:
    return any(part in strategy.lower() for part in ("fsdp", "deepspeed", "modelparallel"))


def _check_same_model(given: Mapping[str, Any], stored: Mapping[str, Any], path: Path) -> None:
    wanted, have = settings_of(build_config(dict(given))), settings_of(build_config(dict(stored)))
    for key in {**wanted, **have}:
        was, value = have.get(key), wanted.get(key)
        if value != was and key not in FREE_SETTINGS:
            raise ConfigError(f"{path} has model.architecture.{key} {was!r}, this run {value!r}: resume with the same")


def _one_line(message: object) -> str:
    text = " ".join(str(message).split())
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]} …"
