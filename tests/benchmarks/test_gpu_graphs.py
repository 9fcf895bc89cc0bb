"""How a call is captured and timed on a GPU, by stand-ins for torch.cuda: what is asked of it, and in which order."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu.bench import Variant, _Timed


class Device:
    """As much of torch.cuda as a timing asks for; every replay takes six milliseconds."""

    def __init__(self, monkeypatch, waits=False, capturable=True):
        self.log, self.mode, self.capturing = [], "default", False
        self.waits, self.capturable = waits, capturable
        stream = SimpleNamespace(wait_stream=lambda other: self.log.append("wait"))
        for name, stand_in in {
            "synchronize": lambda: self.log.append("synchronize"),
            "reset_peak_memory_stats": lambda: None,
            "memory_allocated": lambda: 100,
            "max_memory_allocated": lambda: 350,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda _: contextlib.nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
            "graph": self.graph,
            "Event": self.event,
            "_sleep": lambda cycles: self.log.append("sleep"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    @contextlib.contextmanager
    def graph(self, graph):
        self.capturing = True
        self.log.append("capture")
        try:
            yield
            if not self.capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            self.capturing = False

    def event(self, enable_timing):
        assert enable_timing
        return SimpleNamespace(
            record=lambda: self.log.append("record"), synchronize=lambda: None, elapsed_time=lambda end: 6.0
        )

    def call(self, name):
        def run():
            if self.waits and self.mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            self.log.append((name, "captured") if self.capturing else name)

        return run


def timed(device, runs=2, **options):
    variant = Variant("any", lambda _: None, lambda *_: None, **options)
    bench = SimpleNamespace(device=torch.device("cuda"))
    return _Timed(bench, [device.call(number) for number in range(runs)], variant)


def test_a_call_is_captured_over_its_copies_and_on_one_of_them(monkeypatch):
    device = Device(monkeypatch)
    found = timed(device)
    assert (found.how, found.extra_bytes, found.copies) == ("graph", 250, 2)
    assert device.mode == "default"
    captured = [entry[0] for entry in device.log if isinstance(entry, tuple)]
    cold, warm = captured[: len(captured) // 2], captured[len(captured) // 2 :]
    assert cold == [0, 1] * (len(cold) // 2)
    assert set(warm) == {0}
    assert len(cold) == len(warm) <= 64
    device.log.clear()
    assert found.cold() == pytest.approx(6e-3 / len(cold))
    # What is queued behind the sleep is timed without the host.
    assert device.log == ["sleep", "record", "replay", "record"]
    device.log.clear()
    assert found.warm() == pytest.approx(6e-3 / len(warm))
    assert device.log[0] == 0  # the first copy is in the cache before


def test_a_call_that_waits_for_the_device_is_not_captured_and_its_row_says_host(monkeypatch):
    device = Device(monkeypatch, waits=True)
    found = timed(device)
    assert found.how == "host"
    assert device.mode == "default"
    assert "capture" not in device.log
    device.log.clear()
    assert found.cold() < 6e-3
    assert device.log == ["synchronize", 0, 1, "synchronize"]


def test_a_capture_that_fails_leaves_the_reason_and_the_hosts_clock(monkeypatch):
    found = timed(Device(monkeypatch, capturable=False))
    assert found.how == "host: operation not permitted when stream is capturing"
    assert found.cold() < 6e-3


def test_what_goes_through_the_host_is_called_no_more_than_it_must(monkeypatch):
    device = Device(monkeypatch)
    timed(device, runs=1, host=True)
    assert device.log.count(0) == 1
    assert "capture" not in device.log


def test_another_error_than_a_wait_is_not_taken_for_one(monkeypatch):
    device = Device(monkeypatch)

    def broken():
        if device.mode == "error":
            raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        _Timed(SimpleNamespace(device=torch.device("cuda")), [broken], Variant("any", lambda _: None, lambda *_: None))
    assert device.mode == "default"
