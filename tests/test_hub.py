"""The Hub: exports go up to one, and a base comes down from one. Real client, real HTTP server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import exporting
import pytest
import torch
from commands import Cli
from exporting import make_run, random_adapter
from hub_server import Hub, Repo, serving
from huggingface_hub import constants, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from srlm_lite.errors import UserError
from srlm_lite.model.base import base_files, load_base
from srlm_lite.model.checkpoint import Checkpoint
from srlm_lite.model.stack import Slot
from srlm_lite.recipe import recipe_from
from srlm_lite.run.files import read_json
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.settings import Base

TOKEN = "hf_thistokenisnobodysbusiness"
SHARDS = 4


@pytest.fixture(scope="module")
def base(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in several files."""
    folder = tmp_path_factory.mktemp("hub") / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_base_dir)
    model.save_pretrained(folder, max_shard_size="200KB")
    AutoTokenizer.from_pretrained(tiny_base_dir).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) == SHARDS
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    adapters = [random_adapter(base, seed=seed) for seed in (0, 1)]
    path = tmp_path_factory.mktemp("hub") / "run"
    return make_run(path, base, adapters=adapters, dtype="float32")


@pytest.fixture(scope="module")
def out(run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first command of these tests exports to, and the others find the export."""
    return tmp_path_factory.mktemp("hub") / "out"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(TOKEN) as state:
        yield state


@pytest.fixture
def at_the_server(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real client of this process asks the server."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    # The client waits longer and longer between its tries.
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))


@pytest.fixture
def command(cli: Cli) -> Cli:
    """`srlm-lite export ARGS`."""
    return partial(cli, "export")


@pytest.fixture
def push(run: RunDir, out: Path, command: Cli, at_the_server: None) -> Cli:
    """`srlm-lite export --push-to-hub REPO`."""

    def pushing(repo: str, *args: str) -> exporting.Done:
        return command("--adapters", run.path, "--out", out, "--push-to-hub", repo, *args)

    return pushing


@pytest.fixture
def without_xet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.mark.usefixtures("without_xet")
@pytest.mark.parametrize("how", ["refuses", "dies"])
def test_an_upload_that_breaks_off_goes_on(hub: Hub, out: Path, push: Cli, how: str) -> None:
    """Two of four files arrive; the same command sends the other two, and then commits."""
    hub.puts_allowed, hub.dies = 2, how == "dies"
    broken = push("me/model")
    assert broken.returncode == 2
    assert "The same command goes on where it stopped" in broken.stderr.splitlines()[-1]
    assert len(hub.blobs) == 2
    assert hub.repos["me/model"].files == {}  # nobody sees half of it

    stamps = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    there = set(hub.blobs)
    hub.requests.clear()
    hub.puts_allowed = 10
    done = push("me/model")
    assert done.returncode == 0, done.stderr
    assert len(hub.puts()) == SHARDS - 2 and not set(hub.puts()) & there
    repo = hub.repos["me/model"]
    assert repo.private and repo.commits == 1
    assert repo.files == {file.name: file.read_bytes() for file in out.iterdir()}
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == stamps

    hub.requests.clear()
    assert push("me/model").returncode == 0
    assert hub.puts() == [] and repo.commits == 1  # nothing is missing


def test_an_upload_by_xet_that_breaks_off_goes_on(
    hub: Hub, out: Path, push: Cli, tmp_path: Path
) -> None:
    """What the client does where the Hub offers it. The storage's chunks are packed and cannot be
    looked into; the same client puts the files together again."""
    cas = hub.offer_xet()
    cas.xorbs_allowed = 2
    broken = push("me/model")
    assert broken.returncode == 2
    assert "The same command goes on where it stopped" in broken.stderr.splitlines()[-1]
    assert len(cas.uploads) == 2 and hub.repos["me/model"].files == {}

    cas.xorbs_allowed = 10
    done = push("me/model")
    assert done.returncode == 0, done.stderr
    assert len(cas.uploads) == len(cas.xorbs) == SHARDS  # none of them twice
    assert hub.repos["me/model"].private and hub.repos["me/model"].commits == 1
    folder = snapshot_download("me/model", cache_dir=tmp_path / "again", token=TOKEN)
    files = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    assert files == {file.name: file.read_bytes() for file in out.iterdir()}


def test_a_hub_without_xet_is_said(hub: Hub, push: Cli) -> None:
    done = push("me/model")
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert "this Hub does not offer Xet. Set HF_HUB_DISABLE_XET=1" in line


@pytest.mark.usefixtures("without_xet")
@pytest.mark.parametrize("status", [401, 403, 500, 302])
def test_the_token_is_in_no_message(
    hub: Hub, out: Path, push: Cli, tmp_path: Path, status: int
) -> None:
    """Not even where the Hub quotes it, and the client what the Hub says."""
    hub.status = status
    done = push("me/model")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert {401: "accept the token", 403: "may not write", 500: "status 500", 302: "not a Hub"}[
        status
    ] in done.stderr.splitlines()[-1]
    written = "".join(
        file.read_text(errors="replace")
        for folder in (out, tmp_path)
        for file in folder.rglob("*")
        if file.is_file()
    )
    assert TOKEN not in done.stdout + done.stderr + written


@pytest.mark.usefixtures("without_xet")
def test_what_is_public_was_asked_to_be(hub: Hub, push: Cli) -> None:
    assert push("me/open", "--public").returncode == 0
    assert not hub.repos["me/open"].private
    again = push("me/open")
    assert again.returncode == 2 and "exists and is public. Say --public" in again.stderr
    assert push("me/closed").returncode == 0
    again = push("me/closed", "--public")
    assert again.returncode == 2 and "exists and is private. Leave out --public" in again.stderr
    assert hub.repos["me/open"].commits == hub.repos["me/closed"].commits == 1


@pytest.mark.usefixtures("without_xet")
def test_weights_of_another_kind_are_not_left_beside_ours(hub: Hub, push: Cli) -> None:
    """transformers would load `model.safetensors` before it looks at an index."""
    hub.repos["me/model"] = Repo(private=True, files={"model.safetensors": b"", "README.md": b""})
    done = push("me/model")
    assert done.returncode == 2 and "holds other weights (model.safetensors)" in done.stderr
    assert hub.puts() == [] and hub.repos["me/model"].commits == 0


@pytest.mark.usefixtures("without_xet")
def test_a_dry_run_lists_and_touches_nothing(
    run: RunDir, hub: Hub, push: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = ("--out", str(tmp_path / "other"))  # the last one counts
    monkeypatch.delenv("HF_TOKEN")  # a list needs none
    done = push("me/model", "--dry-run", "--json", *elsewhere)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert (listed["repo"], listed["visibility"]) == ("me/model", "private")
    assert hub.requests == []
    assert not (tmp_path / "other").exists()

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = push("me/model", *elsewhere)
    assert done.returncode == 0, done.stderr
    assert {row["file"] for row in listed["files"]} == set(hub.repos["me/model"].files)
    sizes = {row["file"]: row["bytes"] for row in listed["files"] if row["bytes"] is not None}
    files = hub.repos["me/model"].files
    assert sizes == {name: len(files[name]) for name in files if name != "parity.json"}


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [
        ("me/model", "", "there is no token for the Hub"),
        ("me/model", "hf_wrong", "the Hub does not accept the token"),
        ("model", TOKEN, "expected ORG/NAME"),
        ("a b", TOKEN, "maximum length is 96: 'a b'"),  # all that the client says
        ("me/mo--del", TOKEN, "Cannot have -- or .. in repo_id"),
    ],
)
def test_what_the_hub_would_refuse_is_one_line(
    push: Cli, monkeypatch: pytest.MonkeyPatch, repo: str, token: str, said: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    done = push(repo)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert not token or token not in done.stderr


@pytest.mark.usefixtures("without_xet")
def test_gguf_files_of_two_types_lie_side_by_side(hub: Hub, push: Cli, tmp_path: Path) -> None:
    for kind in ("f16", "q8_0"):
        out = ("--out", str(tmp_path / kind))
        done = push("me/model", "--as", "gguf", "--quantize", kind, *out)
        assert done.returncode == 0, done.stderr
        assert f"by-hand-m2-{kind}.gguf, " in done.stderr  # each large one is told of
    names = {name for name in hub.repos["me/model"].files if name.endswith(".gguf")}
    assert names == {"by-hand-m2-f16.gguf", "by-hand-m2-q8_0.gguf"}
    assert len(hub.puts()) == 2


@pytest.mark.usefixtures("at_the_server", "without_xet")
def test_an_adapter_loads_from_the_hub_as_its_card_says(
    base: Path, hub: Hub, command: Cli, tmp_path: Path
) -> None:
    """The base at the commit of the run, though the Hub's model has moved on to another one."""
    hub.publish("org/base", base)
    folder = base_files(Base(name="org/base")).folder
    adapters = [random_adapter(folder, seed=seed) for seed in (0, 1)]
    run = make_run(tmp_path / "run", "org/base", adapters=adapters, dtype="float32")
    commit = hub.repos["org/base"].revision
    local = make_run(tmp_path / "local", folder, adapters=adapters, dtype="float32")
    options = ("--as", "adapter", "--push-to-hub")
    given = ("--base-id", f"org/base@{commit}")
    for made, repo, more in ((run, "me/one", ()), (local, "me/two", given)):
        out = ("--out", tmp_path / repo)
        done = command("--adapters", made.path, *out, *options, repo, *more)
        assert done.returncode == 0, done.stderr
        assert "nobody else finds" not in done.stderr
    slot = Slot(
        load_base(Base(name=str(folder), dtype="float32")).model, targets=exporting.TARGETS, rank=8
    )
    slot.load(adapters)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    (other / "config.json").write_text((base / "config.json").read_text().replace("silu", "relu"))
    hub.publish("org/base", other)
    ids = torch.tensor([[5, 17, 99, 3, 42, 25, 7, 7, 61, 12]])
    with torch.inference_mode():
        right = slot.model(input_ids=ids).logits
        for repo in ("me/one", "me/two"):
            config = json.loads(hub.repos[repo].files["adapter_config.json"])
            assert config["base_model_name_or_path"] == "org/base" and config["revision"] == commit
            found = exporting.as_the_card_says(tmp_path / repo)(input_ids=ids).logits
            assert torch.allclose(found, right, atol=1e-4)


@pytest.mark.usefixtures("at_the_server")
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_base_from_the_hub_is_the_run_s_and_stays_so(
    base: Path, hub: Hub, command: Cli, tmp_path: Path, quantization: str
) -> None:
    """A base in several files: loaded, exported from, and named in the card by its commit.

    The Hub's model has moved on by the time that the run is gone on with, and of the export.
    """
    hub.publish("org/base", base)
    loaded = load_base(Base(name="org/base", quantization=quantization, device="cpu"))
    commit = loaded.source["revision"]
    assert commit == hub.repos["org/base"].revision
    files = base_files(Base(name="org/base"))
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        found = loaded.model.get_parameter(name).data
        assert torch.equal(found, Checkpoint(base).read(name).to(found.dtype))
    adapters = [random_adapter(files.folder, seed=seed) for seed in (0, 1)]
    run = make_run(tmp_path / "run", "org/base", adapters=adapters, quantization=quantization)
    assert read_json(run.base_json) == {**loaded.source, "revision": commit}

    hub.publish("org/base", base)
    assert hub.repos["org/base"].revision != commit
    recipe = recipe_from(run.facts()["recipe"], where="test")
    assert Session(recipe, run).base.source["revision"] == commit
    out = tmp_path / "out"
    done = command("--adapters", run.path, "--out", out, "--onto", "original")
    assert done.returncode == 0, done.stderr
    names = {file.name for file in base.glob("model*")}
    assert {file.name for file in out.glob("model*")} == names
    text = (out / "README.md").read_text()
    assert "base_model: org/base" in text and f"revision `{commit}`" in text


@pytest.mark.usefixtures("at_the_server")
@pytest.mark.parametrize("status", [401, 500])
def test_a_hub_that_refuses_a_base_is_said_without_its_words(hub: Hub, status: int) -> None:
    """They quote the token."""
    hub.status = status
    with pytest.raises(UserError, match=rf"the Hub refuses org/base \(status {status}\)") as caught:
        load_base(Base(name="org/base"))
    assert TOKEN not in str(caught.value)
