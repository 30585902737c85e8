"""Decoding compiles as one graph that fits every step: in a process of its own, where types are not checked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MEMBERS = ("MLP", "Prefix", "Packed", "Patches", "Codes", "Decoder")

COMPILED = """
import sys
import torch
from transformers import CompileConfig
sys.path.insert(0, sys.argv[1])
import members
for name in sys.argv[2:]:
    member = getattr(members, name)()
    config, inputs = member.prepare_config_and_inputs_for_common()
    config.get_text_config().eos_token_id = None
    model = member.classes[-1](config).eval()
    assert model._can_compile_fullgraph
    how = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode="default")
    how._compile_all_devices = True
    torch.compiler.reset()
    torch._dynamo.config.error_on_recompile = True
    options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": members.PAD}
    for rows in (slice(2), slice(2, 4)):
        some = {key: value[rows] for key, value in inputs.items()}
        plain = model.generate(**some, **options)
        fixed = model.generate(**some, **options, cache_implementation="static", compile_config=how)
        assert hasattr(model, "_compiled_call") and torch.equal(plain, fixed), name
"""


@pytest.mark.slow
def test_decoding_is_one_graph() -> None:
    here = Path(__file__).parents[1]
    command = [sys.executable, "-c", COMPILED, str(here), *MEMBERS]
    done = subprocess.run(command, env=os.environ | {"JAXTYPING_DISABLE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
