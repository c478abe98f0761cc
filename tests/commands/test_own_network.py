"""A network of one's own in every command; and the name of a function in a run's files imports nothing."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from cifar_dist import UserError, evaluate, load_model, predict, train
from cifar_dist.cli import main
from cifar_dist.config.recipe import Recipe
from tests.commands.test_train import small_world_in
from tests.conftest import make_images

NETS = """
from torch import nn

def net(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(900, num_classes),
    )
"""
TRAIN = [
    "--recipe",
    "original",
    "--dataset",
    "shapes",
    "--set",
    "global_batch_size=16",
    "early_stopping.enabled=false",
    "--precision",
    "no",
]
TYPED = ["--set", "model=nets.py:net"]
MARK = "from pathlib import Path\nPath('ran').write_text('it ran')\ndef net(num_classes): raise SystemExit\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("own")
    with small_world_in(path):
        make_images(path / "images")
        Path("nets.py").write_text(NETS)
        assert main([*TRAIN, *TYPED, "--epochs", "1", "--run-dir", "run"]) == 0
        assert main(["export", "--ckpt", "run", "--out", "own.safetensors", *TYPED]) == 0
        yield path


def test_it_is_named_with_the_hash_of_its_source(folder):
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (config["recipe"]["model"], config["recipe"]["stem"]) == ("nets.py:net", None)
    assert len(config["sources"]["model"]) == 64


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "--ckpt", "run"],
        ["eval", "--ckpt", "own.safetensors", "--dataset", "shapes"],
        ["predict", "--ckpt", "run", "images"],
        ["export", "--ckpt", "run", "--out", "own.pth"],
        ["export", "--ckpt", "run", "--out", "own.onnx"],
        ["--resume", "run", "--epochs", "2"],
        [*TRAIN, "--recipe", "run/config.yaml", "--epochs", "1"],
    ],
    ids=lambda command: " ".join(command[:4]),
)
def test_commands_need_it_typed_again(folder, capsys, command):
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.endswith(" needs the code of its network: add --set model=nets.py:net\n")
    assert said.count("\n") == 1
    assert main([*command, *TYPED]) == 0


def test_a_missing_function_is_found_before_the_plan(folder, capsys):
    assert main([*TRAIN, "--set", "model=nets.py:missing", "--run-dir", "missing"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: nets.py has no function 'missing' (functions: net)\n")
    assert not Path("missing").exists()


def test_its_weights_load_into_the_function_itself(folder):
    main(["export", "--ckpt", "run", "--out", "strict.pth", *TYPED])
    space: dict = {}
    exec(NETS, space)
    space["net"](10).load_state_dict(torch.load("strict.pth", weights_only=True), strict=True)
    assert main(["eval", "--ckpt", "strict.pth", "--dataset", "shapes", *TYPED]) == 0


def test_another_source_is_another_run(folder, capsys):
    Path("other.py").write_text(NETS + "\n# changed\n")
    assert main(["--resume", "run", "--epochs", "9", "--set", "model=other.py:net"]) == 2
    assert "this differs: the source of other.py:net; undo that, or type a new --run-dir" in capsys.readouterr().err
    Path("moved").mkdir()
    Path("moved/nets.py").write_text(NETS)
    assert main(["eval", "--ckpt", "run", "--set", "model=moved/nets.py:net"]) == 0
    assert "has changed" not in capsys.readouterr().out
    assert main(["eval", "--ckpt", "run", "--set", "model=other.py:net"]) == 0
    assert "the source of other.py:net has changed since the training" in capsys.readouterr().out
    assert main(["eval", "--ckpt", "run", "--set", "model=fastnet"]) == 2
    assert "--set names fastnet, and run" in capsys.readouterr().err


@pytest.fixture(params=["evil.py:net", "evil:net"])
def hostile(folder, request):
    """Return a run whose files name a function beside them that leaves a mark when it is imported."""
    Path("evil.py").write_text(MARK)
    run = Path(f"hostile-{len(request.param)}")
    assert main([*TRAIN, "--epochs", "1", "--run-dir", str(run)]) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["recipe"] |= {"model": request.param, "stem": None}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for file in (run / "checkpoints").glob("*.pt"):
        content = torch.load(file, weights_only=True)
        content["recipe"] |= {"model": request.param, "stem": None}
        torch.save(content, file)
    metadata = {"recipe": json.dumps(config["recipe"]), "classes": json.dumps(list("0123456789"))}
    save_file(load_file("own.safetensors"), run / "w.safetensors", metadata=metadata)
    return run


def test_words_of_a_file_run_no_code(folder, hostile, capsys):
    last, config = str(hostile / "checkpoints" / "last.pt"), str(hostile / "config.yaml")
    for command in (
        ["eval", "--ckpt", str(hostile)],
        ["eval", "--ckpt", last, "--recipe", config],
        ["eval", "--ckpt", str(hostile / "w.safetensors"), "--dataset", "shapes"],
        ["predict", "--ckpt", last, "images"],
        ["export", "--ckpt", last, "--out", "x.pth"],
        ["--resume", str(hostile), "--epochs", "2"],
        ["--run-dir", str(hostile), "--resume", "--epochs", "2"],
        ["--recipe", config],
        ["--recipe", config, "--dry-run"],
        ["bench", "--recipe", config],
    ):
        assert main(command) == 2, command
        assert "needs the code of its network" in capsys.readouterr().err, command
    main(["report", str(hostile)])
    for call in (lambda: load_model(last), lambda: evaluate(last), lambda: predict(last, "images")):
        with pytest.raises(UserError, match="needs the code of its network"):
            call()
    with pytest.raises(UserError, match="needs the code of its network"):
        Recipe.load(config)
    with pytest.raises(UserError, match="needs the code of its network"):
        train(run_dir=hostile, resume=True)
    assert not Path("ran").exists()


def test_python_passes_a_function(folder):
    def net(num_classes):
        return nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.Flatten(), nn.Linear(196, num_classes))

    recipe = Recipe.load("original", epochs=1, global_batch_size=16, **{"early_stopping.enabled": False})
    summary = train(recipe, model=net, run_dir="python", precision="no", quiet=True)
    assert evaluate("python", model=net, quiet=True).top1 == summary.test.top1
    assert load_model("python", model=net)[2].out_features == 10
    assert len(predict("python", "images/train", model=net, quiet=True)) > 0
    with pytest.raises(UserError, match="needs the code of its network: add model=test_own_network:"):
        evaluate("python", quiet=True)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (nn.LazyLinear(10), "is lazy: take the layer that is not, with its sizes"),
        (nn.Linear(3072, 10).requires_grad_(False), "has nothing to train"),
        (nn.Sequential(nn.Linear(3072, 10), nn.BatchNorm1d(10, affine=False), nn.Softmax(0)), "mixes the images"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing(folder, last, message):
    with pytest.raises(UserError, match=message):
        train("original", model=lambda num_classes: nn.Sequential(nn.Flatten(), last), run_dir="refused", quiet=True)
    assert not Path("refused").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=mobilenet_v2"], "is no mobilenet_v2: it has no classifier.1.weight"),
        (["epochs=3"], "--set epochs concerns a training: here it takes model, stem, image_size, normalization"),
    ],
)
def test_bare_weights_of_another_network_are_refused(folder, capsys, words, message):
    torch.save(nn.Linear(3, 2).state_dict(), "linear.pth")
    assert main(["eval", "--ckpt", "linear.pth", "--dataset", "shapes", "--set", *words]) == 2
    assert message in capsys.readouterr().err


def test_an_augmentation_of_ones_own_is_typed_again_to_train_and_not_to_evaluate(folder, capsys):
    Path("noise.py").write_text(
        "import torch\n"
        "def noisy(images, seeds):\n"
        "    noise = [torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(int(s))) for s in seeds]\n"
        "    return images.float().div(255).add(torch.stack(noise), alpha=0.1).clamp(0, 1)\n"
    )
    typed = ["--set", "augmentation.custom=noise.py:noisy"]
    assert main([*TRAIN, *typed, "--epochs", "1", "--run-dir", "noisy"]) == 0
    assert main(["eval", "--ckpt", "noisy"]) == 0
    assert main(["--resume", "noisy", "--epochs", "2"]) == 2
    assert "add --set augmentation.custom=noise.py:noisy" in capsys.readouterr().err
    assert main(["--resume", "noisy", "--epochs", "2", *typed]) == 0
    Path("noise.py").write_text("import torch\ndef noisy(images, seeds):\n    return torch.rand(images.shape)\n")
    assert main([*TRAIN, *typed, "--epochs", "1", "--run-dir", "refused"]) == 2
    assert "its result depends on the batch: draw from the seeds alone" in capsys.readouterr().err
    assert not Path("refused").exists()
