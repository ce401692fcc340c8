"""`python -m bench.resnet` on small images: every contestant runs, losses agree, what is printed and written comes from the JSON."""

import json

import pytest

pytest.importorskip("torch", reason="fastbn.torch needs PyTorch")
pytest.importorskip("rich", reason="tables need rich")
pytest.importorskip("matplotlib", reason="the plot needs matplotlib")

from torch import nn

from bench import networks, resnet

SMALL = ["--images", "4", "--side", "32", "--steps", "3", "--seconds", "0", "--modes", "eager"]


@pytest.mark.parametrize(("name", "norms"), [("ResNet-18", 20), ("MobileNetV2", 52)])
def test_the_networks_are_what_their_papers_say(name, norms):
    model = networks.NETWORKS[name]()
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == norms
    parameters = sum(p.numel() for p in model.parameters()) - (model[-1].in_features + 1) * networks.CLASSES
    assert parameters == {"ResNet-18": 11_176_512, "MobileNetV2": 2_223_872}[name]  # as published, without the classifier


def test_contestants_share_weights_and_differ_in_their_norms():
    for norms, kind in ((resnet.PYTORCH, "torch.nn"), (resnet.FASTBN, "fastbn.torch")):
        model = resnet.network("ResNet-18", norms, "last")
        found = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(found) == 20
        assert all(type(module).__module__.startswith(kind) for module in found)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in resnet.network("ResNet-18", resnet.NONE, "first").modules())


def test_a_run_on_small_images(tmp_path, capsys):
    data, readme = tmp_path / "resnet.json", tmp_path / "README.md"
    readme.write_text("before\n<!-- resnet:begin -->\nold\n<!-- resnet:end -->\nafter\n")
    assert resnet.main([*SMALL, "--networks", "ResNet-18", "--json", str(data), "--readme", str(readme)]) == 0
    result = json.loads(data.read_text())
    assert [(r["layout"], r["pass"]) for r in result["records"]] == [(f, w) for f in resnet.FORMATS for w in resnet.PASSES]
    assert all(r["seconds"][n] > 0 for r in result["records"] for n in (resnet.PYTORCH, resnet.FASTBN, resnet.NONE))
    for found in result["losses"]:
        assert found["apart"] <= resnet.LOSS_ERROR
        assert len(found["losses"][resnet.FASTBN]) == 3
    assert all(m["megabytes"][n] > 100 for m in result["memory"] for n in (resnet.PYTORCH, resnet.FASTBN))
    assert data.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = readme.read_text()
    assert "old" not in text
    assert text.count("| ResNet-18 |") == 4
    assert "Written by `python -m bench.resnet --from resnet.json --readme README.md`." in text
    capsys.readouterr()
    assert resnet.main(["--from", str(data), "--readme", str(readme)]) == 0
    assert readme.read_text() == text


def test_a_readme_without_the_markers_is_refused_at_once(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n")
    assert resnet.main([*SMALL, "--readme", str(readme)]) == 2
    assert "resnet:begin" in capsys.readouterr().err
