"""The garbage collector's threshold over a sampled step, and what a step leaves to the collector."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from trainings import BATCH, TOKENS, WIDTH, Transformer, seed

import gradflow
from gradflow.recorder.leeway import LEAST, Leeway

FOUND = (700, 10, 10)


@pytest.fixture(autouse=True)
def _collector():
    before = gc.get_threshold()
    gc.set_threshold(*FOUND)
    yield
    gc.enable()
    gc.set_threshold(*before)


class Cycle:
    def __init__(self) -> None:
        self.itself = self


class Training:
    """A model with a recorder, and a step of it."""

    def __init__(self, root, *, layers=2, every=1, tables="all") -> None:
        seed()
        self.model = Transformer(layers)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.recorder = gradflow.Recorder(self.model, self.optimizer, root, every_n_steps=every, tables=tables)

    def step(self, inside=lambda: None) -> None:
        with self.recorder.step():
            self.optimizer.zero_grad()
            self.model(torch.randn(BATCH, TOKENS, WIDTH)).square().mean().backward()
            inside()
            self.optimizer.step()


def test_threshold_is_higher_in_a_sampled_step_and_back_after_it(tmp_path):
    training, seen = Training(tmp_path, every=2), []
    for _ in range(4):
        training.step(lambda: seen.append(gc.get_threshold()))
        assert gc.get_threshold() == FOUND
    raised = (FOUND[0] + LEAST, *FOUND[1:])
    assert seen == [raised, raised, raised, FOUND]


def test_threshold_is_back_after_an_exception_of_the_training(tmp_path):
    training = Training(tmp_path)
    with pytest.raises(ZeroDivisionError):
        training.step(lambda: 1 / 0)
    assert gc.get_threshold() == FOUND


def test_threshold_is_back_after_a_fault_of_ours_and_after_a_step_without_backward(tmp_path, monkeypatch):
    training = Training(tmp_path)
    with training.recorder.step():
        pass
    assert gc.get_threshold() == FOUND
    monkeypatch.setattr("gradflow.recorder.parameter_taps.ParameterTaps.finish", lambda _: 1 / 0)
    training.step()
    assert training.recorder.stopped
    assert gc.get_threshold() == FOUND


@pytest.mark.parametrize("end", ["abort", "close"])
def test_threshold_is_back_after_a_step_that_was_given_up(tmp_path, end):
    training = Training(tmp_path)
    training.recorder.begin(0)
    assert gc.get_threshold() > FOUND
    getattr(training.recorder, end)()
    assert gc.get_threshold() == FOUND


def test_collector_that_is_off_stays_off(tmp_path):
    training, seen = Training(tmp_path), []
    gc.disable()
    training.step(lambda: seen.append(gc.isenabled()))
    assert seen == [False]
    assert not gc.isenabled()
    gc.set_threshold(0)
    training.step(lambda: seen.append(gc.get_threshold()[0]))
    assert seen == [False, 0]
    assert gc.get_threshold()[0] == 0


def test_threshold_that_the_training_sets_meanwhile_stays(tmp_path):
    training = Training(tmp_path)
    training.step(lambda: gc.set_threshold(1234, 5, 6))
    assert gc.get_threshold() == (1234, 5, 6)
    training.step()
    assert gc.get_threshold() == (1234, 5, 6)


def test_threshold_follows_several_steps_at_once_in_whatever_order_they_end():
    one, other = Leeway(), Leeway()
    one.open(modules=1)
    other.open(modules=1000)
    assert gc.get_threshold() == (FOUND[0] + LEAST + 200_000, *FOUND[1:])
    one.close()
    assert gc.get_threshold() == (FOUND[0] + 200_000, *FOUND[1:])
    other.close()
    other.close()
    assert gc.get_threshold() == FOUND


def test_step_that_was_dropped_does_not_raise_the_threshold_for_good():
    dropped, later = Leeway(), Leeway()
    dropped.open(modules=1)
    del dropped
    later.open(modules=1)
    assert gc.get_threshold() == (FOUND[0] + LEAST, *FOUND[1:])
    later.close()
    assert gc.get_threshold() == FOUND


def test_much_garbage_of_the_training_is_collected_within_a_sampled_step(tmp_path):
    training, first = Training(tmp_path), []

    def litter():
        first.append(weakref.ref(Cycle()))
        for _ in range(2 * LEAST):
            Cycle()
        assert first[0]() is None

    training.step(litter)
    assert training.recorder.stopped is None


def test_own_records_set_off_no_collection_and_hardly_any_is_left_to_one(tmp_path):
    left, runs = {}, []

    def note(phase, _info):
        if phase == "start" and gc.get_threshold() != FOUND:
            runs.append(phase)

    for layers in (1, 8):
        training = Training(tmp_path / str(layers), layers=layers)
        training.step()
        gc.collect()
        gc.callbacks.append(note)
        training.step()
        gc.callbacks.remove(note)
        gc.disable()
        gc.collect()
        training.step()
        left[layers] = gc.collect()
        gc.enable()
    assert runs == []
    assert left[8] < left[1] + 100
