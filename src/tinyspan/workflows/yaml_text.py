"""Plain YAML in small files, and the lines on which its values stand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tinyspan.errors import InputError

__all__ = ["MAX_DEPTH", "line_of", "parse_yaml", "read_text"]

MAX_DEPTH = 16  # nesting of lists and mappings; the time to scan brackets grows with the square of it


def read_text(path: Path, what: str, max_bytes: int) -> str:
    """Return the text of a file.

    Args:
        path: the file.
        what: what the file should be, with its article, for the message.
        max_bytes: maximum size of the file.

    Raises:
        InputError: the file is larger, cannot be read, or is not UTF-8.
    """
    try:
        if (size := path.stat().st_size) > max_bytes:
            raise InputError(f"{path} is not {what}: expected at most {max_bytes:,} bytes, found {size:,}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from error


def parse_yaml(text: str, name: str) -> tuple[dict[Any, Any], yaml.Node]:
    r"""Parse plain YAML with a mapping at the top, without aliases, deep nesting and keys that are given twice.

    Args:
        text: the YAML.
        name: name of the file, for the message.

    Returns:
        The mapping, and the nodes from which it was read, for `line_of`.

    Raises:
        InputError: the text is not such YAML.

    Example:
        >>> parse_yaml("seeds: 3", "mine.yaml")[0]
        {'seeds': 3}
        >>> parse_yaml("a: &x [1]\nb: *x", "mine.yaml")
        Traceback (most recent call last):
            ...
        tinyspan.errors.InputError: mine.yaml: not YAML: aliases are not read
          in "<unicode string>", line 2, column 4:
            b: *x
               ^
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        content = None if root is None else loader.construct_document(root)
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: not YAML: {str(error)[:500]}") from error
    if root is None or not isinstance(content, dict):
        raise InputError(f"{name}: expected `name: value` lines")
    return content, root


class _Loader(yaml.SafeLoader):
    """Reads plain YAML without aliases, whose copies can exceed any memory, deep nesting and duplicate keys."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read", self.peek_event().start_mark)
        if self.depth == MAX_DEPTH:
            reason = f"nested more than {MAX_DEPTH} levels deep"
            raise yaml.composer.ComposerError(None, None, reason, self.peek_event().start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.composer.ComposerError(None, None, f"{key.value!r} is given twice", key.start_mark)
                keys.add(key.value)
        return node


def line_of(node: yaml.Node, path: Sequence[int | str]) -> int | None:
    r"""Return the line of the deepest part of a path that exists in the file; None if no part of it does.

    Example:
        >>> _, root = parse_yaml("seeds: 3\ntasks:\n- {name: sst2}", "mine.yaml")
        >>> line_of(root, ["tasks", 0, "name"]), line_of(root, ["colour"])
        (3, None)
    """
    line = None
    for part in path:
        if isinstance(node, yaml.MappingNode):
            entries = [(key, value) for key, value in node.value if key.value == str(part)]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            entries = [(node.value[part], node.value[part])]
        else:
            break
        if not entries:
            break
        key, node = entries[0]
        line = key.start_mark.line + 1
    return line
