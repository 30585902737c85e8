"""Without a compiled step: what is tried, and what is told of it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import chiasm
import contracts
import tiny
from chiasm.generation.engine import Engine
from chiasm.generation.lean_decoder import LeanDecoder
from chiasm.generation.native import build
from chiasm.generation.native.build import library
from chiasm.generation.packed_linear import PackedLinear
from chiasm.generation.torch_step import TorchStep


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Commands that are run, by a compiler that is asked for with a wrapper in front of it."""
    if not isinstance(found := build._compiled(), build.ctypes.CDLL):
        pytest.skip(f"no C++ compiler: {found}")
    commands, run = [], subprocess.run

    def counted(command: list[str], **options: object) -> object:
        commands.append(command)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", counted)
    monkeypatch.setattr(build, "FLAGS", ["-O0", *build.FLAGS[1:]])
    monkeypatch.setenv("CXX", "env c++")
    build._compiled.cache_clear()
    yield commands
    build._compiled.cache_clear()


def test_a_folder_that_cannot_be_written_is_not_needed(
    compiler: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHIASM_CACHE", str(tmp_path / "file" / "below"))
    assert library() is not None and [command[:2] for command in compiler] == [["env", "c++"]] * 2


def test_what_does_not_load_is_made_again(
    compiler: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHIASM_CACHE", str(tmp_path / "one"))
    assert library() is not None and len(compiler) == 2
    (made,) = (tmp_path / "one" / "native").iterdir()
    damaged = tmp_path / "two" / "native" / made.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"of another machine")
    monkeypatch.setenv("CHIASM_CACHE", str(tmp_path / "two"))
    build._compiled.cache_clear()
    assert library() is not None and len(compiler) == 4 and damaged.stat().st_size > 1000


@pytest.mark.parametrize(
    ("command", "reason"), [("false", "false failed: status 1"), ("no-such-compiler -x", "no-such-compiler -x failed:")]
)
def test_a_compiler_that_fails_is_named(command: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", command)
    build._compiled.cache_clear()
    assert library() is None and build.absence().startswith(reason)
    build._compiled.cache_clear()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_without_a_compiled_step_the_models_own_weights_stay(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed ones would be unpacked beside themselves: more memory, other tokens and nothing faster."""
    monkeypatch.setenv("CHIASM_NATIVE", "0")
    vlm = chiasm.connect(tiny.vision(), tiny.language(), tokenizer=tiny.tokenizer())
    before = {name: weight.clone() for name, weight in vlm.model.state_dict().items()}
    with pytest.warns(UserWarning, match=f"{weights}.*CHIASM_NATIVE=0 asks for none; LlamaForCausalLM keeps its own"):
        engine = Engine(vlm.model, vlm.processor, weights=weights, release=True)
    assert type(engine.decoder) is LeanDecoder and isinstance(engine.decoder.lean_step, TorchStep)
    assert {layer.q.kind for layer in engine.decoder.lean_step.lean.layers} == {"float32"}
    engine.close()
    assert not any(isinstance(module, PackedLinear) for module in vlm.model.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in vlm.model.state_dict().items())
    with pytest.warns(UserWarning):
        contracts.check_engine_equals_generate(vlm, LeanDecoder, weights=weights)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_half_precision_is_packed_too(weights: str) -> None:
    if library() is None:
        pytest.skip("no C++ compiler")
    vlm = chiasm.connect(tiny.vision(), tiny.language(), tokenizer=tiny.tokenizer()).to(torch.bfloat16)
    engine = Engine(vlm.model, vlm.processor, weights=weights)
    assert type(engine.decoder) is LeanDecoder
    engine.close()
