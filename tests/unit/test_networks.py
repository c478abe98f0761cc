"""Torchvision's classification networks by name: the same tensors, other stems, and what each optimizer steps."""

import pytest
import torch
from torch import nn
from torchvision import models

from cifar_dist.config.errors import UserError
from cifar_dist.config.recipe import PRETRAINED_SIDES, resolve_recipe
from cifar_dist.model.networks import TORCHVISION, build_network, find_head
from cifar_dist.model.optimizer import matrices_of
from tests.conftest import make_recipe

HEADS = {
    "resnet18": "fc", "resnet34": "fc", "resnet50": "fc", "mobilenet_v2": "classifier.1",
    "mobilenet_v3_small": "classifier.3", "efficientnet_b0": "classifier.1", "vgg16_bn": "classifier.6",
    "densenet121": "classifier", "convnext_tiny": "classifier.2", "vit_b_16": "heads.head",
    "squeezenet1_1": "classifier.1",
}  # fmt: skip


def build(model: str, stem: str = "imagenet", num_classes: int = 7, **fields) -> nn.Module:
    """Build a network without memory for its weights."""
    with torch.device("meta"):
        return build_network(
            make_recipe(f"model={model}", f"stem={stem}", *(f"{k}={v}" for k, v in fields.items())), num_classes
        )


@pytest.mark.parametrize(("name", "head"), HEADS.items())
def test_networks_have_torchvisions_tensors(name, head):
    ours = build(name, image_size=224)
    with torch.device("meta"):
        theirs = models.get_model(name, num_classes=7)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert find_head(ours, 7) == (head, ours.get_submodule(head))
    assert find_head(ours, 11) is None


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0"])
def test_the_cifar_stem_takes_out_the_first_two_strides(name):
    own, changed = build(name), build(name, "cifar")
    changed.load_state_dict(own.state_dict(), strict=True)
    images = torch.empty(2, 3, 32, 32, device="meta")
    assert own.features(images).shape[2:] == (1, 1) and changed.features(images).shape[2:] == (4, 4)


def test_a_vision_transformer_takes_the_recipes_size():
    model = build("vit_b_16", image_size=32)
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("model=resnet81",), "unknown model 'resnet81', did you mean 'resnet18'"),
        (("model=fcn_resnet50",), "unknown model 'fcn_resnet50'"),  # not a classification network
        (("model=inception_v3",), "inception_v3 has auxiliary outputs"),
        (("model=googlenet",), "googlenet has auxiliary outputs"),
        (("model=vgg16_bn", "stem=cifar"), "vgg16_bn has no stem 'cifar': set stem=imagenet"),
        (("model=mobilenet_v2", "stem=small"), "mobilenet_v2 has no stem 'small'"),
        (("model=vit_b_16", "stem=imagenet", "image_size=40"), "multiple of 16: set image_size=224"),
        (("model=resnet18", "stem=null"), "stem must be cifar, small or imagenet for resnet18, not None"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(fields, message):
    with pytest.raises(UserError, match=message), torch.device("meta"):
        build_network(make_recipe(*fields), 10)


def test_muon_steps_hidden_matrices_and_filter_banks():
    model = build("mobilenet_v2")
    stepped = {id(each) for each in matrices_of(model, find_head(model, 7))}
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert (id(module.weight) in stepped) == (module.groups == 1)  # the others are depthwise
    assert id(model.classifier[1].weight) not in stepped
    model = build("vit_b_16", image_size=224)
    named = dict(model.named_parameters())
    stepped = {id(each) for each in matrices_of(model, find_head(model, 7))}
    names = {name.rpartition("encoder_layer_0.")[2] for name, each in named.items() if id(each) in stepped}
    assert {
        "self_attention.in_proj_weight",
        "self_attention.out_proj.weight",
        "mlp.0.weight",
        "conv_proj.weight",
    } <= names
    assert not {"class_token", "encoder.pos_embedding", "heads.head.weight", "mlp.0.bias", "ln_1.weight"} & names
    model = build("swin_t", image_size=32)
    stepped = {id(each) for each in matrices_of(model, find_head(model, 7))}
    assert not [name for name, each in model.named_parameters() if "position" in name and id(each) in stepped]
    tokens = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3), nn.Linear(3, 2))
    assert matrices_of(tokens, find_head(tokens, 2)) == [tokens[1].weight]
    tokens[1].weight.requires_grad_(False)
    assert matrices_of(tokens, find_head(tokens, 2)) == []


def test_the_automatic_image_size_is_that_of_torchvisions_weights():
    for name in set(TORCHVISION) - {"inception_v3"}:
        (side,) = models.get_model_weights(name).DEFAULT.transforms().crop_size
        assert PRETRAINED_SIDES.get(name, 224) == side, name
    assert resolve_recipe(_finetune(), {"model": "efficientnet_b3"}).image_size == 300
    assert resolve_recipe(_finetune()).image_size == 224
    with pytest.raises(UserError, match=r"model must be text"):
        resolve_recipe(_finetune(), {"model": ["resnet50"]})


def _finetune() -> dict:
    from cifar_dist.config.recipe import read_recipe

    return read_recipe("finetune")
