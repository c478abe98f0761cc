"""Words, links, commands and fields in the documents. tests/commands/test_readme.py runs the commands of the README."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from cifar_dist.config.command_line import parse_arguments
from cifar_dist.config.recipe import read_recipe
from cifar_dist.config.schema import flatten
from cifar_dist.run.results import EpochRecord, Evaluation, Summary
from tests.conftest import ROOT

README, PAGES = ROOT / "README.md", sorted(ROOT.glob("docs/*.md"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *PAGES, *ROOT.glob("docs/zh/*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
MAX_WORDS, MAX_COLUMNS, MAX_README_LINES, MAX_DOCS_LINES = 30, 120, 120, 1200
UNPLAIN = re.compile(
    r"\b(says|tells|hears|heard|meets|offers|believes|wishes|wins|nobody|accidents?|own words|of no account"
    r"|to be alone|gone on with|(as|what (is|was)) typed)\b",
    re.IGNORECASE,
)
"""What files and processes do not do, and other words that readers had to read twice."""


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def sentences(text: str) -> list[str]:
    """The sentences of a document without its code blocks; a cell of a table is one, too. A link is its text."""
    text = re.sub(r"^\[.+\]: \S+$", "", without_code(text), flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", text)
    text = re.sub(r"`[^`]+`", "code", text)
    text = re.sub(r"^(#+ |\s*[-*] |\s*\d+\. |\|)|\|", "\n\n", text, flags=re.MULTILINE)
    blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text)]
    return [each for block in blocks for each in re.split(r"(?<=[.!?])[)*]* ", block)]


@pytest.mark.parametrize("document", [README, ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda path: path.name)
def test_words_are_plain_and_lines_are_short(document):
    text = document.read_text()
    written = re.sub(r"<!-- fields: .*?-->.*?<!-- end of fields -->", "", text, flags=re.DOTALL)  # not that table
    lines = [line for line in written.splitlines() if not re.match(r"\[\w+\]: https://\S+$", line)]  # unbreakable
    assert [line for line in lines if len(line) > MAX_COLUMNS] == []
    assert [each for each in sentences(text) if len(re.findall(r"\S*\w\S*", each)) > MAX_WORDS] == []
    assert [each for each in sentences(text) if UNPLAIN.search(each)] == []


def test_the_documents_are_short():
    assert len(README.read_text().splitlines()) <= MAX_README_LINES
    pages = [page for page in PAGES if page.name not in ("index.md", "reference.md")]  # of the site alone
    assert sum(len(page.read_text().splitlines()) for page in pages) <= MAX_DOCS_LINES


def test_sentences_are_found_wherever_they_stand():
    text = "# A title\n\nOne two\n`a flag` [three](x.md). Four.\n\n- Five\n| six | seven. |\n\n```\nx\n```\n[id]: https://x\n"
    assert list(filter(None, sentences(text))) == ["A title", "One two code three.", "Four.", "Five", "six", "seven."]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_link_and_every_named_file_exists(document):
    """A `folder/file.py` is named from the root or from the package. Pages of the site link to pages of the site."""
    text = document.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
        assert document not in PAGES or target.is_relative_to(ROOT / "docs"), link
    used, defined = re.findall(r"\]\[(\w+)\]", without_code(text)), re.findall(r"^\[(\w+)\]: ", text, re.MULTILINE)
    assert set(used) == set(defined)
    for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|sh|md|yaml|jsonl))`", text):
        if not name.startswith(("runs/", "DIR/")):
            assert (ROOT / name).exists() or (ROOT / "cifar_dist" / name).exists(), name


def commands(document: Path) -> list[str]:
    """The command lines in a document's code blocks and within its text; continued lines are joined."""
    text = document.read_text()
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(python launch\.py [^`]+)`", without_code(text))
    lines = [line for line in lines if not line.startswith("eval ")]  # the shell's own
    return [line for line in lines if re.search(r"launch\.py|cifar-dist |slurm/\w+\.sh|benchmarks/\w+\.", line)]


@pytest.mark.parametrize("line", sorted({line for each in DOCUMENTS for line in commands(each)}))
def test_every_command_parses(line):
    words = shlex.split(line.split(" && ")[-1], comments=True)
    script = next(i for i, word in enumerate(words) if re.search(r"\.(py|sh)$|^cifar-dist$", word))
    assert words[script] == "cifar-dist" or (ROOT / words[script]).exists(), words[script]
    rest = [word for word in words[script + 1 :] if word != "..."]
    if words[script] == "launch.py" or words[script] == "cifar-dist":
        parse_arguments(rest)
    elif "slurm/" in words[script] and "setup" not in words[script]:
        command = Path(words[script]).stem
        parse_arguments(([command] if command in ("eval", "tune") else []) + rest)


TRANSLATIONS = [("README.md", "README.zh-CN.md"), ("docs/getting-started.md", "docs/zh/getting-started.md")]


@pytest.mark.parametrize(("english", "chinese"), TRANSLATIONS)
def test_a_translation_has_the_same_commands_links_and_headings(english, chinese):
    texts = [(ROOT / name).read_text() for name in (english, chinese)]
    blocks = [re.findall(r"```sh\n.*?```", text, re.DOTALL) for text in texts]
    assert blocks[0] == blocks[1] and len(blocks[0]) >= 3
    links = [  # without the language, and without anchors, which are translated
        sorted(re.sub(r"^\.\./|(?<=docs/)zh/|#.*|\.zh-CN", "", link) for link in re.findall(r"\]\(([^)\s]+)\)", text))
        for text in texts
    ]
    assert links[0] == links[1]
    headings = [len(re.findall(r"^## ", text, re.MULTILINE)) for text in texts]
    assert headings[0] == headings[1]


def first_column(text: str) -> list[str]:
    """The names in backquotes in the first column of a document's tables."""
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]


def test_the_fields_of_what_is_written_are_documented():
    documented = first_column((ROOT / "docs" / "after-training.md").read_text())
    written = [field.name for each in (EpochRecord, Summary, Evaluation) for field in dataclasses.fields(each)]
    assert set(written) <= set(documented)
    tables = [name for name in documented if name in written]
    assert len(tables) == len(written), "one is missing where another record has the same name"


def test_the_fields_of_a_recipe_are_documented():
    documented = first_column((ROOT / "docs" / "recipes.md").read_text())
    full, prefix = set(), ""
    for name in documented:
        prefix = name.rpartition(".")[0] if "." in name else prefix
        full |= {name, f"{prefix}.{name}"}
    missing = set(flatten(read_recipe("standard"))) - full
    assert missing == set()
