"""The public verbs, as straight-line recipes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mono_quant.api.delivery import Order, deliver
from mono_quant.api.measuring import suggestion
from mono_quant.api.recipe import convert_source, plan_source
from mono_quant.api.result import QuantizedModel
from mono_quant.api.streaming import StreamOrder, StreamResult, stream
from mono_quant.artifact import inspection, loading
from mono_quant.artifact.inspection import Inspection, inspect_any
from mono_quant.artifact.keeping import keep_loaded_
from mono_quant.artifact.loading import override_schemes_
from mono_quant.artifact.publishing import publish
from mono_quant.artifact.saving import MAX_SHARD_SIZE
from mono_quant.convert.int8_layers import layers_with_schemes
from mono_quant.errors import AlreadyQuantizedError, ConfigError, Name
from mono_quant.graphs.backend import mono_quant
from mono_quant.hf.placing import check_place, parse_float, place_
from mono_quant.io.hub.client import Hub
from mono_quant.io.hub.push import PushResult
from mono_quant.io.hub.target import PushOptions
from mono_quant.io.memory import let_go
from mono_quant.planning.config import QuantizationConfig, merge
from mono_quant.planning.report import QuantReport
from mono_quant.planning.schemes import parse_activations
from mono_quant.planning.suggestion import Suggestion
from mono_quant.sources.opening import from_module, open_source, saved_folder
from mono_quant.sources.source import Access


class _Unset:
    def __repr__(self) -> str:
        return "<as in config>"


UNSET: Any = _Unset()


def quantize(
    source: nn.Module | str | Path,
    dtype: str | torch.dtype = UNSET,
    *,
    config: QuantizationConfig | Mapping[str, Any] | None = None,
    inplace: bool = False,
    processor: Any = None,
    probe: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    origin: str | None = None,
    **options: Any,
) -> QuantizedModel:
    """Convert a model to INT8 or FP16.

    Args:
        source: an `nn.Module`, a transformers model, a SentenceTransformer, a local folder, or a Hub id.
        dtype: `int8` (the default) or `fp16`; torch.int8, torch.qint8 and torch.float16 work too.
        config: a request to start from; arguments win over it.
        inplace: convert the given module itself; it is put back when that fails. Otherwise it is not touched.
        processor: tokenizer or processor of a model in memory: measured with it, and saved beside the model.
        probe: inputs to measure the output with: a tensor, a tuple of arguments or a dict of keyword arguments.
        revision: branch, tag or commit of a Hub id.
        token: for a private or gated Hub id; the saved login when None.
        trust_remote_code: run the repository's own model code. Read it first.
        allow_pickle: read pickle weights, as plain tensors in a guarded process.
        origin: `hub` or `local`, to say what a text means; else a folder that is here wins over a Hub id, and a warning says so.
        **options: fields of `QuantizationConfig`.

    Returns:
        The converted model with its report.

    Raises:
        MonoQuantError: a typed error for everything that cannot be converted, naming the remedy.
    """
    request = _request(config, dtype, options)
    access = Access(revision, Hub(token=token), trust_remote_code, allow_pickle, origin)
    opened = open_source(source, access, processor=processor)
    return convert_source(opened, request, inplace=inplace or opened.owned, probe=probe)


def dynamic_quantize(
    model: nn.Module,
    dtype: str | torch.dtype = UNSET,
    config: QuantizationConfig | Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[nn.Module, list[str]]:
    """Convert a model in memory; the given one is not changed.

    Args:
        model: any module.
        dtype: `int8` (the default) or `fp16`.
        config: a request to start from; arguments win over it.
        **options: fields of `QuantizationConfig`.

    Returns:
        The converted model, and the names of the layers that were left as they were, each once. A weight that stays in float
        in a converted layer (few input features of an LSTM) is named itself.

    Raises:
        MonoQuantError: as `quantize`.
    """
    # nothing is measured: this verb returns no report
    request = _request(config, dtype, {"fidelity": False, **options})
    result = convert_source(open_source(model), request, inplace=False, probe=None)
    return result.model, [layer.name for layer in result.report.kept_layers]


def quantize_from_hub(
    repo_id: str,
    dtype: str | torch.dtype = UNSET,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    output: str | Path | None = None,
    push_to: str | None = None,
    private: bool | None = None,
    overwrite: bool = False,
    create_pr: bool = False,
    config: QuantizationConfig | Mapping[str, Any] | None = None,
    processor: Any = None,
    probe: Any = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    **options: Any,
) -> QuantizedModel:
    """Download a model, convert it, and save and push it where asked.

    Args:
        repo_id: `owner/name`; never a local folder.
        dtype: `int8` (the default) or `fp16`.
        revision: branch, tag or commit; resolved to one commit that everything is read from.
        token: for a private or gated source; the saved login when None.
        output: folder to save to.
        push_to: repository to push to, in one commit, after the saved model was loaded back and compared.
        private: visibility of a new repository; None makes it as private as the source.
        overwrite: replace an older `output`, and in `push_to` what mono_quant did not push: weights, a licence, other files, a
            card that cannot be merged with ours.
        create_pr: open a pull request in `push_to` instead of changing its branch.
        config: a request to start from; arguments win over it.
        processor, probe, trust_remote_code, allow_pickle: as for `quantize`.
        **options: fields of `QuantizationConfig`.

    Returns:
        The converted model with its report.

    Raises:
        HubError: the Hub refused or did not answer.
        MonoQuantError: as `quantize`.
    """
    order = Order(
        _request(config, dtype, options),
        output,
        push_to,
        PushOptions(private=private, overwrite=overwrite, create_pr=create_pr),
        processor,
        probe,
    )
    access = Access(revision, Hub(token=token), trust_remote_code, allow_pickle, "hub")
    return deliver(repo_id, access, order).result


def quantize_checkpoint(
    source: str | Path,
    dtype: str | torch.dtype = UNSET,
    *,
    output: str | Path | None = None,
    push_to: str | None = None,
    config: QuantizationConfig | Mapping[str, Any] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    restart: bool = False,
    private: bool | None = None,
    overwrite: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    origin: str | None = None,
    **options: Any,
) -> StreamResult:
    """Convert a checkpoint file by file: its model is never in memory, and the result is what `quantize` and `save` would write.

    Weights are read in blocks and written as they come; of a Hub id a few files are here at a time, and finished ones gather on a
    branch of `push_to` until one commit publishes them all. What is finished when a run ends early stays (in `.NAME.mq-stream`
    beside the folder, and on that branch), and the same call goes on from there. Under torchrun, its processes share the work.

    Args:
        source: a local folder, or a Hub id, with safetensors weights.
        dtype: `int8` (the default) or `fp16`.
        output: folder to write; it appears whole or not at all.
        push_to: repository to publish in, in one commit.
        config: a request to start from; arguments win over it.
        max_shard_size: of the files that are written, in bytes or text such as `5GB`.
        restart: discard what an earlier run with other settings, or of another source, left unfinished.
        private, overwrite, create_pr: as for `quantize_from_hub`.
        revision, token, trust_remote_code, origin: as for `quantize`.
        **options: fields of `QuantizationConfig`. Left open, `fidelity` measures models of any size that lie in a folder, with one
            module in memory at a time.

    Returns:
        The report, the folder and the commit; none of them for a process of torchrun that leaves the end to another.

    Raises:
        ResumeError: what an earlier run left is of another source or of other settings; it says which.
        MonoQuantError: as `quantize`, `QuantizedModel.save` and `push_to_hub`.
    """
    push = PushOptions(private=private, overwrite=overwrite, create_pr=create_pr)
    order = StreamOrder(_request(config, dtype, options), output, push_to, push, restart, max_shard_size)
    return stream(source, Access(revision, Hub(token=token), trust_remote_code, place=origin), order)


def push_to_hub(
    folder_or_result: str | Path | QuantizedModel,
    repo_id: str,
    *,
    private: bool | None = None,
    overwrite: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> PushResult:
    """Publish a saved folder or a converted model in one commit: all files or none.

    The folder is loaded back first; the card is written for the repository it goes to; what the Hub holds afterwards is
    read back and compared. What the owner wrote on the repository's card stays: our lines stand between marks, and only they are
    written anew. Other files that mono_quant did not push, or that were changed since, are not replaced unless asked.

    Args:
        folder_or_result: a folder that `save` wrote, or what `quantize` returned.
        repo_id: target; the token's account when it has no owner. Created when missing.
        private: visibility of a new repository; None makes it as private as the source.
        overwrite: replace what mono_quant did not push: weights, a licence, other files, a card that cannot be merged with ours.
        create_pr: open a pull request instead of changing the branch; it may propose to replace all that.
        revision: branch to push to.
        commit_message: one line.
        token: the saved login when None.

    Returns:
        The commit that holds the files, with the page of the repository.

    Raises:
        HubConflictError: something in the repository is not ours to replace; nothing was changed.
        HubError: the Hub refused; nothing was changed, or it says what was.
        ConfigError: the folder's card was edited and contradicts the report.
    """
    options = PushOptions(
        private=private,
        overwrite=overwrite,
        create_pr=create_pr,
        revision=revision,
        commit_message=commit_message,
    )
    client = Hub(token=token)
    if isinstance(folder_or_result, QuantizedModel):
        return folder_or_result.publish(repo_id, options, client)
    return publish(Path(folder_or_result), repo_id, options, client=client)


def plan(
    source: nn.Module | str | Path,
    dtype: str | torch.dtype = UNSET,
    *,
    config: QuantizationConfig | Mapping[str, Any] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    origin: str | None = None,
    **options: Any,
) -> QuantReport:
    """Say what `quantize` would do, without converting or reading any weight.

    Args:
        source: as for `quantize`; of a Hub id only the config and the headers of the weight files are fetched.
        dtype: `int8` (the default) or `fp16`.
        config: a request to start from; arguments win over it.
        revision, token, trust_remote_code, origin: as for `quantize`.
        **options: fields of `QuantizationConfig`.

    Returns:
        A report with `planned=True`: every parameter, its fate and the sizes. What only the values can tell
        (non-finite weights, float16 overflow) is not in it.

    Raises:
        MonoQuantError: as `quantize`.
    """
    request = _request(config, dtype, options)
    access = Access(revision, Hub(token=token), trust_remote_code, place=origin)
    return plan_source(open_source(source, access, weights=False), request)


def suggest(
    source: nn.Module | str | Path,
    *,
    config: QuantizationConfig | Mapping[str, Any] | None = None,
    processor: Any = None,
    probe: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    origin: str | None = None,
    **options: Any,
) -> Suggestion:
    """Measure for which layers a wider scheme of activations pays.

    The int8 model runs on the inputs that fidelity is measured with. Of each layer its crest is measured (how far a token's largest
    value is above the rest) and how far its output is off when its inputs are rounded by each scheme.

    Args:
        source: a float model as for `quantize`, which is converted for this and left as it is; or an int8 one, in memory, in a
            folder or on the Hub.
        config, processor, probe, revision, token, trust_remote_code, allow_pickle, origin: as for `quantize`.
        **options: fields of `QuantizationConfig`.

    Returns:
        What was measured (`table()`), and what to pass as `activations=`: the few layers that make most of the noise, or
        `auto` where no few do. `quantize(..., activations="measured")` does both.

    Raises:
        ConfigError: the model cannot be run.
        MonoQuantError: as `quantize`.
    """
    access = Access(revision, Hub(token=token), trust_remote_code, allow_pickle, origin)
    if isinstance(source, nn.Module) and layers_with_schemes(source):
        return suggestion(from_module(source, processor).subject, probe)
    request = _request(config, UNSET, {"fidelity": False, **options})
    try:
        opened = open_source(source, access, processor=processor)
    except AlreadyQuantizedError:
        if isinstance(source, nn.Module):
            raise
        path, _ = saved_folder(source, access)
        model, _ = loading.load(path)
        return suggestion(replace(from_module(model, processor).subject, folder=path), probe)
    return convert_source(opened, request, inplace=opened.owned, probe=None).suggest(probe)


@torch.inference_mode(False)
def load(
    folder: str | Path,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | int | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    activations: str | Mapping[str, str] | None = None,
    verify: bool = True,
    mmap: bool = False,
    compile: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    origin: str | None = None,
) -> nn.Module:
    """Load a saved model, as the class it was, with int8 kept in memory and executed.

    Also loads compressed-tensors int8 (W8A8, dynamic per token) checkpoints that others made.

    Args:
        folder: that `save` wrote, or a Hub id.
        model: for a plain module, an instance of its class (left untouched) or a function that makes one.
        dtype: of what is not int8; None leaves it as it is stored.
        device: that the model goes to.
        device_map: for a model of transformers, `auto` or a device by name of module, as `from_pretrained` takes it.
        offload_folder: for what `device_map` puts on the disk.
        activations: how inputs of int8 layers become codes, as for `quantize`; None leaves it as it was saved.
        verify: compare every file with the manifest's sha256 first.
        mmap: leave large tensors in their files, which the system reads when they are used: ready sooner, and memory that it can take
            back. The files must stay as they are while the model is used; replacing the folder as `save` does is no harm.
        compile: run it compiled, by the backend "mono_quant" of `torch.compile`: faster, from the second call on.
        revision, token, origin: for a Hub id, as for `quantize`.

    Returns:
        The model in evaluation mode; on the same kind of device and in its own dtype, its outputs equal those of the model
        that was saved, bit for bit.

    Raises:
        MonoQuantError: a typed error for a missing, tampered, foreign or newer folder.
    """
    for name, given in (("compile", compile), ("mmap", mmap)):
        if not isinstance(given, bool):
            raise ConfigError(Name(name), f" is {given!r}; use True or False")
    cast = parse_float(dtype)
    check_place(device, device_map)
    asked = None if activations is None else parse_activations(activations)
    path, _ = saved_folder(folder, Access(revision, Hub(token=token), place=origin))
    loaded, manifest = loading.load(path, model, verify=verify, mapped=mmap)
    if asked is not None:
        override_schemes_(loaded, asked)
    keep_loaded_(path, loaded, manifest)
    if mmap:
        # a few values of each were looked at, and the system read what lies around them
        let_go((t.data_ptr(), t.nbytes) for t in (*loaded.parameters(), *loaded.buffers()))
    placed = place_(loaded, cast, device, device_map, offload_folder)
    if compile:
        placed.compile(backend=mono_quant)
    return placed


def inspect(
    place: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    origin: str | None = None,
) -> Inspection:
    """Say what is quantized in a model and what is not, from its files alone.

    Args:
        place: a model folder of ours or of anybody with safetensors weights, or a Hub id, of which only small files and headers
            are fetched.
        revision, token, origin: for a Hub id, as for `quantize`.

    Returns:
        Shape of every int8 tensor, dtype, shape and reason of every other, and where they came from.

    Raises:
        MonoQuantError: a typed error for a place that is missing or broken.
    """
    return inspect_any(place, Access(revision, Hub(token=token), place=origin))


def verify(
    folder: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    origin: str | None = None,
) -> list[str]:
    """Check a saved model: every file against the manifest, the report against the weights, and that it loads.

    Args:
        folder: that `save` wrote, or a Hub id, whose files are fetched into the cache.
        revision, token, origin: for a Hub id, as for `quantize`.

    Returns:
        One line for each check that passed.

    Raises:
        MonoQuantError: the first check that failed.
    """
    path, repo_id = saved_folder(folder, Access(revision, Hub(token=token), place=origin))
    return inspection.verify(path, extras=repo_id is not None)


def _request(
    config: QuantizationConfig | Mapping[str, Any] | None, dtype: Any, options: Mapping[str, Any]
) -> QuantizationConfig:
    given = {k: v for k, v in options.items() if v is not UNSET}
    if dtype is not UNSET:
        given["dtype"] = dtype
    return merge(config, given)
