"""The source model: a folder of safetensors files, read strictly and by offset.

No code of it is executed, and it is never loaded whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from codecllm.converter.source.dequantized import mxfp4_tensor, scaled_tensor
from codecllm.converter.source.files import SourceFile, read_json
from codecllm.converter.source.layout import WeightSet, find_weights
from codecllm.converter.source.modules import read_modules
from codecllm.converter.source.quantization import (
    Quantization,
    block_sizes,
    find_quantization,
    has_transforms,
)
from codecllm.converter.source.selection import SideFiles, select_side_files
from codecllm.converter.source.tensors import SourceTensor, same_bytes
from codecllm.formats import limits
from codecllm.formats.errors import SourceError, TruncatedError
from codecllm.formats.files import (
    LFS_BEGIN,
    as_path,
    describe_missing,
    file_identity,
    refuse_foreign,
)
from codecllm.formats.manifest.manifest import MANIFEST_NAME
from codecllm.formats.shards.safetensors_header import read_header

View = Literal["int8", "lossless"]
"""As which tensors a quantized source is seen.

`lossless`: as its files hold them. `int8`: as the 16-bit weights that they stand for.
"""

_SHOWN_NAMES = 3
_MOST_BLOCKS = 64
"""Most quantization blocks in the parts of a config; each one is judged by all tensors."""
TEXT_ENDINGS = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".spm")
"""Endings of files without which a tokenizer or a model is another one."""


class SourceModel:
    """A local folder with one model, opened for reading.

    Attributes:
        repository: the folder that was given.
        folder: the folder of config and weights: the same, or that of a repository's main module.
        modules: the modules of the repository.
        config: the parsed config.json, or None where there is none. A quantization block that the
            view does not bear out is gone.
        tensors: all tensors by name, in the order of the files and of their data.
        quantization: how the tensors are quantized.
        weights: the weight files.
        notes: sentences for the user about the files and tensors of the source.
        block_dropped: whether the config had a quantization block that no tensor bears out.
    """

    def __init__(
        self, folder: str | Path, *, view: View = "lossless", with_code: bool = False
    ) -> None:
        """Opens every weight file of `folder` and checks its header.

        Args:
            folder: the model's folder.
            view: as which tensors a quantized source is seen.
            with_code: whether Python files are among the side files.

        Raises:
            SourceError: no folder, no weights, an adapter, a container, or a quantization of which
                `view` cannot be given.
            UnsafeSourceError: there are only pickles.
            FormatError: a weight file, the config or the index is malformed, or a name leads
                outside the folder.
        """
        self.repository = as_path(folder, "model")
        if not self.repository.is_dir():
            raise SourceError(
                describe_missing(self.repository, "a model is a folder with config.json in it"),
                file=str(folder),
            )
        if (self.repository / MANIFEST_NAME).exists():
            raise SourceError("this is a codecllm container already", file=str(folder))
        self.modules = read_modules(self.repository)
        self.folder = self.repository / self.modules.main
        self._side_identities: dict[Path, tuple[int, ...] | None] = {}
        # Before it is read, so that a change between both is noticed.
        self._remember(self.folder / "config.json")
        self.config = _read_config(self.folder)
        self.notes: list[str] = []
        self.block_dropped = False
        self.tensors: dict[str, SourceTensor] = {}
        self._with_code = with_code
        self._files: list[SourceFile] = []
        try:
            self.weights = find_weights(self.folder, self.config)
            self.notes += self.weights.notes
            self._open_files(self.weights)
            self.tensor_bytes = sum(tensor.entry.bytes for tensor in self.tensors.values())
            self._settle_quantization(view)
        except BaseException:
            self.close()
            raise

    @property
    def model_type(self) -> str:
        """`model_type` of the config, or an empty string."""
        return str((self.config or {}).get("model_type", ""))

    @property
    def elements(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.entry.elements for tensor in self.tensors.values())

    @property
    def quantization_method(self) -> str | None:
        """The method of another library whose quantizer the tensors, as they are seen, need.

        None where they need none.
        """
        return self.quantization.method if self.quantization.block is not None else None

    @property
    def names_code(self) -> bool:
        """Whether the config names classes of the repository's own code."""
        return bool((self.config or {}).get("auto_map"))

    @property
    def side_bytes(self) -> int:
        """Bytes of all side files that are copied."""
        names = self.side_files.copied.values()
        return sum((self.repository / name).stat().st_size for name in names)

    @property
    def original_block(self) -> Mapping[str, Any] | None:
        """The quantization block whose place our own takes in the config, or None."""
        is_outermost = self.quantization.place == ("quantization_config",)
        return self.quantization.block if is_outermost else None

    @cached_property
    def side_files(self) -> SideFiles:
        """The files that are copied beside the weights, and those that are left.

        Raises:
            UnsafeSourceError: the weights of a module are a pickle.
            LimitError: those of a module are too large.
            NotAContainerError: a file of text is a Git LFS pointer.
        """
        prefix = f"{self.modules.main}/" if self.modules.main else ""
        names = [*self.weights.files, *([self.weights.index] if self.weights.index else [])]
        side_files = select_side_files(
            self.repository, self.modules, [prefix + name for name in names], self._with_code
        )
        for name in side_files.copied.values():
            self._remember(self.repository / name)
            if name.endswith(TEXT_ENDINGS):
                with SourceFile(self.repository, name) as file:
                    if file.read(0, min(len(LFS_BEGIN), file.size)) == LFS_BEGIN:
                        refuse_foreign(file)
        return side_files

    def describe_taken(self) -> str:
        """Says in one line which files were taken as the model's weights."""
        files = self.weights.files
        where = f" of {self.modules.main}/" if self.modules.main else ""
        text = files[0] if len(files) == 1 else f"{len(files)} files, {files[0]} and following"
        index = f", listed in {self.weights.index}" if self.weights.index else ""
        return f"{text}{where}{index}: {len(self.tensors)} tensors"

    @property
    def files(self) -> list[SourceFile]:
        """The open weight files."""
        return list(self._files)

    def check_unchanged(self) -> None:
        """Raises SourceError where a file was replaced or written to since it was opened."""
        for file in self._files:
            if not file.unchanged():
                raise SourceError("source changed while it was read", file=file.name)
        for path, identity in self._side_identities.items():
            if _identity_of(path) != identity:
                name = str(path.relative_to(self.repository))
                raise SourceError("source changed while it was read", file=name)

    def _remember(self, path: Path) -> None:
        self._side_identities[path] = _identity_of(path)

    def close(self) -> None:
        """Closes all files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> SourceModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open_files(self, weights: WeightSet) -> None:
        for name in weights.files:
            file = SourceFile(self.folder, name)
            self._files.append(file)
            header = read_header(file, max_header_bytes=limits.SOURCE_HEADER_BYTES)
            for entry in header.tensors.values():
                tensor = SourceTensor(entry, file)
                earlier = self.tensors.get(entry.name)
                if earlier is not None and not same_bytes(earlier, tensor):
                    self.notes.append(
                        f"tensor {entry.name} stands in {earlier.file.name} and, with other "
                        f"values, in {name}: that of the latter is taken, as transformers does"
                    )
                self.tensors[entry.name] = tensor
        if not self.tensors:
            raise SourceError("the model holds no tensors", file=str(self.folder))
        self._compare_index(weights)

    def _compare_index(self, weights: WeightSet) -> None:
        """Notes where the index and the headers disagree; the headers count."""
        if weights.index is None:
            return
        absent = [name for name in weights.tensor_files if name not in self.tensors]
        unlisted_names = [name for name in self.tensors if name not in weights.tensor_files]
        if absent:
            self.notes.append(f"{weights.index} names tensors that no file holds: {_some(absent)}")
        if unlisted_names:
            self.notes.append(
                f"files hold tensors that {weights.index} lacks: {_some(unlisted_names)}"
            )

    def _settle_quantization(self, view: View) -> None:
        """Removes blocks that no tensor bears out.

        Where the view wants weights, it also replaces quantized tensors.
        """
        entries = {name: tensor.entry for name, tensor in self.tensors.items()}
        quantization = find_quantization(self.config, entries)
        if view == "int8" and quantization.borne_out:
            self._dequantize(quantization)
        # A config may hold several blocks, in different parts; each is judged anew.
        count = 0
        while quantization.block is not None and (view == "int8" or quantization.stale):
            if quantization.stale:
                self.block_dropped = True
                self.notes.append(
                    f"config.json says {'.'.join(quantization.place)}: {quantization.method}, "
                    "but no tensor is quantized: the block is left out"
                )
            assert self.config is not None
            count += 1
            if count > _MOST_BLOCKS:
                raise SourceError(
                    "too many quantization blocks",
                    file="config.json",
                    got=f"more than {_MOST_BLOCKS}",
                    expected=f"at most {_MOST_BLOCKS}",
                )
            self.config = _without(self.config, quantization.place)
            entries = {name: tensor.entry for name, tensor in self.tensors.items()}
            quantization = find_quantization(self.config, entries)
        if view != "int8" and self.config is not None and quantization.block is None:
            names = [*quantization.scaled, *quantization.blocks]
            if names:
                self.notes.append(
                    "config.json has no quantization_config, without which transformers reads "
                    f"{len(names)} quantized tensors but not their scales: {_some(names)}"
                )
        self.quantization = quantization

    def _dequantize(self, quantization: Quantization) -> None:
        has_codes = quantization.scaled or quantization.blocks
        if quantization.opaque or not has_codes or has_transforms(quantization.block):
            first = quantization.opaque[0] if quantization.opaque else None
            raise SourceError(
                f"the model is quantized already ({quantization.method}): its weights cannot "
                "become int8; --scheme lossless keeps every bit of it, or convert the original "
                "model",
                file="config.json" if first is None else self.tensors[first].file.name,
                tensor=first,
            )
        sizes = block_sizes(quantization.block)
        stored_tensors = self.tensors
        blocks_of = {pair[0]: stem for stem, pair in quantization.blocks.items()}
        exponents = {pair[1] for pair in quantization.blocks.values()}
        hidden = {*quantization.scaled.values(), *exponents, *quantization.dropped}
        self.tensors = {}
        for name, tensor in stored_tensors.items():
            if name in quantization.scaled:
                scale = stored_tensors[quantization.scaled[name]]
                self.tensors[name] = scaled_tensor(tensor, scale, sizes)
            elif name in blocks_of:
                stem = blocks_of[name]
                if stem in stored_tensors:
                    raise SourceError(
                        "the name of weights in MXFP4 is also that of another tensor",
                        file=tensor.file.name,
                        tensor=stem,
                    )
                self.tensors[stem] = mxfp4_tensor(stem, tensor, stored_tensors[f"{stem}_scales"])
            elif name not in hidden:
                self.tensors[name] = tensor
        count = len(quantization.scaled) + len(quantization.blocks)
        self.notes.append(f"{count} quantized tensors ({quantization.method}) are read as bfloat16")


def _identity_of(path: Path) -> tuple[int, ...] | None:
    """Returns the identity of a file (`file_identity`), or None where there is no file."""
    try:
        return file_identity(path.stat())
    except OSError:
        return None


def _read_config(folder: Path) -> dict[str, Any] | None:
    """Reads config.json as Python does: real ones hold `Infinity`.

    No value of it is trusted for sizes or paths.
    """
    try:
        config = read_json(folder, "config.json")
    except TruncatedError:
        # A link to nothing is a broken download, not a model without a config.
        if (folder / "config.json").is_symlink():
            raise
        return None
    if not isinstance(config, dict):
        raise SourceError("top level is not an object", file="config.json")
    return config


def _without(config: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    """Returns a config without the value at a place."""
    key, *deeper = place
    if not deeper:
        return {name: value for name, value in config.items() if name != key}
    return {**config, key: _without(config[key], tuple(deeper))}


def _some(names: list[str]) -> str:
    first_names = ", ".join(names[:_SHOWN_NAMES])
    rest = len(names) - _SHOWN_NAMES
    return f"{first_names} and {rest} more" if rest > 0 else first_names
