"""YAML as plain data: no objects, no key twice, and aliases that stay small when they are written out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

MOST_NODES = 100_000  # keys and values, each alias counted as what it stands for
MOST_DIGITS = 100  # Python itself writes no number of 5000
INTEGER = "tag:yaml.org,2002:int"


def parse_yaml(text: str) -> Any:
    """The value of one YAML document. Raises `ValueError` saying in one line why it has none."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML leaves what Python makes of `!!int x`, of 5000 digits and of the 31st of February
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _count(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Nodes written out. Raises `ValueError` for too many, for a node inside itself and for a key twice."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ValueError("an alias stands inside of what it stands for")
        return sizes[id(node)]
    sizes[id(node)], total = 0, 1
    if node.tag == INTEGER and len(node.value) > MOST_DIGITS:
        raise ValueError(f"a number of {len(node.value):,} digits")
    if isinstance(node, yaml.MappingNode):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in keys.items() if count > 1]:
            raise ValueError(f"key {twice[0]!r} is there twice")
        total += sum(_count(key, sizes) + _count(value, sizes) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count(item, sizes) for item in node.value)
    if total > MOST_NODES:
        raise ValueError(f"it has more than {MOST_NODES:,} entries with its aliases written out")
    sizes[id(node)] = total
    return total
