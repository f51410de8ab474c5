"""Tiles by device, and their tuning: measured only where asked for, once per kind, kept on disk, never per length."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sightline as sl

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources
from triton_cases import variant_of

from sightline.triton import tiles, tuning
from sightline.triton.problem import Variant
from sightline.triton.tiles import CANDIDATES, Tile


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A device that is not there, and a tuning file of its own."""
    for module in (tiles, tuning):
        monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "compiles_for_amd", lambda: False)
    monkeypatch.setattr(tiles, "has_hopper_memory", lambda: True)
    monkeypatch.setattr(tiles, "has_tensor_descriptors", lambda: True)
    monkeypatch.setattr(tiles, "has_tensor_memory", lambda: False)
    monkeypatch.setattr(tiles, "has_warp_specialization", lambda: False)
    monkeypatch.setattr(tiles, "is_small_blackwell", lambda: False)
    monkeypatch.setattr(tuning, "target_name", lambda: "cuda-90")
    monkeypatch.setattr(tuning, "is_capturing", lambda: False)
    monkeypatch.setenv("SIGHTLINE_TUNING", str(tmp_path / "folder" / "tiles.json"))
    monkeypatch.setenv("SIGHTLINE_AUTOTUNE", "1")
    tuning._tuned_tiles.cache_clear()
    return tmp_path / "folder" / "tiles.json"


class Launches:
    """Records the tiles it is launched with; its clock says how long each would take."""

    def __init__(self, seconds: Callable[[Tile], float]) -> None:
        self.seconds, self.tiles = seconds, []

    def __call__(self, tile: Tile) -> None:
        self.tiles.append(tile)

    def time(self, call: Callable[[], None]) -> float:
        call()
        return self.seconds(self.tiles[-1])


def tune(launches: Launches, kernel: str, variant: Variant, describable: bool = True) -> Tile:
    return tuning.tile_for(kernel, variant, launches, lambda: describable, launches.time)


def test_the_fastest_candidate_is_kept_for_every_length_and_every_later_process(hopper: Path) -> None:
    wanted = CANDIDATES["forward", "half"][1]
    launches = Launches(lambda tile: 1.0 if tile == wanted else 2.0)
    assert tune(launches, "forward", variant_of(sl.Softmax())) == wanted
    assert set(launches.tiles) == {
        tiles.choose_tile("forward", variant_of(sl.Softmax())),
        *(tile for tile in CANDIDATES["forward", "half"] if not tile.specialized),
    }
    for length in (1, 77, 131072):
        assert tune(Launches(pytest.fail), "forward", variant_of(sl.Softmax(), length=length)) == wanted
    tuning._tuned_tiles.cache_clear()
    assert tune(Launches(pytest.fail), "forward", variant_of(sl.Softmax())) == wanted
    assert json.loads(hopper.read_text())["target"] == "cuda-90"


def test_the_default_stays_unless_another_clearly_wins() -> None:
    variant = variant_of(sl.LSSA())
    default = tiles.choose_tile("forward", variant)
    assert tune(Launches(lambda tile: 1.0 if tile == default else 0.99), "forward", variant) == default


def test_nothing_is_measured_unless_asked_for(monkeypatch: pytest.MonkeyPatch, hopper: Path) -> None:
    monkeypatch.delenv("SIGHTLINE_AUTOTUNE")
    launches = Launches(pytest.fail)
    variant = variant_of(sl.Softmax())
    assert tune(launches, "forward", variant) == tiles.choose_tile("forward", variant)
    assert launches.tiles == []
    assert not hopper.exists()


def test_nothing_is_measured_inside_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "is_capturing", lambda: True)
    variant = variant_of(sl.Softmax())
    assert tune(Launches(pytest.fail), "forward", variant) == tiles.choose_tile("forward", variant)


def test_a_candidate_that_does_not_fit_is_passed_over() -> None:
    *_, last = CANDIDATES["queries", "half"]

    def seconds(tile: Tile) -> float:
        if tile.rows == 128 and tile in CANDIDATES["queries", "half"]:
            raise OutOfResources(300000, 232448, "shared memory")
        return 1.0 if tile == last else 2.0

    assert tune(Launches(seconds), "queries", variant_of(sl.Softmax(), width=128)) == last


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"kernels": "other", "target": "cuda-90", "tiles": {}}',
        "{half",
        '{"kernels": "FINGERPRINT", "target": "cuda-80", "tiles": {"NAME": [16, 16, 4, 1]}}',
        '{"kernels": "FINGERPRINT", "target": "cuda-90", "tiles": {"NAME": [16]}}',
    ],
)
def test_a_file_of_others_or_a_broken_one_is_not_used(
    content: str, hopper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SIGHTLINE_AUTOTUNE")
    variant = variant_of(sl.Softmax())
    name = tuning.kind("forward", variant)
    hopper.parent.mkdir()
    hopper.write_text(content.replace("FINGERPRINT", tuning.kernels_fingerprint()).replace("NAME", name))
    assert tune(Launches(pytest.fail), "forward", variant) == tiles.choose_tile("forward", variant)


def test_a_file_of_this_device_is_used(hopper: Path) -> None:
    variant = variant_of(sl.Softmax())
    content = {"kernels": tuning.kernels_fingerprint(), "target": "cuda-90"}
    hopper.parent.mkdir()
    hopper.write_text(json.dumps({**content, "tiles": {tuning.kind("forward", variant): [16, 32, 4, 1]}}))
    assert tune(Launches(pytest.fail), "forward", variant) == Tile(16, 32, 4, 1)


@pytest.mark.parametrize("numbers", [[16, 32, 4, 1, True, False], [16, 32, 4, 1, 1, 0]])
def test_a_tile_with_descriptors_is_kept_and_given_to_tensors_that_suit_it(numbers: list[Any], hopper: Path) -> None:
    variant = variant_of(sl.Softmax())
    content = {"kernels": tuning.kernels_fingerprint(), "target": "cuda-90"}
    hopper.parent.mkdir()
    hopper.write_text(json.dumps({**content, "tiles": {tuning.kind("forward", variant): numbers}}))
    assert tune(Launches(pytest.fail), "forward", variant) == Tile(16, 32, 4, 1, descriptors=True)
    default = tiles.choose_tile("forward", variant)
    assert tune(Launches(pytest.fail), "forward", variant, describable=False) == default


def test_a_fastest_tile_with_descriptors_is_read_again_as_it_was(hopper: Path) -> None:
    launches = Launches(lambda tile: 1.0 if tile.descriptors else 2.0)
    best = tune(launches, "queries", variant_of(sl.Softmax()))
    assert best.descriptors
    tuning._tuned_tiles.cache_clear()
    assert tune(Launches(pytest.fail), "queries", variant_of(sl.Softmax())) == best


def test_tensors_that_suit_no_descriptor_measure_none() -> None:
    launches = Launches(lambda tile: 1.0)
    tune(launches, "forward", variant_of(sl.Softmax()), describable=False)
    assert launches.tiles
    assert not any(tile.descriptors for tile in launches.tiles)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("specialization", [False, True])
def test_candidates_are_those_of_the_device(
    descriptors: bool, specialization: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "has_tensor_descriptors", lambda: descriptors)
    monkeypatch.setattr(tiles, "has_warp_specialization", lambda: specialization)
    for weighting in (sl.Softmax(), sl.LSSA(), sl.LSSAR()):
        found = tiles.candidates("forward", variant_of(weighting))
        assert any(tile.descriptors for tile in found) is descriptors
        assert any(tile.specialized for tile in found) is (descriptors and specialization)
    assert all(tile.descriptors or not tile.specialized for group in CANDIDATES.values() for tile in group)


@pytest.mark.parametrize(
    ("weighting", "dtype", "width", "specialized"),
    [
        (sl.Softmax(), torch.float16, 64, True),
        (sl.Softmax(), torch.bfloat16, 128, False),
        (sl.LSSA(), torch.bfloat16, 128, True),
        (sl.LSSA(), torch.float16, 64, False),
        (sl.LSSAR(), torch.bfloat16, 64, True),
        (sl.LSSAR(), torch.bfloat16, 128, False),
        (sl.LSSAR(), torch.float32, 64, False),
        (sl.LSSAR(2.5), torch.bfloat16, 64, False),
        (sl.Softmax(reweight=sl.Reweight(3.0)), torch.bfloat16, 64, False),
        (sl.Softmax(softcap=1.5), torch.bfloat16, 64, False),
        (sl.Softmax(), torch.bfloat16, 32, False),
    ],
)
def test_only_what_the_compiler_splits_without_spilling_is_specialised(
    weighting: Any, dtype: torch.dtype, width: int, specialized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "has_warp_specialization", lambda: True)
    found = tiles.candidates("forward", variant_of(weighting, dtype=dtype, width=width))
    assert any(tile.specialized for tile in found) is specialized


def test_a_loop_that_cannot_be_specialised_is_passed_over_and_other_errors_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "has_warp_specialization", lambda: True)

    def refusing(attribute: str) -> Launches:
        def seconds(tile: Tile) -> float:
            if getattr(tile, attribute):
                raise RuntimeError("PassManager::run failed")
            return 1.0

        return Launches(seconds)

    assert not tune(refusing("specialized"), "forward", variant_of(sl.LSSA())).specialized
    with pytest.raises(RuntimeError, match="PassManager"):
        tune(refusing("descriptors"), "forward", variant_of(sl.Softmax()))


def test_a_place_that_cannot_be_written_is_no_error(hopper: Path) -> None:
    hopper.parent.write_text("a file where the folder should be")
    wanted = CANDIDATES["forward", "half"][0]
    launches = Launches(lambda tile: 1.0 if tile == wanted else 2.0)
    assert tune(launches, "forward", variant_of(sl.Softmax())) == wanted
    assert tune(Launches(pytest.fail), "forward", variant_of(sl.Softmax())) == wanted


def test_what_is_no_file_is_not_replaced(hopper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper.mkdir(parents=True)
    replaced: list[Path] = []
    monkeypatch.setattr(Path, "replace", lambda source, target: replaced.append(target))
    tuning.TunedTiles(hopper).keep("one", Tile(16, 16, 4, 1))
    assert replaced == []
    assert [path.name for path in hopper.parent.iterdir()] == [hopper.name]


def test_two_processes_that_tune_keep_what_the_other_found(hopper: Path) -> None:
    first, second = tuning.TunedTiles(hopper), tuning.TunedTiles(hopper)
    first.keep("one", Tile(16, 16, 4, 1))
    second.keep("two", Tile(32, 32, 4, 1))
    assert set(tuning.TunedTiles(hopper).tiles) == {"one", "two"}
    assert [path.name for path in hopper.parent.iterdir()] == [hopper.name]


def test_kinds_tell_apart_what_is_compiled_differently_and_nothing_else() -> None:
    variants = [
        variant_of(sl.Softmax()),
        variant_of(sl.LSSA()),
        variant_of(sl.LSSAR()),
        variant_of(sl.LSSAR(), saves=True),
        variant_of(sl.Softmax(), width=128),
        variant_of(sl.Softmax(), dtype=torch.float32),
    ]
    assert len({tuning.kind("forward", variant) for variant in variants}) == len(variants)
    assert tuning.kind("forward", variant_of(sl.LSSA(), length=7)) == tuning.kind("forward", variant_of(sl.LSSA()))


@pytest.mark.parametrize("large", [False, True])
def test_every_kernel_has_a_default_and_large_tiles_go_to_large_chips(
    large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "has_hopper_memory", lambda: large)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for weighting in (sl.Softmax(), sl.LSSAR()):
            for width in (8, 64, 100, 256):
                for saves in (False, True):
                    variant = variant_of(weighting, width=width, dtype=dtype, saves=saves)
                    for kernel in ("forward", "decode", "rows", "queries", "keys", "mask"):
                        tile = tiles.choose_tile(kernel, variant)
                        assert all(number > 0 and number & (number - 1) == 0 for number in tile[:3])
    assert (tiles.choose_tile("forward", variant_of(sl.Softmax(), width=128)).rows == 128) is large


def test_small_chips_of_blackwell_have_a_smaller_tile_where_that_of_ampere_spills(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "has_hopper_memory", lambda: False)
    sharp = variant_of(sl.LSSAR(), width=128, dtype=torch.bfloat16, saves=True)
    others = [
        variant_of(sl.LSSAR(), width=128, dtype=torch.bfloat16, saves=False),
        variant_of(sl.LSSAR(), width=64, dtype=torch.bfloat16, saves=True),
    ]
    kernels = ("forward", "queries", "keys")
    ampere = {kernel: [tiles.choose_tile(kernel, variant) for variant in (sharp, *others)] for kernel in kernels}
    monkeypatch.setattr(tiles, "is_small_blackwell", lambda: True)
    small = {kernel: [tiles.choose_tile(kernel, variant) for variant in (sharp, *others)] for kernel in kernels}
    assert small["forward"][0] == Tile(32, 32, 8, 2) != ampere["forward"][0]
    small["forward"][0] = ampere["forward"][0]
    assert small == ampere


def test_the_file_lies_in_the_cache_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SIGHTLINE_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.tuning_file() == tmp_path / "sightline" / "tiles-cuda-90.json"


def test_a_tuned_tile_that_does_not_fit_another_call_gives_way_to_the_default(hopper: Path) -> None:
    wanted = CANDIDATES["forward", "half"][1]
    variant = variant_of(sl.Softmax())
    tune(Launches(lambda tile: 1.0 if tile == wanted else 2.0), "forward", variant)
    tried = []

    def launch(tile: Tile) -> None:
        tried.append(tile)
        if tile == wanted:
            raise OutOfResources(300000, 232448, "shared memory")

    tuning.launch_tuned("forward", variant, launch, lambda: True)
    assert tried == [wanted, tiles.choose_tile("forward", variant)]


def test_the_default_that_does_not_fit_says_so(hopper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIGHTLINE_AUTOTUNE")

    def launch(tile: Tile) -> None:
        raise OutOfResources(300000, 232448, "shared memory")

    with pytest.raises(RuntimeError, match=r"'forward-softmax-causal-bf16-64x64'.*\(cuda-90\).*128 x 64.*reference"):
        tuning.launch_tuned("forward", variant_of(sl.Softmax()), launch, lambda: True)


def test_the_tiles_of_another_gpu_in_the_same_process_are_not_taken(
    hopper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = CANDIDATES["forward", "half"][1]
    tune(Launches(lambda tile: 1.0 if tile == wanted else 2.0), "forward", variant_of(sl.Softmax()))
    monkeypatch.delenv("SIGHTLINE_AUTOTUNE")
    monkeypatch.setattr(tuning, "target_name", lambda: "cuda-80")
    default = tiles.choose_tile("forward", variant_of(sl.Softmax()))
    assert tune(Launches(pytest.fail), "forward", variant_of(sl.Softmax())) == default


def test_a_user_without_a_home_has_a_tuning_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("SIGHTLINE_TUNING", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(tuning, "target_name", lambda: "cuda-90")
    monkeypatch.setattr(Path, "home", homeless)
    assert tuning.tuning_file().name == "tiles-cuda-90.json"
