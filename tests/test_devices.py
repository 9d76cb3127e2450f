"""Modules go to the accelerator and come home; which GPU a process takes. No GPU is needed: the device is a stand-in."""

import pytest
import torch

from compdiff import devices


class Traveller(torch.nn.Module):
    """Remembers where it was sent instead of going there."""

    def __init__(self):
        super().__init__()
        self.weight, self.sent = torch.nn.Parameter(torch.zeros(1)), []

    def to(self, where):
        self.sent.append(str(where))
        return self


def test_modules_come_home_also_after_an_error(monkeypatch):
    monkeypatch.setattr(devices, "accelerator", lambda: torch.device("cuda", 1))
    one, two = Traveller(), Traveller()
    with pytest.raises(RuntimeError), devices.on_accelerator(one, two) as there:
        assert str(there) == "cuda:1" and one.sent == two.sent == ["cuda:1"]
        raise RuntimeError
    assert one.sent == two.sent == ["cuda:1", "cpu"]


@pytest.mark.parametrize("rank, gpus, expected", [("", 0, "cpu"), ("", 4, "cuda:0"), ("3", 4, "cuda:3"), ("5", 4, "cuda:1")])
def test_each_process_has_its_own_gpu(monkeypatch, rank, gpus, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", rank) if rank else monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert str(devices.accelerator()) == expected


@pytest.mark.parametrize("cpu, expected", [(True, "cpu"), (False, "cuda:0")])
def test_a_launch_on_the_cpu_stays_there_though_there_is_a_gpu(monkeypatch, cpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(cpu))  # as `accelerate launch` writes its --cpu
    module = Traveller()
    with devices.on_accelerator(module) as there:
        assert module.sent == [str(there)] == [expected]
