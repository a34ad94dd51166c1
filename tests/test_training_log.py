"""Protects the log: means over the right steps, lines that outlive a kill and a resume, loss by timestep."""

import json
import math
import os

import pytest
import torch

from minidistill.errors import InputError
from minidistill.training.log import MetricsLog, bin_by_timestep, format_line, format_table, read_metrics


def test_bins_hold_means_and_cover_every_timestep_once_also_when_they_do_not_divide():
    loss, t = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]), torch.tensor([0, 99, 100, 999, 950])
    assert bin_by_timestep(loss, t) == {"0-99": 2.0, "100-199": 5.0, "900-999": 8.0}
    for total, bins in ((1000, 10), (1000, 7), (25, 10), (4, 10)):
        t = torch.arange(total)
        means = bin_by_timestep(t.float(), t, total, bins)
        covered = []
        for key, mean in means.items():
            low, high = map(int, key.split("-"))
            assert mean == pytest.approx((low + high) / 2)
            covered += range(low, high + 1)
        assert covered == list(range(total))


def log_steps(log, first, last, micro_batches=1):
    for step in range(first, last):
        for i in range(micro_batches):
            log.add({"loss": torch.tensor(float(step + i)), "task": 0.5}, torch.ones(2), torch.tensor([5, 995]))
        log.end_step(step + 1, lr=0.1, grad_norm=torch.tensor(2.0))


def test_a_line_is_the_mean_since_the_last_line_and_the_last_step_is_always_logged(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, total=7, every=3) as log:
        log_steps(log, 0, 3)
        lines = read_metrics(path)  # in the file at once
        log_steps(log, 3, 7)
    assert lines == read_metrics(path)[:1]
    lines = read_metrics(path)
    assert [(line["step"], line["loss"]) for line in lines] == [(3, 1.0), (6, 4.0), (7, 6.0)]
    assert lines[0]["task"] == 0.5 and lines[0]["lr"] == 0.1 and lines[0]["grad_norm"] == 2
    assert lines[0]["loss_by_timestep"] == {"0-99": 1.0, "900-999": 1.0} and lines[0]["ms_per_step"] > 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 3
    assert printed.startswith("step 0003/0007 | loss 1 (task 0.5) | ") and "ms/step | eta" in printed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full is Linux's")
def test_a_full_disk_ends_in_one_line(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl", total=1, every=1) as log:
        log._file.close()
        told = pytest.raises(InputError, match=r"cannot write .*metrics\.jsonl: No space left on device")
        with open("/dev/full", "a") as log._file, told:
            log_steps(log, 0, 1)


def test_all_micro_batches_count_and_a_part_is_averaged_over_when_it_came(tmp_path):
    with MetricsLog(tmp_path / "m", total=1, every=1) as log:
        log.add({"penalty": 8.0})
        log_steps(log, 0, 1, micro_batches=4)
    assert read_metrics(tmp_path / "m")[0]["loss"] == 1.5 and read_metrics(tmp_path / "m")[0]["penalty"] == 8


def test_resuming_drops_later_lines_and_a_torn_one_and_names_a_damaged_one(tmp_path):
    path = tmp_path / "m"
    with MetricsLog(path, total=10, every=1) as log:
        log_steps(log, 0, 6)
    assert read_metrics(tmp_path / "absent") == []
    with path.open("a") as file:
        file.write('{"step": 7, "lo')
    with MetricsLog(path, total=10, every=1, start=4) as log:
        log_steps(log, 4, 10)
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 11))
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(InputError, match="line 2"):
        read_metrics(path)


def test_a_line_has_no_infinity_no_reserved_name_and_keeps_no_graph(tmp_path):
    weight = torch.ones(2, requires_grad=True)
    with MetricsLog(tmp_path / "m", total=1) as log:
        with pytest.raises(ValueError, match="lr"):
            log.add({"lr": 1.0})
        log.add({"loss": weight.sum()}, weight * 2, torch.tensor([1, 2]))
        assert not log._sums["loss"].requires_grad and not log._by_sample[0][0].requires_grad
        log.end_step(1, lr=0.1, grad_norm=math.inf)
    assert json.loads((tmp_path / "m").read_text(), parse_constant=pytest.fail)["grad_norm"] is None


def test_untimed_work_is_not_time_per_step(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("minidistill.training.log.time.perf_counter", lambda: now[0])
    with MetricsLog(tmp_path / "m", total=4, every=2) as log:
        for step in range(4):
            now[0] += 0.5
            log.add({"loss": 1.0})
            log.end_step(step + 1, lr=1.0, grad_norm=1.0)
            with log.untimed():
                now[0] += 100
    assert [line["ms_per_step"] for line in read_metrics(tmp_path / "m")] == [500, 500]


def test_a_table_is_aligned():
    table = format_table([("", "parameters", "ms"), ("teacher", "9 M", "12.5"), ("student after", "4 M", "7")])
    assert table.splitlines() == [
        "               parameters    ms",
        "-------------  ----------  ----",
        "teacher               9 M  12.5",
        "student after         4 M     7",
    ]


def test_the_line_for_people():
    losses = {"loss": 0.412, "task": 0.081, "out": 0.019, "feat": 0.312}
    line = format_line(120, 300, losses, 371.2)
    assert line == "step 0120/0300 | loss 0.412 (task 0.081 out 0.019 feat 0.312) | 371.2 ms/step | eta 01:06"
    line = format_line(5, 50_000, {"generator": 20.123, "discriminator": 1e-5}, 1.25)
    assert line == "step 00005/50000 | generator 20.1 discriminator 1e-05 | 1.2 ms/step | eta 01:02"
