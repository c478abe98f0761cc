"""CUDA graph steps, with a stand-in for a graph on a CPU: the same memory, Python values frozen."""

import copy
import gc
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar_dist.config.plan import make_plan
from cifar_dist.model.optimizer import learning_rate
from cifar_dist.run.results import Observer
from cifar_dist.training import setup, step
from cifar_dist.training.setup import build_trainer
from cifar_dist.training.trainer import DivergedError
from tests.conftest import make_dataset, make_recipe
from tests.unit.test_model import build_narrow

FORBIDDEN = ("aten._local_scalar_dense.default", "aten.lift_fresh.default", "aten.nonzero.default")
"""Operations that make the host wait for a device, or copy a number to it. Neither can be captured."""


class Operations(TorchDispatchMode):
    """Keeps the operations that are done in its context, with the tensors that they read and write."""

    def __init__(self):
        super().__init__()
        self.done, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert str(function) not in FORBIDDEN, f"{function} cannot be recorded"
        kwargs = kwargs or {}
        for each in self._written(function, args, kwargs):
            if memory(each) not in self.made:  # it was there before
                self.before.setdefault(memory(each), (each, each.detach().clone()))
        results = function(*args, **kwargs)
        self.done.append((function, args, kwargs, tensors(results)))
        self.made |= {memory(each) for each in tensors(results)} - {memory(each) for each in tensors((args, kwargs))}
        return results

    def _written(self, function, args, kwargs):
        if "batch_norm" in str(function):  # its schema does not say that it changes the running statistics
            return tensors(args[3:5])
        values = dict(zip([each.name for each in function._schema.arguments], args, strict=False)) | kwargs
        written = [each.name for each in function._schema.arguments if each.alias_info and each.alias_info.is_write]
        return tensors([values.get(name) for name in written])


def tensors(values):
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


class Recorder:
    """Stands for `capture`."""

    def __init__(self):
        self.recorded, self.replayed = 0, 0

    def __call__(self, work, *, pool):
        self.recorded += 1
        with Operations() as operations:
            work()
        with torch.no_grad():
            for tensor, values in operations.before.values():
                tensor.copy_(values)

        @torch.no_grad()
        def replay():
            self.replayed += 1
            for function, args, kwargs, results in operations.done:
                for old, new in zip(results, tensors(function(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr() or old.shape != new.shape:
                        old.copy_(new)

        return replay


def trained(runtime, monkeypatch, recipe, *assignments, record=None, spoil=None, stop_after=0):
    """Train 84 images; with `stop_after`, by a trainer that is left after so many steps and another that goes on."""
    monkeypatch.setattr(runtime, "compute", replace(runtime.compute, replays=record is not None))
    monkeypatch.setattr(step, "capture", record)
    monkeypatch.setattr(setup, "build_network", build_narrow)
    # Of few digits, so that nothing is rounded where it becomes a float32 on the device: what is equal has equal bits.
    monkeypatch.setattr(step, "learning_rate", lambda *now: float(torch.tensor(learning_rate(*now)).bfloat16()))
    settings = ("global_batch_size=8", "early_stopping.enabled=false", "validation_size=0", *assignments)
    recipe, dataset = make_recipe(*settings, base=recipe), make_dataset(num_train=84)
    plan = make_plan(recipe, world_size=1, sizes=dataset.sizes, device_type="cpu")

    def build():
        return build_trainer(recipe, replace(plan, agree_every_steps=4), dataset, runtime, Observer())

    trainer = build()
    if stop_after:
        assert len(list(islice(trainer.steps(1), stop_after))) == stop_after
        saved, sums = copy.deepcopy(trainer.state.to_mapping()), trainer.state.sums.read()[:3]
        trainer = build()
        trainer.state.restore(saved)
        trainer.state.sums.set(*sums)
    if spoil is not None:
        spoil(trainer)
    records = trainer.fit()
    weights = torch.cat([each.detach().flatten() for each in trainer.state.evaluated_model.parameters()])
    statistics = [each.running_var for each in trainer.state.model.modules() if hasattr(each, "running_var")]
    return records, weights, torch.cat(statistics), trainer


COLOURS = ("augmentation.mixup=0.4", "dropout=0.3")
DECAY = "optimizer.weight_decay=0.03125"
CASES = {  # recipe, what else is set, and how many kinds of steps there are
    "sgd": ("original", ("epochs=2",), 1),
    "muon": ("standard", ("epochs=1", "image_size_schedule=[[16, 0.5], [32, 1.0]]", DECAY), 2),
    "averaged": ("original", ("epochs=2", "ema_decay=0.8"), 1),
    "adamw": (
        "original",
        ("epochs=2", "optimizer.name=adamw", "optimizer.momentum=0.9", "optimizer.nesterov=false", *COLOURS),
        1,
    ),
    "groups": ("original", ("epochs=2", "batch_norm_group_size=4", "gradient_clipping=0.5"), 1),
    "frozen": ("finetune", ("epochs=2", "freeze_epochs=1", "image_size=32"), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_train_what_steps_do(runtime, monkeypatch, case):
    recipe, settings, kinds = CASES[case]
    settings = ("stem=imagenet", "optimizer.learning_rate=0.01", *settings)
    expected, weights, statistics, _ = trained(runtime, monkeypatch, recipe, *settings)
    record = Recorder()
    records, own_weights, own_statistics, trainer = trained(runtime, monkeypatch, recipe, *settings, record=record)
    assert record.recorded == kinds
    assert record.replayed == 10 * trainer.plan.epochs - 3 * kinds, "not the first three, nor an epoch's short last one"
    for one, other in zip(records, expected, strict=True):
        assert (one.train_loss, one.train_acc) == (other.train_loss, other.train_acc)
    assert torch.equal(own_weights, weights)
    assert torch.equal(own_statistics, statistics)
    assert all(type(group["lr"]) is float for group in trainer.step.optimizer.param_groups), (
        "a checkpoint holds numbers"
    )


@pytest.mark.parametrize("case", ["muon", "adamw"])
def test_a_replayed_run_goes_on_in_another_process(runtime, monkeypatch, case):
    recipe, settings, _ = CASES[case]
    settings = ("stem=imagenet", "optimizer.learning_rate=0.01", *settings)
    expected, weights, *_ = trained(runtime, monkeypatch, recipe, *settings)
    record = Recorder()
    records, own_weights, *_ = trained(runtime, monkeypatch, recipe, *settings, record=record, stop_after=5)
    assert record.recorded == 2, "before and after"
    assert torch.equal(own_weights, weights)
    assert [one.train_loss for one in records] == [one.train_loss for one in expected]


def test_a_loss_that_is_not_finite_is_found_in_its_replayed_step(runtime, monkeypatch):
    def spoil(trainer):
        normalize, seen = trainer.batches.normalize, []

        def spoiled(pixels):
            seen.append(pixels)
            return normalize(pixels) * (float("nan") if len(seen) == 6 else 1)

        monkeypatch.setattr(trainer.batches, "normalize", spoiled)

    with pytest.raises(DivergedError, match="epoch 1, step 6,"):
        trained(runtime, monkeypatch, "original", "epochs=1", record=Recorder(), spoil=spoil)


def test_after_a_failed_capture_the_training_goes_on_eagerly_with_one_line(runtime, monkeypatch):
    told, tries = [], []
    monkeypatch.setattr(Observer, "on_note", lambda _, text: told.append(text))

    def stop(*_):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    def fail(work, *, pool):
        """Fail between the backward pass and the step, of which the device has done nothing, and in the end again."""
        tries.append(pool)
        operations = Operations()
        with monkeypatch.context() as broken:
            broken.setattr(torch.optim.SGD, "step", stop)
            try:
                with operations:
                    work()
            except RuntimeError:
                with torch.no_grad():
                    for tensor, values in operations.before.values():
                        tensor.copy_(values)
                raise RuntimeError("invalid capture")  # noqa: B904

    settings = ("epochs=1", "image_size_schedule=[[16, 0.5], [32, 1.0]]", "optimizer.learning_rate=0.01")
    expected, weights, statistics, _ = trained(runtime, monkeypatch, "original", *settings)
    records, own_weights, own_statistics, trainer = trained(runtime, monkeypatch, "original", *settings, record=fail)
    assert torch.equal(own_weights, weights) and torch.equal(own_statistics, statistics)
    assert records[0].train_loss == expected[0].train_loss
    assert all(type(group["lr"]) is float for group in trainer.step.optimizer.param_groups)
    assert len(tries) == 1, "steps of another size, too"
    (line,) = told
    assert "\n" not in line and "could not be captured (operation not permitted)" in line


class BrokenCapture:
    """Stands for torch.cuda: the end of a capture fails, and neither stream nor memory pool are given back."""

    def __init__(self, monkeypatch):
        self.calls = []
        for name in ("current_stream", "set_stream", "current_device"):
            monkeypatch.setattr(torch.cuda, name, lambda *values, name=name: self.calls.append((name, *values)) or name)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda *values, name=name: self.calls.append((name, *values)), False)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: self)

    def reset(self):
        self.calls.append(("reset",))

    def __enter__(self):
        pass

    def __exit__(self, *error):
        raise RuntimeError("invalid capture")


def test_a_failed_capture_gives_back_stream_and_memory(monkeypatch):
    torch_cuda = BrokenCapture(monkeypatch)
    with pytest.raises(RuntimeError, match="invalid capture"):
        step.capture(lambda: None, pool=(0, 1))
    assert gc.isenabled()
    assert [call for call in torch_cuda.calls if call[0] != "current_device"] == [
        ("current_stream",),
        ("set_stream", "current_stream"),
        ("reset",),
        ("_cuda_endAllocateToPool", "current_device", (0, 1)),
        ("_cuda_releasePool", "current_device", (0, 1)),
    ]


def test_steps_of_several_micro_batches_are_not_replayed(runtime, monkeypatch):
    record = Recorder()
    trained(runtime, monkeypatch, "original", "epochs=1", "gradient_accumulation_steps=2", record=record)
    assert record.recorded == 0


def test_each_training_has_a_memory_pool_of_its_own(runtime, monkeypatch):
    """CUDA refuses a pool whose last graph is gone."""
    pools = iter([(0, 1), (0, 2)])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    used = []
    for _ in range(2):
        record = Recorder()
        trained(
            runtime, monkeypatch, "original", "epochs=1",
            record=lambda work, *, pool: used.append(pool) or record(work, pool=pool),  # noqa: B023
        )  # fmt: skip
    assert used == [(0, 1), (0, 2)]
