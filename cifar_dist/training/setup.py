"""Build a trainer from a recipe, a plan and a dataset."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from cifar_dist.config.errors import UserError
from cifar_dist.config.own_code import load_function
from cifar_dist.config.plan import RunPlan
from cifar_dist.config.recipe import Recipe
from cifar_dist.data.augmentation import Augmentation, check_custom
from cifar_dist.data.dataset import Dataset, stratified_split, stratified_subset
from cifar_dist.data.loader import Normalizer, TrainingBatches
from cifar_dist.data.sampler import GlobalBatchSampler
from cifar_dist.model.fastnet import FastNet, whiten
from cifar_dist.model.layers import Groups, share_statistics, use_groups
from cifar_dist.model.networks import build_network, find_head, parts_to_freeze, use_dense_products
from cifar_dist.model.optimizer import ExponentialMovingAverage, build_optimizer
from cifar_dist.model.pretrained import start_from
from cifar_dist.model.probe import NetworkTraits, probe_network
from cifar_dist.model.stochastic import Draws, drop_inputs, track_randomness
from cifar_dist.run.results import Observer
from cifar_dist.runtime.distributed import Runtime
from cifar_dist.runtime.signals import Interrupt
from cifar_dist.training.evaluation import EvaluationSet, RunningSums
from cifar_dist.training.state import EarlyStopping, TrainState
from cifar_dist.training.step import CudaGraphStep, TrainingStep
from cifar_dist.training.trainer import Recorder, Trainer


def build_trainer(
    recipe: Recipe,
    plan: RunPlan,
    dataset: Dataset,
    runtime: Runtime,
    observer: Observer,
    *,
    interrupt: Interrupt | None = None,
    recorder: Recorder | None = None,
    pretrained: dict[str, Tensor] | None = None,
) -> Trainer:
    """Build the model, its optimizer and the data path on the runtime's device.

    `pretrained` is a state dict. Raises UserError if it does not fit.
    """
    torch.manual_seed(recipe.seed)  # for a user's own model; nothing here draws from it
    model = build_network(recipe, dataset.num_classes)
    traits = probe(model, recipe, plan, dataset.num_classes)
    use_dense_products(model)
    head = find_head(model, dataset.num_classes)
    if pretrained is not None:
        start_from(model, pretrained, None if head is None else head[0])
    elif isinstance(model, FastNet):
        _whiten(model, recipe, dataset)
    model = model.to(runtime.device, memory_format=runtime.memory_format)  # type: ignore[call-overload]
    # The average is only evaluated, so it keeps torch's own BatchNorm.
    ema = ExponentialMovingAverage(model, recipe.ema_decay) if recipe.ema_decay else None
    if recipe.batch_norm_group_size is None:
        model, groups = share_statistics(model, num_ranks=plan.world_size), None
    else:
        groups = Groups(count=plan.batch_norm_groups, num_ranks=plan.world_size)
        model = use_groups(model, groups)
    state = TrainState(
        model=model,
        optimizer=build_optimizer(model, recipe.optimizer, head, precision=runtime.compute.precision),
        early_stopping=EarlyStopping(recipe.early_stopping),
        ema=ema,
        groups=groups,
        sums=RunningSums(runtime.device),
    )
    replays = runtime.compute.replays and plan.gradient_accumulation_steps == 1
    step = TrainingStep(
        recipe=recipe,
        plan=plan,
        runtime=runtime,
        state=state,
        frozen=_freezing(model, recipe, dataset.num_classes),
        draws=_track_randomness(model, traits.batch_dims, head, recipe, runtime.device),
        has_unused_parameters=traits.has_unused_parameters,
        cuda_graph=CudaGraphStep(state.optimizer, observer.on_note) if replays else None,
    )
    batches, validation = _data_path(recipe, plan, dataset, runtime)
    return Trainer(
        recipe=recipe,
        plan=plan,
        runtime=runtime,
        step=step,
        batches=batches,
        validation=validation,
        observer=observer,
        interrupt=interrupt or Interrupt(),
        recorder=recorder or Recorder(),
    )


def _freezing(model: nn.Module, recipe: Recipe, num_classes: int) -> Callable[[int], tuple[nn.Parameter, ...]]:
    """Return the function that freezes parts of the model for an epoch, and returns the frozen parameters."""
    first = parts_to_freeze(model, recipe, num_classes) if recipe.freeze_epochs else ()

    def freeze(epoch: int) -> tuple[nn.Parameter, ...]:
        if isinstance(model, FastNet) and recipe.whitening_bias_epochs is not None:
            model.whitening_is_frozen = epoch > recipe.whitening_bias_epochs
            if model.whitening_is_frozen:
                return (*model.whitening.parameters(),)
        return first if epoch <= recipe.freeze_epochs else ()

    return freeze


def probe(model: nn.Module, recipe: Recipe, plan: RunPlan, num_classes: int) -> NetworkTraits:
    """Run the recipe's network once on random images. Raises UserError if it cannot be trained with the guarantees."""
    return probe_network(
        model,
        num_classes=num_classes,
        sides=[side for side, _ in plan.image_sizes],
        allow_untracked_randomness=recipe.allow_untracked_randomness,
        name=recipe.model,
    )


def _track_randomness(
    model: nn.Module,
    batch_dims: Mapping[str, int | None],
    head: tuple[str, nn.Module] | None,
    recipe: Recipe,
    device: torch.device,
) -> Draws | None:
    """Make the network's masks, and the recipe's before the head, functions of the sample; None without any."""
    if not batch_dims and not recipe.dropout:
        return None
    draws = Draws(device)
    track_randomness(model, draws, batch_dims)
    if recipe.dropout:
        if head is None:
            raise UserError(f"dropout needs a last layer, and {recipe.model} has none with an output for each class")
        drop_inputs(head[1], recipe.dropout, draws)
    return draws


def _whiten(model: FastNet, recipe: Recipe, dataset: Dataset) -> None:
    """Set the first layer from 5,000 training images."""
    normalize = Normalizer(recipe.normalization, torch.device("cpu"), torch.contiguous_format)
    whiten(model, normalize(dataset.train.images[:5000].float() / 255))


def _data_path(
    recipe: Recipe, plan: RunPlan, dataset: Dataset, runtime: Runtime
) -> tuple[TrainingBatches, EvaluationSet | None]:
    data = dataset.train.to(runtime.device)
    own = dataset.validation
    train, held_out = stratified_split(
        dataset.train.labels, plan.num_validation if own is None else 0, seed=recipe.seed
    )
    if plan.num_left_out:
        train = stratified_subset(dataset.train, train, plan.num_train)
    sampler = GlobalBatchSampler(
        len(train),
        plan.global_batch_size,
        seed=recipe.seed,
        rank=runtime.world.rank,
        num_replicas=runtime.world.size,
        num_used=plan.images_per_epoch,
        accumulation_steps=plan.gradient_accumulation_steps,
    )
    size, mean = data.images.shape[-1], recipe.normalization.mean
    custom = None
    if (name := recipe.augmentation.custom) is not None:
        custom = load_function(name)
        check_custom(custom, name, image_size=size, device=runtime.device)
    batches = TrainingBatches(
        data,
        train,
        sampler=sampler,
        augmentation=Augmentation(recipe.augmentation, seed=recipe.seed, image_size=size, fill=mean, custom=custom),
        normalize=Normalizer(recipe.normalization, runtime.device, runtime.memory_format),
        image_size=lambda epoch, step: plan.image_size_at((epoch - 1) * plan.steps_per_epoch + step - 1),
    )
    images, indices = (data, held_out) if own is None else (own.to(runtime.device), torch.arange(len(own)))
    validation = EvaluationSet(
        data=images, indices=indices, class_names=dataset.class_names, recipe=recipe, runtime=runtime
    )
    return batches, validation if len(indices) else None
