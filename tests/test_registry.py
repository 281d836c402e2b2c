"""Registries: what is registered is found, in order, and plugins are imported on demand."""

from __future__ import annotations

import sys

import pytest

from fer_ray.errors import UserError
from fer_ray.registry import PLUGINS, Registry


def test_entries_are_found_by_name_in_the_order_of_registration():
    colours: Registry[int] = Registry("--colour")
    colours.register("red")(1)
    colours.register("blue")(2)
    assert colours.names == ("red", "blue") and len(colours) == 2
    assert colours["blue"] == 2 and "red" in colours and "green" not in colours
    assert colours.items() == [("red", 1), ("blue", 2)]
    with pytest.raises(UserError, match=r"--colour: 'rad' is not one of .* mean 'red'"):
        colours["rad"]


def test_a_name_is_registered_once():
    colours: Registry[str] = Registry("--colour")
    colours.register("red")("r")
    colours.register("red")("r")  # a module that is imported anew
    with pytest.raises(ValueError, match="registered twice"):
        colours.register("red")("R")


def test_a_package_registers_each_of_its_modules_and_plugins_follow(tmp_path, monkeypatch):
    package = tmp_path / "toy_colours"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from fer_ray.registry import Registry\nC = Registry('--colour', 'toy_colours')\n"
    )
    for name in ("b", "a"):
        line = f"from toy_colours import C\nC.register({name!r})(object())\n"
        (package / f"{name}.py").write_text(line)
    (tmp_path / "toy_plugin.py").write_text(
        "from toy_colours import C\nC.register('plugin')(object())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(PLUGINS, "toy_plugin")
    import toy_colours

    assert "toy_colours.a" not in sys.modules
    assert toy_colours.C.names == ("a", "b", "plugin")


def test_a_plugin_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setenv(PLUGINS, "no_such_module")
    with pytest.raises(UserError, match=f"{PLUGINS}: 'no_such_module' cannot be imported"):
        Registry("--colour").names  # noqa: B018
