"""Noise: known answers, laws, and numbers that depend on nothing but their own names."""

import math

import pytest
import torch

from invdiff.errors import InputError
from invdiff.kernels.philox_normal.reference import philox
from invdiff.kernels.philox_uniform.reference import unit
from invdiff.noise import Noise, stream_key

ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)


def plain_philox(counter, key):
    """Philox4x32-10 written with Python's integers (Salmon et al. 2011, section 3.3)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k[0], q & ONES, (p >> 32) ^ c[3] ^ k[1], p & ONES]
        k = [(k[0] + 0x9E3779B9) & ONES, (k[1] + 0xBB67AE85) & ONES]
    return tuple(c)


def words(counter, key):
    parts = [torch.tensor([v]) for v in (*counter, *key)]
    return tuple(int(w) for w in philox(tuple(parts[:4]), tuple(parts[4:])))


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, answer):
    assert words(counter, key) == answer
    assert plain_philox(counter, key) == answer


def test_philox_agrees_with_plain_integers_on_a_batch():
    generator = torch.Generator().manual_seed(0)
    c = torch.randint(0, 2**32, (4, 200), generator=generator)
    k = torch.randint(0, 2**32, (2, 200), generator=generator)
    ours = torch.stack(philox(tuple(c), tuple(k)), dim=1).tolist()
    assert [tuple(row) for row in ours] == [plain_philox(*p) for p in zip(c.T.tolist(), k.T.tolist(), strict=True)]


def test_a_stream_is_addressed_by_block_slot_step_and_call_under_its_key():
    key = stream_key(3, "problem", 1)
    noise = Noise([stream_key(3, "other", 0), key], 5)
    noise.at(7).uniform(noise.slots)  # call 0
    got = noise.uniform(torch.tensor([5 + 2]), (6,))[0]  # call 1, second ensemble, particle 2
    w = [x for block in range(3) for x in plain_philox((block, 2, 7, 1), (key & ONES, key >> 32))]
    expected = [((a >> 5) * 2**26 + (b >> 6)) / 2**53 for a, b in zip(w[0::2], w[1::2], strict=True)]
    assert got.tolist() == expected


def test_keys_differ_in_every_part():
    keys = [stream_key(*p) for p in [(0,), (1,), (0, "a"), (0, "a", 0), (0, "a", 1), (0, "a0"), (0, "b", 0)]]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**64 for k in keys)
    assert stream_key(0, "a", 1) == keys[4]


def test_normals_have_the_moments_of_normals():
    m = 400_000
    z = Noise([1], 4, dtype=torch.float64).normal(torch.arange(4), (m // 4,)).flatten()
    assert len(z) == m
    # Standard errors of the sample moments of a standard normal: 1, 2, 15, 96 over m.
    for power, expected, variance in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)]:
        assert abs(float((z**power).mean()) - expected) < 4.5 * math.sqrt(variance / m), power
    # Kolmogorov: the statistic times sqrt(m) exceeds 1.95 with probability 1e-3.
    cdf = torch.special.ndtr(z.sort().values)
    rank = torch.arange(1, m + 1, dtype=torch.float64) / m
    assert float((cdf - rank).abs().max()) * math.sqrt(m) < 1.95
    assert z.abs().max() > 4.0


def test_streams_are_independent_of_each_other():
    size = 40_000
    noise = Noise([stream_key(0, "p", 0), stream_key(0, "p", 1)], 2, dtype=torch.float64)
    first, again = noise.at(1).normal(noise.slots, (size,)), noise.normal(noise.slots, (size,))
    later = noise.at(2).normal(noise.slots, (size,))
    other_seed = Noise([stream_key(1, "p", 0)], 1, dtype=torch.float64).at(1).normal(torch.tensor([0]), (size,))
    z = torch.cat([first, again, later, other_seed])
    for power in (1, 2):
        c = torch.corrcoef(z**power) - torch.eye(len(z), dtype=z.dtype)
        assert float(c.abs().max()) < 5.0 / math.sqrt(size)
    # Neither are neighbours within a stream related.
    lags = torch.stack([(z[:, :-lag] * z[:, lag:]).mean(1) for lag in (1, 2, 3, 4)])
    assert float(lags.abs().max()) < 5.0 / math.sqrt(size)


def test_uniforms_lie_in_the_unit_interval_with_53_bits():
    m = 200_000
    u = Noise([5], 2).uniform(torch.arange(2), (m // 2,)).flatten()
    assert u.dtype == torch.float64
    assert 0.0 <= float(u.min()) < 1e-4
    assert 1.0 - 1e-4 < float(u.max()) < 1.0
    assert abs(float(u.mean()) - 0.5) < 4.5 / math.sqrt(12 * m)
    assert abs(float(((u - 0.5) ** 2).mean()) - 1 / 12) < 4.5 / math.sqrt(180 * m)
    units = u * 2.0**53
    assert torch.equal(units, units.round())
    assert abs(float((units % 2).mean()) - 0.5) < 2.5 / math.sqrt(m), "the lowest bit is a fair coin"


def test_the_largest_words_stay_below_one():
    top = torch.tensor([ONES])
    assert float(unit(top, top)) == 1.0 - 2.0**-53


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 5)])
def test_a_subset_of_slots_is_a_slice_of_the_whole(shape):
    noise = Noise([1, 2, 3], 4)
    some = torch.tensor([11, 0, 5, 6])
    assert torch.equal(noise.at(2).normal(some, shape), noise.at(2).normal(noise.slots, shape)[some])
    assert torch.equal(noise.at(2).uniform(some, shape), noise.at(2).uniform(noise.slots, shape)[some])


def test_micro_batches_do_not_change_the_noise():
    noise = Noise([1, 2], 5, dtype=torch.float64)
    whole = noise.at(3).normal(noise.slots, (7,))
    for size in (1, 3, 4):
        parts = [noise.at(3).normal(s, (7,)) for s in noise.slots.split(size)]
        assert torch.equal(torch.cat(parts), whole)


def test_company_does_not_change_an_ensemble():
    alone, beside = Noise([9], 3), Noise([4, 9, 7], 3)
    assert torch.equal(alone.normal(alone.slots, (5,)), beside.normal(beside.slots, (5,))[3:6])
    assert torch.equal(alone.shared(), beside.shared()[1:2])
    more = Noise([9], 8)
    assert torch.equal(alone.at(0).normal(alone.slots, (5,)), more.normal(more.slots, (5,))[:3])


def test_calls_and_steps_repeat_after_at():
    noise = Noise([1], 2)
    a, b = noise.at(1).normal(noise.slots, (3,)), noise.normal(noise.slots, (3,))
    assert not torch.equal(a, b)
    noise.at(5)
    assert torch.equal(noise.at(1).normal(noise.slots, (3,)), a)
    assert torch.equal(noise.normal(noise.slots, (3,)), b)


def test_like_follows_the_state():
    noise = Noise([1, 2], 3, dtype=torch.float64)
    z = noise.like(torch.zeros(2, 3, 4, 5))
    assert z.shape == (2, 3, 4, 5)
    assert z.dtype == torch.float32
    assert torch.equal(z.flatten(0, 1), noise.at(0).normal(noise.slots, (4, 5)).float())
    with pytest.raises(InputError, match=r"\(3, 2\).*\(2, 3\)"):
        noise.like(torch.zeros(3, 2, 4))


def test_shared_is_one_uniform_an_ensemble_that_no_particle_has():
    keys = list(range(2000))
    noise = Noise(keys, 2)
    u = noise.shared()
    assert u.shape == (2000,)
    assert u.dtype == torch.float64
    assert 0.0 <= float(u.min()) <= float(u.max()) < 1.0
    assert abs(float(u.mean()) - 0.5) < 4.5 / math.sqrt(12 * len(keys))
    own = noise.at(0).uniform(noise.slots).reshape(2000, 2)
    assert not bool((own == u[:, None]).any())
    assert not torch.equal(noise.shared(), u), "every call is new"


def test_nothing_to_draw_for_is_refused():
    for keys, n in [([], 1), ([1], 0)]:
        with pytest.raises(InputError, match="at least one ensemble"):
            Noise(keys, n)
