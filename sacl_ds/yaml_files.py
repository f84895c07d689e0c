"""YAML as configurations need it: plain values only, no key twice, no anchors that grow without end."""

from __future__ import annotations

import re
from typing import Any

import yaml

from sacl_ds.errors import UserError

_MOST_CHARACTERS = 1 << 20
_MOST_NODES = 100_000  # once every alias is written out
_DEEPEST = 40
_LONGEST_NUMBER = 400  # digits
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
# which YAML 1.1 reads as numbers, and hardly anybody writes as such
_NOT_DECIMAL = {60: re.compile(r".*:.*", re.DOTALL), 8: re.compile(r"[-+]?0[0-7_]+")}


class BadYaml(ValueError):
    """Error in a YAML text. The message is one line; line: from 1, or None where it is not known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.line = line


def parse_yaml(text: str, where: str) -> Any:
    """Parse the values of a YAML text. Raises UserError, with `where` and the line, for what `plain_yaml` refuses."""
    try:
        return plain_yaml(text)
    except BadYaml as error:
        at = f" line {error.line}" if error.line else ""
        raise UserError(f"{where}{at}: not valid YAML: {error}") from None


def plain_yaml(text: str) -> Any:
    """Parse None, booleans, numbers, texts, dates, and lists and mappings of them.

    No tag makes another object. Numbers of base 60 and 8, which 1:30 and 010 are, are refused. A key that stands twice
    in a mapping is refused, and so are anchors within themselves, more than 100,000 values (aliases counted where they
    stand), 40 levels, and a million characters.
    """
    if len(text) > _MOST_CHARACTERS:
        raise BadYaml(f"more than {_MOST_CHARACTERS} characters")
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            _check(node, {}, 0)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except BadYaml:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise BadYaml(str(problem), mark.line + 1 if mark else None) from None
    except Exception as error:  # values that their kind cannot have: !!int '', a month 13, a number of 5,000 digits
        raise BadYaml(f"a value that cannot be read ({type(error).__name__}: {error})") from None


def _check(node: yaml.Node | None, sizes: dict[int, int], depth: int) -> int:
    """Count the nodes in all, to refuse anchors that grow. sizes: of nodes that were counted, 0 while they are."""
    if not isinstance(node, yaml.CollectionNode):
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node)
        return 1
    line = node.start_mark.line + 1
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise BadYaml("an anchor within itself", line)
        return sizes[id(node)]
    if depth > _DEEPEST:
        raise BadYaml(f"more than {_DEEPEST} levels", line)
    sizes[id(node)] = 0
    inner = node.value
    if isinstance(node, yaml.MappingNode):
        _no_key_twice(node)
        inner = [each for pair in node.value for each in pair]
    total = 1 + sum(_check(each, sizes, depth + 1) for each in inner)
    if total > _MOST_NODES:
        raise BadYaml(f"more than {_MOST_NODES} values", line)
    sizes[id(node)] = total
    return total


def _check_scalar(node: yaml.ScalarNode) -> None:
    if "\0" in node.value:
        raise BadYaml("a zero byte in a text", node.start_mark.line + 1)
    if node.tag not in _NUMBERS:
        return
    text, line = node.value, node.start_mark.line + 1
    if len(text) > _LONGEST_NUMBER and node.tag == _NUMBERS[0]:  # which Python may refuse to spell
        raise BadYaml(f"a number of {len(text)} digits", line)
    for kind, form in _NOT_DECIMAL.items():
        if form.fullmatch(text):
            raise BadYaml(f"{text} is a number of base {kind}; write it with base 10, or '{text}' for a text", line)


def _no_key_twice(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise BadYaml(f"the key {key.value[:80]!r} stands twice", key.start_mark.line + 1)
            seen.add((key.tag, key.value))
