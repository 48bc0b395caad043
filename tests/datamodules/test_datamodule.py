"""Order and position under Lightning: workers, ranks, micro-batches, resumes, and data that changed."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from datamodules.agreement import CatchDataErrors
from datamodules.alignment import AlignmentData, AlignmentDataConfig
from datamodules.data_config import DataConfig, Source
from datamodules.entities import EntityRules
from datamodules.errors import DataError
from datamodules.images import Limits
from datamodules.instruction import InstructionDataConfig
from datamodules.language_modelling import LanguageModellingDataConfig
from datamodules.remote import RemoteConfig
from tests.datamodules import worlds
from tests.datamodules.recorders import EagerRecorder, Recorder, fit


def data(folder, tokenizer, **options):
    """Over 23 captions and 11 held-out ones in the folder."""
    for name, count in (("train", 23), ("held-out", 11)):
        if not (folder / name).exists():
            worlds.write(folder / name, "captions", worlds.captions(count))
    source = Source(str(folder / "train" / "*.tar"), validation=str(folder / "held-out" / "*.tar"))
    options = {"micro_batch_size": 3, "captions": source, "validation_samples": 7} | options
    return AlignmentData(AlignmentDataConfig(**options), worlds.encoder(tokenizer), worlds.clip())


@pytest.fixture
def make(tmp_path, tiny_tokenizer):
    return partial(data, tmp_path, tiny_tokenizer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_tokenizer):
    """An uninterrupted run of twelve steps of six rows, and where its data are."""
    folder = tmp_path_factory.mktemp("whole")
    return fit(folder, data(folder, tiny_tokenizer, micro_batch_size=6), 12)


@pytest.mark.filterwarnings("error:You're resuming")
@pytest.mark.parametrize(("workers", "recorder"), [(2, Recorder), (0, EagerRecorder)])
def test_a_resumed_run_reads_what_the_uninterrupted_one_reads(tmp_path, make, whole, workers, recorder):
    fit(tmp_path, make(micro_batch_size=6, num_workers=workers), 6, recorder())
    path = str(tmp_path / "step=4.ckpt")
    resumed = fit(tmp_path, make(micro_batch_size=6, num_workers=2 - workers), 8, recorder(), path).seen
    # a finished run, made longer
    path = str(tmp_path / "step=8.ckpt")
    longer = fit(tmp_path, make(micro_batch_size=6), 12, recorder(), path).seen
    assert sorted(resumed) == list(range(4, 8)) and resumed | longer == {n: whole.seen[n] for n in range(4, 12)}


def test_a_step_divided_otherwise_goes_on_at_the_same_sample(tmp_path, make, whole):
    """Six rows a step: as one micro-batch, as two and as three."""
    fit(tmp_path / "cut", make(micro_batch_size=3), 4, micro_batches=2)
    path = str(tmp_path / "cut" / "step=4.ckpt")
    resumed = fit(tmp_path / "cut", make(micro_batch_size=2), 8, None, path, micro_batches=3)
    assert resumed.indices[4] == [[24, 25], [26, 27], [28, 29]]
    # and once more from a checkpoint of the resumed run
    path = str(tmp_path / "cut" / "step=8.ckpt")
    again = fit(tmp_path / "cut", make(micro_batch_size=6), 12, None, path)
    assert resumed.seen | again.seen == {step: whole.seen[step] for step in range(4, 12)}


def on_rank(data, rank, world_size, step=0):
    """The module as a trainer of `world_size` ranks has it, without the other ranks."""
    data.trainer = SimpleNamespace(max_steps=5, global_step=step, global_rank=rank, world_size=world_size)
    data.setup()
    return data


@pytest.mark.parametrize(("workers", "step"), [(0, 0), (2, 3)])
def test_a_step_has_the_same_rows_however_it_is_divided(make, workers, step):
    expected = [list(range(4 * number, 4 * number + 4)) for number in range(step, 5)]
    dataset = on_rank(make(), 0, 1).train_dataset
    names = [dataset[rows].report.samples for rows in expected]
    for size, micro_batches, world_size in ((4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)):
        ranks = []
        for rank in range(world_size):
            data = on_rank(make(micro_batch_size=size, num_workers=workers), rank, world_size, step)
            data.micro_batches = micro_batches
            loader = data.train_dataloader()
            ranks.append(list(loader))
            assert len(loader) == 5 and all(len(batches) == micro_batches for batches in ranks[-1])
        # Micro-batch k of all ranks comes before micro-batch k + 1 of any.
        steps = [[batch for micro in zip(*parts, strict=True) for batch in micro] for parts in zip(*ranks, strict=True)]
        assert [[index for batch in batches for index in batch.indices] for batches in steps] == expected
        assert [[name for batch in batches for name in batch.report.samples] for batches in steps] == names


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_counts_the_same_samples_on_any_number_of_ranks(make, world_size):
    """Ten rows in micro-batches of four; ranks get equally many, and the rows that fill them up do not count."""
    whole = on_rank(make(micro_batch_size=10, validation_samples=10), 0, 1)
    (expected,) = whole.val_dataloader()
    assert expected.counted == 10 and len(set(expected.report.samples)) == 10
    ranks = []
    for rank in range(world_size):
        data = on_rank(make(micro_batch_size=4, validation_samples=10), rank, world_size)
        ranks.append(list(data.val_dataloader()))
        assert len(ranks[-1]) == len(data.val_dataloader()) == {1: 3, 2: 2, 3: 1}[world_size]
    batches = [batch for ranked in ranks for batch in ranked]
    assert all(len(batch) == 4 and 0 <= batch.counted <= 4 for batch in batches)
    counted = [
        pair
        for batch in batches
        for pair in list(zip(batch.indices, batch.report.samples, strict=True))[: batch.counted]
    ]
    assert sorted(counted) == list(enumerate(expected.report.samples))


def test_validation_is_the_same_every_time(tmp_path, make):
    runs = [
        fit(tmp_path / str(seed), make(seed=seed), 2, val_check_interval=1, limit_val_batches=1.0) for seed in (0, 1)
    ]
    first = runs[0].validated
    assert len(first) == 2 * 7 and first[:7] == first[7:]
    assert runs[1].validated == first and runs[1].seen != runs[0].seen


@pytest.mark.parametrize("change", ["seed", "shards", "weight"])
def test_changed_data_are_refused_unless_accepted(tmp_path, make, change):
    fit(tmp_path, make(), 4)
    other = worlds.write(tmp_path / "other", "captions", worlds.captions(22))
    options = {"seed": {"seed": 5}, "shards": {"captions": Source(other)}, "weight": {"captions": Source(other, 3)}}[
        change
    ]
    path = str(tmp_path / "step=4.ckpt")
    with pytest.raises(DataError, match="seed 0 → 5" if change == "seed" else "captions.content"):
        fit(tmp_path, make(**options), 6, checkpoint=path)
    resumed = fit(tmp_path, make(**options, accept_changed_data=True), 6, checkpoint=path)
    assert sorted(resumed.seen) == [4, 5]


def test_counts_survive_workers_and_resumes(tmp_path, make):
    groups = [(f"k{i:03d}", {"txt": b"a dog" if i % 5 else b""}) for i in range(20)]
    source = Source(worlds.write_members(tmp_path / "a.tar", groups))
    data = make(captions=source, num_workers=2, max_bad_share=0.9, micro_batch_size=5)
    fit(tmp_path, data, 4)
    assert data.counter.dropped == {"empty_caption": 4} and data.counter.reads >= 20
    resumed = make(captions=source, max_bad_share=0.9, micro_batch_size=5)
    fit(tmp_path, resumed, 5, checkpoint=str(tmp_path / "step=4.ckpt"))
    assert resumed.counter.reads >= data.counter.reads + 5


def test_every_tensor_of_a_batch_is_pinned(make, monkeypatch):
    """Through what the DataLoader's thread calls; page-locked memory itself needs a GPU."""
    data = make()
    data.setup()
    answer = CatchDataErrors(data.train_dataset)[range(3)]
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    result = torch.utils.data._utils.pin_memory.pin_memory(answer)
    batch = answer.batch
    expected = {batch.prompt.ids, batch.prompt.image_mask, batch.prompt.padding, batch.text_ids}
    assert set(pinned) == expected and len(pinned) == 4
    assert result.batch.text_ids is not batch.text_ids and torch.equal(result.batch.prompt.ids, batch.prompt.ids)
    assert result.batch.report is batch.report and result.batch.prompt.lengths == batch.prompt.lengths


def test_what_cannot_be_read_is_said(make, tmp_path):
    with pytest.raises(DataError, match=r"data\.captions\.shards"):
        make(captions=Source()).setup()
    with pytest.raises(DataError, match=r"nowhere.*does not exist"):
        make(captions=Source(str(tmp_path / "nowhere" / "*.tar"))).setup()
    with pytest.raises(DataError, match="max_steps=-1"):
        fit(tmp_path, make(), -1)


REFUSALS = [
    *((DataConfig, key, 0) for key in ("micro_batch_size", "min_bad_count", "validation_samples", "lanes", "window")),
    *((DataConfig, key, value) for key, value in (("num_workers", -1), ("max_bad_share", 1.5))),
    *((DataConfig, key, value) for key, value in (("mixing", "per_epoch"), ("weights_of", "images"))),
    *((RemoteConfig, key, -1) for key in ("retries", "pause", "timeout", "connections")),
    *((LanguageModellingDataConfig, key, value) for key, value in (("caption_first", 2), ("sequence_length", 3))),
    *((EntityRules, key, 1.1) for key in ("drop_probability", "background_probability")),
    *((EntityRules, "drop", "never"), (Limits, "max_pixels", 0), (InstructionDataConfig, "edit_caption_drop", 2)),
    *((AlignmentDataConfig, "max_pieces", 0), (Source, "weight", -1)),
]


def test_values_that_are_refused(subtests):
    for schema, key, value in REFUSALS:
        with subtests.test(f"{schema.__name__}.{key}"), pytest.raises(ValueError, match=f"{key}='?{value}"):
            schema(**{key: value})
