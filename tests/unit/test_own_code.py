"""Functions of the user's own: how they are found, hashed and refused."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from cifar_dist.config import own_code
from cifar_dist.config.errors import UserError
from cifar_dist.config.own_code import load_function, register, source_hash
from cifar_dist.model.networks import build_network
from tests.conftest import make_recipe

NETWORK = """
from torch import nn
from parts import width

def net(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, width), nn.Linear(width, num_classes))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", str(Path.cwd()))])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["here/nets.py:net", "there.nets:net"])
def test_a_network_is_found_in_a_file_or_a_module(folder, name):
    for package in ("here", "there"):
        Path(package).mkdir()
        Path(package, "nets.py").write_text(
            NETWORK.replace("from parts", "from there.parts" if package == "there" else "from parts")
        )
        Path(package, "parts.py").write_text("width = 5\n")
    recipe = make_recipe(f"model={name}")
    assert recipe.stem is None
    first, again = (build_network(recipe, 4) for _ in range(2))
    assert first[1].out_features == 5 and first[2].out_features == 4
    assert torch.equal(first[1].weight, again[1].weight), "drawn from the recipe's seed"


def test_the_hash_is_that_of_the_source(folder):
    file = Path("nets.py")
    file.write_text("def net(num_classes):\n    return 1\n")
    first = source_hash("nets.py:net")
    assert load_function("nets.py:net")(3) == 1
    file.write_text("def net(num_classes):\n    return 2\n")
    assert source_hash("nets.py:net") != first
    assert load_function("nets.py:net")(3) == 2, "a changed file is imported anew"

    def one(num_classes):
        return nn.Linear(1, num_classes)

    def two(num_classes):
        return nn.Linear(2, num_classes)

    assert load_function(register(one)) is one
    assert source_hash(register(one)) != source_hash(register(two))


def sized(num_classes, width, activation=None):
    return nn.Sequential(nn.Linear(1, width), nn.Linear(width, num_classes))


def test_a_partial_function_has_the_name_of_its_function_and_a_hash_of_its_arguments(folder):
    hashes = []
    for width, activation in ((2, id), (2, id), (3, id), (3, functional.relu)):
        partial = functools.partial(sized, width=width, activation=activation)
        name = register(partial)
        assert name == f"{__name__}:sized" and load_function(name) is partial
        hashes.append(source_hash(name))
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
    register(functools.partial(sized, 2, lambda: None))
    first = source_hash(name)
    register(functools.partial(sized, 2, lambda: None))
    assert source_hash(name) == first, "without the addresses of functions"


@pytest.mark.parametrize("model", [nn.Linear(1, 1), 3, Path("nets.py")])
def test_what_is_no_function_is_refused(folder, model):
    with pytest.raises(UserError, match=f"model is {type(model).__name__}: pass a name, or a function"):
        register(model)


def test_the_argument_to_type_is_quoted(folder):
    with pytest.raises(UserError, match=r"add --set 'model=my nets/a.py:net'$"):
        own_code.refuse_untyped_code({"model": "my nets/a.py:net"}, {}, "config.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.py:net", "cannot read absent.py: No such file"),
        ("absent.package:net", "absent"),
        ("math:sqrt", "module math has no Python source"),
        ("nets.py:other", r"nets.py has no function 'other' \(functions: none, "),
        ("nets.py:nothin", "nets.py has no function 'nothin', did you mean 'nothing'"),
        ("nets.py:number", "nets.py has no function 'number'"),
        ("nets.py:1", "names no function: type file.py:function"),
        (":net", "names no function"),
        ("broken.py:net", "cannot import broken.py: ZeroDivisionError: division by zero"),
        ("leaving.py:net", "cannot import leaving.py: SystemExit: 3"),
        ("nets.py:leave", "nets.py:leave failed .SystemExit: 0.: it must return a network"),
        ("nets.py:none", "nets.py:none returns a NoneType, not a torch.nn.Module"),
        ("nets.py:nothing", "nets.py:nothing failed .*num_classes.*: it must return a network for num_classes=10"),
    ],
)
def test_what_is_no_network_is_refused_in_one_line(folder, name, message):
    Path("nets.py").write_text(
        "number = 1\ndef none(num_classes): pass\ndef nothing(): pass\ndef leave(num_classes): exit(0)\n"
    )
    Path("leaving.py").write_text("raise SystemExit(3)\n")
    Path("broken.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match=message):
        build_network(make_recipe(f"model={name}"), 10)


def test_the_fields_that_may_name_code_are_fields(folder):
    from cifar_dist.config.recipe import RECIPE_FIELDS

    assert set(own_code.OWN_CODE_FIELDS) <= {*RECIPE_FIELDS, "augmentation.custom"}
