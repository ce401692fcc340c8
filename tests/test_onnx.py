"""The nine BatchNormalization cases of ONNX's backend tests: two of inference and two of training as the operator's own
examples, five
networks of one layer that were converted from PyTorch; all of them float32."""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import published
import pytest
from shapes import COMPACT
from tolerances import check, scales

import fastbn

onnx = pytest.importorskip("onnx", reason="runs ONNX's own test cases: pip install 'fastbn[peers]'")

from onnx.backend.test import loader  # noqa: E402
from onnx.backend.test.case import node as node_cases  # noqa: E402

pytestmark = pytest.mark.peers

NODE = {
    "test_batchnorm_example",
    "test_batchnorm_epsilon",
    "test_batchnorm_example_training_mode",
    "test_batchnorm_epsilon_training_mode",
}
CONVERTED = {
    "test_BatchNorm1d_3d_input_eval",
    "test_BatchNorm2d_eval",
    "test_BatchNorm2d_momentum_eval",
    "test_BatchNorm3d_eval",
    "test_BatchNorm3d_momentum_eval",
}


class Case(NamedTuple):
    name: str
    attributes: dict[str, Any]
    inputs: list[np.ndarray]  # x, scale, B, mean, var
    outputs: list[np.ndarray]  # y; in training mode also the running mean and variance
    rtol: float
    atol: float


def _single_node(model: Any) -> Any:
    """The BatchNormalization node that is a model's whole graph, or None."""
    nodes = model.graph.node
    return nodes[0] if len(nodes) == 1 and nodes[0].op_type == "BatchNormalization" else None


def _case(name: str, node: Any, inputs: list[np.ndarray], outputs: list[np.ndarray], test: Any) -> Case:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return Case(name, attributes, inputs, outputs, test.rtol, test.atol)


def _node_tests() -> Iterator[Case]:
    # Only this operator's module: importing all of them, as ONNX's own collector does, raises NumPy warnings.
    state = np.random.get_state()  # noqa: NPY002  # the cases draw from the global generator
    np.random.seed(0)  # noqa: NPY002  # the same cases in every run
    for module in pkgutil.iter_modules(node_cases.__path__):
        if module.name in {"batchnorm", "batch_normalization"}:  # its name has changed between versions
            importlib.import_module(f"{node_cases.__name__}.{module.name}")
    np.random.set_state(state)  # noqa: NPY002
    for test in node_cases._NodeTestCases:
        node = _single_node(test.model)
        if node is not None:
            for inputs, outputs in test.data_sets:
                yield _case(test.name, node, inputs, outputs, test)


def _tensor(path: Path) -> np.ndarray:
    return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


def _converted_tests() -> Iterator[Case]:
    for test in loader.load_model_tests(kind="pytorch-converted"):
        folder = Path(test.model_dir)
        model = onnx.load(folder / "model.onnx")
        node = _single_node(model)
        if node is not None:
            weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
            for data in sorted(folder.glob("test_data_set_*")):
                inputs = [_tensor(data / "input_0.pb"), *(weights[key] for key in node.input[1:])]
                yield _case(test.name, node, inputs, [_tensor(data / "output_0.pb")], test)


CASES = [*_node_tests(), *_converted_tests()]


def test_the_nine_cases_were_found() -> None:
    assert sorted(case.name for case in CASES) == sorted(NODE | CONVERTED)
    assert len(CASES) == 9
    assert sorted(case.name for case in CASES if case.attributes.get("training_mode")) == sorted(
        n for n in NODE if "training" in n
    )
    assert {array.dtype for case in CASES for array in case.inputs} == {np.dtype(np.float32)}


def _passes(case: Case, got: np.ndarray, want: np.ndarray) -> None:
    """ONNX's own criterion."""
    np.testing.assert_allclose(got, want, rtol=case.rtol, atol=case.atol)


@pytest.mark.parametrize("layout", ["C", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_backend_case(case: Case, layout: str) -> None:
    x, gamma, beta, mean, var = case.inputs
    x = COMPACT[layout](x, 1)
    eps = case.attributes.get("epsilon", 1e-5)
    dy = np.zeros_like(x)
    if not case.attributes.get("training_mode"):
        y = fastbn.batch_norm_inference(x, mean, var, gamma, beta, eps=eps)
        (want,) = case.outputs
        check("y", x.dtype, y, want, scales(dy, x, mean, var, gamma, beta, 1, eps, False).y)
        _passes(case, y, want)
        return

    # ONNX's momentum is the weight of the OLD value, and its running variance is the biased one.
    decay = case.attributes.get("momentum", 0.9)
    bn = fastbn.BatchNorm(x.shape[1], eps=eps, momentum=1 - decay, unbiased_running_var=False)
    bn.load_state_dict({"weight": gamma, "bias": beta, "running_mean": mean, "running_var": var})
    y = bn(x)
    want, want_mean, want_var = case.outputs
    stats = published.statistics(x, 1)
    check("y", x.dtype, y, want, scales(dy, x, stats.mean, stats.var, gamma, beta, 1, eps, True).y)
    check("mean", x.dtype, bn.running_mean, want_mean, np.abs(mean) + np.sqrt(stats.var))
    check("var", x.dtype, bn.running_var, want_var, var + stats.var)
    for got, expected in ((y, want), (bn.running_mean, want_mean), (bn.running_var, want_var)):
        _passes(case, got, expected)
