"""What a shell is offered where a recipe, a setting or an override is typed."""

from __future__ import annotations


def recipe_names(incomplete: str) -> list[str]:
    """Shipped recipes; of paths the shell knows more."""
    from srlm_lite.recipe import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


def setting_keys(incomplete: str) -> list[str]:
    """Sections and settings by dotted key; what is below a section, once its name is typed."""
    from srlm_lite.explain import all_settings

    return [one.key for one in all_settings() if one.key.startswith(incomplete)]


def overrides(incomplete: str) -> list[str]:
    """`KEY=` of each setting, and behind a key the words that it takes."""
    from srlm_lite.explain import all_settings

    key, equals, typed = incomplete.partition("=")
    settings = {one.key: one for one in all_settings() if one.section is None}
    if not equals:
        return [f"{name}=" for name in settings if name.startswith(key)]
    if key not in settings:
        return []
    words = settings[key].words
    return [f"{key}={word}" for word in words if str(word).startswith(typed)]
