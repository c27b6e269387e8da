"""Tensors into the files of a checkpoint: which goes where, the files and their index."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from mono_quant.errors import ConfigError, OutputError
from mono_quant.io.disk.output import OutputFolder
from mono_quant.io.phases import phase
from mono_quant.io.tensors.tensor_file import TensorEntry, file_image
from mono_quant.io.text import printable


def plan_shards(
    sizes: Mapping[str, int], max_shard_size: int | str, stem: str = "model"
) -> dict[str, list[str]]:
    """Decide which tensor goes into which file, in the order given.

    Args:
        sizes: tensor name -> bytes.
        max_shard_size: bytes, or text such as "5GB"; a larger tensor gets a file of its own.
        stem: of the file names.

    Returns:
        File name -> tensor names: `model.safetensors`, or `model-00001-of-0000N.safetensors` and so on.

    Raises:
        ConfigError: `max_shard_size` is no positive size.
    """
    if not isinstance(max_shard_size, str) and max_shard_size <= 0:
        raise ConfigError(f"max_shard_size is {max_shard_size}; give a positive number of bytes, or '5GB'")
    try:
        split = split_state_dict_into_shards_factory(
            dict(sizes),
            get_storage_size=int,
            filename_pattern=f"{stem}{{suffix}}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ConfigError(
            f"max_shard_size is {printable(max_shard_size)}; give a number of bytes, or text such as '5GB'"
        ) from error
    found: dict[str, list[str]] = split.filename_to_tensors
    return found or {f"{stem}.safetensors": []}


def write_checkpoint(
    folder: OutputFolder, entries: Sequence[TensorEntry], max_shard_size: int | str, stem: str = "model"
) -> dict[str, list[str]]:
    """Write tensors into shards, one tensor at a time, and the index if there is more than one.

    Args:
        folder: the folder under construction.
        entries: the tensors, in the order in which they fill the shards.
        max_shard_size, stem: see `plan_shards`.

    Returns:
        The plan that was written: file name -> tensor names.

    Raises:
        ConfigError: see `plan_shards`.
        OutputError: see `write_tensors`.
    """
    by_name = {entry.name: entry for entry in entries}
    if len(by_name) != len(entries):
        raise OutputError(f"{len(entries) - len(by_name)} tensors share a name with another; rename them")
    sizes = {entry.name: entry.nbytes for entry in entries}
    plan = plan_shards(sizes, max_shard_size, stem)
    done, total = 0, sum(sizes.values())
    with phase("Saving") as went:

        def wrote(size: int) -> None:
            nonlocal done
            done += size
            went(min(done, total), total)

        for file, names in plan.items():
            write_tensors(folder, file, [by_name[name] for name in names], wrote)
    if len(plan) > 1:
        write_index(folder, {name: file for file, names in plan.items() for name in names}, total, stem)
    return plan


def write_tensors(
    folder: OutputFolder,
    name: str,
    tensors: Mapping[str, torch.Tensor] | Sequence[TensorEntry],
    wrote: Callable[[int], None] = lambda size: None,
) -> None:
    """Write one file, tensor by tensor, byte for byte as `safetensors.torch.save_file` with `{"format": "pt"}`.

    Args:
        folder: the folder under construction.
        name: of the file; see `OutputFolder.write`.
        tensors: name -> tensor, or entries whose tensors are made when their turn comes.
        wrote: is told how many bytes went out, again and again.

    Raises:
        OutputError: a name or dtype that the format cannot hold, or an entry that is not what it promised.
        OutputWriteError: the file system refused.
    """
    image = file_image(name, tensors)
    folder.write(name, _told(image.chunks, wrote), image.size)


def _told(chunks: Iterable[bytes | memoryview], wrote: Callable[[int], None]) -> Iterator[bytes | memoryview]:
    for chunk in chunks:
        yield chunk
        wrote(len(chunk))


def write_index(
    folder: OutputFolder, weight_map: Mapping[str, str], total_size: int, stem: str = "model"
) -> None:
    """Write which file holds which tensor."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    folder.write_json(index_name(stem), index)


def index_name(stem: str) -> str:
    """Name the index of the shards of a model."""
    return f"{stem}.safetensors.index.json"
