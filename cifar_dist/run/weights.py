"""Weights for `eval`, `predict`, `export` and fine-tuning: a run's checkpoint, or a bare state dict."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar_dist.config.errors import UserError
from cifar_dist.config.recipe import Recipe, read_recipe, resolve_recipe
from cifar_dist.model.networks import build_resnet, find_state_dict, imagenet_weights, infer_architecture, load_weights
from cifar_dist.run.checkpoint import is_bare_weights, load_checkpoint, refusing_foreign_content
from cifar_dist.run.directory import RunDirectory, find_checkpoint
from cifar_dist.run.results import DatasetMetadata, RunMetadata, stored_threads


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
        model = build_resnet(self.recipe.stem, self.num_classes, seed=0)
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


def read_weights(path: Path, recipe_name: str | None = None) -> SavedWeights:
    """Read a run directory's tested checkpoint, another checkpoint, or bare weights.

    Normalization and image size are those of the recipe `recipe_name` (or a file), else of the run, else for bare
    weights of `original` with torchvision's stem, or of `standard`. Raises UserError.
    """
    file = _tested_checkpoint(path)
    content = load_checkpoint(file)
    with refusing_foreign_content(file):
        return (_bare_weights if is_bare_weights(content) else _run_weights)(file, content, recipe_name)


def pretrained_weights(recipe: Recipe, note: Callable[[str], None] = lambda text: None) -> dict[str, Tensor] | None:
    """Read the weights that a recipe starts from; None if it starts from random ones.

    `note` is called with one line on a download or on renamed keys. Raises UserError.
    """
    if recipe.pretrained is None:
        return None
    if recipe.pretrained == "imagenet":
        return imagenet_weights(note)
    path = Path(recipe.pretrained)
    content = load_checkpoint(path)
    with refusing_foreign_content(path):
        weights, renamed = _state_dict(path, content)
    if renamed is not None:
        note(renamed)
    return weights


def _tested_checkpoint(path: Path) -> Path:
    last, run = find_checkpoint(path), RunDirectory(path)
    if last == path:
        return path
    summary = run.read_summary()
    selected_best = run.read_config()["recipe"].get("selection") == "best" and run.best.exists()
    return run.best if selected_best and summary is not None and summary.test is not None else last


def _run_weights(path: Path, content: dict[str, Any], recipe_name: str | None) -> SavedWeights:
    where = f"checkpoint {path}"
    if "dataset" in content:
        metadata = RunMetadata.from_mapping(content, where)
        recipe, class_names = metadata.recipe, metadata.class_names
    else:  # of `export`
        metadata, recipe, class_names = None, resolve_recipe(content["recipe"]), tuple(content["class_names"])
    if recipe_name is not None:
        other = resolve_recipe(read_recipe(recipe_name))
        if other.stem != recipe.stem:
            raise UserError(f"--recipe {recipe_name} has the stem {other.stem}, and {path} has {recipe.stem}")
        images = {"normalization": other.normalization, "image_size": other.image_size, "image_size_schedule": None}
        recipe = replace(recipe, **images)  # type: ignore[arg-type]  # the split and its seed stay the run's own
    return SavedWeights(
        path=path,
        tensors=_state_dict(path, content)[0],
        recipe=recipe,
        num_classes=len(class_names),
        class_names=class_names,
        metadata=metadata,
    )


def _bare_weights(path: Path, content: dict[str, Any], recipe_name: str | None) -> SavedWeights:
    """Infer the stem and the number of classes from the tensors. The recipe has the rest."""
    tensors, renamed = _state_dict(path, content)
    stem, num_classes = infer_architecture(tensors)
    name = recipe_name or ("original" if stem == "imagenet" else "standard")
    recipe = resolve_recipe(read_recipe(name), {} if recipe_name else {"stem": stem})
    if (recipe.stem == "imagenet") != (stem == "imagenet"):
        raise UserError(f"--recipe {name} has the stem {recipe.stem}, and {path} has {stem}")
    mean, std = list(recipe.normalization.mean), list(recipe.normalization.std)
    note = f"bare weights: stem {recipe.stem}, {num_classes} classes; normalization of {name} (mean {mean}, std {std})"
    return SavedWeights(
        path=path,
        tensors=tensors,
        recipe=recipe,
        num_classes=num_classes,
        class_names=None,
        metadata=None,
        notes=(note,) if renamed is None else (renamed, note),
    )


def _state_dict(path: Path, content: dict[str, Any]) -> tuple[dict[str, Tensor], str | None]:
    """Return the weights to evaluate (the average, if there is one), and a note on renamed keys."""
    if is_bare_weights(content):
        tensors, renamed = find_state_dict(path, content)
    else:
        tensors, renamed = content.get("model_ema", content["model"]), None
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"{path} holds numbers that are not finite ({bad[0]}): its training diverged, use another")
    return tensors, renamed
