"""What can be refused without torch is, before torch is imported: that takes seconds."""

import json
import subprocess
import sys
import zipfile

import pytest

from cifar_dist.run.directory import RunDirectory
from tests.conftest import make_images, make_recipe
from tests.runs import make_metadata

PROBE = """
import contextlib, io, json, sys
from cifar_dist.cli import main

for argv in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(argv)
    print(json.dumps([code, said.getvalue(), sorted({"torch", "torchvision", "accelerate"} & set(sys.modules))]))
"""

REFUSALS = {
    "--recipe orignal": "unknown recipe 'orignal', did you mean 'original'?",
    "--set learning_rat=0.1": "unknown recipe field 'learning_rat'",
    "--epochs 0": "epochs must be 1 or more, not 0",
    "--dataset cifar": "there is no dataset or folder 'cifar', did you mean 'cifar10'?",
    "--dataset image": "there is no dataset or folder 'image', did you mean 'images'?",
    "--dataset ./image": "there is no dataset or folder './image', did you mean 'images'?",
    "--dataset images/tran": "there is no dataset or folder 'images/tran', did you mean 'images/train'?",
    "--recipe misspelt.yaml": "there is no dataset or folder 'shaps', did you mean 'shapes'?",
    "tune --recipe misspelt.yaml": "there is no dataset or folder 'shaps', did you mean 'shapes'?",
    "--recipe misspelt.yaml --seeds 2": "there is no dataset or folder 'shaps', did you mean 'shapes'?",
    "--recipe number.yaml": "dataset must be text, not 3",
    "--set dataset=shapes": "--set dataset=shapes: the dataset has a flag of its own, type --dataset shapes",
    "--dataset done": "no folder in ",
    "--dataset images --set global_batch_size=7 gradient_accumulation_steps=2": "global_batch_size=7 does not divide",
    "--dataset images --set validation_size=26": "validation_size=26 leaves",
    "--dataset images --set image_size=1000000 image_size_schedule=null": "33 images of 1000000 x 1000000 take",
    "--set pretrained=none.pth": "cannot read checkpoint none.pth: No such file or directory",
    "--tracker tensorbord": "unknown tracker 'tensorbord'",
    "--config none.yaml": "cannot read Accelerate config none.yaml",
    "--resume nothere": "there is no run in nothere to resume",
    "--run-dir run": "run holds a run already",
    "--resume run --set seed=5": "a resumed run stays what it was, and this differs: seed 0 -> 5",
    "--resume run": "checkpoint run/checkpoints/last.pt is damaged",
    "--resume done --epochs 1": "epochs=1 is below the 3 that are done in done",
    "eval --ckpt nothere": "there is no checkpoint nothere",
    "eval --ckpt god.pt": "there is no checkpoint god.pt, did you mean 'good.pt'?",
    "eval --ckpt done": "there is no checkpoint in done",
    "eval --ckpt damaged.pt": "checkpoint damaged.pt is damaged",
    "eval --ckpt good.pt --dataset done": "done has no images for test",
    "eval --ckpt good.pt --json no/such/file": "--json no/such/file cannot be written",
    "eval --ckpt good.pt --figures good.pt": "--figures good.pt is a file",
    "predict --ckpt good.pt images --json no/such/file": "--json no/such/file cannot be written",
    "predict --ckpt good.pt nothere.png": "no image to predict: nothere.png does not exist",
    "export --ckpt good.pt --out a.txt": "--out a.txt must end in .pth, .safetensors, .onnx, not in '.txt'",
    "export --ckpt good.pt --out good.pt.pth": "--out good.pt.pth exists already",
    "report nothere": "there is no run in nothere",
    "bench --set lr=1": "unknown recipe field 'lr', did you mean 'optimizer.learning_rate'?",
    "bench --json no/such/file": "--json no/such/file cannot be written",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a damaged run, one that is done, images, and checkpoints that are no checkpoints."""
    folder = tmp_path_factory.mktemp("refusals")
    make_images(folder / "images")
    (folder / "misspelt.yaml").write_text("dataset: shaps\n")
    (folder / "number.yaml").write_text("dataset: 3\n")
    metadata = make_metadata(recipe=make_recipe("validation_size=500", base="standard"))
    for name in ("run", "done"):
        (folder / name / "checkpoints").mkdir(parents=True)
        RunDirectory(folder / name).write_metadata(metadata)
    with zipfile.ZipFile(folder / "good.pt", "w") as archive:
        archive.writestr("archive/data.pkl", "1" * 100)
    content = (folder / "good.pt").read_bytes()
    for name in ("damaged.pt", "run/checkpoints/last.pt"):
        (folder / name).write_bytes(content.replace(b"111", b"121", 1))
    test = {"num_samples": 1, "loss": 1.0, "top1": 0.5, "top5": None, "per_class_accuracy": {}, "confusion_matrix": []}
    summary = {"status": "completed", "epochs": 3, "best_epoch": None, "train_seconds": 1.0, "world_size": 1,
               "device": "cpu", "precision": "no", "num_threads": 1, "peak_memory_mib": None, "test": test}  # fmt: skip
    (folder / "done" / "summary.json").write_text(json.dumps(summary))
    (folder / "good.pt.pth").touch()
    return folder


def test_no_refusal_of_what_was_typed_imports_torch(folder):
    before = sorted(folder.rglob("*"))
    argvs = json.dumps([line.split() for line in REFUSALS])
    command = [sys.executable, "-c", PROBE]
    result = subprocess.run(command, input=argvs, cwd=folder, capture_output=True, text=True, check=False)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == len(REFUSALS), result.stderr
    for (typed, refusal), (code, said, imported) in zip(REFUSALS.items(), answers, strict=True):
        assert (code, said.startswith("error: ") and refusal in said, said.count("\n")) == (2, True, 1), (typed, said)
        assert imported == [], f"{typed} imports {imported}"
    assert sorted(folder.rglob("*")) == before
