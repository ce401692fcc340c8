"""`python -m bench.resnet` on small images: the right norms are timed, losses agree, all is written."""

import json

import pytest

torch = pytest.importorskip("torch", reason="fastbn.torch needs PyTorch")
pytestmark = [pytest.mark.bench, pytest.mark.peers]

from bench import networks, resnet  # noqa: E402 # they need PyTorch


@pytest.mark.parametrize(("name", "norms", "size"), [("ResNet-18", 20, 11_176_512), ("MobileNetV2", 52, 2_223_872)])
def test_the_networks_are_as_published_and_differ_in_their_norms_only(name, norms, size):
    model = networks.NETWORKS[name]()
    assert sum(p.numel() for p in model.parameters()) - (model[-1].in_features + 1) * networks.CLASSES == size
    for of, count, home in (("PyTorch", norms, "torch.nn"), ("fastbn", norms, "fastbn.torch"), ("none", 0, "")):
        modules = resnet.network(name, of, "last").modules()
        found = [type(module).__module__ for module in modules if isinstance(module, torch.nn.BatchNorm2d)]
        assert len(found) == count
        assert all(module.startswith(home) for module in found)


@pytest.fixture
def one_thread(monkeypatch):
    """For PyTorch, children's too: on a busy machine its threads spin for minutes as they wait for each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(resnet.machine, "give_threads", lambda number: 1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_run_on_small_images(tmp_path, one_thread, monkeypatch):
    takes = {"PyTorch": 0.4, "fastbn": 0.2, "none": 0.1}

    def rounds(calls, seconds):
        return {norms: [(call(), takes[norms])[1]] for norms, call in calls.items()}

    monkeypatch.setattr(resnet, "rounds", rounds)
    monkeypatch.setattr(resnet, "FORMATS", ("last",))
    data, readme = tmp_path / "resnet.json", tmp_path / "README.md"
    readme.write_text("before\n<!-- resnet:begin -->\nold\n<!-- resnet:end -->\nafter\n")
    words = "--images 4 --side 32 --steps 3 --modes eager --networks ResNet-18".split()
    assert resnet.main([*words, "--json", str(data), "--readme", str(readme)]) == 0
    result = json.loads(data.read_text())
    assert result["losses"][0]["apart"] <= resnet.LOSS_ERROR
    assert [len(losses) for losses in result["losses"][0]["losses"].values()] == [3, 3]
    assert min(result["memory"][0]["megabytes"].values()) > 100
    assert data.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = readme.read_text()
    for what in ("training", "inference"):
        assert f"\n| ResNet-18 | last | eager | {what} | 400 ms | 200 ms | 2.00x | 75 % | 50 % |\n" in text
    assert "old" not in text
    assert "Written by `python -m bench.resnet` from [its results](resnet.json)." in text
    assert resnet.main(["--from", str(data), "--readme", str(readme)]) == 0
    assert readme.read_text() == text
