"""Visual tokens put into a row of text embeddings."""

from __future__ import annotations

from torch import Tensor, nn

from ultra.types import VISUAL


def splice(embedding: nn.Module, ids_BS: Tensor, visual_VD: Tensor) -> Tensor:
    """Return embeddings_BSD: text where `ids_BS` is a token, visual tokens where it is VISUAL.

    Args:
        embedding: the language model's input embedding.
        ids_BS: token ids with VISUAL places.
        visual_VD: the visual tokens of all rows, in row order.

    Raises:
        ValueError: when places and visual tokens differ in number.
    """
    places_BS = ids_BS == VISUAL
    num_places = len(visual_VD) if ids_BS.is_meta else int(places_BS.sum())  # no values, no count
    if num_places != len(visual_VD):
        raise ValueError(f"{len(visual_VD)} visual tokens for {num_places} places")
    text_BSD: Tensor = embedding(ids_BS.masked_fill(places_BS, 0))
    return text_BSD.masked_scatter(places_BS.unsqueeze(-1), visual_VD.to(text_BSD.dtype))
