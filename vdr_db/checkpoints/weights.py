"""Weights of a model folder: reading, naming, digesting, writing. No code in a file is ever run.

Files are `model.safetensors` (or its shards with an index) and, for older checkpoints,
`pytorch_model.bin`, which is read with `weights_only=True`: a pickle that holds anything but
tensors is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from vdr_db.errors import ConfigError
from vdr_db.towers.families import TOLERATED, WeightNames
from vdr_db.towers.stored import SharedMatrix, StoredTensor, stored_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vdr_db.text.own_weights import OwnWeights

__all__ = [
    "MANY_LAYERS",
    "SAFETENSORS",
    "Checkpoint",
    "Weight",
    "Weighted",
    "assign",
    "check_layers",
    "checked_device",
    "checked_dtype",
    "digest",
    "named_weights",
    "read_linear",
    "refuse_unexpected",
    "save_weights",
]

Weight: TypeAlias = "Tensor | StoredTensor | SharedMatrix | npt.NDArray[np.float32]"
"""A weight in memory, or where it lies in its file."""

MANY_LAYERS = 256
"""More than published models have."""

SAFETENSORS = "model.safetensors"
BIN = "pytorch_model.bin"
WEIGHT_FILES = (SAFETENSORS, f"{SAFETENSORS}.index.json", BIN, f"{BIN}.index.json")


class Checkpoint:
    """The weights of a folder by their usual names, read one at a time.

    Names that end in `LayerNorm.gamma` and `LayerNorm.beta`, as TensorFlow wrote them, are known as
    `LayerNorm.weight` and `LayerNorm.bias`.
    """

    def __init__(self, folder: Path) -> None:
        """Lists the weights; no tensor is read.

        Raises:
            ConfigError: There is no file of weights, or one is damaged.
        """
        self.folder = folder
        self._readers: dict[str, Callable[[], Tensor]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[str, StoredTensor] = {}
        for file in _weight_files(folder):
            add = self._add_safetensors if file.suffix == ".safetensors" else self._add_bin
            try:
                add(file)
            except ConfigError:
                raise
            except Exception as error:  # both libraries raise many kinds for a damaged file
                raise ConfigError(
                    f"{file} cannot be read as a file of weights: {error}; "
                    "it is damaged or cut short, so fetch it again."
                ) from error

    @property
    def names(self) -> list[str]:
        """Names of all weights."""
        return list(self._readers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight that is there."""
        return self._shapes[name]

    def tensor(self, name: str) -> Tensor:
        """A copy of a weight in memory of its own.

        Raises:
            ConfigError: The file changed or is damaged.
        """
        try:
            return self._readers[name]()
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ConfigError(
                f"weight `{name}` in {self.folder} cannot be read: {error}; fetch the file again."
            ) from error

    def stored(self, name: str) -> StoredTensor | None:
        """Where a weight of floats lies in a safetensors file; None for any other."""
        return self._stored.get(name)

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """A copy of a weight in memory of its own, float32.

        Raises:
            ConfigError: The file changed or is damaged.
        """
        stored = self._stored.get(name)
        if stored is not None:
            return stored.read()
        values: npt.NDArray[np.float32] = self.floats(name).numpy()
        return values

    def floats(self, name: str) -> Tensor:
        """The same as a tensor.

        Raises:
            ConfigError: The file changed or is damaged, or the weight is of whole numbers.
        """
        found = self.tensor(name)
        if not found.is_floating_point():
            raise ConfigError(
                f"weight `{name}` in {self.folder} must be of floats, got {found.dtype}; quantised "
                "weights are not read: fetch the model in float32, float16 or bfloat16."
            )
        return found.float()

    def _add(
        self,
        name: str,
        shape: Iterable[int],
        reader: Callable[[], Tensor],
        stored: StoredTensor | None = None,
    ) -> None:
        for old, new in (
            ("LayerNorm.gamma", "LayerNorm.weight"),
            ("LayerNorm.beta", "LayerNorm.bias"),
        ):
            if name.endswith(old):
                name = name.removesuffix(old) + new
        if name in self._readers:
            raise ConfigError(
                f"weight `{name}` stands twice in {self.folder}; save the model anew."
            )
        self._readers[name] = reader
        self._shapes[name] = tuple(shape)
        if stored is not None:
            self._stored[name] = stored

    def _add_safetensors(self, file: Path) -> None:
        def reader(name: str) -> Callable[[], Tensor]:
            def read() -> Tensor:
                # Opened for each weight: a mapping that stayed open would count the whole file a
                # second time in the memory of the process.
                with safe_open(file, framework="pt") as tensors:
                    return tensors.get_tensor(name).clone()  # type: ignore[no-any-return]

            return read

        stored = stored_tensors(file)
        places = {name: place for name, place in stored.items() if place.dtype != "I8"}
        with safe_open(file, framework="np") as tensors:  # names and shapes need no torch
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                shape = tensors.get_slice(name).get_shape()
                self._add(name, shape, reader(name), places.get(name))

    def _add_bin(self, file: Path) -> None:
        import torch

        try:
            stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before the zip format cannot be mapped
            stored = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(stored, Mapping):
            raise ConfigError(
                f"{file} must hold a mapping of weights, got {type(stored).__name__}."
            )
        for name, tensor in stored.items():
            if not isinstance(tensor, torch.Tensor):
                raise ConfigError(
                    f"{file} must hold tensors only, got {type(tensor).__name__} for `{name}`."
                )
            self._add(name, tensor.shape, tensor.clone)


def read_linear(file: Path) -> dict[str, Tensor]:
    """Weight and bias of a linear layer in a file of its own, float32.

    Raises:
        ConfigError: The file is damaged or holds something else.
    """
    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
        return {part: found[part].detach().float() for part in ("weight", "bias")}
    except Exception as error:  # the library raises many kinds for a damaged file
        raise ConfigError(
            f"{file} must hold `weight` and `bias` of a linear layer, but {error!r}; "
            "fetch it again."
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHT_FILES:
        file = folder / name
        if not file.is_file():
            continue
        if file.suffix != ".json":
            return [file]
        try:
            shards = sorted(set(json.loads(file.read_text("utf-8"))["weight_map"].values()))
            files = [folder / Path(shard).name for shard in shards]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{file} must be an index of weight files: {error!r}; fetch it again."
            ) from error
        missing = [shard.name for shard in files if not shard.is_file()]
        if missing:
            raise ConfigError(f"{folder} lacks {', '.join(missing)}, named by {name}; fetch them.")
        return files
    raise ConfigError(
        f"{folder} must hold {SAFETENSORS} or {BIN}, got neither; fetch the missing file."
    )


def assign(
    module: nn.Module,
    checkpoint: Checkpoint,
    names: WeightNames,
    others: Mapping[str, Tensor] | None = None,
) -> set[str]:
    """Fills a module that was built on the meta device, in float32.

    Args:
        module: Its parameters are exactly the keys of `names` and `others`.
        checkpoint: Where weights come from.
        names: Parameter -> possible names in the checkpoint.
        others: Parameters that come from elsewhere.

    Returns:
        Names in the checkpoint that were used, alternatives included.

    Raises:
        ConfigError: A weight is missing or has another shape; the message lists all of them.
    """
    parameters = dict(module.named_parameters())
    present = set(checkpoint.names)
    missing: list[str] = []
    misshapen: list[str] = []
    chosen: dict[str, str] = {}
    for ours, options in names.items():
        theirs = next((name for name in options if name in present), None)
        if theirs is None:
            missing.append(options[0])
            continue
        wanted, got = tuple(parameters[ours].shape), checkpoint.shape(theirs)
        if wanted != got:
            misshapen.append(f"{theirs} {list(got)} instead of {list(wanted)}")
        chosen[ours] = theirs
    if missing or misshapen:
        said = [f"lacks {_listed(missing)}"] if missing else []
        said += [f"has {_listed(misshapen)}"] if misshapen else []
        raise ConfigError(
            f"the weights in {checkpoint.folder} do not fit its config.json: the file "
            f"{' and '.join(said)}; fetch the model again."
        )
    state = dict(others or {})
    for ours, theirs in chosen.items():
        state[ours] = checkpoint.floats(theirs)
    module.load_state_dict(state, strict=True, assign=True)
    return {name for options in names.values() for name in options} & present


def check_layers(layers: object, checkpoint: Checkpoint) -> None:
    """Refuses a number of layers that the weights cannot have, before any layer is built.

    Raises:
        ConfigError: There are more layers than weights.
    """
    if isinstance(layers, int) and layers > len(checkpoint.names):
        raise ConfigError(
            f"the config of {checkpoint.folder} says {layers:,} layers, and its files hold "
            f"{len(checkpoint.names)} weights; fetch the model again."
        )


def refuse_unexpected(checkpoint: Checkpoint, used: set[str], ignored: Iterable[str] = ()) -> None:
    """Refuses weights nobody asked for.

    Args:
        checkpoint: Of a folder.
        used: Names that were used.
        ignored: Prefixes of names that are known and not needed.

    Raises:
        ConfigError: There are others; the message lists them.
    """
    prefixes = tuple(ignored)
    left = [
        name
        for name in checkpoint.names
        if name not in used
        and not TOLERATED.search(name)
        and not (prefixes and name.startswith(prefixes))
    ]
    if left:
        raise ConfigError(
            f"the weights in {checkpoint.folder} hold {_listed(left)}, which this kind of model "
            "does not have; its config.json describes another model."
        )


class Weighted(Protocol):
    """Whatever has weights by name: a tower, or a table of static ones."""

    def named_parameters(self) -> Iterable[tuple[str, Any]]:
        """Names and weights."""


def named_weights(
    document: Weighted, query: Weighted, own: OwnWeights | None = None
) -> dict[str, Weight]:
    """All weights of two towers by our names, those of a shared tower once; and own weights."""
    towers = {"document": document} if query is document else {"document": document, "query": query}
    found: dict[str, Weight] = {
        f"{side}.{name}": tensor
        for side, tower in towers.items()
        for name, tensor in tower.named_parameters()
    }
    return found if own is None else {**found, **own.arrays}


def digest(weights: Mapping[str, Weight]) -> str:
    """SHA-256 (hex) over names, shapes and float32 values, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name]
        if isinstance(weight, (StoredTensor, SharedMatrix)):
            values = weight.read()
        elif isinstance(weight, np.ndarray):
            values = np.ascontiguousarray(weight)
        else:
            values = weight.detach().cpu().float().contiguous().numpy()
        total.update(f"{name} {list(values.shape)}\n".encode())
        total.update(values.data)
    return total.hexdigest()


def save_weights(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes a safetensors file that other libraries read as torch weights."""
    from safetensors.torch import save_file

    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save_file(ready, file, metadata={"format": "pt"})
    file.chmod(0o644)  # the library makes it readable by its owner only, unlike all files beside it


def _listed(names: list[str], limit: int = 20) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def checked_device(device: str | torch.device | None) -> torch.device:
    """The device that was asked for; CUDA or else the CPU for None.

    Raises:
        ConfigError: This machine or this torch does not have it, or torch cannot compute in this
            process.
    """
    import torch

    from vdr_db.towers.torch_tower import check_process

    check_process()
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(
            f"`device` must be one this machine and this torch have, such as 'cpu', got "
            f"{device!r}: {str(error).splitlines()[0]}"
        ) from error
    return found


def checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """The float dtype that was asked for; float32 for None.

    Raises:
        ConfigError: It is none.
    """
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            f"`dtype` must be a float dtype such as torch.bfloat16 or 'float16', got {dtype!r}."
        )
    return found
