"""The model's tensor work, one batch at a time: encode images, prefill slots, decode a step, read a hidden state.

Knows slots and token ids; which sequence is where, and what comes next, is the engine's business.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.moondream.decoding import Feed
from pipeline.moondream.image_crops import Crops
from pipeline.moondream.kv_cache import KVCache
from pipeline.moondream.model import Moondream
from pipeline.moondream.prompts import Sampling

# A CPU encodes them a tenth faster in small parts: their activations stay in memory that malloc keeps, up to 32 MB.
CROPS_PER_PART = 4


class ModelRunner:
    def __init__(self, model: Moondream, num_slots: int, context_len: int) -> None:
        self.model, self.config = model, model.config
        self.device, self.dtype = model.text.wte.device, model.text.wte.dtype
        self.cache = KVCache(self.config, num_slots, context_len, self.device, self.dtype)

    def encode_images(self, images: Sequence[Crops]) -> Tensor:
        """The tokens of images, all their crops in one pass, on a CPU in parts -> (num_images, num_patches, dim)."""
        pixels = torch.from_numpy(np.concatenate([crops.pixels for crops in images])).to(self.device)
        parts = pixels.split(CROPS_PER_PART if self.device.type == "cpu" else len(pixels))
        features = torch.cat([self.model.vision.encode_crops(part) for part in parts])  # (n_crops, num_patches, C)
        of_image = features.split([len(crops.pixels) for crops in images])
        return self.model.vision.image_tokens(of_image, [crops.tiling for crops in images])

    def prefill_images(self, slots: list[int], tokens: Sequence[Tensor]) -> None:
        """Put bos and an image's tokens (num_patches, dim) into each slot."""
        bos = self.model.text.wte[self.config.tokenizer.bos_id].expand(len(slots), 1, -1)
        x = torch.cat([bos, torch.stack(list(tokens))], dim=1)  # (B, prefix_len, dim)
        self.model.text(x, torch.arange(x.shape[1], device=self.device)[None], self.cache.prefill_prefix(slots))

    def prefill_prompts(self, slots: list[int], prompts: Sequence[list[int]]) -> Tensor:
        """Feed each slot its prompt, after its image -> hidden state of each prompt's last token (B, dim)."""
        longest = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=self.device)  # (B, T)
        positions = self.config.prefix_len + torch.arange(longest, device=self.device)[None]
        hidden = self.model.text(self.model.text.wte[ids], positions, self.cache.prefill_prompt(slots, longest))
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        return hidden[torch.arange(len(slots), device=self.device), last]

    def decode(self, first_slot: int, feeds: Sequence[Feed | None], positions: list[int]) -> Tensor:
        """Advance neighbouring slots, from first_slot on, by one position each -> hidden states (B, dim).

        A slot with nothing to feed (None) takes part for the sake of its neighbours; its result means nothing.
        """
        x = self._embed(feeds)[:, None]  # (B, 1, dim)
        at = torch.tensor(positions, device=self.device)[:, None]  # (B, 1)
        return self.model.text(x, at, self.cache.decode(first_slot, positions))[:, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of hidden states (B, dim) -> float32 (B, vocab_size)."""
        return self.model.text.logits(hidden).float()

    def choose_tokens(
        self,
        logits: Tensor,
        suppressed: Sequence[tuple[int, ...]],
        samplings: Sequence[tuple[Sampling, torch.Generator | None]],
    ) -> list[int]:
        """The next token of each row of logits (B, vocab_size), which it may change: the likeliest one that is not
        suppressed, or a drawn one where there is a generator."""
        banned = [(row, token) for row, tokens in enumerate(suppressed) for token in tokens]
        if banned:
            rows, tokens = torch.tensor(banned, device=self.device).T
            logits[rows, tokens] = -torch.inf
        chosen = logits.argmax(-1).tolist()
        for row, (sampling, generator) in enumerate(samplings):
            if generator is not None:
                chosen[row] = sample(logits[row].cpu(), sampling, generator)
        return chosen

    def _embed(self, feeds: Sequence[Feed | None]) -> Tensor:
        ids = [feed.token if feed and feed.token is not None else 0 for feed in feeds]
        x = self.model.text.wte[torch.tensor(ids, device=self.device)]  # (B, dim)
        region = self.model.region
        for row, feed in enumerate(feeds):
            if feed and feed.values:
                values = torch.tensor(feed.values, device=self.device)
                x[row] = region.encode_coord(values) if len(feed.values) == 1 else region.encode_size(values)
        return x


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw from the likeliest tokens of logits (vocab,) whose cumulative probability before them is at most top_p."""
    temperature = max(sampling.temperature, 1e-6)  # next to greedy; smaller ones overflow float32
    probabilities, tokens = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before > sampling.top_p, 0.0)
    return int(tokens[torch.multinomial(kept, 1, generator=generator)])


def generator_for(seed: int, frame_idx: int) -> torch.Generator:
    """A generator that depends on these two numbers alone, so that a frame is answered the same in any batch."""
    state = np.random.SeedSequence((seed, frame_idx)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)
