"""What stands beside the bar fits into 80 columns."""

from sacl_ds.telemetry.progress import describe, duration


def test_figures_fit_a_terminal() -> None:
    figures = {"itc": 5.01, "itm": 0.681, "mlm": 5.775, "pairs_per_second": 1234.5, "step_seconds": 0.1234}
    line = describe(figures | {"alpha": 0.5, "logit_scale": 14.28})
    assert line == "itc 5.010 itm 0.681 mlm 5.775  1234 pairs/s  0.123 s/step  α 0.50  scale 14.3"
    assert len(line) <= 80
    assert "mlm" not in describe({"itc": 5.01, "pairs_per_second": 1, "step_seconds": 1, "logit_scale": 1})


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.6, 61, 3725)] == ["0:00", "1:00", "1:01", "1:02:05"]


def test_what_a_gpu_adds_fits_a_hundred_columns() -> None:
    figures = {"itc": 5.01, "itm": 0.681, "mlm": 5.775, "pairs_per_second": 12345.6, "step_seconds": 0.1234}
    figures |= {"pairs_per_second_per_device": 1543.2, "flops_per_second": 4e14, "mfu": 0.412}
    line = describe(figures | {"memory_peak_bytes": 76.54e9, "alpha": 0.5, "logit_scale": 14.28})
    assert "12346 pairs/s  0.123 s/step  MFU 41%  76.5 GB  α 0.50" in line
    assert len(line) <= 100
