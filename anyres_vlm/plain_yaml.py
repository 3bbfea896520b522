"""YAML as plain data: no objects, no duplicate keys, and a limit on the size of expanded aliases."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

MOST_NODES = 100_000  # keys and values, aliases expanded
MOST_DIGITS = 100  # Python refuses to print a number of 5000 digits
INTEGER = "tag:yaml.org,2002:int"


def parse_yaml(text: str) -> Any:
    """Parse one YAML document. Raises `ValueError` with a reason in one line."""
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
        # PyYAML passes on what Python raises for `!!int x`, 5000 digits or the 31st of February
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _count(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Count the nodes with aliases expanded. Raises `ValueError` for too many, cycles and duplicate keys."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ValueError("an alias refers to a node that contains it")
        return sizes[id(node)]
    sizes[id(node)], total = 0, 1
    if node.tag == INTEGER and len(node.value) > MOST_DIGITS:
        raise ValueError(f"a number of {len(node.value):,} digits, expected at most {MOST_DIGITS}")
    if isinstance(node, yaml.MappingNode):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if duplicates := [key for key, count in keys.items() if count > 1]:
            raise ValueError(f"duplicate key {duplicates[0]!r}")
        total += sum(_count(key, sizes) + _count(value, sizes) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count(item, sizes) for item in node.value)
    if total > MOST_NODES:
        raise ValueError(f"it has more than {MOST_NODES:,} entries with aliases expanded")
    sizes[id(node)] = total
    return total
