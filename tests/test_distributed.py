"""Two processes (gloo, on the CPU) against one that sees their batches together."""

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_training import Cropped, model

import segvit
from segvit.data.stream import Stream
from segvit.metrics import Scores
from segvit.training import fit

STEPS = 5
CASES = {  # options of fit, options of the model
    "plain": ({}, {}),
    "a rank without labels": ({}, {}),
    "micro batches": ({"micro_batch": 1}, {}),
    "frozen backbone": ({}, {"freeze_backbone": True}),
    "activation checkpointing": ({}, {"activation_checkpointing": True}),
    "edge": ({"micro_batch": 1}, {"shrink": "edge"}),
    "added classes": ({}, {"added": [2]}),
}
SHARDED = ("plain", "micro batches", "frozen backbone", "activation checkpointing", "edge", "added classes")


class Exact(Cropped):
    """In float64: Adam makes whole steps of float32's rounding where a gradient is zero, as those of key biases are."""

    def __getitem__(self, i):
        image, labels = super().__getitem__(i)
        return image.double(), labels


class Unlabelled(Exact):
    """No labels in every other pair of positions, which with two processes is the batch of one of them."""

    def __getitem__(self, i):
        image, labels = super().__getitem__(i)
        return image, torch.full_like(labels, 255) if self.position(i) % 4 < 2 else labels

    def position(self, i):
        stream = Stream(range(len(self)), 4, 0)
        return [stream.index(p) for p in range(len(self))].index(i)


def data(case):
    return (Unlabelled if case == "a rank without labels" else Exact)(4 * STEPS, 32)


def train(case, batch_size, accelerator=None, state=None, start=None, **more):
    """Records, final weights and averages of a short training."""
    options, kwargs = CASES[case]
    torch.manual_seed(0)
    m = model(**kwargs).double()
    if start is not None:
        m.load_state_dict(start)
    saved = []
    recipe = {"steps": STEPS, "batch_size": batch_size, "lr": 1e-3, "decoder_lr": 1.0, "ema": 0.9}
    records = fit(
        m,
        segvit.ATMLoss(6, learned=m.learned_classes).double(),
        data(case),
        **recipe | options | more,
        accelerator=accelerator,
        validate_every=1,
        checkpoint=lambda training, weights: saved.append(copy.deepcopy((training, weights))),
        state=state,
    )
    return [r["loss"] for r in records], saved


def evaluated_is_whole(accelerator, ema):
    """Whether a validation in a sharded training sees plain weights, and those of the checkpoint (or their average)."""
    seen = []

    def validate(step, evaluated):
        plain = all(type(p.data) is torch.Tensor for p in evaluated.parameters())
        seen.append((plain, {name: p.clone() for name, p in evaluated.named_parameters()}))
        return Scores(*(0.5, 0.5, 0.5, [], [], []))

    saved = train("plain", 2, accelerator, fsdp=True, ema=ema, validate=validate)[1]
    want = [weights if ema is None else state["ema"] for state, weights in saved]
    same = all(torch.equal(p, w[name]) for (_, found), w in zip(seen, want) for name, p in found.items())
    return [len(seen) == STEPS and all(plain for plain, _ in seen), same]


def rank(number, port, folder):
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    from accelerate import Accelerator

    accelerator, results = Accelerator(cpu=True), {}
    for case in CASES:
        for fsdp in (False, True) if case in SHARDED else (False,):
            results[case, fsdp] = train(case, 2, accelerator, fsdp=fsdp)
    results["evaluated"] = [evaluated_is_whole(accelerator, ema) for ema in (None, 0.5)]
    for fsdp in (False, True):
        state, start = torch.load(Path(folder, "one.pt"))  # anew: an optimizer goes on in the tensors it is given
        again = train("plain", 2, accelerator, state=state, start=start, fsdp=fsdp)
        results["resumed", fsdp] = again
    torch.save(results, Path(folder, f"rank{number}.pt"))
    dist.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of both processes, and of one process with the joint batch."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = {case: train(case, 4) for case in CASES}
    torch.save(alone["plain"][1][2], folder / "one.pt")
    mp.spawn(rank, (free_port(), folder), nprocs=2)
    return alone, [torch.load(folder / f"rank{i}.pt") for i in range(2)]


def close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_the_joint_batch(ranks, case, fsdp):
    alone, both = ranks
    if (case, fsdp) not in both[0]:
        pytest.skip("one of the two is enough here")
    for results in both:  # what is recorded is the joint batch's, in every process
        torch.testing.assert_close(results[case, fsdp][0], alone[case][0], rtol=1e-9, atol=1e-9)
    state, weights = both[0][case, fsdp][1][-1]
    close(weights, alone[case][1][-1][1], 1e-9)
    close(state["ema"], alone[case][1][-1][0]["ema"], 1e-9)
    close(weights, both[1][case, fsdp][1][-1][1], 0)


def test_parts_of_a_batch_are_the_batch(ranks):
    alone, _ = ranks
    torch.testing.assert_close(alone["micro batches"][0], alone["plain"][0], rtol=1e-9, atol=1e-9)
    close(alone["micro batches"][1][-1][1], alone["plain"][1][-1][1], 1e-9)


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_a_run_goes_on_with_other_processes_than_it_began_with(ranks, fsdp):
    alone, both = ranks
    weights, want = both[0]["resumed", fsdp][1][-1][1], alone["plain"][1][-1][1]
    assert len(both[0]["resumed", fsdp][0]) == STEPS - 3 + 1  # the record at the checkpoint is repeated
    close(weights, want, 1e-9)
    state, start = both[0]["plain", fsdp][1][2]
    assert state["step"] == 3
    again = train("plain", 4, state=state, start=start)
    close(again[1][-1][1], want, 1e-9)
    close(again[1][-1][0]["ema"], alone["plain"][1][-1][0]["ema"], 1e-9)


def test_what_fsdp_evaluates_is_the_whole_model(ranks):
    assert ranks[1][0]["evaluated"] == [[True, True], [True, True]]
