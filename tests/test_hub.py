"""Checkpoints: saved and loaded bit for bit, refused with a clear reason, and over HTTP against a local hub."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import safetensors.torch
import torch
from hub_server import OWNER, HubServer, _Handler
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from condgan import hub as hub_module
from condgan import remote
from condgan.fields import added_later
from condgan.hub import PretrainedModel, list_pretrained
from condgan.remote import CheckpointError

FILES = {"README.md", "config.json", "model.safetensors"}


@dataclass(frozen=True)
class ToyConfig:
    width: int = 3
    slope: float = 0.5
    label: str = "toy"
    bias: bool = True
    mode: Literal["plain", "fancy"] = "plain"
    objects: tuple[str, ...] = ("red cube", "blue sphere")
    sizes: tuple[int, ...] = (4, 8)
    limit: int | None = None
    extra: int = added_later(0)

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ValueError("sizes must not be empty")


class Toy(PretrainedModel):
    """A toy with what real models have: a GRU, spectral norm, tied weights and an integer buffer."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ToyConfig()
        if config.width > 50:
            raise ValueError(f"width must be at most 50, got {config.width}")
        self.rnn = nn.GRU(config.width, config.width)
        self.linear = spectral_norm(nn.Linear(config.width, config.width, bias=config.bias))
        self.norm = nn.BatchNorm1d(config.width)
        self.conv = nn.Conv2d(config.width, 4, 3).to(memory_format=torch.channels_last)
        self.first = nn.Parameter(torch.randn(2, config.width))
        self.tied = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(self.rnn(x)[0]))


class Other(Toy):
    pass


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    model = Toy(ToyConfig(width=5, slope=1.0, mode="fancy", sizes=(1, 2, 3), limit=7))
    model(torch.randn(6, 5))  # a training step's worth of statistics
    return model


@pytest.fixture
def folder(toy: Toy, tmp_path: Path) -> Path:
    return toy.save_pretrained(tmp_path / "saved")


def assert_same(loaded: nn.Module, saved: nn.Module) -> None:
    state, wanted = loaded.state_dict(), saved.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, changes: dict[str, Tensor | None]) -> None:
    path = folder / "model.safetensors"
    tensors: dict[str, Tensor | None] = {**safetensors.torch.load_file(path), **changes}
    safetensors.torch.save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def refused(folder: Path | str, *words: str, model: type[PretrainedModel] = Toy, **options: Any) -> None:
    """Loading fails with one line that has all these words."""
    with pytest.raises(CheckpointError) as error:
        model.from_pretrained(folder, **options)
    message = str(error.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


# Folders


def test_a_folder_gives_back_the_model_bit_for_bit(toy: Toy, folder: Path) -> None:
    loaded = Toy.from_pretrained(str(folder))
    assert loaded.config == toy.config
    assert isinstance(loaded.config.sizes, tuple)
    assert_same(loaded, toy)
    assert not loaded.training
    x = torch.randn(4, 5)
    assert torch.equal(loaded(x), toy.eval()(x))


def test_a_folder_holds_three_files_that_others_may_read(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES
    plain = folder / "plain"
    plain.touch()
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {stat.S_IMODE(plain.stat().st_mode)}


def test_loading_leaves_the_random_state_alone(folder: Path) -> None:
    before = torch.random.get_rng_state()
    Toy.from_pretrained(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_half_precision_is_stored_small_and_loads_as_float32(toy: Toy, tmp_path: Path, dtype: torch.dtype) -> None:
    full = toy.save_pretrained(tmp_path / "full") / "model.safetensors"
    half = toy.save_pretrained(tmp_path / "half", dtype=dtype) / "model.safetensors"
    stored = safetensors.torch.load_file(half)
    assert {tensor.dtype for tensor in stored.values()} == {dtype, torch.int64}
    assert half.stat().st_size < full.stat().st_size
    loaded = Toy.from_pretrained(half.parent).state_dict()
    for name, tensor in toy.state_dict().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor.to(stored[name].dtype).to(tensor.dtype))


def test_weights_that_half_precision_cannot_hold_are_not_saved(toy: Toy, tmp_path: Path) -> None:
    with torch.no_grad():
        toy.first[0] = 1e6
    with pytest.raises(CheckpointError, match=r"first .*float16"):
        toy.save_pretrained(tmp_path / "new", dtype=torch.float16)
    with pytest.raises(ValueError, match="floating"):
        toy.save_pretrained(tmp_path / "new", dtype=torch.int8)
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype such as torch\.float16, got 'float16'"):
        toy.save_pretrained(tmp_path / "new", dtype="float16")
    assert not (tmp_path / "new").exists()


def test_a_config_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    model = Toy()
    model.config = replace(model.config, width=3.0)
    with pytest.raises(CheckpointError, match='"width" must be int'):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("last", sorted(FILES))
def test_a_save_that_fails_changes_nothing(toy: Toy, folder: Path, monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    (folder / "README.md").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write = Path.write_bytes

    def write_until_the_disk_is_full(path: Path, content: bytes) -> int:
        if path.name == last:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_until_the_disk_is_full)
    with pytest.raises(CheckpointError, match=r"cannot save to .*saved: .*No space left"):
        Toy().save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert_same(Toy.from_pretrained(folder), toy)


def test_saving_again_replaces_the_files_and_only_these(toy: Toy, folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    torch.manual_seed(1)
    new = Toy()
    new.save_pretrained(folder)
    assert_same(Toy.from_pretrained(folder), new)
    assert {path.name for path in folder.iterdir()} == FILES | {"notes.txt"}


def test_a_card_that_somebody_has_written_into_stays(toy: Toy, folder: Path) -> None:
    written = toy.model_card() + "Likes the sea."
    (folder / "README.md").write_text(written)
    Toy().save_pretrained(folder)
    assert (folder / "README.md").read_text() == written
    (folder / "README.md").unlink()
    toy.save_pretrained(folder)
    assert (folder / "README.md").read_text() == toy.model_card()


def test_a_folder_that_cannot_be_written_is_named(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot save to .*model: .*you may write"):
        toy.save_pretrained(tmp_path / "file" / "model")


def test_a_map_location_is_where_the_model_goes(folder: Path) -> None:
    assert Toy.from_pretrained(folder, map_location="meta").first.device.type == "meta"


def test_the_card_tells_what_the_model_is(toy: Toy) -> None:
    import yaml

    card = toy.model_card()
    header = yaml.safe_load(card.split("---\n")[1])
    assert "license" not in header, "that is for who trained it to say"
    assert {"condgan", "Toy"} <= set(header["tags"])
    assert f"{sum(p.numel() for p in toy.parameters()):,} parameters" in card
    assert "A toy with what real models have" in card
    assert "| sizes | 1, 2, 3 |" in card
    snippet = card.split("```python\n")[1].split("```")[0]
    assert "from test_hub import Toy\n" in snippet
    compile(snippet, "card", "exec")


# Folders that are refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wdith": 3}, ["config.json", "unknown wdith", "ToyConfig"]),
        ({"model_type": "Other"}, ["config.json", "model type Other", "Other.from_pretrained"]),
        ({"format_version": 2, "condgan_version": "9.1"}, ["format_version 2", "condgan 9.1", "upgrade condgan"]),
        ({"format_version": "1"}, ["format_version", "'1'"]),
        ({"format_version": True}, ["format_version", "True"]),
        ({"model_type": None}, ["model_type", "None"]),
        ({"width": "5"}, ['"width" must be int', "'5'"]),
        ({"width": 5.0}, ['"width" must be int', "5.0"]),
        ({"width": True}, ['"width" must be int', "True"]),
        ({"slope": "steep"}, ['"slope" must be float', "'steep'"]),
        ({"slope": False}, ['"slope" must be float', "False"]),
        ({"label": 1}, ['"label" must be str', "1"]),
        ({"bias": 1}, ['"bias" must be bool', "1"]),
        ({"mode": "other"}, ['"mode" must be', "plain", "fancy", "'other'"]),
        ({"objects": ["red cube", 3]}, ['"objects" must be tuple[str, ...]', "3"]),
        ({"objects": "red cube"}, ['"objects" must be tuple[str, ...]', "'red cube'"]),
        ({"sizes": [1, 2.5]}, ['"sizes" must be tuple[int, ...]', "2.5"]),
        ({"limit": "none"}, ['"limit" must be int | None', "'none'"]),
        ({"sizes": []}, ["config.json", "sizes must not be empty"]),
        ({"width": 51}, ["config.json", "width must be at most 50, got 51"]),
        ({"width": -1}, ["config.json", "does not describe a model"]),
    ],
)
def test_a_config_that_is_wrong_is_refused(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    change_config(folder, **changes)
    refused(folder, *words)


class Tower(PretrainedModel):
    """Grows with its config as no toy may; it counts its floors while it is built."""

    config_class = ToyConfig
    floors: ClassVar[list[int]] = []

    def __init__(self, config: ToyConfig | None = None) -> None:
        super().__init__()
        self.config = self.given_or_default(config)
        for floor in range(self.config.width):
            self.floors.append(floor)
            setattr(self, f"floor{floor}", nn.Linear(10, 10))


def test_a_config_that_asks_for_far_more_than_the_file_holds_is_refused_while_it_is_built(tmp_path: Path) -> None:
    tower = Tower(ToyConfig(width=5))
    folder = tower.save_pretrained(tmp_path / "tower")
    assert_same(Tower.from_pretrained(folder), tower)
    change_config(folder, width=10_000)
    Tower.floors.clear()
    refused(folder, "config.json does not describe", "many times as large as what is stored", model=Tower)
    assert 5 < len(Tower.floors) < 1000
    Tower(ToyConfig(width=2000))  # who builds one himself may have it as high as he likes


def test_an_int_is_a_float_too(toy: Toy, folder: Path) -> None:
    change_config(folder, slope=1)
    slope = Toy.from_pretrained(folder).config.slope
    assert isinstance(slope, float) and slope == toy.config.slope


def test_a_key_that_is_missing_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["mode"], config["width"]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "config.json", "missing mode, width")


def test_a_checkpoint_from_before_a_setting_was_added_has_its_default(folder: Path) -> None:
    change_config(folder, extra=3)
    assert Toy.from_pretrained(folder).config.extra == 3
    config = json.loads((folder / "config.json").read_text())
    del config["extra"]
    (folder / "config.json").write_text(json.dumps(config))
    assert Toy.from_pretrained(folder).config.extra == 0


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\xff", b"[1]", b"[" * 100_000])
def test_a_config_that_is_not_an_object_of_json_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json", "JSON")


@pytest.mark.parametrize("filename", ["config.json", "model.safetensors"])
def test_a_file_that_is_missing_is_named(folder: Path, filename: str) -> None:
    (folder / filename).unlink()
    refused(folder, str(folder), f"has no {filename}")


@pytest.mark.parametrize("filename", ["pytorch_model.bin", "model.pt"])
@pytest.mark.parametrize("with_config", [True, False])
def test_pickled_weights_are_never_opened(folder: Path, toy: Toy, filename: str, with_config: bool) -> None:
    (folder / "model.safetensors").unlink()
    if not with_config:
        (folder / "config.json").unlink()
    torch.save(toy.state_dict(), folder / filename)
    refused(folder, filename, "pickled", "weights_only=True", "save_pretrained")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"first": None, "norm.weight": None}, ["missing: first, norm.weight"]),
        ({"extra": torch.zeros(2)}, ["unexpected: extra"]),
        ({"first": torch.zeros(2, 4)}, ["first is float(2, 4), wanted float(2, 5)"]),
        ({"norm.num_batches_tracked": torch.tensor(1.0)}, ["norm.num_batches_tracked is float()", "torch.int64()"]),
        ({f"extra{i}": torch.zeros(1) for i in range(8)}, ["extra0", "extra4", "and 3 more"]),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, changes: dict[str, Tensor | None], words: list[str]) -> None:
    change_tensors(folder, changes)
    refused(folder, "model.safetensors", *words)


@pytest.mark.parametrize("keep", [0, 4, -1])
def test_weights_that_are_damaged_are_refused(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, str(path), "cut short or damaged", "delete this file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode == os.R_OK and Path(path).name == name))
    refused(folder, str(folder / name), "you may not read it: change its permissions")


# Names


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that ships two toys and one other model, and knows one on the hub."""
    root = tmp_path / "pretrained"
    for name, model in (("toy-b", Toy()), ("toy-a", Toy()), ("special", Other())):
        model.save_pretrained(root / name)
    monkeypatch.setattr(hub_module, "SHIPPED", root)
    monkeypatch.setattr(hub_module, "PUBLISHED", (("org/toy-large", "Toy"),))
    monkeypatch.chdir(tmp_path)
    return root


@pytest.mark.parametrize("name", ["~nosuch/x", "x" * 300])
def test_names_that_cannot_be_looked_for_are_refused_like_others(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name[:79]}.* cannot be looked for .*: check the name"):
        Toy.from_pretrained(name)


def test_a_model_is_not_saved_to_a_folder_without_a_name(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot save to '': give the name of a folder, or '\.' for the one you"):
        toy.save_pretrained("")
    assert [*tmp_path.iterdir()] == []
    toy.save_pretrained(".")
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_a_folder_of_a_user_who_is_not_there_is_refused(toy: Toy) -> None:
    with pytest.raises(CheckpointError, match=r"cannot save to ~nosuch/x: .* Give a folder that you may write to"):
        toy.save_pretrained("~nosuch/x")


def test_the_list_has_shipped_names_first_by_type(shipped: Path) -> None:
    assert list_pretrained("Toy") == ["toy-a", "toy-b", "org/toy-large"]
    assert list_pretrained("Other") == ["special"]
    assert list_pretrained(None) == ["special", "toy-a", "toy-b", "org/toy-large"]
    assert list_pretrained() == []
    with pytest.raises(TypeError, match="model_type must be the name of a class, such as 'SceneClassifier', got <c"):
        list_pretrained(Toy)


def test_what_ships_is_found_by_name_and_by_default(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(Toy.from_pretrained("toy-b"), Toy.from_pretrained(shipped / "toy-b"))
    refused("special", "holds the model type Other, wanted is Toy")
    with pytest.raises(CheckpointError, match=r"Toy has no default checkpoint.*toy-a"):
        Toy.from_pretrained()
    monkeypatch.setattr(Toy, "default_pretrained", "toy-a")
    assert_same(Toy.from_pretrained(), Toy.from_pretrained(shipped / "toy-a"))


def test_a_folder_here_does_not_hide_what_ships_under_its_name(shipped: Path) -> None:
    here = Toy(ToyConfig(width=7)).save_pretrained(shipped.parent / "toy-a")
    assert_same(Toy.from_pretrained("toy-a"), Toy.from_pretrained(shipped / "toy-a"))
    for path in ("./toy-a", "toy-a/", str(here), Path("toy-a")):
        assert_same(Toy.from_pretrained(path), Toy.from_pretrained(here))
    here.rename(shipped.parent / "mine")
    assert Toy.from_pretrained("mine").config.width == 7, "any other name may be that of a folder"


def test_a_name_that_is_unknown_gets_a_guess(shipped: Path) -> None:
    refused("toyb", "unknown checkpoint 'toyb'", "did you mean 'toy-b'?", "list_pretrained")
    refused("", "unknown checkpoint ''")
    refused("a b/c", "unknown checkpoint 'a b/c'")


@pytest.mark.parametrize("name", ["./nowhere", "no/where/at-all", "nowhere/", "~/nowhere-at-all", Path("nowhere")])
def test_a_path_that_is_not_there_is_never_a_hub_id(shipped: Path, name: str | Path) -> None:
    refused(name, "nowhere" if "nowhere" in str(name) else "at-all", "does not exist")


def test_a_file_is_not_a_folder(folder: Path) -> None:
    refused(folder / "model.safetensors", "is a file", "folder that it is in")


def test_arguments_that_make_no_sense_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="revision='v1' is for hub ids"):
        Toy.from_pretrained(folder, revision="v1")
    with pytest.raises(TypeError, match="name must be a string or a path, got 7"):
        Toy.from_pretrained(7)


# The hub, over HTTP


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub of our own with an empty cache; ``huggingface_hub`` has read its settings, so they are set in place."""
    from huggingface_hub import close_session, constants

    for name in [name for name in os.environ if name.startswith("HF_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between retries
    with HubServer() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_STORED_TOKENS_PATH": str(tmp_path / "stored_tokens"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        close_session()
        yield server
        close_session()


@pytest.fixture
def commit(hub: HubServer, folder: Path) -> str:
    """Hash of the only commit of the repository "org/toy"."""
    return hub.commit("org/toy", {path.name: path.read_bytes() for path in folder.iterdir()})


def test_the_first_load_downloads_and_the_second_does_not(hub: HubServer, commit: str, toy: Toy) -> None:
    assert_same(Toy.from_pretrained("org/toy"), toy)
    assert hub.downloads() == ["config.json"]  # the weights come from the storage that the HEAD names
    gets = [request.path for request in hub.requests if request.method == "GET" and "/lfs/" in request.path]
    assert len(gets) == 1
    seen = len(hub.requests)
    assert_same(Toy.from_pretrained("org/toy"), toy)
    assert {request.method for request in hub.requests[seen:]} == {"HEAD"}


def test_what_was_loaded_once_loads_offline(
    hub: HubServer, commit: str, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    Toy.from_pretrained("org/toy", cache_dir=tmp_path / "mine")
    seen = len(hub.requests)
    assert_same(Toy.from_pretrained("org/toy", cache_dir=tmp_path / "mine", local_files_only=True), toy)
    assert len(hub.requests) == seen
    refused("org/toy", "config.json", "not in the cache", "local_files_only", local_files_only=True)
    hub.stop()
    assert_same(Toy.from_pretrained("org/toy", cache_dir=tmp_path / "mine"), toy)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("org/toy", "not in the cache", "HF_HUB_OFFLINE")


def test_both_files_come_from_one_commit(
    hub: HubServer, commit: str, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody pushes a model of another size between our two requests."""
    import huggingface_hub

    download = huggingface_hub.hf_hub_download
    other = Toy(ToyConfig(width=7)).save_pretrained(tmp_path / "other")

    def download_then_push(*args: Any, **options: Any) -> str:
        path = download(*args, **options)
        hub.commit("org/toy", {file.name: file.read_bytes() for file in other.iterdir()})
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download_then_push)
    assert_same(Toy.from_pretrained("org/toy"), toy)


def test_a_revision_can_be_pinned(hub: HubServer, commit: str, toy: Toy, tmp_path: Path) -> None:
    new = Toy().save_pretrained(tmp_path / "new")
    hub.commit("org/toy", {path.name: path.read_bytes() for path in new.iterdir()})
    assert Toy.from_pretrained("org/toy").config == ToyConfig()
    assert_same(Toy.from_pretrained("org/toy", revision=commit), toy)
    seen = len(hub.requests)
    assert_same(Toy.from_pretrained("org/toy", revision=commit), toy)
    assert len(hub.requests) == seen, "a commit never changes: nothing to ask"


def test_what_is_missing_on_the_hub_is_named(hub: HubServer, commit: str, folder: Path) -> None:
    refused("org/nothing", "'org/nothing'", "no such repository", "token=")
    refused("org/nothing", "'org/nothing'", "no such repository", token="hf_secret")
    refused("org/toy", "'org/toy'", "no revision 'v9'", "branch", revision="v9")
    hub.commit("org/old", {"config.json": (folder / "config.json").read_bytes(), "pytorch_model.bin": b"pickle"})
    refused("org/old", "'org/old'", "model.safetensors", "no such file")
    hub.commit("org/empty", {"README.md": b"nothing here"})
    refused("org/empty", "'org/empty'", "config.json", "no such file")
    refused("org--x/toy", "'org--x/toy'", "looks like 'org/repo'")
    hub.gated.add("org/toy")
    refused("org/toy", "'org/toy'", "gated", "ask for access")


@pytest.fixture
def hub_warnings() -> Iterator[list[str]]:
    """What ``huggingface_hub`` logs at its usual level, of warnings; afterwards it has to be at that level still."""
    said: list[str] = []
    logger, handler = logging.getLogger("huggingface_hub"), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)
    assert logger.level == logging.WARNING
    logger.setLevel(before)


def test_several_threads_may_quieten_the_hub_at_once(hub_warnings: list[str]) -> None:
    logger = logging.getLogger("huggingface_hub")
    first, second = remote._quiet_hub(), remote._quiet_hub()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logger.level == logging.ERROR
    second.__exit__(None, None, None)
    assert logger.level == logging.WARNING


def test_a_hub_that_is_down_is_told_at_once(
    hub: HubServer, commit: str, toy: Toy, hub_warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.stop()
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    refused("org/toy", "'org/toy'", "nor is there a folder of that name", "hub does not answer", "check the connection")
    assert (waits, hub_warnings) == ([], [])
    with pytest.raises(CheckpointError, match=r"cannot upload to 'org/toy': check the connection"):
        toy.push_to_hub("org/toy", token="hf_secret")


def test_a_hub_that_is_overloaded_is_asked_again_without_a_word(
    hub: HubServer, commit: str, toy: Toy, hub_warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    respond, left = _Handler._respond, 4

    def overloaded(handler: _Handler, *args: Any, **options: Any) -> None:
        nonlocal left
        left -= 1
        return respond(handler, 503) if left >= 0 else respond(handler, *args, **options)

    monkeypatch.setattr(_Handler, "_respond", overloaded)
    assert_same(Toy.from_pretrained("org/toy"), toy)
    left = 1000
    refused("org/other", "'org/other'", "nor is there a folder of that name", "hub does not answer")
    assert hub_warnings == []


@pytest.mark.parametrize("cut", ["shorter", "dropped"])
def test_a_download_that_breaks_off_leaves_nothing_behind(
    hub: HubServer, commit: str, toy: Toy, cut: Literal["shorter", "dropped"]
) -> None:
    hub.cut = cut
    refused("org/toy", "cannot download model.safetensors from 'org/toy'", "try again")
    hub.cut = None
    assert_same(Toy.from_pretrained("org/toy"), toy)


def test_a_truncated_file_in_the_cache_is_named_and_deleting_it_helps(hub: HubServer, commit: str, toy: Toy) -> None:
    hub.cut = "whole"
    with pytest.raises(CheckpointError, match=r"cut short or damaged .* delete this file") as error:
        Toy.from_pretrained("org/toy")
    hub.cut = None
    refused("org/toy", "cut short or damaged")
    Path(str(error.value).split(" is cut short")[0]).unlink()
    assert_same(Toy.from_pretrained("org/toy"), toy)


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: HubServer, commit: str) -> None:
    Toy.from_pretrained("org/toy", token="hf_secret")
    tokens = {("/lfs/" in request.path, request.token) for request in hub.requests if "/api/" not in request.path}
    assert tokens == {(False, "Bearer hf_secret"), (True, None)}
    hub.requests.clear()
    Toy.from_pretrained("org/toy")
    assert {request.token for request in hub.requests} == {None}


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's upload
def test_what_was_pushed_loads_bit_for_bit(hub: HubServer, toy: Toy) -> None:
    url = toy.push_to_hub("org/new", token="hf_secret", commit_message="A toy")
    oid = url.removeprefix(f"{hub.url}/org/new/commit/")
    assert set(hub.repos["org/new"][oid]) == FILES | {".gitattributes"}
    assert sum("/commit/" in request.path for request in hub.requests) == 1
    assert_same(Toy.from_pretrained("org/new", revision=oid), toy)
    assert hub.private == set()
    torch.manual_seed(1)
    new = Toy()
    second = new.push_to_hub("org/new", token="hf_secret")
    assert second != url
    assert_same(Toy.from_pretrained("org/new"), new)
    hub.repos["org/new"]["main"]["README.md"] = b"written on the hub's page"
    toy.push_to_hub("org/new", token="hf_secret")
    assert_same(Toy.from_pretrained("org/new"), toy)
    assert hub.repos["org/new"]["main"]["README.md"] == b"written on the hub's page"
    new.push_to_hub("org/mine", private=True, token="hf_secret", dtype=torch.float16)
    assert hub.private == {"org/mine"}
    half = new.state_dict()["first"].half()
    assert torch.equal(Toy.from_pretrained("org/mine", token="hf_secret").first, half.float())
    url = new.push_to_hub("own", token="hf_secret")
    assert url.startswith(f"{hub.url}/{OWNER}/own/commit/"), "a name alone is one of the user's own"
    card = hub.repos[f"{OWNER}/own"]["main"]["README.md"].decode()
    assert f'Toy.from_pretrained("{OWNER}/own")' in card
    hub.repos["org/new"]["dev"] = hub.repos["org/new"]["main"]
    new.push_to_hub("org/new", token="hf_secret", revision="dev")
    assert_same(Toy.from_pretrained("org/new", revision="dev"), new)
    hub.repos[f"{OWNER}/own"]["dev"] = hub.repos[f"{OWNER}/own"]["main"]
    toy.push_to_hub("own", token="hf_secret", revision="dev")
    assert_same(Toy.from_pretrained(f"{OWNER}/own", revision="dev"), toy)


def test_a_push_that_is_refused_says_why(
    hub: HubServer, commit: str, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"cannot upload to 'org/toy': .*hf auth login"):
        toy.push_to_hub("org/toy")
    with pytest.raises(CheckpointError, match="no revision 'v9'"):
        toy.push_to_hub("org/toy", token="hf_secret", revision="v9")
    with pytest.raises(CheckpointError, match="cannot upload to 'org/none'"):
        toy.push_to_hub("org/none", token="hf_secret", revision="v9")
    assert "org/none" not in hub.repos
    with pytest.raises(CheckpointError, match="no token is stored"):
        toy.push_to_hub("org/toy", token=True)
    assert set(hub.repos["org/toy"]) == {"main", commit}


LOAD = """
import sys
import test_hub
assert "huggingface_hub" not in sys.modules, "it is slow to import"
loaded = test_hub.Toy.from_pretrained("org/toy")
test_hub.assert_same(loaded, test_hub.Toy.from_pretrained(sys.argv[1]))
"""


def test_the_environment_says_where_the_hub_and_the_cache_are(
    hub: HubServer, commit: str, folder: Path, tmp_path: Path
) -> None:
    """As users have it: settings in the environment of a fresh process, first online, then offline."""
    paths = [str(Path(__file__).parent), str(Path(hub_module.__file__).parents[1]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_ENDPOINT": hub.url}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret"}
    command = [sys.executable, "-W", "error", "-c", LOAD, str(folder)]
    subprocess.run(command, env=environment, check=True)
    assert hub.downloads() == ["config.json"]
    assert "Bearer hf_secret" in {request.token for request in hub.requests}
    assert (tmp_path / "home" / "hub" / "models--org--toy").is_dir()
    seen = len(hub.requests)
    subprocess.run(command, env=environment | {"HF_HUB_OFFLINE": "1"}, check=True)
    assert len(hub.requests) == seen
