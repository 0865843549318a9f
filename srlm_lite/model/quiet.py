"""What libraries say while a base is read, kept to what a user needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import transformers

from srlm_lite.model.whereabouts import unheard

hf: Any = transformers  # only partly typed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and giving advice while it loads, and the client of the
    Hub from telling each of its tries to reach it; what they fail of is told in one line."""
    logging_ = hf.utils.logging
    verbosity, bars = logging_.get_verbosity(), logging_.is_progress_bar_enabled()
    logging_.set_verbosity_error()
    logging_.disable_progress_bar()
    try:
        with unheard():
            yield
    finally:
        logging_.set_verbosity(verbosity)
        if bars:
            logging_.enable_progress_bar()


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
