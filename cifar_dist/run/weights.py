"""Saved weights: a checkpoint of ours, or the one behind a run's test result, or a bare state dict."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar_dist.config.errors import UserError
from cifar_dist.config.recipe import Recipe, read_recipe, resolve_recipe
from cifar_dist.model.pretrained import find_state_dict, imagenet_weights
from cifar_dist.model.resnet import build_resnet, infer_architecture, load_weights
from cifar_dist.run.checkpoint import averaged_weights, is_bare_weights, load_checkpoint, refusing_foreign_content
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.resolve import resolve_stored_recipe
from cifar_dist.run.run_files import check_stored, find_checkpoint


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SavedWeights:
    """What a file holds, and what it says of how it wants to be used."""

    path: Path
    tensors: dict[str, Tensor]
    recipe: Recipe
    num_classes: int
    class_names: tuple[str, ...] | None
    """None for bare weights, which do not know."""
    about: Mapping[str, Any]
    """The checkpoint's own words on dataset, precision and threads; bare weights are taken to be float32."""
    notes: tuple[str, ...]

    def build(self, device: torch.device, memory_format: torch.memory_format) -> nn.Module:
        """Give the network with these weights, in evaluation mode. Raises UserError where they do not fit it."""
        model = build_resnet(self.recipe.stem, self.num_classes, seed=0)
        load_weights(model, self.tensors)
        return model.to(device, memory_format=memory_format).eval()  # type: ignore[call-overload]

    def check_finite(self, values: Tensor, precision: str) -> None:
        """Raise UserError unless all of `values`, computed from the network's logits, are finite numbers."""
        if not values.isfinite().all():
            advice = "use another checkpoint" if precision == "no" else "try --precision no, or another checkpoint"
            raise UserError(f"{self.path} gives logits that are not finite numbers: {advice}")


def read_weights(path: Path, recipe_name: str | None = None) -> SavedWeights:
    """Read a checkpoint of ours (in a run directory: the one behind its test result) or bare weights.

    `recipe_name` (or a file) says whose normalisation and image size they have; without it a checkpoint knows, and
    bare weights get `original` where they have torchvision's stem, else `standard`. Raises UserError.
    """
    file = _checkpoint_file(path)
    content = load_checkpoint(file)
    with refusing_foreign_content(file):
        return (_bare_weights if is_bare_weights(content) else _own_weights)(file, content, recipe_name)


def _checkpoint_file(path: Path) -> Path:
    last, run = find_checkpoint(path), RunDirectory(path)
    if last == path:
        return path
    summary = run.read_summary()
    selected_best = run.read_config()["recipe"].get("selection") == "best" and run.best.exists()
    return run.best if selected_best and summary is not None and summary.test is not None else last


def _own_weights(path: Path, content: dict[str, Any], recipe_name: str | None) -> SavedWeights:
    check_stored(content, f"checkpoint {path}")
    recipe = resolve_stored_recipe(content, f"checkpoint {path}")
    if recipe_name is not None:
        typed = resolve_recipe(read_recipe(recipe_name))
        if typed.stem != recipe.stem:
            raise UserError(f"--recipe {recipe_name} has the stem {typed.stem}, and {path} has {recipe.stem}")
        # How images look; the split and its seed stay the run's own.
        recipe = replace(
            recipe, normalization=typed.normalization, image_size=typed.image_size, image_size_schedule=None
        )
    names = tuple(content["class_names"])
    return SavedWeights(
        path=path,
        tensors=_state_dict(path, content)[0],
        recipe=recipe,
        num_classes=len(names),
        class_names=names,
        about=content,
        notes=(),
    )


def read_state_dict(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return the weights in a file, and a note of what was renamed, None if nothing was. Raises UserError."""
    content = load_checkpoint(path)
    with refusing_foreign_content(path):
        return _state_dict(path, content)


def pretrained_weights(recipe: Recipe, note: Callable[[str], None] = lambda text: None) -> dict[str, Tensor] | None:
    """Read the weights that a recipe starts from; None where it starts from nothing.

    `note` is called with one line on a download, or on keys that were renamed. Raises UserError.
    """
    if recipe.pretrained is None:
        return None
    if recipe.pretrained == "imagenet":
        return imagenet_weights(note)
    weights, renamed = read_state_dict(Path(recipe.pretrained))
    if renamed is not None:
        note(renamed)
    return weights


def _state_dict(path: Path, content: dict[str, Any]) -> tuple[dict[str, Tensor], str | None]:
    tensors, renamed = find_state_dict(path, content) if is_bare_weights(content) else (averaged_weights(content), None)
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"{path} holds numbers that are not finite ({bad[0]}): its training diverged, use another")
    return tensors, renamed


def _bare_weights(path: Path, content: dict[str, Any], recipe_name: str | None) -> SavedWeights:
    """Infer from the tensors what they can tell, and take the rest from the recipe, typed or likely."""
    tensors, renamed = _state_dict(path, content)
    stem, num_classes = infer_architecture(tensors)
    name = recipe_name or ("original" if stem == "imagenet" else "standard")
    recipe = resolve_recipe(read_recipe(name), {} if recipe_name else {"stem": stem})
    if (recipe.stem == "imagenet") != (stem == "imagenet"):
        raise UserError(f"--recipe {name} has the stem {recipe.stem}, and {path} has {stem}")
    mean, std = list(recipe.normalization.mean), list(recipe.normalization.std)
    note = f"bare weights: stem {recipe.stem}, {num_classes} classes; normalisation of {name} (mean {mean}, std {std})"
    return SavedWeights(
        path=path,
        tensors=tensors,
        recipe=recipe,
        num_classes=num_classes,
        class_names=None,
        about={"precision": "no"},
        notes=(note,) if renamed is None else (renamed, note),
    )
