"""Find and read the recipe of the guest image."""

from pathlib import Path

from katapod.model.recipe import DEFAULT_RECIPE, EMPTY_RECIPE, Recipe, RecipeError, parse_recipe

__all__ = ["read_recipe"]


def read_recipe(named: Path | None, *, none: bool = False, default: Path = DEFAULT_RECIPE) -> tuple[Recipe, str]:
    """(recipe, its path): the named one, else the default one if it exists, else an empty one.

    Raises RecipeError.
    """
    if none:
        return EMPTY_RECIPE, ""
    path = (named or default).absolute()
    try:
        content = path.read_bytes()
    except FileNotFoundError as exc:
        if named is None:
            return EMPTY_RECIPE, ""
        raise RecipeError(f"cannot read the image recipe {path}: no such file") from exc
    except OSError as exc:
        raise RecipeError(f"cannot read the image recipe {path}: {exc.strerror}") from exc
    return parse_recipe(content, path), str(path)
