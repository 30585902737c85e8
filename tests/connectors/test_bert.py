"""A Q-Former that started from BERT reads text exactly as BERT does, and its queries got copies of the rest."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedModel, RobertaConfig, RobertaModel

import tiny
from chiasm.connectors.bert import initialise_from_bert, load_bert, qformer_sizes
from chiasm.connectors.qformer import QFormer

SIZES = {"vocab_size": 41, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 44}


def bert(family: str = "bert") -> PreTrainedModel:
    kind, config = {"bert": (BertModel, BertConfig), "roberta": (RobertaModel, RobertaConfig)}[family]
    model = kind(config(**SIZES, max_position_embeddings=23)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_text_is_read_as_bert_reads_it(family: str) -> None:
    encoder = bert(family)
    qformer = QFormer(20, 36, (3, 3), **qformer_sizes(encoder.config), num_queries=5, vocabulary=43).eval()
    fresh = {name: value.clone() for name, value in qformer.state_dict().items()}
    initialise_from_bert(qformer, encoder)
    ids, real = torch.randint(5, 41, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    real[1, 4:] = 0
    with torch.no_grad():
        _, text = qformer.encode(text_ids=ids, mask=real.bool()[:, None])
        expected = encoder(input_ids=ids, attention_mask=real).last_hidden_state
    torch.testing.assert_close(text[real.bool()], expected[real.bool()], rtol=1e-4, atol=1e-4)
    state = qformer.state_dict()
    kept = {name for name in state if torch.equal(state[name], fresh[name])}
    new = ("queries", "proj.", "norm_features.")
    assert kept == {name for name in state if name.startswith(new) or "cross_attention" in name}
    for part in ("up.weight", "down.bias", "norm.weight"):
        name = f"blocks.1.{{}}_feed_forward.{part}"
        assert torch.equal(state[name.format("query")], state[name.format("text")])
    assert torch.equal(state["words.weight"][41:], fresh["words.weight"][41:])


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    encoder = bert()
    sizes = qformer_sizes(encoder.config) | {"num_queries": 2}
    with pytest.raises(ValueError, match=r"encoder has feed_forward=44, the Q-Former 96; leave feed_forward out"):
        initialise_from_bert(QFormer(20, 36, (2, 2), **sizes | {"feed_forward": None}), encoder)
    with pytest.raises(ValueError, match=r"encoder has 3 layers, the Q-Former depth=4"):
        initialise_from_bert(QFormer(20, 36, (2, 2), **sizes | {"depth": 4}), encoder)
    tiny.language().base_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a 'llama' model; a Q-Former starts from one of bert"):
        load_bert(str(tmp_path))
