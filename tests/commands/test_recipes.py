"""Every recipe of the package trains an epoch as a user would start it.

`original` and `standard` are left to the README's commands. The images are small and, but for `quick`, the stem is the
stock one, for time. `finetune` without weights is among the bad input.
"""

import json
import subprocess
import sys

import pytest

from cifar_dist.config.loading import recipe_names
from tests.conftest import ROOT

pytestmark = pytest.mark.full


@pytest.mark.parametrize("recipe", sorted(set(recipe_names()) - {"original", "standard", "finetune"}))
def test_a_recipe_runs(recipe, tmp_path):
    command = [sys.executable, str(ROOT / "launch.py"), "--recipe", recipe, "--dataset", "shapes", "--epochs", "1"]
    own = ["image_size_schedule=[[8, 0.5], [16, 1.0]]"] if recipe == "quick" else ["stem=imagenet"]
    command += ["--set", "image_size=16", *own]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((tmp_path / "runs" / f"{recipe}-shapes-seed0" / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["test"]["num_samples"] == 1000
