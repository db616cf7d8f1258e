"""``escaip fit | validate | test | predict``: a configuration file, overrides, and a folder for each run."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, Namespace, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from escaip.data import AtomicDataModule
from escaip.errors import CheckpointError, ConfigError, TrainingError
from escaip.files import config_path, resolve
from escaip.models import EScAIPConfig
from escaip.potential.loading import migrate
from escaip.train.callbacks import PredictionFile, RunReport, folder_of_run
from escaip.train.checkpoints import BEST, LAST, BestAndLast, PlainCheckpointIO, read_checkpoint
from escaip.train.ema import WeightEMA
from escaip.train.evaluation import FinalEvaluation
from escaip.train.module import PotentialModule
from escaip.train.progress import TrainingProgress

LATEST = "latest"
_OF_ONE_COMMAND = ("ckpt_path", "config", "lr_find", "return_predictions", "verbose", "weights_only")
_CONFIG_OPTIONS = ("--config", "-c")
_LONGEST_MESSAGE = 400
# What may differ between a checkpoint and the run that resumes it: it does not change the function.
_FREE_ON_RESUME = (
    "attention_backend", "dropout", "attention_dropout", "node_dropout", "edge_dropout", "scalar_dropout",
    "vector_dropout", "stochastic_depth",
)  # fmt: skip


def run(argv: list[str]) -> int:
    """Runs one of the training commands.

    Args:
        argv: ``["fit", "--config", FILE, "--trainer.max_steps", "100", ...]``; ``FILE`` is a path or the name of a
            recipe.

    Returns:
        0.

    Raises:
        ConfigError: a setting that does not exist or cannot be used.
        EscaipError: data, checkpoint or training failed; the message names what and the remedy.
    """
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    try:
        build(argv).execute()
    except MisconfigurationException as error:
        raise ConfigError(_one_line(error)) from error
    except SIGTERMException as stop:  # a SystemExit without a status, which would look like success
        raise TrainingError(
            "stopped by a termination signal: resume from the last checkpoint with --ckpt_path last"
        ) from stop
    return 0


def build(argv: list[str]) -> TrainingCLI:
    """Parses the same arguments and builds model, data module and trainer, without running anything."""
    arguments, name = _with_resolved_configs(argv)
    return TrainingCLI(
        PotentialModule,
        AtomicDataModule,
        save_config_callback=RunFolder,
        save_config_kwargs={"overwrite": True},
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
    )


class OneLineParser(LightningArgumentParser):
    """Reports what is wrong in one line instead of the usage of some hundred options; options have one spelling."""

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
    """Saves ``config.yaml`` in the folder of the run and points ``latest`` beside it there.

    What belongs to one command only is left out, so that the file configures any of them and a rerun starts afresh.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        config = config.clone()
        for key in _OF_ONE_COMMAND:
            config.pop(key, None)
        super().__init__(parser, config, **kwargs)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Moves the link; the rest is done before."""
        folder = folder_of_run(trainer)  # called on the first process alone
        if stage != "fit" or not folder.name.startswith("version_"):
            return
        link = folder.parent / LATEST
        aside = folder.parent / f".{LATEST}.{os.getpid()}"
        if link.is_symlink() or not link.exists():
            aside.symlink_to(folder.name)
            os.replace(aside, link)


class TrainingCLI(LightningCLI):
    """LightningCLI with run folders, averaged weights, checkpoints, one progress bar and a table of errors."""

    def __init__(self, *args: Any, default_name: str, **kwargs: Any) -> None:
        self._default_name = default_name
        super().__init__(*args, **kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing yet: building and running are two steps here."""

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
        if subcommand == "fit":
            parser.add_argument("--lr_find", type=bool, default=False, help="search model.learning_rate first")
        elif subcommand == "predict":
            parser.set_defaults({"return_predictions": False})
        else:
            parser.set_defaults({"verbose": False})
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses exactly the arguments given."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def _parse_ckpt_path(self) -> None:
        """Resolves ``last`` and ``best``, and makes sure that the model is the one in the checkpoint."""
        command = self.config.subcommand
        config = self.config[command]
        if config.get("ckpt_path") is None:
            if command != "fit":
                raise ConfigError(f"escaip {command} needs a model: pass --ckpt_path FILE, or best, or last")
            return
        path = find_checkpoint(config.ckpt_path, Path(config.out) / config.name)
        checkpoint = read_checkpoint(path)
        if "escaip" not in checkpoint:
            raise CheckpointError(f"{path} is a checkpoint of another program: pass one that escaip fit wrote")
        stored = migrate(checkpoint["escaip"], path)["config"]
        config.ckpt_path = str(path)
        if command != "fit":
            config.model.architecture = dict(stored)
            return
        _check_same_model(config.model.architecture, stored, path)
        limit = config.trainer.max_epochs
        if limit is not None and -1 < limit < checkpoint["epoch"]:
            epoch = checkpoint["epoch"]
            raise ConfigError(f"{path} is at epoch {epoch}, trainer.max_epochs is {limit}: raise it to go on")

    def instantiate_classes(self) -> None:
        """Builds everything; the saved configuration keeps portable names such as ``dataset:spice/sample.hdf5``."""
        written = self.config
        self.config = written.clone()
        data = self.config[self.subcommand].data
        for part in ("train", "val", "test", "predict"):
            data[part] = _resolved(data[part])
        self.config_init = self.parser.instantiate_classes(self.config)
        self.config = written
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self.trainer = self.instantiate_trainer()

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        folder = Path(self._get(self.config, "out")) / self._get(self.config, "name")
        callbacks = [c for c in callbacks if not (isinstance(c, WeightEMA) and c.decay == 0.0)]
        callbacks += [RunReport(), PredictionFile()]
        if config.get("enable_progress_bar") is not False:
            callbacks.append(TrainingProgress())
        if config.get("enable_checkpointing") is False:
            callbacks = [c for c in callbacks if not isinstance(c, BestAndLast)]
        config["logger"] = _loggers(config.get("logger"), folder)
        config["default_root_dir"] = config.get("default_root_dir") or str(folder)
        plugins = config.get("plugins") or []
        config["plugins"] = [PlainCheckpointIO(), *(plugins if isinstance(plugins, list) else [plugins])]
        return super()._instantiate_trainer(config, callbacks)

    def before_fit(self) -> None:
        """Searches a learning rate where asked.

        Raises:
            ConfigError: asked together with a checkpoint, which has one already, or with a base width.
        """
        config = self.config[self.subcommand]
        if not config.lr_find:
            return
        if config.ckpt_path is not None:
            raise ConfigError("--lr_find starts a run, --ckpt_path continues one: choose one of them")
        if self.model.base_width is not None:
            raise ConfigError(
                "--lr_find tries one learning rate for all weights, model.base_width divides it for some: search at "
                "the base width without it"
            )
        find_learning_rate(self.trainer, self.model, self.datamodule)

    def after_fit(self) -> None:
        """Validates the final weights where the run ended between two validations."""
        trainer = self.trainer
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        reports = [callback for callback in callbacks if isinstance(callback, RunReport)]
        if any(trainer.global_step in report.steps for report in reports) or not trainer.limit_val_batches:
            return
        if "val" in self.datamodule.datasets:
            trainer.validate(self.model, datamodule=self.datamodule, verbose=False)


def find_learning_rate(trainer: Trainer, model: PotentialModule, datamodule: AtomicDataModule) -> float:
    """Sets and returns the learning rate at the steepest descent of the loss over 100 steps of a rising rate.

    Raises:
        ConfigError: the loss gives no suggestion.
    """
    from lightning.pytorch.tuner import Tuner

    Path(trainer.default_root_dir).mkdir(parents=True, exist_ok=True)
    finder = Tuner(trainer).lr_find(model, datamodule=datamodule, min_lr=1e-6, max_lr=1e-1, update_attr=True)
    suggestion = finder.suggestion() if finder is not None else None
    if suggestion is None:
        raise ConfigError("the learning-rate finder has no suggestion for this data: set model.learning_rate")
    print(f"learning rate found: {suggestion:.3g}")
    return float(suggestion)


def find_checkpoint(given: str | os.PathLike[str], folder: Path) -> Path:
    """Returns the checkpoint meant by a path, ``last`` or ``best``: the newest of that name in the runs of ``folder``.

    Raises:
        CheckpointError: there is none.
    """
    names = {"last": LAST, "best": BEST}
    if str(given) not in names:
        if not Path(given).is_file():
            raise CheckpointError(f"checkpoint {given} does not exist: pass a .ckpt file, last or best")
        return Path(given)
    found = [path for path in folder.glob(f"version_*/{names[str(given)]}") if path.is_file()]
    if not found:
        file = names[str(given)]
        raise CheckpointError(f"no run in {folder} has a {file}: name the run with --name, or pass the file")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def _with_resolved_configs(argv: list[str]) -> tuple[list[str], str]:
    """Replaces recipe names by their files; the last configuration names the run."""
    arguments, name = list(argv), "run"
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option not in _CONFIG_OPTIONS or (not equals and index + 1 == len(arguments)):
            continue
        path = config_path(value if equals else arguments[index + 1])
        name = path.stem if path.stem != "config" else path.resolve().parent.parent.name
        if equals:
            arguments[index] = f"{option}={path}"
        else:
            arguments[index + 1] = str(path)
    return arguments, name


def _resolved(spec: Any) -> Any:
    """A data specification with ``dataset:NAME/FILE`` replaced by the file."""
    if isinstance(spec, str):
        return str(resolve(spec)) if spec.startswith("dataset:") else spec
    if isinstance(spec, list):
        return [_resolved(entry) for entry in spec]
    if isinstance(spec, Mapping):
        return {**spec, **({"path": _resolved(spec["path"])} if "path" in spec else {})}
    return spec


def _loggers(given: Any, folder: Path) -> list[Any] | bool:
    """CSV always, unless logging is off; others beside it."""
    if given is False:
        return False
    others = [] if given in (None, True) else given if isinstance(given, list) else [given]
    return [CSVLogger(save_dir=str(folder.parent), name=folder.name, flush_logs_every_n_steps=20), *others]


def _check_same_model(given: Mapping[str, Any], stored: Mapping[str, Any], path: Path) -> None:
    wanted, have = EScAIPConfig.from_dict(dict(given)).to_dict(), EScAIPConfig.from_dict(dict(stored)).to_dict()
    for key, value in wanted.items():
        if value != have[key] and key not in _FREE_ON_RESUME:
            was = have[key]
            raise ConfigError(f"{path} has model.architecture.{key} {was!r}, this run {value!r}: resume with the same")


def _one_line(message: object) -> str:
    text = " ".join(str(message).split())
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]} …"
