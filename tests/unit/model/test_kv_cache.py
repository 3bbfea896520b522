"""The cache and its attention compared with each conversation alone."""

from __future__ import annotations

import torch

from anyres_vlm.model.kv_cache import ConversationCache, attend_cached

CPU = torch.device("cpu")


def test_cached_attention_is_that_of_each_conversation_alone() -> None:
    """Long enough that whole blocks of torch's kernel are masked, conversations finish and the cache grows."""
    generator = torch.Generator().manual_seed(0)
    lengths, heads, shared, width = [1300, 3, 700], 6, 2, 8

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    cache = ConversationCache(lengths, 1000)
    prompts = [(random(1, shared, n, width), random(1, shared, n, width)) for n in lengths]
    packed = [torch.cat(parts, dim=2) for parts in zip(*prompts, strict=True)]
    assert all(a is b for a, b in zip(cache.update(*packed, 0), packed, strict=True))
    said = [list(prompt) for prompt in prompts]
    rows = [0, 1, 2]
    for step in range(600):
        query, key, value = random(len(rows), heads, 1, width), *(random(len(rows), shared, 1, width) for _ in "kv")
        mask = cache.mask(CPU)
        assert (mask is None) == (len(rows) == 1)
        out = attend_cached(query, *cache.update(key, value, 0), mask, None)
        for place, row in enumerate(rows):
            of_row = slice(place, place + 1)
            said[row] = [torch.cat([said[row][0], key[of_row]], 2), torch.cat([said[row][1], value[of_row]], 2)]
            if (step % 50 == 0 or step > 500) and not (row == 0 and step > 100):
                k, v = (kept.repeat_interleave(heads // shared, 1) for kept in said[row])
                weights = (query[of_row] @ k.transpose(2, 3) * width**-0.5).softmax(-1)
                torch.testing.assert_close(out[of_row], weights @ v, atol=2e-6, rtol=0)
        if step == 100:
            cache.skip_columns([1, 2])
            assert cache.get_seq_length() == 700 + 101
        if step == 200:
            cache.keep([1, 2])
            rows = [1, 2]
        if step == 550:
            cache.skip_columns([0])
            cache.keep([0])
            rows = [1]
            assert cache.get_seq_length() == 3 + 551
