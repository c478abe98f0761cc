"""`export`: write weights for other programs, in the format of the file name's suffix."""

import io
import json
import warnings
from dataclasses import replace

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.errors import EXIT_DONE, UserError
from cifar_dist.config.files import write_output
from cifar_dist.config.options import ExportOptions
from cifar_dist.config.provenance import package_versions
from cifar_dist.config.recipe import describe_network, recipe_to_mapping
from cifar_dist.config.world import World
from cifar_dist.data.folder import name_some
from cifar_dist.data.loader import Normalizer
from cifar_dist.display.terminal import make_console, print_notes
from cifar_dist.run.weights import SavedWeights, read_weights

_TOLERANCE = 1e-4
"""Largest difference of onnxruntime's logits from torch's, relative to the largest logit or to 1."""


def run(options: ExportOptions, world: World, config: AccelerateConfig) -> int:
    """Export; return the exit code."""
    if world.size > 1:
        raise UserError(f"export is the work of one process, and there are {world.size}: start one")
    out, kind = options.out, options.out.suffix
    weights = read_weights(options.checkpoint, options.recipe, options.assignments)
    write_output(out, _WRITERS[kind](weights))
    recipe = weights.recipe
    mean, std = list(recipe.normalization.mean), list(recipe.normalization.std)
    images = f"RGB images (N, 3, {recipe.image_size}, {recipe.image_size}) in [0, 1]"
    images += "" if kind == ".onnx" else f", normalized by mean {mean} and std {std}"
    names = f" ({name_some(weights.class_names)})" if weights.class_names else ""
    what = f"{out}: {describe_network(recipe)}, {weights.num_classes} classes{names}; takes {images}"
    print_notes(make_console(), (*weights.notes, what))
    return EXIT_DONE


def _state_dict(weights: SavedWeights) -> dict[str, Tensor]:
    """Return the state dict in the order and layout of torchvision's own network."""
    model = weights.build(torch.device("cpu"), torch.contiguous_format)
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}


def _metadata(weights: SavedWeights) -> dict[str, str]:
    """Return what is needed to use the weights without the run."""
    recipe = weights.recipe
    metadata = {
        "model": recipe.model,
        "stem": recipe.stem,
        "classes": list(weights.class_names or map(str, range(weights.num_classes))),
        "image_size": recipe.image_size,
        "mean": list(recipe.normalization.mean),
        "std": list(recipe.normalization.std),
        "versions": package_versions(),
    }
    if weights.class_names is not None:  # with this, the file is read as a checkpoint
        metadata["recipe"] = recipe_to_mapping(replace(recipe, pretrained=None, freeze_epochs=0))
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in metadata.items()
    }


def _pth(weights: SavedWeights) -> bytes:
    file = io.BytesIO()
    torch.save(_state_dict(weights), file)
    return file.getvalue()


def _safetensors(weights: SavedWeights) -> bytes:
    content: bytes = save_safetensors(_state_dict(weights), metadata=_metadata(weights))
    return content


def _normalized(weights: SavedWeights) -> nn.Module:
    """Build the network behind its normalization: logits (N, classes) for images (N, 3, S, S) in [0, 1]."""
    how = (torch.device("cpu"), torch.contiguous_format)
    return nn.Sequential(Normalizer(weights.recipe.normalization, *how), weights.build(*how)).eval()


def _onnx(weights: SavedWeights) -> bytes:
    """Build the graph. Raises UserError if onnxruntime's logits differ from torch's."""
    import onnx
    import onnxruntime

    model, size = _normalized(weights), weights.recipe.image_size
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
    weights.check_finite(expected, "no")
    with warnings.catch_warnings():  # of the exporter's own code
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        except Exception as error:  # of a network of the user's own, in many classes
            reason = f"{error}".strip().partition("\n")[0]
            raise UserError(f"torch.onnx cannot export this network; export to .safetensors: {reason}") from error
    assert program is not None
    proto = program.model_proto
    for name, value in _metadata(weights).items():
        proto.metadata_props.append(onnx.StringStringEntryProto(key=name, value=value))
    content: bytes = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest = float(expected.abs().max())
    for count in (3, 1):
        (logits,) = session.run(None, {"images": images[:count].numpy()})
        difference = float((torch.from_numpy(logits) - expected[:count]).abs().max())
        if not difference <= _TOLERANCE * max(1.0, largest):
            raise UserError(
                f"onnxruntime's logits differ from torch's by {difference:.2g}, the largest is {largest:.2g}:"
                " nothing was written; export to .safetensors, or try another onnxruntime"
            )
    return content


_WRITERS = {".pth": _pth, ".safetensors": _safetensors, ".onnx": _onnx}
"""The writer of each format in `run.checks.EXPORT_PACKAGES`."""
