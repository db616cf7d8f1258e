"""Compiled evaluations: the model and the gradient of its energy in one graph, for batches of any size.

The model and its gradient are traced together into one graph of plain operations, which Inductor compiles: predictions
have nothing left to differentiate, and training on forces takes one ordinary derivative of a graph that already holds
the forces. Sizes are symbols, fixed as such by a first run on an example. Sizes that a compiler would specialise (one
atom, no neighbors, no compared ranks) are padded (``escaip.potential.padding``).

Predictions on a CPU are compiled ahead of time into machine code without weights. It depends on the configuration of
the model, on PyTorch and on the machine, is kept in the user's cache, and serves every model of that configuration.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

import escaip
from escaip.errors import CheckpointError, ConfigError
from escaip.files import cache_folder, check_private, first_line, write_aside
from escaip.graph import build_graph, displacements
from escaip.models import Model, settings_of
from escaip.nn.embedding import given_tables, kept_tables
from escaip.ops import cpp
from escaip.ops.rows import traced_rows
from escaip.potential.derivatives import (
    EagerEvaluator,
    EvaluationInputs,
    EvaluationRequest,
    Evaluator,
    energy_and_gradient,
)
from escaip.potential.padding import Sizes, pad, unpad
from escaip.potential.precision import in_precision
from escaip.types import AtomInputs, GraphSettings, ModelOutput

INFO = "escaip.json"
"""Entry of our archives of code: JSON, with the weight that each constant of the code is under ``constants``."""

_OPTIONS = {
    "aot_inductor.compile_wrapper_opt_level": "O0",  # of the code between kernels: half the compile time, same speed
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,  # small weights would become numbers in the code
    "cpp.dynamic_threads": True,  # number of threads of the process that loads the code
}
_NEW_OPTIONS = ("aot_inductor.enable_line_tables",)  # missing before PyTorch 2.13
_OLDEST_TORCH = (2, 13)  # for code compiled ahead of time
_MOST_KEPT = 32  # files in the cache, some MiB each
_WASTE = 1.25  # largest ratio of padded tokens to those needed
# Instruction sets among the flags of /proc/cpuinfo; ARM lists nothing else under Features.
_INSTRUCTIONS = re.compile(r"(avx|sse|ssse|fma|f16c|bmi|amx|vaes|vpclmul|gfni|adx|abm|movbe|popcnt)\w*|pni")


class Code(Protocol):
    """Compiled code for one kind of evaluation."""

    def fits(self, model: Model) -> bool:
        """Whether the code can evaluate the model with its present weights."""

    def __call__(self, model: Model, inputs: EvaluationInputs) -> tuple[ModelOutput, Tensor | None]:
        """Evaluates a batch; see ``escaip.potential.derivatives.energy_and_gradient``."""


def compiled(evaluator: Evaluator, device: torch.device, cuda_graphs: bool) -> Evaluator:
    """Returns a compiling evaluator in the place of another one; of exported code that code.

    Raises:
        ConfigError: ``cuda_graphs`` for a potential that is not on CUDA, or for exported code.
    """
    if cuda_graphs and device.type != "cuda":
        raise ConfigError(f"cuda_graphs: the potential is on {device}: move it to CUDA, or leave them out")
    if isinstance(evaluator, CompiledEvaluator | EagerEvaluator):
        same = isinstance(evaluator, CompiledEvaluator) and evaluator.cuda_graphs == cuda_graphs
        return evaluator if same else CompiledEvaluator(cuda_graphs)
    if cuda_graphs:
        raise ConfigError("exported code cannot use CUDA graphs: load the .escaip file")
    return evaluator


class CompiledEvaluator:
    """Compiles each kind of evaluation when it is first asked for.

    Evaluations that recompute activations, and those whose positions require gradients, run uncompiled. Copies of an
    evaluator compile their own code.

    Args:
        cuda_graphs: launch predictions on CUDA as one CUDA graph, in PyTorch's mode ``"reduce-overhead"``. Inputs are
            padded so that their sizes rarely change; each new size is recorded once.
        backend: of ``torch.compile``; only Inductor's code is compiled ahead of time and kept.
    """

    def __init__(self, cuda_graphs: bool = False, backend: str = "inductor") -> None:
        self.cuda_graphs = cuda_graphs
        self.backend = backend
        self.codes: dict[tuple[Any, ...], Code] = {}

    def __call__(
        self, model: Model, inputs: EvaluationInputs, request: EvaluationRequest
    ) -> tuple[ModelOutput, Tensor | None]:
        """Evaluates a batch; see ``escaip.potential.derivatives.Evaluator``."""
        device = inputs.vectors.device
        if request.share_recomputed(model.config, inputs) or inputs.vectors.requires_grad:
            return EagerEvaluator()(model, inputs, request)
        predicting = not (request.learning or model.training)
        with in_precision(request.precision, device) as rounded:
            kind = (request.differentiate, request.learning, model.training, rounded, request.precision == "tf32")
            if kind not in self.codes or not self.codes[kind].fits(model):
                if predicting and self.backend == "inductor" and compiles_ahead(device):
                    self.codes[kind] = kept_code(model, request.differentiate, rounded)
                else:
                    graphs = self.cuda_graphs and predicting
                    self.codes[kind] = JitCode(model, request.differentiate, request.learning, graphs, self.backend)
            return self.codes[kind](model, inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledEvaluator, (self.cuda_graphs, self.backend)


class JitCode:
    """Code compiled in this process, for weights that are fixed or that learn.

    Args:
        model: whose weights may change in place, but keep their device, dtype and identity.
        differentiate: whether the gradient is computed.
        learning: whether results will be differentiated with respect to the weights.
        cuda_graphs: see ``CompiledEvaluator``.
        backend: of ``torch.compile``.

    Raises:
        ConfigError: the example is unfit for the graph settings, or the folder of generated code is not private.
    """

    def __init__(
        self, model: Model, differentiate: bool, learning: bool, cuda_graphs: bool = False, backend: str = "inductor"
    ) -> None:
        if backend == "inductor":
            use_private_folder()
        self._weights = [(weight, weight.dtype, weight.device) for weight in model.parameters()]
        self._config = model.config
        self._learning, self._cuda_graphs = learning, cuda_graphs
        self._sizes: Sizes | None = None
        weight = next(model.parameters())
        tensors, tables = compile_example(model.config.graph, weight.dtype, weight.device).flat(), self._tables(model)

        def function(tables: list[Tensor], *tensors: Tensor) -> list[Tensor]:
            return flat_evaluation(model, tables, tensors, differentiate, learning)

        self.graph_module = trace(function, [tables, *tensors], learning)
        mode = "reduce-overhead" if cuda_graphs and backend == "inductor" else None
        self._function = torch.compile(self.graph_module, fullgraph=True, backend=backend, mode=mode)
        marked = [x.clone() for x in tensors]
        for x in marked:
            torch._dynamo.mark_dynamic(x, 0)
        with quiet_compiler():
            self._run(tables, marked)

    def fits(self, model: Model) -> bool:
        """Whether the weights are those that were compiled."""
        pairs = zip(self._weights, model.parameters(), strict=True)
        return all(a is b and (dtype, device) == (b.dtype, b.device) for (a, dtype, device), b in pairs)

    def __call__(self, model: Model, inputs: EvaluationInputs) -> tuple[ModelOutput, Tensor | None]:
        """Evaluates a batch; see ``escaip.potential.derivatives.energy_and_gradient``."""
        own = Sizes.of(inputs)
        sizes = self._recorded_sizes(own) if self._cuda_graphs else own.at_least_two()
        results = self._run(self._tables(model), pad(inputs, sizes).flat())
        if self._cuda_graphs:  # the next launch overwrites them
            results = [x.clone() for x in results]
        return unpad(results, sizes, own, self._config)

    def _recorded_sizes(self, own: Sizes) -> Sizes:
        """Returns the sizes of the last recording where they hold the inputs without much waste, else a capacity."""
        needed = own.capacity()
        if self._sizes is None or not self._sizes.hold(own) or self._sizes.tokens > _WASTE * needed.tokens:
            self._sizes = needed
        return self._sizes

    def _tables(self, model: Model) -> list[Tensor]:
        return kept_tables(model, self._learning)

    def _run(self, tables: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
        if self._cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with contextlib.nullcontext() if self._learning else torch.no_grad():
            return list(self._function(tables, *tensors))


class AotCode:
    """Code compiled ahead of time, from a file, which receives the weights of the model that it evaluates.

    Args:
        path: of the archive.
        model: the first model; its dtype and device are those of the code.
        constants: name of the weight that each constant of the code is.

    Raises:
        CheckpointError: the code cannot be loaded.
    """

    def __init__(self, path: Path, model: Model, constants: dict[str, str]) -> None:
        self.path = path
        self._constants = constants
        self._config = model.config
        weight = next(model.parameters())
        self._dtype, self.device = weight.dtype, weight.device
        self._state: list[tuple[int, int]] = []
        self._state_of = WeightState()
        index = -1 if self.device.index is None else self.device.index
        if self.device.type == "cpu":
            cpp.has_kernels()
        try:
            self._code = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, index)
            self._give(model)
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"the code in {path} cannot be used ({first_line(error).rstrip('.:')}): export it again from its "
                ".escaip file"
            ) from error

    def fits(self, model: Model) -> bool:
        """Whether the weights are of the dtype, and on the device, of the code."""
        weight = next(model.parameters())
        return (weight.dtype, weight.device) == (self._dtype, self.device)

    def __call__(self, model: Model, inputs: EvaluationInputs) -> tuple[ModelOutput, Tensor | None]:
        """Evaluates a batch; see ``escaip.potential.derivatives.energy_and_gradient``."""
        self._give(model)
        own = Sizes.of(inputs)
        sizes = own.at_least_two()
        return unpad(self._run(pad(inputs, sizes).flat()), sizes, own, self._config)

    def check(self, model: Model, differentiate: bool, rounded: torch.dtype | None = None) -> None:
        """Compares the code with the uncompiled model on one structure.

        Raises:
            CheckpointError: they differ.
        """
        weight = next(model.parameters())
        tolerance = 0.1 if rounded is not None else 1e-3 if weight.dtype == torch.float32 else 1e-8
        tensors = compile_example(model.config.graph, weight.dtype, weight.device).flat()
        expected = flat_evaluation(model, kept_tables(model), tensors, differentiate, False)
        for found, right in zip(self._run(tensors), expected, strict=True):
            if not bool((found - right).abs().max() <= tolerance * (right.abs().max() + 1e-3)):
                raise CheckpointError(
                    f"the code in {self.path} does not give what its weights give: export it from its .escaip file"
                )

    def _give(self, model: Model) -> None:
        """Hands weights and tables to the code where they are others than before."""
        state = self._state_of(model)
        if state != self._state:
            self._held = constants_of(model)  # the code points to them
            needed = {name: self._held[self._constants[name]].detach() for name in self._code.get_constant_fqns()}
            self._code.load_constants(needed, False, True, True)
            self._state = state

    def _run(self, tensors: list[Tensor]) -> list[Tensor]:
        # The code calls our operators, for which PyTorch's autograd layer would take as long as the operators.
        with torch._C._AutoDispatchBelowAutograd():
            return list(self._code.run(tensors))


class WeightState:
    """Reads addresses and versions of weights and buffers, which change when one is replaced or changed in place."""

    def __init__(self) -> None:
        self._model: Model | None = None
        self._places: list[tuple[dict[str, Any], str]] = []

    def __call__(self, model: Model) -> list[tuple[int, int]]:
        if self._model is not model:  # looked up once: this runs at every evaluation
            self._model = model
            tables = [table for m in model.modules() for table in (m._parameters, m._buffers)]
            self._places = [(table, name) for table in tables for name in table]
        weights = [place[name] for place, name in self._places]
        return [(weight.data_ptr(), weight._version) for weight in weights if weight is not None]


def kept_code(model: Model, differentiate: bool, rounded: torch.dtype | None) -> AotCode:
    """Returns the code of a model's predictions, from the user's cache or compiled now, which takes a minute.

    Code is loaded from the cache only where nobody else can have written it, and only if it reproduces the model.

    Args:
        model: on a CPU.
        differentiate: whether the gradient is computed.
        rounded: half precision of products of tokens, in the precision set by the caller.

    Raises:
        ConfigError: the model does not compile, or other users may write to the cache.
    """
    folder = cache_folder("compiled")
    if folder is None:  # no place to keep it; loaded code stays mapped after its file is gone
        with tempfile.TemporaryDirectory(prefix="escaip-") as private:
            path = Path(private) / "model.pt2"
            return AotCode(path, model, compile_ahead(model, differentiate, path)[0])
    path = folder / f"{_key(model, differentiate, rounded)}.pt2"
    if path.is_file():
        check_private(path)
        with contextlib.suppress(CheckpointError, OSError, KeyError, ValueError, StopIteration, zipfile.BadZipFile):
            code = AotCode(path, model, json.loads(read_entry(path, INFO))["constants"])
            code.check(model, differentiate, rounded)
            path.touch()
            return code
    with write_aside(path, ConfigError) as aside:
        constants, _ = compile_ahead(model, differentiate, aside)
        add_entries(aside, {INFO: json.dumps({"constants": constants}).encode()})
    with contextlib.suppress(OSError):
        for old in sorted(folder.glob("*.pt2"), key=lambda file: file.stat().st_mtime)[:-_MOST_KEPT]:
            old.unlink()
    return AotCode(path, model, constants)


def compile_ahead(model: Model, differentiate: bool, path: Path) -> tuple[dict[str, str], bool]:
    """Writes an archive of machine code for predictions, in the precision set by the caller; takes a minute.

    Returns:
        The name of the weight that each constant of the code is, and whether the code calls our C++ operators.

    Raises:
        ConfigError: it cannot be compiled here.
    """
    model = _with_random_weights(model)
    weight, tables = next(model.parameters()), kept_tables(model)
    if weight.device.type == "cpu":
        try:
            cpp.find_compiler()
        except ConfigError as error:
            raise ConfigError(f"compiling {error}") from error

    def function(*tensors: Tensor) -> list[Tensor]:
        return flat_evaluation(model, tables, tensors, differentiate, False)

    inputs = tuple(compile_example(model.config.graph, weight.dtype, weight.device).flat())
    known = torch._inductor.config.get_config_copy()
    options = {name: value for name, value in _OPTIONS.items() if name in known or name not in _NEW_OPTIONS}
    use_private_folder()
    try:
        with quiet_compiler():
            graph = trace(function, list(inputs), False)
            sizes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
            exported = torch.export.export(graph, inputs, dynamic_shapes=sizes, strict=False)
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)
    except RuntimeError as error:  # of Inductor, and of the C++ compiler
        reason = first_line(error).rstrip(".:")
        raise ConfigError(f"the evaluation does not compile ({reason}): evaluate it uncompiled") from error
    names = {id(tensor): name for name, tensor in constants_of(model).items()}
    found = {node.target: getattr(graph, node.target) for node in graph.graph.find_nodes(op="get_attr")}
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    native = any("_native" in str(node.target) or "escaip.power_spectrum" in str(node.target) for node in calls)
    return {name: names[id(tensor)] for name, tensor in found.items()}, native


def compiles_ahead(device: torch.device) -> bool:
    """Whether predictions on a device are compiled ahead of time; elsewhere they are compiled in the process."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return device.type == "cpu" and version >= _OLDEST_TORCH and cpp.unavailable() is None


def constants_of(model: Model) -> dict[str, Tensor]:
    """Returns weights, buffers and spline tables by name."""
    tables = {f"tables.{index}": table for index, table in enumerate(kept_tables(model))}
    return {**dict(model.named_parameters()), **dict(model.named_buffers()), **tables}


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Returns what compiled code depends on besides the model's configuration, as plain JSON values."""
    return {
        "escaip": escaip.__version__,
        "torch": torch.__version__,
        "platform": sys.platform,
        "machine": platform.machine(),
        "device": device.type,
        "capability": list(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None,
        "dtype": str(dtype).removeprefix("torch."),
        "instructions": instructions(),
    }


@functools.cache
def instructions() -> list[str]:
    """Returns the instruction sets of this processor that compilers use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = {word for line in lines if line.startswith("flags") for word in line.split()}
    on_arm = {word for line in lines if line.startswith("Features") for word in line.partition(":")[2].split()}
    return sorted({word for word in found if _INSTRUCTIONS.fullmatch(word)} | on_arm)


def read_entry(path: Path, name: str) -> bytes:
    """Reads an entry from the top folder of an archive of code; StopIteration where it is missing."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(entry for entry in archive.namelist() if entry.endswith(f"/{name}")))


def add_entries(path: Path, entries: dict[str, bytes]) -> None:
    """Adds entries to the top folder of an archive of code."""
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        for name, content in entries.items():
            archive.writestr(f"{root}/{name}", content)


def use_private_folder() -> None:
    """Lets PyTorch's compiler keep generated code in the user's cache, unless the user has chosen a folder.

    PyTorch's default is a folder of a known name among the temporary files, which another user can make first. Like
    PyTorch itself at its first compilation, this sets ``TORCHINDUCTOR_CACHE_DIR`` for the process.

    Raises:
        ConfigError: other users may write to the user's cache.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        folder = cache_folder("inductor")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = _scratch_folder().name if folder is None else str(folder)


@functools.cache
def _scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Makes a folder that is removed at the end of the process."""
    return tempfile.TemporaryDirectory(prefix="escaip-")


def _with_random_weights(model: Model) -> Model:
    """Copies a model with other weights: a compiler would turn zeros, ones or equal tensors into constants."""
    model = copy.deepcopy(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def _key(model: Model, differentiate: bool, rounded: torch.dtype | None) -> str:
    weight = next(model.parameters())
    made = environment(weight.device, weight.dtype)
    parts = [settings_of(model.config), made, differentiate, str(rounded), _OPTIONS, _sources()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _sources() -> str:
    """Returns a digest of this package: any change of it may change the compiled code."""
    digest = hashlib.sha256()
    for path in sorted(Path(escaip.__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def flat_evaluation(
    model: Model, tables: Sequence[Tensor], tensors: Sequence[Tensor], differentiate: bool, learning: bool
) -> list[Tensor]:
    """Evaluates a flat list of inputs.

    Args:
        model: the weights may be closed over.
        tables: of ``escaip.nn.embedding.kept_tables``.
        tensors: of ``EvaluationInputs.flat``.
        differentiate: whether the gradient is computed.
        learning: whether results will be differentiated with respect to the weights.

    Returns:
        Energy, direct forces, properties in the order of the config's heads, and gradient, as far as they exist.
    """
    with torch.enable_grad() if differentiate or learning else torch.no_grad(), given_tables(model, tables, learning):
        inputs = EvaluationInputs.from_flat(tensors)
        output, gradient = energy_and_gradient(model, inputs, differentiate, learning)
    properties = [output.properties[name] for name in model.config.heads]
    return [x for x in (output.energy, output.forces, *properties, gradient) if x is not None]


def trace(function: Callable[..., list[Tensor]], arguments: list[Any], learning: bool) -> torch.fx.GraphModule:
    """Traces a function that differentiates into one graph of plain operations, with symbols for sizes.

    Weights that the function closes over become attributes of the graph.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    with traced_rows(differentiable=learning), quiet_compiler():
        graph_module = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*arguments)
    # Tensors that autograd saved were traced as detached, which would cut the second derivative.
    for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        if node.args[0].op != "placeholder":
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    graph_module.recompile()
    return graph_module


def compile_example(settings: GraphSettings, dtype: torch.dtype, device: torch.device) -> EvaluationInputs:
    """Returns a crystal and a cluster of carbon at distances that fit the cutoff, with sizes that all differ.

    Raises:
        ConfigError: two sizes are equal, and a tracer would take them for always equal.
    """
    generator = torch.Generator().manual_seed(0)
    spacing = 0.4 * settings.cutoff
    corners = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3)
    positions = torch.cat([corners, corners[:5]]) * spacing
    positions = positions + 0.05 * spacing * torch.rand(positions.shape, dtype=torch.float64, generator=generator)
    edge = torch.eye(3, dtype=torch.float64) * 2.0 * spacing
    system = torch.tensor([0] * 8 + [1] * 5)
    batch = SimpleNamespace(
        positions=positions,
        cell=torch.stack([edge, torch.zeros_like(edge)]),
        pbc=torch.tensor([[settings.periodic] * 3, [False] * 3]),
        batch=system,
        ptr=torch.tensor([0, 8, 13]),
    )
    graph = build_graph(batch, settings)
    vectors = displacements(positions, batch.cell, system, graph)
    ones = torch.ones_like(system)
    atoms = AtomInputs(6 * ones, 0 * ones, ones, 8 * system, system)
    inputs = EvaluationInputs(vectors, torch.ones(13, dtype=dtype), atoms, graph)
    inputs = EvaluationInputs.from_flat([x.to(device) for x in inputs.flat()])
    inputs = pad(inputs, Sizes.of(inputs).at_least_two())
    num_atoms, layout = inputs.weight.shape[0], inputs.layout
    sizes = [num_atoms, num_atoms + 1, layout.num_tokens, len(inputs.vectors), len(layout.rank_token)]
    if len(set(sizes)) < len(sizes):
        raise ConfigError(f"the example for the compiler has equal sizes {sizes}: choose another cutoff, or eager mode")
    return inputs


@contextlib.contextmanager
def quiet_compiler() -> Iterator[None]:
    """Hides warnings that the compiler addresses to its own developers, and its advice to use TF32."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        yield
