"""`recipes` and `config`, the examples at the end of each --help, and tables that repeat what recipes are."""

import contextlib
import re
import shlex

import pytest

from cifar_dist import cli
from cifar_dist.commands.examples import read_comment
from cifar_dist.config.accelerate_config import config_names, load_accelerate_config
from cifar_dist.config.command_line import EXAMPLES, parse_arguments
from cifar_dist.config.options import COMMANDS
from cifar_dist.config.recipe import RECIPES, Recipe, recipe_names
from tests.conftest import ROOT
from tests.recipe_table import PAGE, read_docstrings, with_table


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def output(capsys, *argv: str) -> str:
    assert cli.main([*argv]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", recipe_names())
def test_a_printed_recipe_is_a_recipe_file(tmp_path, capsys, name):
    (tmp_path / "mine.yaml").write_text(output(capsys, "recipes", name))
    assert repr(Recipe.load(str(tmp_path / "mine.yaml"))) == repr(Recipe.load(name))  # also what does not count for ==


def test_recipes_are_listed_with_network_epochs_accuracy_and_time(capsys):
    text = output(capsys, "recipes")
    assert all(len(line) <= 120 for line in text.splitlines())
    rows = {line.split()[0]: re.split("  +", line) for line in text.splitlines() if re.match(r"\w+  ", line)}
    assert set(rows) == {"recipe", *recipe_names()}
    assert rows["standard"][1:4] == ["resnet18, stem cifar", "12", "93.61 %"]
    assert rows["standard"][4].startswith("47 minutes")
    assert rows["long"][3:] == ["-", "-"]
    epochs = [int(row[2]) for row in list(rows.values())[1:]]
    assert epochs == sorted(epochs)
    assert "\n          The default: the 3x3 stem, Muon, and images that grow.\n" in text


@pytest.mark.parametrize("argv", ["recipes", "config", "--help", *(f"{command} --help" for command in COMMANDS)])
def test_lines_are_broken_between_words_at_the_width_of_the_terminal(capsys, monkeypatch, argv):
    def shown(width: int) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(width))
        with contextlib.suppress(SystemExit):
            cli.main(argv.split())
        return capsys.readouterr().out.splitlines()

    narrow, wide = shown(60), shown(120)
    assert max(map(len, narrow)) <= 60
    broken, whole = ([word for line in lines for word in line.split() if word not in "#\\"] for lines in (narrow, wide))
    if argv == "recipes":  # other headings: blocks in place of a table
        assert {word.strip(",") for word in whole} - {"-", "recipe"} <= {word.strip(",") for word in broken}
    else:
        assert broken == whole


def test_configs_are_listed_and_printed(tmp_path, capsys):
    files = {path.stem: path for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert config_names() == sorted(files)
    lines = output(capsys, "config").splitlines()
    for name, line in zip(sorted(files), lines, strict=False):
        assert line.split()[0] == name and line.endswith(".")
        assert output(capsys, "config", name) == files[name].read_text()
    (tmp_path / "mine.yaml").write_text(output(capsys, "config", "multi_cpu"))
    assert load_accelerate_config(str(tmp_path / "mine.yaml")).num_processes == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["recipes", "quik"], "unknown recipe 'quik', did you mean 'quick'? (recipes: "),
        (["config", "multi_gpus"], "unknown config 'multi_gpus', did you mean 'multi_gpu'? (configs: cpu, "),
    ],
)
def test_an_unknown_name_is_refused(capsys, argv, message):
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_ends_with_two_commands_that_can_be_typed(capsys, monkeypatch, command):
    monkeypatch.setenv("CIFAR_DIST_PROGRAM", "cifar-dist")
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    lines = capsys.readouterr().out.split("\nexamples:\n")[1].splitlines()
    assert [line[:4] for line in lines[::2]] == ["  # "] * 2
    assert len(lines) == 2 * len(EXAMPLES[command]) == 4
    for line in lines[1::2]:
        program, *words = shlex.split(line.split(" > ")[0])
        parsed, options = parse_arguments(words)
        assert (program, parsed) == ("cifar-dist", command or parsed)
        assert getattr(options, "recipe", None) in (None, *recipe_names())


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?", text))


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_readme_has_the_accuracy_and_time_of_each_recipe(readme):
    """A row of a changed recipe (`quick` with `--set ...`) is another's."""
    rows = dict(re.findall(r"^\| `(\w+)`[^`|]*\|(.*)", (ROOT / readme).read_text(), re.MULTILINE))
    for name in recipe_names():
        comment = read_comment(RECIPES / f"{name}.yaml")
        assert numbers(comment.accuracy) | numbers(comment.time) <= numbers(rows[name]), name
        assert bool(comment.accuracy) == (" %" in rows[name]), name


def test_the_table_of_fields_is_that_of_the_dataclasses():
    page = PAGE.read_text()
    assert with_table(page) == page, "run python -m tests.recipe_table"
    assert all(f"| `{name}` |" in page for name in ("epochs", "optimizer.learning_rate", "augmentation.cutmix"))
    assert all(len(text.split()) > 2 for text in read_docstrings().values())
