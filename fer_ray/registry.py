"""Named choices that others can add to: models, augmentations, metrics and the like.

Each kind of choice has one `Registry`. What the project ships registers itself in a package of
its own, one module each, which is imported when a name is first looked up; a new module there is
found without being listed anywhere. Code outside the project registers itself when it is
imported: the environment variable `PLUGINS` names the modules to import, in every process that
looks a name up, Ray's workers included.

    from fer_ray import metrics

    @metrics.register("error_rate", title="error rate", higher_is_better=False)
    def error_rate(confusion): ...
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from fer_ray.errors import UserError, first_line, unknown

PLUGINS = "FER_RAY_PLUGINS"
"""Environment variable: names of modules to import, separated by commas."""

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """The choices of one kind, by name."""

    def __init__(
        self,
        flag: str,
        package: str | None = None,
        *,
        order: Callable[[str, Entry], Any] | None = None,
    ) -> None:
        """Starts empty; nothing is imported before the first look-up.

        Args:
            flag: the flag or setting that takes one of the names, for error messages.
            package: dotted name of the module that registers what the project ships, or of a
                package whose modules do; None where it is the module that holds the registry.
            order: what to sort by, from an entry's name and the entry; by default entries stand
                in the order in which they were registered, the project's own first.
        """
        self._flag, self._package, self._order = flag, package, order
        self._entries: dict[str, Entry] = {}
        self._from_plugins: set[str] = set()
        self._is_loaded = False

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Returns a decorator that registers a class, a function or a description.

        Args:
            name: what users write; lower case, no blanks.

        Raises:
            ValueError: where another entry has that name.
        """

        def add(entry: Entry) -> Entry:
            if self._entries.get(name, entry) is not entry:
                raise ValueError(f"{self._flag}: {name!r} is registered twice")
            self._entries[name] = entry
            if _is_loading_plugins:
                self._from_plugins.add(name)
            return entry

        return add

    def unregister(self, name: str) -> None:
        """Removes an entry, for tests that added one; an absent name is ignored."""
        self._entries.pop(name, None)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in order."""
        return tuple(name for name, _ in self.items())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> Entry:
        """The entry of that name.

        Raises:
            UserError: where there is none, with the nearest name.
        """
        self._load()
        if name not in self._entries:
            raise unknown(self._flag, name, self.names)
        return self._entries[name]

    def items(self) -> list[tuple[str, Entry]]:
        """Names and entries, in order."""
        self._load()
        # a plugin may be imported before the project's own entries are
        entries = sorted(self._entries.items(), key=lambda item: item[0] in self._from_plugins)
        if self._order is not None:
            order = self._order
            entries.sort(key=lambda item: order(*item))
        return entries

    def values(self) -> list[Entry]:
        """The entries, in order."""
        return [entry for _, entry in self.items()]

    def _load(self) -> None:
        if self._is_loaded:
            return
        self._is_loaded = True  # before the imports, whose modules may look names up
        if self._package:
            package = importlib.import_module(self._package)
            modules = pkgutil.iter_modules(getattr(package, "__path__", []))
            for name in sorted(module.name for module in modules):
                importlib.import_module(f"{self._package}.{name}")
        load_plugins()


_is_loading_plugins: list[bool] = []
"""Not empty while plugins are imported."""


def load_plugins() -> None:
    """Imports the modules that `PLUGINS` names; each once in a process.

    Raises:
        UserError: where one cannot be imported.
    """
    for name in filter(None, os.environ.get(PLUGINS, "").split(",")):
        _is_loading_plugins.append(True)
        try:
            importlib.import_module(name.strip())
        except Exception as error:  # whatever a module's code raises
            raise UserError(
                f"{PLUGINS}: {name.strip()!r} cannot be imported ({first_line(error)}): give the "
                "names of modules on Python's path, separated by commas"
            ) from error
        finally:
            _is_loading_plugins.pop()
