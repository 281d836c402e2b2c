"""Reads and checks configurations strictly: nothing unknown, and no key twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Refuses keys that are given twice, of which PyYAML would keep the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: {', '.join(twice)} given twice in one mapping")
        return super().construct_mapping(node, deep)


def load_all(text: str) -> list[Any]:
    """The documents of a YAML file.

    Raises:
        yaml.YAMLError: where it is not well-formed or a mapping has a key twice.
    """
    return list(yaml.load_all(text, Loader=_Loader))


def load(file: Path) -> Any:
    """The only document of a YAML file, as `load_all` reads it."""
    (document,) = load_all(file.read_text())
    return document


_LIMITS = ("minimum", "maximum", "minLength", "maxLength", "pattern", "minItems", "maxItems")


def json_schema(openapi: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI schema of Kubernetes as a JSON schema that refuses what it does not name.

    An API server drops unknown fields in silence unless it is asked for strict validation; here
    they are errors. Where the schema says that unknown fields are kept, they are allowed.
    """
    kept = {key: openapi[key] for key in ("enum", "required", *_LIMITS) if key in openapi}
    if openapi.get("x-kubernetes-int-or-string"):
        return {**kept, "type": ["integer", "string"]}
    kind = openapi.get("type")
    if kind:
        kept["type"] = [kind, "null"] if openapi.get("nullable") else kind
    if "items" in openapi:
        kept["items"] = json_schema(openapi["items"])
    if kind == "object" and not openapi.get("x-kubernetes-preserve-unknown-fields"):
        kept["properties"] = {
            name: json_schema(one) for name, one in openapi.get("properties", {}).items()
        }
        extra = openapi.get("additionalProperties", False)
        kept["additionalProperties"] = json_schema(extra) if isinstance(extra, dict) else extra
    return kept
