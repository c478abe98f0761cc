"""Break the package on purpose, one change at a time, and see that the named test fails.

Run `python tests/breakages/run.py` after a change of tests or of the package; `--only WORD` selects by name or file,
`--write` puts the result into tests/README.md. Each change is made in a copy of the checkout in a temporary folder.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import yaml

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "tests" / "README.md"
TESTS_FAILED = 1
"""pytest's exit code for failed tests; an error in collection is another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Breakage:
    """A change of one file that one test must catch."""

    name: str
    file: str
    old: str
    new: str
    test: str
    tier: str = "fast"


def read_breakages() -> list[Breakage]:
    """Read all lists beside this file."""
    files = sorted(Path(__file__).parent.glob("*.yaml"))
    return [Breakage(**entry) for file in files for entry in yaml.safe_load(file.read_text())]


def copy_checkout(target: Path) -> Path:
    """Copy what git tracks, and new files that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() or (ROOT / name).is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name, follow_symlinks=False)
    return target


def run_tests(checkout: Path, tests: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    """Run tests of a checkout in one process."""
    command = [sys.executable, "-m", "pytest", "--all", "-n0", "-q", "-p", "no:cacheprovider", *options, *tests]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False, timeout=600)


def catch(breakage: Breakage, checkout: Path) -> str:
    """Return "caught", or what happened instead."""
    file = checkout / breakage.file
    text = file.read_text()
    if text.count(breakage.old) != 1:
        return f"its text occurs {text.count(breakage.old)} times"
    file.write_text(text.replace(breakage.old, breakage.new))
    try:
        result = run_tests(checkout, [breakage.test], "-x")
    except subprocess.TimeoutExpired:
        return "the test hangs"
    finally:
        file.write_text(text)
    return "caught" if result.returncode == TESTS_FAILED else f"pytest ended with {result.returncode}: {result.stdout}"


def catch_all(breakages: list[Breakage], workers: int) -> Iterator[str]:
    """Try each breakage, in the order of the list."""
    with tempfile.TemporaryDirectory() as folder:
        free: SimpleQueue[Path] = SimpleQueue()
        for worker in range(workers):
            free.put(copy_checkout(Path(folder) / str(worker)))

        def attempt(breakage: Breakage) -> str:
            checkout = free.get()
            try:
                return catch(breakage, checkout)
            finally:
                free.put(checkout)

        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(attempt, breakages)


def write_table(rows: list[tuple[Breakage, str]]) -> None:
    """Replace the table of tests/README.md."""
    table = ["| broken on purpose | in | caught by | tier |", "|---|---|---|---|"]
    for each, outcome in rows:
        test = each.test.removeprefix("tests/") if outcome == "caught" else f"**not caught**: {outcome.splitlines()[0]}"
        table.append(f"| {each.name} | `{each.file.removeprefix('cifar_dist/')}` | `{test}` | {each.tier} |")
    before, start, rest = README.read_text().partition("<!-- breakages -->\n")
    _, end, after = rest.partition("<!-- end -->\n")
    README.write_text(before + start + "\n".join(table) + "\n" + end + after)


def main() -> int:
    """Return 0 if every breakage was caught."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a word of the name, file or test")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the table of tests/README.md")
    options = parser.parse_args()
    breakages = [each for each in read_breakages() if options.only in f"{each.name} {each.file} {each.test}"]
    intact = run_tests(ROOT, sorted({each.test for each in breakages}))
    if intact.returncode:
        print(intact.stdout, "tests fail without any breakage", sep="\n")
        return 1
    rows = []
    for each, outcome in zip(breakages, catch_all(breakages, options.workers), strict=True):
        rows.append((each, outcome))
        print(f"{outcome:8}  {each.name} ({each.file}): {each.test}", flush=True)
    caught = sum(outcome == "caught" for _, outcome in rows)
    print(f"{caught} of {len(rows)} caught")
    if options.write and not options.only:
        write_table(rows)
    return 0 if rows and caught == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
