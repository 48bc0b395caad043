"""Order and position under Lightning: workers, processes, resumes, and data that changed."""

import json

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.alignment import AlignmentData, AlignmentDataConfig
from datamodules.data_config import DataConfig, Source
from datamodules.errors import DataError
from datamodules.mixture import BatchPositions
from tests.datamodules import worlds


class Recorder(lightning.LightningModule):
    """Learns nothing; remembers which samples came at which batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[str]] = {}
        self.validated: list[str] = []

    def training_step(self, batch, index):
        self.seen[index] = batch.report.samples
        return self.weight.sum()

    def validation_step(self, batch, index):
        self.validated += batch.report.samples

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class EagerRecorder(Recorder):
    """Asks for the length of the run before the checkpoint is restored, which builds the loader early."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


class RankRecorder(Recorder):
    """Leaves what each process read in a file."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        (self.folder / f"rank{self.global_rank}.json").write_text(json.dumps(list(self.seen.values())))


@pytest.fixture
def make(tmp_path, tiny_tokenizer):
    pattern = worlds.write(tmp_path / "train", "captions", worlds.captions(23))
    held_out = worlds.write(tmp_path / "held-out", "captions", worlds.captions(11))

    def build(**options):
        options = {"batch_size": 3, "captions": Source(pattern, validation=held_out), "validation_samples": 7} | options
        return AlignmentData(AlignmentDataConfig(**options), worlds.encoder(tiny_tokenizer), worlds.clip_tokenize)

    return build


def fit(folder, data, steps, recorder=None, checkpoint=None, **options):
    recorder = recorder or Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)],
        **({"limit_val_batches": 0} | options),
    )
    trainer.fit(recorder, datamodule=data, ckpt_path=checkpoint)
    return recorder


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("recorder", [Recorder, EagerRecorder])
def test_a_resumed_run_reads_what_the_uninterrupted_one_reads(tmp_path, make, workers, recorder):
    whole = fit(tmp_path / "whole", make(), 12).seen
    fit(tmp_path / "cut", make(num_workers=workers), 6, recorder())
    resumed = fit(
        tmp_path / "cut", make(num_workers=2 - workers), 12, recorder(), str(tmp_path / "cut" / "step=4.ckpt")
    ).seen
    assert sorted(whole) == list(range(12)) and sorted(resumed) == list(range(4, 12))
    assert resumed == {index: whole[index] for index in resumed}


def test_a_finished_run_can_be_made_longer(tmp_path, make):
    whole = fit(tmp_path / "whole", make(), 12).seen
    fit(tmp_path / "short", make(), 8)
    longer = fit(tmp_path / "short", make(), 12, checkpoint=str(tmp_path / "short" / "step=8.ckpt")).seen
    assert list(longer.values()) == [whole[index] for index in range(8, 12)]


def test_accumulated_batches_are_counted(tmp_path, make):
    whole = fit(tmp_path / "whole", make(), 8, accumulate_grad_batches=2).seen
    assert len(whole) == 16
    path = str(tmp_path / "whole" / "step=4.ckpt")
    resumed = fit(tmp_path / "cut", make(), 8, checkpoint=path, accumulate_grad_batches=2).seen
    assert resumed == {index: whole[index] for index in range(8, 16)}


def test_another_global_batch_goes_on_at_the_same_sample(tmp_path, make):
    whole = [name for names in fit(tmp_path / "whole", make(), 12).seen.values() for name in names]
    fit(tmp_path / "cut", make(), 4)
    path = str(tmp_path / "cut" / "step=4.ckpt")
    resumed = fit(tmp_path / "cut", make(batch_size=6), 8, checkpoint=path).seen
    assert [name for names in resumed.values() for name in names] == whole[12:]
    # and once more from a checkpoint of the resumed run
    path = str(tmp_path / "cut" / "step=8.ckpt")
    again = fit(tmp_path / "cut", make(batch_size=3), 10, checkpoint=path).seen
    reference = make()
    reference.setup()
    assert [name for names in again.values() for name in names] == reference.train_dataset[range(36, 42)].report.samples


def test_processes_share_the_order_without_gaps():
    one = [i for step in BatchPositions(6, 5, 0, 1, lambda: (2, 12)) for i in step]
    ranks = [list(BatchPositions(2, 5, rank, 3, lambda: (2, 12))) for rank in range(3)]
    assert one == list(range(12, 30))
    assert [i for steps in zip(*ranks, strict=True) for step in steps for i in step] == one
    assert {len(steps) for steps in ranks} == {3} and len(BatchPositions(2, 5, 0, 3, lambda: (2, 12))) == 5


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(tmp_path, make):
    whole = [name for names in fit(tmp_path / "whole", make(), 12).seen.values() for name in names]
    fit(tmp_path / "cut", make(), 4)
    path = str(tmp_path / "cut" / "step=4.ckpt")
    two = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    fit(tmp_path / "cut", make(), 8, RankRecorder(tmp_path), path, **two)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [len(steps) for steps in ranks] == [4, 4]
    assert [name for steps in zip(*ranks, strict=True) for names in steps for name in names] == whole[12:36]
    with pytest.raises(Exception, match="use_distributed_sampler=false"):
        fit(tmp_path / "cut", make(), 8, None, path, **(two | {"use_distributed_sampler": True}))


def test_epochs_pass_through_every_sample_once(tmp_path, make):
    seen = [name for names in fit(tmp_path, make(batch_size=23), 3).seen.values() for name in names]
    for epoch in range(3):
        assert len(set(seen[23 * epoch : 23 * (epoch + 1)])) == 23


def test_validation_is_the_same_every_time(tmp_path, make):
    runs = [
        fit(tmp_path / str(seed), make(seed=seed), 2, val_check_interval=1, limit_val_batches=1.0) for seed in (0, 1)
    ]
    first = runs[0].validated
    assert len(first) == 2 * 9 and first[:9] == first[9:]  # 7 samples in batches of 3
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
    data = make(captions=source, num_workers=2, max_bad_share=0.9, batch_size=5)
    fit(tmp_path, data, 4)
    assert data.counter.dropped == {"empty_caption": 4} and data.counter.reads >= 20
    resumed = make(captions=source, max_bad_share=0.9, batch_size=5)
    fit(tmp_path, resumed, 5, checkpoint=str(tmp_path / "step=4.ckpt"))
    assert resumed.counter.reads >= data.counter.reads + 5


def test_batches_move_and_keep_their_report(make):
    data = make()
    data.setup()
    batch = data.train_dataset[range(3)]
    moved = batch.to("meta")
    assert moved.prompt.ids.device.type == moved.clip_ids.device.type == "meta"
    assert moved.report is batch.report and len(moved) == 3


def test_what_cannot_be_read_is_said(make, tmp_path):
    with pytest.raises(DataError, match=r"data\.captions\.shards"):
        make(captions=Source()).setup()
    with pytest.raises(DataError, match=r"nowhere.*does not exist"):
        make(captions=Source(str(tmp_path / "nowhere" / "*.tar"))).setup()
    with pytest.raises(DataError, match="max_steps=-1"):
        fit(tmp_path, make(), -1)


@pytest.mark.parametrize(
    "key, value",
    [("batch_size", 0), ("num_workers", -1), ("max_bad_share", 1.5), ("min_bad_count", 0), ("validation_samples", 0)],
)
def test_values_are_checked(key, value):
    with pytest.raises(ValueError, match=f"{key}={value}"):
        DataConfig(**{key: value})
