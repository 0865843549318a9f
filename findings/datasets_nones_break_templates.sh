#!/bin/sh
# A conversation without tools cannot be rendered any more once it lies in a data set beside one that
# calls a tool: `datasets` gives every message `tool_calls: None`, and templates that ask whether the
# key is there, as Llama 3.1's and DeepSeek-V3's do, take it for a call.
#
# Versions: datasets 4.8.5, transformers 5.17.0, trl 1.14.0 (the templates), torch 2.13.0, Python 3.11.
# Expected: a row comes back as it was put in, or templates read None as nothing.
# Seen: the row alone is rendered by all three. From a data set with a tool call in another row it is a
# TypeError with llama3_1 and deepseekv3; qwen3, which asks for the value, renders it as before.
# Exit: 0 while this is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.17.0 trl==1.14.0 datasets==4.8.5
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> "$folder/log" <<'END' || { cat "$folder/log" >&2; exit 1; }
import importlib.util
from pathlib import Path

from datasets import Dataset
from transformers.utils.chat_template_utils import render_jinja_template

folder = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
call = {"type": "function", "function": {"name": "time", "arguments": {"zone": "UTC"}}}
calling = [
    {"role": "user", "content": "What time is it?"},
    {"role": "assistant", "content": "", "tool_calls": [call]},
]
kept = Dataset.from_list([{"messages": plain}, {"messages": calling}])[0]["messages"]
print("put in:", plain[1], "\ncame back:", kept[1])


def rendered(name, messages):
    template = (folder / f"{name}.jinja").read_text()
    try:
        return render_jinja_template([messages], chat_template=template, bos_token="")[0][0]
    except TypeError as error:
        return f"TypeError: {error}"


found = {}
for name in ("llama3_1", "deepseekv3", "qwen3"):
    before, after = rendered(name, plain), rendered(name, kept)
    assert "Hello." in before, before
    found[name] = after if after.startswith("TypeError") else after == before
    print(f"{name}: {found[name]}")
broken = [name for name, one in found.items() if isinstance(one, str)]
raise SystemExit(0 if broken == ["llama3_1", "deepseekv3"] and found["qwen3"] is True else 1)
END
