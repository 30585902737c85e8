"""What every connector costs between SigLIP-B/16 at 224 pixels and SmolLM2-135M, by Chiasm's cost model.

    python docs/connectors/costs.py          prints the table
    python docs/connectors/costs.py --write  puts it into README.md, and each row into its connector's page

No weight is loaded: the models are on the meta device.
"""

import re
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, SiglipVisionConfig

from chiasm.comparison.cost import kv_bytes_per_token, language_flops
from chiasm.connectors import CONNECTORS, build_connector, connector_settings
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.early import EarlyFusionModel
from chiasm.vision.encoder import load_vision
from chiasm.vision.towers import build_tower

HERE = Path(__file__).parent
MARK = re.compile(r"(<!-- costs -->\n).*?(<!-- /costs -->)", re.DOTALL)
VISION = SiglipVisionConfig(hidden_size=768, image_size=224, patch_size=16)
LANGUAGE = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
    dtype="bfloat16",
)
WORDS = 64
HEADER = """\
| connector | visual tokens | parameters | connect, GFLOP | prefill, GFLOP | KV cache, MiB |
|---|---:|---:|---:|---:|---:|
"""


def model_without_weights() -> EarlyFusionModel:
    """One model, which has one connector after the other."""
    with torch.device("meta"):
        vision = load_vision(build_tower(VISION))
        language = AutoModelForCausalLM.from_config(LANGUAGE, dtype=torch.bfloat16)
        config = ChiasmConfig(
            vision_config=VISION.to_dict(),
            text_config=LANGUAGE.to_dict(),
            connector=connector_settings("linear"),
            features=vision.features.to_dict(),
            image_token_id=LANGUAGE.vocab_size,
        )
        return EarlyFusionModel(config, vision=vision, language=language)


def row(model: EarlyFusionModel, name: str) -> str:
    """One line of the table."""
    with torch.device("meta"):
        model.connector = build_connector(name, VISION.hidden_size, LANGUAGE.hidden_size, model.vision.grid)
    sequence = model.num_image_tokens + WORDS
    parameters = sum(parameter.numel() for parameter in model.connector.parameters()) / 1e6
    connect, prefill = model.connector.flops() / 1e9, language_flops(model, sequence, sequence, logits=1) / 1e9
    cache = kv_bytes_per_token(model) * sequence / 2**20
    cells = f"{model.num_image_tokens} | {parameters:.2f} M | {connect:.2f} | {prefill:.1f} | {cache:.1f}"
    return f"| [`{name}`]({name}.md) | {cells} |\n"


def pages() -> dict[Path, str]:
    """Every page that holds costs, with the costs as they are now."""
    model = model_without_weights()
    rows = {name: row(model, name) for name in CONNECTORS if (HERE / f"{name}.md").exists()}
    tables = {"README": HEADER + "".join(rows.values())} | {name: HEADER + line for name, line in rows.items()}
    written = {}
    for name, table in tables.items():
        path = HERE / f"{name}.md"
        written[path] = MARK.sub(lambda found, table=table: found[1] + table + found[2], path.read_text())
    return written


if __name__ == "__main__":
    if "--write" in sys.argv:
        for path, text in pages().items():
            path.write_text(text)
    else:
        model = model_without_weights()
        print(HEADER + "".join(row(model, name) for name in CONNECTORS), end="")
