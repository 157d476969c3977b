"""The report during training: never more than a hundredth of the time; pictures in real loggers, read back from their files."""

import warnings

import pytest
import runs
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from trainings import ResidualMLP, Task, fit, monitor, trainer

from gradflow import live
from gradflow.live import LiveReport
from gradflow.plotting import gallery


class Time:
    """A clock that stands still unless it is moved."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("cost", [0.5, 3.0, 20.0])
def test_rewriting_never_takes_more_than_a_hundredth_of_the_time(monkeypatch, cost):
    time, ends = Time(), []
    monkeypatch.setattr(LiveReport, "_write", lambda self, run, step: setattr(time, "now", time.now + run))
    began, spent, report = time.now, 0.0, LiveReport("report.html", clock=time)
    for step in range(20_000):
        time.now += 0.25
        if report.due:
            own = min(cost, 5.0 * 1.25 ** len(ends))  # the first one costs what it was taken to, and then they grow
            report.rewrite(lambda own=own: own, step)
            spent += own
            ends.append(time.now)
            assert spent <= live.SHARE * (time.now - began) + 1e-9
    assert len(ends) >= 3


def test_a_first_rewrite_that_was_dearer_than_thought_is_made_up_for(monkeypatch):
    time = Time()
    monkeypatch.setattr(LiveReport, "_write", lambda self, run, step: setattr(time, "now", time.now + 60))
    began, report = time.now, LiveReport("report.html", clock=time)
    while not report.due:
        time.now += 1
    report.rewrite(object, 0)
    while not report.due:
        time.now += 1
    assert (60 + 60) / (time.now + 60 - began) <= live.SHARE


def test_a_report_that_cannot_be_written_costs_its_time_too(monkeypatch, tmp_path):
    time = Time()

    def run():
        time.now += 4
        raise OSError("gone")

    report = LiveReport(str(tmp_path / "report.html"), clock=time)
    time.now += 500
    assert report.due
    with pytest.raises(OSError, match="gone"):
        report.rewrite(run, 0)
    assert not report.due


def test_nothing_is_read_where_nobody_takes_anything(tmp_path):
    def never():
        raise AssertionError

    LiveReport(None, [CSVLogger(tmp_path)]).rewrite(never, 0)


def test_the_report_is_rewritten_while_training_goes_on_and_pictures_reach_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setattr(LiveReport, "due", property(lambda self: self._spent == 0.0))  # once, at the first step
    logger, path = TensorBoardLogger(tmp_path, "tb"), tmp_path / "gradflow" / "report.html"
    pages = []
    rewrite = LiveReport.rewrite
    monkeypatch.setattr(LiveReport, "rewrite", lambda self, run, step: (rewrite(self, run, step), pages.append(path.read_text())))
    fit(trainer(tmp_path, monitor(tmp_path, report=True, on_finding="ignore"), logger=logger), Task(ResidualMLP()))
    assert ["1 sampled step (step 0)" in page for page in pages] == [True, False]
    assert "6 sampled steps (0 to 5)" in pages[-1]
    images = events(logger).Images(live.TAG)
    assert [image.step for image in images] == [1, 6]
    assert all(image.encoded_image_string.startswith(b"\x89PNG") and image.width == 1260 for image in images)


def events(logger):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    found.Reload()
    return found


def test_a_logger_that_refuses_pictures_harms_neither_report_nor_the_others(tmp_path, caplog):
    class Refusing(CSVLogger):
        def log_image(self, key, images, step):
            raise ValueError("no pictures, please")

    logger = TensorBoardLogger(tmp_path, "tb")
    LiveReport(str(tmp_path / "report.html"), [Refusing(tmp_path), logger]).rewrite(lambda: runs.prenorm(blocks=2, last=50), 7)
    logger.finalize("success")
    assert "a logger did not take gradflow's picture" in caplog.text
    assert [image.step for image in events(logger).Images(live.TAG)] == [7]
    assert (tmp_path / "report.html").is_file()


def test_pictures_reach_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    from pytorch_lightning.loggers import WandbLogger

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger = WandbLogger(save_dir=tmp_path, offline=True)
        LiveReport(None, [logger]).rewrite(lambda: runs.prenorm(blocks=2, last=50), 7)
        logger.experiment.finish()
    assert list(tmp_path.rglob("media/images/gradflow/overview*.png"))


def test_pictures_reach_mlflow(tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow")
    from pytorch_lightning.loggers import MLFlowLogger

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path / 'runs.db'}", artifact_location=str(tmp_path / "artifacts"))
        LiveReport(None, [logger]).rewrite(lambda: runs.prenorm(blocks=2, last=50), 7)
    assert list((tmp_path / "artifacts").rglob("images/*overview*.png"))


def test_the_overview_as_an_image_is_drawn_to_its_edges():
    picture = gallery.pixels(gallery.overview(runs.prenorm(blocks=2, last=50)))
    assert picture.shape == (660, 1260, 3)
    assert (picture[0] == 255).all()
    assert (picture < 128).any()
