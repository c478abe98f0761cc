"""The words that a shell can complete: commands, their flags, and what a flag takes."""

import argparse
from collections.abc import Mapping

from cifar_dist.config.loading import read_recipe, recipe_names
from cifar_dist.config.parsing import flatten
from cifar_dist.config.plan import KNOWN_SIZES
from cifar_dist.config.trackers import TRACKERS

_SCRIPT = """\
_cifar_dist() {
  local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} command=train i=$((COMP_CWORD - 1))
  case " %(commands)s " in *" ${COMP_WORDS[1]} "*) ((COMP_CWORD > 1)) && command=${COMP_WORDS[1]} ;; esac
  while ((i > 0)) && [[ ${COMP_WORDS[i]} != --* ]]; do ((i--)); done
  [[ ${COMP_WORDS[i]} == --set ]] && before=--set  # which takes several
  local words=
  case $before in
%(values)s
    *) case $command in
%(flags)s
      esac
      ((COMP_CWORD == 1)) && words="%(commands)s --help --version --completion $words" ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  # what is no word of ours may be a file; after FIELD= comes a value
  [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
}
complete -o default -F _cifar_dist cifar-dist"""


def completion_script(parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """Give a bash script that completes `cifar-dist`; zsh reads it after `autoload -U bashcompinit; bashcompinit`."""
    values: dict[str, list[str]] = {
        "--recipe": recipe_names(),
        "--dataset": list(KNOWN_SIZES),
        "--tracker": list(TRACKERS),
        "--set": [f"{field}=" for field in flatten(read_recipe("standard"))],
    }
    flags = {}
    for command, parser in parsers.items():
        flags[command] = [name for name in parser._option_string_actions if name.startswith("--")]
        for action in parser._actions:
            if action.option_strings and action.nargs != 0:  # it takes a value; where no word is known, a file's name
                values.setdefault(action.option_strings[-1], [str(choice) for choice in action.choices or ()])
    return _SCRIPT % {
        "commands": " ".join(parsers),
        "values": "\n".join(f'    {flag}) words="{" ".join(words)}" ;;' for flag, words in values.items()),
        "flags": "\n".join(f'        {command}) words="{" ".join(names)}" ;;' for command, names in flags.items()),
    }
