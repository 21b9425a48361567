"""How a variant paints held-out items."""

from collections.abc import Sequence

import torch
from PIL import Image

from experiments.mutual.variants import in_words
from mige.method.encoder import embed_instruction, encode_text
from mige.method.instruction import segment_ids
from mige.method.wording import prompt_for
from mige.pipeline import Condition
from toybox.mige.evaluation.items import Item
from toybox.mige.evaluation.painters import MigePainter, request_of


class WordsPainter(MigePainter):
    """A toy MIGE that gets instructions in words alone, and the picture to edit beside them."""

    def facts(self, row: str) -> dict:
        return super().facts(row) | {"words": True}

    def paint(self, items: Sequence[Item]) -> list[Image.Image]:
        seed, asked = self.config.seed, []
        for item in items:
            request = request_of(item)
            whole = self.pipeline.encode(request, seed)
            asked.append((request, self._in_words(item, whole), seed))
        return self.pipeline.paint(asked, self.guidance(asked[0][0].task))

    @torch.no_grad()
    def _in_words(self, item: Item, whole: Condition) -> Condition:
        """The condition of an item, with words in place of its pictures."""
        pipeline = self.pipeline
        prompt = prompt_for(item.triplet.task, text_of(item), pipeline.config.prefixes)
        embedded = embed_instruction(
            pipeline.fusion, pipeline.text_encoder, segment_ids(pipeline.tokenizer, prompt), None,
            pipeline.tokenizer.eos_token_id,
        )  # fmt: skip
        text = encode_text(pipeline.text_encoder, embedded)
        return whole._replace(text=text, mask=embedded.mask.to(text.device))


def text_of(item: Item) -> str:
    """An item's instruction in words."""
    triplet = item.triplet
    kinds = {toy.reference: toy.look.kind for toy in triplet.toys if toy.reference is not None}
    return in_words(triplet.prompt, triplet.plain, triplet.source, kinds)
