"""The random numbers are Philox's, and depend on what they are for and on nothing else."""

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from sapcore import SAP, attacks, checkpoints, data, evaluation, randomness, sap, with_sap
from sapcore.baselines import BASELINES
from sapcore.errors import SapcoreError
from sapcore.randomness import NoisyModel, with_noisy_statistics
from sapcore.sap import cpu
from sapcore.splitting import split

FULL = 0xFFFFFFFF
RANDOM123 = [  # the known answers of philox4x32-10 in Random123's tests/kat_vectors
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(("counter", "key", "answer"), RANDOM123)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    assert tuple(int(word) for word in randomness.philox(counter, key)) == answer


@pytest.mark.parametrize(("counter", "key", "answer"), RANDOM123)
def test_philox_of_the_cpu_kernel_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    found = cpu._philox(*(cpu.u64(word) for word in (*counter, *key)))
    assert tuple(int(word) for word in found) == answer


def test_philox_of_a_tensor_is_philox_of_each_counter() -> None:
    counters = torch.tensor([counter for counter, _, _ in RANDOM123]).T
    keys = torch.tensor([key for _, key, _ in RANDOM123]).T
    found = torch.stack(randomness.philox(list(counters), list(keys)), dim=1)
    assert found.tolist() == [list(answer) for _, _, answer in RANDOM123]


def test_words_are_philox_of_block_id_pass_and_layer() -> None:
    seed, count, layer, purpose, attempt = 5 << 32 | 3, 10, 7, 2, 1
    found = randomness.words(seed, torch.tensor([11]), torch.tensor([13]), layer, count, purpose, attempt)
    for unit in range(count):
        word, block = divmod(unit, 3)
        counter = (block, 11, 13, layer | purpose << 16 | attempt << 24)
        assert int(found[0, unit]) == int(randomness.philox(counter, (3, 5))[word])


@given(
    seed=SEEDS,
    ids=st.lists(st.integers(0, 2**31), min_size=1, max_size=6),
    passes=st.integers(0, 2**31),
    layer=st.integers(0, 2**16 - 1),
    count=st.integers(1, 40),
    data=st.data(),
)
def test_words_of_any_sub_batch_are_the_rows_of_the_whole(
    seed: int, ids: list[int], passes: int, layer: int, count: int, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1))
    all_ids, all_passes = torch.tensor(ids), passes + torch.arange(len(ids))
    whole = randomness.words(seed, all_ids, all_passes, layer, count)
    part = randomness.words(seed, all_ids[chosen], all_passes[chosen], layer, count)
    assert torch.equal(part, whole[chosen])


@pytest.mark.parametrize("changed", ["seed", "ids", "passes", "layer", "purpose", "attempt"])
def test_words_change_with_each_thing_that_they_are_for(changed: str) -> None:
    arguments = {"seed": 0, "ids": torch.tensor([0]), "passes": torch.tensor([0]), "layer": 0, "count": 64}
    arguments |= {"purpose": 0, "attempt": 0}
    other = arguments | {changed: arguments[changed] + 1}  # type: ignore[operator]
    assert (randomness.words(**arguments) != randomness.words(**other)).sum() >= 62  # type: ignore[arg-type]


def test_seeds_that_differ_in_the_high_half_give_different_words() -> None:
    zero = torch.tensor([0])
    assert (randomness.words(1, zero, zero, 0, 64) != randomness.words(1 | 1 << 63, zero, zero, 0, 64)).all()


def test_normal_numbers_pass_kolmogorov_and_smirnov() -> None:
    """The numbers, and the products of those that are made of the same words. False alarm: 2e-6."""
    z = randomness.normal(0, torch.arange(100), torch.zeros(100, dtype=torch.int64), 0, 1003)
    assert z.shape == (100, 1003)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-6
    pairs = z[:, :251] + z[:, 251:502]  # cosine and sine of one radius and angle
    assert stats.kstest(pairs.flatten().numpy() / 2**0.5, "norm").pvalue > 1e-6


def test_streams_differ_by_name_and_by_seed() -> None:
    streams = [
        randomness.stream(seed, name) for seed in (0, 1, 2**64 - 1) for name in ("attack", "evaluation", "noise", "")
    ]
    assert len(set(streams)) == len(streams)
    assert all(0 <= seed < 2**64 for seed in streams)


def test_streams_stay_as_they_are_in_the_stored_results() -> None:
    assert randomness.stream(0, "attack") == 0xF32B3CD63481278A
    assert randomness.stream(0, "evaluation") == 0xA8800D9849D94EBD


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "0", None, True])
def test_a_senseless_seed_is_refused(seed: object) -> None:
    for refuse in (
        randomness.split_seed,
        lambda s: randomness.stream(s, "attack"),
        lambda s: sap(torch.ones(1, 4), seed=s),
    ):
        with pytest.raises(SapcoreError, match=r"seed is .*, but must be a whole number from 0 to 2\*\*64 - 1"):
            refuse(seed)  # type: ignore[arg-type]


def test_a_seed_is_split_into_its_two_words() -> None:
    assert randomness.split_seed(0) == (0, 0)
    assert randomness.split_seed(2**64 - 1) == (FULL, FULL)
    assert randomness.split_seed(5 << 32 | 3) == (3, 5)


@pytest.mark.usefixtures("untouched_generators")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_sap_leaves_the_global_generators_alone(backend: str) -> None:
    sap(torch.ones(2, 50), seed=1, backend=backend)


@pytest.mark.usefixtures("untouched_generators")
def test_attacks_and_predict_leave_the_global_generators_alone(
    noisy: NoisyModel, digits: tuple[Tensor, Tensor]
) -> None:
    x, y = digits[0][:2], digits[1][:2]
    attacks.noise(x, 4)
    attacks.fgsm(noisy, x, y, 4, passes=2)
    attacks.iterative(noisy, x, y, 4, steps=2, passes=2)
    evaluation.predict(noisy, x, passes=2)


class Chain(nn.Module):
    """Gives each layer's number, to see how `Noise` counts."""

    def __init__(self, shared: randomness.Noise) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0] * 0 + self.shared.next_layer() for _ in range(3)], dim=1)


def test_layers_are_counted_anew_in_each_forward_pass() -> None:
    shared = randomness.Noise()
    model = NoisyModel(Chain(shared), shared, {})
    for _ in range(2):
        assert model(torch.ones(2, 1)).tolist() == [[0, 1, 2]] * 2


def test_a_noisy_model_names_its_examples_by_default() -> None:
    shared = randomness.Noise()
    model = NoisyModel(nn.Identity(), shared, {})
    drawn: list[tuple[int, list[int], list[int]]] = []

    def layer(*_: object) -> None:
        shared.next_layer()
        assert shared.ids is not None
        assert shared.passes is not None
        drawn.append((shared.seed, shared.ids.tolist(), shared.passes.tolist()))

    model.model.register_forward_hook(layer)
    model(torch.ones(3, 1), seed=4, passes=9)
    assert drawn == [(4, [0, 1, 2], [9, 9, 9])]


def test_a_layer_that_is_called_after_its_pass_is_refused() -> None:
    """By activation checkpointing, which would draw other noise in the backward pass than in the forward one."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)

    noisy = with_sap(nn.Sequential(Checkpointed(), nn.Linear(8, 2)).eval())
    out = noisy(torch.ones(3, 4, requires_grad=True))
    with pytest.raises(SapcoreError, match="needs its network's random numbers"):
        out.sum().backward()
    with pytest.raises(SapcoreError, match="needs its network's random numbers"):
        noisy.model(torch.ones(3, 4))


def test_threads_that_call_one_network_at_a_time_get_each_its_own_noise() -> None:
    noisy = with_sap(nn.Sequential(nn.Linear(4, 50), nn.ReLU()).eval())
    x, passes = torch.ones(3, 4), (1, 2)
    expected = [noisy(x, passes=number) for number in passes]
    assert not torch.equal(*expected)
    both = threading.Barrier(2, timeout=60)

    def meet(*_: object) -> None:
        both.wait()

    noisy.get_submodule("model.0").register_forward_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda number: noisy(x, passes=number), passes))
    assert all(map(torch.equal, found, expected))


class Waiting(nn.Module):
    """A network whose forward tells that it has begun, and waits for what may not come."""

    def __init__(self, begun: threading.Event, until: threading.Event) -> None:
        super().__init__()
        self.relu, self.begun, self.until = nn.ReLU(), begun, until

    def forward(self, x: Tensor) -> Tensor:
        self.begun.set()
        self.until.wait(1)
        return self.relu(x)


def test_two_threads_that_split_networks_leave_torchs_modules_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.fx puts itself between every module and its caller while it traces one."""
    before = nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", before)  # put back whatever happens
    first, second, done = (threading.Event() for _ in range(3))

    def one() -> None:
        split(Waiting(first, second), lambda module: isinstance(module, nn.ReLU), lambda _: True)
        done.set()

    with ThreadPoolExecutor(2) as pool:
        pool.submit(one)
        assert first.wait(60)
        split(Waiting(second, done), lambda module: isinstance(module, nn.ReLU), lambda _: True)
    assert nn.Module.__call__ is before


def test_threads_may_predict_with_a_network_that_has_begun(digits: tuple[Tensor, Tensor]) -> None:
    noisy, x = with_sap(checkpoints.load("resnet20-digits")), digits[0][:2]
    noisy.begin(x[:1].float())
    expected = [evaluation.predict(noisy, x, 3, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: evaluation.predict(noisy, x, 3, seed), range(4)))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda noisy: pickle.loads(pickle.dumps(noisy))])
def test_a_copied_network_draws_the_same_noise_and_shares_none(copied: Callable[[NoisyModel], NoisyModel]) -> None:
    noisy = with_sap(nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU()).eval())
    other, x = copied(noisy), torch.ones(3, 4)
    noises = {id(module.noise) for module in other.modules() if isinstance(module, SAP | NoisyModel)}
    assert len(noises) == 1
    assert id(noisy.noise) not in noises
    assert torch.equal(other(x, seed=3, passes=2), noisy(x, seed=3, passes=2))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_whole_numbers_of_every_type_name_the_same_noise(dtype: torch.dtype, backend: str) -> None:
    h, names = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    expected = sap(h, ids=names, passes=names, seed=1, backend=backend)
    assert torch.equal(sap(h, ids=names.to(dtype), passes=names.to(dtype), seed=1, backend=backend), expected)


def test_a_noisy_model_refuses_ids_of_another_length() -> None:
    model = NoisyModel(nn.Identity(), randomness.Noise(), {})
    with pytest.raises(SapcoreError, match=r"ids has shape \(2,\), but must be \(3,\), one per example"):
        model(torch.ones(3, 1), ids=torch.arange(2))


def test_a_noisy_model_refuses_passes_of_another_length() -> None:
    model = NoisyModel(nn.Identity(), randomness.Noise(), {})
    with pytest.raises(SapcoreError, match="passes has shape"):
        model(torch.ones(3, 1), passes=torch.arange(2))


def test_noisy_statistics_are_those_of_the_noisy_passes() -> None:
    """The mean over batches, each in its pass, of what the norm after SAP sees; all else stays."""
    norm = nn.BatchNorm1d(50, momentum=0.3)
    plain = nn.Sequential(nn.Linear(4, 50), nn.ReLU(), norm).eval()
    noisy = with_sap(plain)
    x, ids = torch.rand(21, 4, generator=torch.Generator().manual_seed(0)), torch.arange(21)
    before = copy.deepcopy(noisy.state_dict())
    own = with_noisy_statistics(noisy, x, seed=3, batch_size=10)
    upto = with_sap(plain[:2])
    parts = enumerate(ids.split(7))  # no batch of one, of which there is no variance
    seen = [upto(x[part], seed=randomness.stream(3, "statistics"), ids=part, passes=k) for k, part in parts]
    found = own.state_dict()
    torch.testing.assert_close(found["model.2.running_mean"], torch.stack([h.mean(0) for h in seen]).mean(0))
    torch.testing.assert_close(found["model.2.running_var"], torch.stack([h.var(0) for h in seen]).mean(0))
    assert all(torch.equal(noisy.state_dict()[k], v) for k, v in before.items())
    assert {k for k, v in found.items() if not torch.equal(v, before[k])} == {
        "model.2.running_mean", "model.2.running_var", "model.2.num_batches_tracked",
    }  # fmt: skip
    assert [(m.training, m.momentum) for m in own.modules() if isinstance(m, nn.BatchNorm1d)] == [(False, 0.3)]


@pytest.mark.parametrize(("kind", "level"), [("sap", 20), ("dropout", 0.4), ("rsa", 1.2)])
def test_statistics_of_its_own_serve_a_network_with_much_noise(
    kind: str, level: float, digits: tuple[Tensor, Tensor]
) -> None:
    dense = checkpoints.load("resnet20-digits")
    noisy = with_sap(dense, level) if kind == "sap" else BASELINES[kind](dense, level)
    own = with_noisy_statistics(noisy, data.load("digits", "train")[0][:600], batch_size=50)
    x, y = digits[0][:100], digits[1][:100]
    right = [evaluation.accuracy(evaluation.predict(net, x, 10), y).value for net in (noisy, own)]
    assert right[1] > right[0] + 0.1


def test_noisy_statistics_want_a_noisy_network_images_and_a_norm_that_keeps_some() -> None:
    with pytest.raises(SapcoreError, match="the network is a Linear, but must be a noisy one, such as with_sap makes"):
        with_noisy_statistics(nn.Linear(4, 5), torch.ones(3, 4))
    noisy = with_sap(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.BatchNorm1d(5)))
    with pytest.raises(SapcoreError, match=r"images is a list, but must be a torch\.Tensor"):
        with_noisy_statistics(noisy, [[1.0, 2.0, 3.0, 4.0]])  # type: ignore[arg-type]
    with pytest.raises(SapcoreError, match="batch_size is 0, but must be a whole number of 1 or more"):
        with_noisy_statistics(noisy, torch.ones(3, 4), batch_size=0)
    with pytest.raises(SapcoreError, match="there is no image to take the statistics of, but one or more are needed"):
        with_noisy_statistics(noisy, torch.ones(0, 4))
    for few, most in ((torch.ones(1, 4), 500), (torch.ones(3, 4), 1), (torch.ones(3, 4), 2)):
        with pytest.raises(SapcoreError, match="a batch of 1 gives this network's BatchNorm no variance; take more"):
            with_noisy_statistics(noisy, few, batch_size=most)
    for last in (nn.Linear(5, 5), nn.BatchNorm1d(5, track_running_stats=False)):
        noisy = with_sap(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), last))
        with pytest.raises(SapcoreError, match="the network has no BatchNorm with running statistics"):
            with_noisy_statistics(noisy, torch.ones(3, 4))
