"""`DualEncoder`: pictures and texts in one space, and how well they go together (late fusion)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from chiasm.data.captions import CaptionProcessor
from chiasm.data.chat import Message
from chiasm.data.schema import text_of
from chiasm.evaluation.zero_shot import TEMPLATES, label_vectors
from chiasm.fusion.late import LateFusionModel
from chiasm.fusion.qformer_retrieval import QFormerRetrieval
from chiasm.sources.uploading import upload
from chiasm.sources.writing import save_whole
from chiasm.training.card import write_card

RetrievalModel = LateFusionModel | QFormerRetrieval


class DualEncoder:
    """A retrieval model: `.model` and `.processor` are transformers objects."""

    def __init__(self, model: RetrievalModel, processor: CaptionProcessor | None) -> None:
        self.model = model.eval()
        self._processor = processor

    @property
    def processor(self) -> CaptionProcessor:
        """Pictures + texts → inputs.

        Raises:
            ValueError: the model came without tokenizer or image processor files.
        """
        if self._processor is None:
            raise ValueError(
                "this model has no processor, because it came without tokenizer or image processor files; "
                "put them into the model's folder"
            )
        return self._processor

    @torch.inference_mode()
    def embed_images(self, images: Any) -> Float[Tensor, "images *K P"]:
        """A vector of length 1 for every picture; of a Q-Former K vectors, what its queries saw.

        Args:
            images: a path, a PIL picture, or a list of them.
        """
        return self.model.embed_images(self._patches(images))

    def prepare(self, image: Any) -> Float[Tensor, "1 3 H W"]:
        """One picture as the model reads it, small however large it was."""
        return self.processor(images=[image])["pixel_values"]

    @torch.inference_mode()
    def embed_prepared(self, prepared: Sequence[Float[Tensor, "1 3 H W"]]) -> Float[Tensor, "images *K P"]:
        """What `embed_images` gives for pictures that are prepared."""
        return self.model.embed_images(self.model.patches(self._moved(torch.cat(list(prepared)))))

    @torch.inference_mode()
    def embed_texts(self, texts: str | Sequence[str]) -> Float[Tensor, "texts P"]:
        """A vector of length 1 for every text."""
        return self.model.embed_texts(**self._tokens(texts))

    @torch.inference_mode()
    def score(self, images: Any, texts: str | Sequence[str]) -> Float[Tensor, "images texts"]:
        """The cosine of every picture (of a Q-Former its nearest query) and every text."""
        return self.model.similarity(self.embed_images(images), self.embed_texts(texts))

    @torch.inference_mode()
    def match(self, images: Any, texts: str | Sequence[str]) -> Float[Tensor, " pairs"]:
        """The probability that a picture and the text of the same place belong together: of a Q-Former, which reads
        both together, or of a late-fusion model with a sigmoid's scale and bias.

        Raises:
            ValueError: not as many texts as pictures, or the model only ranks.
        """
        patches, tokens = self._patches(images), self._tokens(texts)
        if len(patches) != len(tokens["input_ids"]):
            raise ValueError(f"{len(patches)} picture(s) but {len(tokens['input_ids'])} text(s); pass pairs")
        if isinstance(self.model, QFormerRetrieval):
            return self.model.match(patches, **tokens).softmax(dim=-1)[:, 1]
        if self.model.connector.logit_bias is None:
            raise ValueError(
                "this model has no probability of a pair, because its scores have no bias; use score, "
                "or connect with preset siglip"
            )
        cosines = (self.model.embed_images(patches) * self.model.embed_texts(**tokens)).sum(dim=-1)
        return self.model.connector.logits(cosines[:, None])[:, 0].sigmoid()

    def classify(self, images: Any, labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
        """Of each picture the label whose prompts lie nearest, without any training on the labels.

        Args:
            templates: prompts with `{}` where the label stands; a label's vector is their mean.
        """
        return [labels[index] for index in self.class_scores(images, labels, templates).argmax(dim=-1).tolist()]

    @torch.inference_mode()
    def class_scores(
        self, images: Any, labels: Sequence[str], templates: Sequence[str] = TEMPLATES
    ) -> Float[Tensor, "images labels"]:
        """The cosine of every picture and every label's prompts."""
        vectors = label_vectors(self.model, self.processor, labels, templates)
        return self.model.similarity(self.embed_images(images), vectors)

    @torch.inference_mode()
    def answer(self, images: Any, questions: str | Sequence[str]) -> list[str]:
        """The likeliest of the known answers to a question about each picture.

        Raises:
            ValueError: not as many questions as pictures, or the model has no answer head.
        """
        patches, tokens = self._patches(images), self._tokens(questions)
        if len(patches) != len(tokens["input_ids"]):
            raise ValueError(f"{len(patches)} picture(s) but {len(tokens['input_ids'])} question(s); pass pairs")
        if not isinstance(self.model, LateFusionModel) or self.model.config.answer_head is None:
            raise ValueError("this model has no answer head; train one: chiasm train late_vqa")
        known = self.model.config.answer_head["answers"]
        scores = self.model.answers(patches, self.model.pooled_texts(**tokens))
        return [known[label] for label in scores.argmax(dim=-1).tolist()]

    def generate(self, messages: list[list[Message]], images: list[list[Any]], **_: Any) -> list[str]:
        """An answer for each conversation of one picture: to its last question, as `VLM.generate` has it.

        Raises:
            ValueError: a conversation has not exactly one picture.
        """
        if wrong := [len(pictures) for pictures in images if len(pictures) != 1]:
            raise ValueError(f"a model of two towers answers about one picture, got {wrong[0]} in a conversation")
        questions = [next(text_of(m["content"]) for m in reversed(c) if m["role"] == "user") for c in messages]
        return self.answer([pictures[0] for pictures in images], questions)

    def to(self, *args: Any, **kwargs: Any) -> "DualEncoder":
        """Moves the model to a device or dtype."""
        self.model.to(*args, **kwargs)
        return self

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Writes weights (safetensors), configuration, processor files and a model card, all or nothing."""
        save_whole(folder, self.model, self._processor, lambda place: write_card(place, self.model), **kwargs)

    def push_to_hub(self, repository: str, private: bool | None = None, token: str | None = None, **kwargs: Any) -> str:
        """Uploads what `save_pretrained` writes, in one commit; returns the repository's address."""
        return upload(self.save_pretrained, repository, private, token, **kwargs)

    def _patches(self, images: Any) -> Float[Tensor, "images N D_p"]:
        return self.model.patches(self._moved(self.processor(images=images)["pixel_values"]))

    def _moved(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.model.device, self.model.dtype)

    def _tokens(self, texts: str | Sequence[str]) -> dict[str, Tensor]:
        return {name: value.to(self.model.device) for name, value in self.processor(text=texts).items()}
