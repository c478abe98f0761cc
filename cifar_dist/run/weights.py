"""Weights for `eval`, `predict`, `export` and fine-tuning: a run's checkpoint, or a bare state dict."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet

from cifar_dist.config.errors import UserError
from cifar_dist.config.own_code import is_own_code, own_sources, refuse_untyped_code
from cifar_dist.config.recipe import Recipe, describe_network, read_recipe, recipe_to_mapping, resolve_recipe
from cifar_dist.config.schema import flatten
from cifar_dist.model.networks import build_network, find_head
from cifar_dist.model.pretrained import find_state_dict, imagenet_weights, infer_stem, load_weights
from cifar_dist.run.checkpoint import is_bare_weights, load_checkpoint, refusing_foreign_content
from cifar_dist.run.directory import RunDirectory, find_checkpoint
from cifar_dist.run.results import DatasetMetadata, RunMetadata, stored_threads

_MANY_CLASSES = 1000


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SavedWeights:
    """The weights in a file, and how to use them."""

    path: Path
    tensors: dict[str, Tensor]
    recipe: Recipe
    num_classes: int
    class_names: tuple[str, ...] | None
    """None for bare weights."""
    metadata: RunMetadata | None
    """None unless the file is a checkpoint of a run."""
    notes: tuple[str, ...] = ()

    @property
    def trained_on(self) -> DatasetMetadata | None:
        """The dataset of the run; None unless the file is a checkpoint of one."""
        return None if self.metadata is None else self.metadata.dataset

    def build(self, device: torch.device, memory_format: torch.memory_format) -> nn.Module:
        """Build the network with these weights, in evaluation mode. Raises UserError if they do not fit it."""
        model = build_network(self.recipe, self.num_classes)
        load_weights(model, self.tensors)
        return model.to(device, memory_format=memory_format).eval()  # type: ignore[call-overload]

    def compute_settings(self, requested_precision: str | None, world_size: int) -> dict[str, Any]:
        """Return `requested_precision` and `num_threads`: the command line's, else the run's, else float32."""
        stored = "no" if self.metadata is None else self.metadata.precision
        return {
            "requested_precision": requested_precision or stored,
            "num_threads": stored_threads(self.metadata, world_size),
        }

    def check_finite(self, values: Tensor, precision: str) -> None:
        """Raise UserError unless all of `values`, computed from the network's logits, are finite numbers."""
        if not values.isfinite().all():
            advice = "use another checkpoint" if precision == "no" else "try --precision no, or another checkpoint"
            raise UserError(f"{self.path} gives logits that are not finite numbers: {advice}")


def read_weights(
    path: Path, recipe_name: str | None = None, assignments: Mapping[str, Any] | None = None
) -> SavedWeights:
    """Read a run directory's tested checkpoint, another checkpoint, or bare weights.

    Normalization and image size are those of the recipe `recipe_name` (or a file), else of the run, else for bare
    weights of `original` with torchvision's stem, or of `standard`. `assignments` (nested) override fields of that.
    Raises UserError, also for a checkpoint of a function's network unless `assignments` name the function.
    """
    file = _tested_checkpoint(path)
    content = load_checkpoint(file)
    with refusing_foreign_content(file):
        return (_bare_weights if is_bare_weights(content) else _run_weights)(
            file, content, recipe_name, assignments or {}
        )


def pretrained_weights(recipe: Recipe, note: Callable[[str], None] = lambda text: None) -> dict[str, Tensor] | None:
    """Read the weights that a recipe starts from; None if it starts from random ones.

    `note` is called with one line on a download or on renamed keys. Raises UserError.
    """
    if recipe.pretrained is None:
        return None
    if recipe.pretrained == "imagenet":
        return imagenet_weights(recipe.model, note=note)
    path = Path(recipe.pretrained)
    content = load_checkpoint(path)
    with refusing_foreign_content(path):
        weights, renamed = _state_dict(path, content, _skeleton(recipe))
    if renamed is not None:
        note(renamed)
    return weights


def _tested_checkpoint(path: Path) -> Path:
    last, run = find_checkpoint(path), RunDirectory(path)
    if last == path:
        return path
    summary = run.read_summary()
    selected_best = run.read_config()["recipe"].get("selection") == "best" and run.best.exists()
    return run.best if selected_best and summary is not None and summary.is_complete else last


def _run_weights(
    path: Path, content: dict[str, Any], recipe_name: str | None, assignments: Mapping[str, Any]
) -> SavedWeights:
    where = f"checkpoint {path}"
    if "dataset" in content:
        metadata = RunMetadata.from_mapping(content, where)
        recipe, class_names = metadata.recipe, metadata.class_names
    else:  # of `export`
        metadata, recipe, class_names = None, resolve_recipe(content["recipe"]), tuple(content["class_names"])
    refuse_untyped_code({"model": recipe.model}, flatten(assignments), where)
    other = recipe
    if recipe_name is not None:
        other = resolve_recipe(read_recipe(recipe_name, flatten(assignments)), {"model": recipe.model}, assignments)
    elif assignments:
        other = resolve_recipe(recipe_to_mapping(recipe), {"image_size_schedule": None}, assignments)
    is_same = other.model == recipe.model or (is_own_code(other.model) and is_own_code(recipe.model))
    if not is_same or other.stem != recipe.stem:
        told = f"--recipe {recipe_name} has" if recipe_name else "--set names"
        raise UserError(
            f"{told} {describe_network(other)}, and {path} has {describe_network(recipe)}: name none, or other weights"
        )
    schedule = recipe.image_size_schedule if other.image_size == recipe.image_size else None
    images = {"normalization": other.normalization, "image_size": other.image_size, "image_size_schedule": schedule}
    notes = []
    source = None if metadata is None else metadata.sources.get("model")
    if source is not None and source != own_sources({"model": other.model})["model"]:
        notes.append(f"the source of {other.model} has changed since the training")
    if "early_stopping" in content and not content["early_stopping"]["stopped"] and content["epoch"] < recipe.epochs:
        notes.append(
            f"{path} is of a run that is not at its end: {content['epoch']} of {recipe.epochs} epochs are done"
        )
    return SavedWeights(
        path=path,
        tensors=_state_dict(path, content)[0],
        recipe=replace(recipe, model=other.model, **images),  # type: ignore[arg-type]  # the split stays the run's own
        num_classes=len(class_names),
        class_names=class_names,
        metadata=metadata,
        notes=tuple(notes),
    )


def _bare_weights(
    path: Path, content: dict[str, Any], recipe_name: str | None, assignments: Mapping[str, Any]
) -> SavedWeights:
    """Infer a ResNet's stem, and the number of classes, from the tensors. The recipe has the rest."""
    name = recipe_name or "original"
    recipe = resolve_recipe(read_recipe(name, flatten(assignments)), assignments)
    skeleton = _skeleton(recipe)
    tensors, renamed = _state_dict(path, content, skeleton)
    if isinstance(skeleton, ResNet) and "stem" not in assignments:
        stem = infer_stem(tensors)
        if recipe_name is None:
            name = "original" if stem == "imagenet" else "standard"
            recipe = resolve_recipe(read_recipe(name), {"stem": stem}, assignments)
        elif (recipe.stem == "imagenet") != (stem == "imagenet"):
            raise UserError(f"--recipe {name} has the stem {recipe.stem}, and {path} has {stem}")
    head = find_head(skeleton, _MANY_CLASSES)
    if head is None:
        raise UserError(f"{recipe.model} ends in no layer whose size is the number of classes: name a run's checkpoint")
    if f"{head[0]}.weight" not in tensors:
        raise UserError(f"{path} is no {recipe.model}: it has no {head[0]}.weight; name its own model with --set")
    num_classes = len(tensors[f"{head[0]}.weight"])
    mean, std = list(recipe.normalization.mean), list(recipe.normalization.std)
    what = f"{describe_network(recipe)}, {num_classes} classes"
    source = "as typed" if "normalization" in assignments else f"of {name}"
    note = f"bare weights: {what}; normalization {source} (mean {mean}, std {std})"
    return SavedWeights(
        path=path,
        tensors=tensors,
        recipe=recipe,
        num_classes=num_classes,
        class_names=None,
        metadata=None,
        notes=(note,) if renamed is None else (renamed, note),
    )


def _skeleton(recipe: Recipe) -> nn.Module:
    """Build the recipe's network for 1,000 classes, for its names."""
    return build_network(recipe, _MANY_CLASSES)


def _state_dict(
    path: Path, content: dict[str, Any], skeleton: nn.Module | None = None
) -> tuple[dict[str, Tensor], str | None]:
    """Return the weights to evaluate (the average, if there is one), and a note on renamed keys of bare ones."""
    if skeleton is not None and is_bare_weights(content):
        tensors, renamed = find_state_dict(path, content, list(skeleton.state_dict()))
    else:
        tensors, renamed = content.get("model_ema", content["model"]), None
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"{path} holds numbers that are not finite ({bad[0]}): its training diverged, use another")
    return tensors, renamed
