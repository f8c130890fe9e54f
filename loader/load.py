"""One load in progress: the weights and checks for transformers while it builds a model."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from codecllm.formats.container import Container
from codecllm.formats.errors import (
    LayoutError,
    ModelMismatchError,
    UsageError,
    machine_error,
)
from codecllm.formats.manifest.manifest import CONFIG_NAME
from codecllm.formats.strict_json import parse_config
from codecllm.loader.choice import choose_resident
from codecllm.loader.config_size import refuse_larger
from codecllm.loader.device.codecs import Decoder
from codecllm.loader.device.engines import DeviceEngines
from codecllm.loader.device.placement import has_device, sole_device
from codecllm.loader.hf.hooks import tied_parameters
from codecllm.loader.hf.placement import is_offloaded, spreads
from codecllm.loader.hf.plain import ADAPTER_CONFIG
from codecllm.loader.hf.quiet import without_progress_bars
from codecllm.loader.host.threads import decoding_threads
from codecllm.loader.load_report import LoadReport, draws_all, draws_most, read_report
from codecllm.loader.packed.residency import ResidentBytes, ResidentPacked
from codecllm.loader.progress import OnProgress, metered
from codecllm.loader.reader import CPU, TensorReader
from codecllm.loader.resident.residency import Residency, ResidentCompressed
from codecllm.loader.residents import Chosen, Resident
from codecllm.loader.state_dict import LazyTensor, lazy_state_dict, prefetch
from codecllm.loader.torch_tensors import torch_dtype

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a container is loaded; see `pretrained.from_pretrained` for most of them.

    Attributes:
        dtype: dtype that the caller asks for; None: the source's.
        complete: whether weights that are missing or left over are an error unless the container's
            load report lists them; False leaves them to transformers' own warnings.
    """

    resident: Resident | Literal["auto"] = "dense"
    decoder: Decoder = "auto"
    dtype: torch.dtype | None = None
    workers: int | None = None
    progress: bool | OnProgress | None = None
    device_map: Any = None
    max_memory: Any = None
    complete: bool = False


class Load:
    """One load of a container. transformers' steps call it in this order.

    `start` when the dtype is known, `state_dict` when the empty model is built, `finish` when the
    model is complete, `close` in any case.

    Attributes:
        container: the container.
        report: its record of the weights that a plain load of the source leaves over, or None.
        chosen: how weights lie in memory, and why.
    """

    def __init__(
        self,
        folder: Path,
        options: LoadOptions,
        expected_manifest_sha256: str | None = None,
    ) -> None:
        """Opens a container and starts the threads that decode it.

        Raises:
            FormatError: the container is damaged or is none.
        """
        self._options = options
        self._stack = ExitStack()
        self._reading = ExitStack()
        self._dtype: torch.dtype | None = None
        self._plan: Residency | None = None
        self._info: Any = None
        self._shapes: dict[str, torch.Size] = {}
        try:
            self.container = self._stack.enter_context(
                Container(folder, expected_manifest_sha256=expected_manifest_sha256)
            )
            self.report = read_report(self.container)
            _refuse_adapter(self.container)
            self.chosen = self._choose(options)
            self._threads = decoding_threads(options.workers)
            if options.progress is not None:
                self._stack.enter_context(without_progress_bars())
            total = self.container.manifest.decoded_bytes
            self._meter = self._stack.enter_context(metered(options.progress, total))
            # Last in, first out: the threads end before the file that they read is closed.
            self._stack.callback(self._reading.close)
        except BaseException:
            self._stack.close()
            raise

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The JSON object of the container's config.json, or None where it has none.

        Raises:
            FormatError: the file differs from the manifest, or is no such object.
        """
        record = self.container.manifest.file(CONFIG_NAME)
        if record is None:
            return None
        return parse_config(self.container.read_side_file(record))

    @property
    def is_dense(self) -> bool:
        """Whether every parameter becomes a plain one."""
        return self.chosen.resident == "dense"

    @property
    def first_error(self) -> BaseException | None:
        """The first exception that reading a tensor raised, or None.

        transformers turns it into an error of its own, which does not name the place.
        """
        return self._reader.first_error if self._dtype is not None else None

    def close(self) -> None:
        """Ends the reading and its threads, and closes the files."""
        self._stack.close()

    def dtypes(self) -> dict[str, torch.Tensor]:
        """Returns an empty tensor for each tensor of the source, sorted by name, in its dtype."""
        records = sorted(self.container.manifest.tensors, key=lambda record: record.name)
        by_name = {
            record.dtype: torch.empty(0, dtype=torch_dtype(record.dtype)) for record in records
        }
        return {record.name: by_name[record.dtype] for record in records}

    def start(self, dtype: torch.dtype) -> None:
        """Plans the reading of all tensors, floats as `dtype`; dense ones are decoded from now on.

        Starting again with the same dtype changes nothing; with another one it begins anew.
        """
        if dtype == self._dtype:
            return
        self._reading.close()
        container, options = self.container, self._options
        devices = DeviceEngines(container, self._threads, options.decoder)
        self._reading.enter_context(devices)
        needed_bytes = container.manifest.decoded_bytes * max(1, dtype.itemsize // 2)
        device = sole_device(options.device_map, needed_bytes, options.max_memory)
        self._engine = devices.engine(device) if device is not None else None
        self._reader = TensorReader(container, self._threads, self._meter, devices, device or CPU)
        self._reading.callback(self._reader.close)
        # Codes and scales of another library are given as they are: its quantizer converts them.
        is_kept = container.manifest.source.quantization is not None
        self._state_dict = lazy_state_dict(self._reader, container, None if is_kept else dtype)
        self._dtype = dtype
        if self.is_dense:
            prefetch(self._reader, self._state_dict)
        else:
            self._plan = self._make_plan(options)

    def state_dict(self, model: Any) -> dict[str, LazyTensor]:
        """Returns the tensors that decode themselves, by their names in the source.

        Args:
            model: the model on the meta device.

        Raises:
            ModelMismatchError: the model is far larger than the container.
        """
        stored_elements = sum(record.elements for record in self.container.manifest.tensors)
        refuse_larger(model, stored_elements)
        self._shapes = {name: value.shape for name, value in model.named_parameters()}
        if self._plan is not None:
            with torch.device("cpu"):  # transformers makes new tensors on the meta device here
                self._plan.prepare(model)
        return self._state_dict

    def asks_in_calling_thread(self) -> bool:
        """Whether one thread asks for weights: not where they go to devices unprepared."""
        device_map = self._options.device_map
        return not (spreads(device_map) and self._engine is None and has_device())

    def loaded(self, loading_info: Any) -> None:
        """Receives transformers' report, which it completes afterwards in place."""
        self._info = loading_info

    def mismatched(self) -> list[str]:
        """Returns parameters whose shape is not that of their tensor, with both shapes."""
        entries = self._info.mismatched_keys if self._info is not None else ()
        return sorted(f"{name} {tuple(got)} for {tuple(shape)}" for name, got, shape in entries)

    def finish(self, model: Any) -> None:
        """Completes a model whose weights are loaded and checks it.

        Raises:
            FormatError: a payload that stays coded in memory is damaged.
            ModelMismatchError: the load leaves over other weights than the load of the source, or a
                parameter has no weights.
        """
        # transformers may go on after an error in a thread, with weights at random.
        if self.first_error is not None:
            raise machine_error(self.first_error) or self.first_error
        if self._info is not None:
            self._check_report(model)
        if self.container.manifest.source.quantization is None:
            self._check_shapes(model)
        if self._plan is not None:
            self._plan.finish(model)
        _check_materialized(model)
        _separate_untied(model)
        model.codecllm_resident = self.chosen

    def _check_shapes(self, model: Any) -> None:
        """Refuses parameters of another shape than the class has: older transformers take them."""
        wrong = [
            f"{name} {tuple(value.shape)} for {tuple(self._shapes[name])}"
            for name, value in model.named_parameters()
            if self._shapes.get(name, value.shape) != value.shape
        ]
        if wrong:
            raise ModelMismatchError(
                f"the container's tensors are not those of {type(model).__name__}; "
                f"mis-shaped: {', '.join(sorted(wrong))}"
            )

    def _choose(self, options: LoadOptions) -> Chosen:
        """Returns the residency that was asked for, or where that is "auto" one that fits.

        Raises:
            UsageError: one was asked for that a quantized source cannot have.
        """
        if options.resident != "auto":
            _refuse_residency(self.container, options.resident)
            return Chosen(options.resident, "the caller asked for it")
        if spreads(options.device_map):
            return Chosen("dense", "the device map may spread the model over several places")
        device = sole_device(options.device_map, 0)
        chosen = choose_resident(self.container, self.config or {}, options.dtype, device)
        level = logging.INFO if chosen.resident == "dense" else logging.WARNING
        _LOG.log(level, "resident=%r: %s", chosen.resident, chosen.reason)
        return chosen

    def _make_plan(self, options: LoadOptions) -> Residency:
        if self.chosen.resident == "int8":
            return ResidentBytes(self.container, self._reader, self._state_dict)
        if self.chosen.resident == "packed":
            return ResidentPacked(self.container, self._reader, self._state_dict)
        return ResidentCompressed(
            self.container,
            self._reader,
            self._state_dict,
            options.workers,
            self._meter,
            self._engine,
        )

    def _check_report(self, model: Any) -> None:
        if self.container.manifest.source.quantization is not None:
            return  # which names are left over is for the source's quantizer to say, which warns
        name = type(model).__name__
        missing = self._info.missing_keys
        # A class that the caller chose may have a large head of its own.
        if (self._is_own(name) and draws_most(model, missing)) or draws_all(model, missing):
            raise ModelMismatchError(
                f"{name} finds none, or less than half, of its weights in the container",
                got=f"tensors such as {self.container.manifest.tensors[0].name}",
                expected=f"such as {min(missing)}",
            )
        expected = self.report
        if expected is None or expected.model_class != name:
            if not self._options.complete:
                return
            expected = LoadReport(name, frozenset(), frozenset())
        actual = LoadReport.of(name, missing, self._info.unexpected_keys)
        actual.require_within(expected)

    def _is_own(self, model_class: str) -> bool:
        """Whether a class is the one that the container's config names, or stands for."""
        names = (self.config or {}).get("architectures")
        return self._options.complete or (isinstance(names, list) and model_class in names)


def _refuse_residency(container: Container, resident: Resident) -> None:
    method = container.manifest.source.quantization
    if method is not None and resident != "dense":
        raise UsageError(
            f"the source is quantized ({method}): "
            "its own quantizer decides how weights lie in memory",
            got=f"resident={resident!r}",
            expected="resident='dense'",
        )


def _refuse_adapter(container: Container) -> None:
    """Refuses a folder with an adapter: transformers would change the model by it.

    The manifest says what a model is; an adapter would add weights beside its tensors, where peft
    is installed and not where it is missing, and with limits of peft alone.
    """
    is_listed = container.manifest.file(ADAPTER_CONFIG) is not None
    if is_listed or (container.folder / ADAPTER_CONFIG).exists():
        reason = "a container has no adapter" if is_listed else "the manifest does not list it"
        raise LayoutError(
            f"{reason}, and transformers would change the model by it: move the adapter to a "
            "folder of its own",
            file=ADAPTER_CONFIG,
        )


def _check_materialized(model: Any) -> None:
    """Refuses a model with parameters that have no weights, here or where they are offloaded to."""
    empty = [
        name
        for name, value in model.named_parameters()
        if value.is_meta and not is_offloaded(model, name)
    ]
    if empty:
        raise ModelMismatchError(
            "parameters were left without weights", tensor=empty[0], got=len(empty)
        )


def _separate_untied(model: Any) -> None:
    """Gives parameters and buffers that are equal in the container, but not tied, own memory."""
    places: set[tuple[torch.device, int]] = set()
    for parameter in model.parameters():
        # An alias and its target are read into one storage. Training one must not change the other
        # where the class does not tie them.
        if _is_repeated(parameter, places):
            parameter.data = parameter.data.clone()
    buffers = model.named_buffers(remove_duplicate=False)
    copies = {name: buffer for name, buffer in buffers if _is_repeated(buffer, places)}
    if copies:
        # Buffers that no file has are shared by a class on purpose, and so are tied ones.
        ties = tied_parameters(model)
        names = model.state_dict(keep_vars=True).keys() - ties.keys() - {*ties.values()}
        for name in copies.keys() & names:
            module, _, last = name.rpartition(".")
            setattr(model.get_submodule(module), last, copies[name].clone())


def _is_repeated(value: torch.Tensor, places: set[tuple[torch.device, int]]) -> bool:
    """Whether the memory of a value begins at one of these places; adds its place."""
    if value.is_meta or not value.numel():
        return False
    place = (value.device, value.data_ptr())
    is_repeated = place in places
    places.add(place)
    return is_repeated
