"""Converted folders load with plain transformers and compute what the original computes."""

import json
import pickle
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from chiasm.sources import ALIASES
from chiasm.sources.convert import EFFICIENTNET_BLOCK, EFFICIENTNET_TOP, EfficientNetLite, Gguf
from chiasm.vision.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel


def original_name(name: str, blocks: tuple[int, ...]) -> str:
    """The name that the package efficientnet-lite-pytorch gives to one of our parameters."""
    if not name.startswith("stages."):
        top = {ours: theirs for theirs, ours in EFFICIENTNET_TOP.items()}
        module, leaf = name.rsplit(".", 1)
        return f"{top[module]}.{leaf}"
    inner = {ours: theirs for theirs, ours in EFFICIENTNET_BLOCK.items()}
    _, stage, block, part, kind, leaf = name.split(".")
    return f"_blocks.{sum(blocks[: int(stage)]) + int(block)}.{inner[f'{part}.{kind}']}.{leaf}"


@pytest.mark.parametrize("alias", ["efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"])
def test_efficientnet_lite_keeps_its_function(alias: str, tmp_path: Path) -> None:
    convert = ALIASES[alias].convert
    assert isinstance(convert, EfficientNetLite)
    config = EfficientNetLiteConfig(
        width_coefficient=convert.width, depth_coefficient=convert.depth, image_size=convert.image_size
    )
    assert convert.blocks == tuple(stage[0] for stage in config.stages)
    model = EfficientNetLiteModel(config).eval()
    for buffer in model.buffers():
        if buffer.ndim:
            buffer.uniform_(0.5, 1.5)
    state = {original_name(name, convert.blocks): tensor for name, tensor in model.state_dict().items()}
    weights = tmp_path / convert.weights
    weights.parent.mkdir(parents=True)
    torch.save(state | {"_fc.weight": torch.zeros(10, 1280), "_fc.bias": torch.zeros(10)}, weights)

    convert(tmp_path, tmp_path / "ready")

    loaded, report = AutoModel.from_pretrained(tmp_path / "ready", output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.stages == config.stages and loaded.config.image_size == config.image_size
    picture = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded(picture).last_hidden_state, model(picture).last_hidden_state)
    preprocessor = json.loads((tmp_path / "ready" / "preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"height": convert.image_size, "width": convert.image_size}
    assert preprocessor["image_mean"][0] * 255 == 127 and preprocessor["image_std"][0] * 255 == 128


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("ran",))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"_conv_stem.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError):
        EfficientNetLite("evil.pth", 1.0, 1.0, 224, (1,) * 7)(tmp_path, tmp_path / "ready")
    assert "ran" not in capsys.readouterr().out


def permuted(weight: torch.Tensor, heads: int) -> np.ndarray:
    """Rows in the order in which llama.cpp rotates them: the halves of a head interleaved."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).numpy()


def write_gguf(path: Path, model: LlamaForCausalLM, tokens: list[str], types: list[int]) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["Ġ Ġ", "ĠĠ Ġ"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    state = model.state_dict()
    embedding = gguf.quants.quantize(state["model.embed_tokens.weight"].numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", embedding, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            values = permuted(weight, heads) if heads else weight.numpy()
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """Tied embeddings whose values survive the quantisation of the file."""
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=77,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table.copy_(torch.randint(-127, 128, table.shape))
        table[:, 0] = 127
        table.mul_(1 / 128)
    return model


def test_gguf_keeps_its_function_and_is_completed(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    special = ["<bos>", "<eos>", "<end_of_turn>"]
    tokens = [*sorted(ByteLevel.alphabet()), *special, "ĠĠ", "ĠĠĠ"]
    types = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 2
    order = [*range(256), 256, 257, 258, 259, 260]
    assert len(tokens) == len(order) == llama.config.vocab_size
    write_gguf(tmp_path / "whole", llama, tokens, types)
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "first").write_bytes(content[:10_000])
    (tmp_path / "second").write_bytes(content[10_000:])
    (tmp_path / "TERMS.html").write_text("terms")
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()

    convert = Gguf(("first", "second"), split_digits=True, end_of_turn="<end_of_turn>", keep=("TERMS.html",))
    convert(tmp_path, tmp_path / "ready")

    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (bars, verbosity)
    assert (tmp_path / "ready" / "TERMS.html").read_text() == "terms"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ready")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ready")
    assert model.dtype == torch.float32 and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = torch.randint(0, 256, (2, 11))
    torch.testing.assert_close(model(ids).logits, llama(ids).logits, atol=1e-4, rtol=1e-4)
    assert model.generation_config.eos_token_id == [257, 258]
    assert tokenizer.model_max_length == 77 and tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert tokenizer("a   12").tokens() == ["a", "ĠĠĠ", "1", "2"]


@pytest.mark.weights
@pytest.mark.parametrize(
    ("alias", "prompt"),
    [
        ("smollm2-135m-instruct", [{"role": "user", "content": "What is the capital of France?"}]),
        ("gemma3-270m", "The capital city of France is called"),
    ],
)
def test_the_language_models_know_paris(alias: str, prompt: str | list) -> None:
    from chiasm.sources import pull

    folder = pull(alias)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert model.generation_config.pad_token_id is not None and model.config.tie_word_embeddings
    if alias == "smollm2-135m-instruct":
        assert output[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") == model.generation_config.eos_token_id
        assert tokenizer("1   23").tokens() == ["1", "ĠĠĠ", "2", "3"]


@pytest.mark.weights
def test_the_sentence_encoder_hears_synonyms() -> None:
    from chiasm.sources import pull

    folder = pull("minilm-l6")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(
        ["a cat on a mat", "a kitten on a rug", "the stock market fell"], padding=True, return_tensors="pt"
    )
    mask = inputs["attention_mask"][..., None]
    sentences = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    close, far = torch.cosine_similarity(sentences[:1], sentences[1:])
    assert close > 0.6 and far < 0.2


@pytest.mark.weights
def test_twemoji_has_its_artwork() -> None:
    from chiasm.sources import pull

    pictures = pull("twemoji") / "72x72"
    assert (pictures / "1f431.png").read_bytes().startswith(b"\x89PNG") and len(list(pictures.iterdir())) > 3000
