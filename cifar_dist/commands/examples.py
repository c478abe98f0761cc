"""`recipes` and `config`: list the recipes and example configs of the package, or print one to start from."""

import itertools
import re
import sys
from pathlib import Path
from typing import NamedTuple

from cifar_dist.config.accelerate_config import CONFIGS, AccelerateConfig
from cifar_dist.config.command_line import wrap
from cifar_dist.config.errors import EXIT_DONE, UserError
from cifar_dist.config.options import ConfigOptions, RecipesOptions
from cifar_dist.config.provenance import command_line
from cifar_dist.config.recipe import RECIPES, Recipe, describe_network, recipe_names
from cifar_dist.config.schema import nearest
from cifar_dist.config.world import World

_ACCURACY_NOTE = (
    "Accuracy: of the test images of CIFAR-10, if nothing else is named. The recipe trained on all 50,000 images (--set"
    " validation_size=0). Time: of the training. What is missing was not measured. Source: docs/accuracy.md."
)


class Comment(NamedTuple):
    """The comment at the top of a YAML file."""

    text: str
    accuracy: str
    """Of a recipe's line `# accuracy: ...`; empty without one."""
    time: str
    """Of a recipe's line `# time: ...`; empty without one."""

    @property
    def sentence(self) -> str:
        """The first sentence of the text."""
        return re.split(r"(?<=\.)\s", self.text, maxsplit=1)[0]


def run(options: RecipesOptions | ConfigOptions, world: World, config: AccelerateConfig) -> int:
    """Print the list, or the file that was named; return the exit code. Raises UserError for an unknown name."""
    if isinstance(options, RecipesOptions):
        text = list_recipes() if options.recipe is None else _read(RECIPES, options.recipe, "recipe")
    else:
        text = list_configs() if options.example is None else _read(CONFIGS, options.example, "config")
    if world.rank == 0:
        sys.stdout.write(text)
    return EXIT_DONE


def list_recipes() -> str:
    """Return a table of the package's recipes, the shortest first; where it does not fit, a block for each."""
    names = sorted(recipe_names(), key=lambda each: Recipe.load(each).epochs)
    indent = " " * (max(map(len, names)) + 2)
    rows, block_lines = [("recipe", "network", "epochs", "accuracy", "time", "")], []
    for name in names:
        recipe, comment = Recipe.load(name), read_comment(RECIPES / f"{name}.yaml")
        network, accuracy, time = describe_network(recipe), comment.accuracy, comment.time
        rows.append((name, network, str(recipe.epochs), accuracy or "-", time or "-", comment.sentence))
        facts = [accuracy and f"accuracy {accuracy}", time and f"time {time}", comment.sentence]
        block_lines.append(f"{name:<{len(indent)}}{network}, {recipe.epochs} epochs")
        block_lines += [f"{indent}{each}" for each in facts if each]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for *columns, time, sentence in rows:
        padded = [text.ljust(width) for text, width in zip(columns, widths, strict=True)]
        lines += ["  ".join([*padded, time]), *([f"{indent}{sentence}"] if sentence else [])]
    if any(wrap(line) != line for line in lines):
        lines = [wrap(line, indent) for line in block_lines]
    return "\n".join([*lines, "", wrap(_ACCURACY_NOTE), *_how_to_start("recipes quick", "--recipe")])


def list_configs() -> str:
    """Return a table of the example Accelerate configs."""
    files = sorted(CONFIGS.glob("*.yaml"))
    indent = " " * (max((len(path.stem) for path in files), default=0) + 2)
    lines = [wrap(f"{path.stem:{len(indent)}}{read_comment(path).sentence}", indent) for path in files]
    return "\n".join([*lines, "", *_how_to_start("config cpu", "--config")])


def _how_to_start(words: str, flag: str) -> list[str]:
    commands = f"{command_line(*words.split())} > mine.yaml", command_line(flag, "mine.yaml")
    return ["Start your own:", *(f"  {each}" for each in commands), ""]


def read_comment(path: Path) -> Comment:
    """Read the comment at the top of a YAML file."""
    content = path.read_text(encoding="utf-8").splitlines()
    lines = [line.removeprefix("#").strip() for line in itertools.takewhile(lambda line: line.startswith("#"), content)]
    values = {"accuracy": "", "time": ""}
    for line in list(lines):
        name, _, value = line.partition(": ")
        if name in values:
            values[name] = value
            lines.remove(line)
    return Comment(" ".join(lines), **values)


def _read(folder: Path, name: str, kind: str) -> str:
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise UserError(f"unknown {kind} '{name}'{nearest(name, names)} ({kind}s: {', '.join(names)})")
    return (folder / f"{name}.yaml").read_text(encoding="utf-8")
