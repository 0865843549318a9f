"""A Modelfile, from which Ollama makes a model of its own out of a GGUF file.

Ollama does not run the chat template in the file: it has templates in Go. One is written where it
can be shown to say what ours says; else Ollama looks whether it knows the file's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Message = dict[str, str]
Render = Callable[[Sequence[Message], bool], str]
"""Messages, and whether a reply is to follow, as the text that the model gets."""

_SYSTEM, _USER, _REPLY, _NEXT = "Zqsys0", "Zqask1", "Zqsay2", "Zqask3"


def modelfile(
    file: str,
    *,
    title: str,
    template: str | None,
    stops: Iterable[str],
    window: int,
    system: str | None = None,
) -> str:
    """The text of a Modelfile.

    Args:
        title: For the comment on top, and for the name that it suggests.
        template: In Go; None: it cannot be said, and why is a comment.
        stops: Texts of the tokens that end a reply.
        window: Tokens of prompt and reply together.
        system: What the model is told before all else.
    """
    lines = [f"# {title}: ollama create {title.lower()} -f Modelfile", f"FROM ./{file}"]
    if template is None:
        lines.append(
            "# No TEMPLATE: what the chat template does cannot be said in Ollama's language."
        )
    else:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    lines.append(f"PARAMETER num_ctx {window}")
    if system and '"""' not in system:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def go_template(render: Render, *, bos: str = "") -> str | None:
    """The template in Go that writes what `render` writes; None where there is no such one.

    Found by rendering marks: what stands before, between and after them. It has to give the same
    text for conversations with and without a system message, of one to three questions.

    Args:
        bos: What the tokenizer puts before every text, so that the template must not.
    """
    try:
        told = _split(
            render(_conversation(system=True, turns=2), True), (_SYSTEM, _USER, _REPLY, _NEXT)
        )
        bare = _split(render(_conversation(system=False, turns=2), True), (_USER, _REPLY, _NEXT))
    except Exception:  # a template raises what it likes
        return None
    if told is None or bare is None or told[2:] != bare[1:] or bare[1] != bare[3]:
        return None
    (opening, after_system, asked, said, _), default = told, bare[0]

    def composed(messages: Sequence[Message]) -> str:
        text = default
        for message in messages:
            content = message["content"]
            if message["role"] == "system":
                text = opening + content + after_system
            else:
                text += content + (asked if message["role"] == "user" else said)
        return text

    for system in (True, False):
        for turns in (1, 2, 3):
            messages = _conversation(system=system, turns=turns)
            if composed(messages) != render(messages, True):
                return None
    pieces = [opening.removeprefix(bos), after_system, default.removeprefix(bos), asked, said]
    if any("{{" in piece or "}}" in piece or '"""' in piece for piece in pieces):
        return None
    opening, after_system, default, asked, said = pieces
    return (
        f"{{{{ if .System }}}}{opening}{{{{ .System }}}}{after_system}{{{{ else }}}}{default}"
        "{{ end }}{{ range .Messages }}"
        f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{asked}'
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{said}{{{{ end }}}}'
        "{{ end }}"
    )


def _conversation(*, system: bool, turns: int) -> list[Message]:
    said = [{"role": "system", "content": _SYSTEM}] if system else []
    for turn in range(turns):
        said.append({"role": "user", "content": _USER if turn == 0 else f"Zqask{turn + 2}"})
        if turn < turns - 1:
            said.append({"role": "assistant", "content": _REPLY if turn == 0 else "Zqsay9"})
    return said


def _split(text: str, marks: Sequence[str]) -> list[str] | None:
    """What stands before, between and after the marks; None where one is not there just once."""
    pieces = []
    for mark in marks:
        if text.count(mark) != 1:
            return None
        before, _, text = text.partition(mark)
        pieces.append(before)
    return [*pieces, text]
