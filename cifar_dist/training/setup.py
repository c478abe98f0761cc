"""From a recipe, a plan and a dataset to a trainer that is ready to go."""

from cifar_dist.config.plan import RunPlan
from cifar_dist.config.recipe import Recipe
from cifar_dist.data.augmentation import Augmentation
from cifar_dist.data.batches import Normalizer, TrainingBatches
from cifar_dist.data.dataset import Dataset
from cifar_dist.data.order import GlobalBatchSampler, Shard
from cifar_dist.data.split import stratified_split
from cifar_dist.model.optimizer import build_optimizer
from cifar_dist.model.resnet import build_resnet
from cifar_dist.records import Observer
from cifar_dist.runtime.distributed import Runtime
from cifar_dist.training.early_stopping import EarlyStopping
from cifar_dist.training.engine import Trainer, Validation
from cifar_dist.training.state import TrainState


def build_trainer(recipe: Recipe, plan: RunPlan, dataset: Dataset, runtime: Runtime, observer: Observer) -> Trainer:
    """Build the model, its optimiser and the data path, all on the runtime's device, at the start of a run."""
    model = build_resnet(recipe.stem, dataset.num_classes, seed=recipe.seed)
    model = model.to(runtime.device, memory_format=runtime.memory_format)  # type: ignore[call-overload]
    state = TrainState(
        model=model,
        optimizer=build_optimizer(model, recipe.optimizer),
        early_stopping=EarlyStopping(recipe.early_stopping),
    )
    data = dataset.train.to(runtime.device)
    train, held_out = stratified_split(dataset.train.labels.cpu(), recipe.validation_size, seed=recipe.seed)
    normalize = Normalizer(recipe.normalization, runtime.device, runtime.memory_format)
    sampler = GlobalBatchSampler(
        len(train),
        plan.global_batch_size,
        seed=recipe.seed,
        shard=Shard(index=runtime.world.rank, count=runtime.world.size),
        num_used=plan.images_per_epoch,
    )
    augmentation = Augmentation(recipe.augmentation, seed=recipe.seed)
    validation = Validation(data=data, indices=held_out, class_names=dataset.class_names, normalize=normalize)
    return Trainer(
        recipe=recipe,
        plan=plan,
        runtime=runtime,
        state=state,
        batches=TrainingBatches(data, train, sampler=sampler, augmentation=augmentation, normalize=normalize),
        validation=validation if len(held_out) else None,
        observer=observer,
    )
